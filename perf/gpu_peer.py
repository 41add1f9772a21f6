"""mamba_ssm in the same process as ours, on the same card, in the same minute.

`--peer FOLDER` of perf.gpu_kernels and perf.gpu_model names a folder that holds what `pip install mamba-ssm
causal-conv1d` would put into site-packages: mamba_ssm, causal_conv1d, einops and the two extensions. mamba_ssm's own
`__init__` imports more than is needed here; an empty one will do. Both publish sources only, and an extension for one
architecture builds in a few minutes: nvcc on their csrc with torch's include paths. Without a folder the tables say
that the peer was not run and give what it was measured at before.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statespan.models.lm import MambaLM

MODULES = ("selective_scan_cuda", "causal_conv1d", "mamba_ssm.models.mixer_seq_simple")
NOT_RUN = "peer not run"


def use(folder: str | None) -> None:
    """Make the peer importable; exits with what is missing rather than measure without it."""
    if folder is None:
        return
    if not Path(folder).is_dir():
        raise SystemExit(f"--peer {folder}: no such folder; leave it out to measure ours alone")
    sys.path.insert(0, folder)
    for module in MODULES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise SystemExit(f"--peer {folder}: {module} cannot be imported ({error})") from error


class PeerModel:
    """MambaLMHeadModel with our model's weights, so that both compute the same."""

    def __init__(self, ours: MambaLM, config: Mapping[str, Any]) -> None:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        rows = ours.embedding.weight.shape[0]
        settings = dict(config) | {"vocab_size": rows, "pad_vocab_size_multiple": 1}
        settings["ssm_cfg"] = dict(config.get("ssm_cfg", {}))  # it is written into
        self.model = MambaLMHeadModel(MambaConfig(**settings), device="cuda", dtype=ours.dtype)
        weights = {
            name if name.startswith("lm_head") else f"backbone.{name}": v for name, v in ours.state_dict().items()
        }
        self.model.load_state_dict(weights)
        self.model.eval().requires_grad_(False)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Of the last position: (batch, length) -> (batch, vocab_size)"""
        out: Tensor = self.model(ids, num_last_tokens=1).logits[:, -1]
        return out

    def prefill(self, ids: Tensor, seconds: Callable[[Callable[[], Any], int], float], rounds: int) -> float:
        """Seconds for the whole prompt."""
        return seconds(lambda: self.logits(ids), rounds)

    @torch.inference_mode()
    def decode(self, batch: int, short: int = 24, long: int = 84) -> float:
        """Wall-clock seconds of one more token of `generate`, with its CUDA graph and greedy choice."""
        ids = torch.randint(50_000, (batch, 64), device="cuda")

        def spent(count: int) -> float:
            torch.cuda.synchronize()
            started = time.perf_counter()
            self.model.generate(input_ids=ids, max_length=64 + count, cg=True, top_k=1)
            torch.cuda.synchronize()
            return time.perf_counter() - started

        spent(long)  # compiles and captures
        differences = sorted(spent(long) - spent(short) for _ in range(3))
        self.model._decoding_cache = None
        return differences[1] / (long - short)


def beside(ours: float, peer: float | None, recorded: float | None) -> str:
    """How many times faster ours is, by tokens a second: in this run, or beside what was recorded"""
    if peer is not None:
        return f"  {ours / peer:.2f}x mamba_ssm in the same run ({peer:,.0f})"
    return f"  {NOT_RUN}" + (f"; {ours / recorded:.2f}x what it was recorded at" if recorded else "")
