"""Small studies on a tiny random checkpoint, and what of a finished one must not depend on how it was run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from statespan.config import Study
from statespan.orchestration.assemble import load_study_data
from statespan.study_file import check_study
from tests.tiny import save_checkpoint

SPACE = """
params:
  first_layer: {type: int, low: 0, high: "= n_layer - 1", why: test}
  base_tokens: {type: int, low: 16, high: 256, log: true, why: test}
published:
  - {first_layer: 1, base_tokens: "= train_length"}
"""


def small_study(folder: Path, **changes: Any) -> Study:
    """Eight trials of DeciMamba on passkeys of two lengths, inline, nothing tracked."""
    if not (folder / "model").exists():
        save_checkpoint(folder / "model")
        (folder / "space.yaml").write_text(SPACE)
    raw: dict[str, Any] = {
        "study": "small",
        "model": str(folder / "model"),
        "output": str(folder / "runs"),
        "benchmarks": {"passkey": {"lengths": [256, 400], "depths": [0.0, 0.5, 1.0], "trials": 10}},
        "methods": {"decimamba": {"space": str(folder / "space.yaml")}},
        "search": {"trials": 8, "batch": 3},
        "workers": {"backend": "inline", "item_samples": 4},
        "tracking": {"mlflow": "off"},
    }
    methods = changes.pop("methods", {})
    raw["methods"] = {
        name: {**raw["methods"].get(name, {}), **methods.get(name, {})} for name in {**raw["methods"], **methods}
    }
    for name, value in changes.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) and name in raw else value
    return check_study(raw)


def essence(study: Study) -> dict[str, Any]:
    """Trials, decisions, scores and the choice: everything but times and who computed what."""
    data = load_study_data(study.folder)
    columns = ("trial_id", "benchmark", "sample_id", "split", "rung", "score", "status", "text")
    rows = sorted(tuple(str(row[column]) for column in columns) for row in data.samples.to_pylist())
    trials = [
        (one.id, one.method, json.dumps(dict(one.params)), one.state, one.published, [str(rung) for rung in one.rungs])
        for one in data.trials
    ]
    best = json.loads((study.folder / "best.json").read_text())
    return {
        "trials": trials,
        "rows": rows,
        "winner": data.winner_id,
        "runner_up": data.runner_up_id,
        "best": best,
        "optuna": optuna_trials(study),
    }


def optuna_trials(study: Study) -> list[tuple[Any, ...]]:
    """The study as Optuna's own reader sees it."""
    import optuna

    from statespan.orchestration.mirror import storage_url

    loaded = optuna.load_study(study_name=study.study, storage=storage_url(study))
    return [
        (one.number, one.state.name, one.values, one.params, one.intermediate_values, one.user_attrs.get("trial"))
        for one in loaded.trials
    ]


def mlflow_runs(study: Study) -> dict[str, Any]:
    """Every MLflow run by identity, as MLflow's own client sees it: all that does not tell times."""
    from mlflow.tracking import MlflowClient

    from statespan.orchestration.tracking import tracking_uri

    client = MlflowClient(tracking_uri=tracking_uri(study))
    experiment = client.get_experiment_by_name(study.study)
    assert experiment is not None, "MLflow knows no such study"
    runs = client.search_runs([experiment.experiment_id], max_results=10_000)
    names = {run.info.run_id: run.data.tags["statespan.identity"] for run in runs}
    assert len(set(names.values())) == len(runs), "an identity has two runs"
    return {names[run.info.run_id]: _mlflow_run(client, run, names) for run in runs}


def _mlflow_run(client: Any, run: Any, names: dict[str, str]) -> dict[str, Any]:
    timed = ("wall_seconds", "system/")
    history = {
        name: sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
        if not name.startswith(timed)
    }
    return {
        "status": run.info.status,
        "params": dict(run.data.params),
        "metrics": history,
        "parent": names.get(run.data.tags.get("mlflow.parentRunId")),
        "tags": {
            key: value
            for key, value in run.data.tags.items()
            if key.startswith("statespan.") and key != "statespan.synced"  # names the seconds, too
        },
        "inputs": sorted((one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs),
    }
