"""The matrix of auto's score is replayed as it says: order, budgets, sides, and who wins."""

from pathlib import Path

import numpy as np
import pytest

from perf.auto_replay import Matrix, batches_of, matrices, outcomes, replayed, searched, settings_of
from statespan.benchmarks.base import Sample
from statespan.search_spaces.loader import Range, Space

ROOT = Path(__file__).parents[1]


def made(default, auto, first=(), samples=40):
    """Of settings with these shares of right answers; `first` is tried first in the auto space."""
    rng = np.random.default_rng(0)
    shares = [*default, *first, *auto]
    return Matrix(
        name="made",
        scores=(rng.random((len(shares), samples)) < np.array(shares)[:, None]).astype(float),
        vanilla=np.zeros(samples),
        space=np.array(["default"] * len(default) + ["auto"] * (len(first) + len(auto))),
        first=np.array([-1] * len(default) + [*range(len(first))] + [-1] * len(auto)),
        document=np.arange(samples) // 2,
        search=np.arange(samples) // 2 % 2 == 0,
    )


def test_a_search_tries_what_comes_first_and_then_draws_each_once():
    matrix, rng = made([0.5] * 20, [0.5] * 10, first=[0.5, 0.5]), np.random.default_rng(1)
    tried = matrix.searches("auto", 6, 50, rng, anew=False)
    assert (tried[:, :2] == [20, 21]).all() and all(len(set(row)) == 6 for row in tried)
    assert set(tried[:, 2:].ravel()) == set(range(22, 32))
    assert matrix.searches("auto", 1, 5, rng, anew=False).tolist() == [[20]] * 5
    assert set(matrix.searches("default", 8, 50, rng, anew=False).ravel()) == set(range(20))


def test_the_better_space_wins_with_half_the_trials_and_an_equal_one_does_not_lose():
    better = replayed(made([0.1] * 24, [0.9] * 12), 4)
    assert better.auto > better.default + 0.5 and better.no_worse == 1.0 and np.quantile(better.gaps, 0.025) > 0.4
    worse = replayed(made([0.1] * 12 + [0.9] * 12, [0.1] * 12), 4)
    assert worse.auto < worse.default and worse.no_worse < 0.1


def test_the_choice_sees_the_search_samples_alone():
    matrix = made([0.5] * 20, [0.5] * 10)
    shown = matrix.scores.copy()
    shown[25, matrix.search], shown[25, ~matrix.search] = 1.0, 0.0  # looks best, and is worst
    fooled = Matrix("fooled", shown, matrix.vanilla, matrix.space, matrix.first, matrix.document, matrix.search)
    _, auto = outcomes(fooled, 10, 20, np.ones(40), np.random.default_rng(0), anew=False)
    assert (auto == 0.0).all()


def test_stretches_of_text_are_drawn_anew_on_each_side():
    matrix, rng = made([0.5] * 3, [0.5] * 3), np.random.default_rng(0)
    for _ in range(20):
        weights = matrix.resampled(rng)
        assert weights[matrix.search].sum() == weights[~matrix.search].sum() == 20
        assert (weights[::2] == weights[1::2]).all()


def test_settings_that_leave_something_open_are_completed_and_draws_keep_the_constraints():
    ten = Range(type="int", low=1, high=10)
    space = Space(method="m", params={"a": ten, "b": 2, "c": ten}, constraints=("a < c",))
    found = list(settings_of(space, [{"a": 3}, {"a": 1, "c": 2}], 5, "seed"))
    assert [place for place, _ in found] == [0, 0, 0, 1, *[None] * 5]
    assert all(point["a"] == 3 for place, point in found if place == 0)
    assert all(point["a"] < point["c"] and point["b"] == 2 for place, point in found if place is None)


def test_batches_hold_one_length_and_cover_all_lengths_evenly():
    samples = [Sample(id=f"{length}-{i}", prompt_ids=(1,), kind="generate", document=f"book#{i}", length=length)
               for length in (100, 200, 400) for i in range(16)]  # fmt: skip
    batches = batches_of(samples, 400)
    assert sorted(place for batch in batches for place in batch) == list(range(48))
    for batch in batches:
        assert len({samples[place].length for place in batch}) == 1
        assert sum(samples[place].length for place in batch) <= 400
    half = [samples[place].length for batch in batches[: len(batches) // 2] for place in batch]
    assert all(6 <= half.count(length) <= 10 for length in (100, 200, 400))


@pytest.mark.parametrize("name", ["auto_matrix", "auto_matrix_first"])
def test_the_page_shows_what_the_matrix_holds(name):
    page = (ROOT / "docs" / "analyze.md").read_text()
    found = matrices(ROOT / "perf" / f"{name}.jsonl.gz")
    assert len(found) == 10
    for matrix in found:
        vanilla = 100 * matrix.means(np.ones(len(matrix.document)))[2]
        assert f"| {matrix.name} | {(~matrix.search).sum()} | {vanilla:.1f} |" in page
        assert set(np.unique(matrix.scores)) <= {0.0, 1.0} and set(matrix.space) == {"default", "auto"}
    assert searched("emma#4") and not searched("moby_dick#7")
