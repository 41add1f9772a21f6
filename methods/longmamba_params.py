"""LongMamba's parameters and what must hold of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from statespan.methods.base import Params


class LongMambaParams(Params):
    method: ClassVar[str] = "longmamba"

    theta: float | None = Field(default=None, gt=0.0, lt=1.0)
    """θ: channels whose decay over the training length leaves more than this share of memory are global."""

    share: float | None = Field(default=None, gt=0.0, le=1.0)
    """In place of θ: this share of all channels, those that forget least, is global."""

    clamp: float = Field(default=0.05, ge=0.0, lt=1.0)
    """C: share of the recorded steps, the largest, that is clamped; about what is kept of a prompt, however long."""

    aggregate: Literal["max", "mean"] = "max"
    """Over calibration sequences."""

    factor: float = Field(default=1.0, gt=0.0)
    """b: more filters more under dt_thre, and less under alpha, offline and bound."""

    selector: Literal["dt_thre", "alpha", "offline", "bound", "norm"] = "dt_thre"
    """dt_thre: the paper's thresholds. alpha, offline: the largest steps of the prompt itself, in number α(S) S. bound:
    its largest steps while their sum is within the budget. norm: no filter, steps scaled to sum to the budget."""

    lengths: Literal["table", "exact", "as_published"] = "table"
    """Where g(S) comes from: stored lengths, interpolated; ordered steps, at S itself; or the authors' 25 lengths."""

    min_ratio: float = Field(default=1.0, ge=1.0)
    """Only prompts longer than this multiple of the training length are filtered."""

    calibration: Path | None = None
    """A calibration file, or a folder of the authors' tables; by default the one beside the checkpoint."""

    @model_validator(mode="after")
    def _one_way_to_say_global(self) -> LongMambaParams:
        if (self.theta is None) == (self.share is None):
            raise ValueError("give either theta or share")
        return self

    def canonical(self) -> dict[str, Any]:
        inert = {"calibration"} | ({"min_ratio"} if self.lengths == "as_published" else set())
        gridless = self.selector in ("bound", "norm") and self.lengths != "as_published"
        return self.model_dump(mode="json", exclude=inert | ({"lengths"} if gridless else set()), exclude_none=True)
