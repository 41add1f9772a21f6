"""What trials share: hidden streams by prompt and layer, and what a layer projects of them. Bounded; the fastest first.

A GPU worker keeps what was used last on its GPU and the rest in pinned host memory, from where it comes back at the
speed of the bus; a CPU worker has one shelf. On every shelf the least recently used goes first, and what leaves the
last shelf is computed again when it is wanted. Streams and projections do not compete: a projection is some six times
the size of its stream and saves less.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from statespan.models.lm import Projected
    from statespan.models.runner import Stream

Move = Callable[[Tensor], Tensor]
T = TypeVar("T")


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in dataclasses, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)
    elif is_dataclass(value):
        for one in fields(value):
            yield from tensors(getattr(value, one.name))


def moved(value: T, move: Move) -> T:
    """The value with every tensor in it moved."""
    new: Any = value
    if isinstance(value, Tensor):
        new = move(value)
    elif isinstance(value, list | tuple):
        new = type(value)(moved(one, move) for one in value)
    elif is_dataclass(value) and not isinstance(value, type):
        new = replace(value, **{one.name: moved(getattr(value, one.name), move) for one in fields(value)})
    found: T = new
    return found


@dataclass(slots=True)
class Shelf:
    """Things in one memory, the least recently used first."""

    budget_bytes: int
    arrive: Move | None = None
    """How a tensor gets into this memory; None where it is there already."""

    things: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)
    bytes: int = 0

    def put(self, key: Hashable, thing: Any) -> list[tuple[Hashable, Any]]:
        """Put a thing on the shelf; what has to leave for it, which may be the thing itself."""
        if not self.fits(thing):
            return [(key, thing)]
        self.things[key] = self.brought(thing)
        self.bytes += _bytes(thing)
        gone = []
        while self.bytes > self.budget_bytes:
            gone.append(self.things.popitem(last=False))
            self.bytes -= _bytes(gone[-1][1])
        return gone

    def take(self, key: Hashable) -> Any:
        thing = self.things.pop(key)
        self.bytes -= _bytes(thing)
        return thing

    def fits(self, thing: Any) -> bool:
        """Whether there is room for it at all."""
        return _bytes(thing) <= self.budget_bytes

    def brought(self, thing: T) -> T:
        """The thing in this shelf's memory."""
        return thing if self.arrive is None else moved(thing, self.arrive)


def _bytes(thing: Any) -> int:
    return sum(one.nbytes for one in tensors(thing))


@dataclass(slots=True)
class Rack:
    """Shelves, the fastest first: what leaves one goes to the next, and comes back to the first when it is wanted."""

    shelves: Sequence[Shelf]

    def get(self, key: Hashable) -> Any | None:
        """The thing in the first shelf's memory, also where it is too large to stay there."""
        first = self.shelves[0]
        for level, shelf in enumerate(self.shelves):
            if key in shelf.things:
                thing = shelf.take(key)
                self._put(0 if first.fits(thing) else level, key, thing)
                return first.things[key] if key in first.things else first.brought(thing)
        return None

    def put(self, key: Hashable, thing: Any) -> None:
        if not any(key in shelf.things for shelf in self.shelves):
            self._put(0, key, thing)

    def _put(self, level: int, key: Hashable, thing: Any) -> None:
        if level < len(self.shelves):
            for gone in self.shelves[level].put(key, thing):
                self._put(level + 1, *gone)

    def __iter__(self) -> Iterator[Any]:
        for shelf in self.shelves:
            yield from shelf.things

    @property
    def bytes(self) -> int:
        return sum(shelf.bytes for shelf in self.shelves)


def rack(host_bytes: int, device: torch.device | None = None, device_bytes: int = 0) -> Rack:
    """One shelf, or one on the GPU before one in pinned memory."""
    if device is None or device.type == "cpu":
        return Rack([Shelf(host_bytes)])
    return Rack(
        [
            # the copy back is ordered on the GPU's stream; pinned memory is not used again before it is done
            Shelf(device_bytes, lambda tensor: tensor.to(device, non_blocking=True)),
            Shelf(host_bytes, lambda tensor: tensor.cpu().pin_memory()),
        ]
    )


class StreamStore:
    """Streams and projections of a worker. A prompt is named by its digest."""

    def __init__(
        self,
        budget_bytes: int,
        projected_bytes: int = 0,
        *,
        device: torch.device | None = None,
        device_bytes: int = 0,
        projected_device_bytes: int = 0,
    ) -> None:
        """
        Args:
            budget_bytes: for streams, in host memory.
            projected_bytes: for what layers project, in host memory.
            device: a GPU to keep the latest on; on a CPU the rest does not matter.
        """
        self.streams = rack(budget_bytes, device, device_bytes)
        self.projections = rack(projected_bytes, device, projected_device_bytes)

    def deepest(self, digest: str, upto: int) -> tuple[int, Stream] | None:
        """The stream at the deepest kept layer that is at most `upto`."""
        layers = [layer for key, layer in self.streams if key == digest and layer <= upto]
        if not layers:
            return None
        found: Stream | None = self.streams.get((digest, max(layers)))
        return None if found is None else (max(layers), found)

    def put(self, digest: str, layer: int, stream: Stream) -> None:
        self.streams.put((digest, layer), stream)

    def projected(self, digest: str, layer: int) -> Projected | None:
        found: Projected | None = self.projections.get((digest, layer))
        return found

    def put_projected(self, digest: str, layer: int, projected: Projected) -> None:
        self.projections.put((digest, layer), projected)

    def holds_projections(self) -> bool:
        return any(shelf.budget_bytes for shelf in self.projections.shelves)

    def clear(self) -> None:
        """Forget everything."""
        for one in (*self.streams.shelves, *self.projections.shelves):
            one.things.clear()
            one.bytes = 0

    @property
    def bytes(self) -> int:
        return self.streams.bytes + self.projections.bytes

    def __len__(self) -> int:
        return sum(1 for _ in self.streams)
