"""The command line end to end on a tiny study: what is printed, what is written, and the exit codes."""

import json

import pytest
import yaml

from statespan.cli import run
from statespan.orchestration import cache
from statespan.orchestration.ledger import Ledger
from statespan.orchestration.repair import repair
from statespan.orchestration.sweep import sweep
from tests.fake_engine import InstantEngine, instant
from tests.studies import essence, small_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = small_study(tmp_path_factory.mktemp("commands"), search={"trials": 6})
    sweep(study, make_engine=instant)
    return study


@pytest.fixture
def call(study, capsys):
    def command(*arguments):
        code = run([*map(str, arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return command


def test_help_names_every_command_and_is_an_example(call):
    code, out, _ = call("--help")
    names = ("sweep", "status", "report", "compare", "gate", "eval", "ls", "cache", "repair")
    assert code == 0 and all(f" {name} " in out for name in names)
    for name in names:
        code, out, _ = call(name, "--help")
        assert code == 0 and ("Example: statespan" in out or name == "cache")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("sweep", "no-such.yaml"), "no study file 'no-such.yaml'"),
        (("status", "no-such"), "no study at 'no-such'"),
        (("ls", "metods"), "did you mean 'methods'?"),
        (("sweeep",), "No such command"),
        (("gate",), "Missing argument"),
    ],
)
def test_wrong_usage_is_exit_2_and_one_line(call, arguments, message):
    code, out, err = call(*arguments)
    assert code == 2 and message in err and "Traceback" not in err and not out


def test_sweep_of_a_done_study_tells_its_result(call, study, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text((study.folder / "study.yaml").read_text())
    code, out, _ = call("sweep", path, "--json")
    last = json.loads(out.strip().splitlines()[-1])
    assert code == 0 and last["event"] == "done" and last["winner"] and last["p"] < 0.05
    code, out, _ = call("sweep", path, "--plain")
    assert code == 0 and "beats vanilla by" in out and "statespan serve" in out and "report.html" in out


def test_a_dry_run_writes_nothing(call, study, tmp_path):
    path = tmp_path / "study.yaml"
    raw = yaml.safe_load((study.folder / "study.yaml").read_text())
    path.write_text(yaml.safe_dump(raw | {"study": "dry"}))
    code, out, _ = call("sweep", path, "--dry-run")
    assert code == 0 and "first    published: decimamba(first_layer=1, base_tokens=64)" in out
    assert not (study.output / "dry").exists()


def test_status_compare_gate_and_ls(call, study):
    assert call("status", study.folder)[1].startswith("small: done")
    code, out, _ = call("compare", study.folder, f"{study.folder}/vanilla", "--json")
    assert code == 0 and json.loads(out)["comparisons"][0]["gain"] > 0.3
    assert call("gate", study.folder)[0] == 0
    assert call("gate", study.folder, "--min-gain", "0.99")[0] in (1, 2)
    code, out, _ = call("ls", "studies", "--output", study.output)
    assert code == 0 and "small" in out
    assert '"search"' in call("ls", "schema")[1]


def test_report_writes_one_page(call, study, tmp_path):
    code, out, _ = call("report", study.folder, "--to", tmp_path)
    assert code == 0 and "<html" in (tmp_path / "report.html").read_text() and str(tmp_path) in out


def test_eval_scores_one_method_on_one_benchmark(call, study):
    code, out, _ = call(
        "eval", study.model, "passkey", "--set", "lengths=[256]", "--limit", 2, "--method", "decimamba",
        "--param", "first_layer=1", "--json",
    )  # fmt: skip
    lines = [json.loads(line) for line in out.strip().splitlines()]
    assert code == 0 and [line["length"] for line in lines] == [256, "all"] and lines[0]["samples"] == 2


def test_cache_lists_collects_and_verifies(call, study, tmp_path, monkeypatch):
    assert "results" in call("cache", "ls", "--output", study.output)[1]
    found = cache.verify(study.folder, 5, 0, make_engine=instant)
    assert (found.checked, found.differences) == (5, [])
    found = cache.verify(study.folder, 5, 0, make_engine=_liar)
    assert found.differences and {one.field for one in found.differences} == {"score"} and found.bound
    other = study.model_copy(update={"output": tmp_path / "runs"})
    sweep(other, make_engine=instant)
    before = essence(other)
    ledger = Ledger(other.folder / "ledger")
    stray = ledger.read().slice(0, 1).to_pylist()[0] | {"trial_id": "t9999"}
    ledger.append([stray])
    assert cache.collect(other.folder, dry_run=True).rows == 1
    assert cache.collect(other.folder, dry_run=False).rows == 1
    assert essence(other) == before


def _liar(spec):
    class Liar(InstantEngine):
        def evaluate(self, *arguments):
            from dataclasses import replace

            return [replace(one, score=1.0 - one.score) for one in super().evaluate(*arguments)]

    return Liar(spec)


def test_repair_makes_a_lost_mirror_again(study, tmp_path):
    other = study.model_copy(update={"output": tmp_path / "runs"})
    sweep(other, make_engine=instant)
    before = essence(other)
    (other.folder / "optuna.db").unlink()
    assert repair(other.folder).whole and essence(other) == before
    ledger = Ledger(other.folder / "ledger")
    largest = max(ledger.files(), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"torn")
    found = repair(other.folder)
    assert not found.whole and found.quarantined == 1
