"""Where Query, Key and Value may begin: fitted to the frozen model, before ReMamba's training proper.

    Value(h_j)        → the embedding of token j: an inserted vector begins as the token it stands for
    cos(k_j, q)       → 1 at tokens that a prompt shares with its answer and around them, 0 elsewhere

So stage 2 begins as the model itself on the prompt with the tokens kept in which the answer stands. The authors' start
(slices of in_proj and out_proj, adapter.py) begins as noise: vectors that the model never saw, kept for no reason, with
steps that hardly depend on them. Only hidden states of stage 1 are read, without a gradient through the model. Ours:
the paper has no such start. Its time counts as the training's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.methods.adapter import Selection
from statespan.methods.insertion import similarity
from statespan.models.runner import Runner, Tokens
from statespan.training.adapter_rows import LONGEST_ANSWER, AdapterBatch

SAME = 3  # tokens in a row that prompt and answer share
BEFORE, BEHIND = 16, 2  # tokens around them that belong to the sentence
RATE, SHARPNESS, MIDDLE = 1e-3, 10.0, 0.5


def mentions(prompt: Tensor, answer: Tensor) -> Tensor:
    """(rows, length), (rows, tokens) -> where a prompt says what the answer says, (rows, length) bool"""
    same = min(SAME, answer.shape[1])
    ours, theirs = prompt.unfold(1, same, 1), answer.unfold(1, same, 1)
    found = (ours[:, :, None] == theirs[:, None]).all(-1).any(-1)  # (rows, length - same + 1)
    found = F.pad(found, (0, same - 1)).float()[:, None]
    spread = F.max_pool1d(F.pad(found, (same - 1 + BEHIND, BEFORE)), same + BEHIND + BEFORE, stride=1)
    return spread[:, 0] > 0


def start_losses(selection: Selection, states: Tensor, embedded: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How far Value is from the embeddings, as a share of their variance, and how badly cosines tell what is wanted.

    Args:
        states: (rows, length, d_model) of stage 1, after the final norm; the last is the query's.
        embedded: (rows, length, d_model)
        wanted: (rows, length) bool. Rows that want nothing say nothing of cosines.
    """
    spread = (embedded - embedded.mean((0, 1))).square().mean()
    value = (selection.value(states) - embedded).square().mean() / spread
    told = wanted.any(1)
    if not told.any():
        return value, value.new_zeros(())
    logits = SHARPNESS * (similarity(selection, states[told], states[told, -1]) - MIDDLE)
    target = wanted[told].to(logits.dtype)
    balanced = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    share = target.mean(1, keepdim=True)
    weights = torch.where(target > 0, 0.5 / share, 0.5 / (1 - share).clamp_min(1e-6))
    return value, (balanced * weights).mean()


@torch.no_grad()
def begin_small(selection: Selection, states: Tensor, embedded: Tensor) -> None:
    """Value's outputs, some fifty times an embedding's size where they begin as slices, brought to its size."""
    last: Any = selection.value[2]
    size = embedded.std() / selection.value(states).std()
    last.weight.mul_(size)
    last.bias.copy_(embedded.mean((0, 1)))


def fit_selection(
    selection: Selection, runner: Runner, batches: Iterable[AdapterBatch], steps: int
) -> tuple[float, float]:
    """Fit Query, Key and Value in place on so many batches; both losses, means over the last tenth of the steps."""
    named = [p for name, p in selection.named_parameters() if not name.startswith("theta")]
    optimizer = torch.optim.AdamW(named, lr=RATE, weight_decay=0.01)
    found = []
    for step, batch in zip(range(steps), batches, strict=False):
        here = batch.to(runner.model.device)
        prompt, answer = here.ids[:, : here.prompt_length], here.ids[:, here.prompt_length :]
        with torch.no_grad():
            tokens = Tokens(prompt, (prompt.shape[1],) * len(prompt))
            states = runner.model.norm_f(runner.vanilla(tokens, runner.n_layer).hidden).to(selection.theta[0].dtype)
            embedded = runner.model.embed(prompt).to(states.dtype)
            wanted = mentions(prompt[:, :-1], answer)
        wanted = F.pad(wanted, (0, 1))  # the query itself is never wanted
        if step == 0:
            begin_small(selection, states, embedded)
        if answer.shape[1] > LONGEST_ANSWER:  # running text: nothing says what comes next
            wanted = torch.zeros_like(wanted)
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + float(torch.cos(torch.tensor(step / steps * torch.pi))))
        losses = start_losses(selection, states, embedded, wanted)
        optimizer.zero_grad(set_to_none=True)
        (losses[0] + losses[1]).backward()
        optimizer.step()
        found.append(torch.stack(losses).detach())
    value, cosine = torch.stack(found[-max(steps // 10, 1) :]).mean(0).tolist()
    return value, cosine
