"""RMS norms with what stands beside them in a block: the residual's addition before, Mamba-2's gate around.

    add_rms_norm:    s = residual + x;   y = s / sqrt(mean(s²) + eps) * weight
    gated_rms_norm:  g = y * silu(z);    y = g / sqrt(mean(g²) + eps) * weight     the mean over each group's channels
                     with norm_before_gate the norm is of y alone, and silu(z) multiplies its result

Source: RMSNorm, arXiv:1910.07467; the gated form is Mamba-2's, arXiv:2405.21060, section 7.1, with rms_norm_ref of
state-spaces/mamba@e9594ce (layernorm_gated.py). Ours differs: sums are float32 whatever the stream's dtype, and the sum
with the residual is rounded to the stream's dtype before it is normalised, so that y is the norm of what is kept.

Bytes: one pass. In torch the addition, the square's mean, the scaling and the gate each read and write the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.kernels.dispatch import expect, kernel, overridden, wide


def rms_norm_ref(rows: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, in differentiable torch. Tests call it in float64."""
    stream = rows if residual is None else residual + rows.to(residual.dtype)
    normed = F.rms_norm(stream.to(wide(stream)), rows.shape[-1:], weight.to(wide(stream)), eps)
    return normed.to(weight.dtype), stream


def gated_rms_norm_ref(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, *, groups: int = 1, norm_before_gate: bool = False
) -> Tensor:
    """The definition, in differentiable torch. Tests call it in float64."""
    rows, gate = y.to(wide(y)), F.silu(z.to(wide(y)))
    rows = rows if norm_before_gate else rows * gate
    parts = rows.unflatten(-1, (groups, -1))
    rows = F.rms_norm(parts, parts.shape[-1:], None, eps).flatten(-2) * weight.to(rows.dtype)
    return (rows * gate if norm_before_gate else rows).to(weight.dtype)


def rms_norm(rows: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Norm over the last axis, of `residual + rows` where a residual is given.

    Args:
        rows, residual: (..., width); the residual may be wider than rows' dtype.
        weight: (width,).

    Returns:
        (..., width) in the weight's dtype, and what was normalised: the sum in the residual's dtype, or rows itself.
    """
    expect("rms_norm", "weight", weight, rows.shape[-1:], "(width,)")
    expect("rms_norm", "residual", residual, tuple(rows.shape), "like rows")
    if _in_torch(rows, weight, residual):
        return rms_norm_ref(rows, weight, eps, residual=residual)
    normed, stream = kernel("rms_norm", "rms_norm", "triton")(rows, weight, eps, residual=residual)
    return normed, stream


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, *, groups: int = 1, norm_before_gate: bool = False
) -> Tensor:
    """Mamba-2's norm of y * silu(z): (..., width) twice -> the same shape in the weight's dtype."""
    expect("gated_rms_norm", "weight", weight, y.shape[-1:], "(width,)")
    expect("gated_rms_norm", "z", z, tuple(y.shape), "like y")
    if groups < 1 or y.shape[-1] % groups:
        raise ValueError(f"gated_rms_norm needs groups that divide the width {y.shape[-1]}; got {groups}")
    norm = gated_rms_norm_ref
    if not _in_torch(y, z, weight):
        norm = kernel("rms_norm", "gated_rms_norm", "triton")
    return norm(y, z, weight, eps, groups=groups, norm_before_gate=norm_before_gate)


def _in_torch(*tensors: Tensor | None) -> bool:
    """On a CPU the definition is the kernel; on a GPU it is where a gradient is asked for."""
    if overridden() not in (None, "mamba_ssm"):
        return overridden() != "triton"
    needs_grad = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    return needs_grad or not any(v is not None and v.is_cuda for v in tensors)
