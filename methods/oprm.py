"""OPRM: the prompt's context is read in chunks, each with the instruction before and the question behind it; the answer
goes on from the chunk that is surest of its first token.

    chunk = argmin_c H(p(first answer token | head, context_c, question))

Source: "Overflow Prevention Enhances Long-Context Recurrent LLMs", Ben-Kish et al., arXiv:2505.07793 (code read): least
entropy over chunks of 1,000, 2,000 or 3,000 tokens. It needs no training and no hook in any layer; it answers questions
whose answer lies in one place and does nothing for running text.

Ours differs: head and question are the prompt's first and last tokens by count (there the template is split); chunks
can overlap, so that no fact is cut in two; first answer tokens that mean "not here" are given as ids (`refusals`), and
where every chunk says so the surest of all answers. Answers of several chunks are not joined (theirs for summaries).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.methods.base import ConfiguredMethod, ModelFacts
from statespan.methods.oprm_params import OPRMParams
from statespan.models.hook import Span
from statespan.models.runner import Cache, Prefilled, Runner, Tokens

AT_ONCE = 4  # tokens read in one batch of chunks, in runner's chunks


class Read(NamedTuple):
    """A chunk that was read: prompt positions, how unsure it is, last hidden state, cache."""

    places: Tensor
    doubt: tuple[bool, float]
    """Whether it refuses to answer, and the entropy of the next token in nats."""

    hidden: Tensor
    cache: Cache


class OPRM(ConfiguredMethod):
    name: ClassVar[str] = "oprm"
    params_class = OPRMParams

    def __init__(self, params: OPRMParams, facts: ModelFacts) -> None:
        around = params.head_tokens + params.question_tokens
        self.params, chunk = params, params.chunk_tokens or (facts.train_length or 2_000) - around
        if chunk < 16:
            raise params.refuse("chunk_tokens", f"leave at least 16 beside {around} tokens of head and question", chunk)
        self.chunk = chunk

    def first_layer_changed(self, length: int) -> int | None:
        return 0 if len(self.chunks(length)) > 1 else None

    def chunks(self, length: int) -> list[tuple[int, int]]:
        """Context ranges of a prompt, [first, last) each; one range where it fits into a chunk."""
        first, end = self.params.head_tokens, length - self.params.question_tokens
        if end - first <= self.chunk:
            return [(first, max(end, first))]
        stride = max(round(self.chunk * (1 - self.params.overlap)), 1)
        starts = list(range(first, end - self.chunk, stride))
        return [*((at, at + self.chunk) for at in starts), (end - self.chunk, end)]

    def prefill(self, runner: Runner, prompt: Tokens, tail: int = 1) -> Prefilled:
        lengths = [own - tail + 1 for own in prompt.lengths]  # what follows is an answer's
        if all(len(self.chunks(length)) == 1 for length in lengths):
            return runner.prefill(prompt, tail=tail)
        rows = []
        for row, (own, length) in enumerate(zip(prompt.lengths, lengths, strict=True)):
            ids = prompt.ids[row, prompt.ids.shape[1] - own :]
            rows.append(self._go_on(runner, self._surest(runner, ids[:length]), ids, length))
        read = tuple(row.span.length for row in rows)
        positions = [F.pad(row.positions[0], (max(read) - row.span.length, 0), value=-1) for row in rows]
        span = Span(length=max(read), lengths=read, prompt_lengths=prompt.lengths, tail=tail)
        hidden, cache = torch.cat([row.hidden for row in rows]), Cache.join([row.cache for row in rows])
        return Prefilled(hidden, cache, span, torch.stack(positions))

    def _surest(self, runner: Runner, ids: Tensor) -> Read:
        """Of all chunks of one prompt, read a batch at a time, the one whose next token has the least entropy."""
        length, params = len(ids), self.params
        at = torch.arange(length, device=ids.device)
        question = max(length - params.question_tokens, min(params.head_tokens, length))
        places = [torch.cat((at[: params.head_tokens], at[a:b], at[question:])) for a, b in self.chunks(length)]
        per_batch, best = max(AT_ONCE * runner.chunk // len(places[0]), 1), None
        for start in range(0, len(places), per_batch):
            found = self._read(runner, ids, places[start : start + per_batch])
            if best is None or found.doubt < best.doubt:
                best = found
        assert best is not None
        return best

    def _read(self, runner: Runner, ids: Tensor, places: Sequence[Tensor]) -> Read:
        read = runner.prefill(Tokens(torch.stack([ids[one] for one in places]), (len(places[0]),) * len(places)))
        logits = runner.model.logits(read.hidden[:, -1])
        logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        entropy, first = -(logs.exp() * logs).sum(-1), logits.argmax(-1).tolist()
        doubts = [(token in self.params.refusals, nats) for token, nats in zip(first, entropy.tolist(), strict=True)]
        best = min(range(len(doubts)), key=doubts.__getitem__)
        return Read(places[best], doubts[best], read.hidden[best : best + 1], read.cache.rows([best]))

    def _go_on(self, runner: Runner, best: Read, ids: Tensor, length: int) -> Prefilled:
        """Read an answer's tokens, if any were given, from the chosen chunk's cache."""
        hidden, rest = best.hidden, ids[length:]
        if len(rest):
            hidden = torch.cat((hidden, runner.extend(best.cache, rest[None])), dim=1)
        places = torch.cat((best.places, torch.arange(length, len(ids), device=ids.device)))
        span = Span(length=len(places), lengths=(len(places),), prompt_lengths=(len(ids),), tail=len(rest) + 1)
        return Prefilled(hidden, best.cache, span, places[None])
