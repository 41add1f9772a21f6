from typing import Any, ClassVar

import pytest

from statespan.benchmarks.base import Completion, Sample
from statespan.benchmarks.choice_tasks import CHOICE_TASKS, HellaSwagRow
from statespan.benchmarks.short_context import split_tokens
from statespan.benchmarks.table import build_benchmark
from tests.benchmark_conformance import BYTES, BenchmarkConformance, likelihood, samples_of

ROWS = {"data_root": "fixtures"}


def choosing(sample: Sample, choice: int) -> Completion:
    """Of a model that thinks this choice is the likeliest, by a lot."""
    step = 2 if sample.meta["own_contexts"] else 1
    nats = [-1e4] * len(sample.target_ids)
    nats[choice * step] = -1.0
    if step == 2:
        nats[1::2] = [0.0] * (len(nats) // 2)
    return Completion(likelihoods=tuple(likelihood(value) for value in nats))


class TestShortContext(BenchmarkConformance):
    NAME = "short_context"
    SETTINGS: ClassVar = ROWS | {"rows": 2}
    WIDER: ClassVar = {"rows": 4}
    SEEDED = False
    SLACK = None

    def perfect(self, sample: Sample) -> Completion:
        return choosing(sample, sample.meta["right"])

    def empty(self, sample: Sample) -> Completion:
        return choosing(sample, 1 - min(sample.meta["right"], 1))


def of_task(task: str) -> list[Sample]:
    return samples_of("short_context", ROWS | {"tasks": [task]})


def test_contexts_and_choices_are_lm_evals() -> None:
    def text(sample: Sample, target: int) -> str:
        return BYTES.decode(sample.prompt_ids + sample.target_ids[target])

    hellaswag, bells = of_task("hellaswag")[:2]
    assert text(hellaswag, 0) == "Baking bread: A woman kneads dough on a table. She puts it in the oven."
    assert text(bells, 1).startswith("Ringing bells: How to ring a bell. Take hold of the rope. Stand with both feet")
    assert text(of_task("piqa")[0], 1) == "Question: To keep bread fresh\nAnswer: put it into a bucket of water"
    assert text(of_task("arc_easy")[0], 0) == "Question: Which of these do plants need to grow?\nAnswer: light"
    assert text(of_task("openbookqa")[0], 1) == "Moss on a roof shows that the roof is often wet"
    grande = of_task("winogrande")[0]
    sentence = "The bell did not fit on the cart because the bell was too big."
    assert text(grande, 0) == sentence
    assert text(grande, 1) == sentence.removesuffix(" was too big.")
    assert text(grande, 2) == sentence.replace("the bell was", "the cart was")
    first_word = of_task("winogrande")[-1]
    assert not first_word.prompt_ids and text(first_word, 3) == "Hanna"
    assert text(first_word, 2) == "Hanna gave the lantern to Hanna, so Hanna thanked her."


@pytest.mark.parametrize(
    "context, continuation, expected",
    [
        pytest.param("a b", " c", ("a b", " c"), id="plain"),
        pytest.param("a b ", "c", ("a b", " c"), id="trailing_space_moves"),
        pytest.param("", " c", ("", " c"), id="empty_context"),
    ],
)
def test_context_and_continuation_are_parted_as_lm_eval_does(
    context: str, continuation: str, expected: tuple[str, str]
) -> None:
    ids, target = split_tokens(context, continuation, BYTES)
    assert (BYTES.decode(ids), BYTES.decode(target)) == expected
    assert ids != []


def scored(nats: list[float], measure: str, **meta: Any) -> float:
    facts = {"task": "piqa", "right": 0, "own_contexts": False, "characters": [1, 1], "bytes": [1, 1]}
    sample = Sample(
        id="x", prompt_ids=(1,), kind="likelihood", document="d", length=1, target_ids=((1,), (2,)), meta=facts | meta
    )
    completion = Completion(likelihoods=tuple(likelihood(value) for value in nats))
    return build_benchmark("short_context", {"measure": measure}).score(completion, sample)


def test_measures_divide_by_nothing_by_characters_or_by_bytes() -> None:
    sizes = {"characters": [10, 4], "bytes": [10, 8]}
    assert scored([-6.0, -4.0], "acc", **sizes) == 0
    assert scored([-6.0, -4.0], "acc_norm", **sizes) == 1  # -0.6 against -1
    assert scored([-6.0, -4.0], "acc_bytes", **sizes) == 0  # -0.6 against -0.5
    assert scored([-6.0, -4.0], "published", **sizes) == 0  # piqa: acc
    assert scored([-6.0, -4.0], "published", task="hellaswag", **sizes) == 1


def test_characters_and_bytes_differ_where_the_text_is_not_ascii() -> None:
    sample = of_task("openbookqa")[3]
    assert sample.meta["characters"][3] == 13 and sample.meta["bytes"][3] == 15


def test_a_tie_goes_to_the_first_choice() -> None:
    assert scored([-3.0, -3.0], "acc", right=0) == 1
    assert scored([-3.0, -3.0], "acc", right=1) == 0


def test_winogrande_takes_the_contexts_own_tokens_off() -> None:
    # context and text together -5 and -4, the contexts alone -4 and -1: the text itself -1 and -3
    assert scored([-5.0, -4.0, -4.0, -1.0], "acc", own_contexts=True) == 1


def test_hellaswag_lowers_the_rest_of_the_second_context_as_lm_eval_does() -> None:
    row = HellaSwagRow(ctx_a="A.", ctx_b="the Man", activity_label="X", endings=["a", "b", "c", "d"], label="0")
    assert CHOICE_TASKS["hellaswag"].item(row).contexts == ("X: A. The man",)


def test_the_headline_gives_every_task_the_same_weight() -> None:
    samples = samples_of("short_context", ROWS | {"rows": 2})
    benchmark = build_benchmark("short_context", ROWS)
    summary = benchmark.summary(samples, [float(sample.meta["task"] == "piqa") for sample in samples])
    assert summary["piqa"] == 1 and summary["headline"] == pytest.approx(1 / 6)
