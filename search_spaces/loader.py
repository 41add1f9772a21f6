"""Search spaces: what of a method may vary, said as data with a reason beside each range, one YAML file a method.

    method: decimamba
    params:
      first_layer:
        type: int                       # int | float | choice
        low: = round(0.2 * n_layer)     # a value that begins with = is arithmetic (expression.py)
        high: = round(0.85 * n_layer)
        why: the strongest parameter; published 0.25 to 0.5 of the depth
      base_tokens: {type: int, low: = train_length // 2, high: = 4 * train_length, log: true, why: …}
      norm: {type: choice, choices: [l2, l1, max], why: …}
      decay:
        type: float
        low: 0.5
        high: 1.0
        grid: 3                         # points of this range in a grid search (by default every value of an int)
        when: n_layers > 1              # only then is it drawn; reads parameters above it and the model's facts
        why: inert with one layer
      min_tokens: 20                    # a plain value is not searched
    constraints:
      - base_tokens >= min_tokens       # a draw that breaks one is not run
    published:
      - {first_layer: = n_layer // 2, base_tokens: = train_length, why: the authors' 130m passkey setting}

Facts of the model an expression may read: n_layer, d_model, d_inner, d_state, n_heads (channels that own a step size),
train_length, longest (longest length of the study).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from statespan.errors import UserError, unknown
from statespan.methods.base import ModelFacts
from statespan.search_spaces.expression import evaluate

FOLDER = Path(__file__).parent
ENTRIES = ("method", "params", "constraints", "published")
Suggest = Callable[[str, "Range"], Any]
"""(parameter, its range) -> a value in it"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """What one parameter may be."""

    type: Literal["int", "float", "choice"]
    low: float | int = 0
    high: float | int = 0
    log: bool = False
    step: float | int | None = None
    choices: tuple[Any, ...] = ()
    when: str | None = None
    grid: int | None = None
    why: str = ""

    def __contains__(self, value: object) -> bool:
        if self.type == "choice":
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int if self.type == "int" else int | float):
            return False
        return self.low <= value <= self.high

    def points(self) -> list[Any]:
        """The values a grid search tries."""
        if self.type == "choice":
            return list(self.choices)
        if self.type == "int" and self.grid is None:
            return list(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        if self.type == "float" and self.grid is None and self.step is None:
            raise UserError("a grid search needs `grid: n` or `step` on every float range")
        if self.grid is None:
            assert self.step is not None
            return [self.low + i * self.step for i in range(int((self.high - self.low) / self.step + 1e-9) + 1)]
        return self._spread(self.grid)

    def _spread(self, n: int) -> list[Any]:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        raw = [low + (high - low) * i / max(n - 1, 1) for i in range(n)]
        values = [min(max(math.exp(one) if self.log else one, self.low), self.high) for one in raw]
        return sorted({round(one) for one in values}) if self.type == "int" else values


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """One method's search space with the model's facts filled in."""

    method: str
    params: Mapping[str, Range | Any]
    """In order of drawing; what is no Range is a value that every trial has."""

    constraints: tuple[str, ...] = ()
    published: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, suggest: Suggest) -> dict[str, Any]:
        """One point. Parameters whose `when` does not hold are left out."""
        point: dict[str, Any] = {}
        for name, one in self.params.items():
            if not isinstance(one, Range):
                point[name] = one
            elif self._applies(one, point):
                point[name] = suggest(name, one)
        return point

    def broken(self, point: Mapping[str, Any]) -> list[str]:
        """The constraints a point breaks. One that reads a parameter the point does not have holds."""
        names = {**self.facts, **point}
        absent = self.params.keys() - point.keys()
        return [text for text in self.constraints if not (_reads(text) & absent) and not evaluate(text, names)]

    def holds(self, point: Mapping[str, Any]) -> bool:
        """True where the point could have been drawn."""
        try:
            return self.draw(lambda name, one: _must_hold(point, name, one)) == dict(point) and not self.broken(point)
        except KeyError:
            return False

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every point of the grid that breaks no constraint, each once."""
        seen: set[str] = set()
        ranges = {name: one.points() for name, one in self.params.items() if isinstance(one, Range)}
        for values in itertools.product(*ranges.values()):
            chosen = dict(zip(ranges, values, strict=True))
            point = self.draw(lambda name, one, chosen=chosen: chosen[name])  # type: ignore[misc]
            text = json.dumps(point, sort_keys=True)
            if text not in seen and not self.broken(point):
                seen.add(text)
                yield point

    def described(self) -> dict[str, Any]:
        """JSON form, without the reasons: what names the space."""
        params = {
            name: {key: getattr(one, key) for key in ("type", "low", "high", "log", "step", "choices", "when")}
            if isinstance(one, Range)
            else one
            for name, one in self.params.items()
        }
        return {"method": self.method, "params": params, "constraints": list(self.constraints)}

    def _applies(self, one: Range, point: Mapping[str, Any]) -> bool:
        if one.when is None:
            return True
        # a condition on a parameter that is itself not drawn does not hold
        if _reads(one.when) & (self.params.keys() - point.keys()):
            return False
        return bool(evaluate(one.when, {**self.facts, **point}))


def _reads(text: str) -> set[str]:
    from statespan.search_spaces.expression import names_in

    return names_in(text)


def _must_hold(point: Mapping[str, Any], name: str, one: Range) -> Any:
    value = point[name]
    if value not in one:
        raise KeyError(name)
    return value


def names_of(facts: ModelFacts, longest: int) -> dict[str, Any]:
    """What expressions may read: the model's facts, and the longest prompt in tokens."""
    return {
        "n_layer": facts.n_layer,
        "channels": facts.channels,
        "d_model": facts.d_model,
        "train_length": facts.train_length,
        "longest": longest,
        "mamba1": facts.kind == "mamba1",
    }


def available() -> list[str]:
    """Methods that have a space here."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_space(
    method: str, facts: Mapping[str, Any], *, path: Path | None = None, params: Mapping[str, Any] | None = None
) -> Space:
    """Read a method's space and fill in the model's facts.

    Args:
        method: its file is `<method>.yaml` in this folder.
        facts: what expressions may read. A fact that is None is unknown, and a space that reads it is an error.
        path: another file.
        params: replaces entries of the file's `params`.

    Raises:
        UserError: no such space, or something in it does not hold.
    """
    place = path or FOLDER / f"{method}.yaml"
    if not place.is_file():
        raise unknown("search space", str(path or method), available())
    raw = yaml.safe_load(place.read_text())
    if not isinstance(raw, dict) or not isinstance(raw.get("params", {}), dict):
        raise UserError(f"{place.name}: a search space holds `method`, `params`, `constraints`, `published`")
    if extra := raw.keys() - set(ENTRIES):
        raise UserError(f"{place.name}: {unknown('entry', min(extra), ENTRIES)}")
    if raw.get("method", method) != method:
        raise UserError(f"{place.name} is the space of {raw['method']}, not of {method}")
    known = {name: value for name, value in facts.items() if value is not None}
    entries = {**(raw.get("params") or {}), **(params or {})}
    where = f"search space of {method}"
    return Space(
        method=method,
        params={name: _entry(f"{where}: {name}", one, known) for name, one in entries.items()},
        constraints=tuple(raw.get("constraints") or ()),
        published=tuple(_point(one, known) for one in raw.get("published") or ()),
        facts=known,
    )


def _point(raw: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: resolve(value, facts) for name, value in raw.items() if name != "why"}


def resolve(value: Any, facts: Mapping[str, Any]) -> Any:
    """A value, or what `= arithmetic` comes to."""
    if isinstance(value, str) and value.startswith("="):
        return evaluate(value[1:], facts)
    return [resolve(one, facts) for one in value] if isinstance(value, list) else value


def _entry(where: str, raw: Any, facts: Mapping[str, Any]) -> Range | Any:
    if not isinstance(raw, Mapping):
        return resolve(raw, facts)
    fields = [name for name in Range.__dataclass_fields__]
    if extra := raw.keys() - set(fields):
        raise UserError(f"{where}: {unknown('entry', min(extra), fields)}")
    values = {name: value if name in ("when", "why") else resolve(value, facts) for name, value in raw.items()}
    if "choices" in values:
        values = {"type": "choice", **values, "choices": tuple(values["choices"])}
    return _checked(where, values)


def _checked(where: str, values: dict[str, Any]) -> Range | Any:
    kind = values.get("type")
    if kind not in ("int", "float", "choice"):
        raise UserError(f"{where}: type must be int, float or choice; got {kind!r}")
    if kind == "choice":
        if not values.get("choices"):
            raise UserError(f"{where}: choices must hold at least one value")
        return Range(**values)
    if "low" not in values or "high" not in values:
        raise UserError(f"{where}: a range needs low and high")
    if kind == "int":
        values |= {key: round(values[key]) for key in ("low", "high")}
    low, high = values["low"], values["high"]
    if not low <= high or (values.get("log") and low <= 0):
        raise UserError(f"{where}: needs low <= high, and low > 0 where log is set; got low={low}, high={high}")
    if values.get("log") and values.get("step"):
        raise UserError(f"{where}: log and step exclude each other")
    return Range(**values)


def pinned(space: Space, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points as a study file gives them, arithmetic done; a UserError names a parameter the space does not have."""
    done = [_point(one, space.facts) for one in points]
    for one in done:
        for name in one:
            if name not in space.params:
                raise unknown(f"parameter of {space.method}", name, space.params)
    return done
