"""The worker: one process, one model, every trial of the study on its share of the samples.

`Worker` is a plain class, so tests call it with no cluster; cluster.py makes it an actor. A sample that fails comes
back as an outcome, not as an exception: to a search, out of memory is a data point. Only a dead process raises, in the
driver.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa

from statespan.benchmarks.base import Sample
from statespan.errors import UserError
from statespan.orchestration.items import SampleOutcome, Setting, WorkItem, WorkResult
from statespan.orchestration.samples import SampleSet
from statespan.orchestration.vitals import vitals


class OutOfMemory(Exception):
    """A batch did not fit. The worker halves it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What a worker needs to know; picklable, and the same for all workers of a study."""

    model: str
    revision: str | None
    digest: str
    """The driver's digest of the weights; a worker that finds other weights refuses to start."""

    train_length: int | None
    dtype: str
    device: str
    deterministic: bool
    batch_tokens: int
    tasks: Mapping[str, tuple[str, Mapping[str, Any]]]
    """Task -> (benchmark, settings)."""

    threads: int = 1
    store_bytes: int = 0
    """Host memory for what trials share; 0 shares nothing."""

    gpu_store_bytes: int = 0
    """GPU memory for the part of it that was used last."""

    memory_fraction: float = 1.0
    """Share of the GPU's memory this worker may take."""


class Engine(Protocol):
    """What computes: the loaded model, or a stand-in for tests of everything around it."""

    def evaluate(self, setting: Setting, task: str, samples: Sequence[Sample], alone: bool) -> list[SampleOutcome]:
        """Run the samples as one batch; `row` and `key` of the outcomes are filled in by the worker.

        Raises OutOfMemory where the batch does not fit.
        """
        ...

    def free(self) -> None:
        """Give back all memory that is only kept for speed."""
        ...

    @property
    def rows_apart(self) -> bool:
        """Whether a sample of a batch gets what it gets alone, bit for bit, where results are to be deterministic."""
        ...


MakeEngine = Callable[[WorkerSpec], Engine]


@dataclass(slots=True)
class BatchLimit:
    """Prompt tokens that fit at once, learned from what did not. Pure, so that every case is a line of a test."""

    tokens: int
    one_by_one: bool
    """Where results shall not depend on neighbours, and a batch's would."""

    def samples(self, length: int) -> int:
        """Samples of this length that run together."""
        return 1 if self.one_by_one else max(1, self.tokens // max(length, 1))

    def too_much(self, samples: int, length: int) -> None:
        self.tokens = min(self.tokens, max(samples * length // 2, 1))


@dataclass(slots=True)
class Worker:
    spec: WorkerSpec
    table: pa.Table
    make_engine: MakeEngine
    name: str = field(default_factory=lambda: f"worker-{os.getpid()}")
    _engine: Engine | None = None
    _samples: SampleSet | None = None
    _limit: BatchLimit | None = None

    def start(self) -> None:
        """Load the model, once."""
        if self._engine is None:
            self._engine = self.make_engine(self.spec)
            self._samples = SampleSet(self.table, ())
            one_by_one = self.spec.deterministic and not self._engine.rows_apart
            self._limit = BatchLimit(self.spec.batch_tokens, one_by_one)

    def run(self, item: WorkItem, batch_tokens: int | None = None) -> WorkResult:
        """Evaluate an item.

        Args:
            item: what to do.
            batch_tokens: what other workers have learned fits.
        """
        self.start()
        assert self._limit is not None and self._samples is not None
        if batch_tokens is not None:
            self._limit.tokens = min(self._limit.tokens, batch_tokens)
        started, learned, cpu = time.perf_counter(), self._limit.tokens, time.process_time()
        outcomes: list[SampleOutcome] = []
        while len(outcomes) < len(item.rows):
            size = 1 if item.alone else self._limit.samples(item.length)
            rows = item.rows[len(outcomes) : len(outcomes) + size]
            keys = item.keys[len(outcomes) : len(outcomes) + size]
            outcomes += self._batch(item, rows, keys)
        return WorkResult(
            item_id=item.id,
            outcomes=tuple(outcomes),
            seconds=time.perf_counter() - started,
            worker=self.name,
            batch=self._limit.tokens,
            ran_out=self._limit.tokens < learned,
            vitals=vitals(time.process_time() - cpu),
        )

    def _batch(self, item: WorkItem, rows: Sequence[int], keys: Sequence[str]) -> list[SampleOutcome]:
        """Outcomes of these rows; none where the batch did not fit and shall be cut smaller."""
        assert self._engine is not None and self._samples is not None and self._limit is not None
        samples = [self._samples.sample(row) for row in rows]
        try:
            found = self._fitting(item, samples)
        except OutOfMemory as error:
            if len(rows) == 1:
                return [_failed(rows[0], keys[0], "oom", str(error))]
            self._limit.too_much(len(rows), item.length)
            return []
        except Exception as error:
            if len(rows) > 1:  # find the one that fails
                return [self._batch(item, [row], [key])[0] for row, key in zip(rows, keys, strict=True)]
            return [_failed(rows[0], keys[0], "failed", _explain(error))]
        return [replace(one, row=row, key=key) for one, row, key in zip(found, rows, keys, strict=True)]

    def _fitting(self, item: WorkItem, samples: Sequence[Sample]) -> list[SampleOutcome]:
        """Evaluate; where memory runs out, once more without the streams that are kept for other trials."""
        assert self._engine is not None
        try:
            return self._engine.evaluate(item.setting, item.task, samples, item.alone)
        except OutOfMemory:
            pass  # outside the handler, so that no traceback keeps the tensors alive
        gc.collect()
        self._engine.free()
        return self._engine.evaluate(item.setting, item.task, samples, item.alone)


def _failed(row: int, key: str, status: Any, error: str) -> SampleOutcome:
    return SampleOutcome(row=row, key=key, status=status, score=float("nan"), error=error)


def _explain(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"
