"""The pool, driver side: items out, results in, whatever happens to the workers.

A worker has at most two items (one running, one waiting, so that it never idles between them). An item whose worker
died or took too long is tried again, then given up as failed samples. A worker that keeps dying is removed and its
share moves to the others. What fits a batch, once learned by one worker, holds for all.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from statespan.orchestration.items import SampleOutcome, WorkItem, WorkResult
from statespan.orchestration.schedule import Board, CostModel

logger = logging.getLogger(__name__)
IN_FLIGHT = 2
ATTEMPTS = 3
"""Times an item is begun before its samples count as failed."""

PATIENCE = 0.25
"""Seconds between two looks at the clock."""

DEATHS = 5
"""Deaths in a row, without an item done in between, after which a worker is not started again."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something a worker did: it became ready, finished an item, or died."""

    worker: str
    kind: Literal["ready", "done", "died"]
    result: WorkResult | None = None
    error: str = ""
    fatal: bool = False
    """A death that starting again cannot help: bad settings, other weights."""


class Backend(Protocol):
    """Where workers live: in this process, or as Ray actors."""

    def start(self) -> list[str]:
        """Begin to start the workers; a `ready` event follows for each."""
        ...

    def submit(self, worker: str, item: WorkItem, batch_tokens: int | None) -> None: ...

    def wait(self, seconds: float) -> list[Event]:
        """Events since the last call; waits so long at most where there is none."""
        ...

    def restart(self, worker: str) -> None:
        """End the worker, whatever it does, and begin to start it anew."""
        ...

    def close(self) -> None: ...


class WorkNeeded(Exception):
    """There is something to compute, and no worker was asked for yet."""


class PoolBroken(RuntimeError):
    """No worker is left. The study stops; the same command goes on with it."""


class Interrupted(Exception):
    """The pool was asked to stop and has nothing in flight any more."""


@dataclass(slots=True)
class Slot:
    """One worker as the driver sees it."""

    ready: bool = False
    items: deque[WorkItem] = field(default_factory=deque)
    since: float = 0.0
    """When the first of its items began to run."""

    deaths: int = 0


@dataclass(slots=True)
class Pool:
    backend: Backend
    item_timeout: float = 1_800.0
    start_timeout: float = 900.0
    on_change: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    cost: CostModel = field(default_factory=CostModel)
    batch_tokens: int | None = None
    slots: dict[str, Slot] = field(default_factory=dict)
    restarts: int = 0
    stopping: bool = False
    _attempts: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _board: Board = field(init=False)

    def __post_init__(self) -> None:
        self._board = Board(self.cost)

    def start(self) -> None:
        """Begin to start the workers, if they are not started."""
        if not self.slots:
            self.slots = {worker: Slot(since=self.clock()) for worker in self.backend.start()}

    def stop(self) -> None:
        """Begin nothing new; `run` raises Interrupted when what is in flight is done."""
        self.stopping = True

    def close(self) -> None:
        self.backend.close()

    @property
    def in_flight(self) -> int:
        return sum(len(slot.items) for slot in self.slots.values())

    @property
    def waiting(self) -> int:
        return len(self._board)

    @property
    def tokens_left(self) -> int:
        """Prompt tokens of the items given so far that are not done."""
        running = sum(item.tokens for slot in self.slots.values() for item in slot.items)
        return running + sum(item.tokens for queue in self._board.queues.values() for pack in queue for item in pack)

    def seconds_left(self) -> float | None:
        """Predicted seconds until the items given so far are done; None before anything was measured."""
        if not self.cost.measured or not self.slots:
            return None
        running = sum(self.cost.seconds(item) for slot in self.slots.values() for item in slot.items)
        return (sum(map(self._board.left, self.slots)) + running) / len(self.slots)

    def run(self, items: Iterable[WorkItem]) -> Iterator[tuple[WorkItem, WorkResult]]:
        """Do the items; yields each with its result as it is done, in no order.

        Raises:
            Interrupted: `stop` was called.
            PoolBroken: no worker is left.
        """
        todo = list(items)
        if not todo:
            return
        self.start()
        self._board.fill(todo, list(self.slots))
        try:
            while len(self._board) or self.in_flight:
                if self.stopping and not self.in_flight:
                    raise Interrupted
                self._dispatch()
                for event in self.backend.wait(PATIENCE):
                    yield from self._handle(event)
                yield from self._expire()
                self.on_change()
        finally:
            self._board.clear()

    def _dispatch(self) -> None:
        for worker, slot in self.slots.items():
            while slot.ready and len(slot.items) < IN_FLIGHT and not self.stopping:
                item = self._board.take(worker)
                if item is None:
                    break
                if not slot.items:
                    slot.since = self.clock()
                slot.items.append(item)
                self.backend.submit(worker, item, self.batch_tokens)

    def _handle(self, event: Event) -> Iterator[tuple[WorkItem, WorkResult]]:
        slot = self.slots.get(event.worker)
        if slot is None:  # a removed worker's last word
            return
        if event.kind == "ready":
            slot.ready = True
        elif event.kind == "died":
            yield from self._died(event.worker, event.error, event.fatal)
        elif event.result is not None:
            item = next((one for one in slot.items if one.id == event.result.item_id), None)
            if item is None:
                return
            slot.items.remove(item)
            slot.since, slot.deaths = self.clock(), 0
            self._learn(item, event.result)
            yield item, event.result

    def _learn(self, item: WorkItem, result: WorkResult) -> None:
        self.cost.learn(item, result.seconds, sum(one.layer_tokens for one in result.outcomes))
        if result.ran_out:
            self.batch_tokens = min(self.batch_tokens or result.batch, result.batch)
            logger.warning("out of memory: batches hold %d tokens from now on", self.batch_tokens)

    def _died(self, worker: str, error: str, fatal: bool) -> Iterator[tuple[WorkItem, WorkResult]]:
        slot = self.slots[worker]
        lost, slot.items, slot.ready = list(slot.items), deque(), False
        slot.deaths += 1
        if lost:  # only the first was running: the others did not kill it
            self._attempts[lost[0].id] += 1
        for item in reversed(lost):
            if self._attempts[item.id] >= ATTEMPTS:
                yield item, _given_up(item, worker, error)
            else:
                self._board.put_back(item, worker)
        if fatal:
            raise PoolBroken(error)
        if slot.deaths >= DEATHS:
            self._remove(worker, error)
            return
        logger.warning("worker %s died (%s); starting it again", worker, error)
        slot.since = self.clock()
        self.restarts += 1
        self.backend.restart(worker)

    def _remove(self, worker: str, error: str) -> None:
        logger.error("worker %s died %d times in a row and is given up: %s", worker, DEATHS, error)
        del self.slots[worker]
        if not self.slots:
            raise PoolBroken(f"every worker died {DEATHS} times in a row; the last one said: {error}")
        self._board.remove(worker)

    def _expire(self) -> Iterator[tuple[WorkItem, WorkResult]]:
        now = self.clock()
        for worker, slot in list(self.slots.items()):
            if slot.items and slot.ready and now - slot.since > self.item_timeout:
                yield from self._died(worker, f"an item took longer than {self.item_timeout:.0f} s", fatal=False)
            elif not slot.ready and now - slot.since > self.start_timeout:
                yield from self._died(worker, f"it did not start within {self.start_timeout:.0f} s", fatal=False)


def _given_up(item: WorkItem, worker: str, error: str) -> WorkResult:
    status: Literal["timeout", "failed"] = "timeout" if "took longer" in error else "failed"
    outcomes = tuple(
        SampleOutcome(
            row=row, key=key, status=status, score=float("nan"), error=f"given up after {ATTEMPTS} tries: {error}"
        )
        for row, key in zip(item.rows, item.keys, strict=True)
    )
    return WorkResult(item_id=item.id, outcomes=outcomes, seconds=0.0, worker=worker, batch=0)


class NoBackend:
    """No workers: what is known is enough, or WorkNeeded says that it is not."""

    def start(self) -> list[str]:
        raise WorkNeeded

    def submit(self, worker: str, item: WorkItem, batch_tokens: int | None) -> None:
        raise AssertionError("nothing was started")

    def wait(self, seconds: float) -> list[Event]:
        return []

    def restart(self, worker: str) -> None:
        raise AssertionError("nothing was started")

    def close(self) -> None:
        return None


class InlineBackend:
    """One worker in this process; an item runs when its result is waited for."""

    def __init__(self, make_worker: Callable[[str], RunsItems]) -> None:
        self._make = make_worker
        self._worker: RunsItems | None = None
        self._queue: deque[tuple[WorkItem, int | None]] = deque()
        self._announce = False

    def start(self) -> list[str]:
        self._worker, self._announce = self._make("inline"), True
        return ["inline"]

    def submit(self, worker: str, item: WorkItem, batch_tokens: int | None) -> None:
        self._queue.append((item, batch_tokens))

    def wait(self, seconds: float) -> list[Event]:
        if self._announce:
            self._announce = False
            return [Event("inline", "ready")]
        if not self._queue:
            return []
        assert self._worker is not None
        item, batch_tokens = self._queue.popleft()
        return [Event("inline", "done", self._worker.run(item, batch_tokens))]

    def restart(self, worker: str) -> None:
        """Nothing in this process can die without it; a timeout is only noticed after the item is done."""
        self._announce = True

    def close(self) -> None:
        self._worker = None


class RunsItems(Protocol):
    def run(self, item: WorkItem, batch_tokens: int | None = None) -> WorkResult: ...
