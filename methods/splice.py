"""ReMamba's stage 2: the prompt with vectors in its window's place, and what happens to their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.kernels.dispatch import on_device
from statespan.methods.adapter import Selection
from statespan.methods.insertion import Inserted, Window
from statespan.models.hook import Method, ScanInputs
from statespan.models.runner import Runner, Stream, Tokens

DeltaRule = Literal["official", "scaled_bias", "multiply"]


def spliced(
    runner: Runner, prompt: Tokens, windows: Sequence[Window], rows: Sequence[Inserted]
) -> tuple[Stream, Tensor | None, Tensor]:
    """The stream of X', left-padded again, with α and a mask of where vectors stand, (batch, length) each.

    α is None where no row adapts its steps. All places are worked out where the stream is, for a copy from the host
    would wait until stage 1 has been computed.
    """
    embedded, width = runner.model.embed(prompt.ids), prompt.ids.shape[1]
    counts = [len(row.places) for row in rows]
    lengths = tuple(own - window.size + kept for own, window, kept in zip(prompt.lengths, windows, counts, strict=True))
    # every position of X' is one of X, or behind those a vector; pads repeat the first
    sources = [
        _sources(width - own, width, window, kept, max(lengths), embedded.device)
        for own, window, kept in zip(prompt.lengths, windows, counts, strict=True)
    ]
    at = torch.stack(sources)
    vectors = _padded([row.vectors for row in rows]).to(embedded.dtype)
    pads = on_device(tuple(width - own for own in prompt.lengths), at.device)
    new_pads = on_device(tuple(max(lengths) - own for own in lengths), at.device)
    places = torch.cat((torch.arange(width, device=at.device) - pads[:, None], _padded([r.places for r in rows])), 1)
    filled = torch.arange(at.shape[1], device=at.device) >= new_pads[:, None]
    positions = places.gather(1, at).where(filled, -1)
    embeds = torch.cat((embedded, vectors), 1).gather(1, at[..., None].expand(-1, -1, embedded.shape[-1]))
    stream = runner.stream(Tokens(torch.zeros_like(positions), lengths), embeds)
    stream.positions = positions
    mask = at >= width
    if not any(row.alpha is not None and len(row.alpha) for row in rows):
        return stream, None, mask
    weights = _padded([row.vectors.new_zeros(len(row.places)) if row.alpha is None else row.alpha for row in rows])
    return stream, torch.cat((weights.new_zeros(len(rows), width), weights), 1).gather(1, at), mask


def _sources(first: int, width: int, window: Window, kept: int, length: int, device: torch.device) -> Tensor:
    """(length,) where each position of a row of X' comes from, in (width) embeddings with the vectors behind them"""
    end = first + window.start + window.size
    ranges = ((first, first + window.start), (width, width + kept), (end, width))
    at = torch.cat([torch.arange(*each, device=device) for each in ranges])
    return F.pad(at, (length - len(at), 0))


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """(batch, longest, …)"""
    longest = max(map(len, rows))
    fills = [(0, 0) * (row.ndim - 1) + (0, longest - len(row)) for row in rows]
    return torch.stack([F.pad(row, fill) if any(fill) else row for row, fill in zip(rows, fills, strict=True)])


def vector_columns(lengths: Sequence[int], windows: Sequence[Window], rows: Sequence[Inserted]) -> tuple[int, int]:
    """Between which columns of X', of rows of these lengths, vectors stand; without asking a GPU."""
    spans = [
        (max(lengths) - own + window.start, max(lengths) - own + window.start + len(row.places))
        for own, window, row in zip(lengths, windows, rows, strict=True)
        if len(row.places)
    ]
    return (min(begin for begin, _ in spans), max(end for _, end in spans)) if spans else (0, 0)


class Adapted(Method):
    """Stage 2: changes the steps of inserted positions in every layer, for one prompt batch.

    alpha: (batch, length) and mask (batch, length), True where a vector stands, which is within the columns `reach`

    Without gradients it writes into the steps it is given: they are the layer's own, for no trial shares a stage 2, and
    a copy of them all would cost more than the change of a few.
    """

    name: ClassVar[str] = "remamba, stage 2"

    def __init__(
        self, selection: Selection, alpha: Tensor, mask: Tensor, rule: DeltaRule, reach: tuple[int, int]
    ) -> None:
        self.selection, self.alpha, self.mask, self.rule, self.reach = selection, alpha, mask, rule, reach

    def first_layer_changed(self, length: int) -> int | None:
        return 0

    def before_scan(self, layer: int, inputs: ScanInputs, seen: Tensor | None = None) -> ScanInputs:
        begin = max(self.reach[0] - inputs.span.start, 0)
        end = min(self.reach[1] - inputs.span.start, inputs.length)
        if begin >= end:
            return inputs
        there, here = slice(inputs.span.start + begin, inputs.span.start + end), slice(begin, end)
        alpha = self.alpha[:, there, None]
        wide = torch.promote_types(inputs.dt.dtype, torch.float32)
        raw, theta = inputs.dt[:, here].to(wide), self.selection.theta[layer].to(wide)
        if self.rule == "official":
            changed = torch.addcmul(theta, alpha, raw)
        elif self.rule == "scaled_bias":
            bias = inputs.dt_bias.to(wide)
            changed = torch.addcmul(theta, alpha, raw + bias) - bias
        else:
            bias = inputs.dt_bias.to(wide)
            changed = softplus_inverse(alpha * F.softplus(raw + bias)) - bias
        if self.mask.shape[0] > 1:  # of one row, every column between them is a vector's
            changed = torch.where(self.mask[:, there, None], changed, raw)
        dt = inputs.dt.clone() if torch.is_grad_enabled() else inputs.dt
        dt[:, here] = changed
        return replace(inputs, dt=dt)


def softplus_inverse(steps: Tensor) -> Tensor:
    """What softplus makes the steps of; -1e4, whose softplus is 0, for a step of 0"""
    some = steps.clamp_min(torch.finfo(steps.dtype).tiny)
    return torch.where(steps > 0, some + torch.log(-torch.expm1(-some)), -1e4)
