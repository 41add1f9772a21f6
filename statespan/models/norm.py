"""RMS norms: computed in float32 or wider whatever the stream's dtype, returned in the weight's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statespan.kernels import rms_norm as kernels


def rms_norm(rows: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """rows / rms(rows) * weight over the last axis, in rows' dtype but at least float32."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], None if weight is None else weight.to(wide.dtype), eps)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        """(…, width) -> the same shape, in the weight's dtype"""
        return kernels.rms_norm(rows, self.weight, self.eps)[0]


class GatedRMSNorm(nn.Module):
    """Mamba-2's norm of y * silu(z); each group's channels are normalised by themselves (arXiv:2405.21060, 7.1)."""

    def __init__(self, width: int, eps: float, n_groups: int, norm_before_gate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.n_groups, self.norm_before_gate = eps, n_groups, norm_before_gate

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """(batch, length, width) twice -> the same shape, in the weight's dtype"""
        return kernels.gated_rms_norm(
            y, z, self.weight, self.eps, groups=self.n_groups, norm_before_gate=self.norm_before_gate
        )
