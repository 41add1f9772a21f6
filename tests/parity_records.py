"""Official scores of LongBench, RULER and L-Eval, kept outside the repository; tests skip where they are absent."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCORERS = Path(__file__).parents[2] / "shared" / "parity" / "scorers"


def scorer_record(name: str) -> dict[str, Any]:
    path = SCORERS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the scorer records are not beside this checkout: {path.name}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def predictions(task: str) -> Iterator[dict[str, Any]]:
    path = SCORERS / "longbench_e_predictions" / f"{task}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the prediction files are not beside this checkout: {path.name}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)
