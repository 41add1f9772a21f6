"""ReMamba's parameters and what must hold of them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from statespan.methods.base import Params


class ReMambaParams(Params):
    method: ClassVar[str] = "remamba"

    start: float = Field(default=0.0, ge=0.0, lt=1.0)
    """s: where the window begins, as a share of the prompt."""

    window: float = Field(default=0.18, ge=0.0, le=1.0)
    """p: length of the window, as a share of the prompt. 0 leaves the prompt whole."""

    ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    """ρ: share of the window's tokens that are kept, as vectors. 0 cuts the window out."""

    kept: int | None = Field(default=None, ge=0)
    """K: in place of ρ, this many tokens."""

    selector: Literal["topk", "random", "fixed", "first", "last", "none"] = "topk"
    """topk is ReMamba; none compresses nothing and runs the adapter's model; the others are ablations."""

    order: Literal["text", "reversed", "score"] = "text"
    """How the vectors enter. The released random and fixed ablations are reversed."""

    mix: Literal["adapt", "multiplicative_softmax", "multiplicative_raw", "insert_only"] = "adapt"
    """adapt: scores reach the steps of stage 2. multiplicative: they scale the vectors. insert_only: neither."""

    delta_rule: Literal["official", "scaled_bias", "multiply"] = "official"
    """softplus(α r + Θ + b), softplus(α (r + b) + Θ), or α softplus(r + b)."""

    score_grad: Literal["exact", "times_score"] = "exact"
    """times_score multiplies the gradient of each score by the score, in training."""

    detach_stage1: bool = False
    """No gradient through stage 1, in training: half the memory."""

    min_tail: int = Field(default=0, ge=0)
    """Tokens at the prompt's end that the window never reaches."""

    min_length: int = Field(default=0, ge=0)
    """Shorter prompts, in tokens, are left whole."""

    seed: int = Field(default=0, ge=0)
    """Of the random selector."""

    adapter: str | None = "remamba"
    """Name of the trained adapter beside the checkpoint, or its file. None only where nothing is inserted."""

    @model_validator(mode="after")
    def _consistent(self) -> ReMambaParams:
        if self.selector != "none" and (self.ratio is None) == (self.kept is None):
            raise ValueError("give either ratio or kept")
        if self.start + self.window > 1.0:
            raise ValueError(f"start + window must be at most 1; got {self.start:g} + {self.window:g}")
        if self.mix == "adapt" and self.selector not in ("topk", "none") and self.inserts:
            raise ValueError(f"mix adapt needs the scores of selector topk; use insert_only with {self.selector}")
        if self.adapter is None and self.inserts:
            raise ValueError("adapter may be none only with selector none, window 0, or nothing kept")
        return self

    @property
    def inserts(self) -> bool:
        """Whether any vector can be inserted."""
        return self.selector != "none" and self.window > 0 and self.ratio != 0 and self.kept != 0

    def canonical(self) -> dict[str, Any]:
        inert = {"score_grad", "detach_stage1"} | (set() if self.selector == "random" else {"seed"})
        if not self.inserts:
            inert |= {"order", "mix", "delta_rule", "seed"}
        if self.selector == "none" or self.window == 0:
            found = self.model_dump(mode="json", include={"adapter"})
            return {**found, "selector": "none"}
        if self.mix != "adapt":
            inert |= {"delta_rule"}
        return self.model_dump(mode="json", exclude=inert, exclude_none=self.adapter is not None)
