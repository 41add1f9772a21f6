"""The card of a checkpoint's adapters, ARTIFACTS/README.md, written from the .json records their training left.

python -m statespan.training adapter-card ARTIFACTS
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statespan.errors import UserError

PARTS = 5  # of a run, for its curve


def write_adapter_card(folder: Path) -> None:
    """FOLDER/README.md, of every adapter in it."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not records:
        raise UserError(f"no adapter's .json in {folder}; the card is written from what training recorded")
    (folder / "README.md").write_text(card(folder.resolve().parent.name, records))


def card(model: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "\n".join(_row(name, record) for name, record in records.items())
    curves = "\n".join(_curve(name, record) for name, record in records.items())
    first = next(iter(records.values()))["settings"]
    commands = "\n".join(f"    {command(model, name, record)}" for name, record in records.items())
    return f"""# What belongs to {model}

`longmamba.safetensors` is the calibration that LongMamba and UPI read (`statespan calibrate {model}`: 20 stretches of
*Persuasion* of the training length). `remamba.safetensors` is ReMamba's adapter: Query, Key, Value, Θ, LoRA on in_proj
and out_proj, and the steps' own weights; `method: remamba` finds it by its name. A `remamba-baseline` was trained on
the same rows with the same LoRA and step weights, without the method: `selector: none` with `adapter: remamba-baseline`
runs it. Apache-2.0, like statespan; the text is in the public domain (the model's card).

| adapter | steps | seconds | parameters trained | device |
|---|---|---|---|---|
{rows}

Prompts of 0.5 to 3 training lengths, {first["tokens_per_step"]:,} tokens a step, a fifth of them running text; window
p ~ U(0.1, 0.3), ratio ρ ~ U(0.05, 0.2). AdamW at {first["learning_rate"]:g}, warm-up and cosine, weight decay
{first["weight_decay"]:g} but not on Θ and biases, rank {first["rank"]}, alpha {first["lora_alpha"]}, seed
{first["seed"]}, bfloat16 autocast. Matrices are stored as float16. Runs given in minutes took the same wall time, so
that the baseline, which reads a prompt once, took more steps.

{commands}

## Curves

Of each fifth of a run: median nats an answer token, and the share of batches' answers that are exact (running text,
which never is, included).

| adapter | first | second | third | fourth | last |
|---|---|---|---|---|---|
{curves}
"""


def command(model: str, name: str, record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    length = f"--minutes {settings['minutes']:g}" if settings["minutes"] else f"--steps {settings['steps']}"
    flags = " --baseline" if settings["baseline"] else ""
    if settings.get("start") == "fitted" and not settings["baseline"]:
        flags = f" --start fitted --widest {settings['widest']:g}" + " --detach-stage1" * settings["detach_stage1"]
    out = f"{name}.safetensors"
    return f"statespan train {model} --method remamba --ids IDS --device cuda {length} --half{flags} --out {out}"


def _row(name: str, record: Mapping[str, Any]) -> str:
    cells = (f"`{name}`", f"{record['steps']:,}", f"{record['seconds']:.0f}", f"{record['trained']:,}")
    return f"| {' | '.join(cells)} | {record['device']}, torch {record['torch']} |"


def _curve(name: str, record: Mapping[str, Any]) -> str:
    cells = []
    for part in range(PARTS):
        low, high = (record["steps"] * place / PARTS for place in (part, part + 1))
        entries = [entry for entry in record["curve"] if low < entry["step"] <= high]
        loss = statistics.median(entry["loss"] for entry in entries) if entries else float("nan")
        exact = statistics.fmean(entry["exact"] for entry in entries) if entries else float("nan")
        cells.append(f"{loss:.3f}, {exact:.0%}" if entries else "–")
    return f"| `{name}` | {' | '.join(cells)} |"
