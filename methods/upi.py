"""UPI: the channels that look back furthest see a longer prompt squeezed into the training length.

    Δ ← Δ (L / S)^γ     in the share of channels with the largest mean distance, during prefill, for prompts of S > L

Source: Universal Position Interpolation, ICLR 2026 (OpenReview MjmORKLHUI; no code was released): γ = 1, the top 20 %
of heads by the mean distance of the unrolled attention matrix (statespan/models/hidden_attention.py), calibrated on 100
inputs of 16k tokens. Ours differs: distances are measured at the training length (`statespan calibrate`), γ can be
searched, Mamba-1's channels count as heads; the scaling of attention layers' positions is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from statespan.errors import UserError
from statespan.methods.base import ConfiguredMethod, ModelFacts, Params
from statespan.methods.calibration import Calibration
from statespan.methods.calibration_files import calibration_of
from statespan.methods.row_values import RowValues
from statespan.methods.step_selectors import largest
from statespan.models.hook import ScanInputs


class UPIParams(Params):
    method: ClassVar[str] = "upi"

    share: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of all channels that are scaled, those that look back furthest."""

    gamma: float = Field(default=1.0, gt=0.0, le=2.0)
    """γ: 1 scales steps by L / S, less scales them less."""

    min_ratio: float = Field(default=1.0, ge=1.0)
    """Only prompts longer than this multiple of the training length are changed."""


class UPI(ConfiguredMethod):
    name: ClassVar[str] = "upi"
    params_class = UPIParams

    def __init__(self, params: UPIParams, facts: ModelFacts, calibration: Calibration) -> None:
        distance = calibration.distance
        if distance is None:
            raise UserError("this calibration holds no mean distances; `statespan calibrate MODEL` makes one that does")
        if distance.shape != (facts.n_layer, facts.channels):
            raise params.refuse("calibration", f"be of {facts.n_layer} layers of {facts.channels} channels",
                                f"{tuple(distance.shape)}")  # fmt: skip
        self.params, self.train_length = params, calibration.train_length
        self.far = largest(distance, params.share)  # (layers, channels)
        self.artifacts = {"calibration": calibration.digest}
        self.values = RowValues(facts.n_layer, self._row)

    @classmethod
    def build(cls, params: UPIParams, facts: ModelFacts, artifacts: Mapping[str, Any]) -> Self:
        return cls(params, facts, calibration_of(facts, artifacts.get("calibration")))

    def scale(self, length: int) -> float:
        """What the far channels' steps of a prompt are multiplied by."""
        if length <= self.params.min_ratio * self.train_length:
            return 1.0
        return float((self.train_length / length) ** self.params.gamma)

    def first_layer_changed(self, length: int) -> int | None:
        return int(self.far.any(dim=1).nonzero()[0]) if self.scale(length) != 1.0 else None

    def before_scan(self, layer: int, inputs: ScanInputs, seen: Tensor | None = None) -> ScanInputs:
        acts = any(self.scale(length) != 1.0 for length in inputs.span.prompt_lengths)
        return replace(inputs, dt_scale=self.values(layer, inputs)) if acts and self.far[layer].any() else inputs

    def _row(self, layer: int, length: int) -> Tensor:
        return torch.where(self.far[layer], torch.tensor(self.scale(length), dtype=torch.float64), 1.0)
