"""A float32 linear map by bfloat16 tensor cores, for scores that tie in bfloat16.

    y = x Wᵀ + b,   W = W₁ + W₂ + W₃,   x = x₁ + x₂ + x₃,   y = Σ x_i W_jᵀ + b over i + j <= 4

A piece is what bfloat16 leaves of the one before, so three hold float32's 24 bits; a product of two pieces is exact and
sums are float32. The products left out are below 2**-24 of x W. Rows that are bfloat16 already are one piece: three
products, else six, where plain float32 runs outside the tensor cores at a twelfth of their rate or less.

On a CPU, in float64, or where a gradient is asked for: torch's own linear map in the weight's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.kernels.dispatch import expect

PIECES = 3


def wide_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, in differentiable torch. Tests call it in float64."""
    return F.linear(x.to(weight.dtype), weight, bias)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows, width), in the weight's dtype or bfloat16; weight (outputs, width) -> (rows, outputs) like the weight"""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"wide_linear needs x (rows, width) and weight (outputs, width); "
                         f"got {[*x.shape]} and {[*weight.shape]}")  # fmt: skip
    expect("wide_linear", "bias", bias, weight.shape[:1], "(outputs,)")
    needs_grad = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, weight, bias))
    if not x.is_cuda or needs_grad or weight.dtype != torch.float32 or not x.numel():
        return wide_linear_ref(x, weight, bias)
    return in_pieces(x, weight, bias)


def in_pieces(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum above, smallest terms first; float32."""
    parts, weights = pieces(x), pieces(weight)
    terms = [(i, j) for i in range(len(parts)) for j in range(PIECES) if i + j < PIECES]
    y: Tensor | None = None
    for i, j in sorted(terms, key=lambda term: -sum(term)):
        y = _add(y, parts[i], weights[j])
    assert y is not None
    return y if bias is None else y.add_(bias)


def pieces(v: Tensor) -> list[Tensor]:
    """bfloat16 tensors whose sum is v; v itself where it is bfloat16"""
    if v.dtype == torch.bfloat16:
        return [v]
    found = []
    for _ in range(PIECES):
        found.append(v.to(torch.bfloat16))
        v = v - found[-1]
    return found


def _add(y: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """y + x weightᵀ, in y where there is one"""
    if not x.is_cuda:
        product = x.float() @ weight.float().T
        return product if y is None else y.add_(product)
    if y is None:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return torch.addmm(y, x, weight.T, out_dtype=torch.float32, out=y)
