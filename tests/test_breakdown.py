"""The report shows every benchmark by its own columns, with its own figures."""

import numpy as np
import pytest

from statespan.orchestration.assemble import load_study_data
from statespan.orchestration.breakdown import with_questions
from statespan.orchestration.report import build_report
from statespan.orchestration.report_facts import gather
from statespan.orchestration.sweep import sweep
from tests.fake_engine import instant
from tests.studies import small_study

BENCHMARKS = {
    "ruler": {"tasks": ["vt", "niah_multikey_2"], "lengths": [900, 1300], "trials": 8, "examples": False},
    "questions": {"benchmark": "mqar", "lengths": [64], "pairs": [4, 8], "trials": 4, "vocabulary": 250},
    "perplexity": {"books": "persuasion", "lengths": [256, 300], "windows": 6},
    "passkey": {"lengths": [256], "depths": [0.5], "trials": 8},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    study = small_study(tmp_path_factory.mktemp("breakdown"), search={"trials": 3})
    study = study.model_copy(update={"benchmarks": type(study).model_validate(
        study.model_dump() | {"benchmarks": BENCHMARKS}).benchmarks})  # fmt: skip
    sweep(study, make_engine=instant)
    return with_questions(load_study_data(study.folder), study.folder)


def of(data, benchmark, role="baseline"):
    return next(one for one in gather(data).breakdowns if (one.benchmark, one.role) == (benchmark, role))


def test_cells_are_the_means_of_held_out_samples_by_task_and_length(data):
    found = of(data, "ruler")
    assert found.by == ("task", "length")
    assert list(found.cells) == [("vt", 900), ("vt", 1300), ("niah_multikey_2", 900), ("niah_multikey_2", 1300)]
    rows = data.samples.to_pylist()
    for (task, length), interval in found.cells.items():
        scores = [row["score"] for row in rows if row["split"] == "heldout" and row["trial_id"] == "vanilla"
                  and f"-{task}-s0-{length}-" in row["sample_id"]]  # fmt: skip
        assert len(scores) == interval.samples == 4 and interval.mean == pytest.approx(np.mean(scores))


def test_a_benchmarks_own_figures_are_shown_and_cells_are_not_repeated(data):
    figures = of(data, "ruler").figures
    assert {"mean@900", "effective_length", "weighted_increasing"} <= set(figures)
    assert not any(key.startswith(("vt", "niah")) for key in figures)
    assert figures["mean@900"] == pytest.approx(
        np.mean([of(data, "ruler").cells[task, 900].mean for task in ("vt", "niah_multikey_2")])
    )
    assert {"perplexity@256", "bits_per_byte@300"} <= set(of(data, "perplexity").figures)


def test_a_benchmark_without_columns_or_figures_of_its_own_has_no_table(data):
    assert {one.benchmark for one in gather(data).breakdowns} == {"ruler", "questions", "perplexity"}
    assert of(data, "questions").by == ("pairs", "length") and not of(data, "perplexity").cells


def test_page_and_markdown_hold_the_same_tables(data):
    report = build_report(data)
    for text in (report.html, report.markdown):
        assert "ruler: Vanilla, percent" in text and "niah_multikey_2" in text
        assert "perplexity: its own figures" in text and "word_perplexity@300" in text
    assert "| task | 900 | 1,300 |" in report.markdown
