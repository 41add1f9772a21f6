"""Methods by name: what a study file's `methods:` may say. Adding one is one file here and one line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from statespan.errors import UserError, unknown
from statespan.methods.base import ConfiguredMethod, ModelFacts, Params
from statespan.methods.decimamba import DeciMamba
from statespan.methods.longmamba import LongMamba
from statespan.methods.mambaextend import MambaExtend
from statespan.methods.oprm import OPRM
from statespan.methods.remamba import ReMamba
from statespan.methods.upi import UPI
from statespan.methods.vanilla import Vanilla
from statespan.models.hook import Method

METHODS: dict[str, type[ConfiguredMethod]] = {
    cls.name: cls for cls in (Vanilla, DeciMamba, LongMamba, ReMamba, UPI, MambaExtend, OPRM)
}

__all__ = ["METHODS", "ModelFacts", "Params", "build_method", "canonical_params", "method_class", "params_class"]


def method_class(name: str) -> type[ConfiguredMethod]:
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def params_class(name: str) -> type[Params]:
    """The parameters of a method; the fields' descriptions are their help texts."""
    return method_class(name).params_class


def canonical_params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Checked parameters with defaults filled in and those without effect removed."""
    return params_class(name).build(dict(params)).canonical()


def build_method(
    name: str, params: Mapping[str, Any], facts: ModelFacts, artifacts: Mapping[str, Any] | None = None
) -> Method:
    """A method ready to run on one model.

    Args:
        name: one of METHODS.
        params: its parameters, as a study file gives them.
        facts: of the model.
        artifacts: paths or loaded artifacts by name ("calibration", "adapter"); what is not given is looked for in the
            checkpoint's folder, then in the user's cache.

    Raises:
        UserError: an unknown name, a parameter out of range for this model, a mixer the method cannot act on, or a
            missing artifact or one that was made for another model.
    """
    cls = method_class(name)
    if facts.kind not in cls.supports:
        raise UserError(f"{name} acts on {' and '.join(sorted(cls.supports))} layers; this model has {facts.kind}")
    checked = params_class(name).build(dict(params))
    return cls.build(checked, facts, dict(artifacts or {}))
