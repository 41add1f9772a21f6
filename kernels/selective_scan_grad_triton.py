"""The selective scan with gradients, for training: a forward that leaves the state at every tile's start, a backward.

With G_t the gradient of the loss by the state h_t and y' = dL/dy * silu(z):

    G_t = C_t y'_t + exp(Δ_{t+1} A) G_{t+1}                         from the last token to the first
    dx = Δ Σ_n G B + D y'          dB = Σ_channels G Δ x            dC = Σ_channels y' h
    dΔ = Σ_n G (A exp(Δ A) h_{t-1} + x B)                           dA = Σ_tokens Δ G exp(Δ A) h_{t-1}

Source: the recurrence differentiated by hand; the checks are the reference's own gradients in float64. Both directions
are associative scans within a tile of tokens, one state index at a time, and a carry between tiles. States within a
tile are computed again from the carry saved at its start: nothing of size length x d_inner x d_state is ever written.
Sums over channels (dB, dC) and over rows (dA, dD, d dt_bias) are partial sums per block, added by torch in a fixed
order: no atomics, so a training run repeats to the bit. `keep_above`, `dt_scale` and `pads` are constants here.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statespan.kernels.triton_common import LOG2E, compose, pad_counts, sigmoid, softplus, unit_stride, wide_vector

BLOCK_T, BLOCK_D, NUM_WARPS = 32, 32, 4


@triton.jit
def _steps(dt, bias, keep, scale, live, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_KEEP: tl.constexpr,
           HAS_SCALE: tl.constexpr):  # fmt: skip
    """dt (T, D), the per-channel values (D,), live (T, D) -> Δ and its derivative by dt, both 0 where not live"""
    v = dt
    if HAS_BIAS:
        v += bias[None, :]
    step, slope = v, tl.full(v.shape, 1.0, tl.float32)
    if SOFTPLUS:
        step, slope = softplus(v), sigmoid(v)
    if HAS_KEEP:
        live = live & (step > keep[None, :])
    if HAS_SCALE:
        step, slope = step * scale[None, :], slope * scale[None, :]
    return tl.where(live, step, 0.0), tl.where(live, slope, 0.0)


@triton.jit(do_not_specialize=["length"])
def _forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, keep_ptr, scale_ptr, pads_ptr, state_ptr,
    y_ptr, starts_ptr, final_ptr, length, d_inner, per_group,
    x_batch, x_row, dt_batch, dt_row, z_batch, z_row, B_batch, B_row, B_group, C_batch, C_row, C_group,
    N: tl.constexpr, PADDED_N: tl.constexpr, BLOCKS_A_GROUP: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_PADS: tl.constexpr, HAS_STATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) // BLOCKS_A_GROUP
    inside = (tl.program_id(0) % BLOCKS_A_GROUP) * BLOCK_D + tl.arange(0, BLOCK_D)  # (D,) channels within the group
    d_ok = inside < per_group
    d = (group * per_group + inside).to(tl.int64)
    n = tl.arange(0, PADDED_N)
    tiles = tl.cdiv(length, BLOCK_T)
    nd = n[:, None] * d_inner + d[None, :]  # (N, D) into the scratch of states, channels last
    nd_ok = (n[:, None] < N) & d_ok[None, :]
    bias = tl.load(bias_ptr + d, mask=d_ok & HAS_BIAS, other=0.0)
    keep = tl.load(keep_ptr + batch * d_inner + d, mask=d_ok & HAS_KEEP, other=0.0)
    scale = tl.load(scale_ptr + batch * d_inner + d, mask=d_ok & HAS_SCALE, other=0.0)
    skip = tl.load(D_ptr + d, mask=d_ok & HAS_D, other=0.0)
    first = 0
    if HAS_PADS:
        first = tl.load(pads_ptr + batch)
    carry = tl.zeros((PADDED_N, BLOCK_D), tl.float32)  # the state at the tile's start
    if HAS_STATE:
        from_at = (batch * d_inner + d[None, :]) * N + n[:, None]
        carry = tl.load(state_ptr + from_at, mask=nd_ok, other=0.0).to(tl.float32)
    is_last = (tl.arange(0, BLOCK_T) == BLOCK_T - 1)[:, None]
    for tile in range(tiles):
        tl.store(starts_ptr + (batch * tiles + tile) * N * d_inner + nd, carry, mask=nd_ok)
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        t_ok = (t < length) & (t >= first)
        ok = t_ok[:, None] & d_ok[None, :]
        x = tl.load(x_ptr + batch * x_batch + t[:, None] * x_row + d[None, :], mask=ok, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + batch * dt_batch + t[:, None] * dt_row + d[None, :], mask=ok, other=0.0).to(tl.float32)
        step, _ = _steps(dt, bias, keep, scale, ok, HAS_BIAS, SOFTPLUS, HAS_KEEP, HAS_SCALE)
        step_x = step * x
        y = skip[None, :] * x
        for k in range(N):
            rate = tl.load(A_ptr + d * N + k, mask=d_ok, other=0.0) * LOG2E
            B = tl.load(B_ptr + batch * B_batch + t * B_row + group * B_group + k, mask=t_ok, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + batch * C_batch + t * C_row + group * C_group + k, mask=t_ok, other=0.0).to(tl.float32)
            start = tl.sum(tl.where(n[:, None] == k, carry, 0.0), axis=0)  # (D,)
            decay, h = tl.associative_scan((tl.exp2(step * rate[None, :]), step_x * B[:, None]), 0, compose)
            h += decay * start[None, :]
            y += C[:, None] * h
            end = tl.sum(tl.where(is_last, h, 0.0), axis=0)
            carry = tl.where(n[:, None] == k, end[None, :], carry)
        if HAS_Z:
            z = tl.load(z_ptr + batch * z_batch + t[:, None] * z_row + d[None, :], mask=ok, other=0.0).to(tl.float32)
            y *= z * sigmoid(z)
        inside_length = (t[:, None] < length) & d_ok[None, :]
        at = (batch * length + t[:, None]) * d_inner + d[None, :]
        tl.store(y_ptr + at, tl.where(ok, y, 0.0).to(y_ptr.dtype.element_ty), mask=inside_length)
    tl.store(final_ptr + (batch * d_inner + d[None, :]) * N + n[:, None], carry, mask=nd_ok)


@triton.jit(do_not_specialize=["length"])
def _backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, keep_ptr, scale_ptr, pads_ptr, starts_ptr,
    dy_ptr, dfinal_ptr,
    dx_ptr, ddt_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, dstate_ptr, length, d_inner, per_group,
    x_batch, x_row, dt_batch, dt_row, z_batch, z_row, B_batch, B_row, B_group, C_batch, C_row, C_group,
    N: tl.constexpr, PADDED_N: tl.constexpr, BLOCKS_A_GROUP: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_PADS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) // BLOCKS_A_GROUP
    inside = (tl.program_id(0) % BLOCKS_A_GROUP) * BLOCK_D + tl.arange(0, BLOCK_D)  # (D,) channels within the group
    d_ok = inside < per_group
    d = (group * per_group + inside).to(tl.int64)
    n = tl.arange(0, PADDED_N)
    tiles = tl.cdiv(length, BLOCK_T)
    nd = n[:, None] * d_inner + d[None, :]
    nd_ok = (n[:, None] < N) & d_ok[None, :]
    bias = tl.load(bias_ptr + d, mask=d_ok & HAS_BIAS, other=0.0)
    keep = tl.load(keep_ptr + batch * d_inner + d, mask=d_ok & HAS_KEEP, other=0.0)
    scale = tl.load(scale_ptr + batch * d_inner + d, mask=d_ok & HAS_SCALE, other=0.0)
    skip = tl.load(D_ptr + d, mask=d_ok & HAS_D, other=0.0)
    first = 0
    if HAS_PADS:
        first = tl.load(pads_ptr + batch)
    # what flows into the state at the tile's end from the tokens after it
    inflow = tl.load(dfinal_ptr + (batch * d_inner + d[None, :]) * N + n[:, None], mask=nd_ok, other=0.0)
    dA = tl.zeros((PADDED_N, BLOCK_D), tl.float32)
    dD = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    row = tl.arange(0, BLOCK_T)
    # (batch, block, N, length): each block's share of dB and dC
    share = (batch * tl.num_programs(0) + tl.program_id(0)) * length * N
    for back in range(tiles):
        tile = tiles - 1 - back
        starts = tl.load(starts_ptr + (batch * tiles + tile) * N * d_inner + nd, mask=nd_ok, other=0.0)
        t = tile * BLOCK_T + row.to(tl.int64)
        t_in = t < length
        t_ok = t_in & (t >= first)
        ok = t_ok[:, None] & d_ok[None, :]
        x = tl.load(x_ptr + batch * x_batch + t[:, None] * x_row + d[None, :], mask=ok, other=0.0).to(tl.float32)
        dt_at = dt_ptr + batch * dt_batch + t[:, None] * dt_row + d[None, :]
        dt = tl.load(dt_at, mask=ok, other=0.0).to(tl.float32)
        step, slope = _steps(dt, bias, keep, scale, ok, HAS_BIAS, SOFTPLUS, HAS_KEEP, HAS_SCALE)
        # the next token's step, but within the tile: its last row's decay is already in the inflow
        next_ok = ((t + 1 < length) & (t + 1 >= first) & (row < BLOCK_T - 1))[:, None] & d_ok[None, :]
        dt = tl.load(dt_at + dt_row, mask=next_ok, other=0.0).to(tl.float32)
        step_after, _ = _steps(dt, bias, keep, scale, next_ok, HAS_BIAS, SOFTPLUS, HAS_KEEP, HAS_SCALE)
        dy = tl.load(dy_ptr + (batch * length + t[:, None]) * d_inner + d[None, :], mask=ok, other=0.0).to(tl.float32)
        gate, z = 1.0, 0.0
        if HAS_Z:
            z = tl.load(z_ptr + batch * z_batch + t[:, None] * z_row + d[None, :], mask=ok, other=0.0).to(tl.float32)
            gate = sigmoid(z)
            dy_z, dy = dy, dy * z * gate  # from here dy is y' of the formula
        step_x = step * x
        y = skip[None, :] * x
        G_B = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        dstep = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for k in range(N):
            A = tl.load(A_ptr + d * N + k, mask=d_ok, other=0.0)
            B = tl.load(B_ptr + batch * B_batch + t * B_row + group * B_group + k, mask=t_ok, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + batch * C_batch + t * C_row + group * C_group + k, mask=t_ok, other=0.0).to(tl.float32)
            start = tl.sum(tl.where(n[:, None] == k, starts, 0.0), axis=0)  # (D,)
            after = tl.sum(tl.where(n[:, None] == k, inflow, 0.0), axis=0)
            decay = tl.exp2(step * (A * LOG2E)[None, :])
            drive = step_x * B[:, None]
            total, h = tl.associative_scan((decay, drive), 0, compose)
            h += total * start[None, :]
            decay_after = tl.exp2(step_after * (A * LOG2E)[None, :])
            total, G = tl.associative_scan((decay_after, C[:, None] * dy), 0, compose, reverse=True)
            G += total * after[None, :]
            y += C[:, None] * h
            carried = G * (h - drive)  # G exp(Δ A) h_{t-1}
            G_B += G * B[:, None]
            dstep += carried * A[None, :]
            dA = tl.where(n[:, None] == k, dA + tl.sum(carried * step, axis=0)[None, :], dA)
            tl.store(dB_ptr + share + k * length + t, tl.sum(G * step_x, axis=1), mask=t_in)
            tl.store(dC_ptr + share + k * length + t, tl.sum(dy * h, axis=1), mask=t_in)
            before = tl.sum(tl.where((row == 0)[:, None], decay * G, 0.0), axis=0)
            inflow = tl.where(n[:, None] == k, before[None, :], inflow)
        dstep += x * G_B
        ddt = dstep * slope
        dbias += tl.sum(ddt, axis=0)
        dD += tl.sum(dy * x, axis=0)
        dx = step * G_B + skip[None, :] * dy
        inside_length = t_in[:, None] & d_ok[None, :]
        at = (batch * length + t[:, None]) * d_inner + d[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside_length)
        tl.store(ddt_ptr + at, ddt.to(ddt_ptr.dtype.element_ty), mask=inside_length)
        if HAS_Z:
            dz = dy_z * y * gate * (1.0 + z * (1.0 - gate))
            tl.store(dz_ptr + at, tl.where(ok, dz, 0.0).to(dz_ptr.dtype.element_ty), mask=inside_length)
    dn = (batch * d_inner + d[None, :]) * N + n[:, None]
    tl.store(dA_ptr + dn, dA, mask=nd_ok)
    tl.store(dstate_ptr + dn, inflow, mask=nd_ok)
    tl.store(dD_ptr + batch * d_inner + d, dD, mask=d_ok)
    tl.store(dbias_ptr + batch * d_inner + d, dbias, mask=d_ok)


class SelectiveScan(torch.autograd.Function):
    """B and C come as (batch, length, groups, d_state); what is None has no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, state: Tensor | None, softplus: bool, keep_above: Tensor | None,
        dt_scale: Tensor | None, pads: tuple[int, ...] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (batch, length, d_inner), (groups, d_state) = x.shape, B.shape[2:]
        counts = pad_counts(pads, x)
        rows = [v if v is None else unit_stride(v) for v in (x, dt, z, B, C)]
        vectors = [wide_vector(v, x) for v in (A, D, dt_bias, keep_above, dt_scale)]
        flags = {
            "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": softplus,
            "HAS_KEEP": keep_above is not None, "HAS_SCALE": dt_scale is not None, "HAS_PADS": counts is not None,
        }  # fmt: skip
        y = torch.empty(batch, length, d_inner, dtype=x.dtype, device=x.device)
        tiles = triton.cdiv(length, BLOCK_T)
        starts = torch.empty(batch, tiles, d_state, d_inner, dtype=torch.float32, device=x.device)
        final = torch.empty(batch, d_inner, d_state, dtype=torch.float32, device=x.device)
        launch = _launch(*rows, batch, length, d_inner, groups, d_state)
        _forward[launch.grid](
            *_operands(rows, vectors, counts), wide_vector(state, x), y, starts, final, *launch.sizes,
            HAS_STATE=state is not None, **launch.constants, **flags,
        )  # fmt: skip
        ctx.save_for_backward(*rows, *vectors, counts, starts)
        ctx.launch, ctx.flags, ctx.has_state = launch, flags, state is not None
        ctx.dtypes = tuple(v if v is None else v.dtype for v in (x, dt, A, B, C, D, z, dt_bias, state))
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, dt, z, B, C, A, D, bias, keep, scale, counts, starts = ctx.saved_tensors
        (batch, length, d_inner), (groups, d_state) = x.shape, B.shape[2:]
        new = {"device": x.device, "dtype": torch.float32}
        dy = torch.zeros_like(x, memory_format=torch.contiguous_format) if dy is None else dy.contiguous()
        dfinal = torch.zeros(batch, d_inner, d_state, **new) if dfinal is None else dfinal.float().contiguous()
        dx, ddt = (torch.empty(x.shape, dtype=v.dtype, device=x.device) for v in (x, dt))
        dz = dx if z is None else torch.empty(x.shape, dtype=z.dtype, device=x.device)
        dA, dstate = (torch.empty(batch, d_inner, d_state, **new) for _ in range(2))
        dD, dbias = (torch.empty(batch, d_inner, **new) for _ in range(2))
        blocks = ctx.launch.grid[0]
        dB, dC = (torch.empty(batch, blocks, d_state, length, **new) for _ in range(2))
        _backward[ctx.launch.grid](
            *_operands([x, dt, z, B, C], [A, D, bias, keep, scale], counts), starts, dy, dfinal,
            dx, ddt, dz, dA, dB, dC, dD, dbias, dstate, *ctx.launch.sizes, **ctx.launch.constants, **ctx.flags,
        )  # fmt: skip
        # the blocks of a group are neighbours
        dB, dC = (v.unflatten(1, (groups, -1)).sum(2).permute(0, 3, 1, 2) for v in (dB, dC))
        sums = (dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0), dstate)
        grads = (g if dtype is None else g.to(dtype) for g, dtype in zip(sums, ctx.dtypes, strict=True))
        present = (None if dtype is None else g for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *present, None, None, None, None


class _launch:
    """Grid, sizes with strides, and constants that both directions share."""

    def __init__(self, x: Tensor, dt: Tensor, z: Tensor | None, B: Tensor, C: Tensor, batch: int, length: int,
                 d_inner: int, groups: int, d_state: int) -> None:  # fmt: skip
        per_group = d_inner // groups
        blocks = triton.cdiv(per_group, BLOCK_D)
        gate = x if z is None else z
        self.grid = (groups * blocks, batch)
        self.sizes = (
            length, d_inner, per_group, *x.stride()[:2], *dt.stride()[:2], *gate.stride()[:2], *B.stride()[:3],
            *C.stride()[:3],
        )  # fmt: skip
        self.constants = {
            "N": d_state, "PADDED_N": triton.next_power_of_2(d_state), "BLOCKS_A_GROUP": blocks, "BLOCK_T": BLOCK_T,
            "BLOCK_D": BLOCK_D, "num_warps": NUM_WARPS,
        }  # fmt: skip


def _operands(rows: list[Tensor], vectors: list[Tensor], counts: Tensor | None) -> tuple[Tensor, ...]:
    x, dt, z, B, C = rows
    A, D, bias, keep, scale = vectors
    return x, dt, A, B, C, D, (x if z is None else z), bias, keep, scale, (x if counts is None else counts)


def selective_scan(
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
) -> tuple[Tensor, Tensor]:
    """x, dt, z (batch, length, d_inner) -> y like x, the last state (batch, d_inner, d_state) in float32."""
    for name, value in (("keep_above", keep_above), ("dt_scale", dt_scale)):
        if value is not None and value.requires_grad:
            raise ValueError(f"the scan on CUDA has no gradient by {name}; use_backend('reference') has")
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    y, final = SelectiveScan.apply(  # type: ignore[no-untyped-call]
        x, dt, A, B, C, D, z, dt_bias, state, softplus, keep_above, dt_scale, pads
    )
    return y, final
