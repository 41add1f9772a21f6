"""Token importance: how hard each token pushes on the state, read off its step sizes alone.

    importance[b, t] = norm over channels of softplus(dt[b, t, :] + dt_bias)

DeciMamba (arXiv:2406.14528) ranks tokens by the L2 norm (get_non_decimated_indices, assafbk/DeciMamba@6290e95); l1 and
max are ours. One pass over dt and nothing of dt's size written: at 131,072 tokens and d_inner 5120 torch writes 2.7 GB
per intermediate, a kernel 0.5 MB.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from statespan.errors import unknown
from statespan.kernels.dispatch import backend_for, kernel, wide

Norm = Literal["l2", "l1", "max"]


def token_importance_ref(dt: Tensor, dt_bias: Tensor, *, norm: Norm = "l2") -> Tensor:
    """The definition, in torch. Tests call it in float64."""
    steps = F.softplus(dt.to(wide(dt)) + dt_bias.to(wide(dt)))
    if norm == "max":
        return steps.amax(-1)
    return steps.sum(-1) if norm == "l1" else steps.square().sum(-1).sqrt()


def token_importance(dt: Tensor, dt_bias: Tensor, *, norm: Norm = "l2") -> Tensor:
    """Score tokens by their step sizes.

    Args:
        dt: (batch, length, channels), before bias and softplus.
        dt_bias: (channels,).
        norm: over the channels: "l2" (DeciMamba's), "l1" or "max".

    Returns:
        (batch, length), float32 (float64 if dt is).
    """
    if dt.ndim != 3 or dt_bias.shape != dt.shape[-1:]:
        raise ValueError(f"token_importance needs dt (batch, length, channels) and dt_bias (channels,); "
                         f"got {[*dt.shape]} and {[*dt_bias.shape]}")  # fmt: skip
    if norm not in get_args(Norm):
        raise unknown("norm of the step sizes", norm, get_args(Norm))
    backend = backend_for("token_importance", dt, dt_bias)
    score = token_importance_ref if backend == "reference" else kernel("token_importance", "token_importance", backend)
    return score(dt, dt_bias, norm=norm)
