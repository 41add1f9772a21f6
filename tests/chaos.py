"""Chaos: real processes of a running study get a real SIGKILL, and the study ends as if nobody had touched it.

An Arena holds what a study runs among: Ray, and a fork server with everything imported, so that a kill costs seconds
and not a minute. The studies are eight raced trials on two workers with Tune and MLflow; the model is the instant one
of the tests, slowed down so that blows find work under way.

A blow falls at a seeded point: a driver's after a share of its start-up, of its work items, or of its end; a worker's
after a share of the work items; a Tune trial's, and an MLflow server's, some time after it was seen at work. Then the
same command is given until it ends well, and everything but times is compared with a study that nobody disturbed.

tests/test_chaos.py deals a few blows, `make chaos` (tests/chaos_report.py) twenty a victim.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

import psutil

from statespan.config import Study
from statespan.orchestration.databases import make_whole
from statespan.orchestration.tracking import make_tables
from tests.studies import essence, mlflow_runs, small_study

Victim = Literal["driver", "worker", "trial", "mlflow", "sigterm", "sigint"]
"""Who is killed; `sigterm` and `sigint` ask the driver to stop, the latter as Ctrl-C does, with its whole group."""

INTERRUPTED = 130
SECONDS = 0.02
"""A sample takes, so that a study has some seconds of work."""

PATIENCE = 240.0
"""Seconds after which a run of a study counts as hanging."""

PRELOAD = ["tests.chaos_imports"]
STARTING, ENDING = 0.15, 0.8
"""Shares of a driver's blows that fall before the first work item, and before the last one."""


def chaos_study(model: Path, output: Path, mlflow: str, address: str) -> Study:
    study = small_study(
        model,
        workers={"backend": "ray", "count": 2, "item_samples": 4, "item_timeout_seconds": 60.0},
        cluster={"address": address},
        tracking={"mlflow": mlflow},
    )
    return study.model_copy(update={"output": output})


def drive(model: Path, output: Path, mlflow: str, address: str) -> None:
    """The command: one run of the study, in a process of its own that forks none of the caller's state."""
    os.setsid()
    log = os.open(output / "driver.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import ray

    from statespan.orchestration.pool import Interrupted
    from statespan.orchestration.sweep import sweep
    from tests import fake_engine

    ray.cloudpickle.register_pickle_by_value(fake_engine)
    study = chaos_study(model, output, mlflow, address)
    try:
        sweep(study, make_engine=lambda spec: fake_engine.InstantEngine(spec, seconds=SECONDS))
    except Interrupted:
        sys.exit(INTERRUPTED)


def serve_mlflow(folder: Path, port: int) -> None:
    """The application behind `mlflow server`."""
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder / 'mlflow.db'}"
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = "mlflow-artifacts:/"
    os.environ["_MLFLOW_SERVER_ARTIFACT_DESTINATION"] = str(folder / "artifacts")
    os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "true"
    import uvicorn
    from mlflow.server.fastapi_app import app

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical")


@dataclass
class MlflowServer:
    arena: Arena
    folder: Path
    port: int = 0
    process: Any = None

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        make_whole(f"sqlite:///{self.folder / 'mlflow.db'}", make_tables)
        self.process = self.arena.fork(serve_mlflow, self.folder, self.port)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self.uri + "/health", timeout=2):
            return True
        return False

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + PATIENCE
        while not self.answers():
            assert time.monotonic() < end and self.process.is_alive(), "MLflow did not start"
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@dataclass
class Arena:
    """Where studies run: a standing Ray, and one checkpoint."""

    model: Path
    address: str
    context: Any = field(default_factory=lambda: multiprocessing.get_context("forkserver"))

    def __post_init__(self) -> None:
        self.context.set_forkserver_preload(PRELOAD)

    def fork(self, work: Any, *arguments: Any) -> Any:
        process = self.context.Process(target=work, args=arguments)
        process.start()
        return process

    def study(self, output: Path, mlflow: str) -> Study:
        output.mkdir(parents=True, exist_ok=True)
        return chaos_study(self.model, output, mlflow, self.address)

    def run(self, study: Study) -> Any:
        """Give the command once; returns its process."""
        arguments = (self.model, study.output, study.tracking.mlflow, study.cluster.address)
        return self.fork(drive, *arguments)


@dataclass(frozen=True, slots=True)
class Blow:
    victim: Victim
    share: float
    """Of what the victim does, from 0 to 1."""

    def sooner(self) -> Blow:
        """For one whose moment never came: an end takes less time in a process that has done it before."""
        begin = ENDING if self.victim == "driver" and self.share > ENDING else 0.0
        return Blow(self.victim, (begin + self.share) / 2)


def blows(victim: Victim, count: int, seed: int) -> list[Blow]:
    """One a stratum, so that early, middle and late are all met; in order."""
    rng = Random(f"{seed} {victim}")
    return [Blow(victim, (place + rng.random()) / count) for place in range(count)]


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A study that nobody touched: what it came to, and how it went."""

    whole: dict[str, Any]
    items: int
    start_seconds: float
    """Until the first work item was done."""

    end_seconds: float
    """From the choice of a winner to the end."""


def undisturbed(arena: Arena, output: Path, mlflow: str = "auto") -> Undisturbed:
    """Run a study in peace, and look on."""
    study, began = arena.study(output, mlflow), time.monotonic()
    process, items, first, chosen = arena.run(study), 0, 0.0, 0.0
    while process.is_alive():
        items = max(items, items_done(study))
        first = first or (time.monotonic() if items else 0.0)
        chosen = chosen or (time.monotonic() if (study.folder / "choice.json").exists() else 0.0)
        time.sleep(0.01)
    process.join()
    assert process.exitcode == 0, last_words(study)
    return Undisturbed(whole(study), items, first - began, time.monotonic() - chosen)


def ray_processes(title: str) -> list[psutil.Process]:
    """This process's own descendants to which Ray gave this title."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            if one.cmdline()[0].startswith(title):
                found.append(one)
    return found


def last_words(study: Study) -> str:
    """What its drivers printed last."""
    return (study.output / "driver.log").read_text()[-3000:]


def items_done(study: Study) -> int:
    return len(list((study.folder / "ledger").glob("item-*.parquet")))


@dataclass
class Disturbance:
    """Deals blows to a study until they are all dealt and the command has ended well."""

    arena: Arena
    study: Study
    usual: Undisturbed
    server: MlflowServer | None = None
    dealt: list[tuple[Blow, str]] = field(default_factory=list)
    """What was killed, and when."""

    runs: int = 0
    _process: Any = None
    _began: float = 0.0

    def deal(self, waiting: list[Blow]) -> list[Blow]:
        """Run the command with these blows until it ends well; returns those it gave no occasion for."""
        todo = [*waiting]
        while True:
            self._process, self._began = self.arena.run(self.study), time.monotonic()
            self.runs += 1
            while todo and self._occasion(todo[0]):
                blow = todo.pop(0)
                self._hit(blow)
            self._process.join(PATIENCE)
            assert self._process.exitcode is not None, f"a run hangs: {last_words(self.study)}"
            if self._process.exitcode == 0:
                return todo
            stopped = (-signal.SIGKILL, INTERRUPTED)
            assert self._process.exitcode in stopped, f"a run failed: {last_words(self.study)}"

    # ---- waiting for the moment

    def _occasion(self, blow: Blow) -> bool:
        """Wait for the blow's moment; False where the run ended before it came."""
        wait = {"trial": self._seen_at_work, "mlflow": self._seen_at_work, "driver": self._driver_moment}
        return wait.get(blow.victim, self._worker_moment)(blow) and self._process.is_alive()

    def _until(self, true: Any, seconds: float = PATIENCE) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.is_alive():
            if true():
                return True
            time.sleep(0.01)
        return False

    def _driver_moment(self, blow: Blow) -> bool:
        if blow.share < STARTING:
            moment = self._began + self.usual.start_seconds * blow.share / STARTING
            return self._until(lambda: time.monotonic() >= moment)
        if blow.share < ENDING:
            return self._worker_moment(Blow("driver", (blow.share - STARTING) / (ENDING - STARTING)))
        chosen = self.study.folder / "choice.json"
        if not self._until(chosen.exists):
            return False
        time.sleep(self.usual.end_seconds * (blow.share - ENDING) / (1 - ENDING))
        return True

    def _worker_moment(self, blow: Blow) -> bool:
        return self._until(lambda: items_done(self.study) >= blow.share * self.usual.items)

    def _seen_at_work(self, blow: Blow) -> bool:
        """A trial's process, or a server that answers after the study's first run was written."""
        seen = self._server_works if blow.victim == "mlflow" else lambda: bool(ray_processes("ray::ImplicitFunc"))
        if not self._until(seen):
            return False
        time.sleep(blow.share)
        return bool(blow.victim == "mlflow" or ray_processes("ray::ImplicitFunc"))

    def _server_works(self) -> bool:
        assert self.server is not None
        return items_done(self.study) > 0 and self.server.answers()

    # ---- the blow

    def _hit(self, blow: Blow) -> None:
        when = (
            f"{items_done(self.study)} of {self.usual.items} items, {time.monotonic() - self._began:.1f} s into the run"
        )
        if blow.victim == "driver":
            self._process.kill()
        elif blow.victim == "sigterm":
            self._process.terminate()
        elif blow.victim == "sigint":
            os.killpg(self._process.pid, signal.SIGINT)
        elif blow.victim == "mlflow":
            assert self.server is not None
            self.server.kill()
            self.server.start()
        else:
            title = "ray::WorkerActor" if blow.victim == "worker" else "ray::ImplicitFunc"
            found = ray_processes(title)
            if not found:
                return
            Random(blow.share).choice(found).kill()
        self.dealt.append((blow, when))


def whole(study: Study) -> dict[str, Any]:
    """All that must not depend on what happened on the way, MLflow included."""
    return {**essence(study), "mlflow": mlflow_runs(study)}


def different(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [name for name in wanted if found[name] != wanted[name]]


def where(found: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """The places in which two contents differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in {**wanted, **found}:
            yield from where(found.get(name), wanted.get(name), f"{path}/{name}")
    elif found != wanted:
        yield f"{path}: {str(found)[:200]} in place of {str(wanted)[:200]}"


@contextlib.contextmanager
def served(arena: Arena, folder: Path) -> Iterator[MlflowServer]:
    folder.mkdir(parents=True, exist_ok=True)
    server = MlflowServer(arena, folder)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()
