"""`statespan data fetch|check`: outside data sets, brought to one folder and read as their benchmarks read them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from statespan.benchmarks.data_check import Checked

app = typer.Typer(help="Bring data sets to a data root, and check what is there (docs/data.md).", no_args_is_help=True)

DATA_ROOT = Annotated[
    str | None, typer.Option("--data-root", help="The folder; by default the environment variable STATESPAN_DATA.")
]
AS_JSON = Annotated[bool, typer.Option("--json", help="One JSON object a data set, with every file's sha256.")]


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Data sets, such as longbench or squad.")],
    data_root: DATA_ROOT = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit of the data set's first source, in place of the pinned one.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Fail rather than use the network.")] = False,
    as_json: AS_JSON = False,
) -> None:
    """Fetch data sets at their pinned revisions, check every row, and put them in place whole or not at all.

    Example: statespan data fetch longbench squad --data-root data
    """
    from statespan.benchmarks.data_check import refuse_unknown
    from statespan.benchmarks.fetch import fetch as bring
    from statespan.errors import UserError

    refuse_unknown(names)
    if revision is not None and len(names) > 1:
        raise UserError(f"--revision {revision} is of one data set; {len(names)} are named")
    for name in names:
        found = bring(name, data_root, revision=revision, offline=offline, say=lambda line: typer.echo(line, err=True))
        _show(found, as_json)


@app.command()
def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Data sets; all of them where none is named.")
    ] = None,
    data_root: DATA_ROOT = None,
    as_json: AS_JSON = False,
) -> None:
    """Read every row of every data set that is there. Exit 1 where one is wrong, or is named and missing.

    Example: statespan data check --data-root data
    """
    from statespan.benchmarks.data_check import check as read
    from statespan.benchmarks.offline import no_network

    failed = False
    with no_network():
        for found in read(names or None, data_root):
            _show(found, as_json)
            failed |= found.status == "bad" or (found.status == "missing" and bool(names))
    raise typer.Exit(1 if failed else 0)


def _show(found: Checked, as_json: bool) -> None:
    typer.echo(json.dumps(asdict(found)) if as_json else _text(found))


def _text(found: Checked) -> str:
    line = f"{found.name:<14} {found.status:<8}"
    if found.problem:
        return f"{line} {found.problem}"
    rows, size = sum(file["rows"] for file in found.files if "rows" in file), sum(f["bytes"] for f in found.files)
    line += f" {rows:,} rows, " + (f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB")
    line += f", sha256 {found.files[0]['sha256']}" if len(found.files) == 1 else f", {len(found.files)} files"
    if found.missing_parts:
        line += f"; not there: {', '.join(found.missing_parts)}"
    return line
