"""What the Triton kernels share: the step size, the gate, and how tensors are handed over.

Exponentials are powers of two, `exp2(v * LOG2E)`, for that is the one exponential the hardware has. log1p is a
polynomial: ln(1 + u) loses Δ's digits where u is small, which is where trained models have their step sizes.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statespan.kernels.dispatch import on_device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p_unit(u):
    """log(1 + u) for u in [0, 1] to 4e-8 of itself: u times the Chebyshev interpolant of log1p(u) / u, degree 8."""
    p = 0.0051261 * u - 0.02907406
    p = p * u + 0.07751609
    p = p * u - 0.13602248
    p = p * u + 0.19076881
    p = p * u - 0.24835399
    p = p * u + 0.33318122
    p = p * u - 0.49999445
    p = p * u + 0.99999997
    return p * u


@triton.jit
def softplus(v):
    """log(1 + exp(v)), relative error below 1e-6 everywhere; 0 only where exp(v) itself underflows."""
    return tl.maximum(v, 0.0) + log1p_unit(tl.exp2(-tl.abs(v) * LOG2E))


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-v * LOG2E))


def early(on: bool = not INTERPRETED) -> dict[str, Any]:
    """Options of a kernel that may begin before the one before it ends (programmatic dependent launch)."""
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}


def parts(size: int, part: int) -> int:
    """How many parts hold so much. Triton's `cdiv` works within kernels, too, and takes ten times as long outside."""
    return -(-size // part)


def power_of_2(size: int) -> int:
    """The next, as `parts` beside Triton's"""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def vector(values: Tensor | None, like: Tensor) -> Tensor:
    """Contiguous for a kernel to read, which widens it; where there is none, any tensor, which is not read."""
    return like if values is None else values.contiguous()


def unit_stride(rows: Tensor) -> Tensor:
    """The tensor itself where its last axis is dense, else a copy: kernels take any other strides."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def wide_vector(values: Tensor | None, like: Tensor) -> Tensor:
    """Contiguous float32 for a kernel to read; where there is none, any tensor of the device, which is not read."""
    return like if values is None else values.detach().to(torch.float32).contiguous()


def pad_counts(pads: tuple[int, ...] | None, like: Tensor) -> Tensor | None:
    """(batch,) int32 on the device, or None where no row has leading pads."""
    if pads is None or not any(pads):
        return None
    return on_device(pads, like.device)
