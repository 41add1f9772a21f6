"""Reading a study file: YAML and overrides in, a checked Study or one line that says what is wrong out.

An unknown key is refused with the nearest known one. Overrides (`--set a.b=c`) are merged before the check: mappings
merge, lists replace, null deletes. `${NAME}` stays as it is in every saved copy and is looked up in the environment
only where the value is used, so that a password never reaches an artifact.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from statespan.config import Study
from statespan.errors import UserError, unknown


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study file.

    Args:
        path: a YAML file.
        overrides: `a.b=value` each; the value is YAML, null deletes the key.

    Raises:
        UserError: the first thing that is wrong, with the way out.
    """
    if not path.is_file():
        raise UserError(f"no study file {str(path)!r}; examples/quickstart.yaml is one to begin with")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold settings (key: value); got {_short(raw)}")
    for override in overrides:
        raw = _merge(raw, parse_override(override))
    return check_study(raw, str(path))


def check_study(raw: Mapping[str, Any], where: str = "study") -> Study:
    """Settings -> Study; a UserError names the first setting that is wrong."""
    try:
        return Study.model_validate(raw)
    except ValidationError as invalid:
        raise _first_error(where, invalid) from None


def parse_override(text: str) -> dict[str, Any]:
    """`search.trials=8` -> {"search": {"trials": 8}}."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {text!r} must look like search.trials=8")
    try:
        leaf: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text!r}: {value!r} is not YAML") from error
    for part in reversed(parts):
        leaf = {part: leaf}
    merged: dict[str, Any] = leaf
    return merged


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            old = merged.get(key)
            if isinstance(old, list) and all(isinstance(one, str) for one in old):
                old = dict.fromkeys(old)  # a list of names is the short form of a mapping
            merged[key] = _merge(old if isinstance(old, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def from_environment(text: str) -> str:
    """Replace every ${NAME} by the environment variable of that name."""

    def look_up(match: re.Match[str]) -> str:
        if (value := os.environ.get(match[1])) is None:
            raise UserError(f"the environment variable {match[1]} is not set; {text!r} needs it")
        return value

    return re.sub(r"\$\{(\w+)\}", look_up, text)


def _first_error(where: str, invalid: ValidationError) -> UserError:
    # a key nobody knows explains best why a required one is missing
    errors = sorted(invalid.errors(include_url=False), key=lambda error: error["type"] != "extra_forbidden")
    error = errors[0]
    place = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        kind = f"setting in {'.'.join(place[:-1])}" if place[:-1] else "setting"
        return UserError(f"{where}: {unknown(kind, place[-1], _known(place[:-1]))}")
    if error["type"] == "missing":
        return UserError(f"{where}: {'.'.join(place)} is missing")
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f"; got {_short(error['input'])}"
    dotted = "".join(f"{part}." for part in place).rstrip(".")
    return UserError(f"{where}: {dotted + ': ' if dotted else ''}{message[:1].lower() + message[1:]}{got}")


def _known(place: Sequence[str]) -> list[str]:
    """Setting names of a section, found by walking the models' annotations."""
    model: type[BaseModel] = Study
    walk = list(place)
    while walk:
        part = walk.pop(0)
        if part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
        # else: a task's or method's name or an index, which leads to the same model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _model_in(inner)) is not None:
            return found
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def saved_form(study: Study) -> str:
    """The resolved study as YAML: what was asked for, defaults included, environment variables still by name."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
