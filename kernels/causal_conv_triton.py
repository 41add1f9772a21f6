"""The depthwise causal convolution with SiLU on CUDA, channel-last, with gradients: `kernels/causal_conv.py` says what.

A program convolves BLOCK_T tokens of BLOCK_W channels. Each of its `kernel` shifted loads after the first comes from
cache, so x is read from memory once and y written once. The backward computes what SiLU saw again instead of keeping
it; the gradient of the weights is a partial sum per program, added by torch in a fixed order (no atomics, so that a
training run repeats to the bit).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from statespan.kernels.triton_common import early, pad_counts, sigmoid, unit_stride, wide_vector

BLOCK_T, BLOCK_W, NUM_WARPS = 16, 128, 4


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
        total += tl.load(bias_ptr + w, mask=w_ok, other=0.0)[None, :]
    for k in tl.static_range(TAPS):
        weight = tl.load(weight_ptr + w * TAPS + k, mask=w_ok, other=0.0)
        x = _inputs(x_ptr, state_ptr, t + (k + 1 - TAPS), w, w_ok, first, length, width, x_row, HAS_STATE, TAPS)
        total += weight[None, :] * x
    return total


@triton.jit(do_not_specialize=["length"])
def _forward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, pads_ptr, y_ptr, length, width, x_batch, x_row,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_PADS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
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
        dx += tl.load(weight_ptr + w * TAPS + (TAPS - 1 - j), mask=w_ok, other=0.0)[None, :] * g
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


class CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool,
        pads: tuple[int, ...] | None,
    ) -> Tensor:  # fmt: skip
        (batch, length, width), taps = x.shape, weight.shape[1]
        x = unit_stride(x)
        counts = pad_counts(pads, x)
        before = x if state is None else state.detach().to(x.dtype).contiguous()
        operands = (x, wide_vector(weight, x), wide_vector(bias, x), before, x if counts is None else counts)
        sizes = (length, width, *x.stride()[:2])
        constants = {
            "TAPS": taps, "SILU": silu, "HAS_BIAS": bias is not None, "HAS_STATE": state is not None,
            "HAS_PADS": counts is not None, "BLOCK_T": BLOCK_T, "BLOCK_W": BLOCK_W, "num_warps": NUM_WARPS,
        }  # fmt: skip
        y = torch.empty(batch, length, width, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(length, BLOCK_T), triton.cdiv(width, BLOCK_W), batch)  # only x goes past 65,535
        if y.numel():
            _forward[grid](*operands, y, *sizes, **constants)
        ctx.save_for_backward(*operands)
        ctx.sizes, ctx.constants = sizes, constants
        ctx.dtypes = tuple(v if v is None else v.dtype for v in (x, weight, bias, state))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0]
        (batch, length, width), taps = x.shape, ctx.constants["TAPS"]
        new = {"device": x.device, "dtype": torch.float32}
        tiles = triton.cdiv(length + taps - 1, BLOCK_T)
        dx = torch.empty(batch, length, width, dtype=x.dtype, device=x.device)
        dstate = torch.empty(batch, taps - 1, width, **new)
        dweight, dbias = torch.empty(batch, tiles, width, taps, **new), torch.empty(batch, tiles, width, **new)
        _backward[(tiles, triton.cdiv(width, BLOCK_W), batch)](
            *ctx.saved_tensors, dy.contiguous(), dx, dstate, dweight, dbias, *ctx.sizes, **ctx.constants
        )
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
    y = CausalConv.apply(x, weight, bias, state, activation == "silu", pads)
    return y, last_inputs(x, weight.shape[1] - 1, pads, state)


def last_inputs(x: Tensor, count: int, pads: tuple[int, ...] | None, state: Tensor | None) -> Tensor:
    """The last `count` inputs of each row, oldest first: the state's, zeros where fewer were seen, pads as zeros."""
    batch, length, width = x.shape
    tail = x[:, max(length - count, 0) :]
    if pads is not None and any(pad > length - count for pad in pads):
        positions = torch.arange(max(length - count, 0), length, device=x.device)
        tail = tail.masked_fill((positions < torch.tensor(pads, device=x.device)[:, None])[..., None], 0.0)
    if length >= count:
        return tail.contiguous()
    before = x.new_zeros(batch, count, width) if state is None else state.to(x.dtype)
    return torch.cat([before[:, length:], tail], dim=1)


@triton.jit
def _update(
    state_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, width, x_batch,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    w_ok = w < width
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    now = tl.load(x_ptr + batch * x_batch + w, mask=w_ok, other=0.0)
    total = tl.load(weight_ptr + w * TAPS + TAPS - 1, mask=w_ok, other=0.0).to(tl.float32) * now.to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + w, mask=w_ok, other=0.0).to(tl.float32)
    at = state_ptr + batch * (TAPS - 1) * width + w
    for k in tl.static_range(TAPS - 1):
        past = tl.load(at + k * width, mask=w_ok, other=0.0)
        total += tl.load(weight_ptr + w * TAPS + k, mask=w_ok, other=0.0).to(tl.float32) * past.to(tl.float32)
        if k > 0:
            tl.store(at + (k - 1) * width, past, mask=w_ok)
    if TAPS > 1:
        tl.store(at + (TAPS - 2) * width, now.to(state_ptr.dtype.element_ty), mask=w_ok)
    if SILU:
        total *= sigmoid(total)
    tl.store(y_ptr + batch * width + w, total.to(y_ptr.dtype.element_ty), mask=w_ok)


def causal_conv_update(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu"
) -> Tensor:
    """One token: x (batch, width), state (batch, kernel - 1, width) contiguous and updated in place -> y like x."""
    if not state.is_contiguous():
        raise ValueError("causal_conv_update needs a contiguous state, for it is updated in place")
    x = unit_stride(x)
    (batch, width), taps = x.shape, weight.shape[1]
    y = torch.empty(batch, width, dtype=x.dtype, device=x.device)
    _update[(triton.cdiv(width, BLOCK_W), batch)](
        state, x, weight.contiguous(), x if bias is None else bias, y, width, x.stride(0),
        TAPS=taps, SILU=activation == "silu", HAS_BIAS=bias is not None, BLOCK_W=BLOCK_W, **early(),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return y
