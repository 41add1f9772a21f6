"""Which worker does what next. Pure: no Ray, no clock.

Samples belong to workers by rendezvous hash, so that a worker that joins or dies moves only its own share. Items of one
pack (same samples, several trials) stay together on one worker, which keeps the streams they share. Each worker's packs
go longest first, by a cost model fitted to what was measured; a worker with nothing left takes the last pack of the one
with the most to do, or half of its only one.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from statespan.orchestration.items import WorkItem


def owner(name: str, workers: Sequence[str]) -> str:
    """The worker with the highest hash of (worker, name)."""
    return max(workers, key=lambda worker: hashlib.sha256(f"{worker}\0{name}".encode()).digest())


@dataclass(slots=True)
class CostModel:
    """seconds = a * layer-tokens + b * samples, least squares over what was measured, both never negative."""

    seconds_per_layer_token: float = 1e-6
    """Used until two items were measured; only the order of items depends on it."""

    seconds_per_sample: float = 0.0
    _xx: float = 0.0
    _xn: float = 0.0
    _nn: float = 0.0
    _xy: float = 0.0
    _ny: float = 0.0
    measured: int = 0

    def seconds(self, item: WorkItem) -> float:
        return self.seconds_per_layer_token * item.tokens * item.layers + self.seconds_per_sample * len(item.rows)

    def learn(self, item: WorkItem, seconds: float, layer_tokens: int) -> None:
        x, n = float(layer_tokens), float(len(item.rows))
        self._xx, self._xn, self._nn = self._xx + x * x, self._xn + x * n, self._nn + n * n
        self._xy, self._ny = self._xy + x * seconds, self._ny + n * seconds
        self.measured += 1
        determinant = self._xx * self._nn - self._xn**2
        if self.measured >= 2 and determinant > 1e-9 * self._xx * self._nn:
            a = (self._xy * self._nn - self._ny * self._xn) / determinant
            b = (self._ny * self._xx - self._xy * self._xn) / determinant
            if a >= 0.0 and b >= 0.0:
                self.seconds_per_layer_token, self.seconds_per_sample = a, b
                return
        if self._xx > 0.0:
            self.seconds_per_layer_token, self.seconds_per_sample = self._xy / self._xx, 0.0


@dataclass(slots=True)
class Board:
    """What is still to do, by worker."""

    cost: CostModel
    queues: dict[str, list[list[WorkItem]]] = field(default_factory=dict)
    """Worker -> its packs, each a list of items in order."""

    def fill(self, items: Iterable[WorkItem], workers: Sequence[str]) -> None:
        """Give the items to their owners. Items of a pack keep the order they come in."""
        packs: dict[str, list[WorkItem]] = defaultdict(list)
        for item in items:
            packs[item.pack].append(item)
        for worker in workers:
            self.queues.setdefault(worker, [])
        for name, pack in packs.items():
            self.queues[owner(name, workers)].append(pack)
        for queue in self.queues.values():
            queue.sort(key=self.pack_seconds, reverse=True)

    def take(self, worker: str) -> WorkItem | None:
        """The worker's next item, from another's share where its own is done."""
        queue = self.queues.setdefault(worker, [])
        if not queue and not self._steal(worker):
            return None
        item = queue[0].pop(0)
        if not queue[0]:
            queue.pop(0)
        return item

    def _steal(self, worker: str) -> bool:
        victim = max(self.queues, key=self.left)
        theirs = self.queues[victim]
        if victim == worker or not theirs:
            return False
        if len(theirs) > 1:
            self.queues[worker].append(theirs.pop())
            return True
        return self._split(theirs, worker)

    def _split(self, theirs: list[list[WorkItem]], worker: str) -> bool:
        """Take half of the last pack, if computing once more what its items would have shared is the shorter way."""
        half = theirs[0][-((len(theirs[0]) + 1) // 2) :]
        again = self.cost.seconds_per_layer_token * half[0].tokens * half[0].shared_layers
        if self.pack_seconds(half) + again > self.pack_seconds(theirs[0]):
            return False
        self.queues[worker].append(half)
        del theirs[0][-len(half) :]
        if not theirs[0]:
            theirs.pop()
        return True

    def put_back(self, item: WorkItem, worker: str) -> None:
        """An item that its worker could not finish: it goes first."""
        self.queues.setdefault(worker, []).insert(0, [item])

    def remove(self, worker: str) -> None:
        """A worker is gone for good: its share moves to the others."""
        items = [item for pack in self.queues.pop(worker, []) for item in pack]
        self.fill(items, list(self.queues))

    def clear(self) -> None:
        for queue in self.queues.values():
            queue.clear()

    def left(self, worker: str) -> float:
        """Predicted seconds of what a worker has not begun."""
        return sum(self.pack_seconds(pack) for pack in self.queues.get(worker, ()))

    def pack_seconds(self, pack: Sequence[WorkItem]) -> float:
        return sum(self.cost.seconds(item) for item in pack)

    def __len__(self) -> int:
        return sum(len(pack) for queue in self.queues.values() for pack in queue)
