"""The depthwise causal convolution before the scan, with its SiLU, and the few inputs it must remember.

    y[t, c] = act(bias[c] + sum_k weight[c, k] * x[t - kernel + 1 + k, c])        x before the sequence: the state

Source: section 3.4 of Mamba (arXiv:2312.00752) and causal_conv1d_ref (Dao-AILab/causal-conv1d v1.7.0). Ours differs:
tensors are (batch, length, channel), so nothing is transposed around it; the state holds the last kernel - 1 inputs,
oldest first, where theirs has kernel columns in decoding; inputs at leading pads count as zeros.

Bytes: x read and y written once; torch's conv1d transposes, pads, convolves and activates in four passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.errors import unknown
from statespan.kernels.dispatch import backend_for, clear, expect, expect_pads, kernel, pad_mask, wide


def causal_conv_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, in differentiable torch. Tests call it in float64."""
    (batch, length, width), taps = x.shape, weight.shape[1]
    rows = clear(x, pad_mask(pads, length, x.device))
    before = x.new_zeros(batch, taps - 1, width) if state is None else state.to(x.dtype)
    rows = torch.cat([before, rows], dim=1)  # (batch, kernel - 1 + length, width)
    inputs, weight = rows.to(wide(x)), weight.to(wide(x))
    y = sum((inputs[:, k : k + length] * weight[:, k] for k in range(taps)), start=torch.zeros_like(inputs[:, :length]))
    y = y if bias is None else y + bias.to(y.dtype)
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), rows[:, length:]


def causal_conv_update_ref(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu"
) -> Tensor:
    """The definition of one decode step: a convolution of length 1 whose final state is written into `state`."""
    y, after = causal_conv_ref(x[:, None], weight, bias, activation=activation, state=state)
    state.copy_(after)
    return y[:, 0]


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve a sequence, or the next chunk of one.

    Args:
        x: (batch, length, width). Length 0 is allowed.
        weight: (width, kernel); the last column meets the current token.
        bias: (width,).
        activation: "silu" or None.
        pads: leading positions of each row whose inputs count as zeros, whatever lies there.
        state: (batch, kernel - 1, width), the inputs before the first token, oldest first; zeros if None; not modified.

    Returns:
        y (batch, length, width) and the state after the last token, both in x's dtype.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[-1] or weight.shape[1] < 1:
        raise ValueError(f"causal_conv needs x (batch, length, width) and weight (width, kernel); "
                         f"got {[*x.shape]} and {[*weight.shape]}")  # fmt: skip
    batch, length, width = x.shape
    expect("causal_conv", "bias", bias, (width,), "(width,)")
    expect("causal_conv", "state", state, (batch, weight.shape[1] - 1, width), "(batch, kernel - 1, width)")
    expect_pads("causal_conv", pads, batch, length)
    _check_activation(activation)
    backend = backend_for("causal_conv", x, weight, bias, state)
    conv = causal_conv_ref if backend == "reference" else kernel("causal_conv", "causal_conv", backend)
    return conv(x, weight, bias, activation=activation, pads=pads, state=state)


def causal_conv_update(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu"
) -> Tensor:
    """One token of decoding: x (batch, width); `state` (batch, kernel - 1, width), contiguous, is updated in place."""
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[0] != x.shape[-1] or weight.shape[1] < 1:
        raise ValueError(f"causal_conv_update needs x (batch, width) and weight (width, kernel); "
                         f"got {[*x.shape]} and {[*weight.shape]}")  # fmt: skip
    (batch, width), taps = x.shape, weight.shape[1]
    expect("causal_conv_update", "bias", bias, (width,), "(width,)")
    expect("causal_conv_update", "state", state, (batch, taps - 1, width), "(batch, kernel - 1, width)")
    _check_activation(activation)
    backend = backend_for("causal_conv_update", x, weight, bias, state)
    update = causal_conv_update_ref if backend == "reference" else kernel("causal_conv", "causal_conv_update", backend)
    return update(state, x, weight, bias, activation=activation)


def _check_activation(activation: str | None) -> None:
    if activation not in ("silu", None):
        raise unknown("activation of the causal convolution", str(activation), ["silu", "None"])
