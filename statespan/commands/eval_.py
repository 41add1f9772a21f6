"""`statespan eval MODEL BENCHMARK`: one method on one benchmark, without a study."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def eval_(
    model: Annotated[str, typer.Argument(help="A shipped name, a checkpoint folder or a hub id.")],
    benchmark: Annotated[str, typer.Argument(help="A benchmark; `statespan ls benchmarks` lists them.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Setting of the benchmark, such as lengths=[1024]; repeatable."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="A method; `statespan ls methods` lists them.")] = "vanilla",
    params: Annotated[
        list[str] | None,
        typer.Option(
            "--param", metavar="KEY=VALUE", help="Parameter of the method, such as first_layer=4; repeatable."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many samples of each length (and task) at most; for testing.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples run together; 1 repeats exactly.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 …; by default what suits the device.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU where there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all cores.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Fail on any use of the network.")] = False,
    samples_to: Annotated[
        Path | None, typer.Option("--samples", help="Write one JSON object a sample to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a length, the whole last.")] = False,
) -> None:
    """Evaluate one method on one benchmark and print its score by length. `sweep` does this for many, and keeps it.

    Example: statespan eval mamba1-5m passkey --set lengths=[4096] --method decimamba --param first_layer=4
    """
    from contextlib import ExitStack

    from statespan.benchmarks.offline import no_network
    from statespan.orchestration.evaluation import evaluate_once

    bars: list[Any] = []
    with ExitStack() as stack:
        if offline:
            stack.enter_context(no_network())

        def show(done: int, total: int) -> None:
            if not bars:  # not before there is something to read
                stderr = typer.get_text_stream("stderr")
                bar = typer.progressbar(length=total, label="tokens read", show_pos=True, file=stderr)
                bars.append(stack.enter_context(bar))
            bars[0].update(done - bars[0].pos)

        asked = (model, benchmark, overrides or [], method, params or [], limit, batch, dtype, device, threads)
        found = evaluate_once(*asked, on_progress=show)
    if samples_to is not None:
        samples_to.write_text("".join(json.dumps(row) + "\n" for row in found.rows))
    for line in found.lines():
        if as_json:
            typer.echo(json.dumps(_plain(line)))
        else:
            typer.echo(_text(line, found.metric))
    if not as_json:
        for text in _figures(found.summary):
            typer.echo(text)


def _text(line: dict[str, Any], metric: str) -> str:
    score = "–" if math.isnan(line["score"]) else f"{line['score']:.4f}"
    speed = f"{line['tokens_per_second']:,.0f} tokens/s"
    speed += f", {line['shared']:.0%} read with an earlier prompt" if line["shared"] > 0 else ""
    return f"{line['length']:>8}  {metric} {score}  {line['samples']} samples  {speed}"


def _figures(summary: Mapping[str, float]) -> Iterator[str]:
    """The benchmark's own figures: those of a length in one table, the others one a line."""
    split = {key: key.rpartition("@") for key in summary}
    lengths = sorted({int(length) for name, _, length in split.values() if name})
    rows = list(dict.fromkeys(name for name, _, _ in split.values() if name))
    if rows:
        yield " " * 22 + "".join(f"{length:>11,}" for length in lengths)
    for row in rows:
        yield f"{row:<22}" + "".join(f"{_figure(summary.get(f'{row}@{length}')):>11}" for length in lengths)
    for key in (key for key, (name, _, _) in split.items() if not name):
        yield f"{key:<22}{_figure(summary[key]):>11}"


def _figure(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """With null for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
