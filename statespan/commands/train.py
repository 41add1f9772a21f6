"""`statespan train PRESET`: train a small Mamba as the shipped ones were; `--method remamba`: an adapter for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from statespan.training.__main__ import Device, Ids, run


def train(
    name: Annotated[
        str, typer.Argument(help="A preset (mamba1-5m, mamba2-5m); with --method a checkpoint's name or folder.")
    ],
    ids: Ids,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new checkpoint; with --method the adapter's file.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="remamba: train its adapter on a checkpoint.")] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="With --method: its fair baseline, the same training without the method.")
    ] = False,
    device: Device = "auto",
    minutes: Annotated[float | None, typer.Option(help="Lay the schedule over this much wall time.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps instead of the preset's.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens a step instead of the preset's.")] = None,
    rate: Annotated[float | None, typer.Option(help="With --method: learning rate.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="With --method: rank of LoRA.")] = 32,
    lora: Annotated[str, typer.Option(help="With --method: peft, or torch for hosts without peft.")] = "peft",
    published: Annotated[
        bool, typer.Option("--published", help="With --method: the paper's rate, schedule and decay, for large models.")
    ] = False,
    half: Annotated[bool, typer.Option("--half", help="With --method: store matrices as float16.")] = False,
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
    mlflow: Annotated[str | None, typer.Option(help="With --method: tracking URI that gets the loss curve.")] = None,
) -> None:
    """Train a model and write its folder, or a method's adapter for one.

    Example: statespan train mamba1-5m --ids ids --out runs/mamba1-5m --device cuda --minutes 8

    Example: statespan train mamba1-5m --method remamba --ids ids --device cuda --minutes 2
    """
    from statespan.errors import UserError, unknown

    if method is None:
        if out is None:
            raise UserError("training a model needs --out, the folder of the new checkpoint")
        run(name, out, ids, device, minutes, steps, tokens, d_model, n_layer, source_weight, seed, workers, checkpoint,
            longest, probes, samples)  # fmt: skip
        return
    if method != "remamba":
        raise unknown("method that is trained", method, ["remamba"])
    if lora not in ("peft", "torch"):
        raise unknown("keeper of LoRA", lora, ["peft", "torch"])
    given: dict[str, Any] = {"minutes": minutes, "steps": steps, "tokens_per_step": tokens, "learning_rate": rate}
    settings = {key: value for key, value in given.items() if value is not None}
    fixed = {"baseline": baseline, "rank": rank, "lora": lora, "seed": seed}
    settings = {"lora_alpha": rank, **(recipe() if published else {}), **settings, **fixed}
    _adapter(name, ids, out, device, workers, checkpoint, mlflow, settings, half)


def recipe() -> dict[str, Any]:
    from statespan.training.remamba import PUBLISHED

    return PUBLISHED


def _adapter(
    name: str,
    ids: Path,
    out: Path | None,
    device: str,
    workers: int,
    checkpoint: Path | None,
    mlflow: str | None,
    settings: dict[str, Any],
    half: bool,
) -> None:
    from statespan.methods.artifacts import writable_place
    from statespan.models.checkpoint import load_model
    from statespan.models.device import resolve_device
    from statespan.training.remamba import AdapterConfig, AdapterTrainer

    loaded = load_model(name, dtype="float32", device=resolve_device(device))
    trainer = AdapterTrainer(loaded, AdapterConfig(**settings), ids, workers=workers, checkpoint=checkpoint)
    progress = trainer.run(_curve(mlflow, name, settings) if mlflow else None)
    path = out or writable_place(trainer.facts, "remamba-baseline" if settings["baseline"] else "remamba")
    trainer.write(path, half=half)
    last = progress.curve[-1] if progress.curve else {}
    typer.echo(json.dumps({"adapter": str(path), "bytes": path.stat().st_size, "steps": progress.step, **last}))


def _curve(uri: str, name: str, settings: dict[str, Any]) -> Any:
    """Send losses to MLflow, a run of their own."""
    import mlflow as tracking

    tracking.set_tracking_uri(uri)
    tracking.set_experiment("statespan-adapters")
    tracking.start_run(run_name=f"{name} {'baseline' if settings['baseline'] else 'remamba'}")
    tracking.log_params(settings)
    return lambda step, entry: tracking.log_metrics(entry, step=step)


if __name__ == "__main__":  # a bare GPU host has no ray, which `python -m statespan` imports
    typer.run(train)
