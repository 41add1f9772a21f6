"""Hybrids of Mamba-2 and attention, read from transformers' config.json: Bamba and Zamba2 (transformers@v5.23.0).

Bamba: every layer is Mamba-2 or attention, with a gated MLP behind it. Zamba2: every layer is Mamba-2; before some of
them a transformer block, one of a few that take turns, reads the stream beside the embeddings, and what it says enters
that Mamba layer's input but not the stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from statespan.errors import UserError
from statespan.models.config import AttentionConfig, ModelConfig, step_limit


def read_hybrid(raw: Mapping[str, Any]) -> ModelConfig:
    """From the parsed config.json. Raises UserError for settings we cannot run."""
    return _bamba(raw) if raw["model_type"] == "bamba" else _zamba2(raw)


def _bamba(raw: Mapping[str, Any]) -> ModelConfig:
    d_model, heads = raw["hidden_size"], raw["num_attention_heads"]
    attends = set(raw.get("attn_layer_indices") or ())
    head_dim = raw.get("head_dim") or d_model // heads
    theta, partial = _rotary(raw)
    attention = AttentionConfig(
        layout=tuple("attention" if i in attends else "mamba" for i in range(raw["num_hidden_layers"])),
        d_model=d_model,
        width=d_model,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope_theta=theta,
        rotary_dim=int(head_dim * (0.5 if partial is None else partial)),
        d_mlp=raw["intermediate_size"],
        activation=_activation(raw),
        bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
    )
    return ModelConfig(
        **_hybrid_mamba2(raw, attention, heads=raw["mamba_n_heads"], d_state=256),
        n_groups=raw.get("mamba_n_groups", 1),
        dt_limit=step_limit(raw.get("time_step_limit") or (0.0, math.inf)),
        bias=raw.get("mamba_proj_bias", False),
        conv_bias=raw.get("mamba_conv_bias", True),
        tie_embeddings=raw.get("tie_word_embeddings", False),
    )


def _zamba2(raw: Mapping[str, Any]) -> ModelConfig:
    d_model, heads = raw["hidden_size"], raw["num_attention_heads"]
    head_dim = 2 * d_model // heads
    theta, _ = _rotary(raw)
    kinds = raw.get("layers_block_type") or raw.get("layer_types")
    if not kinds:
        raise UserError("config.json of this zamba2 model lacks layers_block_type, the list of its layers' kinds")
    attention = AttentionConfig(
        layout=tuple("shared" if kind == "hybrid" else "mamba" for kind in kinds),
        d_model=d_model,
        width=2 * d_model,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        scale=(head_dim / 2) ** -0.5,
        rope_theta=theta if raw.get("use_mem_rope", False) else None,
        rotary_dim=head_dim,
        d_mlp=raw.get("intermediate_size") or 4 * d_model,
        activation=_activation(raw),
        mlp_bias=raw.get("add_bias_linear", False),
        shared_blocks=raw.get("num_mem_blocks", 1),
        adapter_rank=raw.get("adapter_rank", 128),
        adapts_attention=raw.get("use_shared_attention_adapter", False),
    )
    return ModelConfig(
        **_hybrid_mamba2(raw, attention, heads=raw.get("n_mamba_heads", 8), d_state=64),
        n_groups=raw.get("mamba_ngroups", 1),
        gated_norm_eps=1e-5,
        # transformers clamps in its prefill only; here decode continues what prefill computes
        dt_limit=step_limit((raw.get("time_step_min", 0.001), math.inf)),
        bias=raw.get("add_bias_linear", False),
        tie_embeddings=raw.get("tie_word_embeddings", True),
    )


def _hybrid_mamba2(raw: Mapping[str, Any], attention: AttentionConfig, heads: int, d_state: int) -> dict[str, Any]:
    """What the Mamba-2 layers of both hybrids have in common."""
    d_inner = int(raw.get("mamba_expand", 2) * raw["hidden_size"])
    layers = sum(kind != "attention" for kind in attention.layout)
    if layers == 0:
        raise UserError("config.json describes a model without Mamba layers")
    return {
        "kind": "mamba2",
        "d_model": raw["hidden_size"],
        "n_layer": layers,
        "vocab_size": raw["vocab_size"],
        "d_inner": d_inner,
        "d_state": raw.get("mamba_d_state", d_state),
        "d_conv": raw.get("mamba_d_conv", 4),
        "head_dim": d_inner // heads,
        "d_ssm": d_inner,
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "residual_in_fp32": False,
        "attention": attention,
    }


def _rotary(raw: Mapping[str, Any]) -> tuple[float, float | None]:
    """Base of the rotary positions and the share of a head they turn, where the config says."""
    given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json asks for rotary positions of type {kind!r}; statespan computes default ones")
    theta = given.get("rope_theta", raw.get("rope_theta", 10_000.0))
    return float(theta), given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))


def _activation(raw: Mapping[str, Any]) -> Literal["silu", "gelu"]:
    name = raw.get("hidden_act", "gelu" if raw["model_type"] == "zamba2" else "silu")
    if name not in ("silu", "gelu"):
        raise UserError(f"config.json asks for the activation {name!r}; statespan has silu and gelu in hybrids")
    return "gelu" if name == "gelu" else "silu"
