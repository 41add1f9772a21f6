"""The search space in docs/adding-a-space.md, read as it stands there."""

import re
from pathlib import Path

import pytest
import yaml

from statespan.config import Study
from statespan.methods.table import build_method
from statespan.search_spaces.loader import Range, load_space
from tests.methods import facts_for
from tests.test_search_space_files import MODELS, drawer, space_facts

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-space.md"
IN_A_STUDY, FILE = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("kind, n_layer, train_length", MODELS)
def test_the_file_on_the_page_draws_points_that_build_its_method(tmp_path, kind, n_layer, train_length):
    facts = facts_for(kind, n_layer=n_layer, train_length=train_length)
    (tmp_path / "mine.yaml").write_text(FILE)
    space = load_space("decimamba", space_facts(facts), path=tmp_path / "mine.yaml")
    points = [space.draw(drawer(seed)) for seed in range(200)]
    whole = [point for point in points if not space.broken(point)]
    assert len(whole) > 50
    for point in whole:
        build_method("decimamba", point, facts)
    for point in space.published:
        assert space.holds({**{k: v for k, v in space.params.items() if not isinstance(v, Range)}, **point})


def test_the_study_on_the_page_is_a_study():
    study = Study.model_validate(
        {"study": "x", "model": "mamba1-5m", "benchmarks": {"passkey": {}}, **yaml.safe_load(IN_A_STUDY)}
    )
    assert study.methods["decimamba"].space == "my_space.yaml"
    assert study.methods["longmamba"].params["clamp"] == 0.05
