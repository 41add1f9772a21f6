"""LongMamba's g(S) and α(S) of a prompt: from stored lengths, from ordered steps, or at the authors' 25 lengths."""

from __future__ import annotations

from torch import Tensor

from statespan.methods.calibration import AUTHORS_GRID, Calibration
from statespan.methods.longmamba_params import LongMambaParams

KEPT = 64  # lengths of recent prompts whose curves are kept


class Curves:
    """`wanted` (layers, channels): the channels whose values are read."""

    def __init__(self, params: LongMambaParams, calibration: Calibration, wanted: Tensor) -> None:
        self.params, self.calibration, self.wanted = params, calibration, wanted
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def entry(self, length: int) -> int:
        """The length whose thresholds a prompt of this length gets."""
        if self.params.lengths != "as_published":
            return length
        return min(AUTHORS_GRID, key=lambda entry: abs(entry - length))  # a tie goes to the shorter

    def __call__(self, length: int) -> tuple[Tensor, Tensor]:
        """g and α, (layers, channels) each"""
        at = self.entry(length)
        if at not in self._found:
            if len(self._found) >= KEPT:
                self._found.pop(next(iter(self._found)))
            self._found[at] = self._at(at)
        return self._found[at]

    def _at(self, length: int) -> tuple[Tensor, Tensor]:
        params, source = self.params, self.calibration
        if source.lengths == AUTHORS_GRID and params.lengths == "as_published":
            table, at = source.table(params.clamp, params.aggregate), AUTHORS_GRID.index(length)
            return table.threshold[..., at], table.alpha[..., at]
        if params.lengths == "table" and params.selector == "dt_thre":
            g = source.interpolated(length, params.clamp, params.aggregate)
            return g, g  # α is not read
        return source.at(length, params.clamp, params.aggregate, self.wanted)
