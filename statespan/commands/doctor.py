"""`statespan doctor`: what this machine has, and what to change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def doctor(
    output: Annotated[Path, typer.Option(help="Folder of the studies.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for other programs.")] = False,
) -> None:
    """Check Python, torch, kernels, Ray's security, MLflow, disk and ports, and say how to fix what is wrong.

    Exits with 1 where something fails. Example: statespan doctor --json
    """
    from statespan.orchestration.health import examine
    from statespan.orchestration.ray_session import quiet

    quiet()
    failed = False
    for finding in examine(output):
        failed |= finding.state == "fail"
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(finding)))
            continue
        typer.echo(f"{MARKS[finding.state]}  {finding.name:<14} {finding.found}")
        if finding.fix:
            typer.echo(f"      {'':<14} → {finding.fix}")
    raise typer.Exit(1 if failed else 0)
