"""`statespan eval`: progress by tokens, shared beginnings, and offline held to its word."""

import json
from collections import Counter

import pytest

from statespan.benchmarks.table import build_benchmark
from statespan.cli import run
from statespan.models import runner
from statespan.orchestration.evaluation import evaluate_once, limited
from tests.benchmark_conformance import BYTES
from tests.tiny import save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("model")))


def once(model, benchmark, *settings, limit=None, batch=1, **more):
    return evaluate_once(model, benchmark, settings, "vanilla", (), limit, batch, "float64", "cpu", 1, **more)


@pytest.mark.parametrize("benchmark, settings", [
    ("mqar", ("lengths=[64]", "pairs=[4]", "trials=2", "vocabulary=250")),
    ("passkey", ("lengths=[400]", "depths=[0.5]", "trials=3")),
])  # fmt: skip
def test_progress_counts_every_token_that_is_read(model, benchmark, settings):
    told = []
    found = once(model, benchmark, *settings, batch=2, on_progress=lambda done, total: told.append((done, total)))
    total = sum(row["prompt_tokens"] for row in found.rows) + (len(found.rows) if benchmark == "mqar" else 0)
    assert [done for done, _ in told] == sorted(done for done, _ in told) and len(told) == 1 + -(-len(found.rows) // 2)
    assert told[-1] == (total, total) and {total for _, total in told} == {total}


def test_questions_on_one_document_say_what_they_spared(model, monkeypatch):
    monkeypatch.setattr(runner, "chunk_of", lambda model: 32)
    settings = ("data_root=fixtures", "tasks=[coursera]", "documents=1")
    found = once(model, "leval", *settings)
    first, *rest = found.rows
    assert first["layer_tokens_shared"] == 0 and rest and all(row["layer_tokens_shared"] > 0 for row in rest)
    assert all((row["layer_tokens"] + row["layer_tokens_shared"]) == 3 * row["prompt_tokens"] for row in found.rows)
    assert 0 < found.lines()[-1]["shared"] < 1


def test_a_limit_leaves_every_task_and_length_its_samples():
    benchmark = build_benchmark(
        "ruler", {"tasks": ["vt", "fwe"], "lengths": [900, 1300], "trials": 3, "examples": False}
    )
    kept = list(limited(benchmark, benchmark.samples(BYTES), 2))
    assert Counter((sample.meta["task"], sample.length) for sample in kept) == Counter(
        {("vt", 900): 2, ("vt", 1300): 2, ("fwe", 900): 2, ("fwe", 1300): 2}
    )


def test_own_figures_are_one_table_by_length_with_dashes_for_what_was_not_measured(model, capsys):
    asked = [
        "ruler",
        "--set",
        "tasks=[vt]",
        "--set",
        "lengths=[700,900]",
        "--set",
        "trials=1",
        "--set",
        "examples=false",
    ]
    assert run(["eval", model, *asked, "--set", "examples=false"]) == 0
    out = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in out}
    assert len(table["vt"]) == len(table["mean"]) == 2 and table["effective_length"] == ["–"]
    assert run(["eval", model, *asked, "--set", "examples=false", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=lambda name: pytest.fail(name))
    assert last["summary"]["effective_length"] is None


def test_offline_refuses_what_is_not_on_this_machine(model, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert run(["eval", "nobody/no-such-model", "mqar", "--offline"]) == 2
    error = capsys.readouterr().err.strip()
    assert "tokens read" not in error and error.startswith("statespan: ") and "nobody/no-such-model" in error
    quick = ["--set", "lengths=[64]", "--set", "pairs=[4]", "--set", "trials=1", "--set", "vocabulary=250"]
    assert run(["eval", model, "mqar", *quick, "--offline", "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 4
