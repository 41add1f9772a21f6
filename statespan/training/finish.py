"""After training: round the weights as they ship, measure them, and write the checkpoint folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch

from statespan.models import checkpoint
from statespan.models.lm import MambaLM
from statespan.training.card import write_card
from statespan.training.loop import Curve, report, train
from statespan.training.presets import TrainConfig
from statespan.training.probes import bits_per_byte, exact, label, make_probe, novel, probe_desk

SHIPPED_DTYPE = torch.bfloat16
"""Training rounds the matrices to it in every product, so the shipped file holds exactly what was trained."""

KEYS = (0, 1, 4, 8)
NOVELS = ("emma", "mansfield_park")


def write(model: MambaLM, config: TrainConfig, curve: Curve, ids: Path, out: Path) -> None:
    """config.json, model.safetensors, tokenizer.json and training_curve.json."""
    vocab_size = model.config.vocab_size
    checkpoint.save(model, config.model_config(vocab_size), out, SHIPPED_DTYPE)
    shutil.copy(ids / "tokenizer.json", out / "tokenizer.json")
    (out / "training_curve.json").write_text(json.dumps(report(config, curve)) + "\n")


def samples_at(length: int, most: int) -> int:
    """Fewer where prompts are long."""
    return min(200 if length <= 1024 else 100 if length <= 8192 else 50, most)


def measure(
    folder: Path, ids: Path, device: str, lengths: tuple[int, ...], tokens_at_once: int, most: int
) -> dict[str, Any]:
    """Retrieval by length and bits per byte of a written checkpoint, added to its training_curve.json."""
    model = checkpoint.load_model(str(folder), dtype="float32", device=device).model.requires_grad_(True)
    desk = probe_desk(ids)
    found: dict[str, Any] = {"retrieval": {}, "bits_per_byte": {}, "samples": {n: samples_at(n, most) for n in lengths}}
    for name in NOVELS:
        found["bits_per_byte"][name] = bits_per_byte(model, *novel(ids, name), 1024, tokens_at_once)
    for length in lengths:
        for keys in KEYS:
            rng = Random(f"final {keys} {length}")
            probes = [make_probe(rng, keys, length, desk) for _ in range(samples_at(length, most))]
            found["retrieval"][label(keys, length)] = exact(model, probes, tokens_at_once)
    path = folder / "training_curve.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final": found}) + "\n")
    return found


def train_and_write(
    config: TrainConfig,
    ids: Path,
    out: Path,
    *,
    device: str = "cpu",
    workers: int = 0,
    checkpoint: Path | None = None,
    longest: int = 65_536,
    most: int = 200,
) -> dict[str, Any]:
    """Train, write the checkpoint folder and its card, measure what was written; returns the measurements.

    Args:
        config, ids, device, workers, checkpoint: as for `statespan.training.loop.train`.
        out: folder of the new checkpoint.
        longest: longest prompt measured, in tokens.
        most: samples of a measurement, at most.
    """
    model, curve = train(config, ids, device=device, workers=workers, checkpoint=checkpoint)
    write(model, config, curve, ids, out)
    lengths = tuple(256 * 2**n for n in range(12) if 256 * 2**n <= longest)
    found = measure(out, ids, device, lengths, 32_768 if device == "cuda" else 8_192, most)
    write_card(out)
    return found
