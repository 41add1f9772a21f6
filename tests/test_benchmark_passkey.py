from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan.benchmarks.base import Completion, Sample
from statespan.benchmarks.haystack import SEGMENTS
from statespan.benchmarks.table import build_benchmark
from statespan.errors import UserError
from tests.benchmark_conformance import BYTES, BenchmarkConformance, samples_of

SMALL = {"lengths": [600, 1000], "depths": [0.0, 0.5, 1.0], "trials": 2}


class TestOneKey(BenchmarkConformance):
    NAME = "passkey"
    SETTINGS = SMALL
    WIDER: ClassVar = {"lengths": [600, 800, 1000], "depths": [0.0, 0.25, 0.5, 1.0], "trials": 3}


class TestFourNamedKeys(BenchmarkConformance):
    NAME = "passkey"
    SETTINGS = SMALL | {"keys": 4}
    WIDER: ClassVar = {"trials": 3}


class TestWordKeysInNoise(BenchmarkConformance):
    NAME = "passkey"
    SETTINGS = SMALL | {"keys": 2, "kind": "word", "haystack": "noise"}


class TestAsPublished(BenchmarkConformance):
    NAME = "passkey"
    SETTINGS = SMALL | {"variant": "as_published"}
    WIDER: ClassVar = {"trials": 3}  # lengths come before trials in the running haystack
    SLACK = 0

    def reserved(self, sample: Sample) -> int:
        """The length counts neither the instruction nor the cue."""
        return sample.length - len(sample.prompt_ids) + self._around(sample)

    def _around(self, sample: Sample) -> int:
        text = BYTES.decode(sample.prompt_ids)
        return len(text) - text.index("\n") - 1 - len("\nAnswer: ") - sample.length


@settings(max_examples=25, deadline=None)
@given(length=st.integers(420, 3000), depth=st.floats(0.0, 1.0), keys=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_a_sample_fits_its_length_and_hides_the_asked_key_once(length: int, depth: float, keys: int, seed: int) -> None:
    asked = {"lengths": [length], "depths": [depth], "trials": 1, "keys": keys, "seed": seed}
    (sample,) = build_benchmark("passkey", asked).samples(BYTES)
    text = BYTES.decode(sample.prompt_ids)
    assert length - 40 <= len(sample.prompt_ids) <= length  # Moby Dick's longest word has 35 bytes
    assert text.count(sample.targets[0]) == (2 if keys == 1 else 1)  # the passkey needle says its key twice
    start, end = sample.meta["needle_tokens"][0]
    assert sample.targets[0] in BYTES.decode(sample.prompt_ids[start:end])


def test_the_needle_lies_at_its_depth() -> None:
    grid = {"lengths": [8000], "depths": [0.0, 0.5, 1.0], "trials": 4}
    for sample in samples_of("passkey", grid):
        start, end = sample.meta["needle_tokens"][0]
        room = len(sample.prompt_ids) - 200  # instruction and question
        assert (start + end) / 2 / room == pytest.approx(sample.depth, abs=0.08)  # a long sentence of Moby Dick


def test_a_cells_trials_take_every_segment_before_one_comes_twice() -> None:
    samples = samples_of("passkey", {"lengths": [600], "depths": [0.5], "trials": SEGMENTS})
    assert len({sample.document for sample in samples}) == SEGMENTS


@pytest.mark.parametrize(
    "text, clean, published",
    [
        pytest.param(" 71432", 1, 1, id="right"),
        pytest.param(" 71432.", 1, 0, id="with_a_full_stop"),
        pytest.param(" 71432\nThe pass", 1, 0, id="with_a_newline"),
        pytest.param(" 714321", 0, 0, id="longer_number"),
        pytest.param(" 71431 71432", 0, 1, id="second_guess"),
        pytest.param(" 1 71432", 0, 1, id="after_another_number"),
        pytest.param("71432", 1, 1, id="no_space"),
        pytest.param(" key", 0, 0, id="no_number"),
    ],
)
def test_scores_differ_where_the_published_rule_is_odd(text: str, clean: int, published: int) -> None:
    for variant, expected in (("clean", clean), ("as_published", published)):
        benchmark = build_benchmark("passkey", {"variant": variant})
        sample = Sample(id="x", prompt_ids=(1,), kind="generate", document="d", length=1, targets=("71432",))
        assert benchmark.score(Completion(text=text), sample) == expected


def test_a_published_key_may_be_short_and_a_clean_one_never_is() -> None:
    published = samples_of("passkey", {"variant": "as_published", "lengths": [200], "depths": [0.5], "trials": 60})
    clean = samples_of("passkey", {"lengths": [300], "depths": [0.5], "trials": 60})
    assert min(len(sample.targets[0]) for sample in published) < 5
    assert {len(sample.targets[0]) for sample in clean} == {5}


def test_strip_cue_drops_the_space_before_the_answer() -> None:
    for strip, ending in ((False, "Answer: "), (True, "Answer:")):
        asked = {"variant": "as_published", "strip_cue": strip, "lengths": [300], "trials": 1}
        assert BYTES.decode(samples_of("passkey", asked)[0].prompt_ids).endswith(ending)


def test_a_length_without_room_for_the_question_is_refused() -> None:
    with pytest.raises(UserError, match=r"passkey with 8 keys needs 6.. tokens at the least; its prompt may have 300"):
        list(build_benchmark("passkey", {"keys": 8, "lengths": [300]}).samples(BYTES))


def test_several_keys_as_published_are_refused() -> None:
    with pytest.raises(UserError, match="keys must be 1 where variant is as_published"):
        build_benchmark("passkey", {"variant": "as_published", "keys": 4})
