"""Every benchmark of the table is held to the conformance kit, and says in the list what it is."""

from pathlib import Path

import pytest

from statespan.benchmarks.settings import Settings
from statespan.benchmarks.table import BENCHMARKS, build_benchmark
from statespan.errors import UserError

TESTS = "".join(path.read_text() for path in Path(__file__).parent.glob("test_benchmark_*.py"))


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_every_benchmark_has_a_conformance_test(name: str) -> None:
    assert f'NAME = "{name}"' in TESTS


@pytest.mark.parametrize("cls", BENCHMARKS.values(), ids=list(BENCHMARKS))
def test_every_setting_says_what_it_is(cls: type[Settings]) -> None:
    assert cls.__doc__ and cls.version >= 1 and cls.metric
    assert all(field.description for field in cls.model_fields.values())


def test_an_unknown_benchmark_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="no benchmark named 'rular'; did you mean 'ruler'"):
        build_benchmark("rular")
