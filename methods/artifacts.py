"""Files that belong to one checkpoint: calibration tables and adapters, as safetensors that name the weights they fit.

They lie in `artifacts/` of the checkpoint's folder, or, where that cannot be written, in the user's cache
(STATESPAN_CACHE, else ~/.cache/statespan) in a folder named by the weights' digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from statespan.errors import UserError
from statespan.methods.base import ModelFacts


@dataclass(frozen=True, slots=True)
class Artifact:
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str]
    """The file's metadata."""

    digest: str
    """sha256 of the file."""


def cache_folder(facts: ModelFacts) -> Path:
    root = os.environ.get("STATESPAN_CACHE") or Path.home() / ".cache" / "statespan"
    return Path(root) / "artifacts" / facts.digest[:32]


def places(facts: ModelFacts, name: str) -> list[Path]:
    """Where an artifact of this model may lie, the checkpoint's own folder first."""
    own = [] if facts.folder is None else [facts.folder / "artifacts" / f"{name}.safetensors"]
    return [*own, cache_folder(facts) / f"{name}.safetensors"]


def find(facts: ModelFacts, name: str, way_out: str) -> Path:
    """The file, or a UserError that ends with what makes one."""
    for path in places(facts, name):
        if path.is_file():
            return path
    raise UserError(f"this model has no {name} artifact ({places(facts, name)[0]}); {way_out}")


def place_of(facts: ModelFacts, name: str, way_out: str) -> Path:
    """The file that a path or an artifact's name means."""
    path = Path(name).expanduser()
    return path if path.suffix == ".safetensors" else find(facts, name, way_out)


def writable_place(facts: ModelFacts, name: str) -> Path:
    """Beside the checkpoint where its folder can be written, else in the user's cache."""
    if facts.folder is not None and os.access(facts.folder, os.W_OK):
        return places(facts, name)[0]
    return cache_folder(facts) / f"{name}.safetensors"


def read(path: Path, facts: ModelFacts, made_by: str) -> Artifact:
    """Load a file and see that it was made for these weights. `made_by` is what the user runs to make it anew."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); {made_by} makes it anew") from error
    if meta.get("model") != facts.digest:
        raise UserError(
            f"{path} was made for the weights {meta.get('model', 'unknown')[:12]}, this model's are "
            f"{facts.digest[:12]}; {made_by} makes one for it"
        )
    return Artifact(tensors, meta, digest)


def write(path: Path, tensors: Mapping[str, Tensor], facts: ModelFacts, meta: Mapping[str, str]) -> None:
    """Write a whole file or none, marked with the weights it is for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, temporary, metadata={**meta, "model": facts.digest})
    os.replace(temporary, path)


def read_pickled(path: Path) -> object:
    """A torch file of tensors and containers; anything else in it is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read as a table: {str(error).splitlines()[0]}") from error
