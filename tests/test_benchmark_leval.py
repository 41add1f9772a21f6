import json
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest

from statespan.benchmarks import leval_metrics as rules
from statespan.benchmarks.base import Completion, Sample
from statespan.benchmarks.leval import SIX, Task
from statespan.benchmarks.table import build_benchmark
from statespan.benchmarks.truncate import truncated_at_one_end
from tests.benchmark_conformance import BYTES, BenchmarkConformance, samples_of
from tests.parity_records import scorer_record


class LEvalConformance(BenchmarkConformance):
    NAME = "leval"
    SEEDED = False
    SLACK = None


class TestOfficial(LEvalConformance):
    SETTINGS: ClassVar = {"data_root": "fixtures", "tasks": list(get_args(Task)), "documents": 1}
    WIDER: ClassVar = {"documents": 2}


class TestReMamba(LEvalConformance):
    SETTINGS: ClassVar = {"data_root": "fixtures", "protocol": "remamba"}


def fixtures(task: Task, **more: object) -> list[Sample]:
    return samples_of("leval", {"data_root": "fixtures", "tasks": [task]} | more)


def test_official_scores_are_reproduced() -> None:
    for group in scorer_record("leval_a")["groups"]:
        scores = [_checked_score(group["task"], record) for record in group["records"] if "score" in record]
        assert sum(scores) / len(scores) == pytest.approx(group["exact_match"], abs=1e-6)


def _checked_score(task: str, record: dict[str, Any]) -> float:
    answer, gold = record["prediction"], record["answer"]
    if task in ("coursera", "quality", "tpo"):
        read, wanted = [rules.chosen(answer, several=task == "coursera")], [rules.right_letters(gold)]
    elif task == "gsm100":
        read, wanted = [rules.number(answer)], [rules.number(gold)]
    elif task == "codeU":
        read, wanted = [rules.stated_output(answer, gold)], [rules.program_output(gold)]
    else:
        document, _, fact = answer.lower().partition("[fact:")
        read, wanted = [rules.judgement(document), rules.judgement(fact)], list(rules.gold_judgements(gold))
    assert read == record["cleaned_prediction"] and wanted == record["cleaned_answer"]
    scores = [100 * rules.exact_match(got, right) for got, right in zip(read, wanted, strict=True)]
    assert scores == pytest.approx(record["score"], abs=1e-6)
    return sum(scores) / len(scores)


def test_an_empty_answer_is_worth_a_quarter_only_on_request() -> None:
    sample = fixtures("quality")[0]
    for blank_quarter, expected in ((False, 0.0), (True, 0.25)):
        benchmark = build_benchmark("leval", {"blank_quarter": blank_quarter})
        assert benchmark.score(Completion(text=""), sample) == expected


def test_sci_fi_asks_once_with_the_document_and_once_without() -> None:
    in_document, in_world = fixtures("sci_fi")[:2]
    assert "rains upwards" in BYTES.decode(in_document.prompt_ids) and in_document.targets == ("false",)
    assert "rains upwards" not in BYTES.decode(in_world.prompt_ids) and in_world.targets == ("true",)
    assert "real world" in BYTES.decode(in_world.prompt_ids)
    benchmark = build_benchmark("leval", {})
    samples = fixtures("sci_fi")
    scores = [benchmark.score(Completion(text="False."), sample) for sample in samples]
    # two of three statements are false in their story, one of three in the world
    assert benchmark.summary(samples, scores)["sci_fi"] == pytest.approx(100 * (2 / 3 + 1 / 3) / 2)


def test_the_protocols_place_the_instruction_and_cut_as_their_code_does() -> None:
    official, remamba = fixtures("tpo", max_length=60)[0], fixtures("tpo", max_length=60, protocol="remamba")[0]
    text = BYTES.decode(official.prompt_ids)
    assert text.count("Answer the question about the document") == 1 and text.endswith("\nAnswer:")
    assert len(remamba.prompt_ids) == 60 and BYTES.decode(remamba.prompt_ids).endswith("\nAnswer:")
    whole = BYTES.decode(fixtures("tpo", protocol="remamba")[0].prompt_ids)
    assert whole.count("Answer the question about the document") == 2
    assert (official.max_new_tokens, remamba.max_new_tokens) == (512, 500)


def test_a_long_document_loses_its_end_or_the_prompts_middle(tmp_path: Path) -> None:
    (tmp_path / "leval").mkdir()
    row = {"input": "BEGIN " + "word " * 2000 + "END", "instructions": ["Which?"], "outputs": ["A"]}
    (tmp_path / "leval" / "tpo.jsonl").write_text(json.dumps(row))
    texts = []
    for protocol in ("official", "remamba"):
        asked = {"data_root": str(tmp_path), "tasks": ["tpo"], "protocol": protocol, "max_length": 1500}
        (sample,) = build_benchmark("leval", asked).samples(BYTES)
        texts.append(BYTES.decode(sample.prompt_ids))
    official, remamba = texts
    assert "BEGIN" in official and "END" not in official and "Which?" in official
    assert "BEGIN" in remamba and "END" in remamba and len(remamba) == 1500


def test_documents_lose_their_end_and_code_its_beginning() -> None:
    text = " ".join(f"w{i}" for i in range(1000))
    head = truncated_at_one_end(text, 2000, BYTES, keep_end=False)
    tail = truncated_at_one_end(text, 2000, BYTES, keep_end=True)
    assert text.startswith(head) and text.endswith(tail)
    assert len(head.split()) == 250  # 2,000, 1,750, ... words at the ninth try
    assert truncated_at_one_end("a b", 10, BYTES, keep_end=False) == "a b"
    assert truncated_at_one_end("abcdefghijk", 3, BYTES, keep_end=False) == ""


def test_the_headline_is_the_mean_of_tasks() -> None:
    samples = samples_of("leval", {"data_root": "fixtures", "protocol": "remamba"})
    benchmark = build_benchmark("leval", {})
    summary = benchmark.summary(samples, [float(sample.meta["task"] == "gsm100") for sample in samples])
    assert summary["gsm100"] == 100 and summary["headline"] == pytest.approx(100 / len(SIX))


def test_provenance_counts_documents_and_questions() -> None:
    found = build_benchmark("leval", {"data_root": "fixtures", "tasks": ["coursera"]}).provenance()
    assert (found["coursera"]["rows"], found["coursera"]["questions"]) == (2, 4)
