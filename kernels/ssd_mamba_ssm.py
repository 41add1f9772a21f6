"""SSD as mamba_ssm's kernels compute it, for cross-checks and training where that package is installed.

Thresholds, scales and pads become step sizes made in torch; everything else is theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statespan.kernels.dispatch import clear, pad_mask, peer
from statespan.kernels.selective_scan import step_sizes

__all__ = ["ssd", "ssd_state_update"]

CHUNK = 256
Limit = tuple[float, float]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    dt_limit: Limit | None = None,
    keep_above: Tensor | None = None,
    dt_scale: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, z (batch, length, heads, head_dim), dt (batch, length, heads) -> y like x, the last state in float32."""
    scan = peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    mask = pad_mask(pads, x.shape[1], x.device)
    x = clear(x, mask)
    if mask is not None or keep_above is not None or dt_scale is not None:
        dt = clear(step_sizes(dt.to(torch.float32), dt_bias, softplus, dt_limit, keep_above, dt_scale), mask)
        dt_bias, softplus, dt_limit = None, False, None
    y, last = scan(
        x, dt, A, B, C, CHUNK, D=D, z=z, dt_bias=dt_bias, initial_states=state, dt_softplus=softplus,
        dt_limit=dt_limit or (0.0, math.inf), return_final_states=True,
    )  # fmt: skip
    return clear(y, mask), last


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    dt_limit: Limit | None = None,
) -> Tensor:
    """One token: x, z (batch, heads, head_dim), dt (batch, heads); state in place -> y like x."""
    update = peer("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    if dt_limit is not None:  # theirs has no clamp
        dt = step_sizes(dt[:, None].to(torch.float32), dt_bias, softplus, dt_limit, None, None)[:, 0]
        dt_bias, softplus = None, False
    head_dim, d_state = state.shape[2:]
    # theirs tells one decay a head by strides of 0
    wide = [None if v is None else v.unsqueeze(-1).expand(*v.shape, head_dim) for v in (dt, dt_bias)]
    rates = A[:, None, None].expand(-1, head_dim, d_state)
    skip = D if D is None or D.ndim == 2 else D[:, None].expand(-1, head_dim)
    y: Tensor = update(state, x, wide[0], rates, B, C, D=skip, z=z, dt_bias=wide[1], dt_softplus=softplus)
    return y
