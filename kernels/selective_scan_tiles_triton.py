"""The selective scan in tiles of time, with explicit layouts: every exponential is computed once, at any batch size.

A tile is SEGMENTS x TOKENS tokens of CHANNELS channels. A thread owns TOKENS consecutive tokens of one channel, and
SEGMENTS lanes of a warp lie side by side in time. For each of the d_state states, one after the other:

    1. each thread runs the recurrence over its own tokens from zero: its segment's last state, and its decay, which is
       exp(A ΣΔ), one exponential more;
    2. the lanes compose these pairs, log2(SEGMENTS) shuffles, with the carry from the tile before in the first segment;
    3. each thread runs the recurrence again from the state that entered its segment and adds C h to its outputs.

The decays exp(Δ A) of step 1 are still in registers in step 3. That is 6 arithmetic instructions and 1 exponential for
a (token, channel, state), against the 5 and 1 of a plain loop over time, which at batch 1 leaves the chip half empty,
and against 8 and 2 of two passes over chunks. All that is done once per token and channel (softplus, Δx, skip, gate)
is done in a layout that reads memory in 16-byte pieces, and handed over through shared memory.

B and C come as float32 in the order in which threads read them, see `_arrange`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statespan.kernels.gluon_frontend import (
    LOG2E,
    BlockedLayout,
    SliceLayout,
    arange,
    async_copy,
    compose,
    convert,
    filled,
    gl,
    jit,
    latter,
    sigmoid,
    softplus,
    through,
)
from statespan.kernels.triton_common import INTERPRETED, pad_counts, unit_stride, wide_vector


@dataclass(frozen=True)
class Tiling:
    """How a tile lies on the threads; powers of two."""

    tokens: int = 16
    segments: int = 16
    channels: int = 8
    warps: int = 4
    staged: bool = not INTERPRETED
    """B and C of a tile wait in shared memory."""
    unroll: int = 2
    """States handled by one turn of the loop; divides d_state."""
    registers: int | None = 168
    """At most so many a thread, None for as many as the compiler likes: 168 lets three programs of 4 warps share a
    multiprocessor, with the filter as without it."""

    @property
    def tile(self) -> int:
        return self.tokens * self.segments

    def constants(self, d_state: int) -> dict[str, Any]:
        """The kernels' constexpr arguments"""
        padded = triton.next_power_of_2(d_state)
        return {
            "N": d_state, "PADDED_N": padded, "STAGED": self.staged and padded == d_state,
            "UNROLL": math.gcd(self.unroll, d_state), "TOKENS": self.tokens, "SEGMENTS": self.segments,
            "CHANNELS": self.channels, "WARPS": self.warps, "num_warps": self.warps, "maxnreg": self.registers,
        }  # fmt: skip


@triton.jit(do_not_specialize=["length"])
def _arrange(
    B_ptr, C_ptr, pads_ptr, out_ptr, length, B_batch, B_row, B_group, C_batch, C_row, C_group,
    N: tl.constexpr, PADDED_N: tl.constexpr, GROUPS: tl.constexpr, HAS_PADS: tl.constexpr, TOKENS: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """B, C (batch, length, groups, N) -> (batch, group, tile, N, 2, TOKENS / 4, SEGMENTS, 4), zeros off the ends"""
    TILE: tl.constexpr = TOKENS * SEGMENTS
    batch, group = tl.program_id(1).to(tl.int64), tl.program_id(2)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    n = tl.arange(0, PADDED_N)
    first = 0
    if HAS_PADS:
        first = tl.load(pads_ptr + batch)
    ok = ((t < length) & (t >= first))[:, None] & (n < N)[None, :]
    B = tl.load(B_ptr + batch * B_batch + t[:, None] * B_row + group * B_group + n[None, :], mask=ok, other=0.0)
    C = tl.load(C_ptr + batch * C_batch + t[:, None] * C_row + group * C_group + n[None, :], mask=ok, other=0.0)
    tiles = tl.cdiv(length, TILE)
    inside = t % TILE  # = segment * TOKENS + token
    place = inside % TOKENS // 4 * (SEGMENTS * 4) + inside // TOKENS * 4 + inside % 4
    at = ((batch * GROUPS + group) * tiles + t // TILE) * (2 * N * TILE) + place
    at = at[:, None] + n[None, :] * (2 * TILE)
    exists = (t < tiles * TILE)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + at, B.to(tl.float32), mask=exists)
    tl.store(out_ptr + at + TILE, C.to(tl.float32), mask=exists)


@jit(do_not_specialize=["length"])
def _scan(
    x_ptr, dt_ptr, A_ptr, BC_ptr, D_ptr, z_ptr, bias_ptr, keep_ptr, scale_ptr, pads_ptr, state_ptr,
    y_ptr, starts_ptr, final_ptr, length, d_inner, per_group, x_batch, x_row, dt_batch, dt_row, z_batch, z_row,
    N: tl.constexpr, PADDED_N: tl.constexpr, GROUPS: tl.constexpr, BLOCKS_A_GROUP: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_PADS: tl.constexpr, HAS_STATE: tl.constexpr, SAVE: tl.constexpr,
    STAGED: tl.constexpr, UNROLL: tl.constexpr, TOKENS: tl.constexpr, SEGMENTS: tl.constexpr,
    CHANNELS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = TOKENS * SEGMENTS
    # OWN: (segment, token, channel), a thread's tokens in its registers; IO: the same, as memory likes to be read
    OWN: tl.constexpr = BlockedLayout([1, TOKENS, 1], [SEGMENTS, 1, 32 // SEGMENTS], [1, 1, WARPS], [1, 0, 2])
    VECTOR: tl.constexpr = min(CHANNELS, 8)
    ROWS: tl.constexpr = 32 * VECTOR // CHANNELS  # rows of memory a warp reads at once
    DOWN: tl.constexpr = min(ROWS, TOKENS)
    IO: tl.constexpr = BlockedLayout([1, 1, VECTOR], [ROWS // DOWN, DOWN, CHANNELS // VECTOR], [WARPS, 1, 1], [2, 1, 0])
    # SEG: (segment or state, channel), one number a segment
    SEG: tl.constexpr = BlockedLayout([1, 1], [SEGMENTS, 32 // SEGMENTS], [1, WARPS], [0, 1])
    TOKEN: tl.constexpr = SliceLayout(2, OWN)  # (segment, token), the same for all channels

    batch = gl.program_id(1).to(gl.int64)
    group = gl.program_id(0) // BLOCKS_A_GROUP
    block = gl.program_id(0) % BLOCKS_A_GROUP
    tiles = (length + TILE - 1) // TILE
    c = block * CHANNELS + arange(CHANNELS, SliceLayout(0, SliceLayout(1, IO)))
    c_ok = c < per_group
    d = group * per_group + c
    c_state = block * CHANNELS + arange(CHANNELS, SliceLayout(0, SEG))
    d_state = (group * per_group + c_state)[None, :]
    n = arange(PADDED_N, SliceLayout(1, SEG))[:, None]
    state_ok = (n < N) & (c_state < per_group)[None, :]
    in_segment = arange(SEGMENTS, SliceLayout(1, SliceLayout(2, IO)))[:, None]
    t_tile = in_segment * TOKENS + arange(TOKENS, SliceLayout(0, SliceLayout(2, IO)))[None, :]

    bias = gl.load(bias_ptr + d, mask=c_ok & HAS_BIAS, other=0.0)
    keep = gl.load(keep_ptr + batch * d_inner + d, mask=c_ok & HAS_KEEP, other=0.0)
    scale = gl.load(scale_ptr + batch * d_inner + d, mask=c_ok & HAS_SCALE, other=0.0)
    skip = gl.load(D_ptr + d, mask=c_ok & HAS_D, other=0.0)
    first = 0
    if HAS_PADS:
        first = gl.load(pads_ptr + batch)

    # index tensors for the shuffles
    this = filled([SEGMENTS, CHANNELS], 0, gl.int32, SEG)
    last = filled([PADDED_N, CHANNELS], SEGMENTS - 1, gl.int32, SEG)
    at_start = (arange(TOKENS, SliceLayout(0, SliceLayout(2, OWN))) == 0)[None, :, None]

    carry = filled([PADDED_N, CHANNELS], 0.0, gl.float32, SEG)  # the state before the tile
    if HAS_STATE:
        carry = gl.load(state_ptr + (batch * d_inner + d_state) * N + n, mask=state_ok, other=0.0).to(gl.float32)
    x_ptr += batch * x_batch
    dt_ptr += batch * dt_batch
    z_ptr += batch * z_batch
    y_ptr += batch * length * d_inner
    BC_ptr += (batch * GROUPS + group) * tiles * (2 * N * TILE)
    if STAGED:
        FIRST: tl.constexpr = 32 // SEGMENTS  # quads of a segment that a warp copies at once
        COPY: tl.constexpr = BlockedLayout([1, 1, 1, 4], [1, FIRST, SEGMENTS, 1], [1, WARPS, 1, 1], [3, 2, 1, 0])
        QUADS: tl.constexpr = SliceLayout(
            3, BlockedLayout([1, TOKENS // 4, 4, 1], [SEGMENTS, 1, 1, 32 // SEGMENTS], [1, 1, 1, WARPS], [2, 1, 0, 3])
        )
        # written as a whole, read by states
        whole_tile = gl.allocate_shared_memory(
            gl.float32, [N // UNROLL, UNROLL * TOKENS // 2, SEGMENTS, 4], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
        )
        shared = whole_tile._reinterpret(
            gl.float32, [N // UNROLL, UNROLL * TOKENS // 2, SEGMENTS, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
        )
        NO_QUAD: tl.constexpr = SliceLayout(3, COPY)
        line = arange(N // UNROLL, SliceLayout(1, SliceLayout(2, NO_QUAD)))[:, None, None] * (2 * UNROLL * TILE)
        line += arange(UNROLL * TOKENS // 2, SliceLayout(0, SliceLayout(2, NO_QUAD)))[None, :, None] * (SEGMENTS * 4)
        line += arange(SEGMENTS, SliceLayout(0, SliceLayout(1, NO_QUAD)))[None, None, :] * 4
        column = arange(4, SliceLayout(0, SliceLayout(1, SliceLayout(2, COPY))))
        piece = line[:, :, :, None] + column[None, None, None, :]
    else:
        quad = arange(TOKENS, SliceLayout(0, TOKEN))[None, :]
        piece = quad // 4 * (SEGMENTS * 4) + quad % 4 + arange(SEGMENTS, SliceLayout(1, TOKEN))[:, None] * 4

    for tile in range(tiles):
        if STAGED:
            async_copy.async_copy_global_to_shared(whole_tile, BC_ptr + piece)
            async_copy.commit_group()
        if SAVE:
            at = (batch * tiles + tile) * N * d_inner + n * d_inner + d_state
            gl.store(starts_ptr + at, carry, mask=state_ok)
        t = tile * TILE + t_tile
        live = (t < length) & (t >= first)
        ok = live[:, :, None] & c_ok[None, None, :]
        x = gl.load(x_ptr + t_tile[:, :, None] * x_row + d[None, None, :], mask=ok, other=0.0).to(gl.float32)
        dt = gl.load(dt_ptr + t_tile[:, :, None] * dt_row + d[None, None, :], mask=ok, other=0.0).to(gl.float32)
        step = dt + bias[None, None, :]
        if SOFTPLUS:
            step = softplus(step)
        if HAS_KEEP:
            step = gl.where(step > keep[None, None, :], step, 0.0)
        if HAS_SCALE:
            step *= scale[None, None, :]
        step = gl.where(ok, step, 0.0)
        step_x = convert(step * x, OWN)
        step = convert(step, OWN)
        elapsed = convert(gl.sum(step, axis=1), SEG)  # (segment, channel)
        y = filled([SEGMENTS, TOKENS, CHANNELS], 0.0, gl.float32, OWN)
        if STAGED:
            async_copy.wait_group(0)
        for some in range(N // UNROLL):
            for u in gl.static_range(UNROLL):
                k = some * UNROLL + u
                rate = gl.load(A_ptr + k * d_inner + d_state, mask=(c_state < per_group)[None, :], other=0.0)
                rates = convert(rate, SliceLayout(1, OWN))[:, None, :]
                if STAGED:
                    rows = shared.index(some).permute([1, 0, 2])  # (segment, B's quads and C's, 4)
                    B = rows.slice(2 * u * (TOKENS // 4), TOKENS // 4, 1).load(QUADS)
                    C = rows.slice((2 * u + 1) * (TOKENS // 4), TOKENS // 4, 1).load(QUADS)
                    B = convert(B.reshape([SEGMENTS, TOKENS]), TOKEN)
                    C = convert(C.reshape([SEGMENTS, TOKENS]), TOKEN)
                else:
                    B = gl.load(BC_ptr + 2 * k * TILE + piece)
                    C = gl.load(BC_ptr + (2 * k + 1) * TILE + piece)
                decay = gl.exp2(step * rates)
                drive = step_x * B[:, :, None]
                _, alone = gl.associative_scan((decay, drive), 1, compose)
                end = convert(gl.reduce(alone, 1, latter), SEG)
                whole = gl.exp2(elapsed * rate)
                entering, end = through(whole, end, gl.gather(carry, this + k, 0), False)
                carry = gl.where(n == k, gl.gather(end, last, 0), carry)
                entering = convert(entering, SliceLayout(1, OWN))[:, None, :]
                _, h = gl.associative_scan((decay, gl.where(at_start, decay * entering + drive, drive)), 1, compose)
                y += h * C[:, :, None]
        y = convert(y, IO)
        if HAS_D:
            x = gl.load(x_ptr + t_tile[:, :, None] * x_row + d[None, None, :], mask=ok, other=0.0).to(gl.float32)
            y += skip[None, None, :] * x
        if HAS_Z:
            z = gl.load(z_ptr + t_tile[:, :, None] * z_row + d[None, None, :], mask=ok, other=0.0).to(gl.float32)
            y *= z * sigmoid(z)
        if HAS_PADS:
            y = gl.where(ok, y, 0.0)
        inside = (t < length)[:, :, None] & c_ok[None, None, :]
        gl.store(y_ptr + t_tile[:, :, None] * d_inner + d[None, None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
        # 64-bit, once a tile: positions within a tile stay small
        x_ptr += TILE * x_row
        dt_ptr += TILE * dt_row
        z_ptr += TILE * z_row
        y_ptr += TILE * d_inner
        BC_ptr += 2 * N * TILE
    gl.store(final_ptr + (batch * d_inner + d_state) * N + n, carry, mask=state_ok)


def arrange(B: Tensor, C: Tensor, counts: Tensor | None, tiling: Tiling) -> Tensor:
    """B, C (batch, length, groups, d_state) -> float32 in the order in which a tile's threads read them"""
    batch, length, groups, d_state = B.shape
    tiles = triton.cdiv(length, tiling.tile)
    arranged = torch.empty(batch, groups, tiles, 2 * d_state * tiling.tile, dtype=torch.float32, device=B.device)
    block = min(64, tiling.tile)
    _arrange[(tiles * tiling.tile // block, batch, groups)](
        B, C, B if counts is None else counts, arranged, length, *B.stride()[:3], *C.stride()[:3],
        N=d_state, PADDED_N=triton.next_power_of_2(d_state), GROUPS=groups, HAS_PADS=counts is not None,
        TOKENS=tiling.tokens, SEGMENTS=tiling.segments, BLOCK=block,
    )  # fmt: skip
    return arranged


def scan_in_tiles(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    keep_above: Tensor | None = None,
    dt_scale: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
    tiling: Tiling = Tiling(),
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the last state, and with `save` the state before each tile, (batch, tiles, d_state, d_inner)."""
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    (batch, length, d_inner), (groups, d_state) = x.shape, B.shape[2:]
    x, dt, B, C = (unit_stride(v) for v in (x, dt, B, C))
    gate, counts, tiles = x if z is None else unit_stride(z), pad_counts(pads, x), triton.cdiv(length, tiling.tile)
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    y = torch.empty(batch, length, d_inner, dtype=x.dtype, device=x.device)
    final = torch.empty(batch, d_inner, d_state, **new)
    starts = torch.empty(batch, tiles, d_state, d_inner, **new) if save else None
    arranged = arrange(B, C, counts, tiling)
    pad_argument = x if counts is None else counts
    per_group = d_inner // groups
    blocks = triton.cdiv(per_group, tiling.channels)
    _scan[(groups * blocks, batch)](
        x, dt, (A.float() * LOG2E.value).T.contiguous(), arranged, wide_vector(D, x), gate, wide_vector(dt_bias, x),
        wide_vector(keep_above, x), wide_vector(dt_scale, x), pad_argument, wide_vector(state, x), y,
        y if starts is None else starts, final, length, d_inner, per_group,
        *x.stride()[:2], *dt.stride()[:2], *gate.stride()[:2], GROUPS=groups, BLOCKS_A_GROUP=blocks,
        HAS_PADS=counts is not None, HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None,
        SOFTPLUS=softplus, HAS_KEEP=keep_above is not None, HAS_SCALE=dt_scale is not None,
        HAS_STATE=state is not None, SAVE=save, **tiling.constants(d_state),
    )  # fmt: skip
    return y, final, starts
