"""Rows that decode side by side: their text as it becomes final, and their states, joined or each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from statespan.models.generate import UNFINISHED, Decodes, Decoding, RowDecoder
from statespan.models.runner import Cache, Runner
from statespan.models.step_graph import Steps, steps
from statespan.orchestration.token_scores import TokenScore, token_scores


class TextStream:
    """Hands out a growing text as far as it can no longer change.

    Held back are bytes that are no whole character yet, and an ending that may turn out to begin a stop string. So no
    part of a stop string ever leaves, and the pieces joined are the final text.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.sent = tuple(stop), 0

    def take(self, text: str, final: bool) -> str:
        """What is new in `text` since the last call and is safe to show."""
        upto = len(text) if final else self._settled(text)
        piece = text[self.sent : upto]
        self.sent = max(self.sent, upto)
        return piece

    def _settled(self, text: str) -> int:
        whole = text.rstrip(UNFINISHED)
        held = (n for stop in self.stop for n in range(len(stop) - 1, 0, -1) if whole.endswith(stop[:n]))
        return len(whole) - max(held, default=0)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one row has to say after a step. The last one of a row has `finish`."""

    choice: int
    text: str
    scores: tuple[TokenScore, ...]
    """Of the tokens this text is made of; empty where none were asked for."""

    finish: Literal["stop", "length"] | None = None
    ids: tuple[int, ...] = ()
    """With `finish`: all tokens chosen, those of a stop string among them."""


@dataclass(slots=True)
class Row:
    """One completion while it decodes."""

    choice: int
    decoder: RowDecoder
    stream: TextStream
    logprobs: int | None
    """Rivals to report beside each token; None reports no log-probabilities."""

    next_token: int = -1
    _waiting: list[tuple[int, TokenScore]] = field(default_factory=list)
    """Scores whose text has not left yet, with the place in the text where each token begins."""

    @classmethod
    def start(cls, choice: int, decoding: Decoding, tokenizer: Decodes, logprobs: int | None) -> Row:
        return cls(choice, RowDecoder(decoding, tokenizer), TextStream(decoding.stop), logprobs)

    def accept(self, logits: Tensor) -> Piece | None:
        """Choose a token from (vocab_size,) logits; None where there is nothing to show yet."""
        decoder, begins = self.decoder, len(self.decoder.text.rstrip(UNFINISHED))
        before = len(decoder.ids)
        token = decoder.accept(logits)
        if self.logprobs is not None and len(decoder.ids) > before:
            self._waiting += [(begins, one) for one in token_scores(logits[None], decoder.ids[-1:], self.logprobs)]
        self.next_token = -1 if token is None else token
        text, scores = self.stream.take(decoder.text, decoder.finish is not None), self._release()
        if decoder.finish is None and not text and not scores:
            return None
        ids = tuple(decoder.ids) if decoder.finish else ()
        return Piece(self.choice, text, scores, decoder.finish, ids)

    def _release(self) -> tuple[TokenScore, ...]:
        """Scores of tokens whose text has begun to leave; at the end all but those of a stop string."""
        cut = self.decoder.finish == "stop"
        count = 0
        for begins, _ in self._waiting:
            if begins >= self.stream.sent and (self.decoder.finish is None or cut):
                break
            count += 1
        released, self._waiting = self._waiting[:count], self._waiting[count:]
        return tuple(score for _, score in released)


class Deck(Protocol):
    """The states of all rows that decode now, in the order they joined."""

    def join(self, cache: Cache) -> None: ...
    def keep(self, rows: Sequence[int]) -> None: ...
    def step(self, tokens: Sequence[int]) -> Tensor:
        """One token a row -> (rows, vocab_size) logits"""
        ...


class JoinedDeck:
    """All rows in one batch. Matrix products of another batch size round differently: equal to about 1e-5."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.steps: Steps | None = None

    def join(self, cache: Cache) -> None:
        if self.steps is not None:
            cache = Cache.join([self.steps.cache(), cache])
            self.steps.close()
        self.steps = steps(self.runner, cache)

    def keep(self, rows: Sequence[int]) -> None:
        assert self.steps is not None, "no row has joined"
        self.steps.keep(rows)
        self.steps = self.steps if rows else None

    def step(self, tokens: Sequence[int]) -> Tensor:
        assert self.steps is not None, "no row has joined"
        return self.steps.step(tokens).logits


class ApartDeck:
    """Each row in a batch of its own: bit for bit what the row gives alone, at the cost of one pass a row."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.rows: list[Steps] = []

    def join(self, cache: Cache) -> None:
        count = cache.states[0].conv.shape[0]
        self.rows += [steps(self.runner, cache if count == 1 else cache.rows([row])) for row in range(count)]

    def keep(self, rows: Sequence[int]) -> None:
        for row in set(range(len(self.rows))).difference(rows):
            self.rows[row].close()
        self.rows = [self.rows[row] for row in rows]

    def step(self, tokens: Sequence[int]) -> Tensor:
        return torch.cat([row.step([token]).logits for row, token in zip(self.rows, tokens, strict=True)])
