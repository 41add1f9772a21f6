"""Decode-step products on the CPU: `kernels/step_linear.py` defines them. A row's result hangs on no row beside it.

Four rows of the matrix at a time are read once and multiplied with every row of the batch, each sum in the same order
however many rows there are: a library's product takes another path, and rounds otherwise, for one row than for several.
So rows may be decoded together for the sake of speed alone. At one row the matrix's way from memory is all the cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statespan.kernels.dispatch import expect_in_place
from statespan.kernels.fast_math import Float, Int, Real, constant, given, inlined, reordered, shift, silu
from statespan.kernels.lanes_numba import LANES, dot
from statespan.kernels.native import Kernel, pointer, rows, settled
from statespan.kernels.step_linear import Conv, Norm

TOGETHER = 4
"""Rows of the matrix that share each load of a batch row."""


@reordered
def four_dots(y, y_at, a, a_at, a_row, b, b_at, count):
    """y[y_at + i] = Σ a[i] b of four rows that lie `a_row` apart"""
    s0, s1, s2, s3 = constant(a, 0.0), constant(a, 0.0), constant(a, 0.0), constant(a, 0.0)
    for k in range(count):
        value = b[b_at + k]
        s0 += a[a_at + k] * value
        s1 += a[a_at + a_row + k] * value
        s2 += a[a_at + 2 * a_row + k] * value
        s3 += a[a_at + 3 * a_row + k] * value
    y[y_at], y[y_at + 1], y[y_at + 2], y[y_at + 3] = s0, s1, s2, s3


@inlined
def normed_row(out, out_at, x, x_at, weight, eps, count):
    """out = x / sqrt(mean(x²) + eps) weight"""
    mean = dot(x, x_at, x, x_at, count) / constant(x, count)
    scale = constant(x, 1.0 / (mean + eps) ** 0.5)
    for k in range(count):
        out[out_at + k] = x[x_at + k] * scale * weight[k]


@inlined
def conv_columns(y, y_at, state, state_at, weight, bias, width, taps, count):
    """`count` columns through the conv's one-token update and SiLU; weight and bias begin at the first of them."""
    for j in range(count):
        now = y[y_at + j]
        total = now * weight[j * taps + taps - 1]
        if given(bias):
            total += bias[j]
        for k in range(taps - 1):
            at = state_at + k * width + j
            total += weight[j * taps + k] * state[at]
            state[at] = state[at + width] if k < taps - 2 else now
        y[y_at + j] = silu(total)


def _step_linear(
    x: Real, weight: Real, bias: Real, norm_weight: Real,
    conv_state: Real, conv_weight: Real, conv_bias: Real, residual: Real, y: Real,
    batch: Int, width: Int, outs: Int, x_row: Int, residual_row: Int,
    conv_first: Int, conv_width: Int, taps: Int, eps: Float,
    scratch: Real, first: Int, last: Int,
) -> None:  # fmt: skip
    source, source_row = x, x_row
    if given(norm_weight):
        for b in range(batch):
            normed_row(scratch, b * width, x, b * x_row, norm_weight, eps, width)
        source, source_row = scratch, width
    for task in range(first, last):
        begin = task * LANES
        count = min(LANES, outs - begin)
        fours = count // TOGETHER * TOGETHER
        for n in range(begin, begin + fours, TOGETHER):
            for b in range(batch):
                four_dots(y, b * outs + n, weight, n * width, width, source, b * source_row, width)
        for n in range(begin + fours, begin + count):
            for b in range(batch):
                y[b * outs + n] = dot(weight, n * width, source, b * source_row, width)
        conv_begin, conv_end = max(begin, conv_first), min(begin + count, conv_first + conv_width)
        for b in range(batch):
            at = b * outs + begin
            if given(bias):
                for j in range(count):
                    y[at + j] += bias[begin + j]
            if conv_begin < conv_end:
                c = conv_begin - conv_first
                own_bias = shift(conv_bias, c) if given(conv_bias) else conv_bias
                conv_columns(
                    y, b * outs + conv_begin, conv_state, b * (taps - 1) * conv_width + c,
                    shift(conv_weight, c * taps), own_bias, conv_width, taps, conv_end - conv_begin,
                )  # fmt: skip
            if given(residual):
                for j in range(count):
                    y[at + j] += residual[b * residual_row + begin + j]


_kernel = Kernel(_step_linear)


def step_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    conv: Conv | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `statespan.kernels.step_linear.step_linear`, which has checked the shapes. All float32, or all float64."""
    dtype, (batch, width), outs = weight.dtype, x.shape, weight.shape[0]
    if dtype not in (torch.float32, torch.float64) or x.dtype is not dtype:
        raise ValueError(f"step_linear on a CPU needs x and weight in float32; got {x.dtype} and {weight.dtype}")
    x, beside = rows(x, dtype), rows(residual, dtype)
    weight, bias = settled(weight, dtype), settled(bias, dtype)
    scale = None if norm is None else settled(norm.weight, dtype)
    conv_weight = conv_bias = state = None
    conv_width, taps, conv_first = 0, 1, 0
    if conv is not None:
        expect_in_place("step_linear", conv.state, x)
        state, conv_first = conv.state, conv.first
        conv_weight, conv_bias, (conv_width, taps) = (
            settled(conv.weight, dtype),
            settled(conv.bias, dtype),
            conv.weight.shape,
        )
    y = torch.empty(batch, outs, dtype=dtype)
    _kernel(
        dtype, -(-outs // LANES), batch * outs * width, batch * width if norm is not None else 1,
        *map(pointer, (x, weight, bias, scale, state, conv_weight, conv_bias, beside, y)),
        batch, width, outs, x.stride(0), 0 if beside is None else beside.stride(0),
        conv_first, conv_width, taps, 0.0 if norm is None else norm.eps,
    )  # fmt: skip
    return y
