"""ReMamba's parts: where the window lies, which of its tokens stay, and what stage 2 does to their steps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.errors import UserError
from statespan.methods.adapter import Selection
from statespan.models.hook import Method, ScanInputs
from statespan.models.runner import Runner, Stream, Tokens

Selector = Literal["topk", "random", "fixed", "first", "last"]
Order = Literal["text", "reversed", "score"]
Mix = Literal["adapt", "multiplicative_softmax", "multiplicative_raw", "insert_only"]
DeltaRule = Literal["official", "scaled_bias", "multiply"]


class Window(NamedTuple):
    """Prompt positions start … start + size - 1 are replaced by `kept` vectors."""

    start: int
    size: int
    kept: int


def window_of(
    prompt_length: int, start: float, share: float, ratio: float | None, kept: int | None, min_tail: int = 0
) -> Window:
    """The window of a prompt. Products and their rounding are the authors': ceil(100 * 0.07) is 8.

    A window that keeps nothing leaves at least the last token, whose output is asked for.
    """
    first = int(start * prompt_length)
    size = max(math.ceil(prompt_length * share), 1) if share > 0 else 0
    size = min(size, prompt_length - first - min_tail)
    wanted = math.ceil(size * ratio) if ratio is not None else kept
    assert wanted is not None
    if wanted == 0:
        size = min(size, prompt_length - first - 1)
    if size <= 0:
        return Window(first, 0, 0)
    if wanted > size:
        raise UserError(
            f"remamba.kept must be at most the window, {size} of this prompt's {prompt_length} tokens; got {wanted}"
        )
    return Window(first, size, wanted)


def pick(selector: Selector, window: Window, scores: Tensor | None, seed: int, ids: Sequence[int]) -> Tensor:
    """Positions kept, relative to the window, increasing: (kept,). `ids` are the prompt's tokens."""
    size, kept = window.size, window.kept
    if selector == "topk":
        assert scores is not None
        return scores.detach().topk(kept).indices.sort().values
    if selector == "random":
        name = hashlib.sha256(json.dumps([seed, *ids]).encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(name[:7]))
        return torch.randperm(size, generator=random)[:kept].sort().values
    if selector == "fixed":  # the authors': size, size - step, … above 0, so the first is the token behind the window
        return torch.arange(size, 0, -math.ceil(size / kept)).flip(0)
    return torch.arange(kept) + (0 if selector == "first" else size - kept)


def similarity(selection: Selection, window: Tensor, query: Tensor) -> Tensor:
    """(tokens, d_model), (d_model,) hidden states after the final norm -> cosines (tokens,), in float32 or wider"""
    return F.cosine_similarity(selection.key(window), selection.query(query)[None], dim=-1, eps=1e-8)


def arranged(picked: Tensor, scores: Tensor | None, order: Order) -> Tensor:
    """Picked positions in the order of insertion."""
    if order == "text":
        return picked
    if order == "reversed":
        return picked.flip(0)
    assert scores is not None, "an order by score needs the scores of selector topk"
    return picked[scores.detach()[picked].argsort(descending=True)]


def mixed(vectors: Tensor, scores: Tensor | None, mix: Mix) -> Tensor:
    """(kept, d_model) vectors and (kept,) scores of theirs -> what enters the prompt"""
    if mix in ("adapt", "insert_only"):
        return vectors
    assert scores is not None, "a multiplicative mix needs the scores of selector topk"
    return vectors * (scores.softmax(0) if mix == "multiplicative_softmax" else scores)[:, None]


@dataclass(frozen=True, slots=True)
class Inserted:
    """What replaces one row's window.

    places: (kept,) prompt positions, in the order of insertion
    vectors: (kept, d_model)
    alpha: (kept,) ReLU of the scores, or None where steps are not adapted
    """

    places: Tensor
    vectors: Tensor
    alpha: Tensor | None


def spliced(
    runner: Runner, prompt: Tokens, windows: Sequence[Window], rows: Sequence[Inserted]
) -> tuple[Stream, Tensor | None, Tensor]:
    """The stream of X', left-padded again, with α and a mask of where vectors stand, (batch, length) each.

    α is None where no row adapts its steps.
    """
    embedded = runner.model.embed(prompt.ids)
    lengths = tuple(
        own - window.size + len(row.places) for own, window, row in zip(prompt.lengths, windows, rows, strict=True)
    )
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for row, (own, window, made) in enumerate(zip(prompt.lengths, windows, rows, strict=True)):
        text, at = embedded[row, prompt.ids.shape[1] - own :], torch.arange(own, device=embedded.device)
        end, fill = window.start + window.size, max(lengths) - lengths[row]
        around = (fill + window.start, own - end)  # positions before and behind the vectors
        alpha = text.new_zeros(len(made.places)) if made.alpha is None else made.alpha
        columns.append(
            (
                F.pad(torch.cat((text[: window.start], made.vectors.to(text.dtype), text[end:])), (0, 0, fill, 0)),
                F.pad(alpha, around),
                F.pad(torch.ones_like(made.places, dtype=torch.bool), around),
                F.pad(torch.cat((at[: window.start], made.places, at[end:])), (fill, 0), value=-1),
            )
        )
    embeds, alpha, mask, positions = (torch.stack(parts) for parts in zip(*columns, strict=True))
    stream = runner.stream(Tokens(torch.zeros_like(positions), lengths), embeds)
    stream.positions = positions
    return stream, alpha if any(row.alpha is not None and len(row.alpha) for row in rows) else None, mask


class Adapted(Method):
    """Stage 2: changes the steps of inserted positions in every layer, for one prompt batch.

    alpha: (batch, length) and mask (batch, length), True where a vector stands
    """

    name: ClassVar[str] = "remamba, stage 2"

    def __init__(self, selection: Selection, alpha: Tensor, mask: Tensor, rule: DeltaRule) -> None:
        self.selection, self.alpha, self.mask, self.rule = selection, alpha, mask, rule
        columns = mask.any(0).nonzero()[:, 0]
        self.reach = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        """The columns between which vectors stand: asked once, for a GPU would have to stop at each layer."""

    def first_layer_changed(self, length: int) -> int | None:
        return 0

    def before_scan(self, layer: int, inputs: ScanInputs, seen: Tensor | None = None) -> ScanInputs:
        begin = max(self.reach[0] - inputs.span.start, 0)
        end = min(self.reach[1] - inputs.span.start, inputs.length)
        if begin >= end:
            return inputs
        there, here = slice(inputs.span.start + begin, inputs.span.start + end), slice(begin, end)
        mask, alpha = self.mask[:, there, None], self.alpha[:, there, None]
        wide = torch.promote_types(inputs.dt.dtype, torch.float32)
        raw, bias, theta = inputs.dt[:, here].to(wide), inputs.dt_bias.to(wide), self.selection.theta[layer].to(wide)
        if self.rule == "official":
            changed = alpha * raw + theta
        elif self.rule == "scaled_bias":
            changed = alpha * (raw + bias) + theta - bias
        else:
            changed = softplus_inverse(alpha * F.softplus(raw + bias)) - bias
        dt = inputs.dt.clone()
        dt[:, here] = torch.where(mask, changed, raw).to(dt.dtype)
        return replace(inputs, dt=dt)


def softplus_inverse(steps: Tensor) -> Tensor:
    """What softplus makes the steps of; -1e4, whose softplus is 0, for a step of 0"""
    some = steps.clamp_min(torch.finfo(steps.dtype).tiny)
    return torch.where(steps > 0, some + torch.log(-torch.expm1(-some)), -1e4)
