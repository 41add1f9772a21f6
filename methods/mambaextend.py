"""MambaExtend: every layer's steps are multiplied by a scale of its own, found by search.

    Δ ← s_l Δ     in all channels of layer l, during prefill, for prompts longer than the training length

Source: MambaExtend, Azizi et al., ICLR 2025; ArminAzizi98/LongContextMamba (read, not run): scales start at U(0.75, 1)
and are learnt by SPSA or back-propagation on 20 texts of the target length, one set a length.

Ours differs: the scales are parameters of a search like any other (theirs are accepted by test perplexity), given one
by one, or by up to three knots over the depth with geometric interpolation between them, so that one search space
serves any depth; `per_doubling` makes s_l the factor for each doubling beyond the training length, so that one set
serves all lengths.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from statespan.errors import UserError
from statespan.methods.base import ConfiguredMethod, ModelFacts, Params
from statespan.methods.row_values import RowValues
from statespan.models.hook import ScanInputs


class MambaExtendParams(Params):
    method: ClassVar[str] = "mambaextend"

    scales: tuple[float, ...] | None = Field(default=None, min_length=1)
    """One scale a layer."""

    first: float | None = Field(default=None, gt=0.0, le=4.0)
    """Short form: the scale of layer 0."""

    middle: float | None = Field(default=None, gt=0.0, le=4.0)
    """Short form: the scale at half the depth; by default between the other two."""

    last: float | None = Field(default=None, gt=0.0, le=4.0)
    """Short form: the scale of the last layer; by default that of layer 0."""

    per_doubling: bool = False
    """The scales are for each doubling of the prompt beyond the training length, not for every longer prompt alike."""

    min_ratio: float = Field(default=1.0, ge=1.0)
    """Only prompts longer than this multiple of the training length are changed."""

    @model_validator(mode="after")
    def _one_way_to_name_scales(self) -> MambaExtendParams:
        if (self.scales is None) == (self.first is None):
            raise ValueError("give either scales, one a layer, or first with middle and last")
        if self.scales is not None and (self.middle is not None or self.last is not None):
            raise ValueError("middle and last go with first, not with scales")
        if self.scales is not None and min(self.scales) <= 0:
            raise ValueError(f"scales must be above 0; got {list(self.scales)}")
        return self

    def of_layers(self, n_layer: int) -> list[float]:
        """The scale of each layer."""
        if self.scales is not None:
            return list(self.scales)
        assert self.first is not None
        last = self.first if self.last is None else self.last
        middle = math.sqrt(self.first * last) if self.middle is None else self.middle
        places = [2 * layer / max(n_layer - 1, 1) for layer in range(n_layer)]  # 0 … 2
        return [
            self.first ** (1 - at) * middle**at if at < 1 else middle ** (2 - at) * last ** (at - 1) for at in places
        ]

    def canonical(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)


class MambaExtend(ConfiguredMethod):
    name: ClassVar[str] = "mambaextend"
    params_class = MambaExtendParams

    def __init__(self, params: MambaExtendParams, facts: ModelFacts) -> None:
        self.params, self.scales = params, params.of_layers(facts.n_layer)
        if len(self.scales) != facts.n_layer:
            raise params.refuse("scales", f"hold one scale for each of {facts.n_layer} layers", len(self.scales))
        if facts.train_length is None:
            raise UserError("mambaextend needs train_length: the checkpoint does not say what it was trained on")
        self.train_length, self.channels = facts.train_length, facts.channels
        self.values = RowValues(facts.n_layer, self._row)

    def scale(self, layer: int, length: int) -> float:
        """What a layer's steps of a prompt are multiplied by."""
        if length <= self.params.min_ratio * self.train_length:
            return 1.0
        power = math.log2(length / self.train_length) if self.params.per_doubling else 1.0
        return float(self.scales[layer] ** power)

    def first_layer_changed(self, length: int) -> int | None:
        return next((layer for layer in range(len(self.scales)) if self.scale(layer, length) != 1.0), None)

    def prefix_rule(self, length: int) -> Hashable | None:
        if self.first_layer_changed(length) is None:
            return ()
        return self, length if self.params.per_doubling else None

    def before_scan(self, layer: int, inputs: ScanInputs, seen: Tensor | None = None) -> ScanInputs:
        acts = any(self.scale(layer, length) != 1.0 for length in inputs.span.prompt_lengths)
        return replace(inputs, dt_scale=self.values(layer, inputs)) if acts else inputs

    def _row(self, layer: int, length: int) -> Tensor:
        return torch.full((self.channels,), self.scale(layer, length), dtype=torch.float64)
