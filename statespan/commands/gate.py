"""`statespan gate STUDY`: whether the winner is good enough to use, as an exit code."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def gate(
    study: Annotated[str, typer.Argument(help="A study's folder, or its name below --output.")],
    min_gain: Annotated[
        float,
        typer.Option(help="Least gain in quality over vanilla on held-out samples; 0.1 is 10 points of accuracy."),
    ] = 0.0,
    max_latency: Annotated[
        float | None, typer.Option(min=0.0, help="Most seconds a sample, prefill and decoding together.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the studies.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Pass (exit 0), fail (1) or say that the samples do not decide (2).

    Example: statespan gate quickstart --min-gain 0.1 --max-latency 2
    """
    from statespan.orchestration.assemble import load_study_data, study_folder
    from statespan.orchestration.gate import gate as judge

    found = judge(load_study_data(study_folder(study, output)), min_gain=min_gain, max_latency=max_latency)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        typer.echo("\n".join([found.outcome, *(f"  {reason}" for reason in found.reasons)]))
    raise typer.Exit(found.exit_code)
