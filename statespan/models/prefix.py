"""A text that several prompts begin with is read once: many questions on one document.

A layer is walked in chunks that begin at multiples of the chunk length (lm.py). Where nothing behind a token decides
how it is read (`Method.prefix_rule`), the same chunks may as well go through all layers one after the other; what the
layers carry after a chunk is then all that another prompt with this beginning needs. Only whole chunks are shared, so
that every matrix product has the shape and the numbers it has for the prompt alone: equal to the bit.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from statespan.models.hook import VANILLA, Method, Span
from statespan.models.mixer import MixerState

if TYPE_CHECKING:
    from statespan.models.runner import Runner, Tokens

Key = tuple[Hashable, ...]
PREFIX_BYTES = 256 * 1024**2
"""Enough for the beginnings of some prompts: a 2.8B Mamba carries some 20 MB from chunk to chunk."""


class PrefixStore:
    """What all layers carry after the first chunks of recent prompts, at most `budget_bytes`; the least recently used
    goes first."""

    def __init__(self, budget_bytes: int = PREFIX_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self._held: OrderedDict[Key, list[MixerState]] = OrderedDict()
        self._bytes = 0

    def get(self, key: Key) -> list[MixerState] | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Key, states: Sequence[MixerState]) -> None:
        size = sum(state.bytes for state in states)
        if key in self._held or size > self.budget_bytes:
            return
        self._held[key] = [state.clone() for state in states]  # no view of a chunk, which would keep all of it
        self._bytes += size
        while self._bytes > self.budget_bytes:
            self._bytes -= sum(state.bytes for state in self._held.popitem(last=False)[1])

    def clear(self) -> None:
        self._held.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._held)


def beginnings(prompt: Tokens, chunk: int, of: Hashable) -> list[Key]:
    """Keys of the prompt's first chunk, first two chunks, …; at least one token comes after the last of them."""
    ids, digest = prompt.ids[0].cpu().numpy(), hashlib.sha256()
    keys: list[Key] = []
    for start in range(0, len(ids) - chunk, chunk):
        digest.update(ids[start : start + chunk].tobytes())
        keys.append((of, digest.digest()))
    return keys


def shared_rule(runner: Runner, prompt: Tokens, method: Method, first: int, tail: int) -> Hashable | None:
    """What a beginning of this prompt may be shared under; None where it may not be, or where it is too short.

    Where a study's trials share streams, that is left to those below the first layer that a method changes, and to one
    of this very prompt where it is there.
    """
    if len(prompt.lengths) > 1 or prompt.lengths[0] <= runner.chunk or tail > 1 or torch.is_grad_enabled():
        return None
    if runner.store is not None and (first < runner.n_layer or runner.store.deepest(runner.key(prompt), first)):
        return None
    if runner.model.around is not None:  # a hybrid's attention is not worked off in these chunks
        return None
    rule = method.prefix_rule(prompt.lengths[0])
    return None if rule is None else (runner.name, rule)


def read(
    runner: Runner, prompt: Tokens, method: Method, first: int, keys: Sequence[Key]
) -> tuple[Tensor, list[MixerState]]:
    """Read one prompt from its longest beginning in the store on; its own beginnings are kept.

    Args:
        first: the first layer that the method changes; those before it are vanilla's.
        keys: the prompt's `beginnings`.

    Returns:
        (1, tokens of the last chunk, d_model) before the final norm, and what the layers carry from there
    """
    store, chunk, length = runner.prefixes, runner.chunk, prompt.lengths[0]
    assert store is not None
    held, states = 0, list[MixerState | None]([None] * runner.n_layer)
    for number in range(len(keys), 0, -1):
        if (found := store.get(keys[number - 1])) is not None:
            held, states = number, list(found)
            break
    runner.work.shared += held * chunk * runner.n_layer
    runner.work.computed += (length - held * chunk) * runner.n_layer
    for number in range(held, len(keys)):
        ids = prompt.ids[:, number * chunk : (number + 1) * chunk]
        _, after = _through(runner, ids, method, first, states, length)
        store.put(keys[number], after)
        states = list(after)
    return _through(runner, prompt.ids[:, len(keys) * chunk :], method, first, states, length)


def _through(
    runner: Runner, ids: Tensor, method: Method, first: int, states: Sequence[MixerState | None], length: int
) -> tuple[Tensor, list[MixerState]]:
    """One chunk of a prompt of this length through all layers."""
    hidden, after = runner.model.embed(ids), list[MixerState]()
    span = Span(length=ids.shape[1], lengths=(ids.shape[1],), prompt_lengths=(length,))
    for layer, (block, state) in enumerate(zip(runner.model.blocks(), states, strict=True)):
        walked = block.walk(hidden, span, method if layer >= first else VANILLA, layer, state, runner.chunk)
        assert walked.kept is None, f"{method.name} drops tokens; it can have no prefix_rule"
        hidden = walked.hidden
        after.append(walked.state)
    return hidden, after
