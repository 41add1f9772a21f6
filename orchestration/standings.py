"""Who stands where: every trial's scores on the search samples, and what racing and the sampler are told of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statespan import stats
from statespan.config import Study
from statespan.orchestration import racing
from statespan.orchestration.ledger import Known
from statespan.orchestration.racing import Race, Standing
from statespan.orchestration.samples import Entry

LOWEST = -50.0
"""Nats per token that no model is worse by: stands in for the worst log-likelihood, which has no bound."""


def make_race(study: Study, entries: Sequence[Entry], bounds: Mapping[str, tuple[float, float]]) -> Race:
    """The race over the search samples of a study.

    Args:
        study: the study.
        entries: its search samples.
        bounds: task -> least and greatest possible score; infinite where there is none.
    """
    cells = sorted({(entry.task, entry.length) for entry in entries})
    code = {cell: i for i, cell in enumerate(cells)}
    lengths_of = {task: sum(cell[0] == task for cell in cells) for task, _ in cells}
    weights = np.array([study.benchmarks[task].weight / lengths_of[task] for task, _ in cells])
    names = sorted({(entry.task, entry.document) for entry in entries})
    document = {name: i for i, name in enumerate(names)}
    strata = np.array([code[entry.task, entry.length] for entry in entries], dtype=np.int64)
    documents = np.array([document[entry.task, entry.document] for entry in entries], dtype=np.int64)
    later = {code[cell]: study.racing.later[cell[1]] for cell in cells if cell[1] in study.racing.later}
    rungs = racing.assign_rungs(documents, strata, study.racing.rungs, first_rung=later, seed=study.search.seed)
    return Race(
        documents=documents,
        strata=strata,
        rungs=rungs,
        trials=study.search.trials + 1,
        stratum_weights=weights,
        low=max(min((low for low, _ in bounds.values()), default=0.0), LOWEST),
        high=max((high for _, high in bounds.values()), default=1.0),
        alpha=study.racing.alpha,
        tolerance=study.racing.tolerance,
        costs={one.metric: one.tolerance for one in study.search.objectives if one.metric == "layer_tokens"},
        seed=study.search.seed,
    )


@dataclass
class Standings:
    """Scores by trial, one entry a search sample, filled as results come in."""

    race: Race
    entries: Sequence[Entry]
    _place: dict[int, int] = field(default_factory=dict)
    _of: dict[str, Standing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._place = {entry.row: place for place, entry in enumerate(self.entries)}

    def between(self, first: int, last: int) -> dict[Entry, int]:
        """The samples that a trial meets first at one of these rungs, and at which."""
        found = zip(self.entries, self.race.rungs.tolist(), strict=True)
        return {entry: rung for entry, rung in found if first <= rung <= last}

    def enter(self, trial_id: str, results: Iterable[tuple[Entry, Known]]) -> None:
        standing = self._of.get(trial_id) or self._new(trial_id)
        for entry, known in results:
            place = self._place[entry.row]
            standing.met[place] = True
            standing.scores[place] = known.score
            standing.costs["layer_tokens"][place] = known.layer_tokens

    def _new(self, trial_id: str) -> Standing:
        n = len(self.entries)
        self._of[trial_id] = Standing(
            trial_id,
            np.full(n, np.nan),
            np.zeros(n, dtype=np.bool_),
            {"layer_tokens": np.full(n, np.nan)},
        )
        return self._of[trial_id]

    def of(self, trial_id: str) -> Standing:
        return self._of[trial_id]

    def all(self) -> list[Standing]:
        return list(self._of.values())

    def incumbents(self, rung: int) -> list[Standing]:
        return racing.choose_incumbents(self.race, self.all(), rung)

    def quality(self, trial_id: str, rung: int | None = None) -> float:
        return racing.quality(self.race, self._of[trial_id], self.race.last_rung if rung is None else rung)

    def interval(self, trial_id: str) -> tuple[float, float]:
        """95 % interval of a trial's quality by document."""
        standing, weights = self._of[trial_id], racing.stratum_weights(self.race)
        seen = np.bincount(self.race.strata[standing.met], minlength=len(weights))
        sample_weights = (weights / np.maximum(seen, 1))[self.race.strata]
        data = stats.cluster(
            standing.scores[standing.met], self.race.documents[standing.met], sample_weights[standing.met]
        )
        bounds = (self.race.low, self.race.high) if self.race.low > LOWEST else None
        interval = stats.mean_interval(data, bounds=bounds, seed=self.race.seed)
        return interval.low, interval.high

    def met(self, trial_id: str, rung: int | None = None) -> int:
        """Samples that a trial has met, by the end of a rung or so far."""
        met = self._of[trial_id].met
        return int((met if rung is None else met & (self.race.rungs <= rung)).sum())

    def layer_tokens(self, trial_id: str, rung: int | None = None) -> float:
        """Mean layer-tokens of a sample, by the end of a rung or so far; NaN where nothing was measured."""
        values: NDArray[Any] = self._of[trial_id].costs["layer_tokens"]
        counted = np.isfinite(values)
        values = values[counted if rung is None else counted & (self.race.rungs <= rung)]
        return float(values.mean()) if len(values) else float("nan")
