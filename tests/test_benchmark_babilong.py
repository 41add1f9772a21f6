from random import Random
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statespan.benchmarks.babilong import Story, tell
from statespan.benchmarks.base import Completion, Sample
from statespan.benchmarks.table import build_benchmark
from tests.benchmark_conformance import BYTES, BenchmarkConformance, samples_of

SMALL = {"lengths": [1500], "trials": 3}


class TestBabiLong(BenchmarkConformance):
    NAME = "babilong"
    SETTINGS = SMALL
    WIDER: ClassVar = {"lengths": [1500, 2000], "trials": 4}
    SLACK = 24


def solve(task: str, story: Story) -> str:
    """Reads the facts, and nothing else, as a careful reader would."""
    at: dict[str, str] = {}
    carried: dict[str, str] = {}
    been: dict[str, list[str]] = {}
    for fact in story.facts:
        words = fact.rstrip(".").split()
        if words[1] == "took":
            carried[words[3]] = words[0]
            been[words[3]] = [at[words[0]]]
        else:
            at[words[0]] = words[-1]
            for thing, who in carried.items():
                if who == words[0]:
                    been[thing].append(words[-1])
    asked = story.question.rstrip("?").split()
    if task == "qa1":
        return at[asked[2]]
    return been[asked[3]][-1 if task == "qa2" else -2]


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
@given(seed=st.integers(0, 10_000))
def test_a_reader_of_the_facts_finds_the_answer(task: str, seed: int) -> None:
    story = tell(task, Random(seed), 8)
    assert solve(task, story) == story.answer
    assert story.answer not in story.question
    assert len(story.facts) >= 8


@given(seed=st.integers(0, 10_000))
def test_a_question_about_the_place_before_has_one_answer(seed: int) -> None:
    story = tell("qa3", Random(seed), 12)
    thing, now = story.question.rstrip("?").split()[3], story.question.rstrip("?").split()[-1]
    path, holder, at = list[str](), "", dict[str, str]()
    for words in (fact.rstrip(".").split() for fact in story.facts):
        if words[1] == "took" and words[3] == thing:
            holder, path = words[0], [at[words[0]]]
        elif words[1] != "took":
            at[words[0]] = words[-1]
            path += [words[-1]] if words[0] == holder else []
    assert path[-1] == now and path.count(now) == 1 and path[-2] == story.answer


def test_facts_stand_in_order_in_the_book() -> None:
    for sample in samples_of("babilong", SMALL):
        text = BYTES.decode(sample.prompt_ids)
        story_part = text.split("\n\nQuestion:")[0]
        assert text.rstrip().endswith("the") and sample.meta["question"] in text
        assert story_part.count(" the ") >= sample.meta["facts"]


@pytest.mark.parametrize(
    "text, expected",
    [
        pytest.param(" garden", 1, id="right"),
        pytest.param(" Garden. Not the kitchen", 1, id="first_sentence_only"),
        pytest.param(" garden or kitchen", 0, id="two_places"),
        pytest.param(" kitchen", 0, id="other_place"),
        pytest.param(" gardens", 0, id="other_word"),
        pytest.param(" garden before the office", 1, id="place_of_the_question"),
    ],
)
def test_scores(text: str, expected: int) -> None:
    sample = Sample(
        id="x",
        prompt_ids=(1,),
        kind="generate",
        document="d",
        length=1,
        targets=("garden",),
        meta={"question": "Where was the lamp before the office?"},
    )
    assert build_benchmark("babilong", {}).score(Completion(text=text), sample) == expected
