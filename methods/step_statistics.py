"""What LongMamba keeps of recorded step sizes: budget, cumulative decay, and the threshold g(S) for any length S.

Of one channel, over L recorded steps in descending order, Δ̃ = min(Δ, the max(1, int(C L))-th largest):

    budget β = Σ Δ̃        log P = A β  (Mamba-2)        log P = Σ_t log mean_n exp(Δ̃_t A_n)  (Mamba-1)
    g(S): stretch Δ̃ to S points by linear interpolation (half-pixel centres), n = 1 + first index whose running sum
          exceeds β, g = the n-th stretched value (from 0), α = n / S; for S ≤ L: g = 0, α = 1 (nothing is filtered)

Source: LongMamba, arXiv:2504.16053, section 4; GATECH-EIC/LongMamba@5da3e17 and, for Mamba-1, @53eeae8. Ours differs:
products are sums of logarithms (P underflows float32 at θ = 1e-40), and as n ≤ L + 1 always holds for S > L, only L + 2
stretched points are made: O(L) a length instead of O(S).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Aggregate = Literal["max", "mean"]
BLOCK = 512  # channels worked on at a time: bounds the memory of Mamba-1's (channels, L, d_state)


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """Statistics of some channels at one clamp share.

    budget, log_decay: (…, channels)
    threshold, alpha: (…, channels, lengths)
    """

    budget: Tensor
    log_decay: Tensor
    threshold: Tensor
    alpha: Tensor


def log_rates(steps: Tensor, A: Tensor) -> Tensor:
    """(channels, L) steps -> log of each step's decay, (channels, L); A is (channels,) or (channels, d_state)."""
    A = A.to(steps.dtype)
    if A.ndim == 1:
        return steps * A[:, None]
    blocks = [
        torch.logsumexp(part[..., None] * rates[:, None], dim=-1)
        for part, rates in zip(steps.split(BLOCK), A.split(BLOCK), strict=True)
    ]
    return torch.cat(blocks) - math.log(A.shape[1])


def clamped(ordered: Tensor, share: float) -> Tensor:
    """(channels, L) in descending order of steps -> the first int(share L) set to the last of them."""
    rank = max(1, int(share * ordered.shape[-1]))
    return torch.cat((ordered[..., rank - 1 : rank].expand(*ordered.shape[:-1], rank), ordered[..., rank:]), dim=-1)


def stretched(ordered: Tensor, length: int, points: int) -> Tensor:
    """The first `points` of `length` values interpolated from (rows, L)"""
    recorded = ordered.shape[-1]
    reach = min(recorded, math.ceil((points + 1) * recorded / length) + 2)  # what those points lie between
    values = F.interpolate(ordered[None, :, :reach], scale_factor=length / recorded, mode="linear", align_corners=False)
    return values[0, :, :points]


def threshold_at(ordered: Tensor, budget: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(rows, L) clamped steps in descending order, (rows,) budgets -> g and α of one length, (rows,) each"""
    recorded = ordered.shape[-1]
    if length <= recorded:
        return torch.zeros_like(budget), torch.ones_like(budget)
    values = stretched(ordered, length, min(length, recorded + 2))
    first = torch.searchsorted(values.cumsum(-1), budget[:, None], right=True)[:, 0]  # whose running sum exceeds β
    n = torch.where(first < values.shape[-1], first, 0) + 1
    g = values.gather(-1, n.clamp_max(values.shape[-1] - 1)[:, None])[:, 0]
    return g, (n.to(g.dtype) / length).clamp_max(1.0)


def step_statistics(steps: Tensor, rates: Tensor, share: float, lengths: Sequence[int]) -> StepStatistics:
    """One sequence's statistics.

    Args:
        steps: (channels, L) descending.
        rates: `log_rates` of them.
        share: the clamp's C.
        lengths: S of which g(S) is asked.
    """
    capped = clamped(steps, share)
    budget = capped.sum(-1)
    pairs = [threshold_at(capped, budget, length) for length in lengths]
    empty = budget.new_empty((len(budget), 0))
    g = torch.stack([g for g, _ in pairs], dim=-1) if pairs else empty
    alpha = torch.stack([alpha for _, alpha in pairs], dim=-1) if pairs else empty
    return StepStatistics(budget, clamped(rates, share).sum(-1), g, alpha)


def aggregate(parts: Sequence[StepStatistics], how: Aggregate) -> StepStatistics:
    """Element-wise over sequences, each statistic by itself; decays are aggregated as products, in log space."""
    stacks = {name: torch.stack([getattr(part, name) for part in parts]) for name in StepStatistics.__slots__}
    if how == "max":
        return StepStatistics(**{name: stack.amax(0) for name, stack in stacks.items()})
    log_decay = torch.logsumexp(stacks.pop("log_decay"), dim=0) - math.log(len(parts))
    return StepStatistics(log_decay=log_decay, **{name: stack.mean(0) for name, stack in stacks.items()})


class Aggregator:
    """Sequences one by one, nothing kept but the running aggregates."""

    def __init__(self) -> None:
        self.count = 0
        self._largest: StepStatistics | None = None
        self._mean: StepStatistics | None = None

    def add(self, new: StepStatistics) -> None:
        self.count += 1
        if self._largest is None or self._mean is None:
            self._largest = self._mean = new
            return
        self._largest = aggregate((self._largest, new), "max")
        keep = (self.count - 1) / self.count
        old, mixed = self._mean, {}
        for name in ("budget", "threshold", "alpha"):
            mixed[name] = torch.lerp(getattr(new, name), getattr(old, name), keep)
        shifted = (old.log_decay + math.log(keep), new.log_decay - math.log(self.count))
        self._mean = StepStatistics(log_decay=torch.logaddexp(*shifted), **mixed)

    def result(self, how: Aggregate) -> StepStatistics:
        found = self._largest if how == "max" else self._mean
        assert found is not None, "no sequence was added"
        return found
