"""`statespan report STUDY`: what a study came to, as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    study: Annotated[str, typer.Argument(help="A study's folder, or its name below --output.")],
    output: Annotated[Path, typer.Option(help="Folder of the studies.")] = Path("runs"),
    to: Annotated[Path | None, typer.Option("--to", help="Folder to write to; by default the study's.")] = None,
) -> None:
    """Write report.html (one self-contained file), report.md and trials.csv; of a running study, as far as it is.

    Example: statespan report quickstart
    """
    from statespan.orchestration.assemble import load_study_data, study_folder
    from statespan.orchestration.breakdown import with_questions
    from statespan.orchestration.importance import with_importance
    from statespan.orchestration.report import build_report

    folder = study_folder(study, output)
    data = with_questions(with_importance(load_study_data(folder), folder), folder)
    page, *_ = build_report(data).write(to or folder)
    typer.echo(str(page))
