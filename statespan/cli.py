"""The command line. A command parses, calls one function and prints; nothing is computed here.

Exit codes: 0 done, 1 failed, 2 wrong usage or (gate, compare) inconclusive, 130 interrupted.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import typer

from statespan import __version__, commands
from statespan.errors import UserError

ORDER = (
    *("sweep", "status", "report", "compare", "gate", "serve", "submit"),
    *("eval", "train", "calibrate", "analyze", "data", "ls"),
)
"""How `--help` lists commands; others follow by name."""

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# typer may carry a copy of click of its own; its public BadParameter leads to the right base class
ClickError: type[Any] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def build_app() -> typer.Typer:
    """Every module of statespan.commands as a command."""
    app = typer.Typer(
        name="statespan",
        help="Find, prove and serve the best context-extension method for a Mamba language model.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    for name in sorted(names, key=lambda name: (_place(name), name)):
        module = importlib.import_module(f"statespan.commands.{name}")
        public = name.rstrip("_").replace("_", "-")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=public)
        else:
            app.command(public)(getattr(module, name))
    return app


def _place(name: str) -> int:
    public = name.rstrip("_")
    return ORDER.index(public) if public in ORDER else len(ORDER)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"statespan {__version__}")
        raise typer.Exit(DONE)


def _root(
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_print_version, help="Print the version."),
) -> None:
    """Options of `statespan` itself."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    try:
        code = build_app()(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        return int(code or DONE)
    except UserError as error:
        return _say(str(error), USAGE)
    except ClickError as error:
        error.show()
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", INTERRUPTED)


def _say(message: str, code: int) -> int:
    print(f"statespan: {message}", file=sys.stderr)
    return code


def main() -> None:
    ended: list[int] = []
    atexit.register(_end, ended)  # the first to be registered is the last to be called
    ended.append(run())
    sys.exit(ended[0])


def _end(ended: Sequence[int]) -> None:
    """End at once: to take down a process with torch, Ray and MLflow in it module by module takes seconds."""
    if ended:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(ended[0])
