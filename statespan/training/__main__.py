"""python -m statespan.training: train a preset, measure a checkpoint, check a machine."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from statespan.errors import UserError, unknown

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Ids = Annotated[Path, typer.Option(help="Folder written by python -m statespan.training.vocabulary.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU where there is one.")]


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="A preset: mamba1-5m or mamba2-5m.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    ids: Ids,
    device: Device = "auto",
    minutes: Annotated[float | None, typer.Option(help="Lay the schedule over this much wall time.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps instead of the preset's.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens a step instead of the preset's.")] = None,
    d_model: Annotated[int | None, typer.Option(help="Width instead of the preset's.")] = None,
    n_layer: Annotated[int | None, typer.Option(help="Layers instead of the preset's.")] = None,
    source_weight: Annotated[
        list[str] | None, typer.Option(help="NAME=FACTOR, how often a source is read; once for each source.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed and steps, same batches.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that draw rows; 0 draws them in this one.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="File to save to along the way and to go on from.")] = None,
    longest: Annotated[int, typer.Option(help="Longest prompt measured at the end, in tokens.")] = 65_536,
    probes: Annotated[int, typer.Option(help="Measurements along the way.")] = 12,
    samples: Annotated[
        int, typer.Option(help="Samples of each measurement along the way; the last takes 3 times as many.")
    ] = 64,
) -> None:
    """Train a model and write its folder: config.json, model.safetensors, tokenizer.json, training_curve.json.

    Example: statespan train mamba1-5m --ids ids --out runs/mamba1-5m --device cuda --minutes 8
    """
    from statespan.models.device import resolve_device
    from statespan.training.finish import train_and_write
    from statespan.training.presets import preset

    asked: dict[str, Any] = {
        "minutes": minutes,
        "steps": steps,
        "tokens_per_step": tokens,
        "d_model": d_model,
        "n_layer": n_layer,
    }
    config = replace(preset(name), seed=seed, probes=probes, probe_samples=samples)
    config = replace(config, **{key: value for key, value in asked.items() if value is not None})
    if source_weight:
        config = replace(config, rows=replace(config.rows, source_weights=_factors(source_weight, ids)))
    found = train_and_write(
        config,
        ids,
        out,
        device=resolve_device(device),
        workers=workers,
        checkpoint=checkpoint,
        longest=longest,
        most=3 * samples + 8,
    )
    typer.echo(json.dumps({"model": name, **found}))


def _factors(given: list[str], ids: Path) -> tuple[tuple[str, float], ...]:
    from statespan.training.rows import RowSettings

    factors = dict(RowSettings().source_weights)
    sources = [path.stem for path in (ids / "train").glob("*.npy")]
    for text in given:
        source, _, factor = text.partition("=")
        if source not in sources:
            raise unknown("source of text", source, sources)
        try:
            factors[source] = float(factor)
        except ValueError:
            raise UserError(f"--source-weight takes NAME=FACTOR, such as sotu=0.5; got {text!r}") from None
    return tuple(sorted(factors.items()))


@app.command()
def card(folder: Annotated[Path, typer.Argument(help="A checkpoint folder with training_curve.json.")]) -> None:
    """Write the model card of a checkpoint folder, README.md, from what its training measured."""
    from statespan.training.card import write_card

    write_card(folder)


@app.command("adapter-card")
def adapter_card(
    folder: Annotated[Path, typer.Argument(help="A checkpoint's artifacts folder with an adapter's .json.")],
) -> None:
    """Write the card of a checkpoint's adapters, README.md, from what their training recorded."""
    from statespan.training.adapter_card import write_adapter_card

    write_adapter_card(folder)


@app.command()
def check(ids: Ids, device: Device = "cuda", steps: Annotated[int, typer.Option(help="Steps timed.")] = 10) -> None:
    """Compare each preset's gradients on the device with the CPU reference, then time its steps at each length."""
    from statespan.training.presets import PRESETS
    from statespan.training.selfcheck import compare_gradients, time_steps

    for config in PRESETS.values():
        typer.echo(f"{config.name} gradients: {compare_gradients(config, device)}")
        typer.echo(f"{config.name} ms a step: {time_steps(config, ids, device, steps)}")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
