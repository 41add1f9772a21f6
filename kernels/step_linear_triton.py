"""Decode-step products of few rows on CUDA: `kernels/step_linear.py` defines them.

Rows of the matrix are shared out over the programs, multiplied and added on the ordinary units; the norm's sum of
squares is gathered on the way and scales the result. A program owns the whole of its columns, so the conv's state and
the residual need no second pass. With `PDL` (programmatic dependent launch) a kernel begins before its predecessor
ends: it fetches its first weights, which nothing writes, and only then waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from statespan.kernels.causal_conv_triton import conv_step
from statespan.kernels.step_linear import Conv, Norm
from statespan.kernels.triton_common import early, sigmoid, unit_stride


@dataclass(frozen=True)
class Narrow:
    """Multiply and add: a program owns `outs` rows of the matrix and walks them `depth` columns at a time."""

    outs: int
    depth: int
    warps: int


PROGRAMS = 660
"""Five for each of 132 multiprocessors."""


def form_of(outs: int, normed: bool) -> Narrow:
    """By what is asked alone, so that a token's bits hang on no trial: the fastest of those measured on an H200.

    Behind a norm each program reads the row in float32 and the norm's weight, which its rows of the matrix share: the
    fewest rows with which no multiprocessor has more than five programs, and 8 where even 16 make more. In whole steps:
    out_proj of mamba2-2.7b (2,560 rows) as 640 programs of 4 rows took 0.7 % less than as 320 of 8, in_proj of
    mamba-2.8b (10,240) as 640 of 16 took 1.7 % less than as 1,280 of 8, that of mamba2-2.7b (10,576) as 661 of 16 1 %
    more. Few columns without a norm are spread thin, or the chip idles.
    """
    if normed:
        forms = (Narrow(4, 512, 4), Narrow(8, 512, 4), Narrow(16, 256, 4))
        return next((form for form in forms if triton.cdiv(outs, form.outs) <= PROGRAMS), Narrow(8, 512, 4))
    return Narrow(1, 8192, 8) if outs <= 1024 else Narrow(2, 1024, 2)


@triton.jit
def _columns_after(
    y, m, n, ok, state_ptr, conv_weight_ptr, conv_bias_ptr, first, width,
    TAPS: tl.constexpr, CONV_BIAS: tl.constexpr,
):  # fmt: skip
    """What becomes of the product (M, N) behind the conv: state (batch, TAPS - 1, width) in place, SiLU."""
    c = n - first
    inside = (c >= 0) & (c < width)
    c = tl.where(inside, c, 0)
    here = ok & inside[None, :]
    now = y.to(state_ptr.dtype.element_ty)
    total = conv_step(now, state_ptr, conv_weight_ptr, conv_bias_ptr, m, c, inside, here, width, TAPS, CONV_BIAS)
    return tl.where(inside[None, :], total * sigmoid(total), y)


@triton.jit
def _finish(
    y, m, n, rows, outs, bias_ptr, residual_ptr, y_ptr, state_ptr, conv_weight_ptr, conv_bias_ptr, first, width,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, TAPS: tl.constexpr, CONV_BIAS: tl.constexpr,
):  # fmt: skip
    """Bias, conv, residual, and the result of these tokens m (M,) and columns n (N,) stored."""
    ok = (m < rows)[:, None] & (n < outs)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]
    if TAPS > 0:
        y = _columns_after(
            y, m, n, ok, state_ptr, conv_weight_ptr, conv_bias_ptr, first, width, TAPS, CONV_BIAS
        )  # fmt: skip
    at = m.to(tl.int64)[:, None] * outs + n[None, :]
    if ADD:
        y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _narrow(
    x_ptr, scale_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, state_ptr, conv_weight_ptr, conv_bias_ptr,
    rows, outs, K, eps, first, width, x_row,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
    TAPS: tl.constexpr, CONV_BIAS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)  # the rows of a batch lie side by side, so that they meet the same weights in the cache
    n = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    n_ok = n < outs
    k = tl.arange(0, DEPTH)
    at = w_ptr + n.to(tl.int64)[:, None] * K
    ahead = tl.load(at + k[None, :], mask=n_ok[:, None] & (k < K)[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((OUTS, DEPTH), tl.float32)
    squares = tl.zeros((DEPTH,), tl.float32)
    for start in range(0, K, DEPTH):
        w, k_now = ahead, start + k
        ok = k_now < K
        x = tl.load(x_ptr + row * x_row + k_now, mask=ok, other=0.0).to(tl.float32)
        scaled = x
        if NORM:
            squares += x * x
            scaled = x * tl.load(scale_ptr + k_now, mask=ok, other=0.0).to(tl.float32)
        k_next = k_now + DEPTH
        ahead = tl.load(at + k_next[None, :], mask=n_ok[:, None] & (k_next < K)[None, :], other=0.0)
        total += w.to(tl.float32) * scaled[None, :]
    y = tl.sum(total, axis=1)[None, :]
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    m = row + tl.arange(0, 1)
    _finish(
        y, m, n, rows, outs, bias_ptr, residual_ptr, y_ptr, state_ptr, conv_weight_ptr, conv_bias_ptr, first, width,
        HAS_BIAS, ADD, TAPS, CONV_BIAS,
    )  # fmt: skip


def step_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    conv: Conv | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x (batch, width), weight (out, width) -> (batch, out)"""
    if conv is not None and not conv.state.is_contiguous():
        raise ValueError("step_linear needs a contiguous conv state, for it is updated in place")
    return run(form_of(weight.shape[0], norm is not None), x, weight, bias, norm, conv, residual)


def _after(
    like: Tensor, bias: Tensor | None, conv: Conv | None, residual: Tensor | None
) -> tuple[tuple[Any, ...], tuple[int, int], dict[str, Any]]:
    """Pointers of what follows the product, then sizes, then the flags that say which of them are read."""
    state, conv_weight, conv_bias = (like, like, None) if conv is None else (conv.state, conv.weight, conv.bias)
    pointers = (state, conv_weight.contiguous(), like if conv_bias is None else conv_bias)
    sizes = (0, 1) if conv is None else (conv.first, conv.weight.shape[0])
    flags = {
        "HAS_BIAS": bias is not None, "ADD": residual is not None, "TAPS": 0 if conv is None else conv.weight.shape[1],
        "CONV_BIAS": conv_bias is not None,
    }  # fmt: skip
    return pointers, sizes, flags


def run(
    form: Narrow, x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Norm | None = None,
    conv: Conv | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    (rows, width), outs = x.shape, weight.shape[0]
    x = unit_stride(x)
    y = torch.empty(rows, outs, dtype=weight.dtype if residual is None else residual.dtype, device=x.device)
    pointers, sizes, flags = _after(x, bias, conv, residual)
    _narrow[(rows, triton.cdiv(outs, form.outs))](
        x, x if norm is None else norm.weight, weight, x if bias is None else bias,
        x if residual is None else residual.contiguous(), y, *pointers, rows, outs, width,
        0.0 if norm is None else norm.eps, *sizes, x.stride(0), NORM=norm is not None, **flags, OUTS=form.outs,
        DEPTH=min(form.depth, triton.next_power_of_2(width)), **early(), num_warps=form.warps,
    )  # fmt: skip
    return y
