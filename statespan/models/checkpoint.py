"""Checkpoints in and out: shipped names, folders and hub ids; the state-spaces and the transformers layout.

Weights are safetensors, or a `.bin` read with weights_only=True: a checkpoint is never unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from statespan.errors import UserError, unknown
from statespan.models.config import ModelConfig
from statespan.models.hybrid import released_names
from statespan.models.lm import MambaLM
from statespan.models.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent.parent / "checkpoints"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# decay rates, skips and step biases keep float32 whatever the model's dtype: a rounded A compounds over the length
FLOAT32_NAMES = ("A_log", "D", "dt_bias", "dt_proj.bias")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and the facts that name it."""

    model: MambaLM
    tokenizer: Tokenizer
    name: str
    folder: Path
    digest: str
    """sha256 over the weights' files and config.json."""

    train_length: int | None
    """Tokens the checkpoint was trained on, where its config.json says."""

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def shipped() -> list[str]:
    """Names of the checkpoints that come with statespan."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def find(name_or_path: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a path, a shipped name, or a hub id (downloaded unless HF_HUB_OFFLINE is set)."""
    if (path := Path(name_or_path).expanduser()).is_dir():
        return path
    if (SHIPPED / name_or_path / "config.json").is_file():
        return SHIPPED / name_or_path
    if name_or_path.count("/") == 1 and not name_or_path.startswith((".", "/", "~")):
        return _download(name_or_path, revision)
    raise unknown("checkpoint folder, hub id or shipped model", name_or_path, shipped())


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.bin"]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {repo!r} is no folder here and could not be had from the hub ({reason}); "
            "give a folder with config.json, tokenizer.json and model.safetensors"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no config.json in {folder}; give a checkpoint folder")
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return raw


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors first, else .bin. Raises UserError where there are none."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(f"no weights in {folder}; it needs model.safetensors (or pytorch_model.bin)")


def digest(folder: Path) -> str:
    """sha256 over config.json and the weights' bytes: what names a model in every result."""
    total = hashlib.sha256()
    for path in (folder / "config.json", *weight_files(folder)):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def load_model(
    name_or_path: str,
    *,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> Loaded:
    """Load a checkpoint for inference.

    Args:
        name_or_path: a folder, a shipped name (`shipped()`), or a hub id.
        dtype: of the matrices; default float32 on a CPU, bfloat16 on a GPU.
        device: where the model shall live.
        revision: of a hub id.

    Raises:
        UserError: nothing there, unknown layout, corrupt file, or weights that do not fit the config.
    """
    folder = find(name_or_path, revision)
    raw = read_config(folder)
    config = ModelConfig.read(raw)
    name = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    with torch.device("meta"):
        model = MambaLM(config)
    _assign(model, _read(folder), folder)
    cast(model, DTYPES[name]).to(device).eval().requires_grad_(False)
    facts = raw.get("statespan", {})
    return Loaded(
        model, Tokenizer(folder / "tokenizer.json"), folder.name, folder, digest(folder), facts.get("train_length")
    )


def cast(model: MambaLM, dtype: torch.dtype) -> MambaLM:
    """Matrices to `dtype`, decay rates and biases of the step to at least float32."""
    for name, parameter in model.named_parameters():
        wide = name.endswith(FLOAT32_NAMES)
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if wide else dtype)
    return model


def _read(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            weights |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path} cannot be read as weights ({error}); it may be cut short: copy it again"
            ) from error
        except Exception as error:  # pickle.UnpicklingError names the refused class
            raise UserError(f"{path} is refused: {str(error).splitlines()[0]}; convert it to safetensors") from error
    return weights


def canonical_name(name: str) -> str:
    """The weight name of either layout of a model without attention -> ours."""
    name = name.removeprefix("backbone.")
    return name.replace("embeddings.weight", "embedding.weight")


def canonical(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A checkpoint's weights under our names; a tied head is the embedding."""
    if config.attention is None:
        mine = {canonical_name(name): tensor for name, tensor in weights.items()}
    else:
        prefixes = released_names(config)
        mine = {_renamed(name.removeprefix("model."), prefixes): tensor for name, tensor in weights.items()}
    if config.tie_embeddings:
        mine["lm_head.weight"] = mine.get("embedding.weight", torch.empty(0))
    return mine


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """With the longest known prefix replaced."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if (known := prefixes.get(".".join(parts[:cut]))) is not None:
            return ".".join([known, *parts[cut:]])
    return name


def _assign(model: MambaLM, weights: dict[str, Tensor], folder: Path) -> None:
    mine = canonical(weights, model.config)
    want = model.state_dict()
    if missing := sorted(want.keys() - mine.keys()):
        raise UserError(f"{folder}: weights lack {_few(missing)}; config.json describes another model")
    if extra := sorted(mine.keys() - want.keys()):
        raise UserError(f"{folder}: weights hold unknown {_few(extra)}; config.json describes another model")
    for name, tensor in want.items():
        if mine[name].shape != tensor.shape:
            raise UserError(
                f"{folder}: {name} is {tuple(mine[name].shape)}, config.json makes it {tuple(tensor.shape)}"
            )
    model.load_state_dict(mine, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embedding.weight


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save(model: MambaLM, raw_config: dict[str, Any], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors in the state-spaces layout; `dtype` rounds the matrices."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        prefix = "" if name.startswith("lm_head") else "backbone."
        wide = dtype is None or name.endswith(FLOAT32_NAMES)
        tensors[prefix + name] = (tensor if wide else tensor.to(dtype)).contiguous().cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")
