"""The code in docs/adding-a-benchmark.md, run as it stands there."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from statespan.benchmarks import table
from tests.benchmark_conformance import BYTES, BenchmarkConformance

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-benchmark.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def _run(code: str, name: str) -> dict[str, Any]:
    module = ModuleType(name)
    sys.modules[name] = module  # pydantic looks annotations up there
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module.__dict__


@pytest.fixture(autouse=True, scope="module")
def _in_the_table() -> Iterator[None]:
    added = _run(BLOCKS[0], "statespan_docs_backwards")["Backwards"]
    table.BENCHMARKS[added.name] = added
    yield
    del table.BENCHMARKS[added.name]


class TestPage(BenchmarkConformance):
    """The page's own test class, its settings read from the page."""

    _page = _run(BLOCKS[1], "statespan_docs_backwards_test")["TestBackwards"]
    NAME = _page.NAME
    SETTINGS = _page.SETTINGS
    WIDER = _page.WIDER


def test_the_answer_is_the_last_word_backwards() -> None:
    sample = next(iter(table.build_benchmark("backwards", {"lengths": [600], "trials": 1}).samples(BYTES)))
    passage = BYTES.decode(sample.prompt_ids).split("\n\nQuestion:")[0]
    assert re.findall("[a-z]+", passage.lower())[-1][::-1] == sample.targets[0]
