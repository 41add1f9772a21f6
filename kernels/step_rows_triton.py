"""Products of some dozens of rows in a decode step, on tensor cores: `kernels/step_rows.py` defines them.

A program multiplies some rows of the matrix with all rows of the batch, over a part of the depth: the matrix, which is
what there is to read, comes in whole lines and once. It begins before its predecessor ends (programmatic dependent
launch) and asks for its first weights, which nothing writes, into the cache; then it waits. Parts of sums go to memory
in float32 and the kernel behind adds them, always in one order, so that a token's bits hang on nothing else: for
out_proj that is the kernel that adds the stream and norms it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from statespan.kernels.causal_conv_triton import conv_step
from statespan.kernels.step_linear import Conv
from statespan.kernels.triton_common import early, sigmoid, unit_stride

OUTS, DEPTH, STAGES, NUM_WARPS = 64, 64, 5, 4
"""Rows of the matrix of a program, columns of a step, steps on their way at once, and warps."""
PARTS = 5
"""Programs that share the depth of out_proj."""
AHEAD = 512
"""Columns asked for before the predecessor has ended."""


@triton.jit
def _ask_for(at):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64, bitcast=True)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _sums(
    x_ptr, w_ptr, n, m, outs, rows, K, begin, end, x_row,
    OUTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Columns begin … end of x W: (OUTS, ROWS). What n and m have too many is some row, and is stored by nobody."""
    k = begin + tl.arange(0, DEPTH)
    w_row = w_ptr + tl.minimum(n, outs - 1).to(tl.int64)[:, None] * K
    w_at = w_row + k[None, :]
    x_at = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * x_row + k[None, :]
    if PDL:
        gdc_launch_dependents()
        line = begin + tl.arange(0, AHEAD // 64) * 64
        _ask_for(w_row + tl.minimum(line, end - 1)[None, :])
        gdc_wait()
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for _ in tl.range(begin, end, DEPTH, num_stages=STAGES):
        if EVEN:
            w, x = tl.load(w_at), tl.load(x_at)
        else:
            ok = (k < end)[None, :]
            w, x = tl.load(w_at, mask=ok, other=0.0), tl.load(x_at, mask=ok, other=0.0)
            k += DEPTH
        total = tl.dot(w, tl.trans(x), total, input_precision=PRECISION)
        w_at += DEPTH
        x_at += DEPTH
    return total


@triton.jit
def _linear_parts(
    x_ptr, w_ptr, part_ptr, rows, outs, K, depth, x_row,
    OUTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n, m, part = tl.program_id(0) * OUTS + tl.arange(0, OUTS), tl.arange(0, ROWS), tl.program_id(1)
    begin = part * depth
    y = _sums(
        x_ptr, w_ptr, n, m, outs, rows, K, begin, tl.minimum(begin + depth, K), x_row,
        OUTS, ROWS, DEPTH, STAGES, AHEAD, EVEN, PRECISION, PDL,
    )  # fmt: skip
    at = part_ptr + (part.to(tl.int64) * rows + m[None, :]) * outs + n[:, None]
    tl.store(at, y, mask=(n < outs)[:, None] & (m < rows)[None, :])


@triton.jit
def _add_norm(
    stream_ptr, part_ptr, scale_ptr, y_ptr, eps, rows, width,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    ok = c < width
    scale = tl.load(scale_ptr + c, mask=ok, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = stream_ptr + row * width + c
    v = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        v += tl.load(part_ptr + (part * rows + row) * width + c, mask=ok, other=0.0)
    kept = v.to(stream_ptr.dtype.element_ty)
    tl.store(at, kept, mask=ok)
    v = kept.to(tl.float32)  # the norm is of what is kept
    v *= tl.rsqrt(tl.sum(v * v, axis=0) / width + eps) * scale
    tl.store(y_ptr + row * width + c, v.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _linear_conv(
    x_ptr, w_ptr, y_ptr, state_ptr, conv_weight_ptr, conv_bias_ptr, rows, outs, K, x_row, first, width,
    OUTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    n, m = tl.program_id(0) * OUTS + tl.arange(0, OUTS), tl.arange(0, ROWS)
    y = _sums(
        x_ptr, w_ptr, n, m, outs, rows, K, 0, K, x_row, OUTS, ROWS, DEPTH, STAGES, AHEAD, EVEN, PRECISION, PDL
    )  # fmt: skip
    m_ok, c = m < rows, n - first
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    nearest = tl.program_id(0) * OUTS - first
    if (nearest > -OUTS) & (nearest < width):
        c_ok = (c >= 0) & (c < width)
        ok = m_ok[:, None] & c_ok[None, :]
        now = tl.trans(y).to(dtype)  # (ROWS, OUTS), as the state lies in memory
        u = conv_step(now, state_ptr, conv_weight_ptr, conv_bias_ptr, m, c, c_ok, ok, width, TAPS, HAS_BIAS)
        u = tl.where(c_ok[None, :], (u * sigmoid(u)).to(dtype), now)
        tl.store(y_ptr + m.to(tl.int64)[:, None] * outs + n[None, :], u, mask=m_ok[:, None] & (n < outs)[None, :])
    else:
        at = y_ptr + m[None, :].to(tl.int64) * outs + n[:, None]
        tl.store(at, y.to(dtype), mask=(n < outs)[:, None] & m_ok[None, :])


def _tile(x: Tensor, weight: Tensor, parts: int = 1) -> tuple[int, dict[str, object]]:
    """Columns of a part, and the constants of a kernel that multiplies these."""
    rows, K = x.shape
    step = min(DEPTH, max(triton.next_power_of_2(K), 16))
    depth = triton.cdiv(triton.cdiv(K, parts), step) * step
    return depth, {
        "OUTS": OUTS, "ROWS": max(triton.next_power_of_2(rows), 16), "DEPTH": step, "STAGES": STAGES, "AHEAD": AHEAD,
        "EVEN": K % step == 0, "PRECISION": "ieee" if weight.dtype == torch.float32 else "tf32", **early(),
    }  # fmt: skip


def linear_norm(stream: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """stream (batch, out) in place, x (batch, width), weight (out, width), scale (out,) -> (batch, out)"""
    x = unit_stride(x)
    (rows, K), outs = x.shape, weight.shape[0]
    depth, tile = _tile(x, weight, PARTS)
    count = triton.cdiv(K, depth)
    parts = torch.empty(count, rows, outs, dtype=torch.float32, device=x.device)
    y = torch.empty(rows, outs, dtype=scale.dtype, device=x.device)
    _linear_parts[(triton.cdiv(outs, OUTS), count)](
        x, weight, parts, rows, outs, K, depth, x.stride(0), **tile, num_warps=NUM_WARPS
    )
    _add_norm[(rows,)](
        stream, parts, scale, y, eps, rows, outs, PARTS=count, BLOCK=triton.next_power_of_2(outs), **early(),
        num_warps=8,
    )  # fmt: skip
    return y


def linear_conv(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """x (batch, width), weight (out, width) -> (batch, out)"""
    x = unit_stride(x)
    (rows, K), outs = x.shape, weight.shape[0]
    channels, taps = conv.weight.shape
    _, tile = _tile(x, weight)
    y = torch.empty(rows, outs, dtype=weight.dtype, device=x.device)
    _linear_conv[(triton.cdiv(outs, OUTS),)](
        x, weight, y, conv.state, conv.weight.contiguous(), x if conv.bias is None else conv.bias, rows, outs, K,
        x.stride(0), conv.first, channels, TAPS=taps, HAS_BIAS=conv.bias is not None, **tile, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y
