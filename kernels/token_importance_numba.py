"""Token importance on the CPU: one pass over dt, softplus in SIMD lanes, nothing of dt's size written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statespan.kernels.dispatch import wide
from statespan.kernels.fast_math import Int, Real, constant, larger, reordered, softplus
from statespan.kernels.native import Kernel, pointer, rows, settled

NORMS = {"l2": 0, "l1": 1, "max": 2}
TOKENS = 64
"""Tokens of a task."""


@reordered
def sum_of_steps(dt, at, bias, channels, squared):
    """Σ Δ, or Σ Δ²."""
    total = constant(dt, 0.0)
    if squared != 0:
        for c in range(channels):
            step = softplus(dt[at + c] + bias[c])
            total += step * step
    else:
        for c in range(channels):
            total += softplus(dt[at + c] + bias[c])
    return total


@reordered
def largest_step(dt, at, bias, channels):
    """max Δ; the softplus of the largest, for softplus increases."""
    largest = dt[at] + bias[0]
    for c in range(1, channels):
        largest = larger(dt[at + c] + bias[c], largest)
    return softplus(largest)


def _importance(
    dt: Real, bias: Real, out: Real, tokens: Int, length: Int, channels: Int, norm: Int, dt_row: Int, dt_token: Int,
    scratch: Real, first: Int, last: Int,
) -> None:  # fmt: skip
    for token in range(first * TOKENS, min(last * TOKENS, tokens)):
        at = token // length * dt_row + token % length * dt_token
        if norm == 2:
            out[token] = largest_step(dt, at, bias, channels)
        else:
            total = sum_of_steps(dt, at, bias, channels, norm == 0)
            out[token] = math.sqrt(total) if norm == 0 else total


_kernel = Kernel(_importance)


def token_importance(dt: Tensor, dt_bias: Tensor, *, norm: str = "l2") -> Tensor:
    """As `statespan.kernels.token_importance.token_importance`, which has checked the shapes."""
    dtype, (batch, length, channels) = wide(dt), dt.shape
    dt, dt_bias = rows(dt, dtype), settled(dt_bias, dtype)
    out = torch.empty(batch, length, dtype=dtype)
    _kernel(
        dtype, -(-batch * length // TOKENS), batch * length * channels * 16, 1, *map(pointer, (dt, dt_bias, out)),
        batch * length, length, channels, NORMS[norm], *dt.stride()[:2],
    )  # fmt: skip
    return out
