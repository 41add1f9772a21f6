import json
import math
import re
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any, ClassVar, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan.benchmarks.base import Completion, Sample
from statespan.benchmarks.metrics import ruler_all, ruler_cleaned, ruler_part
from statespan.benchmarks.ruler import GENERATED, Task, headline
from statespan.benchmarks.ruler_needles import NEEDLE_TASKS, Distractors
from statespan.benchmarks.table import build_benchmark
from statespan.errors import UserError
from statespan.study_file import load_study
from tests.benchmark_conformance import BYTES, BenchmarkConformance, samples_of
from tests.parity_records import scorer_record

LINE = 130
"""Bytes in the longest line or document that the tasks are made of: how far a prompt may stay below its length."""


class RulerConformance(BenchmarkConformance):
    NAME = "ruler"
    SLACK = LINE

    def perfect(self, sample: Sample) -> Completion:
        return Completion(text=" " + ", ".join(sample.targets) + "\n")

    def reserved(self, sample: Sample) -> int:
        return sample.max_new_tokens


class TestGenerated(RulerConformance):
    SETTINGS: ClassVar = {"tasks": [*GENERATED], "lengths": [2500], "trials": 2}
    WIDER: ClassVar = {"lengths": [2500, 3000], "trials": 3}


class TestQuestions(RulerConformance):
    SETTINGS: ClassVar = {"tasks": ["qa_1", "qa_2"], "lengths": [1500], "trials": 3, "data_root": "fixtures"}
    SLACK = None  # the fixtures have few documents: they all fit


class TestAsPublished(RulerConformance):
    SETTINGS: ClassVar = {
        "tasks": ["niah_single_1", "niah_single_2", "niah_multikey_2", "vt", "cwe", "fwe"],
        "lengths": [3600],
        "trials": 2,
        "variant": "as_published",
    }
    WIDER: ClassVar = {"trials": 3}
    SLACK = 3400  # 500 words at a time


def text_of(sample: Sample) -> str:
    return BYTES.decode(sample.prompt_ids)


def of_task(task: Task, **more: Any) -> list[Sample]:
    return samples_of("ruler", {"tasks": [task], "lengths": [2500], "trials": 3, "data_root": "fixtures"} | more)


@pytest.mark.parametrize("task", GENERATED)
@settings(max_examples=5, deadline=None)
@given(length=st.integers(2300, 6000), seed=st.integers(0, 99))
def test_prompt_and_answer_fit_any_length(task: Task, length: int, seed: int) -> None:
    asked = {"tasks": [task], "lengths": [length], "trials": 1, "seed": seed, "examples": False}
    if task == "cwe" and length >= 4096:
        length = 8000  # 300 numbered words do not fit in fewer bytes
        asked["lengths"] = [length]
    (sample,) = build_benchmark("ruler", asked).samples(BYTES)
    used = len(sample.prompt_ids) + sample.max_new_tokens
    assert length - LINE <= used <= length


@pytest.mark.parametrize("task", [task for task in GENERATED if task.startswith("niah")])
def test_every_asked_value_is_in_the_haystack_where_the_sample_says(task: Task) -> None:
    for sample in of_task(task):
        spans = [BYTES.decode(sample.prompt_ids[start:end]) for start, end in sample.meta["needle_tokens"]]
        assert len(spans) == len(sample.targets)
        for span, value in zip(spans, sample.targets, strict=True):
            assert value in span


@pytest.mark.parametrize(
    "task, needles, answers",
    [
        ("niah_single_1", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needle_tasks_hide_and_ask_as_many_as_published(task: Task, needles: int, answers: int) -> None:
    for sample in of_task(task):
        context = text_of(sample).split("\n\nQuestion:")[0]
        assert context.count("The special magic") == needles
        assert len(set(sample.targets)) == answers


def test_no_distractor_has_an_asked_key() -> None:
    task = NEEDLE_TASKS["niah_multikey_2"]
    (line,) = Distractors(task, frozenset(), Random(5)).first(1)
    key = line.split(" for ")[1].split(" is:")[0]
    without = Distractors(task, frozenset([key]), Random(5)).first(50)
    assert len(without) == 50 and not any(f" {key} " in other for other in without)


def test_a_chain_of_variables_leads_to_its_value() -> None:
    for sample in of_task("vt", examples=False):
        lines = [line for line in text_of(sample).split("\n") if line.startswith("VAR")]
        names = [line.split()[1] for line in lines]
        assert tuple(names) == sample.targets and len(names) == 5
        assert lines[1:] == [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]


def test_common_words_come_thirty_times_and_others_three_times() -> None:
    (sample,) = of_task("cwe", lengths=[12000], trials=1, examples=False)
    words = [word for word in text_of(sample).split("\n\n")[1].split() if not word[0].isdigit()]
    counts = {word: words.count(word) for word in words}
    assert {word for word, count in counts.items() if count == 30} == set(sample.targets)
    assert set(counts.values()) == {30, 3}


def test_frequent_words_are_the_ranks_two_to_four() -> None:
    for sample in of_task("fwe"):
        words = text_of(sample).split("\n\n")[1].split()
        ranked = sorted(set(words), key=words.count, reverse=True)
        assert ranked[0] == "..." and tuple(ranked[1:4]) == sample.targets
        assert words.count(ranked[3]) > words.count(ranked[4])


def test_question_documents_come_once_with_the_gold_one_among_them() -> None:
    for sample in of_task("qa_1") + of_task("qa_2"):
        documents = text_of(sample).split("\n\nQuestion:")[0].split("\n\n")[1:]
        paragraphs = [document.split("\n", 1)[1] for document in documents]
        assert len(set(paragraphs)) == len(paragraphs) > 2
        start, end = sample.meta["needle_tokens"][0]
        assert BYTES.decode(sample.prompt_ids[start:end]) in paragraphs


def test_unanswerable_squad_questions_are_left_out() -> None:
    found = build_benchmark("ruler", {"tasks": ["qa_1"], "data_root": "fixtures"}).provenance()
    assert found["squad"][0]["rows"] == 13  # of 14


# What lm-evaluation-harness 0.4.13 gets wrong, and this does not


def test_one_right_answer_of_several_is_a_whole_point_in_question_answering() -> None:
    sample = of_task("qa_1")[0]
    assert len(sample.targets) == 2
    assert build_benchmark("ruler", {}).score(Completion(text=sample.targets[0]), sample) == 1.0


def test_the_worked_example_of_common_words_is_in_the_prompt() -> None:
    with_example, without = of_task("cwe")[0], of_task("cwe", examples=False)[0]
    assert text_of(with_example).count("Question:") == 2
    assert text_of(without).count("Question:") == 1


def test_frequent_words_leave_room_for_their_answer() -> None:
    assert all(len(sample.prompt_ids) + 50 <= sample.length for sample in of_task("fwe"))


def test_the_tracking_example_is_drawn_anew_for_every_sample_and_lines_are_parted_by_newlines() -> None:
    examples = [text_of(sample).split("\n\nThe text below")[0] for sample in of_task("vt")]
    assert len(set(examples)) == len(examples)
    assert all("\nVAR " in example or "\n\nVAR " in example for example in examples)


def test_running_text_begins_again_where_the_context_is_longer(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("One two three. Four five six. Seven eight nine.")
    (sample,) = of_task("niah_single_2", haystack=str(tmp_path / "short.txt"), trials=1)
    assert text_of(sample).count("One two three.") > 30


def test_every_length_has_its_own_samples() -> None:
    found = samples_of("ruler", {"tasks": ["niah_single_1"], "lengths": [1000, 2000], "trials": 3})
    assert [sample.length for sample in found] == [1000] * 3 + [2000] * 3


@pytest.mark.parametrize("length", [1024, 1500, 4096, 5000])
def test_the_whole_prompt_and_nothing_else_is_counted_at_any_length(length: int) -> None:
    """There 1,024 tokens came out as 831, special tokens counted and the cue not."""
    for sample in of_task("niah_single_1", lengths=[length]):
        assert text_of(sample).endswith(" is:")
        assert length - LINE <= len(sample.prompt_ids) + sample.max_new_tokens <= length


def test_only_the_samples_that_are_asked_for_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a limit of 3 made 500 first."""
    made, ruler = list[int](), build_benchmark("ruler", {"tasks": ["vt"], "lengths": [2500], "trials": 500})
    puzzle = type(ruler)._puzzle  # type: ignore[attr-defined]
    monkeypatch.setattr(type(ruler), "_puzzle", lambda self, *place: (made.append(1), puzzle(self, *place))[1])
    assert len(list(islice(ruler.samples(BYTES), 3))) == len(made) == 3


def test_the_tracking_cue_is_ours_and_whole_and_its_value_differs_from_the_examples() -> None:
    for sample in of_task("vt"):
        example, own = re.findall(r"The variables that hold (\d+) are:", text_of(sample))
        assert example != own and text_of(sample).endswith(f"The variables that hold {own} are:")


@pytest.mark.parametrize("variant", ["clean", "as_published"])
@pytest.mark.parametrize("task", [task for task in get_args(Task) if task != "qa_2"])
def test_a_length_that_can_hold_no_sample_is_refused_not_retried_for_ever(task: Task, variant: str) -> None:
    asked = {"tasks": [task], "lengths": [250], "variant": variant, "data_root": "fixtures"}
    with pytest.raises(UserError, match=rf"ruler\.{task} at length 250"):
        list(build_benchmark("ruler", asked).samples(BYTES))


# Fitting and figures


def test_published_fitting_leaves_essay_prompts_short_and_ours_does_not() -> None:
    published = of_task("niah_single_2", variant="as_published", lengths=[5000], trials=3, seed=2)
    clean = of_task("niah_single_2", lengths=[5000], seed=2)
    assert min(len(sample.prompt_ids) for sample in published) < 4300
    assert all(len(sample.prompt_ids) > 4850 for sample in clean)


def test_published_samples_have_no_stop_string() -> None:
    assert {sample.stop for sample in of_task("niah_single_1", variant="as_published")} == {()}
    assert {sample.stop for sample in of_task("niah_single_1")} == {("\n",)}


def test_effective_length_and_weighted_averages() -> None:
    assert headline([4, 8, 16], [0.9, 0.87, 0.5]) == pytest.approx(
        {
            "effective_length": 8,
            "weighted_increasing": (0.9 + 2 * 0.87 + 3 * 0.5) / 6,
            "weighted_decreasing": (3 * 0.9 + 2 * 0.87 + 0.5) / 6,
        }
    )
    assert math.isnan(headline([4], [0.1])["effective_length"])
    assert math.isnan(headline([], [])["weighted_increasing"])


def test_the_mean_gives_every_task_the_same_weight() -> None:
    samples = of_task("vt") + of_task("niah_single_1")[:1]
    summary = build_benchmark("ruler", {}).summary(samples, [0.0, 0.0, 0.0, 1.0])
    assert summary["mean@2500"] == 0.5 and summary["vt@2500"] == 0.0


def test_official_scores_are_reproduced() -> None:
    for group in scorer_record("ruler_a")["groups"]:
        rule = ruler_all if group["rule"] == "all" else ruler_part
        scores = []
        for record in group["records"]:
            cleaned = ruler_cleaned(record["prediction"])
            assert cleaned == record["cleaned"]
            scores.append(rule(cleaned, record["references"]))
            assert 100 * scores[-1] == pytest.approx(record["score"], abs=0.005)  # rounded there to two places
        assert round(100 * sum(scores) / len(scores), 2) == group["score"]


def test_the_example_asks_all_thirteen_tasks_and_eleven_at_three_lengths() -> None:
    study = load_study(Path(__file__).parents[1] / "examples" / "ruler_small.yaml")
    asked = [build_benchmark(one.benchmark or name, one.settings) for name, one in study.benchmarks.items()]
    assert {task for one in asked for task in one.tasks} == set(get_args(Task))  # type: ignore[attr-defined]
    assert len(asked[0].lengths) == 3 and set(asked[0].tasks) == set(GENERATED)  # type: ignore[attr-defined]


def test_settings_survive_a_study_file() -> None:
    benchmark = build_benchmark("ruler", {"tasks": ["vt"], "lengths": [1000]})
    assert json.loads(benchmark.model_dump_json())["tasks"] == ["vt"]  # type: ignore[attr-defined]
