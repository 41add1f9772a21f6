"""The selective scan of Mamba-2 (SSD) on CUDA: one pass over the tokens in chunks, the state in registers.

With a = Δ A (one number a token and head), s its running sum within a chunk and S the state at the chunk's start:

    y = ((C Bᵀ) ∘ exp(s_i - s_j) [i >= j] ∘ Δ_j) x  +  exp(s_i) C S
    S <- exp(s_end) S + (exp(s_end - s_j) Δ_j x)ᵀ B

Source: the chunked form of arXiv:2405.21060, section 6. mamba_ssm runs it as five kernels with every chunk's state in
memory, 2.6 MB a chunk at mamba2-2.7b's shape; here one program walks a head's chunks, so only segment ends are written.
Where batch x heads do not fill the chip, or leave its last wave half empty, the length is cut into segments: `_scan`
runs the state's recurrence alone first (ENDS: a quarter of the products), then starts each segment from its true state.

Where rows are dense, without pads, and begin at multiples of 16 bytes, the hardware moves whole blocks into shared
memory: a thread then spends a fifth fewer instructions on a chunk, and registers that held addresses hold the state.

Decays are differences of one running sum, masked before the exponential: nothing overflows. Products take operands in
x's dtype and sum in float32; the carried state is float32. Offsets are 64-bit where they depend on the position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from statespan.kernels.launch import relaunched
from statespan.kernels.ssd import ssd_chunked
from statespan.kernels.state_update_triton import ssd_state_update
from statespan.kernels.triton_common import (
    INTERPRETED,
    LOG2E,
    pad_counts,
    parts,
    power_of_2,
    sigmoid,
    softplus,
    unit_stride,
    vector,
)

__all__ = ["ssd", "ssd_state_update"]


@dataclass(frozen=True)
class Chunking:
    chunk: int = 64
    columns: int = 64
    """Columns of head_dim a program owns."""
    warps: int = 4
    stages: int = 2
    resident: int = 264
    """Programs that run at once: two for each multiprocessor of an H100."""
    segment: int = 1024
    """Tokens a segment has at least."""
    registers: int | None = None
    """Most a thread may have."""
    blocks: bool = True
    """Whether the hardware moves whole blocks (tensor memory accelerator) where rows lie so that it can."""

    def segments(self, length: int, programs: int) -> int:
        """For which the last wave of programs is fullest, at the least cost of finding the segments' states first."""

        def cost(count: int) -> float:
            ends = 0.25 * -(-programs * (count - 1) // (self.resident * 3 // 2))
            return (-(-programs * count // self.resident) + ends) / count

        return min(range(1, max(min(16, length // self.segment), 1) + 1), key=cost)


@relaunched
@triton.jit(do_not_specialize=["length", "padded"])
def _prepare(
    dt_ptr, A_ptr, bias_ptr, keep_ptr, scale_ptr, pads_ptr, passed_ptr, step_ptr,
    length, padded, heads, low, high, dt_batch, dt_row,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_PADS: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Per (batch, head, token): Δ, and s, log2 of the decay since the chunk's start; up to a whole number of chunks."""
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head_ok = head < heads
    first = 0
    if HAS_PADS:
        first = tl.load(pads_ptr + batch)
    live = ((t < length) & (t >= first))[:, None] & head_ok[None, :]
    at = batch * dt_batch + t.to(tl.int64)[:, None] * dt_row + head[None, :]
    step = tl.load(dt_ptr + at, mask=live, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias_ptr + head, mask=head_ok, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        step = softplus(step)
    if LIMITED:
        step = tl.minimum(tl.maximum(step, low), high)
    if HAS_KEEP:
        keep = tl.load(keep_ptr + batch * heads + head, mask=head_ok, other=0.0).to(tl.float32)
        step = tl.where(step > keep[None, :], step, 0.0)
    if HAS_SCALE:
        step *= tl.load(scale_ptr + batch * heads + head, mask=head_ok, other=0.0).to(tl.float32)[None, :]
    step = tl.where(live, step, 0.0)
    rate = tl.load(A_ptr + head, mask=head_ok, other=0.0).to(tl.float32) * LOG2E
    passed = tl.cumsum(step * rate[None, :], axis=0)
    at = (batch * heads + head.to(tl.int64)[None, :]) * padded + t[:, None]
    tl.store(passed_ptr + at, passed, mask=head_ok[None, :])
    tl.store(step_ptr + at, step, mask=head_ok[None, :])


@relaunched
@triton.jit(do_not_specialize=["length", "padded", "segment"])
def _scan(
    x_ptr, own_ptr, passed_ptr, step_ptr, passed_rows, step_rows, B_ptr, C_ptr, D_ptr, z_ptr, pads_ptr, state_ptr,
    ends_ptr, decays_ptr, y_ptr, final_ptr, length, padded, segment, heads, per_group, x_batch, x_row, x_head,
    z_batch, z_row, z_head, B_batch, B_row, B_group, C_batch, C_row, C_group, D_head,
    P: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr, SEGMENTS: tl.constexpr, ENDS: tl.constexpr,
    HAS_D: tl.constexpr, D_COLUMNS: tl.constexpr, HAS_Z: tl.constexpr, HAS_PADS: tl.constexpr,
    HAS_STATE: tl.constexpr, BLOCKS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ENDS: only the state at the end of every segment but the last, from zero. Else everything.

    BLOCKS: x (twice: `own` is the same), z, B, C, y and the two `_rows` are descriptors, of which the hardware moves
    whole blocks into shared memory. What is not read or written is None: a descriptor costs the host 10 us a launch.
    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    part = tl.program_id(0) % SEGMENTS
    column = tl.program_id(0) // SEGMENTS * COLUMNS
    p = column + tl.arange(0, COLUMNS)
    n = tl.arange(0, PADDED_N)
    q = tl.arange(0, CHUNK)
    p_ok, n_ok = (p < P)[None, :], (n < N)[None, :]
    WHOLE_P: tl.constexpr = P % COLUMNS == 0  # no column masks then
    WHOLE_N: tl.constexpr = PADDED_N == N
    group = head // per_group
    first = 0
    if HAS_PADS:
        first = tl.load(pads_ptr + batch)
    cell = n[:, None] + p[None, :] * N  # (N, P) into (P, N)
    cell_ok = (n < N)[:, None] & p_ok
    row = batch * heads + head
    state = tl.zeros((PADDED_N, COLUMNS), tl.float32)
    if not ENDS:
        if HAS_STATE:
            state = tl.load(state_ptr + row * P * N + cell, mask=cell_ok, other=0.0).to(tl.float32)
        for earlier in range(part):
            decay = tl.exp2(tl.load(decays_ptr + row * SEGMENTS + earlier))
            at = (row * SEGMENTS + earlier) * P * N
            state = state * decay + tl.load(ends_ptr + at + cell, mask=cell_ok, other=0.0)
    begin = part * segment
    passed_ptr += row * padded + begin
    step_ptr += row * padded + begin
    if BLOCKS:
        above, line = tl.program_id(2) * length, tl.program_id(2) * heads + head
        at_x, at_group = head * P + column, group * N
    else:
        # 64-bit up to here and once a chunk: within a chunk offsets stay small
        from_start = begin.to(tl.int64)
        own_ptr += batch * x_batch + from_start * x_row + head * x_head
        if HAS_Z and not ENDS:
            z_ptr += batch * z_batch + from_start * z_row + head * z_head
        B_ptr += batch * B_batch + from_start * B_row + group * B_group
        if not ENDS:
            C_ptr += batch * C_batch + from_start * C_row + group * C_group
            y_ptr += ((batch * length + from_start) * heads + head) * P
    skip = 0.0
    if HAS_D:
        if D_COLUMNS:
            skip = tl.load(D_ptr + head * D_head + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
        else:
            skip = tl.load(D_ptr + head * D_head).to(tl.float32)
    elapsed = 0.0
    stop = tl.minimum(begin + segment, length)
    if ENDS:
        stop = tl.where(part == SEGMENTS - 1, begin, stop)  # nothing comes after it
    for start in tl.range(begin, stop, CHUNK, num_stages=STAGES):
        inside = start + q < length
        live = inside & (start + q >= first) if HAS_PADS else inside
        ok = live[:, None] if WHOLE_P else live[:, None] & p_ok
        n_live = live[:, None] if WHOLE_N else live[:, None] & n_ok
        end = tl.load(passed_ptr + CHUNK - 1)
        if BLOCKS:  # rows behind the end are zeros or the batch's next row, and have no step
            step = tl.reshape(step_rows.load([line, start]), [CHUNK])
            passed = tl.reshape(passed_rows.load([line, start]), [CHUNK])
            B = B_ptr.load([above + start, at_group]).to(DOT)
        else:
            step, passed = tl.load(step_ptr + q), tl.load(passed_ptr + q)
            B = tl.load(B_ptr + q[:, None] * B_row + n[None, :], mask=n_live, other=0.0).to(DOT)
        if not ENDS:
            if BLOCKS:
                C = C_ptr.load([above + start, at_group]).to(DOT)
            else:
                C = tl.load(C_ptr + q[:, None] * C_row + n[None, :], mask=n_live, other=0.0).to(DOT)
            scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)  # (Q, Q)
            gaps = tl.where(q[:, None] >= q[None, :], passed[:, None] - passed[None, :], float("-inf"))
            weights = (scores * tl.exp2(gaps) * step[None, :]).to(DOT)
            y = tl.dot(C, state.to(DOT), input_precision=PRECISION) * tl.exp2(passed)[:, None]
        # only a load that nothing but one product reads goes to it from where it landed; so two of the same block
        if BLOCKS:
            if not ENDS:
                x = x_ptr.load([above + start, at_x])
            own = own_ptr.load([above + start, at_x])
        else:
            x = tl.load(own_ptr + q[:, None] * x_row + p[None, :], mask=ok, other=0.0)
            own = x
        if not ENDS:
            y = tl.dot(weights, x.to(DOT), acc=y, input_precision=PRECISION)
            if HAS_D:
                y += skip * own.to(tl.float32)
            if HAS_Z:
                if BLOCKS:
                    z = z_ptr.load([above + start, at_x]).to(tl.float32)
                else:
                    z = tl.load(z_ptr + q[:, None] * z_row + p[None, :], mask=ok, other=0.0).to(tl.float32)
                y *= z * sigmoid(z)
            if HAS_PADS:
                y = tl.where(live[:, None], y, 0.0)
            if BLOCKS:
                y_ptr.store([above + start, at_x], y.to(y_ptr.dtype))
            else:
                at = y_ptr + q[:, None] * (heads * P) + p[None, :]
                tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] if WHOLE_P else inside[:, None] & p_ok)
        driven = own.to(tl.float32) * (step * tl.exp2(end - passed))[:, None]
        state = tl.dot(tl.trans(B), driven.to(DOT), acc=state * tl.exp2(end), input_precision=PRECISION)
        elapsed += end
        passed_ptr += CHUNK
        step_ptr += CHUNK
        if not BLOCKS:
            own_ptr += CHUNK * x_row
            B_ptr += CHUNK * B_row
            if HAS_Z and not ENDS:
                z_ptr += CHUNK * z_row
            if not ENDS:
                C_ptr += CHUNK * C_row
                y_ptr += CHUNK * heads * P
    if ENDS:
        tl.store(ends_ptr + (row * SEGMENTS + part) * P * N + cell, state, mask=cell_ok)
        tl.store(decays_ptr + row * SEGMENTS + part, elapsed)
    elif part == SEGMENTS - 1:
        tl.store(final_ptr + row * P * N + cell, state, mask=cell_ok)


def ssd(
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
    dt_limit: tuple[float, float] | None = None,
    keep_above: Tensor | None = None,
    dt_scale: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
    chunking: Chunking | None = None,
) -> tuple[Tensor, Tensor]:
    """x, z (batch, length, heads, head_dim), dt (batch, length, heads) -> y like x, the last state in float32.

    Where a gradient is asked for, the chunked products in torch: they are matrix-bound and differentiable.
    """
    extras: dict[str, Any] = {
        "D": D, "z": z, "dt_bias": dt_bias, "softplus": softplus, "dt_limit": dt_limit, "keep_above": keep_above,
        "dt_scale": dt_scale, "pads": pads, "state": state,
    }  # fmt: skip
    tensors = (x, dt, A, B, C, *(v for v in extras.values() if isinstance(v, Tensor)))
    if torch.is_grad_enabled() and any(v.requires_grad for v in tensors):
        return ssd_chunked(x, dt, A, B, C, **extras)
    batch, length, heads, head_dim = x.shape
    final = torch.empty(batch, heads, head_dim, B.shape[-1], dtype=torch.float32, device=x.device)
    y = torch.empty(batch, length, heads, head_dim, dtype=x.dtype, device=x.device)
    _launch(x, dt, A, B, C, y, final, chunking or _chunking(B.shape[-1]), **extras)
    return y, final


def _chunking(d_state: int) -> Chunking:
    return Chunking(warps=8) if d_state > 128 else Chunking()


def _launch(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, y: Tensor, final: Tensor, chunking: Chunking, *,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, softplus: bool, dt_limit: tuple[float, float] | None,
    keep_above: Tensor | None, dt_scale: Tensor | None, pads: tuple[int, ...] | None, state: Tensor | None,
) -> None:  # fmt: skip
    (batch, length, heads, head_dim), (groups, d_state) = x.shape, B.shape[2:]
    x, dt, B, C = (unit_stride(v) for v in (x, dt, B, C))
    gate, counts = x if z is None else unit_stride(z), pad_counts(pads, x)
    columns = min(chunking.columns, max(power_of_2(head_dim), 16))
    blocks = parts(head_dim, columns)
    # batch 1 decides where outputs must not depend on a row's neighbours
    rows = 1 if torch.are_deterministic_algorithms_enabled() else batch
    segments = chunking.segments(length, rows * heads * blocks)
    segment = parts(parts(length, segments), chunking.chunk) * chunking.chunk
    segments = parts(length, segment) if length else 1
    padded = parts(length, chunking.chunk) * chunking.chunk
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    ends = torch.empty(batch, heads, segments, head_dim, d_state, **new) if segments > 1 else final
    decays = torch.empty(batch, heads, segments, **new) if segments > 1 else final
    skip = vector(D, x)
    wide = x.dtype == torch.float32 or INTERPRETED
    low, high = dt_limit or (0.0, 0.0)
    passed, steps = (torch.empty(batch, heads, padded, **new) for _ in range(2))
    pad_argument = vector(counts, x)
    if length:
        _prepare[(padded // chunking.chunk, parts(heads, 16), batch)](
            dt, vector(A, x), vector(dt_bias, x), vector(keep_above, x), vector(dt_scale, x), pad_argument, passed,
            steps, length, padded, heads, low, high, *dt.stride()[:2],
            HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus, LIMITED=dt_limit is not None,
            HAS_KEEP=keep_above is not None, HAS_SCALE=dt_scale is not None, HAS_PADS=counts is not None,
            CHUNK=chunking.chunk, HEADS=16, num_warps=4,
        )  # fmt: skip

    rows_of: list[Any] = [x, B, C, y] if z is None else [x, B, C, y, gate]
    sums: list[Any] = [None, None]
    if as_blocks := counts is None and moves_blocks(chunking, columns, *rows_of):
        rows_of = [_blocks(v, chunking.chunk, d_state if v is B or v is C else columns) for v in rows_of]
        lines = ([batch * heads, padded], [padded, 1], [1, chunking.chunk])
        sums = [TensorDescriptor(v, *lines) for v in (passed, steps)]
    own_rows, B_rows, C_rows, y_rows, gate_rows = rows_of if z is not None else [*rows_of, None]
    x_rows = own_rows if as_blocks else None
    options: dict[str, Any] = {"num_warps": chunking.warps}
    if not INTERPRETED:
        options["maxnreg"] = chunking.registers

    def run(only_ends: bool) -> None:
        x_here, C_here, z_here, y_here = (None,) * 4 if only_ends else (x_rows, C_rows, gate_rows, y_rows)
        _scan[(segments * blocks, heads, batch)](
            x_here, own_rows, passed, steps, *sums, B_rows, C_here, skip, z_here, pad_argument, vector(state, x),
            ends, decays, y_here, final, length, padded, segment, heads, heads // groups, *x.stride()[:3],
            *gate.stride()[:3], *B.stride()[:3], *C.stride()[:3], skip.stride(0),
            P=head_dim, N=d_state, PADDED_N=max(power_of_2(d_state), 16), SEGMENTS=segments,
            ENDS=only_ends, HAS_D=D is not None, D_COLUMNS=skip.ndim == 2, HAS_Z=z is not None,
            HAS_PADS=counts is not None, HAS_STATE=state is not None, BLOCKS=as_blocks,
            DOT=tl.float32 if wide else getattr(tl, str(x.dtype)[6:]), PRECISION="ieee" if wide else "tf32",
            CHUNK=chunking.chunk, COLUMNS=columns, STAGES=chunking.stages, **options,
        )  # fmt: skip

    if segments > 1:
        run(only_ends=True)
    run(only_ends=False)


def moves_blocks(chunking: Chunking, columns: int, x: Tensor, B: Tensor, *others: Tensor) -> bool:
    """Whether the hardware can move x, B and the others, (batch, length, heads, width), in whole blocks: widths that
    blocks part evenly, no block with tokens of two rows of the batch, and no more than shared memory holds."""
    (batch, length, _, head_dim), d_state = x.shape, B.shape[-1]
    whole = head_dim % columns == 0 and d_state == max(power_of_2(d_state), 16)
    apart = length > 0 and (batch == 1 or length % chunking.chunk == 0)
    small = INTERPRETED or (x.element_size() == 2 and d_state <= 128)
    return chunking.blocks and whole and apart and small and all(_dense_rows(v) for v in (x, B, *others))


def _dense_rows(v: Tensor) -> bool:
    """Whether (batch, length, heads, width) is rows of one stride, each dense and each at a multiple of 16 bytes"""
    batch, length, heads, width = v.shape
    dense = v.stride(3) == 1 and (heads == 1 or v.stride(2) == width)
    even = v.data_ptr() % 16 == 0 and v.stride(1) * v.element_size() % 16 == 0
    return dense and even and (batch == 1 or v.stride(0) == length * v.stride(1))


def _blocks(v: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """(batch, length, heads, width) as blocks of (batch * length, heads * width)"""
    batch, length, heads, width = v.shape
    return TensorDescriptor(v, [batch * length, heads * width], [v.stride(1), 1], [rows, columns])
