"""facts.json: what a study's report must know that is neither in the study file nor in the ledger."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from statespan.orchestration.plan import Plan

PACKAGES = ("statespan", "torch", "ray", "optuna", "mlflow", "numpy", "numba", "pyarrow", "tokenizers")


def study_facts(plan: Plan, space_version: str, before: Any = None) -> dict[str, Any]:
    """The facts; where `before` is of the same version, provenance stays that of the run that began it."""
    facts = {
        "version": space_version,
        "scope": plan.scope,
        "train_length": plan.facts.train_length,
        "model": {
            "name": plan.study.model,
            "path": str(plan.folder),
            "digest": plan.model.weights,
            "tokenizer": plan.model.tokenizer,
            "kind": plan.facts.kind,
            "layers": plan.facts.n_layer,
            "d_model": plan.facts.d_model,
        },
        "benchmarks": [
            {
                "name": task,
                "metric": benchmark.metric,
                "version": benchmark.version,
                "weight": plan.study.benchmarks[task].weight,
                "low": _finite(plan.bounds()[task][0]),
                "high": _finite(plan.bounds()[task][1]),
            }
            for task, benchmark in plan.tasks.items()
        ],
        "links": {"ledger": str(plan.study.folder / "ledger"), "exported winner": str(plan.study.folder / "best.json")},
        "provenance": provenance(plan),
    }
    if isinstance(before, dict) and before.get("version") == space_version:
        facts["provenance"] = before["provenance"]
    return facts


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None


def provenance(plan: Plan) -> dict[str, Any]:
    return {
        "versions": {name: package_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": platform.node(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit(),
        "command": " ".join(Path(part).name if i == 0 else part for i, part in enumerate(sys.argv)),
        "numerics": plan.numerics.facts(),
        "samples": plan.samples_from,
        "data": {task: dict(benchmark.provenance()) for task, benchmark in plan.tasks.items()},
        "seed": plan.study.search.seed,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout this code runs from, `+` where it was changed; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip()[:12] + ("+" if dirty.returncode else "") if head.returncode == 0 else None
