"""`statespan gate`: whether a study's winner is good enough to use, as an exit code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from statespan import stats
from statespan.orchestration.paired import Samples
from statespan.orchestration.study_data import StudyData
from statespan.orchestration.verdict import adjudicate, amount, gain_text
from statespan.stats import Interval

Outcome = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Whether a study's winner is good enough to use."""

    outcome: Outcome
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return {"pass": 0, "fail": 1, "inconclusive": 2}[self.outcome]


def gate(
    study: StudyData,
    *,
    min_gain: float = 0.0,
    max_latency: float | None = None,
    samples: Samples | None = None,
) -> Gate:
    """Pass where the interval of the winner's held-out gain lies at or above `min_gain` (quality), that of its seconds
    a sample at or below `max_latency`, and it does not lose at lengths up to the training length; fail where an
    interval lies wholly on the wrong side; else inconclusive."""
    samples = samples or Samples(study)
    verdict = adjudicate(study, samples)
    if verdict.overall is None:
        return Gate(outcome="inconclusive", reasons=(verdict.sentence,))
    checks: list[tuple[Outcome, str]] = []
    gain = verdict.overall.gain
    words = f"gain {gain_text(study, verdict.overall)}, asked for {amount(study, min_gain)}"
    checks.append((_side(gain.low, gain.high, min_gain), words))
    if max_latency is not None:
        seconds = latency(samples, verdict.candidate_id or "")
        words = f"{seconds.mean:.3g} s a sample ({seconds.low:.3g} to {seconds.high:.3g}), limit {max_latency:g} s"
        checks.append((_side(-seconds.high, -seconds.low, -max_latency), words))
    claims: dict[str, Outcome] = {"worse": "fail", "unclear": "inconclusive"}
    short = claims.get(verdict.within_status, "pass")
    checks.append((short, f"at lengths the model was trained on: {verdict.within_status}"))
    outcomes = {outcome for outcome, _ in checks}
    outcome: Outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    return Gate(outcome=outcome, reasons=tuple(f"{which}: {said}" for which, said in checks))


def _side(low: float, high: float, limit: float) -> Outcome:
    """Where an interval lies; one that could not be computed (NaN) is inconclusive."""
    return "pass" if low >= limit else "fail" if high < limit else "inconclusive"


def latency(samples: Samples, trial_id: str) -> Interval:
    """Seconds a held-out sample, of those that were timed; NaN for none."""
    rows = samples.rows(trial_id, "heldout")
    seconds = samples.seconds[rows]
    timed = np.isfinite(seconds)
    return stats.mean_interval(stats.cluster(seconds[timed], samples.document[rows][timed]))
