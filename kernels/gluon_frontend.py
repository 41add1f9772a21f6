"""One source for two front ends: Gluon on a GPU, where layouts are explicit, plain Triton in its interpreter on a CPU.

A kernel written against the names below names a layout wherever one arises; in the interpreter nothing reads it. What
Gluon alone can do (shared memory, asynchronous copies) stands behind a constexpr that is False there.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from statespan.kernels.triton_common import INTERPRETED

constexpr_function: Any = triton.constexpr_function

if INTERPRETED:
    gl: Any = tl
    jit: Any = triton.jit
    async_copy: Any = None
    barrier: Any = None

    class BlockedLayout:
        """Stands for Gluon's; the interpreter has one place for all elements."""

        def __init__(self, *args: Any) -> None: ...

    SliceLayout = BlockedLayout

    @jit
    def arange(count: tl.constexpr, layout: tl.constexpr):
        return tl.arange(0, count)

    @jit
    def filled(shape: tl.constexpr, value, dtype: tl.constexpr, layout: tl.constexpr):
        return tl.full(shape, value, dtype)

    @jit
    def convert(x, layout: tl.constexpr):
        return x

    @jit
    def reciprocal(x):
        return 1.0 / x

    @jit
    def backwards(decay, own, TOKENS: tl.constexpr, CODE: tl.constexpr, NAMES: tl.constexpr):
        """g_t = own_t + decay_{t+1} g_{t+1} along axis 1, which lies in one thread"""
        return tl.associative_scan((decay, own), 1, decay_and_add, reverse=True)[1]

    @jit
    def through(whole, own, outside, BACK: tl.constexpr):
        """The recurrence over segments, axis 0: what enters each segment, and what leaves it.

        One turns what enters it into whole * it + own; `outside`, alike in all places, enters the first. BACK: from the
        last segment to the first.
        """
        SEGMENTS: tl.constexpr = whole.shape[0]
        at = tl.arange(0, SEGMENTS)[:, None] + tl.zeros(whole.shape, tl.int32)
        first: tl.constexpr = SEGMENTS - 1 if BACK else 0
        own = tl.where(at == first, whole * outside + own, own)
        _, end = tl.associative_scan((whole, own), 0, compose, reverse=BACK)
        before = tl.minimum(at + 1, SEGMENTS - 1) if BACK else tl.maximum(at - 1, 0)
        entering = tl.where(at == first, outside, tl.gather(end, before, 0))
        return entering, end
else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl  # type: ignore[no-redef]
    from triton.experimental.gluon.language import BlockedLayout, SliceLayout  # type: ignore[no-redef]  # noqa: F401
    from triton.experimental.gluon.language.nvidia.ampere import async_copy  # type: ignore[no-redef]  # noqa: F401

    jit = gluon.jit
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name since Triton 3.7, and before

    @jit
    def arange(count: tl.constexpr, layout: tl.constexpr):
        return gl.arange(0, count, layout=layout)

    @jit
    def filled(shape: tl.constexpr, value, dtype: tl.constexpr, layout: tl.constexpr):
        return gl.full(shape, value, dtype, layout)

    @jit
    def convert(x, layout: tl.constexpr):
        return gl.convert_layout(x, layout)

    @jit
    def reciprocal(x):
        """The hardware's own, 1 ulp, without a division's range checks: 0 for infinity."""
        return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)

    @jit
    def backwards(decay, own, TOKENS: tl.constexpr, CODE: tl.constexpr, NAMES: tl.constexpr):
        """g_t = own_t + decay_{t+1} g_{t+1} along axis 1, which lies in one thread; a reversed scan would shuffle it"""
        return gl.inline_asm_elementwise(CODE, NAMES, [decay, own], gl.float32, True, TOKENS)

    @jit
    def through(whole, own, outside, BACK: tl.constexpr):
        """The recurrence over segments, axis 0, which are neighbouring lanes; as above.

        An associative scan with `reverse` turns its operands around lane by lane: 15 shuffles more for 16 segments.
        """
        CODE: tl.constexpr = through_code(whole.shape[0], BACK)
        types: tl.constexpr = (gl.float32, gl.float32)
        return gl.inline_asm_elementwise(CODE, "=&f,=&f,f,f,f", [whole, own, outside], types, True, 1)


LOG2E = tl.constexpr(1.4426950408889634)


@constexpr_function
def _places(programs: int, rank: int, axis: int) -> list[list[int]]:
    """A layout's `cga_layout`: the programs of a cluster lie one after the other along `axis`, or hold the same (-1)"""
    return [[2**i * (k == axis) for k in range(rank)] for i in range(programs.bit_length() - 1)]


@constexpr_function
def over_cluster(own, lanes, warps, order, programs):
    """A blocked layout whose first axis is split over the programs of a cluster"""
    return BlockedLayout(own, lanes, warps, order, _places(programs, len(order), 0))


@constexpr_function
def same_in_cluster(warps, programs):
    """A layout of one axis that each program of a cluster has for itself"""
    return BlockedLayout([1], [32], [warps], [0], _places(programs, 1, -1))


@constexpr_function
def own_memory(programs):
    """Shared memory of one axis that each program of a cluster has for itself"""
    return gl.SwizzledSharedLayout(1, 1, 1, [0], _places(programs, 1, -1))


@constexpr_function
def through_code(segments: int, back: bool) -> str:
    """PTX of `through`: what enters, what leaves; then whole, own, outside. For 2, 4, ... 32 segments."""
    outer = (32 - segments) << 8  # shuffles stay within so many lanes
    move, bound = ("shfl.sync.down.b32", outer | 31) if back else ("shfl.sync.up.b32", outer)
    lines = ["{ .reg .pred there; .reg .f32 decay, other, from;", "mov.f32 decay, $2; mov.f32 $1, $3;"]
    distance = 1
    while distance < segments:
        lines.append(f"{move} other|there, decay, {distance}, {bound}, -1;")
        if distance == 1:
            lines.append("@!there fma.rn.f32 $1, decay, $4, $1;")
        lines.append(f"{move} from, $1, {distance}, {bound}, -1; @there fma.rn.f32 $1, decay, from, $1;")
        lines.append("@there mul.f32 decay, decay, other;")
        distance *= 2
    return " ".join([*lines, f"{move} $0|there, $1, 1, {bound}, -1; @!there mov.f32 $0, $4;", "}"])


@jit
def log1p_unit(u):
    """log(1 + u) for u in [0, 1] to 4e-8 of itself: u times the Chebyshev interpolant of log1p(u) / u, degree 8."""
    p = 0.0051261 * u - 0.02907406
    p = p * u + 0.07751609
    p = p * u - 0.13602248
    p = p * u + 0.19076881
    p = p * u - 0.24835399
    p = p * u + 0.33318122
    p = p * u - 0.49999445
    p = p * u + 0.99999997
    return p * u


@jit
def softplus(v):
    """log(1 + exp(v)), relative error below 1e-6; 0 where v is -inf."""
    return gl.maximum(v, 0.0) + log1p_unit(gl.exp2(gl.abs(v) * -LOG2E))


@jit
def sigmoid(v):
    return reciprocal(1.0 + gl.exp2(v * -LOG2E))


@jit
def compose(decay_1, drive_1, decay_2, drive_2):
    """h -> decay_2 * (decay_1 * h + drive_1) + drive_2, the scan's combine rule."""
    return decay_1 * decay_2, decay_2 * drive_1 + drive_2


@jit
def latter(first, second):
    """As a reduction's combine rule: the last element."""
    return second


@jit
def former(first, second):
    """As a reduction's combine rule: the first element."""
    return first


@jit
def decay_and_add(decay_after, after, decay, own):
    """The fold of `backwards`: each token's decay is handed on to the one before it."""
    return decay, own + decay_after * after


def backwards_code(tokens: int) -> tuple[str, str]:
    """PTX of `backwards` for one thread's tokens, results first, then decays, then own terms; and its constraints."""
    lines = [f"mov.f32 ${tokens - 1}, ${3 * tokens - 1};"]
    lines += [f"fma.rn.f32 ${t}, ${tokens + t + 1}, ${t + 1}, ${2 * tokens + t};" for t in reversed(range(tokens - 1))]
    return " ".join(lines), ",".join(["=&f"] * tokens + ["f"] * (2 * tokens))
