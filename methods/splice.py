"""ReMamba's stage 2: the prompt with vectors in its window's place, and what happens to their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.methods.adapter import Selection
from statespan.methods.insertion import Inserted, Window
from statespan.models.hook import Method, ScanInputs
from statespan.models.runner import Runner, Stream, Tokens

DeltaRule = Literal["official", "scaled_bias", "multiply"]


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

    Without gradients it writes into the steps it is given: they are the layer's own, for no trial shares a stage 2, and
    a copy of them all would cost more than the change of a few.
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
        dt = inputs.dt.clone() if torch.is_grad_enabled() else inputs.dt
        dt[:, here] = torch.where(mask, changed, raw).to(dt.dtype)
        return replace(inputs, dt=dt)


def softplus_inverse(steps: Tensor) -> Tensor:
    """What softplus makes the steps of; -1e4, whose softplus is 0, for a step of 0"""
    some = steps.clamp_min(torch.finfo(steps.dtype).tiny)
    return torch.where(steps > 0, some + torch.log(-torch.expm1(-some)), -1e4)
