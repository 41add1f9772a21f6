"""One token a row through the causal conv and the matrix behind it: Mamba-1's conv and x_proj in a decode step.

    u = silu(conv(state, x)), the state in place;   y = u Wᵀ

Both u and y are wanted. Bytes: x, u, W once and the conv's state once in and once out. x_proj is deep and narrow (5120
to 192 for mamba-2.8b), so what makes it fast is to share out its depth, which the conv before it does not mind.
"""

from __future__ import annotations

from torch import Tensor

from statespan.kernels.causal_conv import causal_conv_update_ref
from statespan.kernels.dispatch import expect, kernel, overridden, wide


def step_conv_linear_ref(
    state: Tensor, x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, in torch. Tests call it in float64."""
    u = causal_conv_update_ref(state, x, conv_weight, conv_bias)
    return u, (u.to(wide(x)) @ weight.to(wide(x)).T).to(weight.dtype)


def step_conv_linear(
    state: Tensor, x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of decoding.

    Args:
        state: (batch, kernel - 1, width), contiguous, updated in place.
        x: (batch, width); conv_weight: (width, kernel); conv_bias: (width,).
        weight: (out, width).

    Returns:
        u (batch, width) and y (batch, out), both in the weights' dtype.
    """
    (batch, width), taps = x.shape, conv_weight.shape[1]
    expect("step_conv_linear", "state", state, (batch, taps - 1, width), "(batch, kernel - 1, width)")
    expect("step_conv_linear", "conv_weight", conv_weight, (width, taps), "(width, kernel)")
    expect("step_conv_linear", "weight", weight, (weight.shape[0], width), "(out, width)")
    if not state.is_contiguous():
        raise ValueError("step_conv_linear needs a contiguous state, for it is updated in place")
    if overridden() == "triton" or (overridden() is None and x.is_cuda):
        fused = kernel("step_conv_linear", "step_conv_linear", "triton")
        u, y = fused(state, x, conv_weight, conv_bias, weight)
        return u, y
    return step_conv_linear_ref(state, x, conv_weight, conv_bias, weight)
