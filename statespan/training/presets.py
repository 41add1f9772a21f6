"""What a training run is made of, the two runs behind the shipped models, and how their weights start."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from statespan.errors import UserError, unknown
from statespan.models.config import Kind, ModelConfig
from statespan.models.lm import MambaLM
from statespan.models.mixer import Mamba1Mixer, Mamba2Mixer, Mixer
from statespan.training.rows import RowSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    name: str
    kind: Kind
    d_model: int = 256
    n_layer: int = 8
    d_state: int = 16
    head_dim: int = 32
    """Mamba-2 only."""

    steps: int = 7_000
    minutes: float | None = None
    """Lay the schedule over this much wall time instead of over `steps`."""

    tokens_per_step: int = 16_384
    stages: tuple[tuple[int, float], ...] = ((64, 0.03), (128, 0.1), (256, 0.2), (512, 0.33), (1024, 1.0))
    """Row lengths, each with the share of the run at which it ends. The last is the training length."""

    learning_rate: float = 2e-3
    final_rate: float = 0.02
    """Share of the learning rate that the cosine ends at."""

    warmup: float = 0.02
    """Share of the run over which the learning rate rises."""

    weight_decay: float = 0.1
    """On matrices; not on A_log, D, norms and biases."""

    clip: float = 1.0
    """Largest norm of the gradient."""

    seed: int = 0
    probes: int = 12
    """How many times the retrieval tasks and the validation novel are measured along the way."""

    probe_samples: int = 64
    """Samples of each task and length then; the last measurement has 200 where the prompt is short."""

    rows: RowSettings = field(default_factory=RowSettings)

    def __post_init__(self) -> None:
        if any(self.tokens_per_step % length for length, _ in self.stages):
            raise UserError(
                f"tokens_per_step must be a multiple of every row length {[length for length, _ in self.stages]}; "
                f"got {self.tokens_per_step}"
            )
        shares = [share for _, share in self.stages]
        if sorted(set(shares)) != shares or shares[-1] != 1.0:
            raise UserError(f"the shares in stages must rise to 1.0; got {shares}")

    @property
    def train_length(self) -> int:
        return self.stages[-1][0]

    def length_at(self, progress: float) -> int:
        """Tokens a row at this share of the run."""
        return next((length for length, until in self.stages if progress < until), self.train_length)

    def rate_at(self, progress: float) -> float:
        """Share of the learning rate: linear warm-up, then a cosine."""
        if progress < self.warmup:
            return progress / self.warmup
        cosine = (1 + math.cos(math.pi * min((progress - self.warmup) / (1 - self.warmup), 1.0))) / 2
        return self.final_rate + (1 - self.final_rate) * cosine

    def model_config(self, vocab_size: int) -> dict[str, Any]:
        """config.json in the state-spaces layout."""
        ssm: dict[str, Any] = {"layer": "Mamba1", "d_state": self.d_state, "d_conv": 4, "expand": 2}
        if self.kind == "mamba2":
            ssm |= {"layer": "Mamba2", "headdim": self.head_dim, "ngroups": 1}
        return {
            "d_model": self.d_model,
            "n_layer": self.n_layer,
            "vocab_size": vocab_size,
            "ssm_cfg": ssm,
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 8,
            "tie_embeddings": True,
            "statespan": {"train_length": self.train_length, "seed": self.seed},
        }


# As the shipped models were trained (their cards say with which source weights); the steps are what fitted into 3.6 and
# 8.2 minutes of one H200. More steps do not help: recall is there after 5,000, and the text is then read too often.
PRESETS = {
    "mamba1-5m": TrainConfig(name="mamba1-5m", kind="mamba1", d_state=16, steps=7_458),
    "mamba2-5m": TrainConfig(
        name="mamba2-5m",
        kind="mamba2",
        d_state=64,
        steps=6_846,
        rows=RowSettings(task_share=0.6, whole_share=0.4, answer_weight=15.0),
    ),
}


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise unknown("training preset", name, PRESETS)
    return PRESETS[name]


def plain(config: TrainConfig) -> dict[str, Any]:
    """For JSON."""
    return asdict(config)


def new_model(config: TrainConfig, vocab_size: int) -> MambaLM:
    """A model with the published initialisation, from the config's seed."""
    torch.manual_seed(config.seed)
    model = MambaLM(ModelConfig.read(config.model_config(vocab_size)))
    init_weights(model)
    return model


@torch.no_grad()
def init_weights(model: MambaLM) -> None:
    """As state-spaces/mamba@e9594ce: embeddings at 0.02, projections as torch makes them, residual outputs divided by
    the square root of the number of layers, first steps log-uniform in [0.001, 0.1]."""
    nn.init.normal_(model.embedding.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, Mixer):
            module.out_proj.weight /= math.sqrt(model.config.n_layer)
        if isinstance(module, Mamba1Mixer):
            bound = model.config.dt_rank**-0.5
            nn.init.uniform_(module.dt_proj.weight, -bound, bound)
            module.dt_proj.bias.copy_(_first_steps(module.dt_proj.bias.shape))
        if isinstance(module, Mamba2Mixer):
            module.dt_bias.copy_(_first_steps(module.dt_bias.shape))
            module.A_log.copy_(torch.empty_like(module.A_log).uniform_(1, 16).log())


def _first_steps(shape: torch.Size) -> torch.Tensor:
    """Biases b with softplus(b) log-uniform in [0.001, 0.1]."""
    steps = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return steps + torch.log(-torch.expm1(-steps))
