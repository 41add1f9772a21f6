"""The conv and x_proj of a decode step on CUDA, for rows enough to fill a tile: `kernels/step_conv_linear.py` has it.

A program owns some channels: it moves their conv on, keeps the result, and multiplies it with these channels' columns
of the matrix, fetched before its predecessor has ended, on the tensor cores. The parts of the sums go to memory in
float32 and a second kernel adds them, always in one order, so that a token's bits hang on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from statespan.kernels.causal_conv_triton import conv_step
from statespan.kernels.triton_common import early, sigmoid, unit_stride

DEPTH, ROWS, NUM_WARPS = 64, 32, 8
"""Channels and rows of a program, and warps."""
SUMS = 32
"""Sums of a program of the second kernel."""


@triton.jit
def _parts(
    state_ptr, x_ptr, conv_weight_ptr, conv_bias_ptr, w_ptr, u_ptr, part_ptr, rows, width, outs, x_row,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, OUTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, OUTS)
    c_ok, m_ok = c < width, m < rows
    ok = m_ok[:, None] & c_ok[None, :]
    m = m.to(tl.int64)
    n_ok = n < outs
    w = tl.load(w_ptr + n[:, None] * width + c[None, :], mask=n_ok[:, None] & c_ok[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    now = tl.load(x_ptr + m[:, None] * x_row + c[None, :], mask=ok, other=0.0)
    total = conv_step(now, state_ptr, conv_weight_ptr, conv_bias_ptr, m, c, c_ok, ok, width, TAPS, HAS_BIAS)
    u = (total * sigmoid(total)).to(u_ptr.dtype.element_ty)
    tl.store(u_ptr + m[:, None] * width + c[None, :], u, mask=ok)
    y = tl.dot(w, tl.trans(u), input_precision=PRECISION)  # (OUTS, ROWS): u is then read from shared memory
    here = part_ptr + (tl.program_id(0).to(tl.int64) * rows + m[None, :]) * outs
    tl.store(here + n[:, None], y, mask=n_ok[:, None] & m_ok[None, :])


@triton.jit
def _whole(part_ptr, y_ptr, count, size, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PARTS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ok = (part < count)[:, None] & (at < size)[None, :]
    y = tl.sum(tl.load(part_ptr + part.to(tl.int64)[:, None] * size + at[None, :], mask=ok, other=0.0), axis=0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < size)


def step_conv_linear(
    state: Tensor, x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """state (batch, kernel - 1, width) in place, x (batch, width), weight (out, width) -> u like x, y (batch, out)"""
    x = unit_stride(x)
    (rows, width), outs = x.shape, weight.shape[0]
    depth = min(DEPTH, max(triton.next_power_of_2(width), 16))
    splits = triton.cdiv(width, depth)
    u = torch.empty(rows, width, dtype=weight.dtype, device=x.device)
    parts = torch.empty(splits, rows, outs, dtype=torch.float32, device=x.device)
    y = torch.empty(rows, outs, dtype=weight.dtype, device=x.device)
    block = ROWS if rows > 16 else 16
    options = early()
    _parts[(splits, triton.cdiv(rows, block))](
        state, x, conv_weight.contiguous(), x if conv_bias is None else conv_bias, weight, u, parts, rows, width, outs,
        x.stride(0), TAPS=conv_weight.shape[1], HAS_BIAS=conv_bias is not None,
        OUTS=max(triton.next_power_of_2(outs), 16), ROWS=block, DEPTH=depth,
        PRECISION="ieee" if weight.dtype == torch.float32 else "tf32", **options, num_warps=NUM_WARPS,
    )  # fmt: skip
    size = rows * outs
    _whole[(triton.cdiv(size, SUMS),)](
        parts, y, splits, size, PARTS=triton.next_power_of_2(splits), BLOCK=SUMS, **options, num_warps=4
    )
    return u, y
