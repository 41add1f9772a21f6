"""The short form of the chaos suite: one study on Ray loses everything it has, once each, and is none the worse.

The long form is `make chaos`; docs/reliability.md has its results.
"""

import os
import signal
from random import Random

import pytest
from typer.testing import CliRunner

from statespan.cli import build_app
from statespan.orchestration import model_engine
from statespan.orchestration.status import read_status
from statespan.orchestration.sweep import sweep
from statespan.study_file import saved_form
from tests import fake_engine
from tests.chaos import ENDING, Arena, Blow, Disturbance, Undisturbed, blows, different, served, where, whole
from tests.chaos_report import BEGIN, END, NAMES, Part, Row, at, full_disk, rows_of, run, write
from tests.fake_engine import InstantEngine, unit
from tests.studies import small_study

SEED = 20261122
WORKERS = ("workers.", "cluster.")
"""Settings in which a study on Ray differs from the same one in this process."""


def without_workers(found):
    runs = {
        name: run | {"params": {key: value for key, value in run["params"].items() if not key.startswith(WORKERS)}}
        for name, run in found["mlflow"].items()
    }
    return found | {"mlflow": runs}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The model, and what an undisturbed study comes to; on Ray it has about a hundred items."""
    folder = tmp_path_factory.mktemp("calm")
    small_study(folder)
    study = at(folder, folder / "out")
    run(study)
    return folder, Undisturbed(without_workers(whole(study)), items=100, start_seconds=5.0, end_seconds=2.0)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_study_that_loses_worker_trial_mlflow_and_driver_ends_the_same(calm, tmp_path, ray_cluster):
    import ray

    folder, usual = calm
    arena = Arena(folder, ray.get_runtime_context().gcs_address)
    rng = Random(SEED)
    # the first before any trial has reported a rung
    todo = [Blow("sigint", 0.01), Blow("worker", 0.2 * rng.random()), Blow("mlflow", 0.5 * rng.random())]
    todo += [Blow("sigterm", 0.3)]
    todo += [Blow("worker", 0.4), Blow("driver", 0.6 + 0.1 * rng.random()), Blow("trial", rng.random())]
    with served(arena, tmp_path / "server") as server:
        disturbance = Disturbance(arena, arena.study(tmp_path, server.uri), usual, server)
        left = disturbance.deal(todo)
        server.wait()
        disturbance.deal([])
        assert not left, disturbance.dealt
        assert different(without_workers(whole(disturbance.study)), usual.whole) == []
    assert read_status(disturbance.study.folder).phase == "done"


def test_a_disk_that_fills_up_loses_nothing(calm, tmp_path):
    folder, usual = calm
    study = full_disk(folder, tmp_path / "small", Random(SEED))
    if study is None:
        pytest.skip("this user may not mount a small disk")
    assert different(without_workers(whole(study)), usual.whole) == []


def test_a_blow_whose_moment_never_came_is_dealt_sooner():
    late = Blow("driver", 0.96)
    assert ENDING < late.sooner().share < late.share
    assert Blow("trial", 0.6).sooner().share == 0.3


def test_blows_cover_a_victims_whole_life():
    shares = [one.share for one in blows("driver", 20, SEED)]
    assert [int(20 * share) for share in shares] == list(range(20))
    assert (
        shares == [one.share for one in blows("driver", 20, SEED)] != [one.share for one in blows("worker", 20, SEED)]
    )


def test_the_table_of_a_run_in_parts_adds_up_and_other_rows_stay(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    first, second = Row(NAMES["driver"], 5, 1, 6, 60.0), Row(NAMES["driver"], 4, 1, 5, 50.0, ("rows",))
    write(page, [Row(NAMES["worker"], 5, 1, 1, float("nan")), first], SEED)
    write(page, [second.after(rows_of(page.read_text())[NAMES["driver"]])], SEED)
    found = rows_of(page.read_text())
    assert found[NAMES["driver"]] == Row(NAMES["driver"], 9, 2, 11, 110.0, ("rows",))
    assert found[NAMES["worker"]].times == 5 and page.read_text().endswith("\nafter\n")
    assert Part.parse("2/4") == Part(2, 4)
    with pytest.raises(ValueError, match="5/4"):
        Part.parse("5/4")


def test_where_two_contents_differ_is_told():
    found = list(where({"a": {"x": 1, "new": 2}, "b": 3}, {"a": {"x": 1, "y": 2}, "b": 4}))
    assert found == ["/a/y: None in place of 2", "/a/new: 2 in place of None", "/b: 3 in place of 4"]


class Noting(InstantEngine):
    """Notes what it computes: (setting, sample)."""

    def evaluate(self, setting, task, samples, alone):
        COMPUTED.extend((setting.method, str(setting.params), sample.id) for sample in samples)
        return super().evaluate(setting, task, samples, alone)


COMPUTED: list[tuple[str, str, str]] = []
WIDER = {
    "samples": {"benchmarks": {"passkey": {"lengths": [256, 400], "depths": [0.0, 0.5, 1.0], "trials": 12}}},
    "methods": {"methods": {"mambaextend": {}}},
}


@pytest.mark.parametrize("what", list(WIDER))
def test_a_finished_study_is_widened_by_editing_its_file(tmp_path, what, monkeypatch):
    monkeypatch.setattr(fake_engine, "score", lambda setting, sample: unit(sample.id, setting.method))
    COMPUTED.clear()
    first = sweep(small_study(tmp_path, search={"trials": 4}), make_engine=Noting)
    before = set(COMPUTED)
    COMPUTED.clear()
    second = sweep(small_study(tmp_path, search={"trials": 7}, **WIDER[what]), make_engine=Noting)
    assert COMPUTED and not before & set(COMPUTED)
    settings = [(one.method, one.params) for one in second.data.trials]
    assert all((one.method, one.params) in settings for one in first.data.trials)
    assert len(settings) == 8 and second.data.samples.num_rows > first.data.samples.num_rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl_c"])
def test_a_stopped_command_says_how_to_go_on(tmp_path, monkeypatch, number):
    class Stopped(InstantEngine):
        batches = 0

        def evaluate(self, setting, task, samples, alone):
            self.batches += 1
            if self.batches == 5:
                os.kill(os.getpid(), number)
            return super().evaluate(setting, task, samples, alone)

    path = tmp_path / "study.yaml"
    path.write_text(saved_form(small_study(tmp_path)))
    monkeypatch.setattr(model_engine, "load_engine", Stopped)
    stopped = CliRunner().invoke(build_app(), ["sweep", str(path), "--set", f"output={tmp_path / 'runs'}", "--plain"])
    assert stopped.exit_code == 130 and "The same command goes on" in stopped.output
