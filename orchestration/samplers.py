"""Optuna's samplers by name, made anew for each draw from a seed that only depends on the study and the draw's number.

A sampler that lives as long as its process draws something else after a restart. One made for each draw, that finds all
it needs in the study's trials, does not: the hundredth draw is the same whether or not the study was ever interrupted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from statespan.errors import UserError, unknown

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

NAMES = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "gp": "GPSampler",
    "cmaes": "CmaEsSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
    "qmc": "QMCSampler",
}
GRID = ("grid", "bruteforce")
"""Both walk every point of the space in one order; neither is left to Optuna, whose grid knows no conditions."""

# a space of several methods is conditional: its parameters are modelled in groups that occur together
_DEFAULTS: dict[str, dict[str, Any]] = {
    "TPESampler": {"multivariate": True, "group": True, "n_startup_trials": 8},
    "QMCSampler": {"scramble": True},
    "GPSampler": {"n_startup_trials": 8},
}


def seed_of(seed: int, number: int) -> int:
    """The seed of one draw."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4])


def class_name(name: str) -> str:
    """Optuna's class for a short name; its own class names pass. Raises UserError for an unknown one."""
    if name in NAMES:
        return NAMES[name]
    if name in NAMES.values():
        return name
    raise unknown("sampler", name, [*NAMES, *GRID])


def check_sampler(name: str, options: Mapping[str, Any], objectives: int) -> None:
    """Refuse an unknown sampler, option, or one that cannot do what is asked, before anything is started."""
    if name in GRID:
        if options:
            raise UserError(f"search.sampler {name} takes no sampler_options; `grid: n` on a range sets its points")
        return
    if class_name(name) == "CmaEsSampler" and objectives > 1:
        raise UserError("search.sampler cmaes has one objective only; use tpe, nsgaii, nsgaiii, gp or random")
    make_sampler(name, options, 0, 0)


def make_sampler(name: str, options: Mapping[str, Any], seed: int, number: int) -> BaseSampler:
    """The sampler for draw `number` of a study with this seed."""
    import optuna

    cls_name = class_name(name)
    cls = getattr(optuna.samplers, cls_name)
    known = inspect.signature(cls.__init__).parameters.keys() - {"self", "seed"}
    if extra := options.keys() - known:
        raise unknown(f"option of sampler {name}", min(extra), known)
    arguments = {key: value for key, value in _DEFAULTS.get(cls_name, {}).items() if key in known} | dict(options)
    mine = seed_of(seed, number)
    if cls_name == "QMCSampler":  # one sequence: scrambled alike in every draw
        arguments |= {"independent_sampler": optuna.samplers.RandomSampler(seed=mine)}
        mine = seed_of(seed, 0)
    if cls_name == "CmaEsSampler" and importlib.util.find_spec("cmaes") is None:
        raise UserError("search.sampler cmaes needs the package cmaes: pip install cmaes")
    try:
        with warnings.catch_warnings():
            # multivariate TPE, GP and QMC are marked experimental; nobody need hear it at every draw
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler: BaseSampler = cls(seed=mine, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"search.sampler_options do not suit {name}: {error}") from error
    return sampler
