"""One token a row times a weight matrix, with what stands before and after that product in a decode step.

    n(x) = x    or    x / sqrt(mean(x²) + eps) * g
    y = n(x) Wᵀ + b
    columns first … first + width of y go through the causal conv's one-token update and SiLU, its state in place
    with a residual: residual + y instead, in the residual's dtype

Bytes: the weights once; at one row they are all there is (5.5 GB a token for mamba-2.8b in bfloat16, 1.8 ms on an H100)
and every kernel beside the product costs about as much as it computes nothing for. Ours differs from a norm, a product,
a conv and an addition one after the other in rounding only: the norm's scale is applied to the sum, in float32.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from statespan.kernels.causal_conv import causal_conv_update_ref
from statespan.kernels.dispatch import backend_for, expect, kernel, wide
from statespan.kernels.rms_norm import rms_norm_ref


class Norm(NamedTuple):
    """RMS norm before the product."""

    weight: Tensor
    eps: float


class Conv(NamedTuple):
    """The causal conv behind columns `first` … of the product; `state` (batch, kernel - 1, width) is updated."""

    state: Tensor
    weight: Tensor
    bias: Tensor | None
    first: int = 0


def step_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    conv: Conv | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition, in torch. Tests call it in float64."""
    if norm is not None:
        x = rms_norm_ref(x, norm.weight, norm.eps)[0]
    y = x.to(wide(x)) @ weight.to(wide(x)).T
    y = y if bias is None else y + bias.to(y.dtype)
    if conv is not None:
        at = slice(conv.first, conv.first + conv.weight.shape[0])
        rows = y[:, at].to(weight.dtype)
        y[:, at] = causal_conv_update_ref(conv.state, rows, conv.weight, conv.bias).to(y.dtype)
    return y.to(weight.dtype) if residual is None else (residual.to(y.dtype) + y).to(residual.dtype)


def step_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    conv: Conv | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """One token a row through a layer's matrix.

    Args:
        x: (batch, width), in any dtype where a norm comes first, else in the weight's; on a CPU always in that.
        weight: (out, width); bias: (out,).
        norm: what x passes through first.
        conv: what some columns of the product pass through afterwards.
        residual: (batch, out), not modified.

    Returns:
        (batch, out), in the residual's dtype where there is one, else in the weight's.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"step_linear needs x (batch, width) and weight (out, width); got {[*x.shape]} and {[*weight.shape]}"
        )
    batch, out = x.shape[0], weight.shape[0]
    expect("step_linear", "bias", bias, (out,), "(out,)")
    expect("step_linear", "residual", residual, (batch, out), "(batch, out)")
    if norm is not None:
        expect("step_linear", "norm.weight", norm.weight, x.shape[1:], "(width,)")
    if conv is not None:
        width, taps = conv.weight.shape
        expect("step_linear", "conv.state", conv.state, (batch, taps - 1, width), "(batch, kernel - 1, width)")
        if not 0 <= conv.first <= out - width:
            raise ValueError(f"step_linear needs a conv within its {out} columns; got {width} from {conv.first}")
    backend = backend_for("step_linear", x, weight, bias, residual)
    product = step_linear_ref if backend == "reference" else kernel("step_linear", "step_linear", backend)
    return product(x, weight, bias, norm=norm, conv=conv, residual=residual)
