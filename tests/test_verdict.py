"""Verdicts on made-up studies whose truth is known: who wins, what is said, and that luck alone seldom wins."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from statespan import stats
from statespan.orchestration.gate import gate
from statespan.orchestration.paired import Samples
from statespan.orchestration.study_data import SAMPLE_COLUMNS, BenchmarkFacts, StudyData, TrialData
from statespan.orchestration.verdict import adjudicate, amount, choose
from tests.synthetic_study import make_study

PASSKEY = BenchmarkFacts(name="passkey", metric="accuracy", low=0.0, high=1.0)


def tiny_study(scores, *, split="heldout", lengths=None, benchmarks=(PASSKEY,), train_length=1024, **facts):
    """A study from {trial_id: [score a sample]}, one sample a document; `vanilla` is the baseline."""
    count = len(next(iter(scores.values())))
    lengths = [2048] * count if lengths is None else lengths
    rows = [
        {
            "trial_id": trial,
            "method": "vanilla" if trial == "vanilla" else "longmamba",
            "benchmark": benchmarks[0].name,
            "sample_id": str(k),
            "document": f"{split}-{k}",
            "split": split,
            "length": lengths[k],
            "score": score,
            "status": "failed" if np.isnan(score) else "done",
        }
        for trial, values in scores.items()
        for k, score in enumerate(values)
    ]
    trials = [TrialData(id=t, number=k - 1, method=t, params={}, state="complete") for k, t in enumerate(scores)]
    others = [trial for trial in scores if trial != "vanilla"]
    return StudyData(
        name="tiny",
        settings={},
        model={},
        train_length=train_length,
        benchmarks=benchmarks,
        trials=trials,
        samples=pa.Table.from_pylist(rows, schema=SAMPLE_COLUMNS),
        baseline_id="vanilla",
        **({"winner_id": others[0] if others else None} | facts),
    )


def test_a_method_that_helps_wins_and_the_sentence_says_by_how_much():
    verdict = adjudicate(make_study())
    assert verdict.winner_id == verdict.candidate_id == "t0007"
    assert verdict.past.gain.low > 0.2 and verdict.past.p_corrected < 0.001
    assert verdict.within_status == "unchanged"
    assert verdict.sentence.startswith("longmamba (trial 7) beats vanilla by 33.3 points (95% interval 22.")
    assert verdict.sentence.endswith("up to there no score changes (40 samples).")


def test_the_declared_comparisons_are_corrected_together():
    verdict = adjudicate(make_study(lift=0.3, per_cell=8))
    made = [verdict.overall, verdict.past, verdict.runner_up]
    assert [one.p_corrected for one in made] == pytest.approx(stats.holm([one.p for one in made]))
    assert verdict.overall.p_corrected > 1.5 * verdict.overall.p


def test_methods_that_all_equal_vanilla_are_said_not_to_beat_it():
    verdict = adjudicate(make_study(lift=0.0))
    assert verdict.winner_id is None and verdict.candidate_id is not None
    assert verdict.sentence.startswith("Nothing beats vanilla: the best of 24 trials, ")
    assert "points would probably have shown" in verdict.sentence


def test_of_100_identical_configurations_the_chosen_one_seldom_passes_for_a_winner(monkeypatch):
    monkeypatch.setattr(stats, "FLIPS", 500)
    rng, studies, false, gaps = np.random.default_rng(0), 60, 0, []
    for _ in range(studies):
        search = (rng.random((101, 60)) < rng.random(60)).astype(float)
        chosen = 1 + int(search[1:].mean(axis=1).argmax())
        heldout = (rng.random((2, 60)) < rng.random(60)).astype(float)
        verdict = adjudicate(tiny_study({"vanilla": heldout[0], "best": heldout[1]}))
        false += verdict.winner_id is not None
        gaps.append(search[chosen].mean() - search[0].mean() - verdict.overall.gain.mean)
    assert false <= 6  # 5 % of 60 is 3; 6 is what luck gives in 97 of 100
    assert np.mean(gaps) > 0.08  # what choosing the best of 100 adds, and held-out samples take away


def test_choosing_looks_at_the_search_split_only():
    study = make_study()
    rows = study.samples.to_pylist()
    for row in rows:
        if row["split"] == "heldout":
            row["score"] = 0.0
    spoiled = dataclasses.replace(study, samples=pa.Table.from_pylist(rows, schema=SAMPLE_COLUMNS))
    assert choose(spoiled) == choose(study) and choose(study).winner_id == "t0007"


def test_a_trial_that_loses_at_trained_lengths_stands_behind_those_that_do_not():
    scores = {"vanilla": [1, 1, 0, 0], "reckless": [1, 0, 1, 1], "careful": [1, 1, 1, 0]}
    study = tiny_study(scores, split="search", lengths=[512, 512, 4096, 4096])
    assert choose(study).winner_id == "careful"


def test_the_runner_up_is_no_twin_of_the_winner():
    scores = {"vanilla": [0, 0, 0], "first": [1, 1, 0], "twin": [1, 1, 0], "other": [0, 1, 0]}
    choice = choose(tiny_study(scores, split="search"))
    assert (choice.winner_id, choice.runner_up_id) == ("first", "other")


def test_pruned_and_failed_trials_are_not_chosen():
    study = tiny_study({"vanilla": [0, 0], "best": [1, 1]}, split="search")
    stopped = [dataclasses.replace(study.trials[1], state="pruned")]
    assert choose(dataclasses.replace(study, trials=[study.trials[0], *stopped])).winner_id is None


def test_failed_samples_count_as_the_worst_score_and_are_told():
    nan = float("nan")
    verdict = adjudicate(tiny_study({"vanilla": [1.0] * 30, "best": [1.0] * 27 + [nan] * 3}))
    assert verdict.overall.gain.mean == pytest.approx(-0.1) and verdict.overall.failed_a == 3
    assert "3 held-out results failed and count as the worst score." in verdict.caveats


def test_a_failed_sample_of_an_unbounded_score_counts_as_the_worst_seen():
    perplexity = BenchmarkFacts(name="perplexity", metric="nats per token")
    study = tiny_study({"vanilla": [-2.0, -3.5], "best": [-1.0, float("nan")]}, benchmarks=(perplexity,))
    assert Samples(study).pair("best", "vanilla", "heldout").gains.tolist() == [1.0, 0.0]


def test_winning_past_training_while_losing_up_to_it_is_said_in_the_same_sentence():
    rng = np.random.default_rng(1)
    lengths = [512] * 60 + [4096] * 60
    vanilla = np.r_[np.ones(60), np.zeros(60)]
    best = np.r_[rng.random(60) < 0.7, rng.random(60) < 0.9].astype(float)
    verdict = adjudicate(tiny_study({"vanilla": vanilla, "best": best}, lengths=lengths))
    assert verdict.winner_id == "best" and verdict.within_status == "worse"
    assert "; up to there it is worse (−" in verdict.sentence


def test_not_worse_needs_enough_samples():
    few, many = np.r_[0.0, np.ones(59)], np.r_[0.0, np.ones(399)]  # both lose less than the margin of 2 points
    for scores, expected in ((few, "unclear"), (many, "not worse")):
        study = tiny_study({"vanilla": np.ones(len(scores)), "best": scores}, lengths=[512] * len(scores))
        assert adjudicate(study).within_status == expected


def test_documents_in_both_splits_are_told():
    study = make_study()
    rows = study.samples.to_pylist()
    for row in rows:
        row["document"] = row["document"].replace("heldout", "search")
    mixed = dataclasses.replace(study, samples=pa.Table.from_pylist(rows, schema=SAMPLE_COLUMNS))
    assert any("documents are in both splits" in caveat for caveat in adjudicate(mixed).caveats)


def test_without_held_out_scores_there_is_no_verdict():
    verdict = adjudicate(tiny_study({"vanilla": [0.0], "best": [1.0]}, split="search"))
    assert not verdict.beats_baseline
    assert verdict.sentence == "No verdict yet: no held-out sample was scored for the best trial."


def test_every_length_and_every_benchmark_counts_by_its_weight():
    lengths = [512] * 3 + [4096]
    study = tiny_study({"vanilla": [0.0] * 4, "best": [0.0, 0.0, 0.0, 1.0]}, lengths=lengths)
    assert adjudicate(study).overall.gain.mean == pytest.approx(0.5)


def test_a_sample_with_two_results_is_refused():
    study = tiny_study({"vanilla": [0.0], "best": [1.0]})
    twice = dataclasses.replace(study, samples=pa.concat_tables([study.samples, study.samples]))
    with pytest.raises(AssertionError, match="has 2 results of sample passkey/0"):
        Samples(twice)


def test_samples_only_one_side_has_are_not_compared_and_told():
    study = tiny_study({"vanilla": [0.0] * 5, "best": [1.0] * 5})
    fewer = dataclasses.replace(study, samples=study.samples.slice(0, 8))
    verdict = adjudicate(fewer)
    assert verdict.overall.unmatched == 2 and verdict.overall.gain.samples == 3
    assert any("2 held-out samples were scored for one side only" in caveat for caveat in verdict.caveats)


@pytest.mark.parametrize(
    "options, outcome, code",
    [
        pytest.param({}, "pass", 0, id="gains"),
        pytest.param({"min_gain": 0.9}, "fail", 1, id="gains_too_little"),
        pytest.param({"min_gain": 0.33}, "inconclusive", 2, id="limit_within_the_interval"),
        pytest.param({"max_latency": 60.0}, "pass", 0, id="fast_enough"),
        pytest.param({"max_latency": 0.01}, "fail", 1, id="too_slow"),
        pytest.param({"max_latency": 0.01, "min_gain": 0.33}, "fail", 1, id="one_failure_is_enough"),
    ],
)
def test_the_gate(options, outcome, code):
    result = gate(make_study(), **options)
    assert (result.outcome, result.exit_code) == (outcome, code)


def test_a_gate_without_a_verdict_is_inconclusive():
    assert gate(tiny_study({"vanilla": [0.0], "best": [1.0]}, split="search")).exit_code == 2


@pytest.mark.parametrize("value, text", [(0.1234, "12.3 points"), (-0.1, "−10.0 points"), (float("nan"), "–")])
def test_amounts_of_accuracy_are_points_and_nothing_measured_is_a_dash(value, text):
    assert amount(tiny_study({"vanilla": [0.0]}), value) == text


def test_amounts_of_other_metrics_keep_their_unit():
    study = tiny_study({"vanilla": [0.0]}, benchmarks=(BenchmarkFacts(name="p", metric="nats per token"),))
    assert amount(study, 0.01234, signed=True) == "+0.0123 nats per token"
