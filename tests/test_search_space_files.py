"""Every search space that ships draws only points its method can be built from."""

import random
from functools import cache

import pytest

from statespan.methods.table import METHODS, build_method
from statespan.search_spaces.loader import Range, available, load_space
from tests.methods import facts_for, stand_ins

MODELS = [("mamba1", 3, 64), ("mamba1", 8, 1_024), ("mamba1", 64, 2_048), ("mamba2", 24, 2_048)]


def drawer(seed):
    source = random.Random(seed)

    def suggest(name, one):
        if one.type == "choice":
            return source.choice(one.choices)
        if one.type == "int":
            return source.randint(int(one.low), int(one.high))
        return source.uniform(one.low, one.high)

    return suggest


def space_facts(facts):
    known = {name: getattr(facts, name) for name in ("n_layer", "d_model", "train_length")}
    own = {"d_inner": 2 * facts.d_model, "d_state": 8, "n_heads": facts.channels, "longest": 32 * facts.train_length}
    return {**known, **own}


@cache
def artifacts_for(kind, n_layer, train_length):
    """Made once for each model: a table of 64 layers takes seconds."""
    return stand_ins(facts_for(kind, n_layer=n_layer, train_length=train_length))


@pytest.mark.parametrize("kind, n_layer, train_length", MODELS)
@pytest.mark.parametrize("method", available())
def test_two_hundred_points_build_the_method(method, kind, n_layer, train_length):
    facts = facts_for(kind, n_layer=n_layer, train_length=train_length)
    space = load_space(method, space_facts(facts))
    built, seed, artifacts = 0, 0, artifacts_for(kind, n_layer, train_length)
    while built < 200:
        point = space.draw(drawer(seed))
        seed += 1
        assert seed < 4_000, f"{method}: constraints refuse nearly every draw"
        if not space.broken(point):
            build_method(method, point, facts, artifacts)
            built += 1
    for point in space.published:
        assert space.holds({**{k: v for k, v in space.params.items() if not isinstance(v, Range)}, **point}), point


def test_every_method_but_vanilla_has_a_space_with_a_reason_for_each_range():
    assert set(available()) == METHODS.keys() - {"vanilla"}
    facts = space_facts(facts_for())
    for method in available():
        space = load_space(method, facts)
        assert space.published, f"{method} has no published setting to try first"
        for name, one in space.params.items():
            assert not isinstance(one, Range) or one.why, f"{method}.{name} gives no reason for its range"
