"""`statespan submit STUDY.yaml --address URL`: run a sweep on a cluster, through Ray Jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def submit(
    study: Annotated[Path, typer.Argument(help="Study file, inside the working directory.")],
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS", help="The head's dashboard. RAY_AUTH_TOKEN is sent where it is set."
        ),
    ] = "http://127.0.0.1:8265",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the study, repeatable."),
    ] = None,
    working_dir: Annotated[
        Path,
        typer.Option(help="Folder that is uploaded: the study, its data, and statespan itself where you changed it."),
    ] = Path(),
    exclude: Annotated[
        list[str] | None, typer.Option(help="More patterns, as in .gitignore, that are not uploaded; repeatable.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Environment variable of the job; visible in the dashboard; repeatable."
        ),
    ] = None,
    results: Annotated[
        str, typer.Option(help="Folder on the head for all studies; the same one again resumes.")
    ] = "${HOME}/statespan-runs",
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; by default Ray makes one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run and what is uploaded.")] = False,
) -> None:
    """Run a sweep on a Ray cluster, print its log, and exit with its exit code. Ctrl-C leaves the job running.

    Example: statespan submit examples/quickstart.yaml --address http://127.0.0.1:8265 --set search.trials=64
    """
    from statespan.errors import UserError
    from statespan.orchestration import jobs
    from statespan.study_file import load_study

    folder = working_dir.resolve()
    if not study.resolve().is_relative_to(folder):
        raise UserError(f"{study} is not inside {folder}, which is what is uploaded; give --working-dir")
    settings = load_study(study, overrides or [])
    model = Path(settings.model).expanduser()
    if model.is_dir() and not model.resolve().is_relative_to(folder):
        typer.echo(f"note: {model} is not uploaded; every node of the cluster must have it there", err=True)
    job = jobs.Job(
        entrypoint=jobs.sweep_entrypoint(study.resolve().relative_to(folder), overrides or [], results),
        working_dir=folder,
        env=dict(_pair(one) for one in env or []),
        excludes=tuple(exclude or ()),
        submission_id=submission_id,
    )
    if dry_run:
        size = jobs.check_size(folder, [*jobs.EXCLUDES, *job.excludes])
        typer.echo(f"{job.entrypoint}\nuploads {folder}, {size / 1e6:.1f} MB at most, to {address}")
        return
    started: list[str] = []
    try:
        code = jobs.submit(address, job, _print, lambda name: _started(name, started))
    except KeyboardInterrupt:
        name = started[0] if started else "the job"
        typer.echo(
            f"\n{name} goes on; `ray job logs --follow {name}` shows it, `ray job stop {name}` ends it", err=True
        )
        raise typer.Exit(130) from None
    raise typer.Exit(code)


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _started(name: str, started: list[str]) -> None:
    started.append(name)
    typer.echo(f"submitted as {name}", err=True)


def _pair(text: str) -> tuple[str, str]:
    from statespan.errors import UserError

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"--env must look like NAME=VALUE; got {text!r}")
    return name, value
