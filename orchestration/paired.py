"""The samples of a study as arrays, and the comparison of two trials on the samples both have.

Quality is the weighted mean over benchmarks, in each of which every length class counts alike. A failed sample (out of
memory, time, an error) is never dropped: it counts as the benchmark's worst score, or where that is unbounded as the
worst score any trial of the study got, and the comparison says how many there were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from statespan import stats
from statespan.orchestration.study_data import BenchmarkFacts, StudyData
from statespan.stats import Array, Bounds, Clusters, Interval

Codes = NDArray[np.int64]
Mask = NDArray[np.bool_]
Split = Literal["search", "heldout"]


@dataclass(frozen=True, slots=True)
class Paired:
    """Differences a - b on the samples both trials have, one entry a sample."""

    gains: Array
    documents: Codes
    lengths: Codes
    weights: Array
    failed_a: Mask
    failed_b: Mask
    unmatched: int
    """Samples only one of the two has."""

    def where(self, mask: Mask) -> Paired:
        """Only some of the samples."""
        return Paired(
            self.gains[mask],
            self.documents[mask],
            self.lengths[mask],
            self.weights[mask],
            self.failed_a[mask],
            self.failed_b[mask],
            self.unmatched,
        )

    def clusters(self) -> Clusters:
        return stats.cluster(self.gains, self.documents, self.weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How much better trial a is than trial b on some lengths."""

    what: str
    gain: Interval
    p: float
    """Two-sided sign-flip p; 1 where no document differs, NaN for no samples."""

    p_corrected: float
    changed: int
    """Samples on which the two differ."""

    failed_a: int
    failed_b: int
    unmatched: int
    detectable: float
    """Smallest true difference that this many documents would show four times in five."""


class Samples:
    """StudyData.samples decoded once; rows of a trial are found without scanning the table."""

    def __init__(self, study: StudyData) -> None:
        table = study.samples
        self.study = study
        self.trial_ids, self.trial = _codes(table["trial_id"])
        self.benchmarks, self.benchmark = _codes(table["benchmark"])
        task, place = _plain(table["benchmark"]), _plain(table["document"])
        self.documents, self.document = _codes(pc.binary_join_element_wise(task, place, "\x1f"))
        names = pc.binary_join_element_wise(task, _plain(table["sample_id"]), "\x1f")
        self.sample_ids, self.sample = _codes(names)
        self.heldout: Mask = _numbers(pc.equal(_plain(table["split"]), "heldout")).astype(bool)
        self.length = _numbers(table["length"]).astype(np.int64)
        self.raw = _numbers(table["score"])
        self.failed: Mask = np.isnan(self.raw)
        self.score = np.where(self.failed, self._floors()[self.benchmark], self.raw) if len(self.raw) else self.raw
        self._order = np.argsort(self.trial, kind="stable")
        self._starts = np.searchsorted(self.trial[self._order], np.arange(len(self.trial_ids) + 1))
        self._refuse_repeats()

    def _floors(self) -> Array:
        """What a failed sample counts as, a benchmark."""
        facts = facts_by_name(self.study)
        floors = np.full(len(self.benchmarks), np.nan)
        for code, name in enumerate(self.benchmarks):
            seen = self.raw[(self.benchmark == code) & ~self.failed]
            low = facts[name].low if name in facts else None
            floors[code] = low if low is not None else seen.min() if len(seen) else 0.0
        return floors

    def _refuse_repeats(self) -> None:
        keys = self.trial * max(len(self.sample_ids), 1) + self.sample
        values, counts = np.unique(keys, return_counts=True)
        if (counts > 1).any():
            trial, sample = divmod(int(values[counts.argmax()]), len(self.sample_ids))
            name = self.sample_ids[sample].replace("\x1f", "/")
            raise AssertionError(f"trial {self.trial_ids[trial]} has {counts.max()} results of sample {name}")

    def rows(self, trial_id: str, split: Split) -> Codes:
        """Rows of a trial on a split; empty for a trial that has none."""
        if trial_id not in self._code_of:
            return np.array([], dtype=np.int64)
        code = self._code_of[trial_id]
        rows = self._order[self._starts[code] : self._starts[code + 1]]
        return np.asarray(rows[self.heldout[rows] == (split == "heldout")])

    @cached_property
    def _code_of(self) -> Mapping[str, int]:
        return {name: code for code, name in enumerate(self.trial_ids)}

    def column(self, name: str) -> Array:
        """A numeric column; NaN for null."""
        return _numbers(self.study.samples[name])

    @cached_property
    def seconds(self) -> Array:
        """Prefill and decoding of each row; NaN where not timed."""
        return self.column("prefill_seconds") + self.column("decode_seconds")

    @cached_property
    def _cells(self) -> tuple[Codes, Codes]:
        """The (benchmark, length) cell of each row, and the benchmark of each cell."""
        longest = int(self.length.max(initial=0)) + 1
        keys, cell = np.unique(self.benchmark * longest + self.length, return_inverse=True)
        return cell, keys // longest

    def weights(self, rows: Codes) -> Array:
        """Of each row in the quality, 1 on average: a benchmark's weight shared out among its lengths and rows."""
        facts = facts_by_name(self.study)
        weight = np.array([facts[name].weight if name in facts else 1.0 for name in self.benchmarks])
        cell, benchmark = self._cells
        counts = np.bincount(cell[rows], minlength=len(benchmark))
        lengths = np.bincount(benchmark[counts > 0], minlength=len(weight))
        shares = weight[benchmark] / np.maximum(lengths[benchmark], 1) / np.maximum(counts, 1)
        return np.asarray(shares[cell[rows]] * len(rows) / max(weight[lengths > 0].sum(), 1e-300))

    @cached_property
    def search_p(self) -> dict[str, float]:
        """Trial -> p of being better than the baseline on the search split, corrected for all trials."""
        names, sums = self.matrix(self.study.baseline_id, "search")
        others = [index for index, name in enumerate(names) if name != self.study.baseline_id]
        adjusted = stats.romano_wolf(sums[others], seed=self.study.seed) if others else ()
        return {names[index]: p for index, p in zip(others, adjusted, strict=True)}

    def scores(self, rows: Codes) -> Clusters:
        """Scores by document, failed samples counted."""
        return stats.cluster(self.score[rows], self.document[rows], self.weights(rows))

    def pair(self, a: str, b: str, split: Split) -> Paired:
        rows_a, rows_b = self.rows(a, split), self.rows(b, split)
        _, at_a, at_b = np.intersect1d(self.sample[rows_a], self.sample[rows_b], return_indices=True)
        both_a, both_b = rows_a[at_a], rows_b[at_b]
        return Paired(
            self.score[both_a] - self.score[both_b],
            self.document[both_a],
            self.length[both_a],
            self.weights(both_a),
            self.failed[both_a],
            self.failed[both_b],
            len(rows_a) + len(rows_b) - 2 * len(both_a),
        )

    def matrix(self, baseline_id: str, split: Split) -> tuple[list[str], Array]:
        """Trial ids and (trials, documents) summed differences to the baseline on its samples: romano_wolf's input.

        The baseline's own row is zero.
        """
        rows = self.rows(baseline_id, split)
        reference = np.full(len(self.sample_ids), np.nan)
        reference[self.sample[rows]] = self.score[rows]
        weight = np.zeros(len(self.sample_ids))
        weight[self.sample[rows]] = self.weights(rows)
        gains = (self.score - reference[self.sample]) * weight[self.sample]
        used = np.isfinite(gains) & (self.heldout == (split == "heldout"))
        cells = self.trial[used] * len(self.documents) + self.document[used]
        shape = len(self.trial_ids), len(self.documents)
        sums: Array = np.bincount(cells, gains[used], shape[0] * shape[1]).astype(np.float64)
        return list(self.trial_ids), sums.reshape(shape)


def compare(paired: Paired, what: str, *, bounds: Bounds | None, alpha: float = 0.05, seed: int = 0) -> Comparison:
    """The gain with its interval and the sign-flip test. `p_corrected` is set by whoever makes several comparisons."""
    data = paired.clusters()
    p = stats.sign_flip_p(data, seed=seed) if data.samples else float("nan")
    return Comparison(
        what=what,
        gain=stats.mean_interval(data, level=1 - alpha, bounds=bounds, seed=seed),
        p=p,
        p_corrected=p,
        changed=int((paired.gains != 0).sum()),
        failed_a=int(paired.failed_a.sum()),
        failed_b=int(paired.failed_b.sum()),
        unmatched=paired.unmatched,
        detectable=stats.minimum_detectable_effect(data, alpha=alpha),
    )


def holm_corrected(comparisons: Sequence[Comparison | None]) -> list[Comparison | None]:
    """Comparisons made together, their p-values corrected by Holm; None stays None."""
    made = [one for one in comparisons if one is not None]
    adjusted = iter(stats.holm([one.p for one in made]))
    return [replace(one, p_corrected=next(adjusted)) if one is not None else None for one in comparisons]


def facts_by_name(study: StudyData) -> dict[str, BenchmarkFacts]:
    return {facts.name: facts for facts in study.benchmarks}


def score_bounds(study: StudyData) -> Bounds | None:
    """Least and greatest possible quality; None where any benchmark is unbounded."""
    lows, highs = [facts.low for facts in study.benchmarks], [facts.high for facts in study.benchmarks]
    known_lows, known_highs = [x for x in lows if x is not None], [x for x in highs if x is not None]
    if not lows or len(known_lows) < len(lows) or len(known_highs) < len(highs):
        return None
    return min(known_lows), max(known_highs)


def difference_bounds(study: StudyData) -> Bounds | None:
    bounds = score_bounds(study)
    return None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings, whether they came dictionary-encoded or not."""
    return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column


def _codes(column: pa.ChunkedArray) -> tuple[list[str], Codes]:
    """The distinct values, sorted, and the place of each row's among them."""
    encoded = _plain(column).combine_chunks().dictionary_encode()
    values: list[Any] = encoded.dictionary.to_pylist()
    order = np.argsort(np.array(values, dtype=object), kind="stable")
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.arange(len(values))
    return [values[index] for index in order], place[np.asarray(encoded.indices)]


def _numbers(column: pa.ChunkedArray) -> Array:
    """float64 with NaN for null."""
    return np.asarray(column.cast(pa.float64()).combine_chunks().to_numpy(zero_copy_only=False), dtype=np.float64)
