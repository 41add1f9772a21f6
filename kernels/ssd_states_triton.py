"""The scan of Mamba-2 (SSD) on CUDA in two sweeps that fill the chip: states first, then every output by itself.

With s the running sum of a = Δ A since the interval's first token, S the state there as if its segment began with
none, E the state its segment really begins with, and r the sum of a from the segment's start to the interval's:

    y_i = Σ_{j <= i} (C_i · B_j) exp(s_i - s_j) Δ_j x_j  +  exp(s_i) C_i S  +  exp(s_i + r) C_i E

`_states` walks segments side by side and leaves S at each interval of 128 tokens; `_enter` adds up the segments' ends;
`_outputs` then needs nothing of its neighbours, holds no state, and so runs with twice the warps of `_scan`
(ssd_triton.py), which does both in one walk. The price is S in memory, 16 KB for 128 tokens and a head.

Source: the chunked form of arXiv:2405.21060, section 6. The hardware moves whole blocks (tensor memory accelerator), so
rows must be dense and without pads: see `fits`. Products take operands in x's dtype, S and E among them, and sum in
float32; sums of a are masked before the exponential: nothing overflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from statespan.kernels.triton_common import INTERPRETED, sigmoid


@dataclass(frozen=True)
class Sweeps:
    interval: int = 128
    """Tokens between two states that are kept."""
    rows: int = 64
    """Outputs of a program; divides the interval."""
    state_warps: int = 8
    state_stages: int = 2
    output_warps: int = 4
    output_stages: int = 1
    registers: int | None = None
    """Most a thread of `_outputs` may have."""
    resident: int = 264
    """Programs of `_states` that run at once."""
    segment: int = 512
    """Tokens a segment has at least."""

    def segments(self, length: int, programs: int) -> int:
        """For which the last wave of programs is fullest; the fewest of those."""
        most = max(min(32, length // self.segment), 1)
        return min(range(1, most + 1), key=lambda count: (-(-programs * count // self.resident) / count, count))


@triton.jit(do_not_specialize=["length", "intervals", "segment", "segments"])
def _states(
    x_rows, passed_ptr, step_ptr, B_rows, states_rows, ends_ptr, since_ptr, decays_ptr,
    length, intervals, segment, segments, heads, per_group,
    P: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, INTERVAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state at the start of every interval of a segment and behind its last, from zero

    states_rows: (batch * heads * intervals * N, P), ends: (batch, heads, segments, N, P), since: (batch, heads,
    intervals) log2 of the decay since the segment's start, decays: (batch, heads, segments) that of whole segments.
    `segment` counts intervals.
    """
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = batch * heads + head
    q = tl.arange(0, INTERVAL)
    state = tl.zeros((N, P), tl.float32)
    elapsed = 0.0
    begin = part * segment
    at = row.to(tl.int64) * intervals + begin
    passed_ptr += at * INTERVAL
    step_ptr += at * INTERVAL
    since_ptr += at
    above = batch * length
    for place in tl.range(begin, tl.minimum(begin + segment, intervals), num_stages=STAGES):
        states_rows.store([(row * intervals + place) * N, 0], state.to(states_rows.dtype))
        tl.store(since_ptr, elapsed)
        x = x_rows.load([above + place * INTERVAL, head * P])
        B = B_rows.load([above + place * INTERVAL, head // per_group * N]).to(DOT)
        step, passed, end = tl.load(step_ptr + q), tl.load(passed_ptr + q), tl.load(passed_ptr + INTERVAL - 1)
        driven = x.to(tl.float32) * (step * tl.exp2(end - passed))[:, None]
        state = tl.dot(tl.trans(B), driven.to(DOT), acc=state * tl.exp2(end), input_precision="ieee")
        elapsed += end
        passed_ptr += INTERVAL
        step_ptr += INTERVAL
        since_ptr += 1
    n, p = tl.arange(0, N), tl.arange(0, P)
    at = row.to(tl.int64) * segments + part
    tl.store(ends_ptr + at * N * P + n[:, None] * P + p[None, :], state)
    tl.store(decays_ptr + at, elapsed)


@triton.jit(do_not_specialize=["segments"])
def _enter(
    state_ptr, ends_ptr, decays_ptr, entering_ptr, final_ptr, segments,
    P: tl.constexpr, N: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What every segment really begins with (N, P), and the state (P, N) behind the last"""
    row = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    turned = cell % P * N + cell // P  # (N, P) into (P, N)
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_STATE:
        state = tl.load(state_ptr + row * P * N + turned)
    for part in range(segments):
        at = row * segments + part
        tl.store(entering_ptr + at * N * P + cell, state.to(entering_ptr.dtype.element_ty))
        state = state * tl.exp2(tl.load(decays_ptr + at)) + tl.load(ends_ptr + at * N * P + cell)
    tl.store(final_ptr + row * P * N + turned, state)


@triton.jit(do_not_specialize=["length", "intervals", "segment", "segments"])
def _outputs(
    x_rows, passed_ptr, step_ptr, B_rows, C_rows, D_ptr, z_rows, states_rows, entering_rows, since_ptr, y_rows,
    length, intervals, segment, segments, heads, per_group,
    P: tl.constexpr, N: tl.constexpr, HAS_D: tl.constexpr, D_COLUMNS: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_STATE: tl.constexpr, DOT: tl.constexpr, INTERVAL: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of a head"""
    head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place, row, group = block * ROWS // INTERVAL, batch * heads + head, head // per_group
    above, q = batch * length, tl.arange(0, ROWS)
    at = row.to(tl.int64) * intervals * INTERVAL
    passed_ptr += at
    step_ptr += at
    passed = tl.load(passed_ptr + block * ROWS + q)
    C = C_rows.load([above + block * ROWS, group * N]).to(DOT)
    state = states_rows.load([(row * intervals + place) * N, 0]).to(DOT)
    y = tl.dot(C, state, input_precision="ieee") * tl.exp2(passed)[:, None]
    part = place // segment
    if HAS_STATE or part > 0:
        since = tl.load(since_ptr + row.to(tl.int64) * intervals + place)
        entering = entering_rows.load([(row * segments + part) * N, 0]).to(DOT)
        y += tl.dot(C, entering, input_precision="ieee") * tl.exp2(passed + since)[:, None]
    for other in tl.range(place * (INTERVAL // ROWS), block, num_stages=STAGES):
        x, B = x_rows.load([above + other * ROWS, head * P]), B_rows.load([above + other * ROWS, group * N]).to(DOT)
        before, step = tl.load(passed_ptr + other * ROWS + q), tl.load(step_ptr + other * ROWS + q)
        weights = tl.dot(C, tl.trans(B), input_precision="ieee")
        weights *= tl.exp2(passed[:, None] - before[None, :]) * step[None, :]
        y = tl.dot(weights.to(DOT), x.to(DOT), acc=y, input_precision="ieee")
    x, B = x_rows.load([above + block * ROWS, head * P]), B_rows.load([above + block * ROWS, group * N]).to(DOT)
    step = tl.load(step_ptr + block * ROWS + q)
    weights = tl.dot(C, tl.trans(B), input_precision="ieee")
    gaps = tl.where(q[:, None] >= q[None, :], passed[:, None] - passed[None, :], float("-inf"))
    weights *= tl.exp2(gaps) * step[None, :]
    y = tl.dot(weights.to(DOT), x.to(DOT), acc=y, input_precision="ieee")
    if HAS_D:
        if D_COLUMNS:
            y += tl.load(D_ptr + head * P + tl.arange(0, P))[None, :] * x.to(tl.float32)
        else:
            y += tl.load(D_ptr + head) * x.to(tl.float32)
    if HAS_Z:
        z = z_rows.load([above + block * ROWS, head * P]).to(tl.float32)
        y *= z * sigmoid(z)
    y_rows.store([above + block * ROWS, head * P], y.to(y_rows.dtype))


def fits(sweeps: Sweeps, x: Tensor, B: Tensor, *others: Tensor | None) -> bool:
    """Whether whole blocks can be moved: dense rows at multiples of 16 bytes, widths that are powers of two, and no
    block that holds tokens of two rows of the batch."""
    (batch, length, _, head_dim), d_state = x.shape, B.shape[-1]
    widths = all(width >= 16 and width & (width - 1) == 0 for width in (head_dim, d_state))
    return widths and length > 0 and (batch == 1 or length % sweeps.interval == 0) and all(
        map(_dense, (x, B, *(v for v in others if v is not None)))
    )  # fmt: skip


def _dense(v: Tensor) -> bool:
    """Whether (batch, length, heads, width) is rows of one stride, each dense and at a multiple of 16 bytes"""
    batch, length, heads, width = v.shape
    dense = v.stride(3) == 1 and (heads == 1 or v.stride(2) == width)
    even = v.data_ptr() % 16 == 0 and v.stride(1) * v.element_size() % 16 == 0
    return dense and even and (batch == 1 or v.stride(0) == length * v.stride(1))


def _blocks(v: Tensor, rows: int) -> TensorDescriptor:
    """(batch, length, heads, width) as blocks of `rows` x width in (batch * length, heads * width)"""
    batch, length, heads, width = v.shape
    return TensorDescriptor(v, [batch * length, heads * width], [v.stride(1), 1], [rows, width])


def _square(v: Tensor, rows: int) -> TensorDescriptor:
    """A contiguous (..., width) as blocks of `rows` x width"""
    width = v.shape[-1]
    return TensorDescriptor(v, [v.numel() // width, width], [width, 1], [rows, width])


def sweep(
    x: Tensor, B: Tensor, C: Tensor, y: Tensor, final: Tensor, passed: Tensor, steps: Tensor, sweeps: Sweeps, *,
    D: Tensor | None, z: Tensor | None, state: Tensor | None,
) -> None:  # fmt: skip
    """Fill y and final.

    Args:
        x, y, z: (batch, length, heads, head_dim) and B, C: (batch, length, groups, d_state), such that `fits`.
        final, state: (batch, heads, head_dim, d_state), float32.
        passed, steps: (batch, heads, length up to whole intervals): sums of log2 decays since the interval's start, Δ.
    """
    (batch, length, heads, P), (groups, N) = x.shape, B.shape[2:]
    intervals = passed.shape[-1] // sweeps.interval
    rows = 1 if torch.are_deterministic_algorithms_enabled() else batch
    segments = sweeps.segments(length, rows * heads)
    segment = triton.cdiv(intervals, segments)
    segments = triton.cdiv(intervals, segment)
    new: dict[str, Any] = {"device": x.device}
    states = torch.empty(batch, heads, intervals, N, P, dtype=x.dtype, **new)
    entering = torch.empty(batch, heads, segments, N, P, dtype=x.dtype, **new)
    ends = torch.empty(batch, heads, segments, N, P, dtype=torch.float32, **new)
    since = torch.empty(batch, heads, intervals, dtype=torch.float32, **new)
    decays = torch.empty(batch, heads, segments, dtype=torch.float32, **new)
    dot = tl.float32 if INTERPRETED else getattr(tl, str(x.dtype)[6:])  # the interpreter has no narrow products
    sizes = (length, intervals, segment, segments, heads, heads // groups)
    _states[(segments, heads, batch)](
        _blocks(x, sweeps.interval), passed, steps, _blocks(B, sweeps.interval), _square(states, N), ends, since,
        decays, *sizes, P=P, N=N, DOT=dot, INTERVAL=sweeps.interval, STAGES=sweeps.state_stages,
        num_warps=sweeps.state_warps,
    )  # fmt: skip
    cells = min(1024, N * P)
    _enter[(N * P // cells, batch * heads)](
        x if state is None else state, ends, decays, entering, final, segments, P=P, N=N,
        HAS_STATE=state is not None, BLOCK=cells,
    )  # fmt: skip
    x_rows = _blocks(x, sweeps.rows)
    options: dict[str, Any] = {"num_warps": sweeps.output_warps}
    if not INTERPRETED:
        options["maxnreg"] = sweeps.registers
    _outputs[(heads, triton.cdiv(length, sweeps.rows), batch)](
        x_rows, passed, steps, _blocks(B, sweeps.rows), _blocks(C, sweeps.rows), x if D is None else D,
        x_rows if z is None else _blocks(z, sweeps.rows), _square(states, N), _square(entering, N), since,
        _blocks(y, sweeps.rows), *sizes, P=P, N=N, HAS_D=D is not None,
        D_COLUMNS=D is not None and D.ndim == 2, HAS_Z=z is not None, HAS_STATE=state is not None,
        DOT=dot, INTERVAL=sweeps.interval, ROWS=sweeps.rows, STAGES=sweeps.output_stages, **options,
    )  # fmt: skip
