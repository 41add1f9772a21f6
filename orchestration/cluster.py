"""Ray: how many workers a cluster gets, and workers as its actors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from statespan.config import Cluster, Study, Workers
from statespan.errors import UserError
from statespan.orchestration.gpu_share import Share, equal_parts
from statespan.orchestration.items import WorkItem
from statespan.orchestration.pool import Event
from statespan.orchestration.ray_session import cpu_cores, worker_environment
from statespan.orchestration.worker import MakeEngine, Worker, WorkerSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """How many workers there are and what each takes."""

    count: int
    cpus: float
    gpus: float
    memory_fraction: float


def layout(workers: Workers, device: str, resources: Mapping[str, float], share: Share | None = None) -> Layout:
    """Workers for a cluster's resources. Pure. `share` is what was measured for `per_gpu: auto`; else one a GPU."""
    if device == "cuda":
        share = share or equal_parts(1 if workers.per_gpu == "auto" else workers.per_gpu)
        per_gpu, gpus = share.per_gpu, int(resources.get("GPU", 0))
        count = workers.count if workers.count != "auto" else gpus * per_gpu
        if count == 0:
            raise UserError(
                "numerics.device is cuda and the cluster has no GPU now; give workers.count to wait for some"
            )
        return Layout(count, 0.5, 1.0 / per_gpu, share.memory_fraction)
    cores = int(resources.get("CPU", 1))
    local = min(cores, cpu_cores())
    count = workers.count if workers.count != "auto" else max(1, local // workers.threads)
    return Layout(count, min(float(workers.threads), 0.9 * cores / count), 0.0, 1.0)


class WorkerActor:
    """The worker in its own process, which has imported what a worker needs before it is told what it works on."""

    def __init__(self) -> None:
        from statespan.orchestration import model_engine

        assert model_engine
        self.spec: WorkerSpec | None = None
        self.worker: Worker | None = None

    def ready(self, spec: WorkerSpec, table: Any, make_engine: MakeEngine, name: str) -> WorkerSpec:
        """Become this worker and load the model, unless it is one already; what was loaded for."""
        if self.spec is None or self.worker is None:
            os.environ["OMP_NUM_THREADS"] = str(spec.threads)
            self.spec, self.worker = spec, Worker(spec, table, make_engine, name)
        self.worker.start()
        return self.spec

    def run(self, item: WorkItem, batch_tokens: int | None) -> Any:
        assert self.worker is not None, "an item came before `ready`"
        return self.worker.run(item, batch_tokens)

    def gpu_bytes(self) -> int:
        """Memory of the GPU this process sees."""
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)


def create_actor(cpus: float, gpus: float, **options: Any) -> Any:
    import ray

    remote: Any = ray.remote(WorkerActor)
    return remote.options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, **options).remote()


def prepare_actors(study: Study) -> list[Any]:
    """Workers of a Ray that was started for this study, before the study is planned: nameless, on CPUs only. Where
    there are GPUs, how many workers share one has to be found out first."""
    import ray

    found: Callable[[], dict[str, float]] = ray.cluster_resources
    resources = found()
    if resources.get("GPU") or study.cluster.detached:
        return []
    shape = layout(study.workers, "cpu", resources)
    return [create_actor(shape.cpus, shape.gpus) for _ in range(shape.count)]


class RayBackend:
    """Workers as named actors. The driver starts a dead one again, since it knows what the worker was at."""

    def __init__(
        self,
        spec: WorkerSpec,
        table: Any,
        make_engine: MakeEngine,
        *,
        names: list[str],
        cluster: Cluster,
        cpus: float,
        gpus: float,
        own_environment: bool = True,
        prepared: Sequence[Any] = (),
    ) -> None:
        """
        Args:
            own_environment: give each worker its environment; not where all of this Ray's processes have it, which may
                then become workers without starting anew.
            prepared: actors to take before others are created.
        """
        self.own_environment, self._prepared = own_environment, list(prepared)
        self.spec, self.make_engine, self.names, self.cluster = spec, make_engine, names, cluster
        self.cpus, self.gpus = cpus, gpus
        self._table = table
        self._table_ref: Any = None
        self._actors: dict[str, Any] = {}
        self._pending: dict[Any, str] = {}
        """What an actor still owes -> its worker."""

    def start(self) -> list[str]:
        import ray

        self._table_ref = ray.put(self._table)
        for name in self.names:
            self._launch(name)
        return list(self.names)

    def _launch(self, name: str) -> None:
        actor = self._found(name) or self._create(name)
        self._actors[name] = actor
        self._pending[self._ready(name)] = name

    def _ready(self, name: str) -> Any:
        return self._actors[name].ready.remote(self.spec, self._table_ref, self.make_engine, name)

    def _found(self, name: str) -> Any | None:
        """A worker that an earlier driver left running with the same model."""
        if not self.cluster.detached:
            return None
        import ray

        try:
            actor = ray.get_actor(name, namespace=self.cluster.namespace)
            asked: Any = actor.ready.remote(self.spec, self._table_ref, self.make_engine, name)
            spec: Any = ray.get(asked, timeout=60)
            if spec == self.spec:
                return actor
            ray.kill(actor, no_restart=True)
        except (ValueError, ray.exceptions.RayError):
            pass
        return None

    def _create(self, name: str) -> Any:
        if self._prepared:
            return self._prepared.pop()
        environment = worker_environment(self.cluster, self.spec.threads)
        return create_actor(
            self.cpus,
            self.gpus,
            name=name,
            namespace=self.cluster.namespace,
            lifetime="detached" if self.cluster.detached else None,
            runtime_env={"env_vars": environment} if self.own_environment else None,
        )

    def submit(self, worker: str, item: WorkItem, batch_tokens: int | None) -> None:
        self._pending[self._actors[worker].run.remote(item, batch_tokens)] = worker

    def wait(self, seconds: float) -> list[Event]:
        import ray

        if not self._pending:
            return []
        done, _ = ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        more, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        events: list[Event] = []
        for ref in dict.fromkeys([*done, *more]):
            worker = self._pending.pop(ref, None)
            if worker is not None:  # else it belonged to a worker that died meanwhile
                events.append(self._event(worker, ref))
        return events

    def _event(self, worker: str, ref: Any) -> Event:
        import ray

        try:
            value = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            self._forget(worker)
            return Event(worker, "died", error=_first_line(cause), fatal=isinstance(cause, UserError))
        except ray.exceptions.RayError as error:
            self._forget(worker)
            return Event(worker, "died", error=_first_line(error))
        return Event(worker, "ready") if isinstance(value, WorkerSpec) else Event(worker, "done", value)

    def _forget(self, worker: str) -> None:
        """Its other promises will not be kept either."""
        self._pending = {ref: name for ref, name in self._pending.items() if name != worker}

    def restart(self, worker: str) -> None:
        import ray

        self._forget(worker)
        ray.kill(self._actors[worker], no_restart=True)
        self._actors[worker] = self._renamed(worker)
        self._pending[self._ready(worker)] = worker

    def _renamed(self, worker: str) -> Any:
        """A name is free only when Ray has buried its last owner; until then the new actor goes by a fresh one."""
        try:
            return self._create(worker)
        except ValueError:
            return self._create(f"{worker}-{os.urandom(3).hex()}")

    def gpu_bytes(self) -> int:
        """Memory of the first worker's GPU."""
        import ray

        found: Any = ray.get(next(iter(self._actors.values())).gpu_bytes.remote())
        return int(found)

    def close(self) -> None:
        import ray

        if self.cluster.detached:
            return
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300]
