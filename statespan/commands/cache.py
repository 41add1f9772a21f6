"""`statespan cache ls|gc|verify`: the results that studies have in store."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, tidy and re-run the results that studies keep.", no_args_is_help=True)

OUTPUT = Annotated[Path, typer.Option(help="Folder of the studies.")]
STUDY = Annotated[str, typer.Argument(help="A study's folder, or its name below --output.")]
AS_JSON = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@app.command()
def ls(output: OUTPUT = Path("runs"), as_json: AS_JSON = False) -> None:
    """Rows, files and bytes of every study's ledger.

    Example: statespan cache ls
    """
    from statespan.orchestration.cache import held, total

    found = held(output)
    for one in found:
        torn = f", {one.quarantined} torn files in quarantine" if one.quarantined else ""
        text = (
            f"{one.study:<24} {one.rows:>9,} results  {one.bytes / 1e6:>8.1f} MB  {one.files} files  {one.model}{torn}"
        )
        typer.echo(json.dumps(asdict(one)) if as_json else text)
    if not as_json:
        rows, size = total(found)
        typer.echo(f"{'all':<24} {rows:>9,} results  {size / 1e6:>8.1f} MB")


@app.command()
def gc(
    study: STUDY,
    output: OUTPUT = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.")] = False,
) -> None:
    """Drop rows that belong to no trial of the study as it is now, failed tries and torn files, and merge the rest.

    Example: statespan cache gc quickstart --dry-run
    """
    from statespan.orchestration.assemble import study_folder
    from statespan.orchestration.cache import collect

    swept = collect(study_folder(study, output), dry_run)
    done = "would go" if dry_run else f"gone, {swept.bytes / 1e6:.1f} MB freed"
    typer.echo(f"{swept.rows:,} rows and {swept.torn} torn files {done}")


@app.command()
def verify(
    study: STUDY,
    output: OUTPUT = Path("runs"),
    samples: Annotated[int, typer.Option(min=1, help="So many results, drawn at random.")] = 8,
    seed: Annotated[int, typer.Option(help="Same seed, same results.")] = 0,
    as_json: AS_JSON = False,
) -> None:
    """Run results of a past study again and compare. Exit 1 where a deterministic one does not come out the same.

    Example: statespan cache verify quickstart --samples 20
    """
    from statespan.orchestration.assemble import study_folder
    from statespan.orchestration.cache import verify as run

    found = run(study_folder(study, output), samples, seed)
    for one in found.differences:
        text = f"{one.trial_id} {one.task} {one.sample_id}: {one.field} was {one.was}, is {one.now}"
        typer.echo(json.dumps(asdict(one)) if as_json else text)
    if not as_json:
        typer.echo(f"{found.checked} results run again, {len(found.differences)} differences")
    raise typer.Exit(1 if found.differences and found.bound else 0)
