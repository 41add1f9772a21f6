"""The causal convolution on the CPU: a block of channels at a time, weights in lanes, every input read from cache."""

from __future__ import annotations

import torch
from torch import Tensor

from statespan.kernels.dispatch import pad_mask, wide
from statespan.kernels.fast_math import Int, Ints, Real, constant, given, inlined, shift, silu
from statespan.kernels.lanes_numba import AHEAD, LANES, fill_lanes, prefetch_lanes
from statespan.kernels.native import Kernel, pointer, rows, settled


@inlined
def add_tap(out, weight, tap, source, at, count):
    """out += weight[tap] * source[at : at + count]"""
    for j in range(count):
        out[j] += weight[tap * LANES + j] * source[at + j]


@inlined
def store_lanes(y, at, out, activate, count):
    """y = silu(out), or out."""
    if activate != 0:
        for j in range(count):
            y[at + j] = silu(out[j])
    else:
        for j in range(count):
            y[at + j] = out[j]


@inlined
def load_weights(lanes, bias_lanes, weight, bias, begin, taps, count):
    """Weights as (kernel, LANES), and the bias."""
    fill_lanes(bias_lanes, bias, begin, count, constant(weight, 0.0))
    for j in range(count):
        for k in range(taps):
            lanes[k * LANES + j] = weight[(begin + j) * taps + k]


def _conv(
    x: Real, weight: Real, bias: Real, before: Real, pads: Ints, y: Real,
    length: Int, width: Int, taps: Int, activate: Int, x_row: Int, x_token: Int,
    scratch: Real, first: Int, last: Int,
) -> None:  # fmt: skip
    out, bias_lanes, lanes = scratch, shift(scratch, LANES), shift(scratch, 2 * LANES)
    blocks = (width + LANES - 1) // LANES
    for task in range(first, last):
        row, begin = task // blocks, task % blocks * LANES
        count = min(LANES, width - begin)
        load_weights(lanes, bias_lanes, weight, bias, begin, taps, count)
        pad = pads[row] if given(pads) else 0
        x_at, before_at, y_at = row * x_row + begin, row * (taps - 1) * width + begin, row * length * width + begin
        for t in range(length):
            prefetch_lanes(x, x_at + (t + AHEAD) * x_token)
            prefetch_lanes(y, y_at + (t + AHEAD) * width)
            for j in range(LANES):
                out[j] = bias_lanes[j]
            for k in range(taps):
                source = t - (taps - 1) + k
                if source >= pad:
                    add_tap(out, lanes, k, x, x_at + source * x_token, count)
                elif source < 0 and given(before):
                    add_tap(out, lanes, k, before, before_at + (source + taps - 1) * width, count)
            store_lanes(y, y_at + t * width, out, activate, count)


def _conv_step(
    state: Real, x: Real, weight: Real, bias: Real, y: Real, width: Int, taps: Int, activate: Int, x_row: Int,
    scratch: Real, first: Int, last: Int,
) -> None:  # fmt: skip
    out, bias_lanes, lanes = scratch, shift(scratch, LANES), shift(scratch, 2 * LANES)
    blocks = (width + LANES - 1) // LANES
    for task in range(first, last):
        row, begin = task // blocks, task % blocks * LANES
        count = min(LANES, width - begin)
        load_weights(lanes, bias_lanes, weight, bias, begin, taps, count)
        x_at, state_at = row * x_row + begin, row * (taps - 1) * width + begin
        for j in range(LANES):
            out[j] = bias_lanes[j]
        for k in range(taps - 1):
            add_tap(out, lanes, k, state, state_at + k * width, count)
        add_tap(out, lanes, taps - 1, x, x_at, count)
        for k in range(taps - 1):
            for j in range(count):
                at = state_at + k * width + j
                state[at] = state[at + width] if k < taps - 2 else x[x_at + j]
        store_lanes(y, row * width + begin, out, activate, count)


_conv_kernel, _step_kernel = Kernel(_conv), Kernel(_conv_step)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `statespan.kernels.causal_conv.causal_conv`, which has checked the shapes."""
    dtype, (batch, length, width), taps = wide(x), x.shape, weight.shape[1]
    inputs, weight, bias, before = rows(x, dtype), *(settled(v, dtype) for v in (weight, bias, state))
    y = torch.empty(batch, length, width, dtype=dtype)
    skips = None if pads is None else torch.tensor(pads, dtype=torch.int64)
    _conv_kernel(
        dtype, batch * -(-width // LANES), batch * length * width * 8, (taps + 2) * LANES,
        *map(pointer, (inputs, weight, bias, before, skips, y)),
        length, width, taps, int(activation == "silu"), *inputs.stride()[:2],
    )  # fmt: skip
    return y.to(x.dtype), _last_inputs(x, taps - 1, pads, state)


def _last_inputs(x: Tensor, count: int, pads: tuple[int, ...] | None, before: Tensor | None) -> Tensor:
    """The state after the sequence: a copy, so that a long sequence is not kept alive by its last rows."""
    batch, length, width = x.shape
    last = x[:, max(length - count, 0) :]
    mask = pad_mask(pads, length, x.device)
    if mask is not None:
        last = last.masked_fill(mask[:, max(length - count, 0) :, None], 0.0)
    if length >= count:
        return last.clone(memory_format=torch.contiguous_format)
    before = x.new_zeros(batch, count, width) if before is None else before.to(x.dtype)
    return torch.cat([before[:, length:], last], dim=1)


def causal_conv_update(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu"
) -> Tensor:
    """As `statespan.kernels.causal_conv.causal_conv_update`, which has checked the shapes."""
    dtype, (batch, width), taps = wide(x), x.shape, weight.shape[1]
    inputs, weight, bias, held = rows(x, dtype), *(settled(v, dtype) for v in (weight, bias, state))
    y = torch.empty(batch, width, dtype=dtype)
    _step_kernel(
        dtype, batch * -(-width // LANES), batch * width * 8, (taps + 2) * LANES,
        *map(pointer, (held, inputs, weight, bias, y)),
        width, taps, int(activation == "silu"), inputs.stride(0),
    )  # fmt: skip
    if held is not state:  # a state in lower precision, or not contiguous
        state.copy_(held)
    return y if y.dtype is x.dtype else y.to(x.dtype)
