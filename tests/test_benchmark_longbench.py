import math
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from statespan.benchmarks import metrics
from statespan.benchmarks.base import Completion, Sample
from statespan.benchmarks.catalog import FIXTURES
from statespan.benchmarks.longbench import EXTENDED, longbench_summary
from statespan.benchmarks.longbench_data import LongBenchRow
from statespan.benchmarks.longbench_tasks import TASKS, ScoreOptions, score
from statespan.benchmarks.table import build_benchmark
from statespan.benchmarks.truncate import truncated_in_the_middle
from statespan.errors import UserError
from tests.benchmark_conformance import BYTES, BenchmarkConformance, samples_of
from tests.parity_records import predictions, scorer_record

CHINESE = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
SEGMENTED = {"multifieldqa_zh", "dureader", "vcsum"}
"""Scored on words that only jieba knows."""


class LongBenchConformance(BenchmarkConformance):
    NAME = "longbench"
    SEEDED = False
    SLACK = None

    def perfect(self, sample: Sample) -> Completion:
        return Completion(text=sample.targets[0])

    def test_a_perfect_answer_scores_best_and_an_empty_one_worst(self) -> None:
        benchmark = self.build()
        for sample in self.samples:
            rouge = TASKS[sample.meta["dataset"]].metric.startswith("rouge")
            # the rouge package adds 1e-8 to the sum of precision and recall
            assert benchmark.score(self.perfect(sample), sample) == pytest.approx(1, abs=1e-8 if rouge else 0)
            assert benchmark.score(Completion(text=""), sample) == 0


class TestExtended(LongBenchConformance):
    SETTINGS: ClassVar = {"data_root": "fixtures", "datasets": list(EXTENDED), "rows": 1}


class TestStandard(LongBenchConformance):
    SETTINGS: ClassVar = {
        "data_root": "fixtures",
        "extended": False,
        "datasets": [name for name in TASKS if name not in SEGMENTED],
    }


class TestRows(LongBenchConformance):
    SETTINGS: ClassVar = {"data_root": "fixtures", "datasets": ["qasper"], "protocol": "remamba"}


def test_there_are_21_data_sets_and_13_of_them_in_e() -> None:
    assert len(TASKS) == 21 and len(EXTENDED) == 13
    assert not CHINESE & set(EXTENDED)


@pytest.mark.parametrize("task", EXTENDED)
def test_official_scores_of_the_records_are_reproduced(task: str) -> None:
    record = scorer_record(f"longbench_e_{task}")
    rows = []
    for row in record["records"]:
        found = score(TASKS[task], row["prediction"], row["answers"], record["all_classes"] or (), ScoreOptions())
        assert found == pytest.approx(row["score"], abs=1e-9)
        rows.append((task, row["bucket"], found))
        if "score_levenshtein_backend" in row:
            other = score(TASKS[task], row["prediction"], row["answers"], (), ScoreOptions(matcher="levenshtein"))
            assert other == pytest.approx(row["score_levenshtein_backend"], abs=1e-9)
    summary = longbench_summary(rows, by_bucket=True)
    assert summary[f"{task}/mean"] == pytest.approx(record["sample_plain_average"], abs=0.005)
    for bucket, average in record["sample_bucket_averages"].items():
        assert summary[f"{task}/{bucket}"] == pytest.approx(average, abs=0.005)


def test_the_published_remamba_run_scores_what_was_published() -> None:
    """All 3,668 predictions of 13 tasks; 27.8556 is the mean of their bucket means."""
    published = scorer_record("longbench_e_full_averages")
    rows = []
    for task in EXTENDED:
        for row in predictions(task):
            bucket = "0-4k" if row["length"] < 4000 else "4-8k" if row["length"] < 8000 else "8k+"
            found = score(TASKS[task], row["pred"], row["answers"], row["all_classes"] or (), ScoreOptions())
            rows.append((task, bucket, found))
    assert len(rows) == 3668
    summary = longbench_summary(rows, by_bucket=True)
    for task, figures in published["tasks"].items():
        assert summary[f"{task}/mean_of_buckets"] == pytest.approx(figures["mean_of_buckets"], abs=1e-6)
        assert summary[f"{task}/mean"] == pytest.approx(figures["plain_average"], abs=1e-6)
        for bucket, average in figures["bucket_averages"].items():
            assert summary[f"{task}/{bucket}"] == pytest.approx(average, abs=1e-6)
    assert summary["headline"] == pytest.approx(published["headline"], abs=1e-6)


@pytest.mark.parametrize(
    "found, expected",
    [
        pytest.param(metrics.rouge_l("a b c", "a b c"), 0.999999995, id="rouge_of_itself"),
        pytest.param(metrics.rouge_l("", "a"), 0, id="rouge_empty"),
        pytest.param(metrics.rouge_l("...", "a"), 0, id="rouge_only_dots"),
        pytest.param(metrics.rouge_l("x " * 600, "y " * 600, recursion_limit=980), 0, id="rouge_overflow_of_nothing"),
        pytest.param(metrics.qa_f1("the", "the"), 0, id="f1_of_an_article"),
        pytest.param(metrics.qa_f1("The cat!", "cat"), 1, id="f1_punctuation"),
        pytest.param(metrics.retrieval("Paragraph 12 of 30", "Paragraph 12"), 0.5, id="retrieval_other_number"),
        pytest.param(metrics.number_share("there are 7", "7"), 1, id="count"),
        pytest.param(metrics.code_similarity("// no\nx = 1", "x = 1"), 1, id="code_skips_comments"),
        pytest.param(metrics.code_similarity("# no", "x = 1"), 0, id="code_without_a_line"),
        pytest.param(
            metrics.classification("Other entity. City", "Other entity", ["Other entity", "City"]), 0.5, id="two"
        ),
    ],
)
def test_pinned_values(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, abs=1e-12)


def test_rouge_survives_sentences_that_overflow_the_package_unless_asked() -> None:
    words = " ".join(f"w{i}" for i in range(600))
    other = "w0 " + " ".join(f"v{i}" for i in range(600))
    assert metrics.rouge_l(words, other) > 0
    assert metrics.rouge_l(words, other, recursion_limit=980) == 0
    short = " ".join(words.split()[:400]), " ".join(other.split()[:400])
    assert metrics.rouge_l(*short) == metrics.rouge_l(*short, recursion_limit=980) > 0


def test_classification_skips_labels_as_published_and_clean_does_not() -> None:
    classes = ["Abb", "Abbreviation", "Abbreviation x"]
    assert metrics.classification("Abbreviation x", "Abbreviation x", classes) == 0.5
    assert metrics.classification("Abbreviation x", "Abbreviation x", classes, clean=True) == 1.0
    sample = Sample(
        id="x",
        prompt_ids=(1,),
        kind="generate",
        document="d",
        length=1,
        targets=("Abbreviation x",),
        meta={"dataset": "trec", "classes": classes},
    )
    for scoring, expected in (("as_published", 0.5), ("clean", 1.0)):
        benchmark = build_benchmark("longbench", {"scoring": scoring})
        assert benchmark.score(Completion(text="\n\nAbbreviation x\nAbb"), sample) == expected


class TestChinese(LongBenchConformance):
    SETTINGS: ClassVar = {"data_root": "fixtures", "extended": False, "datasets": sorted(CHINESE)}

    @pytest.fixture(autouse=True)
    def _jieba(self) -> None:
        pytest.importorskip("jieba", reason="needs the optional extra: pip install 'statespan[zh]'")


def test_without_jieba_chinese_data_sets_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    asked = {"data_root": "fixtures", "extended": False}
    with pytest.raises(UserError, match=r"datasets multifieldqa_zh, dureader, vcsum: .* pip install 'statespan\[zh\]'"):
        next(iter(build_benchmark("longbench", asked).samples(BYTES)))
    benchmark = build_benchmark("longbench", asked | {"datasets": ["lsht", "passage_retrieval_zh", "qmsum"]})
    assert next(iter(benchmark.samples(BYTES))).prompt_ids


def test_chinese_answers_are_scored_on_words() -> None:
    pytest.importorskip("jieba", reason="needs the optional extra: pip install 'statespan[zh]'")
    assert metrics.qa_f1_zh("五本书。", "五本书") == 1.0
    assert metrics.rouge_l_zh("五本书", "五本书") == pytest.approx(1)


def test_the_three_protocols_differ_as_their_code_does() -> None:
    def samsum(**more: Any) -> Sample:
        return samples_of("longbench", {"data_root": "fixtures", "datasets": ["samsum"]} | more)[0]

    official, remamba, longmamba = (samsum(protocol=p) for p in ("official", "remamba", "longmamba"))
    assert official.stop == remamba.stop == ("\n",) and longmamba.stop == ()
    assert [sample.meta.get("min_new_tokens", 0) for sample in (official, remamba, longmamba)] == [1, 1, 0]
    assert len({sample.id for sample in (official, remamba, longmamba)}) == 3
    cut, whole = samsum(max_length=50), samsum(protocol="longmamba")
    assert len(cut.prompt_ids) == 50 and len(whole.prompt_ids) > 100


def test_the_headline_averages_buckets_or_rows_as_the_protocol_does() -> None:
    samples = samples_of("longbench", {"data_root": "fixtures", "datasets": ["qasper"]}) * 2
    del samples[-1]  # two rows, two rows and one: buckets and rows differ
    scores = [float(sample.meta["bucket"] == "8k+") for sample in samples]
    for protocol, expected in (("remamba", 100 / 3), ("official", 100 / 3), ("longmamba", 20)):
        benchmark = build_benchmark("longbench", {"protocol": protocol})
        assert benchmark.summary(samples, scores)["headline"] == pytest.approx(expected)
    standard = build_benchmark("longbench", {"extended": False})
    assert standard.summary(samples, scores)["headline"] == pytest.approx(20)


@pytest.mark.parametrize(
    "length, bucket", [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+"), (90_000, "8k+")]
)
def test_buckets_are_by_the_rows_own_length(length: int, bucket: str) -> None:
    row = {"_id": "1", "input": "", "context": "", "answers": ["a"], "length": length, "all_classes": None}
    assert LongBenchRow.model_validate(row).bucket == bucket


def test_the_middle_is_cut_out() -> None:
    assert truncated_in_the_middle("abcdef", 4, BYTES) == BYTES.encode("abef")
    assert truncated_in_the_middle("abcdef", 5, BYTES) == BYTES.encode("abef")  # an odd length loses one
    assert truncated_in_the_middle("abcdef", 6, BYTES) == truncated_in_the_middle("abcdef", None, BYTES)
    seam = BYTES.decode(truncated_in_the_middle("aé" + "x" * 9 + "éb", 4, BYTES))
    assert "\ufffd" in seam  # a character halved at the seam, as in the original


def test_an_empty_bucket_is_nan_and_not_left_out() -> None:
    summary = longbench_summary([("qasper", "0-4k", 0.5)], by_bucket=True)
    assert summary["qasper/0-4k"] == 50 and summary["qasper/rows"] == 1
    assert math.isnan(summary["qasper/8k+"]) and math.isnan(summary["headline"])
    assert longbench_summary([("qasper", "0-4k", 0.5)], by_bucket=False)["headline"] == 50
    assert math.isnan(longbench_summary([], by_bucket=True)["headline"])


@pytest.fixture
def official(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES / "longbench", tmp_path / "longbench")
    config = tmp_path / "longbench" / "config"
    config.mkdir()
    (config / "dataset2prompt.json").write_text('{"qasper": "T: {context} Q: {input} A:"}')
    (config / "dataset2maxlen.json").write_text('{"qasper": 7}')
    return tmp_path


def test_official_prompts_are_used_where_the_user_has_them(official: Path) -> None:
    asked = {"data_root": str(official), "datasets": ["qasper"]}
    benchmark = build_benchmark("longbench", asked)
    sample = next(iter(benchmark.samples(BYTES)))
    assert BYTES.decode(sample.prompt_ids).startswith("T: We study") and sample.max_new_tokens == 7
    assert sample.meta["prompts"] == benchmark.provenance()["prompts"] == "official"
    own = next(iter(build_benchmark("longbench", asked | {"prompts": "own"}).samples(BYTES)))
    assert own.meta["prompts"] == "own" and own.id != sample.id


def test_official_prompts_that_do_not_serve_are_refused(official: Path) -> None:
    asked = {"data_root": str(official), "datasets": ["qasper"]}
    prompts = official / "longbench" / "config" / "dataset2prompt.json"
    prompts.write_text('{"qasper": "{contxt}"}')
    with pytest.raises(UserError, match=r"dataset2prompt\.json: the prompt of qasper cannot be filled in: 'contxt'"):
        list(build_benchmark("longbench", asked).samples(BYTES))
    prompts.write_text("{}")
    with pytest.raises(UserError, match=r"dataset2prompt\.json has nothing for the data set 'qasper'"):
        list(build_benchmark("longbench", asked).samples(BYTES))
    with pytest.raises(UserError, match=r"no data file .*dataset2prompt\.json"):
        list(build_benchmark("longbench", {"data_root": "fixtures", "prompts": "official"}).samples(BYTES))


def test_unknown_data_sets_are_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match="no LongBench-E data set named 'hotpot'; did you mean 'hotpotqa'"):
        build_benchmark("longbench", {"datasets": ["hotpot"]})
    with pytest.raises(UserError, match="no LongBench-E data set named 'musique'"):
        build_benchmark("longbench", {"datasets": ["musique"]})


def test_a_row_names_its_file_hash_and_count() -> None:
    found = build_benchmark("longbench", {"data_root": "fixtures", "datasets": ["lcc"]}).provenance()
    assert found["lcc"]["rows"] == 3 and len(found["lcc"]["sha256"]) == 64 and found["prompts"] == "own"
