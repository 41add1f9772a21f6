"""A study that is killed anywhere and run again by the same command is the study of an uninterrupted run.

Drivers are forked from this process, so that a kill costs milliseconds; tests/test_chaos.py kills whole process trees.
"""

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest

from statespan.orchestration import files
from statespan.orchestration.files import DiskFull
from statespan.orchestration.ledger import Ledger
from statespan.orchestration.pool import Interrupted
from statespan.orchestration.status import read_status
from statespan.orchestration.sweep import sweep
from tests.fake_engine import InstantEngine, instant
from tests.studies import essence, small_study

KILLS = 8
SEED = 20261122


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The model and an uninterrupted study with its essence; and how many durable writes it took."""
    folder = tmp_path_factory.mktemp("whole")
    study, writes = small_study(folder), []
    original = files.write_bytes
    files.write_bytes = lambda path, data: (writes.append(path), original(path, data))[1]
    try:
        sweep(study, make_engine=instant)
    finally:
        files.write_bytes = original
    return folder, essence(study), len(writes)


def beside(template, folder):
    """The same study in another place, on the same model (whose path is part of best.json)."""
    study = small_study(template[0])
    return study.model_copy(update={"output": folder / "runs"})


def in_child(work):
    """Run in a forked process; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at(write, after_rename):
    """Replace durable writes by ones of which number `write` is never finished."""
    count, original = [0], os.replace

    def replace(source, target):
        count[0] += 1
        if count[0] == write and not after_rename:
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)
        if count[0] == write and after_rename:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.replace = replace


def points(writes):
    rng = Random(SEED)
    return [(rng.randrange(1, writes), rng.random() < 0.5) for _ in range(KILLS)]


def test_killed_at_random_writes_the_study_ends_the_same(template, tmp_path):
    study = beside(template, tmp_path)
    for write, after_rename in points(template[2]):

        def work(write=write, after_rename=after_rename):
            killed_at(write, after_rename)
            sweep(study, make_engine=instant)

        assert in_child(work) in (-signal.SIGKILL, 0)
    sweep(study, make_engine=instant)
    assert essence(study) == template[1]


def test_killed_at_random_times_the_study_ends_the_same(template, tmp_path):
    study, rng = beside(template, tmp_path), Random(SEED)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                sweep(study, make_engine=lambda spec: InstantEngine(spec, seconds=0.001))
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.2, 1.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    sweep(study, make_engine=instant)
    assert essence(study) == template[1]


@pytest.mark.parametrize("how", ["sigterm", "sigint"])
def test_a_signal_drains_and_the_same_command_goes_on(template, tmp_path, how):
    study = beside(template, tmp_path)
    number = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT}[how]

    class Signals(InstantEngine):
        batches = 0

        def evaluate(self, *arguments):
            self.batches += 1
            if self.batches == 30:
                os.kill(os.getpid(), number)
            return super().evaluate(*arguments)

    with pytest.raises(Interrupted):
        sweep(study, make_engine=Signals)
    status = read_status(study.folder)
    assert (status.phase, status.message) == ("stopped", "the same command goes on")
    sweep(study, make_engine=instant)
    assert essence(study) == template[1]


def test_torn_and_missing_ledger_files_are_computed_again(template, tmp_path):
    study = beside(template, tmp_path)
    sweep(study, make_engine=instant)
    largest = max(Ledger(study.folder / "ledger").files(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    sweep(study, make_engine=instant)
    assert essence(study) == template[1]
    assert list((study.folder / "ledger" / "quarantine").iterdir())


@pytest.mark.parametrize(
    "lost", ["optuna.db", "samples.parquet", "choice.json", "best.json", "facts.json", "status.json"]
)
def test_a_lost_file_is_made_again(template, tmp_path, lost):
    study = beside(template, tmp_path)
    sweep(study, make_engine=instant)
    (study.folder / lost).unlink()
    sweep(study, make_engine=instant)
    assert essence(study) == template[1]


def test_a_full_disk_stops_with_its_reason_and_loses_nothing(template, tmp_path, monkeypatch):
    study = beside(template, tmp_path)
    original, count = files.write_bytes, [0]

    def filling(path, data):
        count[0] += 1
        if count[0] > 25:
            raise DiskFull(28, f"no space left to write {path}")
        original(path, data)

    with monkeypatch.context() as full:
        full.setattr(files, "write_bytes", filling)
        with pytest.raises(DiskFull, match="no space left to write"):
            sweep(study, make_engine=instant)
    sweep(study, make_engine=instant)
    assert essence(study) == template[1]


def test_a_locked_optuna_database_does_not_stop_the_study(template, tmp_path, monkeypatch):
    from statespan.orchestration.mirror import Mirror

    study = beside(template, tmp_path)

    def locked(self):
        raise OSError("database is locked")

    with monkeypatch.context() as broken:
        broken.setattr(Mirror, "sync", locked)
        result = sweep(study, make_engine=instant)
    assert result.verdict.sentence and not (study.folder / "optuna.db").exists()
    sweep(study, make_engine=instant)
    assert essence(study) == template[1]


def test_what_a_dead_driver_was_writing_is_not_left_lying_about(template, tmp_path):
    study = beside(template, tmp_path)
    in_child(lambda: (killed_at(20, False), sweep(study, make_engine=instant)))
    sweep(study, make_engine=instant)
    assert not list(Path(study.folder).rglob("*.tmp"))
