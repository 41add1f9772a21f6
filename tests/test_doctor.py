import json
import os
from pathlib import Path

import pytest

from statespan import cli
from statespan.orchestration import health

CLEAN = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "STATESPAN_API_KEY")


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in (*CLEAN, "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME"):
        monkeypatch.delenv(name, raising=False)
    # compiled kernels stay where they are, the token file is looked for elsewhere
    monkeypatch.setenv("STATESPAN_CACHE", os.environ.get("STATESPAN_CACHE", str(Path.home() / ".cache" / "statespan")))
    monkeypatch.setenv("HOME", str(tmp_path))


def only(check):
    return {finding.name: finding for finding in check}


@pytest.mark.parametrize(
    "check, env, name, fix",
    [
        (health.ray, {"RAY_ADDRESS": "10.0.0.7:6379"}, "ray security", "set RAY_AUTH_MODE=token"),
        (health.ray, {"RAY_ADDRESS": "ray://head:10001", "RAY_AUTH_MODE": "disabled"}, "ray security", "RAY_AUTH_MODE"),
        (health.ray, {"RAY_AUTH_MODE": "token"}, "ray security", "ray get-auth-token --generate"),
        (health.ray, {"RAY_TMPDIR": "/" + "long" * 20}, "ray sockets", "shorter RAY_TMPDIR"),
        (health.mlflow, {"MLFLOW_TRACKING_URI": "./mlruns"}, "mlflow", "sqlite:///mlflow.db"),
        (health.key, {"STATESPAN_API_KEY": "short"}, "api key", "take 32"),
    ],
)
def test_what_is_unsafe_or_cannot_work_fails_with_its_fix(check, env, name, fix, monkeypatch):
    assert all(finding.state == "ok" for finding in check())
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    finding = only(check())[name]
    assert finding.state == "fail" and fix in finding.fix


def test_a_token_makes_another_machines_cluster_safe(monkeypatch):
    for key, value in {"RAY_ADDRESS": "10.0.0.7:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 32}.items():
        monkeypatch.setenv(key, value)
    assert only(health.ray())["ray security"].state == "ok"


def test_a_password_in_a_uri_is_not_shown(monkeypatch):
    for uri in ("postgresql://u:hunter2@db/mlflow", "http://u:hunter2@127.0.0.1:1/"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        (finding,) = health.mlflow()
        assert "hunter2" not in finding.found + finding.fix


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    (finding,) = health.disk(tmp_path / "file" / "runs")
    assert finding.state == "fail" and "give another folder" in finding.fix


def test_a_check_that_breaks_is_a_finding_and_not_the_end(monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("boom")

    monkeypatch.setattr(health, "python", broken)
    findings = only(health.examine(tmp_path))
    assert findings["broken"].state == "fail" and "boom" in findings["broken"].found and "models" in findings


def test_json_is_one_object_a_line_and_a_failure_exits_with_1(monkeypatch, tmp_path, capsys):
    assert cli.run(["doctor", "--json", "--output", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"python", "torch", "kernels", "ray security"} <= {row["name"] for row in rows}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    assert cli.run(["doctor", "--output", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "FAIL  mlflow" in shown and "→ use sqlite:///mlflow.db" in shown
