"""The depthwise causal convolution with SiLU on CUDA, channel-last, with gradients: `kernels/causal_conv.py` says what.

With four taps, which is every released Mamba, a program walks down the tokens of BLOCK_W channels and keeps the last
three in registers: each input is loaded and widened once; the last program leaves the inputs that the next chunk wants.
Any other number of taps takes tiles of BLOCK_T tokens, whose shifted loads after the first come from cache. Programs
that follow one another lie side by side in a row. Weights are read as the model holds them, and widened in the kernel.

The backward computes what SiLU saw again instead of keeping it; the gradient of the weights is a partial sum per
program, added by torch in a fixed order (no atomics, so that a training run repeats to the bit).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statespan.kernels.dispatch import on_device
from statespan.kernels.launch import relaunched
from statespan.kernels.triton_common import pad_counts, parts, sigmoid, unit_stride, vector

BLOCK_T, BLOCK_W, NUM_WARPS = 16, 128, 4
WALK_T, WALK_W, WALK_WARPS = 64, 128, 1


@triton.jit
def _inputs(x_ptr, state_ptr, t, w, w_ok, first, length, width, x_row, HAS_STATE: tl.constexpr, TAPS: tl.constexpr):
    """x at positions t (T,), pads and what lies outside as zeros, the state before position 0 -> (T, W) float32"""
    live = (t >= first) & (t < length) & (t >= 0)
    x = tl.load(x_ptr + t[:, None] * x_row + w[None, :], mask=live[:, None] & w_ok[None, :], other=0.0).to(tl.float32)
    if HAS_STATE:
        before = (t < 0) & (t >= 1 - TAPS)
        at = state_ptr + (t[:, None] + TAPS - 1) * width + w[None, :]
        x += tl.load(at, mask=before[:, None] & w_ok[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit
def _before_silu(
    x_ptr, state_ptr, weight_ptr, bias_ptr, t, w, w_ok, first, length, width, x_row,
    HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The convolution at positions t (T,) -> (T, W) float32"""
    total = tl.zeros((t.shape[0], w.shape[0]), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + w, mask=w_ok, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(TAPS):
        weight = tl.load(weight_ptr + w * TAPS + k, mask=w_ok, other=0.0).to(tl.float32)
        x = _inputs(x_ptr, state_ptr, t + (k + 1 - TAPS), w, w_ok, first, length, width, x_row, HAS_STATE, TAPS)
        total += weight[None, :] * x
    return total


@relaunched
@triton.jit(do_not_specialize=["length"])
def _forward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, pads_ptr, y_ptr, length, width, x_batch, x_row,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_PADS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(width, BLOCK_W)
    t = tl.program_id(0) // across * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    w = tl.program_id(0) % across * BLOCK_W + tl.arange(0, BLOCK_W)
    w_ok = w < width
    first = 0
    if HAS_PADS:
        first = tl.load(pads_ptr + batch)
    y = _before_silu(
        x_ptr + batch * x_batch, state_ptr + batch * (TAPS - 1) * width, weight_ptr, bias_ptr, t, w, w_ok, first,
        length, width, x_row, HAS_STATE, HAS_BIAS, TAPS,
    )  # fmt: skip
    if SILU:
        y *= sigmoid(y)
    at = y_ptr + (batch * length + t[:, None]) * width + w[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(t < length)[:, None] & w_ok[None, :])


@triton.jit
def _kept(x_ptr, state_ptr, w, ok, begin, first, width, x_row, DISTANCE: tl.constexpr, HAS_STATE: tl.constexpr):
    """The input `DISTANCE` tokens before a program's first, (W,) float32; x_ptr points at the first"""
    there = (begin >= DISTANCE) & (begin - DISTANCE >= first)
    x = tl.load(x_ptr - DISTANCE * x_row, mask=ok & there, other=0.0).to(tl.float32)
    if HAS_STATE:
        x += tl.load(state_ptr + (3 - DISTANCE) * width + w, mask=ok & (begin == 0), other=0.0).to(tl.float32)
    return x


@triton.jit
def _four(x0, x1, x2, x3, w0, w1, w2, w3, bias, SILU: tl.constexpr):
    y = bias + x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
    if SILU:
        y *= sigmoid(y)
    return y


@relaunched
@triton.jit(do_not_specialize=["length"])
def _walk(
    x_ptr, weight_ptr, bias_ptr, state_ptr, pads_ptr, y_ptr, last_ptr, length, width, x_batch, x_row,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_PADS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Four taps: the last three inputs a, b, c in registers, four tokens at a time. last: (batch, 3, width)"""
    batch = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(width, BLOCK_W)
    begin = tl.program_id(0) // across * TOKENS
    w = tl.program_id(0) % across * BLOCK_W + tl.arange(0, BLOCK_W)
    ok = w < width
    first = 0
    if HAS_PADS:
        first = tl.load(pads_ptr + batch)
    w0 = tl.load(weight_ptr + 4 * w, mask=ok, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + 4 * w + 1, mask=ok, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + 4 * w + 2, mask=ok, other=0.0).to(tl.float32)
    w3 = tl.load(weight_ptr + 4 * w + 3, mask=ok, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_W,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + w, mask=ok, other=0.0).to(tl.float32)
    row_ptr = x_ptr + batch * x_batch + w
    x_ptr = row_ptr + begin.to(tl.int64) * x_row
    y_ptr += (batch * length + begin) * width + w
    state_ptr += batch * 3 * width
    a = _kept(x_ptr, state_ptr, w, ok, begin, first, width, x_row, 3, HAS_STATE)
    b = _kept(x_ptr, state_ptr, w, ok, begin, first, width, x_row, 2, HAS_STATE)
    c = _kept(x_ptr, state_ptr, w, ok, begin, first, width, x_row, 1, HAS_STATE)
    dtype = y_ptr.dtype.element_ty
    for t in range(begin, tl.minimum(begin + TOKENS, length), 4):
        live0, live1, live2, live3 = ok, ok & (t + 1 < length), ok & (t + 2 < length), ok & (t + 3 < length)
        seen0, seen1, seen2, seen3 = live0, live1, live2, live3
        if HAS_PADS:
            seen0, seen1 = seen0 & (t >= first), seen1 & (t + 1 >= first)
            seen2, seen3 = seen2 & (t + 2 >= first), seen3 & (t + 3 >= first)
        x0, x1 = tl.load(x_ptr, mask=seen0, other=0.0), tl.load(x_ptr + x_row, mask=seen1, other=0.0)
        x2, x3 = tl.load(x_ptr + 2 * x_row, mask=seen2, other=0.0), tl.load(x_ptr + 3 * x_row, mask=seen3, other=0.0)
        x0, x1, x2, x3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
        tl.store(y_ptr, _four(a, b, c, x0, w0, w1, w2, w3, bias, SILU).to(dtype), mask=live0)
        tl.store(y_ptr + width, _four(b, c, x0, x1, w0, w1, w2, w3, bias, SILU).to(dtype), mask=live1)
        tl.store(y_ptr + 2 * width, _four(c, x0, x1, x2, w0, w1, w2, w3, bias, SILU).to(dtype), mask=live2)
        tl.store(y_ptr + 3 * width, _four(x0, x1, x2, x3, w0, w1, w2, w3, bias, SILU).to(dtype), mask=live3)
        a, b, c = x1, x2, x3
        x_ptr += 4 * x_row
        y_ptr += 4 * width
    if begin + TOKENS >= length:
        for k in tl.static_range(3):
            place = length.to(tl.int64) - 3 + k
            kept = tl.load(row_ptr + place * x_row, mask=ok & (place >= 0) & (place >= first), other=0.0)
            if HAS_STATE:
                before = tl.load(state_ptr + (place + 3) * width + w, mask=ok & (place < 0), other=0.0)
                kept = tl.where(place < 0, before, kept)
            tl.store(last_ptr + (batch * 3 + k) * width + w, kept, mask=ok)


@triton.jit(do_not_specialize=["length"])
def _backward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, pads_ptr, dy_ptr, dx_ptr, dstate_ptr, dweight_ptr, dbias_ptr,
    length, width, x_batch, x_row,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_PADS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    # positions begin before the sequence, for the state has a gradient too
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64) - (TAPS - 1)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    w_ok = w < width
    first = 0
    if HAS_PADS:
        first = tl.load(pads_ptr + batch)
    x_ptr += batch * x_batch
    state_ptr += batch * (TAPS - 1) * width
    share = (batch * tl.num_programs(0) + tl.program_id(0)) * width + w  # (batch, tile, width): this program's sums
    dx = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    for j in tl.static_range(TAPS):
        ahead = t + j
        live = ((ahead >= 0) & (ahead < length))[:, None] & w_ok[None, :]
        at = dy_ptr + (batch * length + ahead[:, None]) * width + w[None, :]
        g = tl.load(at, mask=live, other=0.0).to(tl.float32)
        if SILU:
            v = _before_silu(
                x_ptr, state_ptr, weight_ptr, bias_ptr, ahead, w, w_ok, first, length, width, x_row, HAS_STATE,
                HAS_BIAS, TAPS,
            )  # fmt: skip
            s = sigmoid(v)
            g *= s * (1.0 + v * (1.0 - s))
        weight = tl.load(weight_ptr + w * TAPS + (TAPS - 1 - j), mask=w_ok, other=0.0).to(tl.float32)
        dx += weight[None, :] * g
        if j == 0:
            tl.store(dbias_ptr + share, tl.sum(g, axis=0), mask=w_ok)
            for k in tl.static_range(TAPS):
                x = _inputs(x_ptr, state_ptr, t + (k + 1 - TAPS), w, w_ok, first, length, width, x_row, HAS_STATE, TAPS)
                tl.store(dweight_ptr + share * TAPS + k, tl.sum(g * x, axis=0), mask=w_ok)
    inside = ((t >= 0) & (t < length))[:, None] & w_ok[None, :]
    kept = tl.where((t >= first)[:, None], dx, 0.0)
    at = (batch * length + t[:, None]) * width + w[None, :]
    tl.store(dx_ptr + at, kept.to(dx_ptr.dtype.element_ty), mask=inside)
    if HAS_STATE:
        at = (batch * (TAPS - 1) + t[:, None] + TAPS - 1) * width + w[None, :]
        tl.store(dstate_ptr + at, dx, mask=(t < 0)[:, None] & w_ok[None, :])


def _convolved(
    given: dict[str, bool], last: Tensor, x: Tensor, weight: Tensor, bias: Tensor, before: Tensor, counts: Tensor
) -> Tensor:
    """The convolution; with four taps, the row's last inputs are left in `last`."""
    (batch, length, width), taps = x.shape, weight.shape[1]
    y = torch.empty(batch, length, width, dtype=x.dtype, device=x.device)
    sizes = (length, width, *x.stride()[:2])
    if y.numel() and taps == 4:
        _walk[(parts(length, WALK_T) * parts(width, WALK_W), batch)](
            x, weight, bias, before, counts, y, last, *sizes, **given, TOKENS=WALK_T, BLOCK_W=WALK_W,
            num_warps=WALK_WARPS,
        )  # fmt: skip
    elif y.numel():
        _forward[(parts(length, BLOCK_T) * parts(width, BLOCK_W), batch)](
            x, weight, bias, before, counts, y, *sizes, TAPS=taps, **given, BLOCK_T=BLOCK_T, BLOCK_W=BLOCK_W,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


def _operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool, pads: tuple[int, ...] | None
) -> tuple[tuple[Tensor, ...], dict[str, bool]]:
    """x, weight, bias, state and pads as kernels take them, and which of them are there"""
    x, counts = unit_stride(x), pad_counts(pads, x)
    before = x if state is None else state.to(x.dtype).contiguous()
    given = {
        "SILU": silu, "HAS_BIAS": bias is not None, "HAS_STATE": state is not None, "HAS_PADS": counts is not None,
    }  # fmt: skip
    return (x, weight.contiguous(), vector(bias, x), before, vector(counts, x)), given


class CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool,
        pads: tuple[int, ...] | None,
    ) -> Tensor:  # fmt: skip
        operands, given = _operands(x, weight, bias, state, silu, pads)
        ctx.save_for_backward(*operands)
        ctx.given, ctx.dtypes = given, tuple(v if v is None else v.dtype for v in (x, weight, bias, state))
        return _convolved(given, x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2]), *operands)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors[:2]
        (batch, length, width), taps = x.shape, weight.shape[1]
        new = {"device": x.device, "dtype": torch.float32}
        tiles = parts(length + taps - 1, BLOCK_T)
        dx = torch.empty(batch, length, width, dtype=x.dtype, device=x.device)
        dstate = torch.empty(batch, taps - 1, width, **new)
        dweight, dbias = torch.empty(batch, tiles, width, taps, **new), torch.empty(batch, tiles, width, **new)
        _backward[(tiles, parts(width, BLOCK_W), batch)](
            *ctx.saved_tensors, dy.contiguous(), dx, dstate, dweight, dbias, length, width, *x.stride()[:2], TAPS=taps,
            **ctx.given, BLOCK_T=BLOCK_T, BLOCK_W=BLOCK_W, num_warps=NUM_WARPS,
        )  # fmt: skip
        grads = (dx, dweight.sum((0, 1)), dbias.sum((0, 1)), dstate)
        present = (None if dtype is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *present, None, None


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (batch, length, width), weight (width, kernel) -> y like x, the last kernel - 1 inputs."""
    silu, taps = activation == "silu", weight.shape[1]
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, weight, bias, state)):
        return CausalConv.apply(x, weight, bias, state, silu, pads), last_inputs(x, taps - 1, pads, state)
    operands, given = _operands(x, weight, bias, state, silu, pads)
    last = torch.empty(x.shape[0], taps - 1, x.shape[2], dtype=x.dtype, device=x.device)
    y = _convolved(given, last, *operands)
    # by four taps' kernel, where it ran
    return y, last if taps == 4 and y.numel() else last_inputs(x, taps - 1, pads, state)


def last_inputs(x: Tensor, count: int, pads: tuple[int, ...] | None, state: Tensor | None) -> Tensor:
    """The last `count` inputs of each row, oldest first: the state's, zeros where fewer were seen, pads as zeros."""
    batch, length, width = x.shape
    tail = x[:, max(length - count, 0) :]
    if pads is not None and any(pad > length - count for pad in pads):
        positions = torch.arange(max(length - count, 0), length, device=x.device)
        tail = tail.masked_fill((positions < on_device(pads, x.device)[:, None])[..., None], 0.0)
    if length >= count:
        return tail.contiguous()
    before = x.new_zeros(batch, count, width) if state is None else state.to(x.dtype)
    return torch.cat([before[:, length:], tail], dim=1)


@triton.jit
def conv_step(
    now, state_ptr, weight_ptr, bias_ptr, m, c, c_ok, ok, width, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """One token through the conv, before SiLU: now (M, C), of rows m and channels c -> float32; the state in place"""
    total = tl.load(weight_ptr + c * TAPS + TAPS - 1, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    total = total * now.to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    at = state_ptr + m.to(tl.int64)[:, None] * (TAPS - 1) * width + c[None, :]
    for k in tl.static_range(TAPS - 1):
        past = tl.load(at + k * width, mask=ok, other=0.0)
        tap = tl.load(weight_ptr + c * TAPS + k, mask=c_ok, other=0.0).to(tl.float32)
        total += tap[None, :] * past.to(tl.float32)
        if k > 0:
            tl.store(at + (k - 1) * width, past, mask=ok)
    if TAPS > 1:
        tl.store(at + (TAPS - 2) * width, now.to(state_ptr.dtype.element_ty), mask=ok)
    return total


@triton.jit
def _update(
    state_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, width, x_batch,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    w_ok = w < width
    ok = (m >= 0)[:, None] & w_ok[None, :]
    now = tl.load(x_ptr + m[:, None] * x_batch + w[None, :], mask=ok, other=0.0)
    total = conv_step(now, state_ptr, weight_ptr, bias_ptr, m, w, w_ok, ok, width, TAPS, HAS_BIAS)
    if SILU:
        total *= sigmoid(total)
    tl.store(y_ptr + m[:, None] * width + w[None, :], total.to(y_ptr.dtype.element_ty), mask=ok)


def causal_conv_update(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu"
) -> Tensor:
    """One token: x (batch, width), state (batch, kernel - 1, width) contiguous and updated in place -> y like x."""
    if not state.is_contiguous():
        raise ValueError("causal_conv_update needs a contiguous state, for it is updated in place")
    x = unit_stride(x)
    (batch, width), taps = x.shape, weight.shape[1]
    y = torch.empty(batch, width, dtype=x.dtype, device=x.device)
    _update[(parts(width, BLOCK_W), batch)](
        state, x, weight.contiguous(), x if bias is None else bias, y, width, x.stride(0),
        TAPS=taps, SILU=activation == "silu", HAS_BIAS=bias is not None, BLOCK_W=BLOCK_W, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y
