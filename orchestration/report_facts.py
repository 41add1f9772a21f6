"""Everything a report shows, as plain values: aggregated once, then written as HTML, Markdown and CSV alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from statespan import stats
from statespan.orchestration.breakdown import Breakdown, breakdowns
from statespan.orchestration.paired import Codes, Comparison, Paired, Samples, Split, compare, score_bounds
from statespan.orchestration.paired import difference_bounds as gain_bounds
from statespan.orchestration.study_data import StudyData, TrialData
from statespan.orchestration.verdict import Verdict, adjudicate
from statespan.stats import Array, Interval

TOP = 10
"""Trials in the table besides the baseline."""

NEARLY = 0.05
"""Times and sizes that differ by less are the same to the Pareto front."""

EXAMPLES = 6
TEXT_CHARACTERS = 160


@dataclass(frozen=True, slots=True)
class Cell:
    length: int
    depth: float
    mean: float
    samples: int


@dataclass(frozen=True, slots=True)
class Curve:
    """One trial on one benchmark, by length."""

    trial: TrialData
    role: str
    benchmark: str
    points: tuple[tuple[int, Interval], ...]
    cells: tuple[Cell, ...]
    """By length and depth; empty where the benchmark has no depths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trial in numbers. NaN: not measured."""

    trial: TrialData
    role: str
    """baseline, winner, candidate, runner-up or empty."""

    search: float
    search_error: float
    """Standard error by document."""

    search_samples: int
    search_p: float
    """Of being better than the baseline on the search split, corrected for all trials (Romano and Wolf)."""

    heldout: Interval | None
    gain: Comparison | None
    """Against the baseline on held-out samples; both only for the chosen, as declared."""

    seconds: float
    """A sample, on the search split."""

    peak_bytes: float
    failed: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Prompt tokens by how they were had, summed over rows."""

    computed: float
    shared: float
    cached: float
    raced: float
    """What stopped trials did not have to read."""

    @property
    def naive(self) -> float:
        return self.computed + self.shared + self.cached + self.raced


@dataclass(frozen=True, slots=True)
class Example:
    sample: str
    length: int
    depth: float
    baseline_score: float
    winner_score: float
    baseline_text: str
    winner_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    study: StudyData
    verdict: Verdict
    rows: tuple[Row, ...]
    """All trials, by number; the baseline first."""

    curves: tuple[Curve, ...]
    curves_split: Split
    breakdowns: tuple[Breakdown, ...]
    front: frozenset[str]
    """Trials that no other beats in quality, seconds and memory at once: `pareto`."""

    front_intervals: dict[str, Interval]
    cost: Cost
    examples: tuple[Example, ...]

    def row(self, trial_id: str) -> Row:
        return next(row for row in self.rows if row.trial.id == trial_id)

    def top(self) -> list[Row]:
        """The baseline, the chosen, then the best of the rest on the search split."""
        chosen = [row for role in ROLES for row in self.rows if row.role == role]
        rest = [row for row in self.rows if not row.role and row.trial.state == "complete"]
        rest.sort(key=lambda row: (-row.search, row.trial.number))
        return chosen + rest[: max(TOP + 1 - len(chosen), 0)]


ROLES = ("baseline", "winner", "candidate", "runner-up")


def gather(study: StudyData) -> Facts:
    """Aggregate a study for its report."""
    samples = Samples(study)
    verdict = adjudicate(study, samples)
    rows = _rows(study, samples, verdict)
    split: Split = "heldout" if verdict.overall is not None else "search"
    shown = [row for role in ROLES for row in rows if row.role == role]
    curves = [_curve(study, samples, row, name, split) for name in samples.benchmarks for row in shown]
    front = pareto(rows)
    bounds = score_bounds(study)
    intervals = {
        name: stats.mean_interval(samples.scores(samples.rows(name, "search")), bounds=bounds, seed=study.seed)
        for name in sorted(front)
    }
    return Facts(
        study=study,
        verdict=verdict,
        rows=tuple(rows),
        curves=tuple(curve for curve in curves if curve.points),
        curves_split=split,
        breakdowns=tuple(breakdowns(study, samples, shown, split)),
        front=front,
        front_intervals=intervals,
        cost=_cost(study, samples),
        examples=tuple(_examples(study, samples, verdict)),
    )


def _role(study: StudyData, verdict: Verdict, trial: TrialData) -> str:
    if trial.id == study.baseline_id:
        return "baseline"
    if trial.id == verdict.candidate_id:
        return "winner" if verdict.beats_baseline else "candidate"
    return "runner-up" if trial.id == study.runner_up_id else ""


def _rows(study: StudyData, samples: Samples, verdict: Verdict) -> list[Row]:
    peak = samples.column("peak_bytes")
    return [
        _row(study, samples, trial, _role(study, verdict, trial), peak)
        for trial in sorted(study.trials, key=lambda one: (one.id != study.baseline_id, one.number))
    ]


def _row(study: StudyData, samples: Samples, trial: TrialData, role: str, peak: Array) -> Row:
    rows, heldout = samples.rows(trial.id, "search"), samples.rows(trial.id, "heldout")
    scores = samples.scores(rows)
    timed = rows[np.isfinite(samples.seconds[rows])]
    sizes = peak[rows][np.isfinite(peak[rows])]
    interval = gain = None
    if role and len(heldout):
        interval = stats.mean_interval(samples.scores(heldout), bounds=score_bounds(study), seed=study.seed)
        paired = samples.pair(trial.id, study.baseline_id, "heldout")
        gain = _gain(study, paired) if role != "baseline" and len(paired.gains) else None
    return Row(
        trial=trial,
        role=role,
        search=scores.mean,
        search_error=scores.standard_error,
        search_samples=scores.samples,
        search_p=samples.search_p.get(trial.id, float("nan")),
        heldout=interval,
        gain=gain,
        seconds=float(np.average(samples.seconds[timed], weights=samples.weights(timed))) if len(timed) else np.nan,
        peak_bytes=float(sizes.max()) if len(sizes) else float("nan"),
        failed=int(samples.failed[rows].sum() + samples.failed[heldout].sum()),
    )


def _gain(study: StudyData, paired: Paired) -> Comparison:
    return compare(paired, "the baseline", bounds=gain_bounds(study), alpha=study.alpha, seed=study.seed)


def _curve(study: StudyData, samples: Samples, row: Row, benchmark: str, split: Split) -> Curve:
    rows = samples.rows(row.trial.id, split)
    rows = rows[samples.benchmark[rows] == samples.benchmarks.index(benchmark)]
    facts = next((one for one in study.benchmarks if one.name == benchmark), None)
    bounds = (facts.low, facts.high) if facts and facts.low is not None and facts.high is not None else None
    points = []
    for length in np.unique(samples.length[rows]):
        at = rows[samples.length[rows] == length]
        data = stats.cluster(samples.score[at], samples.document[at])
        points.append((int(length), stats.mean_interval(data, bounds=bounds, seed=study.seed)))
    return Curve(row.trial, row.role, benchmark, tuple(points), _cells(samples, rows))


def _cells(samples: Samples, rows: Codes) -> tuple[Cell, ...]:
    depth = samples.column("depth")[rows]
    rows, depth = rows[np.isfinite(depth)], np.round(depth[np.isfinite(depth)], 3)
    if not len(rows):
        return ()
    keys, index, counts = np.unique(
        np.stack([samples.length[rows], depth]), axis=1, return_inverse=True, return_counts=True
    )
    means = np.bincount(index, samples.score[rows]) / counts
    return tuple(
        Cell(int(length), float(place), float(mean), int(count))
        for length, place, mean, count in zip(*keys, means, counts, strict=True)
    )


def pareto(rows: Sequence[Row]) -> frozenset[str]:
    """Complete trials that no other beats in quality, seconds and memory at once.

    Time and memory within NEARLY of each other count as equal, or noise would put every trial on the front. Of equals
    the first stands for all.
    """
    done = [row for row in rows if row.trial.state == "complete" and np.isfinite(row.seconds + row.search)]
    if not done:
        return frozenset()
    quality = np.array([row.search for row in done])
    costs = np.array([[row.seconds, row.peak_bytes if row.peak_bytes > 0 else 1.0] for row in done])
    front = set()
    for index, row in enumerate(done):
        no_dearer = (costs <= costs[index] * (1 + NEARLY)).all(axis=1)
        cheaper = (costs * (1 + NEARLY) < costs[index]).any(axis=1)
        first = np.arange(len(done)) < index
        beaten = no_dearer & ((quality > quality[index]) | ((quality == quality[index]) & (cheaper | first)))
        if not beaten.any():
            front.add(row.trial.id)
    return frozenset(front)


def _cost(study: StudyData, samples: Samples) -> Cost:
    tokens = samples.column("tokens_prompt") + np.nan_to_num(samples.column("tokens_new"))
    share = np.nan_to_num(samples.column("computed_share"))
    cached = samples.column("cached") > 0
    computed = float((tokens * share).sum())
    spared = tokens * (1 - share)
    search = ~samples.heldout
    code = {name: index for index, name in enumerate(samples.trial_ids)}
    whole = float(tokens[samples.rows(study.baseline_id, "search")].sum())
    stopped = [code[one.id] for one in study.trials if one.state == "pruned" and one.id in code]
    read = float(tokens[search & np.isin(samples.trial, stopped)].sum())
    raced = max(whole * sum(one.state == "pruned" for one in study.trials) - read, 0.0)
    return Cost(computed, float(spared[~cached].sum()), float(spared[cached].sum()), raced)


def _examples(study: StudyData, samples: Samples, verdict: Verdict) -> list[Example]:
    """Held-out samples on which the candidate and the baseline differ most, wins and losses by turns."""
    if verdict.overall is None or verdict.candidate_id is None:
        return []
    own, base = samples.rows(verdict.candidate_id, "heldout"), samples.rows(study.baseline_id, "heldout")
    _, at_own, at_base = np.intersect1d(samples.sample[own], samples.sample[base], return_indices=True)
    own, base = own[at_own], base[at_base]
    gains = samples.score[own] - samples.score[base]
    wins = [index for index in np.argsort(-gains, kind="stable") if gains[index] > 0]
    losses = [index for index in np.argsort(gains, kind="stable") if gains[index] < 0][: EXAMPLES // 2]
    spread = wins[:: max(len(wins) // (EXAMPLES - len(losses)), 1)][: EXAMPLES - len(losses)] if wins else []
    text, depth = study.samples["text"], samples.column("depth")
    return [
        Example(
            samples.sample_ids[samples.sample[own[index]]].replace("\x1f", "/"),
            int(samples.length[own[index]]),
            float(depth[own[index]]),
            float(samples.raw[base[index]]),
            float(samples.raw[own[index]]),
            str(text[int(base[index])].as_py() or "")[:TEXT_CHARACTERS],
            str(text[int(own[index])].as_py() or "")[:TEXT_CHARACTERS],
        )
        for index in [*spread, *losses]
    ]
