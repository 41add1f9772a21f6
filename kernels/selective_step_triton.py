"""Mamba-1's decode step behind x_proj on CUDA: `kernels/selective_step.py` defines it.

A program owns a block of channels of some rows: their step sizes (a product of dt_rank columns), then their states. The
state may be of any floating dtype; sums are float32 and it is rounded once on its way back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from statespan.kernels.triton_common import LOG2E, early, fetch_ahead, lines_each, sigmoid, softplus, unit_stride

SHAPES = {False: (1, 64), True: (16, 32)}
"""Rows and channels of a program, for few rows and from 8 on."""


@triton.jit
def _step(
    state_ptr, x_ptr, row_ptr, z_ptr, w_ptr, bias_ptr, A_ptr, D_ptr, y_ptr, rows, d_inner, rank, d_state,
    x_row, row_row, z_row, ahead_ptr, ahead_size,
    RANK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr,
    SETTLED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n, r = tl.arange(0, N), tl.arange(0, RANK)
    b_ok, d_ok, n_ok, r_ok = b < rows, d < d_inner, n < d_state, r < rank
    b = b.to(tl.int64)
    # nothing before writes these
    w = tl.load(w_ptr + d[:, None] * rank + r[None, :], mask=d_ok[:, None] & r_ok[None, :], other=0.0)
    A = tl.load(A_ptr + d[:, None] * d_state + n[None, :], mask=d_ok[:, None] & n_ok[None, :], other=0.0)
    bias = tl.load(bias_ptr + d, mask=d_ok, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + d, mask=d_ok, other=0.0).to(tl.float32)
    fetch_ahead(ahead_ptr, ahead_size, tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), LINES)
    ok3 = b_ok[:, None, None] & d_ok[None, :, None] & n_ok[None, None, :]
    at = state_ptr + (b[:, None, None] * d_inner + d[None, :, None]) * d_state + n[None, None, :]
    if SETTLED:
        h = tl.load(at, mask=ok3, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if not SETTLED:
        h = tl.load(at, mask=ok3, other=0.0).to(tl.float32)
    low = tl.load(row_ptr + b[:, None] * row_row + r[None, :], mask=b_ok[:, None] & r_ok[None, :], other=0.0)
    if ROWS >= 16:
        dt = tl.dot(low, tl.trans(w), input_precision="ieee")
    else:
        dt = tl.sum(low.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :], axis=2)
    step = softplus(dt + bias[None, :])  # (ROWS, CHANNELS)
    ok = b_ok[:, None] & d_ok[None, :]
    x = tl.load(x_ptr + b[:, None] * x_row + d[None, :], mask=ok, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + b[:, None] * z_row + d[None, :], mask=ok, other=0.0).to(tl.float32)
    bn = b[:, None] * row_row + rank + n[None, :]
    bn_ok = b_ok[:, None] & n_ok[None, :]
    B = tl.load(row_ptr + bn, mask=bn_ok, other=0.0).to(tl.float32)
    C = tl.load(row_ptr + bn + d_state, mask=bn_ok, other=0.0).to(tl.float32)
    decay = tl.exp2(step[:, :, None] * (A.to(tl.float32) * LOG2E)[None, :, :])
    h = decay * h + (step * x)[:, :, None] * B[:, None, :]
    tl.store(at, h.to(state_ptr.dtype.element_ty), mask=ok3)
    y = (tl.sum(h * C[:, None, :], axis=2) + D[None, :] * x) * z * sigmoid(z)
    tl.store(y_ptr + b[:, None] * d_inner + d[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


def selective_step(
    state: Tensor, x: Tensor, row: Tensor, z: Tensor, weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    ahead: Tensor | None = None, settled: bool = False,
) -> Tensor:  # fmt: skip
    """x, z (batch, d_inner), row (batch, dt_rank + 2 d_state), state in place -> y (batch, d_inner)"""
    x, row, z = (unit_stride(v) for v in (x, row, z))
    (batch, d_inner), rank, d_state = x.shape, weight.shape[1], A.shape[1]
    y = torch.empty(batch, d_inner, dtype=x.dtype, device=x.device)
    rows, channels = SHAPES[batch >= 8]
    grid = (triton.cdiv(d_inner, channels), triton.cdiv(batch, rows))
    _step[grid](
        state, x, row, z, weight, dt_bias, A.contiguous(), D, y, batch, d_inner, rank, d_state,
        x.stride(0), row.stride(0), z.stride(0), weight if ahead is None else ahead,
        0 if ahead is None else ahead.nbytes, RANK=max(16, triton.next_power_of_2(rank)),
        N=triton.next_power_of_2(d_state), ROWS=rows, CHANNELS=channels,
        LINES=lines_each(ahead, grid[0] * grid[1]), SETTLED=settled, **early(), num_warps=4,
    )  # fmt: skip
    return y
