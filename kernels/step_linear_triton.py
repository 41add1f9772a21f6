"""Decode-step products on CUDA: `kernels/step_linear.py` defines them.

One row: multiply and add, rows of the matrix shared out over the programs; the norm's sum of squares is gathered on the
way and scales the result. More rows: tensor cores, the norm in a kernel before; where the columns are too few to fill
the chip, several programs share a sum, and the last to arrive adds their parts in a fixed order. One program owns the
end of each column, so the conv's state and the residual need no second pass.

With `PDL` (programmatic dependent launch) a kernel begins before its predecessor ends: it fetches its first weights,
which nothing writes, and only then waits. `ahead` names weights of a later product to bring into the cache meanwhile,
for the memory is idle while a small kernel works.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from statespan.kernels.rms_norm_triton import before_step
from statespan.kernels.step_linear import Conv, Norm
from statespan.kernels.triton_common import early, fetch, fetch_ahead, lines_each, sigmoid, unit_stride


@dataclass(frozen=True)
class Narrow:
    """Multiply and add: a program owns `outs` rows of the matrix and walks them `depth` columns at a time."""

    outs: int
    depth: int
    warps: int


@dataclass(frozen=True)
class Wide:
    """Tensor cores: a program owns `outs` rows of the matrix for up to 64 tokens, `stages` loads in flight.

    `split` programs share a sum.
    """

    outs: int
    depth: int
    warps: int
    stages: int
    split: int = 1


Form = Narrow | Wide
NARROW_ROWS = 2
"""Up to so many rows multiply and add: each reads the matrix anew, from the cache after the first."""

ROWS = 64


def form_of(rows: int, outs: int, width: int) -> Form:
    """By the shape alone, so that a token's bits hang on no trial: the fastest of those measured on an H100.

    Few columns must be spread thin, or the chip idles; many are left whole, for a sum that is shared costs a pass.
    """
    if rows <= NARROW_ROWS:
        return Narrow(1, 8192, 8) if outs <= 1024 else Narrow(2, 1024, 2)
    if outs <= 1024:
        return Wide(16, 128, 4, 4, split=min(10, triton.cdiv(width, 256)))
    return Wide(32, 128, 4, 3, split=4) if outs <= 4096 else Wide(64, 128, 4, 3)


@triton.jit
def _columns_after(
    y, m, n, ok, n_rows, state_ptr, conv_weight_ptr, conv_bias_ptr, first, width,
    TAPS: tl.constexpr, CONV_BIAS: tl.constexpr,
):  # fmt: skip
    """What becomes of the product (M, N) behind the conv: state (batch, TAPS - 1, width) in place, SiLU."""
    c = n - first
    inside = (c >= 0) & (c < width)
    c = tl.where(inside, c, 0)
    here = ok & inside[None, :]
    now = y.to(state_ptr.dtype.element_ty)
    total = tl.load(conv_weight_ptr + c * TAPS + TAPS - 1, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = total * now.to(tl.float32)
    if CONV_BIAS:
        total += tl.load(conv_bias_ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = state_ptr + m.to(tl.int64)[:, None] * (TAPS - 1) * width + c[None, :]
    for k in tl.static_range(TAPS - 1):
        past = tl.load(at + k * width, mask=here, other=0.0)
        weight = tl.load(conv_weight_ptr + c * TAPS + k, mask=inside, other=0.0).to(tl.float32)
        total += weight[None, :] * past.to(tl.float32)
        if k > 0:
            tl.store(at + (k - 1) * width, past, mask=here)
    if TAPS > 1:
        tl.store(at + (TAPS - 2) * width, now, mask=here)
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
            y, m, n, ok, rows, state_ptr, conv_weight_ptr, conv_bias_ptr, first, width, TAPS, CONV_BIAS
        )  # fmt: skip
    at = m.to(tl.int64)[:, None] * outs + n[None, :]
    if ADD:
        y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _narrow(
    x_ptr, gate_ptr, scale_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, state_ptr, conv_weight_ptr, conv_bias_ptr,
    ahead_ptr, rows, outs, K, eps, first, width, x_row, gate_row, ahead_size,
    NORM: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
    TAPS: tl.constexpr, CONV_BIAS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)  # the rows of a batch lie side by side, so that they meet the same weights in the cache
    n = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    n_ok = n < outs
    k = tl.arange(0, DEPTH)
    at = w_ptr + n.to(tl.int64)[:, None] * K
    ahead = tl.load(at + k[None, :], mask=n_ok[:, None] & (k < K)[None, :], other=0.0)
    fetch_ahead(ahead_ptr, ahead_size, tl.program_id(1), LINES)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((OUTS, DEPTH), tl.float32)
    squares = tl.zeros((DEPTH,), tl.float32)
    for start in range(0, K, DEPTH):
        w, k_now = ahead, start + k
        ok = k_now < K
        x = tl.load(x_ptr + row * x_row + k_now, mask=ok, other=0.0).to(tl.float32)
        if GATE:
            gate = tl.load(gate_ptr + row * gate_row + k_now, mask=ok, other=0.0).to(tl.float32)
            x *= gate * sigmoid(gate)
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


@triton.jit
def _wide(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, state_ptr, conv_weight_ptr, conv_bias_ptr, parts_ptr, arrived_ptr,
    ahead_ptr, rows, outs, K, first, width, x_row, ahead_size,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, TAPS: tl.constexpr, CONV_BIAS: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    k = tl.arange(0, DEPTH)
    m_ok, n_ok = (m < rows)[:, None], (n < outs)[:, None]
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_row + k[None, :]
    w_at = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    share = tl.cdiv(tl.cdiv(K, DEPTH), SPLIT) * DEPTH
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, K)
    fetch_ahead(ahead_ptr, ahead_size, tile * SPLIT + tl.program_id(2), LINES)
    if PDL:
        # the first of its own weights: as many lines of each row as the loop below keeps in flight
        near = w_ptr + n.to(tl.int64)[:, None] * K + begin + tl.arange(0, 8)[None, :] * 64
        fetch(near, n_ok & (begin + tl.arange(0, 8) * 64 < end)[None, :], w_ptr)
        gdc_launch_dependents()
        gdc_wait()
    y = tl.zeros((ROWS, OUTS), tl.float32)
    for start in range(begin, end, DEPTH):
        ok = (start + k < end)[None, :]
        x = tl.load(x_at + start, mask=m_ok & ok, other=0.0)
        w = tl.load(w_at + start, mask=n_ok & ok, other=0.0)
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
    if SPLIT > 1:
        own = tl.arange(0, ROWS)[:, None] * OUTS + tl.arange(0, OUTS)[None, :]
        part_at = parts_ptr + tile * SPLIT * ROWS * OUTS + own
        tl.store(part_at + tl.program_id(2) * ROWS * OUTS, y)
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            tl.store(arrived_ptr + tile, 0)  # as the next product finds it
            total = tl.zeros((ROWS, OUTS), tl.float32)
            for part in range(SPLIT):
                total += tl.load(part_at + part * ROWS * OUTS, cache_modifier=".cg")
            _finish(
                total, m, n, rows, outs, bias_ptr, residual_ptr, y_ptr, state_ptr, conv_weight_ptr, conv_bias_ptr,
                first, width, HAS_BIAS, ADD, TAPS, CONV_BIAS,
            )  # fmt: skip
    else:
        _finish(
            y, m, n, rows, outs, bias_ptr, residual_ptr, y_ptr, state_ptr, conv_weight_ptr, conv_bias_ptr, first,
            width, HAS_BIAS, ADD, TAPS, CONV_BIAS,
        )  # fmt: skip


def step_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    conv: Conv | None = None,
    residual: Tensor | None = None,
    ahead: Tensor | None = None,
) -> Tensor:
    """x (batch, width), weight (out, width) -> (batch, out)"""
    if conv is not None and not conv.state.is_contiguous():
        raise ValueError("step_linear needs a contiguous conv state, for it is updated in place")
    return run(form_of(x.shape[0], *weight.shape), x, weight, bias, norm, conv, residual, ahead)


def run(
    form: Form, x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Norm | None = None,
    conv: Conv | None = None, residual: Tensor | None = None, ahead: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if isinstance(form, Narrow):
        return _run_narrow(form, unit_stride(x), weight, bias, norm, conv, residual, ahead)
    if norm is not None:
        x = before_step(x, norm.gate, norm.weight, norm.eps)
    return _run_wide(form, unit_stride(x), weight, bias, conv, residual, ahead)


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


def _run_narrow(
    form: Narrow, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, conv: Conv | None,
    residual: Tensor | None, ahead: Tensor | None,
) -> Tensor:  # fmt: skip
    (rows, width), outs = x.shape, weight.shape[0]
    y = torch.empty(rows, outs, dtype=weight.dtype if residual is None else residual.dtype, device=x.device)
    gate = x if norm is None or norm.gate is None else unit_stride(norm.gate)
    pointers, sizes, flags = _after(x, bias, conv, residual)
    programs = triton.cdiv(outs, form.outs)
    _narrow[(rows, programs)](
        x, gate, x if norm is None else norm.weight, weight, x if bias is None else bias,
        x if residual is None else residual.contiguous(), y, *pointers, weight if ahead is None else ahead, rows, outs,
        width, 0.0 if norm is None else norm.eps, *sizes, x.stride(0), gate.stride(0),
        0 if ahead is None else ahead.nbytes, NORM=norm is not None, GATE=norm is not None and norm.gate is not None,
        **flags, OUTS=form.outs, DEPTH=min(form.depth, triton.next_power_of_2(width)),
        LINES=lines_each(ahead, programs), **early(), num_warps=form.warps,
    )  # fmt: skip
    return y


def _run_wide(
    form: Wide, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv | None, residual: Tensor | None,
    ahead: Tensor | None,
) -> Tensor:  # fmt: skip
    (rows, width), outs = x.shape, weight.shape[0]
    y = torch.empty(rows, outs, dtype=weight.dtype if residual is None else residual.dtype, device=x.device)
    pointers, sizes, flags = _after(x, bias, conv, residual)
    block = min(max(triton.next_power_of_2(rows), 16), ROWS)
    grid = (triton.cdiv(rows, block), triton.cdiv(outs, form.outs), form.split)
    parts, arrived = (y, y) if form.split == 1 else _shared_sums(x.device, grid[0] * grid[1], form, block)
    _wide[grid](
        x, weight, x if bias is None else bias, x if residual is None else residual.contiguous(), y, *pointers,
        parts, arrived, weight if ahead is None else ahead, rows, outs, width, *sizes, x.stride(0),
        0 if ahead is None else ahead.nbytes, **flags, ROWS=block, OUTS=form.outs, DEPTH=form.depth, SPLIT=form.split,
        LINES=lines_each(ahead, grid[0] * grid[1] * form.split), **early(), num_warps=form.warps,
        num_stages=form.stages,
    )  # fmt: skip
    return y


_sums: dict[tuple[torch.device, int], list[tuple[Tensor, Tensor]]] = {}


def _shared_sums(device: torch.device, tiles: int, form: Wide, block: int) -> tuple[Tensor, Tensor]:
    """Room for the parts of all sums of a product, and a counter a tile that is 0 between products.

    The products of one thread follow each other and share the room. One that is too small stays: a graph may use it.
    """
    rooms = _sums.setdefault((device, threading.get_ident()), [])
    floats = tiles * form.split * block * form.outs
    if not rooms or rooms[-1][0].numel() < floats or rooms[-1][1].numel() < tiles:
        parts = torch.zeros(max(floats, 1 << 21), dtype=torch.float32, device=device)
        rooms.append((parts, torch.zeros(max(tiles, 1 << 12), dtype=torch.int32, device=device)))
    return rooms[-1]
