"""Decoding a token at a time. On a GPU a whole step (embedding to greedy choice) is one captured CUDA graph, replayed.

A step of mamba-2.8b is some 260 kernels of 3 to 20 µs; launched one by one from Python they take ten times that. A
graph's tensors stay where they are: states are copied in once, when rows begin, and each replay moves them on. Graphs
are captured for classes of row counts, where rows left over count for nothing, and kept for the next batch. A model
whose attention layers grow a cache, and every model on a CPU, steps eagerly. Mamba-2's states are written every WINDOW
tokens only (`kernels/ssd_window.py`); whoever takes a copy finds them whole.

Environment: STATESPAN_DECODE=eager steps without graphs on a GPU, too.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from statespan.kernels.greedy import greedy

if TYPE_CHECKING:
    from statespan.models.lm import MambaLM
    from statespan.models.runner import Cache, Runner

Step = Callable[["Cache", Tensor], Tensor]
Greedy = tuple[int, float]
"""The most likely token and its log-probability."""

KEPT_BYTES = 2 << 30
"""States of graphs that nobody uses now, for each runner; more are dropped, oldest first."""


WINDOW = 8
"""Tokens between two writes of a Mamba-2 state: more save little, for it is read at each."""
WINDOWED_ROWS = 4
"""A graph of fewer rows writes its states at each token: beside the weights they are small, and the plain step is
quicker there. So a row's result depends, to rounding, on how many rows there are."""


def on_host(chosen: Tensor) -> list[Greedy]:
    """What `greedy` found, in one transfer."""
    tokens, logprobs = chosen.tolist()
    return [(int(token), logprob) for token, logprob in zip(tokens, logprobs, strict=True)]


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step gives for each row. `best` is None where the caller chooses from the logits itself (on a CPU)."""

    logits: Tensor
    best: list[Greedy] | None = None

    @classmethod
    def of(cls, logits: Tensor) -> Stepped:
        return cls(logits, on_host(greedy(logits)) if logits.is_cuda else None)

    def greedy(self, row: int) -> Greedy | None:
        return None if self.best is None else self.best[row]


Capture = Callable[[Callable[[], tuple[Tensor, Tensor]]], tuple[Callable[[], None], tuple[Tensor, Tensor]]]
"""Takes work on fixed tensors; gives what repeats it, and the tensors each repetition writes its results to."""


def cuda_capture(work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
    """A CUDA graph of the work. What it does is done a few times before: kernels are compiled, and chosen, by then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with no_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = work()
    return graph.replay, results


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected before and not within: what a graph or an event that dies calls ends a capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def root_of(error: BaseException) -> BaseException:
    """The error that others followed: a capture that failed is told of by what ends it, too."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def size_of(cache: Cache) -> int:
    """Rows of a cache."""
    return cache.states[0].conv.shape[0]


class StepGraph:
    """A step of a fixed number of rows on tensors of its own."""

    def __init__(self, step: Step, cache: Cache, capture: Capture, count: Tensor | None = None) -> None:
        """`cache` becomes the graph's own; capturing moves it on, so load what to decode from afterwards.

        `count` is what the windows of its states share, where they have any.
        """
        self.cache, self.rows, self.count = cache, size_of(cache), count
        device = cache.states[0].conv.device
        self.ids = torch.zeros(self.rows, dtype=torch.int64, device=device)
        # in memory that a GPU reads and writes by itself: what goes in and out is part of the graph
        pinned = device.type == "cuda"
        self.fed = torch.zeros(self.rows, dtype=torch.int64, pin_memory=pinned)
        told = torch.zeros(2, self.rows, dtype=torch.float64, pin_memory=pinned)

        def work() -> tuple[Tensor, Tensor]:
            self.ids.copy_(self.fed, non_blocking=True)
            logits = step(self.cache, self.ids)
            told.copy_(greedy(logits), non_blocking=True)
            if count is not None:
                count.add_(1)
            return logits, told

        try:
            self.replay, (self.logits, self.best) = capture(work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"a decode step of {self.rows} rows cannot be captured as a CUDA graph "
                f"({str(root_of(error)).splitlines()[0]}); set STATESPAN_DECODE=eager to decode without"
            ) from error

    def load(self, cache: Cache) -> None:
        """Begin from these rows' states."""
        rows = size_of(cache)
        mine = [part[:rows] for state in self.cache.states for part in (state.conv, state.ssm)]
        torch._foreach_copy_(mine, [part for state in cache.states for part in (state.conv, state.ssm)])
        if self.count is not None:
            self.count.zero_()

    def step(self, tokens: Sequence[int]) -> list[Greedy]:
        """One more token a row; gives what is most likely next. `logits` are valid until the next step."""
        self.fed.copy_(torch.tensor(tokens))
        self.replay()
        if self.logits.is_cuda:
            torch.cuda.current_stream(self.logits.device).synchronize()
        return on_host(self.best)


def class_of(rows: int) -> int:
    """Rows of the graph that so many rows decode in: a power of two, above 64 a multiple of it."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


class GraphPool:
    """A runner's captured steps."""

    def __init__(
        self,
        step: Step,
        capture: Capture = cuda_capture,
        state_dtype: torch.dtype | None = None,
        model: MambaLM | None = None,
        window: int = WINDOW,
    ) -> None:
        """What the captured steps shall be.

        Args:
            step: one token a row, as `Runner.step`.
            capture: makes a graph of it.
            state_dtype: narrows the states while decoding; by default they keep their float32. Each write rounds them.
            model: whose step it is; without it no state has a window.
            window: tokens between two writes of a state, where the mixer can keep them apart.
        """
        self.step, self.capture, self.state_dtype = step, capture, state_dtype
        self._model, self._window = model, window
        self._free: list[StepGraph] = []

    def take(self, cache: Cache) -> StepGraph:
        """A graph with room for these rows, loaded with them; nobody else's until it is given back."""
        rows = class_of(size_of(cache))
        graph = next((free for free in self._free if free.rows == rows), None)
        if graph is None:
            own = cache.rows([0] * rows)
            for state in own.states if self.state_dtype is not None else ():
                state.ssm = state.ssm.to(self.state_dtype)
            graph = StepGraph(self.step, own, self.capture, self._open_windows(own))
        else:
            self._free.remove(graph)
        graph.load(cache)
        return graph

    def _open_windows(self, cache: Cache) -> Tensor | None:
        """A window beside each state that can do with one; gives the count they share, None where there is none."""
        if self._model is None or size_of(cache) < WINDOWED_ROWS:
            return None
        count = torch.zeros(1, dtype=torch.int64, device=cache.states[0].conv.device)
        for block, state in zip(self._model.blocks(), cache.states, strict=True):
            block.mixer.open_window(state, self._window, count)
        return count if any(state.window is not None for state in cache.states) else None

    def clear(self) -> None:
        """Drop what nobody uses now."""
        self._free.clear()

    def give(self, graph: StepGraph) -> None:
        self._free.append(graph)
        while sum(free.cache.bytes for free in self._free) > KEPT_BYTES:
            self._free.pop(0)


class Steps(Protocol):
    """Rows on their way through decoding."""

    def step(self, tokens: Sequence[int]) -> Stepped:
        """One more token a row. The logits are valid until the next step."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows, in this order; with none the steps are closed."""
        ...

    def cache(self) -> Cache:
        """A copy of the states as they are now."""
        ...

    def close(self) -> None: ...


class EagerSteps:
    def __init__(self, runner: Runner, cache: Cache) -> None:
        self._runner, self._cache = runner, cache

    def step(self, tokens: Sequence[int]) -> Stepped:
        return Stepped.of(self._runner.step(self._cache, torch.tensor(list(tokens), device=self._runner.model.device)))

    def keep(self, rows: Sequence[int]) -> None:
        self._cache = self._cache.rows(rows) if rows else type(self._cache)()

    def cache(self) -> Cache:
        return self._cache.clone()

    def close(self) -> None:
        self._cache = type(self._cache)()


class GraphSteps:
    def __init__(self, pool: GraphPool, cache: Cache) -> None:
        self._pool = pool
        self._held: StepGraph | None = pool.take(cache)
        self._slots = list(range(size_of(cache)))

    @property
    def _graph(self) -> StepGraph:
        assert self._held is not None, "these steps are closed"
        return self._held

    def step(self, tokens: Sequence[int]) -> Stepped:
        graph, fed = self._graph, [0] * self._graph.rows
        for slot, token in zip(self._slots, tokens, strict=True):
            fed[slot] = token
        best = graph.step(fed)
        whole = self._slots == list(range(graph.rows))
        return Stepped(graph.logits if whole else graph.logits[self._slots], [best[slot] for slot in self._slots])

    def keep(self, rows: Sequence[int]) -> None:
        """Rows that leave are decoded on and ignored, until the others fit a smaller graph."""
        self._slots = [self._slots[row] for row in rows]
        if not self._slots:
            self.close()
        elif class_of(len(self._slots)) < self._graph.rows:
            rest = self.cache()
            self.close()
            self._held, self._slots = self._pool.take(rest), list(range(size_of(rest)))

    def cache(self) -> Cache:
        return self._graph.cache.rows(self._slots)

    def close(self) -> None:
        if self._held is not None:
            self._pool.give(self._held)
        self._held = None


def steps(runner: Runner, cache: Cache) -> Steps:
    """Decode from these states, which the steps may write over."""
    eager = os.environ.get("STATESPAN_DECODE") == "eager"
    if runner.model.device.type != "cuda" or eager or cache.attention:
        return EagerSteps(runner, cache)
    return GraphSteps(runner.graphs, cache)
