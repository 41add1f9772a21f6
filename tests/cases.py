"""The recorded numbers of the reference implementations under tests/parity, and how to build a model from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from statespan.models.checkpoint import canonical, cast
from statespan.models.config import ModelConfig
from statespan.models.lm import MambaLM

ROOT = Path(__file__).parent / "parity"


@dataclass(frozen=True)
class Case:
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def case(group: str, name: str) -> Case:
    facts = json.loads((ROOT / group / f"{name}.json").read_text())
    tensors = ROOT / group / f"{name}.safetensors"
    return Case(facts, load_file(tensors) if tensors.is_file() else {})


def names(group: str, pattern: str) -> list[str]:
    """Cases of a group by a pattern of their names, such as masks_?"""
    return sorted(path.stem for path in (ROOT / group).glob(f"{pattern}.json"))


def build_model(case: Case, dtype: torch.dtype = torch.float64) -> MambaLM:
    """The case's model with the case's weights, matrices in `dtype`."""
    model = MambaLM(ModelConfig.read(case.facts["config"]))
    weights = {name[2:]: tensor for name, tensor in case.tensors.items() if name.startswith("w.")}
    model.load_state_dict(canonical(weights, model.config))
    return cast(model, dtype).eval().requires_grad_(False)
