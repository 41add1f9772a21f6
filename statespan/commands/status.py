"""`statespan status STUDY`: how far a study is, from another shell."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer


def status(
    study: Annotated[str, typer.Argument(help="A study's folder, or its name below --output.")],
    output: Annotated[Path, typer.Option(help="Folder of the studies.")] = Path("runs"),
    watch: Annotated[float | None, typer.Option(min=0.1, help="Print again every so many seconds until done.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Say how far a running study is, or how a finished one ended.

    Example: statespan status quickstart --watch 5
    """
    from statespan.orchestration.assemble import study_folder
    from statespan.orchestration.status import read_status

    folder = study_folder(study, output)
    while True:
        now = read_status(folder)
        typer.echo(json.dumps(now.as_json()) if as_json else f"{now.study}: {now.line()}")
        if watch is None or now.phase in ("done", "stopped", "failed", "unknown"):
            return
        time.sleep(watch)
