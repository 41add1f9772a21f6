"""Log-probabilities as a completion reports them: of the tokens chosen, of the prompt's own tokens, and of rivals.

A prompt's tokens are scored as `statespan.models.generate.score` scores a target. From position `start` > 1 on that is
its scope "prefix": the method reads the first `start` tokens, the rest continues as plain Mamba. From the beginning it
is its scope "window": one pass under the method in which no scored position may be dropped, since each one's output is
asked for. Positions go through the head in chunks, so that no length × vocab tensor is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.models.hook import Method
from statespan.models.runner import Runner, Tokens

CHUNK = 512


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token with its log-probability in nats, and the most likely tokens at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_scores(logits: Tensor, chosen: Sequence[int], top: int) -> list[TokenScore]:
    """(n, vocab_size) logits and the n tokens taken there -> their scores, with `top` rivals each."""
    logprobs = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    own = logprobs.gather(1, torch.tensor(list(chosen), device=logprobs.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    rivals = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenScore(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, (ids, values) in zip(chosen, own, rivals, strict=True)
    ]


def prompt_scores(runner: Runner, method: Method, ids: Sequence[int], start: int, top: int) -> list[TokenScore]:
    """Scores of ids[start:], start at least 1: nothing predicts the first token."""
    runner = method.runner(runner)
    device, target = runner.model.device, list(ids[start:])
    if not target:
        return []
    if start == 1:
        hidden = method.prefill(runner, Tokens.pad([ids[:-1]], device), tail=len(target)).hidden
    else:
        prefilled = method.prefill(runner, Tokens.pad([ids[:start]], device))
        hidden = prefilled.hidden[:, -1:]
        if len(target) > 1:
            rest = torch.tensor([target[:-1]], device=device)
            hidden = torch.cat((hidden, runner.extend(prefilled.cache, rest)), dim=1)
    scores: list[TokenScore] = []
    for at in range(0, len(target), CHUNK):
        scores += token_scores(runner.model.logits(hidden[0, at : at + CHUNK]), target[at : at + CHUNK], top)
    return scores
