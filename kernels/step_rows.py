"""A decode step's large products for some dozens of rows, each with what stands behind it.

    linear_norm:   s ← s + x Wᵀ;   y = s / sqrt(mean(s²) + eps) * g              out_proj, the stream, the next norm
    linear_conv:   y = x Wᵀ, of which columns first … first + width go through the causal conv's one-token update and
                   SiLU, its state in place                                                   Mamba-2's in_proj, conv

Bytes: the weights once (79 MB a layer for mamba-2.8b, 26 µs of an H100's memory), and beside them little: at 64 rows a
library's product takes one kernel more to add the parts of its sums, and every kernel of the step costs about 2 µs in
which no weight is on its way. Ours differs from product, addition and norm one after the other in rounding only: the
product is added to the stream in float32. `kernels/step_linear.py` has one or two rows.
"""

from __future__ import annotations

from torch import Tensor

from statespan.kernels.dispatch import expect, kernel, overridden, wide
from statespan.kernels.rms_norm import rms_norm_ref
from statespan.kernels.step_linear import Conv, step_linear_ref

ROWS = 64
"""At most; with more the library's products are as fast."""


def linear_norm_ref(stream: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The definition, in torch. Tests call it in float64."""
    stream.copy_(stream.to(wide(stream)) + x.to(wide(x)) @ weight.to(wide(x)).T)
    return rms_norm_ref(stream, scale, eps)[0]


def linear_norm(stream: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Adds a product to the residual stream and gives the stream's norm.

    Args:
        stream: (batch, out), contiguous, updated in place.
        x: (batch, width) in the weight's dtype; weight: (out, width).
        scale: (out,), the norm's weight.

    Returns:
        (batch, out) in the scale's dtype.
    """
    (batch, width), out = x.shape, weight.shape[0]
    expect("linear_norm", "weight", weight, (out, width), "(out, width)")
    expect("linear_norm", "stream", stream, (batch, out), "(batch, out)")
    expect("linear_norm", "scale", scale, (out,), "(out,)")
    if not stream.is_contiguous():
        raise ValueError("linear_norm needs a contiguous stream, for it is updated in place")
    if _in_torch("linear_norm", x):
        return linear_norm_ref(stream, x, weight, scale, eps)
    y: Tensor = kernel("step_rows", "linear_norm", "triton")(stream, x, weight, scale, eps)
    return y


def linear_conv_ref(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """The definition, in torch. Tests call it in float64."""
    return step_linear_ref(x, weight, conv=conv)


def linear_conv(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """A product and the conv behind some of its columns.

    Args:
        x: (batch, width) in the weight's dtype; weight: (out, width).
        conv: its `state` (batch, kernel - 1, channels), contiguous, is updated in place.

    Returns:
        (batch, out) in the weight's dtype.
    """
    (batch, width), out = x.shape, weight.shape[0]
    channels, taps = conv.weight.shape
    expect("linear_conv", "weight", weight, (out, width), "(out, width)")
    expect("linear_conv", "conv.state", conv.state, (batch, taps - 1, channels), "(batch, kernel - 1, channels)")
    if not 0 <= conv.first <= out - channels:
        raise ValueError(f"linear_conv needs a conv within its {out} columns; got {channels} from {conv.first}")
    if not conv.state.is_contiguous():
        raise ValueError("linear_conv needs a contiguous conv state, for it is updated in place")
    if _in_torch("linear_conv", x):
        return linear_conv_ref(x, weight, conv)
    y: Tensor = kernel("step_rows", "linear_conv", "triton")(x, weight, conv)
    return y


def _in_torch(op: str, x: Tensor) -> bool:
    if len(x) > ROWS:
        raise ValueError(f"{op} takes at most {ROWS} rows; got {len(x)}: use the library's product")
    return overridden() != "triton" and (overridden() is not None or not x.is_cuda)
