"""DeciMamba's parameters and what must hold of them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from statespan.methods.base import Params


class DeciMambaParams(Params):
    method: ClassVar[str] = "decimamba"

    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Layers that drop tokens, counted from 0. A layer's place in this list is its exponent of β."""

    first_layer: int | None = Field(default=None, ge=0)
    """Short form for consecutive layers: the first of them."""

    layer_count: int = Field(default=1, ge=1)
    """Short form for consecutive layers: how many."""

    base_tokens: int | None = Field(default=None, ge=1)
    """L_base: prefix tokens the first listed layer keeps. By default the length the model was trained on."""

    beta: float = Field(default=0.5, gt=0.0, le=1.0)
    """β: each further listed layer keeps this share of the one before."""

    min_tokens: int = Field(default=20, ge=0)
    """No layer keeps fewer prefix tokens."""

    norm: Literal["l2", "l1", "max"] = "l2"
    """How a token's steps become its score."""

    extra_tail: int = Field(default=0, ge=0)
    """Prompt tokens at the end that are never dropped, beside the last one."""

    behaviour: Literal["clean", "as_published"] = "clean"
    """as_published fails on prompts on which the authors' code fails, and allows no norm or tail but theirs."""

    @model_validator(mode="after")
    def _one_way_to_name_layers(self) -> DeciMambaParams:
        if (self.layers is None) == (self.first_layer is None):
            raise ValueError("give either layers, a list, or first_layer with layer_count")
        if self.layers is not None and (min(self.layers) < 0 or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"layers must be different layers counted from 0; got {list(self.layers)}")
        if self.behaviour == "as_published" and (self.norm != "l2" or self.extra_tail):
            raise ValueError("behaviour as_published goes with norm l2 and extra_tail 0 only")
        return self

    @property
    def listed(self) -> tuple[int, ...]:
        """The layers, in the order of their exponents."""
        first = self.first_layer or 0
        return self.layers or tuple(range(first, first + self.layer_count))

    def canonical(self) -> dict[str, Any]:
        dropped = {"first_layer", "layer_count"} | ({"beta"} if len(self.listed) == 1 else set())
        return self.model_dump(mode="json", exclude=dropped) | {"layers": list(self.listed)}
