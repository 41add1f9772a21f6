"""`statespan repair STUDY`: make the mirrors of a study again from its ledger and journal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def repair(
    study: Annotated[str, typer.Argument(help="A study's folder, or its name below --output.")],
    output: Annotated[Path, typer.Option(help="Folder of the studies.")] = Path("runs"),
) -> None:
    """Rebuild Optuna's database and fill MLflow from the ledger and the journal, which are what counts.

    Computes nothing: exit 1 where results are missing, which `statespan sweep` computes.

    Example: statespan repair quickstart
    """
    from statespan.orchestration.assemble import study_folder
    from statespan.orchestration.repair import repair as run

    folder = study_folder(study, output)
    for line in (found := run(folder)).lines():
        typer.echo(line)
    raise typer.Exit(0 if found.whole else 1)
