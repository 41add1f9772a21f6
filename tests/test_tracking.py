"""MLflow as its own client sees it: one run a trial however often the study was run, killed, or MLflow was down."""

import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from statespan.orchestration import tracking
from statespan.orchestration.databases import copied, make_whole
from statespan.orchestration.mirror import Mirror
from statespan.orchestration.plan import make_plan
from statespan.orchestration.progress import Progress
from statespan.orchestration.sweep import Run, sweep
from statespan.orchestration.tracking import Tracker, flat, make_tables, metric_name
from tests.fake_engine import instant
from tests.studies import small_study

SMALL = {"search": {"trials": 5}, "tracking": {"mlflow": "auto"}}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    study = small_study(tmp_path_factory.mktemp("tracked"), **SMALL)
    return study, sweep(study, make_engine=instant)


def client(study):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{(study.output / 'mlflow.db').resolve()}")


def runs(study):
    c = client(study)
    return c.search_runs([c.get_experiment_by_name(study.study).experiment_id])


def told(study):
    """Every run by identity: status, parameters, last metrics, parent's identity."""
    found = runs(study)
    names = {run.info.run_id: run.data.tags["statespan.identity"] for run in found}
    skip = ("wall_seconds", "system/")
    return {
        names[run.info.run_id]: (
            run.info.status,
            dict(run.data.params),
            {key: value for key, value in run.data.metrics.items() if not key.startswith(skip)},
            names.get(run.data.tags.get("mlflow.parentRunId")),
        )
        for run in found
    }


def test_one_parent_one_child_a_trial_and_none_running(done):
    study, result = done
    found = told(study)
    assert len(runs(study)) == len(found) == len(result.data.trials) + 1
    assert {status for status, *_ in found.values()} <= {"FINISHED", "KILLED"}
    assert {parent for name, (*_, parent) in found.items() if name != study.study} == {study.study}


def test_a_trials_run_holds_its_setting_and_scores_by_rung_and_length(done):
    study, result = done
    trial = next(one for one in result.data.trials if one.state == "complete" and one.number >= 0)
    run = next(one for one in runs(study) if one.data.tags.get("statespan.trial") == trial.id)
    assert run.data.params["decimamba.first_layer"] == str(trial.params["first_layer"])
    history = client(study).get_metric_history(run.info.run_id, "quality")
    assert [(one.step, one.value) for one in sorted(history, key=lambda one: one.step)] == [
        (rung.rung, rung.score) for rung in trial.rungs
    ]
    assert {"passkey/accuracy", "passkey/accuracy/256", "passkey/accuracy/400"} <= run.data.metrics.keys()
    assert {i.tags[0].value for i in run.inputs.dataset_inputs} == {"search"}


def test_the_parent_has_verdict_datasets_and_artifacts(done):
    study, result = done
    parent = next(one for one in runs(study) if one.data.tags["statespan.identity"] == study.study)
    assert parent.data.tags["statespan.verdict"] == result.verdict.sentence
    assert parent.data.metrics["heldout/gain"] == pytest.approx(result.verdict.overall.gain.mean)
    assert {i.tags[0].value for i in parent.inputs.dataset_inputs} == {"search", "heldout"}
    names = {one.path for one in client(study).list_artifacts(parent.info.run_id)}
    assert {"best.json", "report.html", "samples.parquet"} <= names


def test_the_champion_is_registered_and_repeats_our_completions(done):
    import mlflow
    import pandas as pd

    from statespan.methods.base import ModelFacts
    from statespan.methods.table import build_method
    from statespan.models.checkpoint import load_model
    from statespan.models.generate import Decoding, generate
    from statespan.models.runner import Runner
    from statespan.orchestration.served import load_config

    study, _ = done
    mlflow.set_tracking_uri(f"sqlite:///{(study.output / 'mlflow.db').resolve()}")
    best = load_config(study.folder / "best.json")
    prompts = ["Call me Ishmael. " * 20, "Some years ago"]
    loaded = load_model(best.model.ref, dtype=best.numerics.dtype)
    method = build_method(best.method.name, best.method.params, ModelFacts.of(loaded))
    ours = [
        generate(
            Runner(loaded.model), method, [loaded.tokenizer.encode(prompt)],
            [Decoding(max_new_tokens=4, eos_id=loaded.tokenizer.eos_id)], loaded.tokenizer,
        ).rows[0].text
        for prompt in prompts
    ]  # fmt: skip
    champion = mlflow.pyfunc.load_model("models:/statespan-small@champion")
    assert champion.predict(pd.DataFrame({"prompt": prompts, "max_new_tokens": [4, 4]})) == ours


def test_what_mlflow_shall_hold_of_a_trial_is_made_once(done):
    """A study of thousands of trials is told after every batch."""
    study, result = done
    run = Run(make_plan(study), None, Progress(study, Console(), "quiet"))
    run._from_ledger()
    first, second = ({one.identity: one for one in run.contents()} for _ in range(2))
    kept = [name for name, one in first.items() if second[name] is one]
    assert len(kept) == len(result.data.trials) - 1 and first.keys() == second.keys()


def test_the_same_command_again_writes_nothing_to_mlflow(done, monkeypatch):
    study, _ = done
    monkeypatch.setattr(Tracker, "sync", lambda self: pytest.fail("MLflow was asked again"))
    monkeypatch.setattr(Mirror, "sync", lambda self: pytest.fail("Optuna was asked again"))
    sweep(study, make_engine=instant)


def test_a_wider_study_continues_its_runs(done):
    study, _ = done
    before = told(study)
    wider = study.model_copy(update={"search": study.search.model_copy(update={"trials": 6})})
    sweep(wider, make_engine=instant)
    after = told(wider)
    assert before.keys() < after.keys() and len(runs(wider)) == len(after)


def test_mlflow_down_for_the_whole_run_is_filled_afterwards(done, tmp_path, monkeypatch):
    study = small_study(tmp_path, **SMALL)

    def down(self, contents):
        raise ConnectionError("connection refused")

    with monkeypatch.context() as broken:
        broken.setattr(Tracker, "_open", down)
        broken.setattr(tracking, "make_whole", lambda uri, make: down(None, None))
        sweep(study, make_engine=instant)
    assert not (study.output / "mlflow.db").exists()
    sweep(study, make_engine=instant)
    reference = small_study(tmp_path / "other", **SMALL)
    sweep(reference, make_engine=instant)
    assert _nameless(told(study)) == _nameless(told(reference))


def _nameless(found):
    """Without the model's path, in which the two differ."""
    return {key: (status, {k: v for k, v in params.items() if "space" not in k and k != "model"}, metrics, parent)
            for key, (status, params, metrics, parent) in found.items()}  # fmt: skip


def test_killed_while_it_writes_there_is_still_one_run_a_trial(tmp_path):
    study = small_study(tmp_path, **SMALL)
    child = os.fork()
    if child == 0:
        count, original = [0], Tracker._create

        def dying(self, content):
            run = original(self, content)
            count[0] += 1
            if count[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return run

        Tracker._create = dying
        try:
            sweep(study, make_engine=instant)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    result = sweep(study, make_engine=instant)
    found = told(study)
    assert len(runs(study)) == len(found) == len(result.data.trials) + 1
    assert "RUNNING" not in {status for status, *_ in found.values()}


def test_names_fit_what_mlflow_takes():
    assert metric_name("pass@1/é (x)") == "pass_at_1/é _x_"
    assert flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}


def test_writing_a_run_again_doubles_no_point_of_a_chart(done):
    study, _ = done
    winner = next(run for run in runs(study) if run.data.tags.get("statespan.role") == "winner")
    for name in winner.data.metrics:
        steps = [one.step for one in client(study).get_metric_history(winner.info.run_id, name)]
        assert len(steps) == len(set(steps)), name


def test_the_studys_run_shows_what_the_workers_took(done):
    study, _ = done
    parent = next(run for run in runs(study) if run.data.tags["statespan.identity"] == study.study)
    assert parent.data.metrics["system/inline/memory_usage_megabytes"] > 10
    assert "system/inline/cpu_utilization_percentage" in parent.data.metrics


def test_nothing_per_sample_is_a_metric(done):
    study, result = done
    names = {name for run in runs(study) for name in run.data.metrics}
    assert len(names) < 40 and not names & set(result.data.samples["sample_id"].to_pylist())


def test_the_samples_of_every_trial_are_one_table_among_the_artifacts(done, tmp_path):
    import pyarrow.parquet as pq

    from statespan.orchestration.ledger import Ledger

    study, _ = done
    parent = next(run for run in runs(study) if run.data.tags["statespan.identity"] == study.study)
    path = client(study).download_artifacts(parent.info.run_id, "samples.parquet", str(tmp_path))
    assert pq.read_table(path).equals(Ledger(study.folder / "ledger").read())


def test_a_run_that_was_made_twice_stays_once(tmp_path):
    study = small_study(tmp_path, **SMALL)
    sweep(study, make_engine=instant)
    first = {run.data.tags["statespan.identity"]: run.info.run_id for run in runs(study)}
    experiment = client(study).get_experiment_by_name(study.study).experiment_id
    identity = next(name for name in first if name != study.study)
    client(study).create_run(experiment, tags={"statespan.study": study.study, "statespan.identity": identity})
    (study.folder / "mlflow.json").unlink()
    sweep(study, make_engine=instant)
    assert {run.data.tags["statespan.identity"]: run.info.run_id for run in runs(study)} == first


def test_results_made_again_leave_no_run_open(tmp_path):
    study = small_study(tmp_path, **SMALL)
    sweep(study, make_engine=instant)
    for path in (study.folder / "ledger").glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-50])
    sweep(study, make_engine=instant)
    assert "RUNNING" not in {run.info.status for run in runs(study)}


def test_an_empty_database_is_kept_and_copied_until_it_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []

    def create(url):
        made.append(url)
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
            database.execute("CREATE TABLE runs (name TEXT)")
            database.commit()

    def tables(name):
        (tmp_path / name).unlink(missing_ok=True)
        copied(f"sqlite:///{tmp_path / name}", "mlflow-1.2", create)
        with closing(sqlite3.connect(tmp_path / name)) as database:
            return database.execute("SELECT name FROM sqlite_master").fetchall()

    assert tables("first.db") == tables("second.db") == [("runs",)] and len(made) == 1
    (kept,) = (tmp_path / "cache" / "statespan" / "databases").iterdir()
    kept.write_bytes(b"half of it")
    assert tables("third.db") == tables("fourth.db") == [("runs",)] and len(made) == 2


def test_a_database_is_there_whole_or_not_at_all(tmp_path):
    url = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def cut_short(temporary):
        Path(temporary.removeprefix("sqlite:///")).write_bytes(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_whole(url, cut_short)
    assert list(tmp_path.iterdir()) == []
    make_whole(url, make_tables)
    make_whole(url, cut_short)  # it is there, so nobody makes it
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
