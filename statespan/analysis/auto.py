"""`space: auto` in a study: the shipped search space, narrowed by the model's analysis, once and for all.

What was narrowed is written into the study's folder (auto_spaces.json), named by all it depends on. A study that goes
on reads it there, so that it searches what it began with, whatever was measured or changed since; only other weights,
other lengths or another shipped space make another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from statespan.analysis.facts import Analysis
from statespan.analysis.suggest import Suggestion, suggest
from statespan.errors import UserError
from statespan.methods.base import ModelFacts
from statespan.search_spaces.loader import Space

AUTO = "auto"
FILE = "auto_spaces.json"


def auto_spaces(
    shipped: Mapping[str, Space],
    facts: ModelFacts,
    lengths: Sequence[int],
    folder: Path,
    analysis: Callable[[], Analysis],
) -> dict[str, Suggestion]:
    """What to search of each method, from the study's folder where it is known.

    Args:
        shipped: method -> its space as it ships.
        facts: of the model.
        lengths: of the study's prompts, in tokens.
        folder: the study's; nothing is written.
        analysis: gives the model's; asked only where the folder does not tell.
    """
    if facts.train_length is None:
        raise UserError(
            "space: auto needs to know what the model was trained on: its config.json does not say; "
            "give train_length in the study"
        )
    name = _name(shipped, facts, lengths)
    if (known := _saved(folder / FILE, name)) is not None:
        return known
    found = analysis()
    return {method: suggest(found, space, lengths) for method, space in shipped.items()}


def _name(shipped: Mapping[str, Space], facts: ModelFacts, lengths: Sequence[int]) -> str:
    parts = {
        "model": facts.digest,
        "train_length": facts.train_length,
        "lengths": sorted(set(lengths)),
        "spaces": {method: space.described() for method, space in sorted(shipped.items())},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _saved(path: Path, name: str) -> dict[str, Suggestion] | None:
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text())
        if raw["name"] != name:
            return None
        return {
            method: Suggestion(method, one["params"], tuple(one["enqueue"])) for method, one in raw["spaces"].items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and the spaces are suggested anew") from error


def record(
    suggestions: Mapping[str, Suggestion], shipped: Mapping[str, Space], facts: ModelFacts, lengths: Sequence[int]
) -> dict[str, Any]:
    """What the study's folder keeps."""
    spaces = {
        method: {"params": one.params, "enqueue": list(one.enqueue)} for method, one in sorted(suggestions.items())
    }
    return {"name": _name(shipped, facts, lengths), "spaces": spaces}
