"""ReMamba's selection: where the window lies, which of its tokens stay, and the vectors that stand for them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statespan.errors import UserError
from statespan.kernels.wide_linear import wide_linear
from statespan.methods.adapter import Selection
from statespan.methods.remamba_params import ReMambaParams

Selector = Literal["topk", "random", "fixed", "first", "last"]
Order = Literal["text", "reversed", "score"]
Mix = Literal["adapt", "multiplicative_softmax", "multiplicative_raw", "insert_only"]


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
    """Positions kept, relative to the window, increasing: (kept,), or (rows, kept) of (rows, window) scores. `ids` are
    the prompt's tokens."""
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
    """(…, tokens, d_model), (…, d_model) hidden states after the final norm -> cosines (…, tokens), float32 or wider"""
    first, last = (cast(nn.Linear, selection.key[place]) for place in (0, 2))
    rows = wide_linear(F.silu(wide_linear(window.flatten(0, -2), first.weight, first.bias)), last.weight, last.bias)
    asked = selection.query(query.to(last.weight.dtype))
    return F.cosine_similarity(rows.unflatten(0, window.shape[:-1]), asked[..., None, :], dim=-1, eps=1e-8)


def arranged(picked: Tensor, scores: Tensor | None, order: Order) -> Tensor:
    """(…, kept) picked positions in the order of insertion"""
    if order == "text":
        return picked
    if order == "reversed":
        return picked.flip(-1)
    assert scores is not None, "an order by score needs the scores of selector topk"
    return picked.gather(-1, scores.detach().gather(-1, picked).argsort(descending=True))


def mixed(vectors: Tensor, scores: Tensor | None, mix: Mix) -> Tensor:
    """(…, kept, d_model) vectors and (…, kept) scores of theirs -> what enters the prompt"""
    if mix in ("adapt", "insert_only"):
        return vectors
    assert scores is not None, "a multiplicative mix needs the scores of selector topk"
    return vectors * (scores.softmax(-1) if mix == "multiplicative_softmax" else scores)[..., None]


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

    @classmethod
    def nothing(cls, d_model: int, device: torch.device) -> Inserted:
        """A window that is cut out."""
        none = torch.empty(0, device=device)
        return cls(none.long(), none.new_empty((0, d_model)), none)


def insertions(
    params: ReMambaParams, selection: Selection, states: Tensor, query: Tensor, window: Window, ids: Tensor
) -> list[Inserted]:
    """What replaces the windows of rows that lie alike.

    Args:
        states: (rows, window + 1 or less, d_model) after the final norm; `fixed` takes the token behind the window too.
        query: (rows, d_model) the prompts' last.
        ids: (rows, length) the prompts' tokens, by which the random selector draws.
    """
    with torch.autocast(states.device.type, enabled=False):  # scores tie in bfloat16
        scores = similarity(selection, states[:, : window.size], query) if params.selector == "topk" else None
        places = arranged(_picked(params, states, scores, window, ids), scores, params.order)
        chosen = None if scores is None else scores.gather(-1, places)
        rows = places[..., None].expand(-1, -1, states.shape[-1])
        vectors = mixed(selection.value(states.gather(1, rows).to(selection.theta[0].dtype)), chosen, params.mix)
    alpha = chosen.relu() if chosen is not None and params.mix == "adapt" else None
    weights = [None] * len(places) if alpha is None else alpha.unbind()
    return [Inserted(*one) for one in zip((places + window.start).unbind(), vectors.unbind(), weights, strict=True)]


def _picked(params: ReMambaParams, states: Tensor, scores: Tensor | None, window: Window, ids: Tensor) -> Tensor:
    """(rows, kept) increasing places in the window"""
    assert params.selector != "none"
    if scores is not None:
        return pick(params.selector, window, scores, params.seed, ())
    drawn_by = ids.tolist() if params.selector == "random" else [()] * len(ids)
    picked = torch.stack([pick(params.selector, window, None, params.seed, row) for row in drawn_by])
    return picked[:, picked.amax(0) < states.shape[1]].to(states.device)
