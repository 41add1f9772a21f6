"""What ReMamba's training adds to a model: Query, Key, Value, Θ, and changes of the model's own weights.

On disk one safetensors file: `query.0.weight` …, `theta.LAYER`, `lora.NAME.A` and `lora.NAME.B` (with the scale) for a
weight W + B A, `full.NAME` for a weight trained as a whole; NAME as in the model's state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statespan.errors import UserError
from statespan.methods.artifacts import Artifact
from statespan.methods.base import ModelFacts
from statespan.models.lm import MambaLM


def feed_forward(d_model: int, width: int) -> nn.Sequential:
    """U2 SiLU(U1 x + b1) + b2"""
    return nn.Sequential(nn.Linear(d_model, width), nn.SiLU(), nn.Linear(width, d_model))


class Selection(nn.Module):
    """Query, Key and Value, one set a model, and Θ, one vector a layer. Kept in float32 or wider."""

    def __init__(self, d_model: int, n_layer: int, channels: int, width: int | None = None) -> None:
        super().__init__()
        self.query, self.key, self.value = (feed_forward(d_model, width or d_model) for _ in range(3))
        self.theta = nn.ParameterList(nn.Parameter(torch.zeros(channels)) for _ in range(n_layer))

    @classmethod
    def like(cls, model: MambaLM) -> Selection:
        """As the authors begin: slices of layer 0's in_proj (Query, Key) and out_proj (Value), biases and Θ zero."""
        config, d_model = model.config, model.config.d_model
        made = cls(d_model, config.n_layer, config.channels)
        mixer: Any = model.get_submodule("layers.0.mixer")
        rows, columns = mixer.in_proj.weight.detach().float(), mixer.out_proj.weight.detach().float()
        if len(rows) < 4 * d_model or columns.shape[1] < 2 * d_model:
            raise UserError(f"ReMamba begins from slices of in_proj, which needs expand >= 2; d_model is {d_model}")
        slices = {
            "key": rows[: 2 * d_model].chunk(2),
            "query": rows[2 * d_model : 4 * d_model].chunk(2),
            "value": columns[:, : 2 * d_model].chunk(2, dim=1),
        }
        state = made.state_dict()
        for network, (first, second) in slices.items():
            state |= {f"{network}.0.weight": first.clone(), f"{network}.2.weight": second.clone()}
            state |= {f"{network}.{place}.bias": torch.zeros(d_model) for place in (0, 2)}
        made.load_state_dict(state)
        return made.to(model.device)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    selection: Selection | None
    """None for a fair baseline, which changes the model's weights alone."""

    changes: Mapping[str, Tensor]
    """`lora.NAME.A`, `lora.NAME.B`, `full.NAME`."""

    digest: str = ""

    def changed(self, model: MambaLM) -> MambaLM:
        """The model with the changes merged into copies of the weights they touch; the others are shared."""
        weights = dict(model.state_dict())
        for key, tensor in self.changes.items():
            kind, name = key.split(".", 1)
            if kind == "full":
                weights[name] = tensor.to(weights[name])
            elif key.endswith(".A"):
                name = name.removesuffix(".A")
                old = weights[name]
                wide = torch.promote_types(old.dtype, torch.float32)
                delta = self.changes[f"lora.{name}.B"].to(old.device, wide) @ tensor.to(old.device, wide)
                weights[name] = (old.to(wide) + delta).to(old.dtype)
        return with_weights(model, weights)


def with_weights(model: MambaLM, weights: Mapping[str, Tensor]) -> MambaLM:
    """Another model of the same shape that holds these tensors themselves."""
    with torch.device("meta"):
        other = MambaLM(model.config)
    other.load_state_dict(dict(weights), assign=True)
    if model.config.tie_embeddings:
        other.lm_head.weight = other.embedding.weight
    return other.eval().requires_grad_(False)


def to_tensors(selection: Selection | None, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = {} if selection is None else selection.state_dict()
    return {**{name: tensor.detach() for name, tensor in own.items()}, **changes}


def from_artifact(artifact: Artifact, facts: ModelFacts) -> Adapter:
    """Raises UserError where the tensors do not fit the model."""
    own = {name: tensor for name, tensor in artifact.tensors.items() if not name.startswith(("lora.", "full."))}
    changes = {name: tensor for name, tensor in artifact.tensors.items() if name not in own}
    if not own:
        return Adapter(None, changes, artifact.digest)
    return Adapter(build_selection(own, facts), changes, artifact.digest)


def build_selection(tensors: Mapping[str, Tensor], facts: ModelFacts) -> Selection:
    width = tensors["query.0.weight"].shape[0] if "query.0.weight" in tensors else facts.d_model
    selection = Selection(facts.d_model, facts.n_layer, facts.channels, width)
    wide = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}
    try:
        selection.load_state_dict(wide, assign=True)
    except RuntimeError as error:
        raise UserError(f"the adapter does not fit this model: {str(error).splitlines()[1].strip()}") from error
    return selection.eval().requires_grad_(False)
