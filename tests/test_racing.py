"""Races on made-up scores: the worse are stopped, the best and the equal are not, and short contexts do not decide."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan import stats
from statespan.orchestration import racing
from statespan.orchestration.racing import Race, Standing

SAMPLES = 240


def a_race(**rules):
    """240 samples of 120 documents at two lengths, four rungs."""
    documents = np.arange(SAMPLES) // 2
    strata = documents % 2
    rungs = racing.assign_rungs(documents, strata, (0.125, 0.25, 0.5, 1.0))
    return Race(documents=documents, strata=strata, rungs=rungs, **{"trials": 20} | rules)


def standing(name, race, scores, rung=None, costs=None):
    met = race.rungs <= (race.last_rung if rung is None else rung)
    return Standing(name, np.where(met, scores, np.nan), met, costs or {})


def answers(accuracy, seed=0):
    return (np.random.default_rng(seed).random(SAMPLES) < accuracy).astype(float)


def test_a_much_worse_trial_is_stopped_and_told_why():
    race = a_race()
    best, bad = standing("best", race, answers(0.9)), standing("bad", race, answers(0.2, seed=1), rung=1)
    decision = racing.decide(race, bad, [best], rung=1)
    assert decision.action == "stop" and decision.p <= race.alpha and decision.incumbent_id == "best"
    assert decision.reason.startswith("worse than best by 0.") and "on 60 samples of 30 documents" in decision.reason


def test_the_better_trial_the_equal_one_and_the_incumbent_itself_go_on():
    race = a_race()
    best = standing("best", race, answers(0.6))
    for name, scores in (("better", answers(0.95, seed=1)), ("twin", answers(0.6)), ("best", answers(0.6))):
        assert racing.decide(race, standing(name, race, scores, rung=2), [best], rung=2).action == "keep"


def test_the_last_rung_stops_nobody_for_its_samples_are_paid():
    race = a_race()
    best, bad = standing("best", race, answers(0.9)), standing("bad", race, answers(0.1))
    assert racing.decide(race, bad, [best], rung=3).action == "keep"


def test_the_same_gap_needs_more_evidence_among_more_trials():
    few, many = a_race(trials=2), a_race(trials=300)
    assert few.corrected(0.001) < 0.01 < 0.05 < many.corrected(0.001)


def test_a_trial_that_was_stopped_is_nobodys_rival_any_more():
    race = a_race(trials=40)
    assert race.corrected(0.002, stopped=36) < 0.5 * race.corrected(0.002)
    assert race.corrected(0.002, stopped=36) == pytest.approx(a_race(trials=4).corrected(0.002), abs=0.003)
    assert race.corrected(0.002, stopped=40) >= 0.002


def test_corrected_p_grows_with_looks_and_never_falls_below_p():
    one_look = a_race(trials=2)
    halves = Race(
        **{name: getattr(one_look, name) for name in ("documents", "strata", "trials")}, rungs=one_look.rungs // 3
    )
    # a single comparison looked at once is a plain one-sided test; 0.006 is four errors of 20,000 draws
    assert halves.corrected(0.05) == pytest.approx(0.05, abs=0.006)
    assert one_look.corrected(0.05) > halves.corrected(0.05) + 0.03


def test_a_race_of_equals_stops_any_one_of_them_at_most_5_times_in_100(monkeypatch):
    monkeypatch.setattr(stats, "FLIPS", 8_000)  # p near 0.002 decides
    rng, stopped, races, trials = np.random.default_rng(1), 0, 40, 20
    documents = np.arange(96)
    rungs = racing.assign_rungs(documents, documents % 2, (0.25, 0.5, 1.0))
    race = Race(documents=documents, strata=documents % 2, rungs=rungs, trials=trials)
    for _ in range(races):
        scores = rng.normal(size=(trials, 96))  # no ties: the hardest case for the rate
        alive = set(range(trials))
        for rung in range(race.last_rung):
            field = {k: standing(str(k), race, scores[k], rung) for k in alive}
            rivals = racing.choose_incumbents(race, list(field.values()), rung)
            alive -= {k for k in alive if racing.decide(race, field[k], rivals, rung).action == "stop"}
        stopped += trials - len(alive)
    # one stop a race with a spread of 1.5: two standard errors are 0.024
    assert stopped / (races * trials) <= 0.05 + 0.024


def test_being_worse_at_short_lengths_alone_does_not_stop_a_trial_that_may_win_at_long_ones():
    documents, strata = np.arange(SAMPLES), np.arange(SAMPLES) % 2
    rungs = racing.assign_rungs(documents, strata, (0.25, 0.5, 1.0), first_rung={1: 1})
    race = Race(documents=documents, strata=strata, rungs=rungs, trials=5)
    short = strata == 0
    incumbent = standing("incumbent", race, np.where(short, answers(0.95), answers(0.1, seed=1)))
    bad_at_short = standing("bad", race, np.where(short, answers(0.3, seed=2), np.nan), rung=0)
    assert racing.decide(race, bad_at_short, [incumbent], rung=0).action == "keep"
    strong = standing("strong", race, np.where(short, answers(0.95), answers(0.98, seed=1)))
    assert racing.decide(race, bad_at_short, [strong], rung=0).action == "stop"


def test_strata_count_as_in_the_quality_whatever_their_number_of_samples():
    documents = np.arange(30)
    strata = (documents >= 20).astype(np.int64)  # 20 short, 10 long
    rules = {"documents": documents, "strata": strata, "rungs": np.zeros(30, dtype=np.int64), "trials": 2}
    scores = np.where(strata == 1, 1.0, 0.0)
    assert racing.quality(Race(**rules), standing("a", Race(**rules), scores), 0) == pytest.approx(1 / 3)
    even = Race(**rules, stratum_weights=np.array([1.0, 1.0]))
    assert racing.quality(even, standing("a", even, scores), 0) == pytest.approx(1 / 2)
    gain = racing.differences(even, standing("a", even, scores), standing("b", even, np.zeros(30)), 0)
    assert gain.mean == pytest.approx(1 / 2)


def test_failed_samples_count_as_the_worst_score():
    race = a_race()
    failing = Standing("failing", np.full(SAMPLES, np.nan), race.rungs <= 2)
    assert racing.quality(race, failing, 2) == 0.0
    assert racing.decide(race, failing, [standing("best", race, answers(0.9))], rung=2).action == "stop"


def test_the_mean_of_no_samples_is_nan():
    race = a_race()
    assert math.isnan(racing.quality(race, Standing("new", np.full(SAMPLES, np.nan), np.zeros(SAMPLES, dtype=bool)), 0))


def costs(value):
    return {"seconds": np.full(SAMPLES, value)}


@pytest.mark.parametrize(
    "own, action",
    [
        pytest.param(costs(1.0), "stop", id="as_dear"),
        pytest.param(costs(0.97), "stop", id="cheaper_within_tolerance"),
        pytest.param(costs(0.5), "keep", id="cheaper"),
        pytest.param({}, "keep", id="not_measured"),
    ],
)
def test_a_worse_trial_is_stopped_only_if_it_is_not_cheaper(own, action):
    race = a_race(costs={"seconds": 0.05})
    best = standing("best", race, answers(0.9), costs=costs(1.0))
    worse = standing("worse", race, answers(0.3, seed=1), rung=2, costs=own)
    assert racing.decide(race, worse, [best], rung=2).action == action


def test_a_dearer_trial_is_stopped_once_it_cannot_gain_what_matters():
    race = a_race(costs={"seconds": 0.05}, tolerance=0.3)
    best = standing("best", race, answers(0.9), costs=costs(1.0))
    dearer = standing("dearer", race, answers(0.9), rung=2, costs=costs(2.0))
    same = standing("same", race, answers(0.9), rung=2, costs=costs(1.0))
    stop = racing.decide(race, dearer, [best], rung=2)
    assert stop.action == "stop" and stop.reason.startswith("gains less than 0.3 on best and seconds higher by 100%")
    assert racing.decide(race, same, [best], rung=2).action == "keep"


def test_incumbents_are_the_best_or_with_costs_the_pareto_front_of_those_who_got_that_far():
    race = a_race(costs={"seconds": 0.05})
    field = [
        standing("good_and_dear", race, answers(0.9), costs=costs(3.0)),
        standing("fair_and_cheap", race, answers(0.5), costs=costs(1.0)),
        standing("beaten", race, answers(0.4, seed=3), costs=costs(2.0)),
        standing("behind", race, answers(1.0), rung=1, costs=costs(0.1)),
    ]
    assert [one.trial_id for one in racing.choose_incumbents(race, field, 2)] == ["good_and_dear", "fair_and_cheap"]
    assert [one.trial_id for one in racing.choose_incumbents(a_race(), field, 2)] == ["good_and_dear"]
    assert racing.choose_incumbents(race, [], 0) == []


@settings(max_examples=60, deadline=None)
@given(
    documents=st.integers(4, 60),
    each=st.integers(1, 4),
    lengths=st.integers(1, 4),
    shares=st.sampled_from([(1.0,), (0.1, 1.0), (0.25, 0.5, 1.0), racing.SHARES]),
    seed=st.integers(0, 99),
)
def test_every_rung_takes_its_share_of_every_length_and_parts_no_document(documents, each, lengths, shares, seed):
    document = np.repeat(np.arange(documents), each)
    strata = document % lengths
    rungs = racing.assign_rungs(document, strata, shares, seed=seed)
    assert rungs.min() == 0 and rungs.max() < len(shares)
    for name in range(documents):
        assert len(set(rungs[document == name])) == 1
    for stratum in range(min(lengths, documents)):
        own = rungs[strata == stratum][::each]
        for rung, share in enumerate(shares):
            assert abs((own <= rung).sum() - max(share * len(own), 1)) <= 0.5 + 1e-9


def few_documents(documents=12, shares=(0.25, 0.5, 0.75, 1.0), trials=17):
    document = np.arange(documents)
    rungs = racing.assign_rungs(document, np.zeros(documents, dtype=np.int64), shares)
    return Race(documents=document, strata=np.zeros(documents, dtype=np.int64), rungs=rungs, trials=trials)


def test_a_rung_of_too_few_documents_is_no_look_and_raises_no_bar():
    race = few_documents()  # 3, 6 and 9 documents before the last rung: 2^-6 could stop nobody of 17
    assert race.looks == (2,) and [race.next_look(rung) for rung in range(4)] == [2, 2, 2, 3]
    best, bad = (Standing(name, np.full(12, score), race.rungs <= 2) for name, score in (("best", 1.0), ("bad", 0.0)))
    assert racing.decide(race, bad, [best], 0).reason == "too few documents to tell"
    stop = racing.decide(race, bad, [best], 2)
    assert stop.action == "stop" and "9 documents" in stop.reason
    every_rung_a_look = racing._luck(race.trials, 0, (3, 6, 9), race.seed)
    assert np.quantile(race.luck(), 0.95) < np.quantile(every_rung_a_look, 0.95) - 0.1


def test_a_race_that_can_stop_nobody_has_no_looks():
    assert few_documents(8).looks == () and few_documents(8).next_look(0) == 3
    assert few_documents(shares=(1.0,)).looks == ()


def test_a_race_of_many_documents_looks_at_every_rung():
    assert a_race().looks == tuple(range(a_race().last_rung))


@pytest.mark.parametrize("documents, trials", [(12, 17), (18, 9), (24, 40)])
def test_of_equal_trials_on_few_documents_no_more_are_stopped_than_alpha_allows(documents, trials):
    rng, stopped, replays = np.random.default_rng(documents), 0, 150
    for _ in range(replays):
        race = few_documents(documents, racing.SHARES, trials)
        scores = (rng.random((trials, documents)) < 0.5).astype(float)
        for rung in race.looks:
            field = [Standing(str(trial), scores[trial], race.rungs <= rung) for trial in range(trials)]
            rivals = racing.choose_incumbents(race, field, rung)
            if racing.decide(race, field[0], rivals, rung).action == "stop":  # trial 0: the best, as all are
                stopped += 1
                break
    # alpha is 5 %: 150 replays show 13 or more with a chance of 3 % if it were just that
    assert few_documents(documents, racing.SHARES, trials).looks and stopped <= 12


def test_rung_shares_must_grow_to_one():
    with pytest.raises(ValueError, match=r"must grow to 1, such as .*; got \(0.5, 0.25, 1\)"):
        racing.assign_rungs(np.arange(8), np.zeros(8, dtype=np.int64), (0.5, 0.25, 1))
