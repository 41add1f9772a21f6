"""The selective scan of Mamba-2 (SSD) on CUDA: one pass over the tokens in chunks, the state in registers.

With a = Δ A (one number a token and head), s its running sum within a chunk and S the state at the chunk's start:

    y = ((C Bᵀ) ∘ exp(s_i - s_j) [i >= j] ∘ Δ_j) x  +  exp(s_i) C S
    S <- exp(s_end) S + (exp(s_end - s_j) Δ_j x)ᵀ B

Source: the chunked form of arXiv:2405.21060, section 6. mamba_ssm runs it as five kernels with every chunk's state in
memory, 2.6 MB a chunk at mamba2-2.7b's shape; here one program walks a head's chunks, so only segment ends are written.
Where batch x heads do not fill the chip, or leave its last wave half empty, the length is cut into segments: `_scan`
runs the state's recurrence alone first (ENDS: a quarter of the products), then starts each segment from its true state.

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

from statespan.kernels.ssd import ssd_chunked
from statespan.kernels.ssd_states_triton import Sweeps, fits, sweep
from statespan.kernels.state_update_triton import ssd_state_update
from statespan.kernels.triton_common import INTERPRETED, LOG2E, pad_counts, sigmoid, softplus, unit_stride, wide_vector

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

    def segments(self, length: int, programs: int) -> int:
        """For which the last wave of programs is fullest, at the least cost of finding the segments' states first."""

        def cost(count: int) -> float:
            ends = 0.25 * -(-programs * (count - 1) // (self.resident * 3 // 2))
            return (-(-programs * count // self.resident) + ends) / count

        return min(range(1, max(min(16, length // self.segment), 1) + 1), key=cost)


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
        step += tl.load(bias_ptr + head, mask=head_ok, other=0.0)[None, :]
    if SOFTPLUS:
        step = softplus(step)
    if LIMITED:
        step = tl.minimum(tl.maximum(step, low), high)
    if HAS_KEEP:
        keep = tl.load(keep_ptr + batch * heads + head, mask=head_ok, other=0.0)
        step = tl.where(step > keep[None, :], step, 0.0)
    if HAS_SCALE:
        step *= tl.load(scale_ptr + batch * heads + head, mask=head_ok, other=0.0)[None, :]
    step = tl.where(live, step, 0.0)
    rate = tl.load(A_ptr + head, mask=head_ok, other=0.0) * LOG2E
    passed = tl.cumsum(step * rate[None, :], axis=0)
    at = (batch * heads + head.to(tl.int64)[None, :]) * padded + t[:, None]
    tl.store(passed_ptr + at, passed, mask=head_ok[None, :])
    tl.store(step_ptr + at, step, mask=head_ok[None, :])


@triton.jit(do_not_specialize=["length", "padded", "segment"])
def _scan(
    x_ptr, passed_ptr, step_ptr, B_ptr, C_ptr, D_ptr, z_ptr, pads_ptr, state_ptr, ends_ptr, decays_ptr, y_ptr,
    final_ptr, length, padded, segment, heads, per_group, x_batch, x_row, x_head, z_batch, z_row, z_head,
    B_batch, B_row, B_group, C_batch, C_row, C_group, D_head, D_column,
    P: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr, SEGMENTS: tl.constexpr, ENDS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_PADS: tl.constexpr, HAS_STATE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ENDS: only the state at the end of every segment but the last, from zero. Else everything."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    part = tl.program_id(0) % SEGMENTS
    p = tl.program_id(0) // SEGMENTS * COLUMNS + tl.arange(0, COLUMNS)
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
            state = tl.load(state_ptr + row * P * N + cell, mask=cell_ok, other=0.0)
        for earlier in range(part):
            decay = tl.exp2(tl.load(decays_ptr + row * SEGMENTS + earlier))
            at = (row * SEGMENTS + earlier) * P * N
            state = state * decay + tl.load(ends_ptr + at + cell, mask=cell_ok, other=0.0)
    begin = part * segment
    # 64-bit up to here and once a chunk: within a chunk offsets stay small
    from_start = begin.to(tl.int64)
    x_ptr += batch * x_batch + from_start * x_row + head * x_head
    passed_ptr += row * padded + begin
    step_ptr += row * padded + begin
    z_ptr += batch * z_batch + from_start * z_row + head * z_head
    B_ptr += batch * B_batch + from_start * B_row + group * B_group
    C_ptr += batch * C_batch + from_start * C_row + group * C_group
    y_ptr += ((batch * length + from_start) * heads + head) * P
    if HAS_D:
        skip = tl.load(D_ptr + head * D_head + p * D_column, mask=p < P, other=0.0)[None, :]
    elapsed = 0.0
    stop = tl.minimum(begin + segment, length)
    if ENDS:
        stop = tl.where(part == SEGMENTS - 1, begin, stop)  # nothing comes after it
    for start in tl.range(begin, stop, CHUNK, num_stages=STAGES):
        inside = start + q < length
        live = inside & (start + q >= first) if HAS_PADS else inside
        ok = live[:, None] if WHOLE_P else live[:, None] & p_ok
        n_live = live[:, None] if WHOLE_N else live[:, None] & n_ok
        x = tl.load(x_ptr + q[:, None] * x_row + p[None, :], mask=ok, other=0.0)
        B = tl.load(B_ptr + q[:, None] * B_row + n[None, :], mask=n_live, other=0.0).to(DOT)
        step, passed, end = tl.load(step_ptr + q), tl.load(passed_ptr + q), tl.load(passed_ptr + CHUNK - 1)
        if not ENDS:
            C = tl.load(C_ptr + q[:, None] * C_row + n[None, :], mask=n_live, other=0.0).to(DOT)
            scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)  # (Q, Q)
            gaps = tl.where(q[:, None] >= q[None, :], passed[:, None] - passed[None, :], float("-inf"))
            weights = scores * tl.exp2(gaps) * step[None, :]
            y = tl.dot(C, state.to(DOT), input_precision=PRECISION) * tl.exp2(passed)[:, None]
            y += tl.dot(weights.to(DOT), x.to(DOT), input_precision=PRECISION)
            if HAS_D:
                y += skip * x.to(tl.float32)
            if HAS_Z:
                z = tl.load(z_ptr + q[:, None] * z_row + p[None, :], mask=ok, other=0.0).to(tl.float32)
                y *= z * sigmoid(z)
            if HAS_PADS:
                y = tl.where(live[:, None], y, 0.0)
            at = y_ptr + q[:, None] * (heads * P) + p[None, :]
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] if WHOLE_P else inside[:, None] & p_ok)
        driven = x.to(tl.float32) * (step * tl.exp2(end - passed))[:, None]
        state = state * tl.exp2(end) + tl.dot(tl.trans(B), driven.to(DOT), input_precision=PRECISION)
        elapsed += end
        x_ptr += CHUNK * x_row
        passed_ptr += CHUNK
        step_ptr += CHUNK
        z_ptr += CHUNK * z_row
        B_ptr += CHUNK * B_row
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
    form: Chunking | Sweeps | None = None,
) -> tuple[Tensor, Tensor]:
    """x, z (batch, length, heads, head_dim), dt (batch, length, heads) -> y like x, the last state in float32.

    Where a gradient is asked for, the chunked products in torch: they are matrix-bound and differentiable. `form`
    chooses between one walk and two sweeps (ssd_states_triton.py), None by what the tensors allow.
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
    x, dt, B, C = (unit_stride(v) for v in (x, dt, B, C))
    extras["z"] = z if z is None else unit_stride(z)
    form = form or _form(x, B, C, extras["z"], y, pads)
    if isinstance(form, Sweeps):
        _sweep(x, dt, A, B, C, y, final, form, **extras)
    else:
        _launch(x, dt, A, B, C, y, final, form, **extras)
    return y, final


def _form(
    x: Tensor, B: Tensor, C: Tensor, z: Tensor | None, y: Tensor, pads: tuple[int, ...] | None
) -> Chunking | Sweeps:
    sweeps, small = Sweeps(), x.element_size() == 2 and x.shape[-1] * B.shape[-1] <= 64 * 128
    if small and not any(pads or ()) and fits(sweeps, x, B, C, z, y):
        return sweeps
    return Chunking(warps=8) if B.shape[-1] > 128 else Chunking()


def _prepared(
    x: Tensor, dt: Tensor, A: Tensor, chunk: int, counts: Tensor | None, dt_bias: Tensor | None, softplus: bool,
    dt_limit: tuple[float, float] | None, keep_above: Tensor | None, dt_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log2 of the decay since the start of each chunk, and Δ: (batch, heads, length up to whole chunks)"""
    batch, length, heads = dt.shape
    padded = triton.cdiv(length, chunk) * chunk
    passed, steps = (torch.empty(batch, heads, padded, dtype=torch.float32, device=x.device) for _ in range(2))
    low, high = dt_limit or (0.0, 0.0)
    if length:
        _prepare[(padded // chunk, triton.cdiv(heads, 16), batch)](
            dt, wide_vector(A, x), wide_vector(dt_bias, x), wide_vector(keep_above, x), wide_vector(dt_scale, x),
            x if counts is None else counts, passed, steps, length, padded, heads, low, high, *dt.stride()[:2],
            HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus, LIMITED=dt_limit is not None,
            HAS_KEEP=keep_above is not None, HAS_SCALE=dt_scale is not None, HAS_PADS=counts is not None,
            CHUNK=chunk, HEADS=16, num_warps=4,
        )  # fmt: skip
    return passed, steps


def _sweep(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, y: Tensor, final: Tensor, sweeps: Sweeps, *,
    D: Tensor | None, z: Tensor | None, pads: tuple[int, ...] | None, state: Tensor | None, **steps: Any,
) -> None:  # fmt: skip
    passed, sizes = _prepared(x, dt, A, sweeps.interval, None, **steps)
    skip, first = (None if v is None else wide_vector(v, x) for v in (D, state))
    sweep(x, B, C, y, final, passed, sizes, sweeps, D=skip, z=z, state=first)


def _launch(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, y: Tensor, final: Tensor, chunking: Chunking, *,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, softplus: bool, dt_limit: tuple[float, float] | None,
    keep_above: Tensor | None, dt_scale: Tensor | None, pads: tuple[int, ...] | None, state: Tensor | None,
) -> None:  # fmt: skip
    (batch, length, heads, head_dim), (groups, d_state) = x.shape, B.shape[2:]
    gate, counts = x if z is None else z, pad_counts(pads, x)
    columns = min(chunking.columns, max(triton.next_power_of_2(head_dim), 16))
    blocks = triton.cdiv(head_dim, columns)
    # batch 1 decides where outputs must not depend on a row's neighbours
    rows = 1 if torch.are_deterministic_algorithms_enabled() else batch
    segments = chunking.segments(length, rows * heads * blocks)
    segment = triton.cdiv(triton.cdiv(length, segments), chunking.chunk) * chunking.chunk
    segments = triton.cdiv(length, segment) if length else 1
    padded = triton.cdiv(length, chunking.chunk) * chunking.chunk
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    ends = torch.empty(batch, heads, segments, head_dim, d_state, **new) if segments > 1 else final
    decays = torch.empty(batch, heads, segments, **new) if segments > 1 else final
    skip = x if D is None else D.float()
    wide = x.dtype == torch.float32 or INTERPRETED
    pad_argument = x if counts is None else counts
    passed, steps = _prepared(
        x, dt, A, chunking.chunk, counts, dt_bias, softplus, dt_limit, keep_above, dt_scale
    )  # fmt: skip

    def run(programs: int, only_ends: bool) -> None:
        _scan[(programs * blocks, heads, batch)](
            x, passed, steps, B, C, skip, gate, pad_argument, wide_vector(state, x), ends, decays, y, final,
            length, padded, segment, heads, heads // groups, *x.stride()[:3], *gate.stride()[:3],
            *B.stride()[:3], *C.stride()[:3], skip.stride(0), skip.stride(1) if D is not None and D.ndim == 2 else 0,
            P=head_dim, N=d_state, PADDED_N=max(triton.next_power_of_2(d_state), 16), SEGMENTS=segments,
            ENDS=only_ends, HAS_D=D is not None, HAS_Z=z is not None, HAS_PADS=counts is not None,
            HAS_STATE=state is not None, DOT=tl.float32 if wide else getattr(tl, str(x.dtype)[6:]),
            PRECISION="ieee" if wide else "tf32", CHUNK=chunking.chunk, COLUMNS=columns, STAGES=chunking.stages,
            num_warps=chunking.warps,
        )  # fmt: skip

    if segments > 1:
        run(segments, True)
    run(segments, False)
