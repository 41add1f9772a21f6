"""`statespan analyze MODEL`: what a model's channels remember, and where that says to search."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from statespan.analysis.facts import Analysis
    from statespan.analysis.measure import Progress
    from statespan.analysis.suggest import Suggestion
    from statespan.methods.base import ModelFacts


def analyze(
    model: Annotated[str, typer.Argument(help="A shipped name, a checkpoint folder or a hub id.")],
    lengths: Annotated[
        str | None, typer.Option(help="Tokens at which to measure, such as 1024,8192; by default 1 to 16 times L.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for analysis.html and analysis.json.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers whose attention is drawn, such as 0,3,6; by default some or all.")
    ] = None,
    text: Annotated[
        str, typer.Option(help="A shipped text, or a .txt, .jsonl or .parquet file of yours.")
    ] = "persuasion",
    texts: Annotated[int, typer.Option(min=1, help="How many stretches of the text are read.")] = 2,
    train_length: Annotated[
        int | None, typer.Option(min=2, help="L, tokens the model was trained on, where its config.json does not say.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for other programs.")] = False,
) -> None:
    """Measure what a model's channels remember and what length does to it, and suggest where to search.

    The result is kept for `space: auto` in a study.

    Example: statespan analyze mamba1-5m
    """
    from statespan.analysis.run import analyse, places, save
    from statespan.methods.base import ModelFacts
    from statespan.models.checkpoint import load_model
    from statespan.models.device import resolve_device
    from statespan.orchestration.analysis_page import to_html

    loaded = load_model(model, dtype="float32", device=resolve_device(device))
    with _said() as say:
        found = analyse(
            loaded,
            train_length=train_length,
            lengths=_numbers(lengths, "--lengths"),
            layers=_numbers(layers, "--layers"),
            text=text,
            texts=texts,
            on_progress=say,
        )
    facts = ModelFacts.of(loaded, train_length)
    save(found, places(facts)[-1])
    suggestions = _suggestions(found, facts)
    folder = out or Path("analysis") / found.model
    folder.mkdir(parents=True, exist_ok=True)
    save(found, folder / "analysis.json")
    (folder / "analysis.html").write_text(to_html(found, suggestions, found.longest), encoding="utf-8")
    if as_json:
        named = {method: {"params": one.params, "enqueue": one.enqueue} for method, one in suggestions.items()}
        typer.echo(json.dumps(found.to_json() | {"suggestions": named, "folder": str(folder)}))
    else:
        _show(found, suggestions)
        typer.echo(f"{folder / 'analysis.html'}, and analysis.json beside it")


def _numbers(listed: str | None, option: str) -> list[int] | None:
    from statespan.errors import UserError

    if listed is None:
        return None
    try:
        return [int(one.replace("_", "")) for one in listed.split(",")]
    except ValueError:
        raise UserError(
            f"{option} must be whole numbers with commas between, such as 1024,8192; got {listed!r}"
        ) from None


def _suggestions(found: Analysis, facts: ModelFacts) -> dict[str, Suggestion]:
    """For every method with a search space, at all lengths measured."""
    from statespan.analysis.suggest import suggest
    from statespan.methods.table import method_class
    from statespan.search_spaces.loader import available, load_space, names_of

    names = names_of(facts, found.longest)
    able = [method for method in available() if facts.kind in method_class(method).supports]
    return {method: suggest(found, load_space(method, names), found.lengths) for method in able}


@contextmanager
def _said() -> Iterator[Progress]:
    """A line on the terminal's error stream that tells what was measured; nothing where that is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: None
        return
    with console.status("reading …") as status:
        yield lambda what: status.update(f"measured {what}")


def _show(found: Analysis, suggestions: dict[str, Suggestion]) -> None:
    from rich.console import Console
    from rich.table import Table

    from statespan.orchestration.analysis_page import entry_text, setting
    from statespan.orchestration.report_charts import short, tokens

    console = Console()
    table = Table(
        title=f"{found.model}: {found.layers} layers of {found.channels} channels, L = {found.train_length:,}"
    )
    table.add_column("layer", justify="right")
    for name in ("receptive field\n10 % · 50 % · 90 %", "global\nθ = e^-5"):
        table.add_column(name, justify="right")
    for length in found.lengths:
        table.add_column(f"distance\n{tokens(length)}", justify="right")
    for layer in range(found.layers):
        row = found.fields_[layer]
        marks = " · ".join(short(row[round(share * (len(row) - 1))]) for share in (0.1, 0.5, 0.9))
        cells = [f"{row[layer]:,.0f}" for row in found.distance]
        table.add_row(str(layer), marks, f"{found.share_above(-5.0, [layer]):.0%}", *cells)
    console.print(table)
    reading = Table(title="nats a token: read from the beginning, and read anew from one L before")
    for name in ("place", *map(tokens, found.lengths)):
        reading.add_column(name, justify="right")
    reading.add_row("from the beginning", *(f"{one:.3f}" for one in found.loss))
    reading.add_row("anew", *(f"{one:.3f}" for one in found.fresh))
    console.print(reading)
    for method, one in suggestions.items():
        if not one.params:
            continue
        space = Table(
            title=f"{method}: where to search, prompts of up to {found.longest:,} tokens", title_justify="left"
        )
        for name in ("parameter", "range", "why"):
            space.add_column(name)
        for name, entry in one.params.items():
            space.add_row(name, entry_text(entry), str(entry.get("why", "")) if isinstance(entry, dict) else "")
        for point in one.enqueue:
            space.add_row("first", setting(point), "")
        console.print(space)
