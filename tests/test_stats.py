"""Simulations: an interval holds the truth as often as it says, and identical configurations have no winner."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan import stats
from statespan.stats import Clusters


def clusters(sums, weights=None, samples=None):
    sums = np.asarray(sums, dtype=np.float64)
    weights = np.ones_like(sums) if weights is None else np.asarray(weights, dtype=np.float64)
    return Clusters(sums, weights, samples or int(weights.sum()))


def draw(family, documents, rng):
    """One experiment: scores of documents of 1 to 5 samples that share what their document is like."""
    sizes = rng.integers(1, 6, size=documents)
    document = np.repeat(np.arange(documents), sizes)
    n = len(document)
    if family == "normal":
        return rng.normal(size=documents)[document] + rng.normal(size=n), document, 0.0, None
    if family == "skewed":
        return rng.exponential(size=documents)[document] + rng.normal(size=n), document, 1.0, None
    if family == "accuracy":
        return (rng.random(n) < rng.beta(2.4, 0.6, size=documents)[document]).astype(float), document, 0.8, (0.0, 1.0)
    # paired differences of right/wrong answers, 7 of 10 of them ties
    return rng.choice([1.0, 0.0, -1.0], p=[0.25, 0.7, 0.05], size=n), document, 0.2, (-1.0, 1.0)


@pytest.mark.parametrize("documents", [20, 50, 200])
@pytest.mark.parametrize("family", ["normal", "skewed", "accuracy", "paired"])
def test_a_95_percent_interval_holds_the_truth_93_to_97_times_in_100(family, documents, monkeypatch):
    monkeypatch.setattr(stats, "DRAWS", 500)  # the simulation's draws average out what each draw of 500 lacks
    rng, repeats, held = np.random.default_rng(documents), 1000, 0
    for _ in range(repeats):
        values, document, truth, bounds = draw(family, documents, rng)
        interval = stats.mean_interval(stats.cluster(values, document), bounds=bounds)
        held += interval.low <= truth <= interval.high
    # 1.4 % is two standard errors of 1,000 repeats
    assert 0.93 - 0.014 <= held / repeats <= 0.97 + 0.014


def test_samples_of_one_document_do_not_pass_for_independent():
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(30), 10)
    values = rng.normal(size=30)[document]  # ten copies of each document's score
    once = stats.mean_interval(stats.cluster(values[::10], np.arange(30)))
    copies = stats.mean_interval(stats.cluster(values, document))
    assert copies.high - copies.low == pytest.approx(once.high - once.low)


def test_the_standard_error_counts_what_documents_of_unequal_size_differ_by():
    data = stats.cluster([1.0, 1.0, 1.0, 0.0, 1.0], ["a", "a", "a", "b", "c"])
    # mean 0.8; residuals S - 0.8 W of the documents: 0.6, -0.8, 0.2
    assert data.standard_error == pytest.approx(math.sqrt(3 / 2 * (0.36 + 0.64 + 0.04)) / 5)


def test_twenty_right_answers_of_twenty_are_not_certainty():
    interval = stats.mean_interval(stats.cluster(np.ones(20), np.arange(20)), bounds=(0.0, 1.0))
    assert interval.mean == interval.high == 1.0
    assert 0.75 < interval.low < 0.95  # Clopper and Pearson: 0.83


def test_one_document_gives_no_interval():
    interval = stats.mean_interval(stats.cluster([0.0, 1.0], ["a", "a"]))
    assert interval.mean == 0.5 and math.isnan(interval.low) and math.isnan(interval.high)


def test_the_mean_of_no_scores_is_nan():
    assert math.isnan(stats.cluster([], []).mean)


def test_a_failed_sample_is_refused_until_it_is_counted():
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        stats.cluster([1.0, float("nan"), 1.0], ["a", "b", "c"])
    scores, failed = stats.count_failed([1.0, float("nan"), 1.0], 0.0)
    assert failed == 1 and stats.cluster(scores, ["a", "b", "c"]).mean == pytest.approx(2 / 3)


def test_the_exact_sign_flip_test_is_the_enumeration():
    sums = np.array([0.5, -0.25, 1.0, 0.75, 0.0])
    flips = [np.dot(signs, sums) for signs in itertools.product([-1, 1], repeat=5)]
    expected = {
        "greater": np.mean([flip >= 2.0 for flip in flips]),
        "less": np.mean([flip <= 2.0 for flip in flips]),
        "two-sided": np.mean([abs(flip) >= 2.0 for flip in flips]),
    }
    for alternative, p in expected.items():
        assert stats.sign_flip_p(clusters(sums), alternative=alternative) == pytest.approx(p)


def test_drawn_flips_agree_with_all_flips(monkeypatch):
    sums = clusters(np.random.default_rng(1).normal(0.4, 1, size=16))
    exact = stats.sign_flip_p(sums)
    monkeypatch.setattr(stats, "EXACT_CLUSTERS", 4)
    # four standard errors of 20,000 draws
    assert stats.sign_flip_p(sums) == pytest.approx(exact, abs=4 * math.sqrt(exact / stats.FLIPS))


def test_drawn_flips_never_give_a_p_of_zero():
    assert stats.sign_flip_p(clusters(np.ones(60))) == pytest.approx(1 / (stats.FLIPS + 1))


def test_no_difference_is_no_evidence():
    assert stats.sign_flip_p(clusters(np.zeros(50))) == 1.0
    assert stats.romano_wolf(np.zeros((3, 50))) == (1.0, 1.0, 1.0)


def test_the_same_seed_gives_the_same_figures():
    data = clusters(np.random.default_rng(2).normal(size=40))
    assert stats.sign_flip_p(data, seed=5) == stats.sign_flip_p(data, seed=5)
    assert stats.mean_interval(data, seed=5) == stats.mean_interval(data, seed=5)
    assert stats.mean_interval(data, seed=5) != stats.mean_interval(data, seed=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_and_keeps_their_order(p):
    adjusted = stats.holm(p)
    assert all(a >= b for a, b in zip(adjusted, p, strict=True)) and max(adjusted) <= 1.0
    assert all(adjusted[i] <= adjusted[k] for i in range(len(p)) for k in range(len(p)) if p[i] <= p[k])


def test_holm_on_a_worked_example():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))


def identical_configurations(rng, trials=100, documents=60):
    """Right/wrong answers of configurations that differ by luck only: (trials, documents) differences to a baseline."""
    difficulty = rng.random(documents)
    answers = (rng.random((trials + 1, documents)) < difficulty).astype(float)
    return answers[1:] - answers[0]


def test_100_identical_configurations_have_a_false_winner_in_at_most_5_of_100_studies(monkeypatch):
    monkeypatch.setattr(stats, "FLIPS", 1_000)  # the rate does not depend on how fine p is
    rng, studies = np.random.default_rng(7), 300
    false = sum(min(stats.romano_wolf(identical_configurations(rng), seed=k)) <= 0.05 for k in range(studies))
    naive = 0
    for _ in range(50):
        sums = identical_configurations(rng)
        naive += (sums.sum(axis=1) / np.sqrt((sums**2).sum(axis=1))).max() > 1.645
    assert false / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)
    assert naive / 50 > 0.3  # what the correction is for: the best of 100, tested alone


def test_romano_wolf_finds_the_one_that_is_better_and_seldom_another(monkeypatch):
    monkeypatch.setattr(stats, "FLIPS", 2_000)
    rng, others = np.random.default_rng(4), 0
    for _ in range(40):
        differences = identical_configurations(rng, trials=20, documents=120)
        differences[7] = rng.choice([1.0, 0.0, -1.0], p=[0.45, 0.5, 0.05], size=120)
        adjusted = stats.romano_wolf(differences)
        assert adjusted[7] <= 0.05
        others += min(p for k, p in enumerate(adjusted) if k != 7) <= 0.05
    assert others <= 5  # 2 expected; 5 is what luck gives in 98 of 100


def test_romano_wolf_of_one_trial_is_the_sign_flip_test():
    sums = np.random.default_rng(5).normal(0.5, 1, size=12)
    for alternative in ("greater", "less", "two-sided"):
        (adjusted,) = stats.romano_wolf(sums[None], alternative=alternative)
        assert adjusted == pytest.approx(stats.sign_flip_p(clusters(sums), alternative=alternative))


def test_romano_wolf_gains_on_holm_where_trials_move_together():
    rng = np.random.default_rng(6)
    together = rng.normal(0.35, 1, size=60) + 0.1 * rng.normal(size=(30, 60))
    holm = stats.holm([stats.sign_flip_p(clusters(row), alternative="greater") for row in together])
    assert max(stats.romano_wolf(together)) < 0.5 * max(holm)


def test_the_minimum_detectable_effect_is_detected_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(stats, "FLIPS", 2_000)
    rng = np.random.default_rng(8)
    effect = stats.minimum_detectable_effect(clusters(rng.normal(size=200) + 0.0), power=0.8)
    assert effect == pytest.approx(2.8 / math.sqrt(200), rel=0.15)
    found = sum(stats.sign_flip_p(clusters(rng.normal(effect, 1, size=200))) <= 0.05 for _ in range(100))
    assert 0.65 <= found / 100 <= 0.93  # three standard errors, and the spread itself is estimated


def test_the_best_of_many_equals_looks_better_where_it_was_chosen():
    rng = np.random.default_rng(9)
    search, heldout = rng.normal(size=(50, 40)), rng.normal(size=(50, 40))
    chosen = search.mean(axis=1).argmax()
    gap = stats.winners_curse_gap(clusters(search[chosen]), clusters(heldout[chosen]))
    assert gap.low > 0 and gap.mean == pytest.approx(search[chosen].mean() - heldout[chosen].mean())
