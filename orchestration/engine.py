"""Completions of many requests at once on one model under one method. Knows no Ray and no HTTP.

One thread owns the model. It reads one waiting prompt at a time under the method, then decodes all running rows a token
a step; a row joins after its prefill and leaves when it is done, so nobody waits for the slowest. That is cheap here: a
Mamba row's state has the same size at any length, so joining is one copy. Each row's tokens are chosen by the offline
path's own `RowDecoder`; with `deterministic` they are bit for bit those of `generate` on that prompt alone.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from statespan.errors import UserError
from statespan.models.generate import Decoding
from statespan.models.hook import Method
from statespan.models.lm import MambaLM
from statespan.models.runner import Cache, Runner, Tokens
from statespan.models.tokenizer import Tokenizer
from statespan.orchestration.decode_rows import ApartDeck, Deck, JoinedDeck, Piece, Row
from statespan.orchestration.meter import Meter
from statespan.orchestration.token_scores import TokenScore, prompt_scores

METRICS = {
    "statespan_requests_total": ("counter", "Prompts by outcome: done, cancelled, failed, refused."),
    "statespan_prompt_tokens_total": ("counter", "Prompt tokens read."),
    "statespan_generated_tokens_total": ("counter", "Tokens chosen."),
    "statespan_decode_steps_total": ("counter", "Steps of the decode loop; tokens / steps is the mean batch."),
    "statespan_waiting": ("gauge", "Prompts in the queue."),
    "statespan_rows": ("gauge", "Completions that decode now."),
    "statespan_prefill_seconds": ("histogram", "Time to read one prompt."),
    "statespan_first_token_seconds": ("histogram", "Time from a prompt's arrival to its first token."),
    "statespan_request_seconds": ("histogram", "Time from a prompt's arrival to its end."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_prompt_tokens: int = 131_072
    max_new_tokens: int = 4_096
    max_rows: int = 16
    """Completions that decode at once."""

    max_waiting: int = 64
    """Prompts in the queue; one more is refused."""


class EngineFull(Exception):
    """The queue has no room. `retry_after` is a guess in seconds, from how long prompts took lately."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, completed `n` times."""

    prompt_ids: tuple[int, ...]
    decoding: Decoding
    n: int = 1
    """Choice i is drawn with the seed `decoding.seed + i`."""

    logprobs: int | None = None
    """Rivals to report beside each token; None reports no log-probabilities."""

    score_prompt_from: int | None = None
    """Report the prompt's own log-probabilities from this position on, at least 1."""


@dataclass(frozen=True, slots=True)
class PromptRead:
    """Comes before a request's first piece."""

    scores: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that failed."""

    error: BaseException


Event = PromptRead | Piece | Failed
Listener = Callable[[Event], None]
"""Called from the engine's thread; must not block. A request is over after `Failed` or its n-th piece with `finish`."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in the engine."""

    request: Request
    listener: Listener
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    running: int = 0

    def cancel(self) -> None:
        """Nobody listens any more: its rows leave before the next step."""
        self.cancelled = True


class ServingEngine:
    def __init__(
        self,
        model: MambaLM,
        tokenizer: Tokenizer,
        method: Method,
        limits: Limits | None = None,
        deterministic: bool = True,
    ) -> None:
        self.tokenizer, self.method, self.limits = tokenizer, method, limits or Limits()
        self.runner, self.meter = method.runner(Runner(model)), Meter(METRICS)
        self._deck: Deck = (ApartDeck if deterministic else JoinedDeck)(self.runner)
        self._rows: list[tuple[Ticket, Row]] = []
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing, self._typical_seconds = False, 1.0
        self._thread = threading.Thread(target=self._run, name="statespan-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def check(self, request: Request) -> None:
        """Raises UserError for a request that can never be served here."""
        limits, length, rows = self.limits, len(request.prompt_ids), self.runner.model.config.vocab_size
        if length == 0:
            raise UserError("the prompt is empty; there is nothing to continue from")
        if length > limits.max_prompt_tokens:
            raise UserError(f"the prompt has {length} tokens; this server takes at most {limits.max_prompt_tokens}")
        if request.decoding.max_new_tokens > limits.max_new_tokens:
            asked = request.decoding.max_new_tokens
            raise UserError(f"max_tokens is {asked}; this server gives at most {limits.max_new_tokens}")
        if request.n > limits.max_rows:
            raise UserError(f"n is {request.n}; this server decodes at most {limits.max_rows} completions at once")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < rows:
            bad = next(i for i in request.prompt_ids if not 0 <= i < rows)
            raise UserError(f"token id {bad} is not in the vocabulary of {rows}")

    def submit(self, requests: Sequence[Request], listeners: Sequence[Listener]) -> list[Ticket]:
        """Queue all of them or none.

        Raises:
            UserError: one of them can never be served.
            EngineFull: there is no room for them now.
        """
        for request in requests:
            self.check(request)
        tickets = [Ticket(*pair) for pair in zip(requests, listeners, strict=True)]
        with self._changed:
            if self._closing or not self.alive:
                raise RuntimeError("the engine has stopped")
            if len(self._waiting) + len(tickets) > self.limits.max_waiting:
                self.meter.add("statespan_requests_total", len(tickets), outcome="refused")
                raise EngineFull(self._retry_after(len(tickets)))
            self._waiting.extend(tickets)
            self.meter.set("statespan_waiting", len(self._waiting))
            self._changed.notify()
        return tickets

    def _retry_after(self, more: int) -> int:
        turns = (len(self._waiting) + more) / self.limits.max_rows
        return min(max(math.ceil(turns * self._typical_seconds), 1), 60)

    def close(self) -> None:
        """Fail what waits and runs, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while self._wait():
            self._drop_cancelled()
            if (ticket := self._next()) is not None:
                self._guarded([ticket], partial(self._read, ticket))
            if self._rows:
                self._guarded([ticket for ticket, _ in self._rows], self._step)
        error = RuntimeError("the server is shutting down")
        for ticket in {*self._waiting, *(ticket for ticket, _ in self._rows)}:
            self._fail(ticket, error)

    def _wait(self) -> bool:
        """Until there is something to do; False to end."""
        with self._changed:
            while not (self._closing or self._waiting or self._rows):
                self._changed.wait()
            return not self._closing

    def _next(self) -> Ticket | None:
        """The next prompt that has room to decode."""
        with self._changed:
            while self._waiting and self._waiting[0].cancelled:
                self._waiting.popleft()
                self.meter.add("statespan_requests_total", outcome="cancelled")
            if not self._waiting or len(self._rows) + self._waiting[0].request.n > self.limits.max_rows:
                return None
            ticket = self._waiting.popleft()
            self.meter.set("statespan_waiting", len(self._waiting))
            return ticket

    def _guarded(self, tickets: Sequence[Ticket], work: Callable[[], None]) -> None:
        """What goes wrong in a step is told to the requests it was for; the engine goes on."""
        try:
            work()
        except Exception as error:
            failed = set(tickets)
            self._keep([row for row, (ticket, _) in enumerate(self._rows) if ticket not in failed])
            for ticket in failed:
                self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self.meter.add("statespan_requests_total", outcome="failed")
        ticket.listener(Failed(error))

    def _drop_cancelled(self) -> None:
        gone = {ticket for ticket, _ in self._rows if ticket.cancelled}
        if gone:
            self.meter.add("statespan_requests_total", len(gone), outcome="cancelled")
            self._keep([row for row, (ticket, _) in enumerate(self._rows) if ticket not in gone])

    def _keep(self, rows: Sequence[int]) -> None:
        if len(rows) < len(self._rows):
            self._rows = [self._rows[row] for row in rows]
            self._deck.keep(rows)
            self.meter.set("statespan_rows", len(self._rows))

    def _read(self, ticket: Ticket) -> None:
        """Read a prompt, choose each choice's first token, and let those that go on join."""
        request, started, ids = ticket.request, time.monotonic(), ticket.request.prompt_ids
        scores: list[TokenScore] = []
        if request.score_prompt_from is not None:
            scores = prompt_scores(self.runner, self.method, ids, request.score_prompt_from, request.logprobs or 0)
        ticket.listener(PromptRead(tuple(scores)))
        logits, cache = torch.empty(0), Cache()
        if request.decoding.max_new_tokens > 0:
            prefilled = self.method.prefill(self.runner, Tokens.pad([ids], self.runner.model.device))
            logits, cache = self.runner.model.logits(prefilled.hidden[:, -1])[0], prefilled.cache
        self.meter.observe("statespan_prefill_seconds", time.monotonic() - started)
        self.meter.add("statespan_prompt_tokens_total", len(ids))
        ticket.running = request.n
        rows = [Row.start(i, self._seeded(request, i), self.tokenizer, request.logprobs) for i in range(request.n)]
        going = [row for row in rows if self._accept(ticket, row, logits)]
        self.meter.observe("statespan_first_token_seconds", time.monotonic() - ticket.arrived)
        if going:
            self._deck.join(cache.rows([0] * len(going)))
            self._rows += [(ticket, row) for row in going]
            self.meter.set("statespan_rows", len(self._rows))

    @staticmethod
    def _seeded(request: Request, choice: int) -> Decoding:
        return replace(request.decoding, seed=request.decoding.seed + choice)

    def _step(self) -> None:
        logits = self._deck.step([row.next_token for _, row in self._rows])
        self.meter.add("statespan_decode_steps_total")
        self._keep([i for i, (ticket, row) in enumerate(self._rows) if self._accept(ticket, row, logits[i])])

    def _accept(self, ticket: Ticket, row: Row, logits: torch.Tensor) -> bool:
        """True while the row goes on."""
        before = len(row.decoder.ids)
        piece = row.accept(logits)
        self.meter.add("statespan_generated_tokens_total", len(row.decoder.ids) - before)
        if piece is not None:
            ticket.listener(piece)
        if row.decoder.finish is None:
            return True
        ticket.running -= 1
        if ticket.running == 0:
            self._done(ticket)
        return False

    def _done(self, ticket: Ticket) -> None:
        seconds = time.monotonic() - ticket.arrived
        self._typical_seconds += 0.2 * (seconds - self._typical_seconds)
        self.meter.observe("statespan_request_seconds", seconds)
        self.meter.add("statespan_requests_total", outcome="done")
