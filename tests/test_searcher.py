"""The search is exact under interruption for every sampler, and has none of the stock glue's four traps.

The first half of each trap's test shows the stock glue failing, so that we notice when it no longer does.
"""

import warnings

import optuna
import pytest
from optuna.trial import TrialState

from statespan.config import Objective
from statespan.config import Search as SearchConfig
from statespan.errors import UserError
from statespan.orchestration.journal import Journal, Told
from statespan.orchestration.keys import MethodIdentity
from statespan.orchestration.samplers import NAMES, check_sampler, make_sampler
from statespan.orchestration.searcher import Search
from statespan.search_spaces.loader import Range, Space

FLOAT = Range(type="float", low=0.1, high=10.0, log=True, grid=3, when="a > 2")
ONE = Space(
    method="one",
    params={"a": Range(type="int", low=1, high=6), "b": FLOAT, "c": Range(type="choice", choices=([1, 2], [3]))},
    constraints=("a < 6",),
)
TWO = Space(
    method="two", params={"a": Range(type="int", low=1, high=9), "x": Range(type="float", low=0, high=1, grid=2)}
)
SPACES = {"one": ONE, "two": TWO}
POINTS = [("published", "one", {"a": 2, "c": [3]}), ("enqueued", "two", {"a": 5})]


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def identify(method, params):
    if method == "two" and params["a"] == 9:
        raise UserError("two.a must be less than 9")
    return MethodIdentity(name=method, params=params)


def make(folder, spaces=None, version="v", **config):
    search = Search(
        SearchConfig(**{"trials": 14, "batch": 4} | config),
        spaces or SPACES,
        POINTS,
        identify,
        Journal(folder, version),
    )
    search.replay()
    return search


def value(asked):
    return float(asked.params["a"] + asked.params.get("b", 0.0) + asked.params.get("x", 0.0))


def told(asked, objectives=1):
    pruned = asked.number % 3 == 2
    values = (value(asked), 1.0, 2.0)[:objectives]
    rungs = [{"rung": 0, "values": [one / 2 for one in values]}]
    rungs += [] if pruned else [{"rung": 1, "values": list(values)}]
    return Told(
        number=asked.number,
        state="pruned" if pruned else "complete",
        values=() if pruned else values,
        rungs=tuple(rungs),
    )


def finish(search, objectives=1):
    while (batch := search.next_batch()) is not None:
        search.tell([told(one, objectives) for one in batch])
    return search


def asked(search):
    return [(one.id, one.method, dict(one.params), one.origin, one.draw) for one in search.trials]


@pytest.mark.parametrize("sampler", [*NAMES, "grid"])
def test_an_interrupted_search_asks_what_an_uninterrupted_one_asks(sampler, tmp_path):
    if sampler == "cmaes":
        pytest.importorskip("cmaes", reason="Optuna's CMA-ES needs the package cmaes")
    whole = finish(make(tmp_path / "whole", sampler=sampler))
    for crash in range(4):  # after asking, before telling
        search = make(tmp_path / "torn", sampler=sampler)
        for _ in range(crash):
            batch = search.next_batch()
            search.tell([told(one) for one in batch])
            break
        search.next_batch()
    torn = finish(make(tmp_path / "torn", sampler=sampler))
    assert asked(torn) == asked(whole) and len(whole.trials) == 14
    assert [t.params for t in torn.study.trials] == [t.params for t in whole.study.trials]


def test_another_seed_draws_other_points(tmp_path):
    assert asked(finish(make(tmp_path / "a", seed=0))) != asked(finish(make(tmp_path / "b", seed=1)))


def test_published_and_enqueued_settings_come_first(tmp_path):
    trials = finish(make(tmp_path)).trials
    assert [(one.origin, one.method, one.params["a"]) for one in trials[:2]] == [
        ("published", "one", 2),
        ("enqueued", "two", 5),
    ]
    assert {one.origin for one in trials[2:]} == {"sampled"}
    assert "x" in trials[1].params  # what the setting left open was drawn


def test_conditions_constraints_and_unbuildable_settings_are_kept_out(tmp_path):
    search = finish(make(tmp_path, trials=40, sampler="random"))
    for one in search.trials:
        assert ("b" in one.params) == (one.method == "one" and one.params["a"] > 2)
        assert one.params["a"] < (6 if one.method == "one" else 9)
    refused = [t for t in search.study.trials if t.user_attrs.get("trial") is None]
    assert {t.state for t in refused if t.constraints} == {TrialState.PRUNED}
    assert [one.number for one in search.trials] == list(range(40))


def test_a_search_of_which_nothing_can_be_tried_says_why_each_time(tmp_path):
    space = {"two": Space(method="two", params={"a": Range(type="int", low=9, high=9)})}
    for _ in range(2):  # the second time from the journal
        search = make(tmp_path, spaces=space, sampler="random")
        search.points = []
        with pytest.raises(UserError, match=r"none of the 50 settings .* two\.a must be less than 9"):
            search.next_batch()


def test_no_setting_is_tried_twice(tmp_path):
    space = {"two": Space(method="two", params={"a": Range(type="int", low=1, high=5)})}
    search = make(tmp_path, spaces=space, trials=14, sampler="random")
    search.points = []
    finish(search)
    assert sorted(one.params["a"] for one in search.trials) == [1, 2, 3, 4, 5] and search.exhausted
    assert len(make(tmp_path, spaces=space, trials=14, sampler="random").trials) == 5


def test_a_grid_is_walked_once_and_ends(tmp_path):
    search = finish(make(tmp_path, trials=500, sampler="grid"))
    points = [(one.method, str(sorted(one.params.items(), key=str))) for one in search.trials]
    assert len(set(points)) == len(points)
    assert sum(method == "one" for method, _ in points) == (2 + 3 * 3) * 2  # b has three points where a > 2
    assert sum(method == "two" for method, _ in points) == 8 * 2 + 1  # a = 9 cannot be built; one was enqueued


def test_more_trials_go_on_where_the_study_stopped(tmp_path):
    short = finish(make(tmp_path, trials=8))
    longer = finish(make(tmp_path, trials=12))
    assert asked(longer)[:8] == asked(short) and len(longer.trials) == 12


def test_a_widened_space_keeps_the_old_settings_first(tmp_path):
    old = finish(make(tmp_path, spaces={"two": TWO}, version="v1", trials=6))
    new = finish(make(tmp_path, version="v2", trials=10))
    kept = [one for one in new.trials if one.origin == "kept"]
    assert [one.params for one in kept] == [one.params for one in old.trials] == [one.params for one in new.trials[:6]]
    assert len(new.trials) == 10


def test_a_widened_search_interrupted_in_its_first_batch_still_keeps_them_all(tmp_path):
    for name in ("whole", "torn"):
        finish(make(tmp_path / name, spaces={"two": TWO}, version="v1", trials=6))
    make(tmp_path / "torn", version="v2", trials=10).next_batch()  # four of the six, and its driver dies here
    whole, torn = (finish(make(tmp_path / name, version="v2", trials=10)) for name in ("whole", "torn"))
    assert asked(torn) == asked(whole) and [one.origin for one in torn.trials[:6]] == ["kept"] * 6


# ---- the four traps


def stock(storage, **options):
    from ray.tune.search.optuna import OptunaSearch

    space = {"a": optuna.distributions.IntDistribution(1, 100)}
    options = {"metric": "m", "mode": "max", "seed": 0} | options
    return OptunaSearch(space=space, storage=storage, study_name="stock", **options)


def test_a_trial_stopped_early_is_told_as_pruned_with_its_history(tmp_path):
    glue = stock(optuna.storages.InMemoryStorage())
    glue.suggest("x")
    glue.on_trial_result("x", {"m": 0.25, "training_iteration": 1})
    glue.on_trial_complete("x", {"m": 0.25, "training_iteration": 1})  # what a scheduler's STOP comes to
    assert glue._ot_study.trials[0].state == TrialState.COMPLETE, "the stock glue has no trap any more"

    study = finish(make(tmp_path)).study
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED and t.user_attrs["trial"]]
    assert pruned and all(t.intermediate_values.keys() == {0} for t in pruned)


def test_several_objectives_keep_intermediate_values(tmp_path):
    glue = stock(optuna.storages.InMemoryStorage(), metric=["m", "n"], mode=["max", "min"])
    glue.suggest("x")
    glue.on_trial_result("x", {"m": 0.25, "n": 1.0, "training_iteration": 1})
    trial = glue._ot_study.trials[0]
    assert not trial.intermediate_values and not trial.user_attrs, "the stock glue has no trap any more"

    objectives = (Objective(), Objective(metric="layer_tokens"))
    study = finish(make(tmp_path, objectives=objectives), objectives=2).study
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED and t.user_attrs["trial"]]
    assert all(t.user_attrs["rungs"][1] == [1, t.values] for t in complete)
    assert pruned and all(len(t.user_attrs["rungs"]) == 1 for t in pruned)


def test_no_trial_of_a_dead_driver_stays_running(tmp_path):
    storage = optuna.storages.InMemoryStorage()
    stock(storage).suggest("x")  # and its driver dies here
    again = stock(storage)
    again.suggest("x")
    states = [t.state for t in again._ot_study.trials]
    assert states.count(TrialState.RUNNING) == 2, "the stock glue has no trap any more"

    first = make(tmp_path).next_batch()  # and its driver dies here
    search = make(tmp_path)
    assert search.next_batch() == first  # the same trials, carried on under the same numbers
    search.tell([told(one) for one in first])
    finish(search)
    assert TrialState.RUNNING not in {t.state for t in search.study.trials}


def test_seeds_survive_a_restart_without_repeating_the_start_up_points(tmp_path):
    storage = optuna.storages.InMemoryStorage()
    before = [stock(storage).suggest(f"x{i}") for i in range(1)]
    after = [stock(storage).suggest(f"y{i}") for i in range(1)]
    assert before == after, "the stock glue has no trap any more"

    search = make(tmp_path, sampler="random")
    search.tell([told(one) for one in search.next_batch()])
    again = finish(make(tmp_path, sampler="random"))
    points = [str(one.params) for one in again.trials if one.origin == "sampled"]
    assert len(set(points)) == len(points)


# ---- samplers by name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cmaes"])
def test_every_sampler_is_made_by_its_name(name):
    assert type(make_sampler(name, {}, 0, 3)).__name__ == NAMES[name]


@pytest.mark.parametrize(
    "name, options, objectives, message",
    [
        ("tpee", {}, 1, "no sampler named 'tpee'; did you mean 'tpe'?"),
        ("tpe", {"n_start": 3}, 1, "option of sampler tpe named 'n_start'"),
        ("cmaes", {}, 2, "cmaes has one objective only"),
        ("grid", {"a": 1}, 1, "takes no sampler_options"),
        ("tpe", {"n_startup_trials": "x", "gamma": 3, "multivariate": False, "group": True}, 1, "do not suit tpe"),
    ],
)
def test_a_sampler_that_cannot_work_is_refused(name, options, objectives, message):
    with pytest.raises(UserError, match=message):
        check_sampler(name, options, objectives)
