"""Racing: a trial is stopped when the samples both have met show that an incumbent is better. Pure decisions, no Ray.

Trials climb rungs; each rung adds samples, of every length in the same proportion or longer ones later. All trials meet
the same samples in the same order, so a comparison is paired. At each rung but the last a trial is tested against the
incumbents, and stopped if one of them dominates it: quality worse by a test, and no cost lower beyond a tolerance.

test         sign flips per document of the paired differences (stats.py), one-sided "the trial is worse", read as z
looks and trials  z is held against the luckiest of equals: M = max over looks k and rivals j of
             (X_j(t_k) - X_0(t_k)) / sqrt(2 t_k), with X_0 … X_n independent Brownian motions and t_k the share of the
             samples met at rung k. Its distribution is simulated once a race; corrected p = P(M >= z). This is
             Dunnett's (1955) comparison with the best together with Pocock's (1977) constant boundary over looks.
             The last rung stops nobody: its samples are paid.
looks        a rung is a look only where its documents are enough for sign flips to stop anybody: G of them give no p
             below 2^-G. Other rungs stop nobody and raise no bar (Tarone's step, 1990; which are looks is fixed by
             the design, not by scores), and trials meet them together with the next look, without a pause.
step down    a trial that was stopped is nobody's rival any more: n is the number of those left, of all that the study
             will try. Holm's (1979) step: what was shown to be worse is no candidate for the luckiest of equals.

So the chance that the truly best trial is ever stopped is at most alpha when all trials are equal, which is the worst
case, and less when they differ; whatever the order of trials. What else was measured (40 trials, 320 samples): a union
bound over rivals and looks promises the same and cost 27 % of all samples where this cost 23 %. A betting confidence
sequence (Waudby-Smith and Ramdas 2024) is valid at every sample but needs bounded scores; it cost 60 % where sign flips
under the same union bound cost 52 % (a gap of 0.2 in accuracy, five looks), and less only beyond about ten looks.
Optuna's WilcoxonPruner makes the paired comparison without either correction (optuna 5.0, pruners/_wilcoxon.py), on
one objective, and takes samples for independent.

A quality is the mean over strata (benchmark and length) with the study's weights. A stratum that a comparison has not
met yet is taken for the best it could be for the trial: being worse at short lengths alone does not stop a trial that
may win at long ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from statespan import stats
from statespan.stats import Array, Clusters

NEAR = 0.75
"""Standard errors short of stopping within which sign flips are drawn; further off, the normal p says enough."""

SHARES = (0.1, 0.13, 0.17, 0.22, 0.3, 0.4, 0.55, 0.75, 1.0)
"""Of a stratum's documents, met by the end of each rung. Steps of a third cost a tenth to a fifth less than steps of
three: one look more raises the bar little, and the hopeless leave sooner."""

LUCK_DRAWS = 20_000
LUCK_NUMBERS = 20_000_000
"""Normal numbers drawn at most for the distribution of M; a race of very many trials takes fewer draws."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """The samples of the search split in the order every trial meets them, one entry a sample, and the rules."""

    documents: NDArray[np.int64]
    strata: NDArray[np.int64]
    """Code of (benchmark, length); quality is a weighted mean over strata."""

    rungs: NDArray[np.int64]
    """The rung at which a sample is met, from 0; see `assign_rungs`."""

    trials: int
    """How many trials the study will try at most."""

    stratum_weights: Array | None = None
    """Weight of each stratum in the quality; None weighs samples alike."""

    low: float = 0.0
    """What a failed sample counts as."""

    high: float = 1.0
    """The best a sample can score: what is assumed of strata not yet met. Infinite: then they forbid stopping."""

    alpha: float = 0.05
    tolerance: float = 0.0
    """A quality gained beyond an incumbent that matters: above 0, a trial is also stopped once it is shown to gain
    less than this and (where costs count) costs more."""

    costs: Mapping[str, float] = field(default_factory=dict)
    """Costs that are objectives too, lower is better: name -> relative difference that matters, such as 0.05."""

    seed: int = 0

    @property
    def last_rung(self) -> int:
        return int(self.rungs.max())

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """The rungs after which a trial may be stopped: those with enough documents, never the last."""
        met = np.cumsum(np.bincount(self.rungs))
        firsts = np.full(int(self.documents.max(initial=-1)) + 1, len(met))
        np.minimum.at(firsts, self.documents, self.rungs)
        documents = np.searchsorted(np.sort(firsts), np.arange(len(met)), side="right")
        return _looks(tuple(map(int, met[:-1])), tuple(map(int, documents[:-1])), self.trials, self.alpha, self.seed)

    def next_look(self, rung: int) -> int:
        """The first rung from this one on after which a trial may be stopped, or the last rung."""
        return next((look for look in self.looks if look >= rung), self.last_rung)

    def luck(self, stopped: int = 0) -> Array:
        """Sorted draws of M of this race, after so many of its trials were stopped. There must be looks."""
        met = np.cumsum(np.bincount(self.rungs))[list(self.looks)]
        return _luck(self.trials, stopped, tuple(map(int, met)), self.seed)

    def corrected(self, p: float, stopped: int = 0) -> float:
        """The chance that any look at any of the trials left, all equal, would show a p as small as this one."""
        luck = self.luck(stopped)
        return 1.0 - float(np.searchsorted(luck, -float(ndtri(p)))) / len(luck)


def _luck(trials: int, stopped: int, met: tuple[int, ...], seed: int) -> Array:
    times = tuple(count / met[-1] for count in met)
    return _luckiest_of_equals(min(_step(trials - stopped), max(trials, 2)), times, seed)


@lru_cache(maxsize=32)
def _looks(met: tuple[int, ...], documents: tuple[int, ...], trials: int, alpha: float, seed: int) -> tuple[int, ...]:
    """The most of the last rungs of which each could stop a trial that is worse in every document it met there.

    Args:
        met, documents: how many samples and documents are met by the end of each rung, the last rung left out.
    """
    for first in range(len(met)):
        if met[first] == 0:
            continue
        bar = float(np.quantile(_luck(trials, 0, met[first:], seed), 1 - alpha))
        if np.exp2(-documents[first]) <= ndtr(-bar):  # later ones have more documents
            return tuple(range(first, len(met)))
    return ()


def _step(trials: int) -> int:
    """The next power of √2: the distribution of M is simulated for few numbers of trials, none too small."""
    return int(np.ceil(2 ** (np.ceil(2 * np.log2(max(trials, 2)) - 1e-9) / 2)))


@lru_cache(maxsize=32)
def _luckiest_of_equals(trials: int, times: tuple[float, ...], seed: int) -> Array:
    """Sorted draws of M: how far, in standard errors, one of equal trials falls behind the luckiest at any look."""
    draws = int(np.clip(LUCK_NUMBERS / (trials * len(times)), 4_000, LUCK_DRAWS))
    rng = np.random.default_rng((seed, trials))
    position = np.zeros((draws, trials))
    furthest = np.full(draws, -np.inf)
    for before, now in zip((0.0, *times[:-1]), times, strict=True):
        position += np.sqrt(now - before) * rng.standard_normal((draws, trials))
        behind = (position[:, 1:].max(axis=1) - position[:, 0]) / np.sqrt(2 * now)
        furthest = np.maximum(furthest, behind)
    return np.sort(furthest)


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a trial: one entry a sample of the race."""

    trial_id: str
    scores: Array
    """Higher is better; NaN where the sample failed or was not met."""

    met: NDArray[np.bool_]
    """True where the sample was evaluated, also if it failed."""

    costs: Mapping[str, Array] = field(default_factory=dict)
    """Seconds, bytes … a sample; NaN where not measured."""


@dataclass(frozen=True, slots=True)
class Decision:
    action: Literal["keep", "stop"]
    reason: str
    p: float | None = None
    """Of "the trial is worse than the incumbent", corrected for looks and trials: stop at p <= alpha. None: no test."""

    incumbent_id: str | None = None


def assign_rungs(
    documents: NDArray[np.int64],
    strata: NDArray[np.int64],
    shares: Sequence[float] = SHARES,
    *,
    first_rung: Mapping[int, int] | None = None,
    seed: int = 0,
) -> NDArray[np.int64]:
    """The rung at which each sample is met. Every stratum climbs alike, and documents are not parted within one.

    Args:
        shares: cumulative share of a stratum's documents met by the end of each rung, such as (1/9, 1/3, 1).
        first_rung: strata (long contexts) that join later: code -> first rung at which they are met.
    """
    if not shares or list(shares) != sorted(shares) or shares[0] <= 0 or shares[-1] != 1:
        raise ValueError(f"rung shares must grow to 1, such as (0.11, 0.33, 1); got {tuple(shares)}")
    rungs = np.empty(len(documents), dtype=np.int64)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        names, index = np.unique(documents[rows], return_inverse=True)
        place = np.random.default_rng((seed, int(stratum))).permutation(len(names))
        # place k is met by the first rung whose share covers k + 1 documents; no stratum is left out of a rung
        stops = np.maximum(np.round(np.asarray(shares) * len(names)), 1)
        rung = np.searchsorted(stops, place + 1)
        rungs[rows] = np.maximum(rung, (first_rung or {}).get(int(stratum), 0))[index]
    return rungs


def differences(race: Race, trial: Standing, incumbent: Standing, rung: int) -> Clusters:
    """Paired differences trial - incumbent by document, weighted so that strata count as in the quality.

    The mean is the trial's gain, at its best in strata that were not met by both.
    """
    both = trial.met & incumbent.met & (race.rungs <= rung)
    gains = (_scored(race, trial) - _scored(race, incumbent))[both]
    strata, documents = race.strata[both], race.documents[both]
    weights = stratum_weights(race)
    seen = np.bincount(strata, minlength=len(weights))
    sample_weights = (weights / np.maximum(seen, 1))[strata]
    missing = np.flatnonzero((seen == 0) & (weights > 0))
    if len(missing) and len(gains):
        hope = sum(weights[stratum] * _best_gain(race, incumbent, int(stratum)) for stratum in missing)
        gains = gains + hope / float(sample_weights.sum())
    return stats.cluster(gains, documents, sample_weights)


def stratum_weights(race: Race) -> Array:
    """Share of each stratum in the quality; sums to 1."""
    counts = np.bincount(race.strata).astype(np.float64)
    weights = counts if race.stratum_weights is None else np.where(counts > 0, race.stratum_weights, 0.0)
    return np.asarray(weights / weights.sum())


def quality(race: Race, standing: Standing, rung: int) -> float:
    """Weighted mean over the strata met up to a rung; NaN where none was."""
    met = standing.met & (race.rungs <= rung)
    if not met.any():
        return float("nan")
    strata, weights = race.strata[met], stratum_weights(race)
    sample_weights = (weights / np.maximum(np.bincount(strata, minlength=len(weights)), 1))[strata]
    return float(np.average(_scored(race, standing)[met], weights=sample_weights))


def _scored(race: Race, standing: Standing) -> Array:
    """Scores with failed samples at the worst value."""
    return np.where(np.isnan(standing.scores), race.low, standing.scores)


def _best_gain(race: Race, incumbent: Standing, stratum: int) -> float:
    """The most a trial can gain on the incumbent in a stratum it has not met."""
    met = incumbent.met & (race.strata == stratum)
    return race.high - (float(_scored(race, incumbent)[met].mean()) if met.any() else race.low)


def worse_p(race: Race, data: Clusters, stopped: int = 0) -> float:
    """p of "the mean difference is at least 0", one-sided, before correction. Exact where it decides anything."""
    spread = float(np.sqrt((data.sums**2).sum()))
    behind = -float(data.sums.sum()) / spread if spread > 0 and np.isfinite(spread) else 0.0
    critical = float(np.quantile(race.luck(stopped), 1 - race.alpha))
    if behind < critical - NEAR:
        return float(ndtr(-behind))
    bound = float(np.exp(-(behind**2) / 2))  # Hoeffding's, true of sign flips whatever the sums
    return bound if bound < ndtr(-critical) else stats.sign_flip_p(data, alternative="less", seed=race.seed)


def decide(race: Race, trial: Standing, incumbents: Sequence[Standing], rung: int, stopped: int = 0) -> Decision:
    """Keep or stop a trial that has finished a rung. Incumbents that did not get this far count on what they have.

    Args:
        stopped: trials that were stopped before this rung's decisions.
    """
    rivals = [rival for rival in incumbents if rival.trial_id != trial.trial_id]
    if rung >= race.last_rung:
        return Decision("keep", "last rung")
    if rung not in race.looks:
        return Decision("keep", "too few documents to tell")
    if not rivals:
        return Decision("keep", "is the incumbent")
    verdicts = [_against(race, trial, rival, rung, stopped) for rival in rivals]
    stops = [verdict for verdict in verdicts if verdict.action == "stop"]
    return min(stops or verdicts, key=lambda verdict: 2.0 if verdict.p is None else verdict.p)


def _against(race: Race, trial: Standing, rival: Standing, rung: int, stopped: int) -> Decision:
    """The comparison with one incumbent."""
    data = differences(race, trial, rival, rung)
    if data.count == 0:
        return Decision("keep", f"no sample in common with {rival.trial_id}", None, rival.trial_id)
    cheaper, dearer = _cost_difference(race, trial, rival)
    if cheaper:
        return Decision("keep", f"{cheaper} than {rival.trial_id}", None, rival.trial_id)
    p = race.corrected(worse_p(race, data, stopped), stopped)
    seen = f"{rival.trial_id} by {-data.mean:.3g} on {data.samples} samples of {data.count} documents"
    if p <= race.alpha:
        return Decision("stop", f"worse than {seen}", p, rival.trial_id)
    if race.tolerance > 0 and (dearer or not race.costs):
        shifted = Clusters(data.sums - race.tolerance * data.weights, data.weights, data.samples)
        futile = race.corrected(worse_p(race, shifted, stopped), stopped)
        if futile <= race.alpha:
            also = f" and {dearer}" if dearer else ""
            reason = f"gains less than {race.tolerance:g} on {rival.trial_id}{also}, on {data.samples} samples"
            return Decision("stop", reason, futile, rival.trial_id)
    return Decision("keep", f"not shown to be worse than {rival.trial_id}", p, rival.trial_id)


def _cost_difference(race: Race, trial: Standing, rival: Standing) -> tuple[str, str]:
    """What the trial has on the rival's costs and the reverse, in words; empty where within the tolerance.

    A cost that was not measured on a common sample may be lower, so it protects the trial.
    """
    cheaper, dearer = "", ""
    for name, tolerance in race.costs.items():
        own, other = trial.costs.get(name), rival.costs.get(name)
        both = np.isfinite(own) & np.isfinite(other) if own is not None and other is not None else np.array([False])
        if not both.any() or own is None or other is None:
            return f"{name} not measured on samples in common, so possibly lower", ""
        ratio = float(own[both].sum() / other[both].sum())
        if ratio < 1 - tolerance:
            cheaper = f"{name} lower by {1 - ratio:.0%}"
        elif ratio > 1 + tolerance:
            dearer = f"{name} higher by {ratio - 1:.0%}"
    return cheaper, dearer


def choose_incumbents(race: Race, standings: Sequence[Standing], rung: int) -> list[Standing]:
    """Those who finished the rung and whom nobody beats on its samples: the best, or the Pareto front with costs."""
    needed = race.rungs <= rung
    arrived = [standing for standing in standings if standing.met[needed].all()]
    if not arrived:
        return []
    points = np.array([[quality(race, standing, rung), *_mean_costs(race, standing, needed)] for standing in arrived])
    if not race.costs:
        return [arrived[int(points[:, 0].argmax())]]
    points[:, 1:] *= -1  # higher is better in every column
    at_least = (points[:, None] >= points[None]).all(axis=2)
    above = (points[:, None] > points[None]).any(axis=2)
    beaten = (at_least & above).any(axis=0)
    return [arrived[index] for index in np.flatnonzero(~beaten)]


def _mean_costs(race: Race, standing: Standing, needed: NDArray[np.bool_]) -> list[float]:
    """Mean of each cost on a rung's samples; infinite where nothing was measured."""
    means = []
    for name in race.costs:
        values = standing.costs.get(name, np.array([]))
        values = values[needed & np.isfinite(values)] if len(values) else values
        means.append(float(values.mean()) if len(values) else float("inf"))
    return means
