"""The shape of a Mamba language model, read from the config.json of either released layout.

state-spaces layout: `d_model`, `n_layer`, `ssm_cfg` … (state-spaces/mamba, MambaConfig).
transformers layout: `hidden_size`, `num_hidden_layers`, `model_type` …, hybrids with attention among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from statespan.errors import UserError

Kind = Literal["mamba1", "mamba2"]
RUNS = "mamba, falcon_mamba, mamba2, bamba, zamba2"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """What a hybrid has beside its Mamba layers."""

    layout: tuple[Literal["mamba", "attention", "shared"], ...]
    """The released layers in order. attention: a layer of its own instead of Mamba (Bamba). shared: one of a few
    transformer blocks, used again and again, whose output enters the Mamba layer of the same number (Zamba2)."""

    d_model: int
    width: int
    """Of what attention reads; twice d_model where the embeddings are read again beside the stream (Zamba2)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """Of the products of queries and keys."""

    rope_theta: float | None
    """Base of the rotary positions; None where attention knows no positions."""

    rotary_dim: int
    """Features of a head that positions turn."""

    d_mlp: int
    activation: Literal["silu", "gelu"]
    bias: bool = False
    """The projections of attention carry a bias."""

    mlp_bias: bool = False
    shared_blocks: int = 0
    """Transformer blocks that the `shared` layers take turns with."""

    adapter_rank: int = 0
    """Each use of a shared block adds its own low-rank change to the gated MLP …"""

    adapts_attention: bool = False
    """… and, where this is set, to queries, keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    kind: Kind
    d_model: int
    n_layer: int
    vocab_size: int
    """Rows of the embedding, padding rows included."""

    d_inner: int
    """Width of the mixer; expand * d_model."""

    d_state: int
    d_conv: int
    dt_rank: int = 0
    """Mamba-1 only."""

    head_dim: int = 1
    """Mamba-2 only: channels that share one step size."""

    n_groups: int = 1
    d_ssm: int = 0
    """Mamba-2 only: channels that pass through the scan; the other d_inner - d_ssm are a gated MLP branch."""

    D_has_head_dim: bool = False
    gated_norm: bool = True
    """Mamba-2 only: RMS norm of y * silu(z), each group by itself; False gates inside the scan."""

    gated_norm_eps: float | None = None
    """Of that norm, where it is not norm_eps."""

    norm_before_gate: bool = False
    dt_limit: tuple[float, float] | None = None
    """Step sizes are clamped to it after softplus."""

    bias: bool = False
    """in_proj and out_proj carry a bias."""

    conv_bias: bool = True
    rms_norm: bool = True
    norm_eps: float = 1e-5
    mixer_norm_eps: float | None = None
    """Falcon-Mamba: B, C and the step's input pass through an RMS norm without weight, with this epsilon."""

    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    attention: AttentionConfig | None = None
    """Of a hybrid. `n_layer` counts its Mamba layers only: those are what methods act on."""

    @property
    def channels(self) -> int:
        """Units that own one step size: inner features in Mamba-1, heads in Mamba-2."""
        return self.d_inner if self.kind == "mamba1" else self.d_ssm // self.head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the causal conv."""
        return self.d_inner if self.kind == "mamba1" else self.d_ssm + 2 * self.n_groups * self.d_state

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """From the parsed config.json of either layout. Raises UserError for a model type we cannot run."""
        kind = raw.get("model_type")
        if kind in ("mamba", "falcon_mamba", "mamba2"):
            return _from_transformers(raw)
        if kind in ("bamba", "zamba2"):
            from statespan.models.hybrid_config import read_hybrid  # which makes ModelConfigs itself

            return read_hybrid(raw)
        if "d_model" in raw and "n_layer" in raw:
            return _from_state_spaces(raw)
        raise UserError(
            f"config.json describes a {kind!r} model; statespan runs {RUNS} (transformers layout) "
            "and state-spaces configs with d_model and n_layer"
        )


def _from_state_spaces(raw: Mapping[str, Any]) -> ModelConfig:
    ssm = {
        **raw.get("ssm_cfg", {}),
        **{k: raw[k] for k in ("d_state", "d_conv", "expand", "headdim", "ngroups") if k in raw},
    }
    if raw.get("attn_layer_idx") or raw.get("d_intermediate"):
        raise UserError("this state-spaces config has attention or MLP layers, which statespan does not run yet")
    mamba2 = ssm.get("layer", "Mamba2" if "headdim" in ssm else "Mamba1") == "Mamba2"
    d_model, multiple = raw["d_model"], raw.get("pad_vocab_size_multiple", 8)
    d_inner = int(ssm.get("expand", 2) * d_model)
    d_ssm = ssm.get("d_ssm") or d_inner
    limit = ssm.get("dt_limit", (0.0, math.inf))
    dt_rank = ssm.get("dt_rank", "auto")
    return ModelConfig(
        kind="mamba2" if mamba2 else "mamba1",
        d_model=d_model,
        n_layer=raw["n_layer"],
        vocab_size=-(-raw["vocab_size"] // multiple) * multiple,
        d_inner=d_inner,
        d_state=ssm.get("d_state", 128 if mamba2 else 16),
        d_conv=ssm.get("d_conv", 4),
        dt_rank=0 if mamba2 else (math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank),
        head_dim=ssm.get("headdim", 64) if mamba2 else 1,
        n_groups=ssm.get("ngroups", 1),
        d_ssm=d_ssm if mamba2 else 0,
        D_has_head_dim=ssm.get("D_has_hdim", False),
        gated_norm=ssm.get("rmsnorm", True),
        norm_before_gate=ssm.get("norm_before_gate", False),
        dt_limit=step_limit(limit) if mamba2 else None,
        bias=ssm.get("bias", False),
        conv_bias=ssm.get("conv_bias", True),
        rms_norm=raw.get("rms_norm", True),
        norm_eps=raw.get("norm_epsilon", 1e-5),
        residual_in_fp32=raw.get("residual_in_fp32", True),
        tie_embeddings=raw.get("tie_embeddings", True),
    )


def _from_transformers(raw: Mapping[str, Any]) -> ModelConfig:
    mamba2 = raw["model_type"] == "mamba2"
    d_model = raw["hidden_size"]
    d_inner = raw.get("intermediate_size") or int(raw.get("expand", 2) * d_model)
    dt_rank = raw.get("time_step_rank", "auto")
    return ModelConfig(
        kind="mamba2" if mamba2 else "mamba1",
        d_model=d_model,
        n_layer=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        d_inner=d_inner,
        d_state=raw.get("state_size", 128 if mamba2 else 16),
        d_conv=raw.get("conv_kernel", 4),
        dt_rank=0 if mamba2 else (math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank),
        head_dim=raw.get("head_dim", 64) if mamba2 else 1,
        n_groups=raw.get("n_groups", 1) if mamba2 else 1,
        d_ssm=d_inner if mamba2 else 0,
        dt_limit=step_limit(raw.get("time_step_limit", (0.0, math.inf))) if mamba2 else None,
        bias=raw.get("use_bias", False),
        conv_bias=raw.get("use_conv_bias", True),
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        mixer_norm_eps=raw.get("mixer_rms_eps", 1e-6) if raw["model_type"] == "falcon_mamba" else None,
        residual_in_fp32=raw.get("residual_in_fp32", True),
        tie_embeddings=raw.get("tie_word_embeddings", True),
    )


def step_limit(limit: Any) -> tuple[float, float] | None:
    """Bounds of the steps; None where they bound nothing."""
    low, high = (float(bound) for bound in limit)
    return None if low <= 0.0 and math.isinf(high) else (low, high)
