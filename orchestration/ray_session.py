"""This process's part in a Ray cluster: joining one or starting one, and leaving it. Imports no torch.

`address: local` starts Ray for this study on this machine and ends it with the study; `auto` joins the cluster the
machine belongs to (RAY_ADDRESS, a job's own cluster). Token authentication follows RAY_AUTH_MODE; where nothing is
said, a local Ray gets a token of its own: its ports are open on all of the machine's addresses. The token lives in the
environment of its processes only, so that no file is put into the user's home.

Starting Ray takes some seconds, in which most of the work is other processes': `Session.begin` does it from a thread of
its own while this process imports and plans.
"""

from __future__ import annotations

import inspect
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from statespan.config import Cluster, Study
from statespan.errors import UserError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that a signal ends before its first rung reports nothing
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
CHOICE = "choice.json"
"""As `assemble.CHOICE`, which imports much."""

OBJECT_STORE_BYTES = 256 * 1024**2
STARTS = 3
"""Tries to start Ray on a machine that is too busy for its 30 seconds."""

NEEDLESS = {"no_monitor": True, "include_log_monitor": False}
"""What `ray start` can be told and `ray.init` cannot: no autoscaler on one machine, and no reader of worker logs where
the driver wants none. Each is a Python process less."""

logger = logging.getLogger(__name__)


def quiet() -> None:
    """Environment of every process of a study: no telemetry, no loggers we do not use. What is set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def cpu_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(cluster: Cluster, threads: int) -> dict[str, str]:
    """What a study's workers find in their environment."""
    each = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**QUIET, **dict.fromkeys(each, str(threads)), **cluster.env}


def join(cluster: Cluster, environment: Mapping[str, str] | None = None) -> bool:
    """Make this process a Ray driver. True where it was none before, so that the caller must leave again.

    Args:
        environment: of all processes of a Ray that is started here.
    """
    quiet()
    import ray

    # not from the main thread it warns that it sets no handler for SIGTERM, which suits us: the driver has its own
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    if ray.is_initialized():
        return False
    common: dict[str, Any] = {
        "namespace": cluster.namespace,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    local = cluster.address == "local"
    if local:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # one CPU more than there is: Tune's trials only wait for results
        common |= {"num_cpus": cpu_cores() + 1, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    for attempt in range(STARTS):
        try:
            with _lean(), _environment(environment if local and environment else {}):
                ray.init(address=cluster.address, **common)
            return True
        except Exception as error:  # a raylet that is late on a busy machine raises a bare Exception
            ray.shutdown()
            if attempt + 1 == STARTS or "timed out" not in str(error):
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"cluster.address {cluster.address!r}: Ray did not start or answer ({reason}); "
                    "`local` needs no cluster, and `statespan doctor` looks for what is wrong"
                ) from error
            logger.warning("Ray did not start within 30 s; trying again")
    raise AssertionError("unreachable")


@contextmanager
def _lean() -> Iterator[None]:
    """Have `ray.init` start none of the needless processes, where this Ray knows the options."""
    from ray._private import parameter

    module: Any = parameter
    whole = module.RayParams
    known = {name: value for name, value in NEEDLESS.items() if name in inspect.signature(whole).parameters}
    module.RayParams = partial(whole, **known)
    try:
        yield
    finally:
        module.RayParams = whole


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def leave() -> None:
    import ray

    ray.shutdown()


class Session:
    """A study's stay in a Ray cluster: begun in good time, joined when it is needed, left at the end.

    A thread of its own starts Ray and ends it. It lives as long: Ray asks the kernel to end its processes with their
    parent, which to the kernel is the thread that started them.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._joined = False
        self.actors: list[Any] = []
        """Workers that have begun to start; `RayBackend` takes them."""

        self._there, self._over = threading.Event(), threading.Event()

    def begin(self) -> None:
        """Start to join, if this is not done yet."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._stay, name="Ray", daemon=True)
            self._thread.start()

    def begin_early(self) -> None:
        """`begin`, where the study needs Ray for certain: nothing was chosen yet, so it is not done."""
        if self.study.workers.backend == "ray" and not (self.study.folder / CHOICE).exists():
            self.begin()

    def _stay(self) -> None:
        cluster = self.study.cluster
        try:
            self._joined = join(cluster, worker_environment(cluster, self.study.workers.threads))
            if self.has_environment:
                from statespan.orchestration.cluster import prepare_actors

                self.actors = prepare_actors(self.study)
        except BaseException as error:
            self._failure = error
        finally:
            self._there.set()
        if self._joined:
            self._over.wait()
            leave()

    def wait(self) -> None:
        """Until this process is a driver. Raises UserError where Ray does not start or answer."""
        self.begin()
        self._there.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def has_environment(self) -> bool:
        """Whether every process of this Ray has the workers' environment: it was started here, and for this study."""
        return self._joined and self.study.cluster.address == "local"

    def leave(self) -> None:
        """End what was begun."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
