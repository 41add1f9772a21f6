"""LongMamba's calibration on disk: our safetensors, and the authors' tables (GATECH-EIC/LongMamba@5da3e17)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.methods import artifacts
from statespan.methods.artifacts import Artifact, read_pickled
from statespan.methods.base import ModelFacts
from statespan.methods.calibration import AUTHORS_GRID, Calibration, stack_layers
from statespan.methods.step_statistics import Aggregate, StepStatistics


def to_tensors(calibration: Calibration) -> dict[str, Tensor]:
    """What a file holds. Thresholds are float16 shares of the channel's largest: exact to 5e-4 of their value."""
    tensors = {"lengths": torch.tensor(calibration.lengths), "train_length": torch.tensor(calibration.train_length)}
    for (share, how), table in calibration.tables.items():
        largest = table.threshold.amax(-1, keepdim=True)
        part = (table.threshold / largest.clamp_min(torch.finfo(torch.float32).tiny)).half()
        named = {"budget": table.budget, "log_decay": table.log_decay, "largest": largest[..., 0], "threshold": part}
        tensors |= {f"{share}.{how}.{name}": tensor for name, tensor in named.items()}
    if calibration.distance is not None:
        tensors["distance"] = calibration.distance
    if calibration.order is not None and calibration.A is not None:
        tensors |= {"order": calibration.order, "A": calibration.A}
    return tensors


def from_artifact(artifact: Artifact) -> Calibration:
    tensors = artifact.tensors
    tables = {}
    for key in tensors:
        if key.endswith(".threshold"):
            name = key.removesuffix(".threshold")
            share, how = name.rsplit(".", 1)
            threshold = tensors[key].float() * tensors[f"{name}.largest"][..., None]
            budget, log_decay = tensors[f"{name}.budget"], tensors[f"{name}.log_decay"]
            tables[float(share), how] = StepStatistics(budget, log_decay, threshold, threshold.new_empty(0))
    lengths = tuple(int(length) for length in tensors["lengths"])
    order, A = tensors.get("order"), tensors.get("A")
    return Calibration(
        int(tensors["train_length"]), lengths, tables, order, A, tensors.get("distance"), artifact.digest
    )


def calibration_of(facts: ModelFacts, given: object = None) -> Calibration:
    """The calibration itself, of the file it names, or of the file beside the checkpoint."""
    if isinstance(given, Calibration):
        return given
    made_by = "`statespan calibrate MODEL`"
    path = artifacts.find(facts, "longmamba", f"make one with {made_by}") if given is None else Path(str(given))
    return from_artifact(artifacts.read(path, facts, made_by))


def read_authors_tables(folder: Path, n_layer: int, share: float, how: Aggregate) -> Calibration:
    """The authors' tables of one clamp share and aggregate: {alpha,decay,tA_prod,delta_t-thre}/*_layer_{l}.pt.

    `decay` is the budget. Their decay products are float32 and may be 0; such a channel is local at any θ.
    """
    layers = [_authors_layer(folder, layer) for layer in range(n_layer)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*/*.pt")))).hexdigest()
    return Calibration(2_000, AUTHORS_GRID, {(share, how): stack_layers(layers)}, digest=digest)


def _authors_layer(folder: Path, layer: int) -> StepStatistics:
    found = {}
    for name in ("decay", "tA_prod", "delta_t-thre", "alpha"):
        paths = sorted((folder / name).glob(f"*_layer_{layer}.pt"))
        if not paths:
            raise UserError(f"no table {folder / name}/*_layer_{layer}.pt; give a model's folder of LongMamba tables")
        found[name] = read_pickled(paths[0])
    curves = []
    for name in ("delta_t-thre", "alpha"):
        by_length = found[name]
        if not isinstance(by_length, dict) or (missing := {f"{g // 1000}k" for g in AUTHORS_GRID} - by_length.keys()):
            raise UserError(f"{folder / name}: each file must hold a tensor for each of 1k … 192k; lacks {missing}")
        curves.append(torch.stack([by_length[f"{length // 1000}k"].double() for length in AUTHORS_GRID], dim=-1))
    budget, product = (found[name] for name in ("decay", "tA_prod"))
    if not isinstance(budget, Tensor) or not isinstance(product, Tensor):
        raise UserError(f"{folder}: decay and tA_prod must be tensors")
    return StepStatistics(budget.double(), product.double().log(), curves[0], curves[1])
