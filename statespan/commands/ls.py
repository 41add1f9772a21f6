"""`statespan ls`: what there is to name in a study file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from statespan.errors import unknown

KINDS = ("models", "methods", "benchmarks", "spaces", "samplers", "studies", "schema")


def ls(
    kind: str = typer.Argument(help=f"One of: {', '.join(KINDS)}."),
    name: str | None = typer.Argument(None, help="Only this one, with its settings."),
    output: Path = typer.Option(Path("runs"), help="Folder of the studies."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object a line."),
) -> None:
    """List models, methods, benchmarks, search spaces, samplers or studies, or print the study file's JSON Schema.

    Example: statespan ls methods decimamba
    """
    if kind not in KINDS:
        raise unknown("list", kind, KINDS)
    if kind == "schema":
        from statespan.config import Study

        typer.echo(json.dumps(Study.model_json_schema(), indent=2))
        return
    rows = list(_rows(kind, output))
    if name is not None:
        rows = [row for row in rows if row["name"] == name]
        if not rows:
            raise unknown(kind.rstrip("s"), name, [row["name"] for row in _rows(kind, output)])
    for row in rows:
        typer.echo(json.dumps(row) if as_json else _text(row, whole=name is not None))


def _rows(kind: str, output: Path) -> Iterator[dict[str, Any]]:
    if kind == "models":
        yield from _models()
    elif kind == "methods":
        from statespan.methods.table import METHODS

        for name, cls in METHODS.items():
            yield {"name": name, "what": _first_line(cls), "acts on": sorted(cls.supports), **_fields(cls.params_class)}
    elif kind == "benchmarks":
        from statespan.benchmarks.table import BENCHMARKS

        for name, benchmark in BENCHMARKS.items():
            yield {"name": name, "what": _first_line(benchmark), "version": benchmark.version, **_fields(benchmark)}
    elif kind == "spaces":
        yield from _spaces()
    elif kind == "samplers":
        from statespan.orchestration.samplers import GRID, NAMES

        yield from ({"name": name, "what": f"optuna.samplers.{cls}"} for name, cls in NAMES.items())
        yield from ({"name": name, "what": "every point of the space, in order"} for name in GRID)
    else:
        yield from _studies(output)


def _models() -> Iterator[dict[str, Any]]:
    from statespan.models.checkpoint import find, read_config, shipped
    from statespan.models.config import ModelConfig

    for name in shipped():
        raw = read_config(find(name))
        config = ModelConfig.read(raw)
        length = raw.get("statespan", {}).get("train_length")
        yield {
            "name": name,
            "what": f"{config.kind}, {config.n_layer} layers of {config.d_model}, trained on {length or '?'} tokens",
        }


def _spaces() -> Iterator[dict[str, Any]]:
    import yaml

    from statespan.search_spaces.loader import FOLDER, available

    for name in available():
        raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        params = {key: one.get("why", "") if isinstance(one, dict) else one for key, one in raw["params"].items()}
        yield {"name": name, "what": f"{len(params)} parameters", "settings": params}


def _studies(output: Path) -> Iterator[dict[str, Any]]:
    from statespan.orchestration.status import read_status

    for path in sorted(output.glob("*/facts.json")):
        status = read_status(path.parent)
        yield {"name": path.parent.name, "what": status.line()}


def _fields(cls: Any) -> dict[str, Any]:
    described = {
        name: " ".join((field.description or "").split()) + f" [{_default(field)}]"
        for name, field in cls.model_fields.items()
    }
    return {"settings": described}


def _default(field: Any) -> str:
    return "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)}"


def _first_line(cls: Any) -> str:
    import sys

    text = cls.__doc__ or sys.modules[cls.__module__].__doc__ or ""
    return text.strip().splitlines()[0] if text.strip() else ""


def _text(row: dict[str, Any], whole: bool) -> str:
    line = f"{row['name']:<22} {row['what']}"
    if not whole:
        return line
    facts = {key: value for key, value in row.items() if key not in ("name", "what", "settings")}
    rest = [f"  {key}: {', '.join(value) if isinstance(value, list) else value}" for key, value in facts.items()]
    settings = [f"  {key}\n      {value}" for key, value in row.get("settings", {}).items()]
    return "\n".join([line, *rest, *settings])
