"""Whole models on a GPU, random weights in bfloat16: prefill and decoding, beside what mamba_ssm was measured at.

    python -m perf.gpu_model [mamba-130m mamba-2.8b mamba2-2.7b] [--lengths 32768] [--batches 1 64]

Decoding replays one captured CUDA graph of a step. Peak memory is what the prefill adds to the weights. The last lines
are the table; all of it goes to $OUT/gpu_model.json.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from perf.bench import milliseconds
from statespan.models.checkpoint import cast
from statespan.models.config import ModelConfig
from statespan.models.lm import MambaLM
from statespan.models.runner import Runner, Tokens

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba-130m": {"d_model": 768, "n_layer": 24, "vocab_size": 50_277},
    "mamba-2.8b": {"d_model": 2560, "n_layer": 64, "vocab_size": 50_277},
    "mamba2-2.7b": {"d_model": 2560, "n_layer": 64, "vocab_size": 50_288, "ssm_cfg": {"layer": "Mamba2"}},
}
MAMBA_SSM = {
    ("mamba-130m", "prefill", 8192): 303e3, ("mamba-130m", "prefill", 32_768): 765e3,
    ("mamba-130m", "prefill", 131_072): 813e3, ("mamba-130m", "decode", 1): 1343, ("mamba-130m", "decode", 64): 68_955,
    ("mamba-2.8b", "prefill", 8192): 63.3e3, ("mamba-2.8b", "prefill", 32_768): 64.4e3,
    ("mamba-2.8b", "prefill", 131_072): 64.0e3, ("mamba-2.8b", "decode", 1): 265, ("mamba-2.8b", "decode", 64): 12_509,
    ("mamba2-2.7b", "prefill", 8192): 77.8e3, ("mamba2-2.7b", "prefill", 32_768): 78.5e3,
    ("mamba2-2.7b", "prefill", 131_072): 77.2e3, ("mamba2-2.7b", "decode", 1): 272, ("mamba2-2.7b", "decode", 64): 6469,
}  # fmt: skip
"""Tokens a second of mamba_ssm 2.3.2's MambaLMHeadModel on an H100 80GB, bf16, decoding with its CUDA graph."""


def build(name: str, device: str = "cuda") -> Runner:
    """Random weights of about the released models' scale; norms, decays and step biases as they are initialised."""
    with torch.device(device):
        model = MambaLM(ModelConfig.read(CONFIGS[name]))
    for weight_name, weight in model.named_parameters():
        if weight.ndim == 2 and "A_log" not in weight_name:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return Runner(cast(model, torch.bfloat16).eval().requires_grad_(False))


def prompt(length: int, batch: int = 1, device: str = "cuda") -> Tokens:
    return Tokens(torch.randint(50_000, (batch, length), device=device), (length,) * batch)


@torch.inference_mode()
def prefill(runner: Runner, length: int) -> dict[str, float]:
    tokens = prompt(length)
    runner.prefill(prompt(4096))  # compiles, and tunes where nothing was tuned yet
    runner.prefill(tokens)
    torch.cuda.synchronize()
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    runner.prefill(tokens)
    end.record()
    torch.cuda.synchronize()
    spent = float(begin.elapsed_time(end)) / 1e3
    return {"tokens_a_second": length / spent, "peak_bytes": torch.cuda.max_memory_allocated() - resting}


@torch.inference_mode()
def decode(runner: Runner, batch: int) -> dict[str, float]:
    """One step of `batch` rows, captured and replayed."""
    cache = runner.prefill(prompt(64, batch)).cache
    ids = torch.zeros(batch, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            runner.step(cache, ids)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = runner.step(cache, ids)
    spent = milliseconds(graph.replay)
    assert torch.isfinite(logits).all()
    return {"tokens_a_second": batch / spent * 1e3}


def line(row: dict[str, Any]) -> str:
    peer = MAMBA_SSM.get((row["model"], row["what"], row["size"]))
    beside = f"  {row['tokens_a_second'] / peer:.2f}x mamba_ssm" if peer else ""
    memory = f"  peak {row['peak_bytes'] / 2**30:.2f} GiB over the weights" if "peak_bytes" in row else ""
    return (
        f"{row['model']:<12} {row['what']:<8} {row['size']:>7} {row['tokens_a_second']:>12,.0f} tok/s{beside}{memory}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(CONFIGS), metavar="model", help=", ".join(CONFIGS))
    parser.add_argument("--lengths", nargs="*", type=int, default=[8192, 32_768, 131_072])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64])
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in asked.models:
        runner = build(name)
        jobs = [("prefill", prefill, n) for n in asked.lengths] + [("decode", decode, n) for n in asked.batches]
        for what, measure, size in jobs:
            try:
                rows.append({"model": name, "what": what, "size": size, **measure(runner, size)})
            except Exception as error:  # one that fails must not cost the others
                print(f"{name} {what} {size}: {type(error).__name__} {str(error)[:300]}", flush=True)
                continue
            print(line(rows[-1]), flush=True)
        del runner
        torch.cuda.empty_cache()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for row in rows:
        print(line(row))
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "gpu_model.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
