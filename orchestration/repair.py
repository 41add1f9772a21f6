"""Mirrors made again: Optuna's database and MLflow, from the journal and the ledger. Computes no result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from statespan.config import Study
from statespan.orchestration.lock import study_lock
from statespan.orchestration.plan import make_plan
from statespan.orchestration.pool import WorkNeeded
from statespan.orchestration.progress import Progress
from statespan.orchestration.sweep import Run
from statespan.study_file import check_study

NOTES = ("search/mirror.json", "mlflow.json")
"""What says that a mirror is up to date."""


@dataclass(frozen=True, slots=True)
class Repaired:
    whole: bool
    """False where results are missing."""

    quarantined: int
    failed: dict[str, str]
    """Mirror -> why it could not be filled."""

    def lines(self) -> list[str]:
        out = [f"{self.quarantined} torn ledger files moved to quarantine"] if self.quarantined else []
        out += [f"{name} could not be filled: {why}" for name, why in self.failed.items()]
        if not self.whole:
            return [*out, "results are missing: run `statespan sweep` again, which computes them and fills the mirrors"]
        return [*out, "Optuna's database and MLflow hold the study"] if not self.failed else out


def saved_study(folder: Path) -> Study:
    """The study as it was last run, wherever its folder lies now."""
    raw = yaml.safe_load((folder / "study.yaml").read_text())
    return check_study(raw | {"study": folder.name, "output": str(folder.parent)}, str(folder / "study.yaml"))


def repair(folder: Path) -> Repaired:
    """Make both mirrors again, as far as the ledger goes."""
    from rich.console import Console

    study = saved_study(folder)
    plan = make_plan(study)
    with study_lock(study.folder):
        for note in NOTES:
            (study.folder / note).unlink(missing_ok=True)
        run = Run(plan, None, Progress(study, Console(), "quiet"))
        try:
            _, failed = run.remake()
            whole = True
        except WorkNeeded:
            whole, failed = False, {}
        return Repaired(whole, len(run.ledger.quarantined), failed)
