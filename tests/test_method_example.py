"""The code and the search space in docs/adding-a-method.md, run as they stand there."""

import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from statespan.methods import table
from statespan.search_spaces.loader import Range, load_space
from tests.methods import facts_for
from tests.test_search_space_files import drawer, space_facts

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"
METHOD, TEST = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
(SPACE,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)


def _module(code: str, name: str) -> Any:
    """The block as a file of its own: pydantic reads the fields' help texts from there."""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / f"{name}.py").write_text(code)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def _in_the_table() -> Iterator[None]:
    added = _module(METHOD, "statespan_docs_quiet").Quiet
    table.METHODS[added.name] = added
    yield
    del table.METHODS[added.name]


TestPage = _module(TEST, "statespan_docs_quiet_test").TestQuiet
"""The page's own test class."""


@pytest.mark.parametrize("kind, n_layer", [("mamba1", 8), ("mamba2", 24)])
def test_every_point_of_the_pages_space_builds_the_method(tmp_path, kind, n_layer):
    (tmp_path / "quiet.yaml").write_text(SPACE)
    facts = facts_for(kind, n_layer=n_layer, train_length=1_024)
    space = load_space("quiet", space_facts(facts), path=tmp_path / "quiet.yaml")
    for seed in range(200):
        table.build_method("quiet", space.draw(drawer(seed)), facts)
    assert all(one.why for one in space.params.values() if isinstance(one, Range))
    assert all(space.holds(point) for point in space.published)
