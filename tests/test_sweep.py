"""A whole study on a tiny model with an instant engine: what it finds, reuses, refuses, and tells."""

import json

import pytest

from statespan.errors import UserError
from statespan.orchestration.journal import Journal
from statespan.orchestration.ledger import Ledger
from statespan.orchestration.lock import study_lock
from statespan.orchestration.plan import make_plan
from statespan.orchestration.results import Results
from statespan.orchestration.served import load_config
from statespan.orchestration.standings import make_race
from statespan.orchestration.status import read_status
from statespan.orchestration.sweep import sweep
from statespan.study_file import check_study
from tests.fake_engine import InstantEngine, dies_once, instant
from tests.studies import essence, optuna_trials, small_study


def refuse(spec):
    raise AssertionError("something was computed again")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def done(folder):
    study = small_study(folder)
    return study, sweep(study, make_engine=instant)


def test_finds_the_setting_that_is_best_and_proves_it(done):
    _, result = done
    assert result.verdict.beats_baseline
    winner = result.data.trial(result.data.winner_id)
    assert winner.params["first_layer"] == 1 and "beats vanilla by" in result.verdict.sentence


def test_every_complete_trial_met_every_search_sample_and_no_other(done):
    study, result = done
    entries = make_plan(study).samples.entries
    search = {one.id for one in entries if one.split == "search"}
    rows = result.data.samples.to_pylist()
    for trial in result.data.trials:
        met = {row["sample_id"] for row in rows if row["trial_id"] == trial.id and row["split"] == "search"}
        assert met == search if trial.state == "complete" else met < search
    held = {row["trial_id"] for row in rows if row["split"] == "heldout"}
    assert held == {"vanilla", result.data.winner_id, result.data.runner_up_id}


def test_rungs_that_can_stop_nobody_are_met_together_with_the_next_look(tmp_path, monkeypatch):
    asked = []
    of = Results.of

    def spy(self, candidates, entries, split):
        asked.append((len(candidates), sorted(set(entries.values())), split))
        return of(self, candidates, entries, split)

    monkeypatch.setattr(Results, "of", spy)
    study = small_study(tmp_path, search={"trials": 3, "batch": 3})
    result = sweep(study, make_engine=instant)
    race = make_race(study, make_plan(study).samples.of_split("search"), {"passkey": (0.0, 1.0)})
    first = race.looks[0]
    assert 0 < first < race.last_rung, "the study is small enough for early rungs to be no looks"
    searched = [rungs for _, rungs, split in asked if split == "search" and rungs]
    assert searched[-len(race.looks) - 1] == list(range(first + 1)), searched
    for row in result.data.samples.to_pylist():  # each sample keeps its own rung
        assert row["split"] == "heldout" or row["rung"] in range(race.last_rung + 1)
    assert {row["rung"] for row in result.data.samples.to_pylist() if row["split"] == "search"} >= set(range(first + 1))
    trial = result.data.trials[1]
    assert [one.samples for one in trial.rungs] == sorted({one.samples for one in trial.rungs}), "by rung, not in all"


def test_documents_are_on_one_side_only(done):
    study, _ = done
    sides = {}
    for entry in make_plan(study).samples.entries:
        assert sides.setdefault((entry.task, entry.document), entry.split) == entry.split
    assert set(sides.values()) == {"search", "heldout"}


def test_the_winner_is_exported_with_tokens_to_repeat(done):
    study, _ = done
    best = load_config(study.folder / "best.json")
    assert best.method.name == "decimamba" and best.model.digest == make_plan(study).model.weights
    assert best.samples and all(sample.ids == (1, 2) for sample in best.samples)


def test_optuna_and_status_tell_the_same_story(done):
    study, result = done
    trials = [one for one in optuna_trials(study) if one[-1] is not None]
    states = {"COMPLETE": "complete", "PRUNED": "pruned"}
    assert [(one[-1], states[one[1]]) for one in trials] == [(t.id, t.state) for t in result.data.trials[1:]]
    assert read_status(study.folder).phase == "done"


def test_the_same_command_again_computes_nothing(done):
    study, _ = done
    before = essence(study)
    sweep(study, make_engine=refuse)
    assert essence(study) == before


def test_more_trials_keep_the_old_ones_and_compute_only_the_new(done, folder):
    _, result = done
    wider = small_study(folder, search={"trials": 10})
    again = sweep(wider, make_engine=instant)
    assert len(again.data.trials) == 11
    assert [t.params for t in again.data.trials[:9]] == [t.params for t in result.data.trials]


def test_another_study_of_the_same_model_is_free(done, folder):
    _, result = done
    twin = small_study(folder, study="twin")
    again = sweep(twin, make_engine=refuse)
    assert again.verdict.sentence == result.verdict.sentence
    assert set(Ledger(twin.folder / "ledger").read()["origin"].to_pylist()) <= {"reused", "vanilla", "twin"}


def test_more_lengths_keep_sides_settings_and_results(tmp_path):
    study = small_study(tmp_path, search={"trials": 5})
    sweep(study, make_engine=instant)
    old = {(e.task, e.document): e.split for e in make_plan(study).samples.entries}
    ledger = Ledger(study.folder / "ledger")
    before = set(ledger.known(make_plan(study).scope))
    passkey = {"lengths": [256, 400, 512], "depths": [0.0, 0.5, 1.0], "trials": 10}
    wider = small_study(tmp_path, search={"trials": 5}, benchmarks={"passkey": passkey})
    computed = []

    class Counting(InstantEngine):
        def evaluate(self, setting, task, samples, alone):
            computed.extend((setting.method, sample.length) for sample in samples)
            return super().evaluate(setting, task, samples, alone)

    result = sweep(wider, make_engine=Counting)
    plan = make_plan(wider)
    assert all(old.get((e.task, e.document), e.split) == e.split for e in plan.samples.entries)
    kept = Journal(wider.folder / "search", json.loads((wider.folder / "facts.json").read_text())["version"]).trials()
    assert {asked.origin for asked, _ in kept} == {"kept"}
    assert before < set(ledger.known(plan.scope))
    assert {length for method, length in computed if method == "vanilla"} == {512}
    assert result.data.trial("t0000").params == {"first_layer": 1, "base_tokens": 64}


def test_a_smaller_study_is_judged_on_what_it_still_asks_for(tmp_path):
    sweep(small_study(tmp_path), make_engine=instant)
    smaller = small_study(tmp_path, benchmarks={"passkey": {"lengths": [256], "depths": [0.0, 0.5, 1.0], "trials": 10}})
    result = sweep(smaller, make_engine=instant)
    asked = {(one.id, one.split) for one in make_plan(smaller).samples.entries}
    assert {(row["sample_id"], row["split"]) for row in result.data.samples.to_pylist()} == asked
    held = sum(split == "heldout" for _, split in asked)
    assert f"on {held} held-out samples" in result.verdict.sentence


def test_a_trial_that_changes_nothing_takes_vanillas_result(tmp_path):
    study = small_study(tmp_path, methods={"decimamba": {"params": {"base_tokens": 255, "first_layer": 1}}})
    result = sweep(study, make_engine=instant)
    rows = [row for row in Ledger(study.folder / "ledger").read().to_pylist() if row["trial_id"] == "t0000"]
    origins = {length: {row["origin"] for row in rows if row["length"] == length} for length in (256, 400)}
    assert origins[400] == {"computed"}
    assert len(result.data.trials) == 2  # a space of one point is searched once
    assert origins[256] <= {"computed", "vanilla"} and "vanilla" in origins[256]


def test_a_trial_whose_sample_fails_is_failed_and_never_wins(tmp_path):
    def fail(setting, sample):
        return "weights on fire" if setting.params.get("first_layer") == 1 else ""

    result = sweep(small_study(tmp_path), make_engine=lambda spec: InstantEngine(spec, fail=fail))
    failed = [one for one in result.data.trials if one.state == "failed"]
    assert failed and all(one.params["first_layer"] == 1 and "weights on fire" in one.message for one in failed)
    assert result.data.winner_id not in {one.id for one in failed}


def test_vanilla_failing_stops_the_study(tmp_path):
    from statespan.orchestration.conductor import BaselineFailed

    with pytest.raises(BaselineFailed, match="weights on fire"):
        sweep(small_study(tmp_path), make_engine=lambda spec: InstantEngine(spec, fail=lambda a, b: "weights on fire"))


def test_racing_stops_what_is_shown_to_be_worse(tmp_path):
    changes = {"benchmarks": {"passkey": {"lengths": [256, 400], "trials": 40}}, "search": {"trials": 6, "batch": 6}}
    result = sweep(small_study(tmp_path, **changes, racing={"alpha": 0.3}), make_engine=instant)
    pruned = [one for one in result.data.trials if one.state == "pruned"]
    assert pruned and all("worse than" in one.message and len(one.rungs) < 6 for one in pruned)


def test_several_objectives_reach_optuna(tmp_path):
    study = small_study(tmp_path, search={"trials": 4, "objectives": ["quality", "layer_tokens", "seconds"]})
    sweep(study, make_engine=instant)
    values = [one[2] for one in optuna_trials(study) if one[1] == "COMPLETE"]
    assert values and all(len(one) == 3 and one[2] == pytest.approx(0.02) for one in values)


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"model": "mamba9"}, "no checkpoint folder, hub id or shipped model named 'mamba9'", id="model"),
        pytest.param(
            {"methods": {"decimambo": {}}}, "no method named 'decimambo'; did you mean 'decimamba'", id="method"
        ),
        pytest.param({"benchmarks": {"passkex": {}}}, "no benchmark named 'passkex'", id="benchmark"),
        pytest.param(
            {"benchmarks": {"passkey": {"lenghts": [256]}}}, "named 'lenghts'; did you mean 'lengths'", id="setting"
        ),
        pytest.param({"search": {"sampler": "tpo"}}, "no sampler named 'tpo'", id="sampler"),
        pytest.param({"racing": {"scheduler": "pbt"}}, "no racing.scheduler named 'pbt'", id="scheduler"),
        pytest.param({"numerics": {"device": "cuda"}}, "this machine has no CUDA device", id="device"),
        pytest.param(
            {"methods": {"decimamba": {"params": {"base_tokens": {"type": "int", "low": 9, "high": 2}}}}},
            "base_tokens: needs low <= high",
            id="range",
        ),
        pytest.param(
            {"methods": {"decimamba": {"enqueue": [{"beta2": 1}]}}},
            "parameter of decimamba named 'beta2'",
            id="enqueue",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(changes, message, tmp_path):
    small_study(tmp_path)
    raw = {"study": "bad", **changes}
    if "methods" in raw and "decimamba" in raw["methods"]:
        raw["methods"] = {"decimamba": {"space": str(tmp_path / "space.yaml"), **raw["methods"]["decimamba"]}}
    whole = small_study(tmp_path).model_dump(mode="json", exclude_unset=True) | raw
    with pytest.raises(UserError, match=message) as caught:
        sweep(check_study(whole), make_engine=instant)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs" / "bad").exists()


def test_one_study_has_one_driver(tmp_path):
    study = small_study(tmp_path)
    with study_lock(study.folder), pytest.raises(UserError, match="is being run by process"):
        sweep(study, make_engine=instant)


# ---- with Ray


@pytest.mark.ray
def test_through_ray_tune_the_study_is_the_same(tmp_path, ray_cluster, done):
    _, result = done
    workers = {"backend": "ray", "count": 2}
    through_ray = small_study(tmp_path, workers=workers)
    other = sweep(through_ray, make_engine=dies_once(tmp_path / "died"))
    assert (tmp_path / "died").exists(), "no worker died on the way"
    whole = small_study(tmp_path, study="inline")
    sweep(whole, make_engine=instant)
    mine, theirs = essence(through_ray), essence(whole)
    for part in ("trials", "rows", "winner", "runner_up", "optuna"):
        assert mine[part] == theirs[part]
    assert other.verdict.sentence == result.verdict.sentence


@pytest.mark.ray
def test_a_scheduler_of_tunes_own_decides(tmp_path, ray_cluster):
    racing = {"scheduler": "asha", "scheduler_options": {"reduction_factor": 3}}
    study = small_study(tmp_path, workers={"backend": "ray", "count": 1}, racing=racing)
    result = sweep(study, make_engine=instant)
    pruned = [one for one in result.data.trials if one.state == "pruned"]
    assert pruned and all(one.message == "stopped by asha" for one in pruned)
    again = small_study(tmp_path, study="again", workers={"backend": "ray", "count": 1}, racing=racing)
    assert [t.state for t in sweep(again, make_engine=instant).data.trials] == [t.state for t in result.data.trials]
