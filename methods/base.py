"""What every method is built from: checked parameters, the facts of the model they meet, artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from statespan.errors import UserError, unknown
from statespan.models.hook import Method

if TYPE_CHECKING:
    from statespan.models.checkpoint import Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a method needs to know of the model it is built for."""

    kind: str
    """Mixer kind: "mamba1" or "mamba2"."""

    n_layer: int
    """Mamba layers; attention layers of a hybrid are not counted."""

    channels: int
    """Units of a layer that own one step size: inner features in Mamba-1, heads in Mamba-2."""

    d_model: int
    train_length: int | None = None
    """Tokens the model was trained on, where that is known."""

    digest: str = ""
    """sha256 that names the weights; artifacts must carry it."""

    folder: Path | None = None
    """The checkpoint's folder, where artifacts are looked for first."""

    @classmethod
    def of(cls, loaded: Loaded, train_length: int | None = None) -> ModelFacts:
        """Of a loaded checkpoint; `train_length` wins over what its config.json says."""
        config = loaded.config
        return cls(
            kind=config.kind,
            n_layer=config.n_layer,
            channels=config.channels,
            d_model=config.d_model,
            train_length=train_length or loaded.train_length,
            digest=loaded.digest,
            folder=loaded.folder,
        )


class Params(BaseModel):
    """A method's parameters. The docstring below a field is its help text, with the unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: ClassVar[str]
    """Name of the method, for error messages."""

    @classmethod
    def build(cls, raw: object) -> Self:
        """The parameters; a UserError names the first one that is wrong."""
        try:
            return cls.model_validate(raw)
        except ValidationError as invalid:
            raise _first_error(cls, invalid) from None

    def canonical(self) -> dict[str, Any]:
        """All values, defaults included, without those that change nothing beside the others."""
        return self.model_dump(mode="json")

    def refuse(self, field: str, must: str, got: object) -> UserError:
        """An error that says what must hold of a field and what came."""
        return UserError(f"{self.method}.{field} must {must}; got {got}")


def _first_error(cls: type[Params], invalid: ValidationError) -> UserError:
    # an unknown key explains best why a required one is missing
    error = sorted(invalid.errors(include_url=False), key=lambda error: error["type"] != "extra_forbidden")[0]
    place = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return unknown(f"parameter of {cls.method}", place[-1], cls.model_fields)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return UserError(f"{'.'.join([cls.method, *place])}: {message}")
    return UserError(f"{'.'.join([cls.method, *place])}: {message[0].lower() + message[1:]}; got {error['input']!r}")


class ConfiguredMethod(Method):
    """A method that is built from parameters. The base of every method in this folder."""

    params_class: ClassVar[type[Params]]

    @classmethod
    def build(cls, params: Any, facts: ModelFacts, artifacts: Mapping[str, Any]) -> Self:
        """From an instance of `params_class`. A method that needs artifacts overrides this and finds them."""
        return cls(params, facts)  # type: ignore[call-arg]

    @classmethod
    def canonical(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        return cls.params_class.build(dict(params)).canonical()
