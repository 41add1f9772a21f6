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

from statespan.models.hook import Method
from statespan.models.lm import MambaLM
from statespan.models.runner import Cache, Runner, Tokens


class Decodes(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How tokens are chosen and when to stop. `temperature` 0 is greedy."""

    max_new_tokens: int
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


class RowDecoder:
    """Chooses one row's tokens. Its choices depend on its own logits only, never on the rows beside it."""

    def __init__(self, decoding: Decoding, tokenizer: Decodes) -> None:
        self.decoding, self.tokenizer = decoding, tokenizer
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish: Literal["stop", "length"] | None = None
        self._random = torch.Generator().manual_seed(decoding.seed) if decoding.temperature > 0 else None

    def accept(self, logits: Tensor) -> int | None:
        """Choose from (vocab_size,) logits. Returns the token to feed next, or None when the row is done."""
        if self.decoding.max_new_tokens < 1:
            self.finish = "length"
            return None
        wide = logits.detach().cpu().to(torch.promote_types(logits.dtype, torch.float32))
        token = self._choose(wide)
        if token == self.decoding.eos_id:
            self.finish = "stop"
            return None
        self.ids.append(token)
        self.logprobs.append(float(F.log_softmax(wide, dim=-1)[token]))
        self.text = self.tokenizer.decode(self.ids)
        cuts = [at for stop in self.decoding.stop if (at := self.text.find(stop)) >= 0]
        if cuts:
            self.text, self.finish = self.text[: min(cuts)], "stop"
        elif len(self.ids) >= self.decoding.max_new_tokens:
            self.finish = "length"
        return None if self.finish else token

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
) -> Generated:
    """Complete each prompt. Rows that are done leave the batch."""
    runner = method.runner(runner)
    model, started = runner.model, _now(runner.model)
    prefilled = method.prefill(runner, Tokens.pad(prompts, model.device))
    logits = model.logits(prefilled.hidden[:, -1])
    read = _now(model)
    decoders = [RowDecoder(decoding, tokenizer) for decoding in decodings]
    active, cache = list(range(len(decoders))), prefilled.cache
    while active:
        tokens = [decoders[row].accept(logits[i]) for i, row in enumerate(active)]
        going = [i for i, token in enumerate(tokens) if token is not None]
        if len(going) < len(active):
            active = [active[i] for i in going]
            cache = cache.rows(going) if going else cache
        if active:
            logits = runner.step(cache, torch.tensor([tokens[i] for i in going], device=model.device))
    timing = Timing(read - started, _now(model) - read)
    return Generated([decoder.result() for decoder in decoders], timing)


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
    """Log-likelihood of each target given one prefix. No length × vocab tensor is made."""
    if any(len(target) == 0 for target in targets):
        raise ValueError("every target needs at least one token")
    runner = method.runner(runner)
    model, started = runner.model, _now(runner.model)
    if scope == "window":
        rows = [_score_window(runner, method, prefix, target) for target in targets]
        return Scored(rows, Timing(_now(model) - started, 0.0))
    prefilled = method.prefill(runner, Tokens.pad([prefix], model.device))
    read = _now(model)
    rows = [_continue(runner, prefilled.hidden[:, -1:], prefilled.cache.rows([0]), target) for target in targets]
    return Scored(rows, Timing(read - started, _now(model) - read))


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
