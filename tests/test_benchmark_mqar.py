from typing import ClassVar

import pytest

from statespan.benchmarks.base import Completion, Sample
from statespan.benchmarks.table import build_benchmark
from statespan.errors import UserError
from tests.benchmark_conformance import BYTES, BenchmarkConformance, likelihood, samples_of

SMALL = {"lengths": [64], "pairs": [4, 8], "trials": 3, "vocabulary": 250}


class TestMQAR(BenchmarkConformance):
    NAME = "mqar"
    SETTINGS = SMALL
    WIDER: ClassVar = {"lengths": [64, 100], "trials": 4}
    SLACK = None

    def perfect(self, sample: Sample) -> Completion:
        return Completion(likelihoods=(likelihood(-0.1),))

    def empty(self, sample: Sample) -> Completion:
        return Completion(likelihoods=(likelihood(-9.0, greedy=False),))


def test_a_prompt_ends_with_a_key_whose_value_it_holds() -> None:
    for sample in samples_of("mqar", SMALL):
        pairs = sample.meta["pairs"]
        table = dict(zip(sample.prompt_ids[: 2 * pairs : 2], sample.prompt_ids[1 : 2 * pairs : 2], strict=True))
        assert len(table) == pairs
        assert (table[sample.prompt_ids[-1]],) == sample.target_ids[0]
        assert len(sample.prompt_ids) <= sample.length


def test_keys_come_from_the_lower_half_and_values_from_the_upper_and_none_is_reserved() -> None:
    for sample in samples_of("mqar", SMALL | {"reserved": 50}):
        assert 50 <= sample.prompt_ids[-1] < 150 <= sample.target_ids[0][0] < 250
        assert min(sample.prompt_ids) >= 50


def test_a_small_exponent_keeps_keys_close_to_the_pairs() -> None:
    def mean_gap(power: float) -> float:
        gaps = [s.meta["gap"] for s in samples_of("mqar", SMALL | {"power": power, "pairs": [4], "trials": 30})]
        return sum(gaps) / len(gaps)

    # weights 1/g over 28 slots against equal weights, whose mean is 13.5
    assert mean_gap(0.01) < 8 < 12 < mean_gap(1.0) < 15


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"pairs": [17]}, "17 pairs need lengths of 68 or more; got 64"),
        ({"vocabulary": 60}, r"vocabulary must exceed reserved and the longest length \(64\)"),
        ({"vocabulary": 4096}, "mqar.vocabulary must be at most the tokenizer's 257 ids; got 4096"),
    ],
)
def test_sequences_that_cannot_be_built_are_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(build_benchmark("mqar", SMALL | asked).samples(BYTES))
