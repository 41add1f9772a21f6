"""Completions and log-likelihoods. One decoder decides for one row, here and in the server, so that both agree.

A method acts on the prompt only (`scope="prefix"`): the target's tokens continue from the state it left, unmodified.
`scope="window"` is what DeciMamba's and LongMamba's published perplexities do: prompt and target are read in one pass
under the method, the target's positions protected from being dropped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.kernels.greedy import greedy
from statespan.models.hook import Method
from statespan.models.lm import MambaLM
from statespan.models.runner import Cache, Runner, Tokens, Work
from statespan.models.step_graph import Greedy, Stepped, Steps, on_host, steps

UNFINISHED = "\ufffd"
"""What a decoder shows for the first bytes of a character."""


class Decodes(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How tokens are chosen and when to stop. `temperature` 0 is greedy."""

    max_new_tokens: int
    min_new_tokens: int = 0
    """Of the first so many tokens none is chosen that would end the text."""

    stop: tuple[str, ...] = ()
    eos_id: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(slots=True)
class Generation:
    """ids: all tokens chosen, the end-of-text token left out; text: cut before a stop string."""

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]


class GrowingText:
    """The text of a growing list of tokens, each decoded with the few before it instead of with all.

    A token's text may depend on the one before (a leading space) and on the next (bytes of one character). So what is
    new is the text of the tokens from one settled place on, less the text of those that were read already; a place is
    settled where the text does not end within a character.
    """

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens of the last settled piece
        self._new: list[int] = []  # tokens since
        self._settled, self._tail = "", ""

    @property
    def whole(self) -> str:
        return self._settled + self._tail

    @property
    def settled(self) -> int:
        """Leading characters that no later token can change."""
        return len(self._settled)

    def add(self, token: int) -> None:
        self._new.append(token)
        before = len(self._tokenizer.decode(self._context)) if self._context else 0
        self._tail = self._tokenizer.decode([*self._context, *self._new])[before:]
        if not self._tail.endswith(UNFINISHED):
            self._settled, self._tail = self._settled + self._tail, ""
            self._context, self._new = self._new, []


class RowDecoder:
    """Chooses one row's tokens. Its choices depend on its own logits only, never on the rows beside it."""

    def __init__(self, decoding: Decoding, tokenizer: Decodes) -> None:
        self.decoding, self._tokenizer = decoding, tokenizer
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self._text = GrowingText(tokenizer)
        self._cut: int | None = None
        self.finish: Literal["stop", "length"] | None = None
        self._random = torch.Generator().manual_seed(decoding.seed) if decoding.temperature > 0 else None

    @property
    def text(self) -> str:
        """What was chosen so far, cut before a stop string."""
        return self._text.whole[: self._cut]

    def accept(self, logits: Tensor, best: Greedy | None = None) -> int | None:
        """Choose from (vocab_size,) logits. Returns the token to feed next, or None when the row is done.

        `best` is the most likely token with its log-probability, where the device worked it out already.
        """
        if self.decoding.max_new_tokens < 1:
            self.finish = "length"
            return None
        token, logprob = self._pick(logits, best)
        while len(self.ids) < self.decoding.min_new_tokens and self._ends_with(token):
            logits = logits.clone()
            logits[token] = -torch.inf
            token, logprob = self._pick(logits, None)
        if token == self.decoding.eos_id:
            self.finish = "stop"
            return None
        self.ids.append(token)
        self.logprobs.append(logprob)
        settled = self._text.settled
        self._text.add(token)
        # what was settled before holds no stop string, at most the beginning of one
        begins = ((stop, max(settled - len(stop) + 1, 0)) for stop in self.decoding.stop)
        cuts = [at for stop, begin in begins if (at := self._text.whole.find(stop, begin)) >= 0]
        if cuts:
            self._cut, self.finish = min(cuts), "stop"
        elif len(self.ids) >= self.decoding.max_new_tokens:
            self.finish = "length"
        return None if self.finish else token

    def _ends_with(self, token: int) -> bool:
        if token == self.decoding.eos_id:
            return True
        text = self._tokenizer.decode([*self.ids, token])
        return any(stop in text for stop in self.decoding.stop)

    def _pick(self, logits: Tensor, best: Greedy | None) -> Greedy:
        if self._random is None and (best is not None or logits.is_cuda):
            return best or on_host(greedy(logits[None]))[0]
        wide = logits.detach().cpu().to(torch.promote_types(logits.dtype, torch.float32))
        token = self._choose(wide)
        return token, float(F.log_softmax(wide, dim=-1)[token])

    def _choose(self, logits: Tensor) -> int:
        if self._random is None:
            return int(logits.argmax())
        probabilities = F.softmax(logits / self.decoding.temperature, dim=-1)
        if self.decoding.top_p < 1.0:
            ordered, order = probabilities.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered > self.decoding.top_p] = 0.0
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
        return int(torch.multinomial(probabilities, 1, generator=self._random))

    def result(self) -> Generation:
        assert self.finish is not None, "the row is still decoding"
        return Generation(tuple(self.ids), self.text, tuple(self.logprobs), self.finish)


@dataclass(slots=True)
class Timing:
    """Wall seconds of a batch, device finished."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(slots=True)
class Generated:
    rows: list[Generation]
    timing: Timing = field(default_factory=Timing)
    read: list[Work] = field(default_factory=list)
    """Layer-tokens of each prompt, and the seconds it took to read; of all as one where they were read as one batch."""

    read_seconds: list[float] = field(default_factory=list)


def _now(model: MambaLM) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


@torch.inference_mode()
def generate(
    runner: Runner,
    method: Method,
    prompts: Sequence[Sequence[int]],
    decodings: Sequence[Decoding],
    tokenizer: Decodes,
    *,
    apart: bool = False,
) -> Generated:
    """Complete each prompt. Rows that are done leave the batch.

    With `apart` every prompt is read by itself, as if it were the only one, and what follows is decoded together. Where
    `fused_step.rows_apart` holds, the whole is then what each prompt alone would give, bit for bit.
    """
    runner = method.runner(runner)
    model, work = runner.model, runner.work
    logits, caches, read, seconds = [], list[Cache](), list[Work](), list[float]()
    for rows in [[prompt] for prompt in prompts] if apart else [list(prompts)]:
        started, computed, shared = _now(model), work.computed, work.shared
        prefilled = method.prefill(runner, Tokens.pad(rows, model.device))
        logits.append(model.logits(prefilled.hidden[:, -1]))
        caches.append(prefilled.cache)
        seconds.append(_now(model) - started)
        read.append(Work(work.computed - computed, work.shared - shared))
    started = _now(model)
    stepped = Stepped.of(torch.cat(logits) if apart else logits[0])
    decoders = [RowDecoder(decoding, tokenizer) for decoding in decodings]
    _decode(steps(runner, Cache.join(caches) if len(caches) > 1 else caches[0]), stepped, decoders)
    timing = Timing(sum(seconds), _now(model) - started)
    return Generated([decoder.result() for decoder in decoders], timing, read, seconds)


def _decode(rows: Steps, stepped: Stepped, decoders: Sequence[RowDecoder]) -> None:
    """Until every decoder is done, from what the prompts' last tokens gave."""
    active = list(decoders)
    try:
        while active:
            tokens = [row.accept(stepped.logits[i], stepped.greedy(i)) for i, row in enumerate(active)]
            going = [i for i, token in enumerate(tokens) if token is not None]
            if len(going) < len(active):
                active = [active[i] for i in going]
                rows.keep(going)
            if active:
                stepped = rows.step([token for token in tokens if token is not None])
    finally:
        rows.close()


@dataclass(frozen=True, slots=True)
class TargetScore:
    """Log-probability of a target in nats, summed; greedy is True where each of its tokens was the most likely."""

    total: float
    tokens: int
    greedy: bool


@dataclass(slots=True)
class Scored:
    rows: list[TargetScore]
    timing: Timing


@torch.inference_mode()
def score(
    runner: Runner,
    method: Method,
    prefix: Sequence[int],
    targets: Sequence[Sequence[int]],
    scope: Literal["prefix", "window"] = "prefix",
) -> Scored:
    """Log-likelihood of each target given one prefix. No length × vocab tensor is made.

    Without a prefix a target's first token is read and not scored.
    """
    if any(len(target) == 0 for target in targets):
        raise ValueError("every target needs at least one token")
    runner = method.runner(runner)
    model, started = runner.model, _now(runner.model)
    if not prefix:
        rows = [_score_unprompted(runner, method, target) for target in targets]
        return Scored(rows, Timing(_now(model) - started, 0.0))
    if scope == "window":
        rows = [_score_window(runner, method, prefix, target) for target in targets]
        return Scored(rows, Timing(_now(model) - started, 0.0))
    prefilled = method.prefill(runner, Tokens.pad([prefix], model.device))
    read = _now(model)
    rows = [_continue(runner, prefilled.hidden[:, -1:], prefilled.cache.rows([0]), target) for target in targets]
    return Scored(rows, Timing(read - started, _now(model) - read))


def _score_unprompted(runner: Runner, method: Method, target: Sequence[int]) -> TargetScore:
    return score(runner, method, target[:1], [target[1:]]).rows[0] if len(target) > 1 else TargetScore(0.0, 0, True)


def _continue(runner: Runner, last: Tensor, cache: Cache, target: Sequence[int]) -> TargetScore:
    ids = torch.tensor([list(target)], device=last.device)
    hidden = last if len(target) == 1 else torch.cat((last, runner.extend(cache, ids[:, :-1])), dim=1)
    return target_score(runner.model, hidden[0], ids[0])


def _score_window(runner: Runner, method: Method, prefix: Sequence[int], target: Sequence[int]) -> TargetScore:
    prompt = Tokens.pad([[*prefix, *target[:-1]]], runner.model.device)
    prefilled = method.prefill(runner, prompt, tail=len(target))
    return target_score(runner.model, prefilled.hidden[0], torch.tensor(list(target), device=runner.model.device))


def target_score(model: MambaLM, hidden: Tensor, target: Tensor, chunk: int = 512) -> TargetScore:
    """(n, d_model) hidden states after the final norm, each predicting one of (n,) target tokens."""
    total, greedy = 0.0, True
    for start in range(0, len(target), chunk):
        logits = model.logits(hidden[start : start + chunk])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = target[start : start + chunk]
        total += float(F.log_softmax(logits, dim=-1).gather(1, wanted[:, None]).double().sum())
        greedy = greedy and bool((logits.argmax(-1) == wanted).all())
    return TargetScore(total, len(target), greedy)
