"""Small random models and a byte tokenizer on disk, for tests that need a checkpoint but no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from statespan.models import checkpoint
from statespan.models.config import ModelConfig
from statespan.models.lm import MambaLM

BYTES = 257

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba1": {"d_model": 16, "n_layer": 3, "vocab_size": BYTES, "ssm_cfg": {"layer": "Mamba1", "d_state": 8}},
    "mamba2": {
        "d_model": 16,
        "n_layer": 3,
        "vocab_size": BYTES,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8},
    },
}


def tiny_model(kind: str = "mamba1", seed: int = 0, dtype: torch.dtype = torch.float64, **ssm: Any) -> MambaLM:
    """Three layers whose step sizes vary from token to token, so that methods have something to choose from.

    `ssm` changes what the mixers are built from, by the names of a config's ssm_cfg.
    """
    torch.manual_seed(seed)
    config = CONFIGS[kind]
    model = MambaLM(ModelConfig.read(config | {"ssm_cfg": config["ssm_cfg"] | ssm}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "D", "norm.weight", "norm_f.weight")):
                continue
            torch.nn.init.normal_(parameter, std=0.3)
    return checkpoint.cast(model, dtype).eval().requires_grad_(False)


def byte_tokenizer() -> Tokenizer:
    """256 bytes and <|endoftext|>, no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def save_checkpoint(folder: Path, kind: str = "mamba1", seed: int = 0, train_length: int = 64) -> Path:
    """A loadable checkpoint folder with a tiny random model."""
    raw = CONFIGS[kind] | {"statespan": {"train_length": train_length}}
    checkpoint.save(tiny_model(kind, seed, torch.float32), raw, folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
