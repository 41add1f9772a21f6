"""Who won, by how much, and how sure that is: pure functions from a StudyData to values and one plain sentence.

The order of things is what makes the figures honest:

1. `choose` picks the candidate and the runner-up on the search split only.
2. Both and the baseline are scored on held-out samples of other documents.
3. `adjudicate` makes three comparisons declared before, on held-out samples: candidate against baseline at all lengths,
   the same past the training length, candidate against runner-up. Their p-values are corrected by Holm. How many
   trials were tried does not enter, for nothing was chosen on these samples; what choosing did to the figures is shown
   as the gap between the two splits, and the candidate's p on the search split, corrected for all trials by Romano and
   Wolf, stands beside it.
4. At lengths up to the training length the claim is "not worse by more than the margin": the lower end of a one-sided
   95 % interval of the difference (Wellek 2010, section 1.5). It widens no other claim, so it is not in the correction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from statespan import stats
from statespan.orchestration.paired import (
    Comparison,
    Paired,
    Samples,
    compare,
    difference_bounds,
    holm_corrected,
    score_bounds,
)
from statespan.orchestration.study_data import StudyData, TrialData
from statespan.stats import Interval

Within = Literal["unchanged", "not worse", "worse", "unclear", "not measured"]
FEW_DOCUMENTS = 20
"""Below this the measured coverage of the intervals is not known to hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the search split says; held-out samples are to be scored for these and the baseline."""

    winner_id: str | None
    runner_up_id: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    candidate_id: str | None
    """The best trial on the search split that is not the baseline."""

    beats_baseline: bool
    """By the corrected tests, at all lengths or past the training length, on held-out samples."""

    overall: Comparison | None
    past: Comparison | None
    """Lengths beyond the model's training length."""

    within: Comparison | None
    """Lengths up to it."""

    within_status: Within
    runner_up: Comparison | None
    search_p: float
    """The candidate against the baseline on the search split, corrected for all trials."""

    gap: Interval | None
    """Gain on the search split minus gain on held-out samples: what choosing added."""

    trials_tried: int
    sentence: str
    caveats: tuple[str, ...]

    @property
    def winner_id(self) -> str | None:
        """None where nothing beats the baseline."""
        return self.candidate_id if self.beats_baseline else None


def choose(study: StudyData, samples: Samples | None = None) -> Choice:
    """The best two trials on the search split, of those that ran to the end.

    A trial that loses more than the margin at lengths up to the training length stands behind all that do not. The
    runner-up must answer at least one sample otherwise than the winner: a twin says nothing.
    """
    samples = samples or Samples(study)
    complete = [trial for trial in study.trials if trial.state == "complete" and trial.id != study.baseline_id]
    ranked = sorted(complete, key=lambda trial: _rank(study, samples, trial))
    ranked = [trial for trial in ranked if len(samples.rows(trial.id, "search"))]
    if not ranked:
        return Choice(winner_id=None, runner_up_id=None, reason="no trial ran to the end")
    winner = ranked[0]
    others = (trial for trial in ranked[1:] if samples.pair(winner.id, trial.id, "search").gains.any())
    runner_up = next(others, None)
    reason = f"best of {len(ranked)} complete trials on the search split"
    return Choice(winner_id=winner.id, runner_up_id=runner_up.id if runner_up else None, reason=reason)


def _rank(study: StudyData, samples: Samples, trial: TrialData) -> tuple[bool, float, int]:
    rows = samples.rows(trial.id, "search")
    loses = False
    if study.train_length is not None:
        paired = samples.pair(trial.id, study.baseline_id, "search")
        short = paired.where(paired.lengths <= study.train_length).clusters()
        loses = short.samples > 0 and short.mean < -study.margin
    return loses, -samples.scores(rows).mean if len(rows) else float("inf"), trial.number


def adjudicate(study: StudyData, samples: Samples | None = None) -> Verdict:
    """The verdict on StudyData.winner_id and runner_up_id, from held-out samples."""
    samples = samples or Samples(study)
    tried = sum(trial.id != study.baseline_id for trial in study.trials)
    candidate = study.winner_id
    if candidate is None or not len(samples.rows(candidate, "heldout")):
        return _no_verdict(study, candidate, tried)
    overall, past, rival = _declared(study, samples, candidate)
    within, status = _within(study, samples, candidate)
    verdict = Verdict(
        candidate_id=candidate,
        beats_baseline=any(_better(comparison, study.alpha) for comparison in (overall, past)),
        overall=overall,
        past=past,
        within=within,
        within_status=status,
        runner_up=rival,
        search_p=samples.search_p.get(candidate, float("nan")),
        gap=_gap(study, samples, candidate),
        trials_tried=tried,
        sentence="",
        caveats=_caveats(study, samples, overall, past, within, rival),
    )
    return replace(verdict, sentence=sentence(study, verdict))


def _no_verdict(study: StudyData, candidate: str | None, tried: int) -> Verdict:
    why = "no trial ran to the end" if candidate is None else "no held-out sample was scored for the best trial"
    return Verdict(
        candidate_id=candidate,
        beats_baseline=False,
        overall=None,
        past=None,
        within=None,
        within_status="not measured",
        runner_up=None,
        search_p=float("nan"),
        gap=None,
        trials_tried=tried,
        sentence=f"No verdict yet: {why}.",
        caveats=(),
    )


def _declared(study: StudyData, samples: Samples, candidate: str) -> list[Comparison | None]:
    """The comparisons fixed before held-out samples were scored, corrected; None where one has no samples."""
    against = samples.pair(candidate, study.baseline_id, "heldout")
    comparisons: list[Comparison | None] = [_compare(study, against, "all lengths"), None, None]
    if study.train_length is not None:
        beyond = against.where(against.lengths > study.train_length)
        comparisons[1] = _compare(study, beyond, f"lengths past {study.train_length:,}")
    if study.runner_up_id is not None:
        comparisons[2] = _compare(study, samples.pair(candidate, study.runner_up_id, "heldout"), "the runner-up")
    return holm_corrected(comparisons)


def _compare(study: StudyData, paired: Paired, what: str) -> Comparison | None:
    if not len(paired.gains):
        return None
    return compare(paired, what, bounds=difference_bounds(study), alpha=study.alpha, seed=study.seed)


def _better(comparison: Comparison | None, alpha: float) -> bool:
    return comparison is not None and comparison.gain.mean > 0 and comparison.p_corrected <= alpha


def _within(study: StudyData, samples: Samples, candidate: str) -> tuple[Comparison | None, Within]:
    """The claim "not worse" at lengths the model was trained on."""
    if study.train_length is None:
        return None, "not measured"
    against = samples.pair(candidate, study.baseline_id, "heldout")
    short = against.where(against.lengths <= study.train_length)
    comparison = _compare(study, short, f"lengths up to {study.train_length:,}")
    if comparison is None:
        return None, "not measured"
    if comparison.changed == 0:
        return comparison, "unchanged"
    # a two-sided interval at 1 - 2 alpha has the one-sided bound as its lower end
    bounds = difference_bounds(study)
    reach = stats.mean_interval(short.clusters(), level=1 - 2 * study.alpha, bounds=bounds, seed=study.seed)
    if reach.low >= -study.margin:
        return comparison, "not worse"
    return comparison, "worse" if comparison.gain.high < 0 else "unclear"


def _gap(study: StudyData, samples: Samples, candidate: str) -> Interval:
    search = samples.pair(candidate, study.baseline_id, "search").clusters()
    heldout = samples.pair(candidate, study.baseline_id, "heldout").clusters()
    return stats.winners_curse_gap(search, heldout, level=1 - study.alpha)


def _caveats(study: StudyData, samples: Samples, *comparisons: Comparison | None) -> tuple[str, ...]:
    overall, past, within, rival = comparisons
    found = []
    if shared := len(_shared_documents(samples)):
        found.append(
            f"{shared} documents are in both splits, so the held-out figures are not independent of the search."
        )
    failed = (overall.failed_a + overall.failed_b if overall else 0) + (rival.failed_b if rival else 0)
    if failed:
        found.append(f"{failed} held-out results failed and count as the worst score.")
    if overall and overall.unmatched:
        found.append(f"{overall.unmatched} held-out samples were scored for one side only and are not compared.")
    parts = [one for one in (overall, past, within) if one and one.gain.documents < FEW_DOCUMENTS]
    if parts:
        counts = ", ".join(f"{one.gain.documents} at {one.what}" for one in parts)
        found.append(f"The intervals are rough, for there are few documents: {counts}.")
    if study.train_length is None:
        found.append("The checkpoint does not say its training length, so no lengths count as past it.")
    elif past is None:
        found.append("No held-out sample is longer than the training length.")
    return tuple(found)


def _shared_documents(samples: Samples) -> set[int]:
    search, heldout = samples.document[~samples.heldout], samples.document[samples.heldout]
    return set(np.intersect1d(search, heldout).tolist())


def sentence(study: StudyData, verdict: Verdict) -> str:
    """The verdict in plain English."""
    overall = verdict.overall
    if overall is None or verdict.candidate_id is None:
        return verdict.sentence
    name = label(study.trial(verdict.candidate_id))
    samples = f"{overall.gain.samples:,} held-out samples"
    if not verdict.beats_baseline:
        looked = f"the best of {verdict.trials_tried:,} trials, {name}," if verdict.trials_tried > 1 else name
        return (
            f"Nothing beats vanilla: {looked} differs from it by {gain_text(study, overall)} on {samples}; "
            f"a true gain of {amount(study, overall.detectable)} would probably have shown."
        )
    within = _within_clause(study, verdict)
    if _better(overall, study.alpha):
        if verdict.past is None:
            past = ""
        elif verdict.past.gain.samples == overall.gain.samples:
            past = f", all {_past(study)}"
        else:
            past = f"; {_past(study)} by {gain_text(study, verdict.past)}"
        return f"{name} beats vanilla by {gain_text(study, overall)} on {samples}{past}{within}."
    assert verdict.past is not None
    samples = f"{verdict.past.gain.samples:,} held-out samples"
    everywhere = f"; over all lengths the difference is {gain_text(study, overall)}"
    return f"{name} beats vanilla {_past(study)} by {gain_text(study, verdict.past)} on {samples}{everywhere}{within}."


def _past(study: StudyData) -> str:
    return f"past the {study.train_length or 0:,} tokens of its training"


def _within_clause(study: StudyData, verdict: Verdict) -> str:
    within = verdict.within
    if within is None:
        return ""
    change, margin = amount(study, within.gain.mean, signed=True), amount(study, study.margin)
    samples = f"{within.gain.samples:,} samples"
    words = {
        "unchanged": f"no score changes ({samples})",
        "not worse": f"it is not worse ({change} on {samples}, margin {margin})",
        "worse": f"it is worse ({change} on {samples})",
        "unclear": f"{samples} cannot rule out that it loses more than {margin} ({change})",
    }
    return f"; up to there {words[verdict.within_status]}"


def gain_text(study: StudyData, comparison: Comparison) -> str:
    gain = comparison.gain
    ends = f"{amount(study, gain.low, unit=False)} to {amount(study, gain.high, unit=False)}"
    mean, p = amount(study, gain.mean), p_text(comparison.p_corrected)
    return f"{mean} ({gain.level:.0%} interval {ends}, corrected p {p})"


def amount(study: StudyData, value: float, *, signed: bool = False, unit: bool = True) -> str:
    """A difference of qualities: percentage points for scores in [0, 1], else the metric's own unit. A dash for NaN."""
    if np.isnan(value):
        return "–"
    percent = is_percent(study)
    number = f"{100 * value:+.1f}" if percent else f"{value:+.3g}"
    number = "0.0" if number in ("+0.0", "-0.0") else number
    number = number.replace("-", "−") if signed else number.lstrip("+").replace("-", "−")
    return f"{number}{' points' if percent else metric(study)}" if unit else number


def is_percent(study: StudyData) -> bool:
    """Whether every score lies in [0, 1] and is shown in percent."""
    return score_bounds(study) == (0.0, 1.0)


def metric(study: StudyData) -> str:
    """The unit behind a quality that is not in percent, with a space before it; empty for a mix of benchmarks."""
    return f" {study.benchmarks[0].metric}" if len(study.benchmarks) == 1 else ""


def p_text(p: float) -> str:
    if np.isnan(p):
        return "–"
    return "below 0.0001" if p < 0.0001 else f"{p:.2g}"


def label(trial: TrialData) -> str:
    """A trial in running text."""
    return f"{trial.method} (trial {trial.number})"
