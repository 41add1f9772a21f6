"""The model as it is: what every method is compared with."""

from __future__ import annotations

from typing import ClassVar

from statespan.methods.base import ConfiguredMethod, ModelFacts, Params


class VanillaParams(Params):
    """Vanilla has no parameters."""

    method: ClassVar[str] = "vanilla"


class Vanilla(ConfiguredMethod):
    params_class = VanillaParams

    def __init__(self, params: VanillaParams, facts: ModelFacts) -> None:
        pass
