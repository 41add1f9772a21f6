"""Mamba-1's decode step behind x_proj on CUDA: `kernels/selective_step.py` defines it.

A program owns a block of channels: their step sizes (dt_rank products each), then their states. With few rows it has
one of them, and multiplies on the ordinary units; with more it has up to 16, so that the products are the tensor
cores' and the matrix is read once for all. What no kernel writes is fetched before the predecessor has ended (see
`step_linear_triton`), and so is the state where the caller knows it at rest (`EARLY`). The state may be of any floating
dtype; sums are float32 and it is rounded once on its way back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from statespan.kernels.triton_common import LOG2E, early, sigmoid, softplus, unit_stride

CHANNELS, NUM_WARPS = 64, 4
FEW_ROWS = 2
MANY_CHANNELS, MANY_WARPS, ROWS = 16, 4, 16
"""With more rows: channels, warps and rows of a program."""


@triton.jit
def _step(
    state_ptr, x_ptr, row_ptr, z_ptr, w_ptr, bias_ptr, A_ptr, D_ptr, y_ptr, d_inner, rank, d_state,
    x_row, row_row, z_row,
    RANK: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n, r = tl.arange(0, N), tl.arange(0, RANK)
    d_ok, n_ok, r_ok = d < d_inner, n < d_state, r < rank
    ok = d_ok[:, None] & n_ok[None, :]
    w = tl.load(w_ptr + d[:, None] * rank + r[None, :], mask=d_ok[:, None] & r_ok[None, :], other=0.0).to(tl.float32)
    A = tl.load(A_ptr + d[:, None] * d_state + n[None, :], mask=ok, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=d_ok, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + d, mask=d_ok, other=0.0).to(tl.float32)
    at = state_ptr + (b * d_inner + d[:, None]) * d_state + n[None, :]
    if EARLY:
        held = tl.load(at, mask=ok, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if not EARLY:
        held = tl.load(at, mask=ok, other=0.0)
    h = held.to(tl.float32)
    low = tl.load(row_ptr + b * row_row + r, mask=r_ok, other=0.0).to(tl.float32)
    step = softplus(tl.sum(low[None, :] * w, axis=1) + bias)
    x = tl.load(x_ptr + b * x_row + d, mask=d_ok, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + b * z_row + d, mask=d_ok, other=0.0).to(tl.float32)
    B = tl.load(row_ptr + b * row_row + rank + n, mask=n_ok, other=0.0).to(tl.float32)
    C = tl.load(row_ptr + b * row_row + rank + d_state + n, mask=n_ok, other=0.0).to(tl.float32)
    h = tl.exp2(step[:, None] * (A * LOG2E)) * h + (step * x)[:, None] * B[None, :]
    tl.store(at, h.to(state_ptr.dtype.element_ty), mask=ok)
    y = (tl.sum(h * C[None, :], axis=1) + D * x) * z * sigmoid(z)
    tl.store(y_ptr + b * d_inner + d, y.to(y_ptr.dtype.element_ty), mask=d_ok)


@triton.jit
def _steps(
    state_ptr, x_ptr, row_ptr, z_ptr, w_ptr, bias_ptr, A_ptr, D_ptr, y_ptr, rows, d_inner, d_state,
    x_row, row_row, z_row,
    RANK: tl.constexpr, DEPTH: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n, r = tl.arange(0, N), tl.arange(0, DEPTH)  # DEPTH: rank, padded
    d_ok, n_ok, b_ok = d < d_inner, n < d_state, b < rows
    b = b.to(tl.int64)
    A = tl.load(A_ptr + d[:, None] * d_state + n[None, :], mask=d_ok[:, None] & n_ok[None, :], other=0.0)
    A = A.to(tl.float32) * LOG2E
    bias = tl.load(bias_ptr + d, mask=d_ok, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + d, mask=d_ok, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + d[None, :] * RANK + r[:, None], mask=d_ok[None, :] & (r < RANK)[:, None], other=0.0)
    ok = b_ok[:, None, None] & d_ok[None, :, None] & n_ok[None, None, :]
    at = state_ptr + (b[:, None, None] * d_inner + d[None, :, None]) * d_state + n[None, None, :]
    if EARLY:
        held = tl.load(at, mask=ok, other=0.0)  # (ROWS, CHANNELS, N)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    own = row_ptr + b[:, None] * row_row
    low = tl.load(own + r[None, :], mask=b_ok[:, None] & (r < RANK)[None, :], other=0.0)
    if not EARLY:
        held = tl.load(at, mask=ok, other=0.0)
    flat = b_ok[:, None] & d_ok[None, :]
    x = tl.load(x_ptr + b[:, None] * x_row + d[None, :], mask=flat, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + b[:, None] * z_row + d[None, :], mask=flat, other=0.0).to(tl.float32)
    of_row = b_ok[:, None] & n_ok[None, :]
    B = tl.load(own + RANK + n[None, :], mask=of_row, other=0.0).to(tl.float32)
    C = tl.load(own + RANK + d_state + n[None, :], mask=of_row, other=0.0).to(tl.float32)
    step = softplus(tl.dot(low, w, input_precision=PRECISION) + bias[None, :])
    h = tl.exp2(step[:, :, None] * A[None, :, :]) * held.to(tl.float32) + (step * x)[:, :, None] * B[:, None, :]
    tl.store(at, h.to(state_ptr.dtype.element_ty), mask=ok)
    y = (tl.sum(h * C[:, None, :], axis=2) + D[None, :] * x) * z * sigmoid(z)
    tl.store(y_ptr + b[:, None] * d_inner + d[None, :], y.to(y_ptr.dtype.element_ty), mask=flat)


def selective_step(
    state: Tensor, x: Tensor, row: Tensor, z: Tensor, weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, *,
    at_rest: bool = False,
) -> Tensor:  # fmt: skip
    """x, z (batch, d_inner), row (batch, dt_rank + 2 d_state), state in place -> y (batch, d_inner)"""
    x, row, z = (unit_stride(v) for v in (x, row, z))
    (batch, d_inner), rank, d_state = x.shape, weight.shape[1], A.shape[1]
    y = torch.empty(batch, d_inner, dtype=x.dtype, device=x.device)
    if batch > FEW_ROWS:
        channels = min(MANY_CHANNELS, max(triton.next_power_of_2(d_inner), 16))
        _steps[(triton.cdiv(d_inner, channels), triton.cdiv(batch, ROWS))](
            state, x, row, z, weight, dt_bias, A.contiguous(), D, y, batch, d_inner, d_state,
            x.stride(0), row.stride(0), z.stride(0), RANK=rank, DEPTH=max(triton.next_power_of_2(rank), 16),
            N=triton.next_power_of_2(d_state), CHANNELS=channels, ROWS=ROWS,
            PRECISION="ieee" if weight.dtype == torch.float32 else "tf32", EARLY=at_rest, **early(),
            num_warps=MANY_WARPS,
        )  # fmt: skip
        return y
    _step[(triton.cdiv(d_inner, CHANNELS), batch)](
        state, x, row, z, weight, dt_bias, A.contiguous(), D, y, d_inner, rank, d_state,
        x.stride(0), row.stride(0), z.stride(0), RANK=triton.next_power_of_2(rank),
        N=triton.next_power_of_2(d_state), CHANNELS=CHANNELS, EARLY=at_rest, **early(), num_warps=NUM_WARPS,
    )  # fmt: skip
    return y
