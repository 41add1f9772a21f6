"""Calibration of one model, for LongMamba and UPI: recorded step sizes, reduced to what thresholds are made from.

`calibrate` reads sequences of the training length with the unmodified model and keeps, for some clamp shares, the
tables of step_statistics.py at lengths L × MULTIPLES, aggregated over the sequences (about 2 MB for 8 layers of 512
channels). With `exact` it also keeps every sequence's ordered steps, from which g(S) is computed at any S, for any
clamp share, whenever asked. Beside the steps it records how far each channel looks back, for UPI.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.methods.step_statistics import (
    Aggregate,
    Aggregator,
    StepStatistics,
    aggregate,
    log_rates,
    step_statistics,
)
from statespan.models.hidden_attention import last_row, mean_distance
from statespan.models.hook import Method, ScanInputs
from statespan.models.runner import Runner, Tokens

MULTIPLES = (1.03125, 1.125, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
SHARES = (0.0, 0.05, 0.1, 0.2)
AUTHORS_GRID = tuple(
    1_000 * k for k in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 30, 36, 44, 54, 64, 80, 96, 120, 144, 168, 192)
)
Progress = Callable[[int, int], None]


class Recorded(NamedTuple):
    """Of one layer and sequence: steps (channels, length) in descending order, A, mean distances (channels,)."""

    ordered: Tensor
    A: Tensor
    distance: Tensor


class _Recorder(Method):
    """Sees every layer's step sizes and changes nothing."""

    name: ClassVar[str] = "recorder"

    def __init__(self) -> None:
        self.layers: list[Recorded] = []

    def first_layer_changed(self, length: int) -> int | None:
        return 0

    def before_scan(self, layer: int, inputs: ScanInputs, seen: Tensor | None = None) -> ScanInputs:
        ordered = inputs.step_sizes()[0].T.sort(dim=-1, descending=True).values  # (channels, length)
        self.layers.append(Recorded(ordered, inputs.A, mean_distance(last_row(inputs))))
        return inputs


@torch.inference_mode()
def record(runner: Runner, ids: Sequence[int]) -> list[Recorded]:
    """What every layer does to one sequence under the unmodified model."""
    recorder = _Recorder()
    whole = Runner(runner.model, chunk=len(ids))
    whole.prefill(Tokens.pad([ids], runner.model.device), recorder)
    return recorder.layers


@dataclass(frozen=True)
class Calibration:
    train_length: int
    """L: tokens of each recorded sequence."""

    lengths: tuple[int, ...]
    """Lengths the tables hold thresholds for."""

    tables: Mapping[tuple[float, str], StepStatistics]
    """(clamp share, aggregate) -> (layers, channels), thresholds (layers, channels, lengths)."""

    order: Tensor | None = None
    """(sequences, layers, channels, L) descending, where kept."""

    A: Tensor | None = None
    """(layers, channels) or (layers, channels, d_state), kept with the ordered steps."""

    distance: Tensor | None = None
    """(layers, channels): Mamba Mean Distance at L, in tokens, mean over the sequences. UPI reads it."""

    digest: str = ""
    """sha256 of the file it came from."""

    _computed: dict[tuple[float, str], StepStatistics] = field(default_factory=dict, repr=False, compare=False)

    def table(self, share: float, how: Aggregate) -> StepStatistics:
        """Budgets, log decays and stored thresholds at one clamp share."""
        if (found := self.tables.get((share, how)) or self._computed.get((share, how))) is not None:
            return found
        if self.order is None:
            known = ", ".join(sorted({f"{s:g} {h}" for s, h in self.tables}))
            raise UserError(
                f"longmamba.clamp {share:g} with aggregate {how} is not in the calibration, which has {known}; "
                "`statespan calibrate MODEL --exact` keeps what any share needs"
            )
        self._computed[share, how] = self._from_order(share, how, self.lengths)
        return self._computed[share, how]

    def at(self, length: int, share: float, how: Aggregate, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Exact g(S) and α(S), (layers, channels); zeros and ones where `wanted` (layers, channels) is False."""
        if self.order is None:
            raise UserError(
                f"longmamba needs thresholds at {length} tokens exactly, for which this calibration lacks the ordered "
                "steps; run `statespan calibrate MODEL --exact`, or use lengths: table with selector dt_thre"
            )
        found = self._from_order(share, how, (length,), wanted)
        return found.threshold[..., 0], found.alpha[..., 0]

    def interpolated(self, length: int, share: float, how: Aggregate) -> Tensor:
        """g(S) between the stored lengths, linear in log S; beyond them the nearest: (layers, channels)"""
        table = self.table(share, how).threshold
        at = bisect_left(self.lengths, length)
        if at in (0, len(self.lengths)):
            return table[..., min(at, len(self.lengths) - 1)]
        low, place, high = torch.tensor([self.lengths[at - 1], length, self.lengths[at]], dtype=torch.float64).log()
        return torch.lerp(table[..., at - 1], table[..., at], float((place - low) / (high - low)))

    def _from_order(
        self, share: float, how: Aggregate, lengths: Sequence[int], wanted: Tensor | None = None
    ) -> StepStatistics:
        assert self.order is not None and self.A is not None
        layers = []
        for layer in range(self.order.shape[1]):
            some = slice(None) if wanted is None else wanted[layer]
            parts = [
                step_statistics(steps[some], log_rates(steps[some], self.A[layer][some]), share, lengths)
                for steps in self.order[:, layer]
            ]
            layers.append(_filled(aggregate(parts, how), None if wanted is None else wanted[layer]))
        return stack_layers(layers)


def _filled(some: StepStatistics, wanted: Tensor | None) -> StepStatistics:
    """Statistics of the wanted channels at their places; threshold 0 and α 1 elsewhere."""
    if wanted is None:
        return some
    filled = []
    for name in StepStatistics.__slots__:
        part = getattr(some, name)
        rest = part.new_full((len(wanted), *part.shape[1:]), 1.0 if name == "alpha" else 0.0)
        rest[wanted] = part
        filled.append(rest)
    return StepStatistics(*filled)


def stack_layers(layers: Sequence[StepStatistics]) -> StepStatistics:
    return StepStatistics(*(torch.stack([getattr(one, name) for one in layers]) for name in StepStatistics.__slots__))


def cut_sequences(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """`count` stretches of a tokenised text, spread as the authors spread theirs: each begins at int(N i / count) + 10.

    Raises UserError where the text is too short for stretches that do not overlap.
    """
    if len(ids) < count * length + 10:
        raise UserError(
            f"the calibration text has {len(ids):,} tokens; {count} sequences of {length:,} need "
            f"{count * length + 10:,}: give a longer text or ask for fewer"
        )
    starts = [min(int(len(ids) * i / count) + 10, len(ids) - length) for i in range(count)]
    return [list(ids[start : start + length]) for start in starts]


def calibrate(
    runner: Runner,
    sequences: Sequence[Sequence[int]],
    *,
    shares: Sequence[float] = SHARES,
    lengths: Sequence[int] | None = None,
    exact: bool = False,
    on_progress: Progress | None = None,
) -> Calibration:
    """Record the model's steps on sequences of one length, the training length.

    Args:
        shares: clamp shares C to keep tables for.
        lengths: S to keep thresholds for; by default the training length × MULTIPLES.
        exact: keep all ordered steps too: sequences × layers × channels × L float32.
        on_progress: called with (sequences done, sequences).
    """
    if len(lengths_seen := {len(ids) for ids in sequences}) != 1:
        raise UserError(f"calibration sequences must have one length; got {sorted(lengths_seen) or 'no sequence'}")
    L = lengths_seen.pop()
    at = tuple(lengths or (round(L * multiple) for multiple in MULTIPLES))
    totals: dict[tuple[int, float], Aggregator] = {}
    kept: list[Tensor] = []
    distances: list[Tensor] = []
    rates: list[Tensor] = []
    for done, ids in enumerate(sequences):
        layers = record(runner, ids)
        for layer, (ordered, A, _) in enumerate(layers):
            logs = log_rates(ordered, A)
            for share in shares:
                totals.setdefault((layer, share), Aggregator()).add(step_statistics(ordered, logs, share, at))
        distances.append(torch.stack([one.distance.cpu() for one in layers]))
        if exact:
            kept.append(torch.stack([one.ordered.cpu() for one in layers]))
            rates = [one.A.cpu() for one in layers]
        if on_progress is not None:
            on_progress(done + 1, len(sequences))
    tables: dict[tuple[float, str], StepStatistics] = {
        (share, how): _to_cpu(stack_layers([totals[layer, share].result(how) for layer in range(runner.n_layer)]))
        for share in shares
        for how in _both()
    }
    distance = torch.stack(distances).mean(0)
    if not exact:
        return Calibration(L, at, tables, distance=distance)
    return Calibration(L, at, tables, torch.stack(kept), torch.stack(rates), distance)


def _both() -> Iterator[Aggregate]:
    yield "max"
    yield "mean"


def _to_cpu(one: StepStatistics) -> StepStatistics:
    return StepStatistics(*(getattr(one, name).cpu() for name in StepStatistics.__slots__))
