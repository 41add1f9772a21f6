"""What a finished or running study is to its report, `compare` and `gate`: frozen values and one table of samples.

The orchestration fills this from the ledger; everything that judges or draws reads only this and knows no Ray, Optuna
or MLflow. Selection belongs to the `search` split; the `heldout` split is scored for the baseline, the winner and the
runner-up only, after they have been chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

if TYPE_CHECKING:
    from statespan.orchestration.breakdown import Questions

TrialState = Literal["complete", "pruned", "failed", "oom", "running"]
SampleStatus = Literal["done", "failed", "oom", "timeout"]

SAMPLE_COLUMNS = pa.schema(
    [
        ("trial_id", pa.string()),
        ("method", pa.string()),
        ("benchmark", pa.string()),
        ("sample_id", pa.string()),  # the same for all trials: comparisons are paired on (benchmark, sample_id)
        ("document", pa.string()),  # statistics cluster by it
        ("split", pa.string()),  # search | heldout
        ("rung", pa.int32()),  # the rung at which this trial met the sample; -1 for heldout
        ("length", pa.int32()),  # the length class, tokens
        ("depth", pa.float32()),  # null where the benchmark has none
        ("score", pa.float64()),  # higher is better; NaN unless status is done
        ("tokens_prompt", pa.int64()),
        ("tokens_new", pa.int64()),
        # of the whole prompt, scaled up where layers were shared; of a result taken over, what its computation took;
        # NaN or null where nothing was timed
        ("prefill_seconds", pa.float64()),
        ("decode_seconds", pa.float64()),
        ("peak_bytes", pa.int64()),  # null where not measured
        ("status", pa.string()),  # a SampleStatus
        ("cached", pa.bool_()),  # the result of an earlier identical evaluation
        ("shared", pa.bool_()),  # all or some layers were another trial's work
        ("computed_share", pa.float32()),  # share of this sample's layer-tokens that was computed: 1 alone, 0 cached
        ("text", pa.string()),  # what was generated; null for likelihood samples
    ]
)
"""One row a (trial, sample). Strings may be dictionary-encoded; further columns are allowed and ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkFacts:
    name: str
    metric: str
    """What a score is, for headings: "accuracy", "nats per token" …"""

    version: int = 1
    weight: float = 1.0
    """Share of this benchmark in the study's quality, relative to the others'."""

    low: float | None = None
    """Worst possible score: what a failed sample counts as. None takes the worst score any compared trial got."""

    high: float | None = None
    """Best possible score; None where there is none. A benchmark within [0, 1] is shown in percent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RungResult:
    """What became of a trial at one rung of the race (search split only)."""

    rung: int
    samples: int
    """Samples scored up to and including this rung."""

    score: float
    """Mean quality on them; NaN for none."""

    decision: Literal["keep", "stop", "finish"]
    reason: str
    p: float | None = None
    """Corrected p of "worse than the incumbent", where a test was made."""

    incumbent_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialData:
    id: str
    number: int
    """Order of asking, from 0."""

    method: str
    params: Mapping[str, Any]
    state: TrialState
    rungs: Sequence[RungResult] = ()
    message: str = ""
    """Why it failed or was stopped; empty for a complete trial."""

    published: bool = False
    """True for a setting taken from the method's paper."""

    wall_seconds: float = float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """Share of each parameter in the spread of quality, by one of Optuna's evaluators, within one method."""

    method: str
    evaluator: str
    shares: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyData:
    name: str
    settings: Mapping[str, Any]
    """The study file after defaults: what was asked for."""

    model: Mapping[str, Any]
    """Name, path, digest, parameters, tokenizer …; shown as they are."""

    train_length: int | None
    """Longest length the checkpoint was trained on, tokens; None where its card does not say."""

    benchmarks: Sequence[BenchmarkFacts]
    trials: Sequence[TrialData]
    samples: pa.Table
    """SAMPLE_COLUMNS; must hold the baseline's rows on both splits."""

    baseline_id: str
    """The vanilla trial."""

    winner_id: str | None = None
    """Chosen on the search split (verdict.choose); None before a choice was made."""

    runner_up_id: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Commit, versions, host, data digests, seeds, command line, started and finished; shown as they are."""

    importance: Sequence[Importance] = ()
    questions: Mapping[str, Questions] = field(default_factory=dict)
    """Task -> its benchmark and samples (breakdown.py)."""

    serve_command: str = ""
    """What serves the winner; left out of the report when empty."""

    links: Mapping[str, str] = field(default_factory=dict)
    """Where else to look (MLflow, ledger, exported configuration): label -> place."""

    margin: float = 0.02
    """How much quality a winner may lose at lengths up to train_length and still count as not worse there."""

    alpha: float = 0.05
    seed: int = 0
    """Seeds the resampling, so that a report built twice is the same."""

    def trial(self, trial_id: str) -> TrialData:
        """The trial of that id; KeyError for none."""
        for trial in self.trials:
            if trial.id == trial_id:
                return trial
        raise KeyError(trial_id)
