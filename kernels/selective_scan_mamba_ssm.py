"""The selective scan as mamba_ssm's kernels compute it, for cross-checks and training where that package is installed.

Theirs are channel-first and know neither an initial state nor a threshold nor leading pads. Thresholds and pads become
steps of exactly 0, made in torch; a state before the first token is refused, so a prompt is read in one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.kernels.dispatch import clear, pad_mask, peer
from statespan.kernels.selective_scan import step_sizes

__all__ = ["selective_scan", "selective_state_update"]


def selective_scan(
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
    keep_above: Tensor | None = None,
    dt_scale: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, dt, z (batch, length, d_inner) -> y like x, the last state (batch, d_inner, d_state) in float32."""
    if state is not None:
        raise UserError(
            "backend mamba_ssm begins every scan without a state; read the prompt in one chunk, or use the default one"
        )
    scan = peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    mask = pad_mask(pads, x.shape[1], x.device)
    x = clear(x, mask)
    if mask is not None or keep_above is not None or dt_scale is not None:
        wide = dt.to(torch.float32)
        dt = clear(step_sizes(wide, dt_bias, softplus, None, keep_above, dt_scale), mask).to(x.dtype)
        dt_bias, softplus = None, False
    rows = [rows.mT.contiguous() if rows.ndim == 3 else rows.permute(0, 2, 3, 1).contiguous() for rows in (B, C)]
    y, last = scan(
        x.mT.contiguous(), dt.mT.contiguous(), A, *rows, D=D, z=None if z is None else z.mT.contiguous(),
        delta_bias=dt_bias, delta_softplus=softplus, return_last_state=True,
    )  # fmt: skip
    return clear(y.mT, mask), last


def selective_state_update(
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
) -> Tensor:
    """One token: x, dt, z (batch, d_inner), B, C (batch, d_state); state in place -> y (batch, d_inner)."""
    update = peer("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    y: Tensor = update(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=softplus)
    return y
