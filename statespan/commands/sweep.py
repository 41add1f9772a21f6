"""`statespan sweep STUDY.yaml`: search, prove and export."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statespan.errors import UserError

if TYPE_CHECKING:
    from statespan.config import Study
    from statespan.orchestration.finish import Result
    from statespan.orchestration.ray_session import Session


def sweep(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="Study file; examples/quickstart.yaml explains.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as search.trials=64; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, and what of it is known already. Writes nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, the result last.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines in place of the live display.")] = False,
) -> None:
    """Search the methods of a study, prove the winner on held-out samples, export it and write the report.

    The same command again goes on where it stopped; a study that is done is told at once. Edit the file to widen it.

    Example: statespan sweep examples/quickstart.yaml --set search.trials=32
    """
    from rich.console import Console

    from statespan.study_file import load_study

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    study = load_study(file, overrides or [])
    console = Console()
    if dry_run:
        _dry_run(study, as_json)
        return
    form = "json" if as_json else "live" if console.is_terminal and not plain else "lines"
    _run(study, console, form)


def _run(study: Study, console: Any, form: Any) -> None:
    from statespan.orchestration.ray_session import Session

    session = Session(study)
    session.begin_early()  # before the imports, which take as long
    try:
        _sweep(study, console, form, session)
    except UserError as error:
        _say(str(error))  # now, and not when Ray has come up and gone down again
        raise typer.Exit(2) from None
    finally:
        session.leave()


def _sweep(study: Study, console: Any, form: Any, session: Session) -> None:
    from statespan.orchestration.conductor import BaselineFailed
    from statespan.orchestration.files import DiskFull
    from statespan.orchestration.pool import Interrupted, PoolBroken
    from statespan.orchestration.progress import Progress
    from statespan.orchestration.sweep import sweep as run

    try:
        result = run(study, Progress(study, console, form), session=session)
    except (Interrupted, KeyboardInterrupt):
        _say("stopped; everything that was computed is kept. The same command goes on")
        raise typer.Exit(130) from None
    except (PoolBroken, BaselineFailed, DiskFull) as error:
        _say(f"{error}. Nothing that was computed is lost: the same command goes on")
        raise typer.Exit(1) from None
    _tell(result, form == "json")


def _tell(result: Result, as_json: bool) -> None:
    typer.echo(json.dumps(result.summary()) if as_json else result.text())


def _dry_run(study: Study, as_json: bool) -> None:
    from statespan.orchestration.dry import dry_run

    plan = dry_run(study)
    typer.echo(json.dumps(plan.summary()) if as_json else plan.text())


def _say(message: str) -> None:
    typer.echo(f"statespan: {message}", err=True)
