"""LongMamba: channels that remember far skip tokens with small steps, so that their memory lasts S tokens instead of L.

    a channel is global where its cumulative decay over L training tokens is P > θ
    Δ ← Δ if Δ > b g(S) else 0        in global channels, during prefill; S is the row's own prompt length

Source: LongMamba, arXiv:2504.16053, section 4; GATECH-EIC/LongMamba@5da3e17, Mamba-1 as @53eeae8. g(S) and P come from
the calibration (calibration.py, step_statistics.py). A filtered token still reads the state; decode is not filtered.

Ours differs: P is compared in log space; g(S) is taken at S itself (`lengths: exact`, or `table`, interpolated), where
the authors take the nearest of 25 lengths and filter from 3,000 tokens on (`as_published`; above 5,000 where the
calibration is on more than 2,000); θ can be given as the share of channels that are global; the scan itself compares.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from statespan.methods.base import ConfiguredMethod, ModelFacts
from statespan.methods.calibration import Calibration
from statespan.methods.calibration_files import calibration_of, read_authors_tables
from statespan.methods.longmamba_curves import Curves
from statespan.methods.longmamba_params import LongMambaParams
from statespan.methods.row_values import RowValues
from statespan.methods.step_selectors import largest, own_rule
from statespan.models.hook import ScanInputs, Span

KEEP_ALL = -1.0


class LongMamba(ConfiguredMethod):
    name: ClassVar[str] = "longmamba"
    params_class = LongMambaParams

    def __init__(self, params: LongMambaParams, facts: ModelFacts, calibration: Calibration) -> None:
        table = calibration.table(params.clamp, params.aggregate)
        if table.budget.shape != (facts.n_layer, facts.channels):
            raise params.refuse("calibration", f"be of {facts.n_layer} layers of {facts.channels} channels",
                                f"{tuple(table.budget.shape)}")  # fmt: skip
        self.params, self.calibration, self.budget = params, calibration, table.budget
        self.globals = self._globals(table.log_decay)  # (layers, channels)
        self.artifacts = {"calibration": calibration.digest}
        self.curves = Curves(params, calibration, self.globals)
        self.values = RowValues(facts.n_layer, self._row)

    @classmethod
    def build(cls, params: LongMambaParams, facts: ModelFacts, artifacts: Mapping[str, Any]) -> Self:
        given = artifacts.get("calibration", params.calibration)
        if isinstance(given, str | Path) and Path(given).is_dir():
            return cls(params, facts, read_authors_tables(Path(given), facts.n_layer, params.clamp, params.aggregate))
        return cls(params, facts, calibration_of(facts, given))

    def _globals(self, log_decay: Tensor) -> Tensor:
        if self.params.theta is not None:
            return log_decay > math.log(self.params.theta)
        assert self.params.share is not None
        return largest(log_decay, self.params.share)

    def filters(self, length: int) -> bool:
        """Whether prompts of this length are filtered at all."""
        if self.params.lengths == "as_published":
            return length > (2_999 if self.calibration.train_length <= 2_000 else 5_000)
        return length > self.params.min_ratio * self.calibration.train_length

    def first_layer_changed(self, length: int) -> int | None:
        layers = self.globals.any(dim=1).nonzero()
        return int(layers[0]) if len(layers) and self.filters(length) else None

    def prefix_rule(self, length: int) -> Hashable | None:
        if self.params.selector != "dt_thre" or not self.filters(length):
            return super().prefix_rule(length)
        return self, self.curves.entry(length)

    def looks_ahead(self, layer: int, span: Span) -> bool:
        return self.params.selector != "dt_thre" and self._acts(layer, span)

    def _acts(self, layer: int, span: Span) -> bool:
        return bool(self.globals[layer].any()) and any(self.filters(own) for own in span.prompt_lengths)

    def survey(self, layer: int, inputs: ScanInputs) -> Tensor:
        return inputs.step_sizes().detach()[..., self.globals[layer].to(inputs.dt.device)]

    def settle(self, layer: int, surveyed: Tensor, span: Span) -> Tensor:
        rows = zip(surveyed, span.lengths, span.prompt_lengths, strict=True)
        return torch.stack([self._row(layer, length, steps[span.length - own :]) for steps, own, length in rows])

    def before_scan(self, layer: int, inputs: ScanInputs, seen: Tensor | None = None) -> ScanInputs:
        if not self._acts(layer, inputs.span):
            return inputs
        if seen is None:
            values = self.values(layer, inputs)
        else:
            values = seen.to(inputs.dt.device, torch.promote_types(inputs.dt.dtype, torch.float32))
        if self.params.selector == "norm":
            return replace(inputs, dt_scale=values)
        return replace(inputs, keep_above=values)

    def _row(self, layer: int, length: int, steps: Tensor | None = None) -> Tensor:
        """Thresholds, or scales under norm, of a row's channels: (channels,) float64"""
        selector, reaches = self.params.selector, self.globals[layer]
        values = torch.full(reaches.shape, 1.0 if selector == "norm" else KEEP_ALL, dtype=torch.float64)
        if not self.filters(length):
            return values
        if selector == "dt_thre":
            values[reaches] = self.params.factor * self.curves(length)[0][layer, reaches].double()
            return values
        assert steps is not None, "this selector needs the layer's survey"
        budget = self.budget[layer, reaches]
        alpha = self.curves(length)[1][layer, reaches] if selector in ("alpha", "offline") else budget
        values[reaches] = own_rule(selector, steps, self.params.factor, alpha, budget).double().cpu()
        return values
