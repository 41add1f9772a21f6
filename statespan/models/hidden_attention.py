"""The attention matrix a scan hides: how much token j's input weighs in token i's output, per channel.

    M_{i,j} = Σ_n C_{i,n} exp(A_n Σ_{k=j+1..i} Δ_k) Δ_j B_{j,n}        j ≤ i; Mamba-2 has one A a head
    mean distance = Σ_j (L-1-j) |M_{L-1,j}| / Σ_j |M_{L-1,j}|            of the last token, in tokens

Source: DeciMamba, arXiv:2406.14528, section 3 (Mamba Mean Distance), after Ali et al., arXiv:2403.01590. The conv, the
skip D and the gate are left out; Δ B is the simplified hold of the released models. Ours differs: the mean distance
needs the last row only, O(L) a channel, where the authors' notebook makes the whole map; absolute values come before
averages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statespan.models.hook import ScanInputs

BLOCK = 64  # channels at a time: bounds the memory of (length, channels, d_state)


def last_row(inputs: ScanInputs, steps: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
    """(length, channels): |M| of the last token of one row.

    Args:
        inputs: of a layer, one row. A longer text's inputs serve for its beginnings: `steps` says how far to read.
        steps: (length, channels) in place of the layer's own.
        channels: indices of those wanted; all by default.
    """
    steps = inputs.step_sizes()[0] if steps is None else steps
    wanted = torch.arange(steps.shape[1], device=steps.device) if channels is None else channels
    columns = [_columns(inputs, steps[:, some], some) for some in wanted.split(BLOCK)]
    return torch.cat(columns, dim=1).abs()


def _columns(inputs: ScanInputs, steps: Tensor, some: Tensor) -> Tensor:
    """(length, some channels) of steps -> the signed last row of these channels, the same shape"""
    length, A = len(steps), inputs.A[some].to(steps)
    B, C = inputs.B[0, :length].to(steps), inputs.C[0, length - 1].to(steps)
    later = steps.flip(0).cumsum(0).flip(0) - steps  # Σ of the steps after j
    if A.ndim == 2:  # Mamba-1
        decay = (later[..., None] * A).exp()  # (length, channels, d_state)
        return (decay * (B * C)[:, None]).sum(-1) * steps
    read = (B * C).unflatten(-1, (inputs.n_groups, -1)).sum(-1)  # (length, groups)
    group = some * inputs.n_groups // inputs.A.shape[0]
    weights: Tensor = read[:, group] * (later * A).exp() * steps
    return weights


def mean_distance(weights: Tensor) -> Tensor:
    """(length, channels) absolute weights of the last row -> expected distance it looks back, in tokens: (channels,)"""
    length = weights.shape[0]
    distance = torch.arange(length - 1, -1, -1, dtype=weights.dtype, device=weights.device)
    return (distance[:, None] * weights).sum(0) / weights.sum(0).clamp_min(torch.finfo(weights.dtype).tiny)


def attention_map(inputs: ScanInputs, channel: int) -> Tensor:
    """(length, length): |M| of one channel, zero above the diagonal."""
    steps, total = inputs.step_sizes()[0, :, channel], inputs.step_sizes()[0, :, channel].cumsum(0)
    gap = (total[:, None] - total[None]).clamp_min(0.0)  # Σ of the steps in (j, i]
    B, C = inputs.B[0].to(steps), inputs.C[0].to(steps)
    if inputs.A.ndim == 2:
        rates = inputs.A[channel].to(steps)
        parts = [(gap * rate).exp() * (C[:, n, None] * B[None, :, n]) for n, rate in enumerate(rates)]
        weights = torch.stack(parts).sum(0)
    else:
        group = channel * inputs.n_groups // inputs.A.shape[0]
        read = C.unflatten(-1, (inputs.n_groups, -1))[:, group] @ B.unflatten(-1, (inputs.n_groups, -1))[:, group].T
        weights = read * (gap * inputs.A[channel].to(steps)).exp()
    return (weights * steps[None]).tril().abs()
