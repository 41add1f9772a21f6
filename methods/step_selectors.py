"""LongMamba's other selectors: which steps of a prompt a global channel keeps, judged by that prompt itself.

    alpha    the ceil(b α S) largest            offline   those at or above order statistic floor(b α S), from 0
    bound    the longest descending prefix whose sum is at most b β
    norm     all of them, scaled by b β / Σ Δ

Source: `--our_method` in GATECH-EIC/LongMamba@5da3e17. Ours differs: a count becomes a threshold halfway between the
last kept step and the first dropped one, so that the scan's own rounding flips neither; equal steps fall together.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Selector = Literal["alpha", "offline", "bound", "norm"]


def largest(values: Tensor, share: float) -> Tensor:
    """Mask of this share of all values, the largest; at least one, and equal ones fall together."""
    count = max(1, round(share * values.numel()))
    return values >= values.flatten().topk(count).values[-1]


def steps_kept(selector: Selector, ordered: Tensor, factor: float, alpha: Tensor, budget: Tensor) -> Tensor:
    """(channels, S) in descending order, (channels,) α and β -> how many each channel keeps, (channels,) int64"""
    length = ordered.shape[-1]
    if selector == "bound":
        return (ordered.cumsum(-1) <= factor * budget[:, None]).sum(-1)
    wanted = factor * alpha.double() * length
    count = wanted.ceil() if selector == "alpha" else wanted.floor() + 1
    return count.clamp_max(length).long()


def threshold_keeping(ordered: Tensor, count: Tensor) -> Tensor:
    """(channels, S) in descending order, how many to keep -> a threshold each, (channels,); negative keeps all"""
    above = torch.cat((3 * ordered[:, :1], ordered), dim=-1).gather(-1, count[:, None])[:, 0]
    below = torch.cat((ordered, ordered[:, -1:]), dim=-1).gather(-1, count[:, None])[:, 0]
    return torch.where(count < ordered.shape[-1], (above + below) / 2, -1.0)


def own_rule(selector: Selector, steps: Tensor, factor: float, alpha: Tensor, budget: Tensor) -> Tensor:
    """(S, channels) steps of one prompt -> its threshold, or its scale under norm, of each channel: (channels,)"""
    alpha, budget = alpha.to(steps.device), budget.to(steps)
    if selector == "norm":
        return factor * budget / steps.sum(0)
    ordered = steps.T.sort(dim=-1, descending=True).values
    return threshold_keeping(ordered, steps_kept(selector, ordered, factor, alpha, budget))
