"""Whole models on a GPU, random weights in bfloat16: prefill and decoding, beside mamba_ssm's.

    python -m perf.gpu_model [mamba-130m mamba-2.8b mamba2-2.7b] [--lengths 32768] [--batches 1 64] [--methods]
                             [--narrow-states] [--profile] [--no-warm] [--peer FOLDER]

Decoding is what serving does: one replay of a captured step a token, greedy choice and the transfer to the host with
it, over whole windows of a Mamba-2 state. Peak memory is what the prefill adds to the weights. `--methods` prefills
32,768 tokens under each method; `--profile` prints where a prefill's and eight steps' time goes, by kernel. Kernels are
first compiled by one process a model and batch. With `--peer` mamba_ssm's model gets the same weights and runs in the
same process (perf/gpu_peer.py). The last lines are the table; all of it goes to $OUT/gpu_model.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from perf.gpu_peer import PeerModel, beside, use
from statespan.models.checkpoint import cast
from statespan.models.config import ModelConfig
from statespan.models.hook import VANILLA, Method
from statespan.models.lm import MambaLM
from statespan.models.runner import Runner, Tokens
from statespan.models.step_graph import GraphPool, Steps, steps

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
"""Tokens a second of mamba_ssm 2.3.2's MambaLMHeadModel on an H100 80GB, bf16, decoding with its CUDA graph, as
recorded before: for where it does not run."""

METHOD_LENGTH = 32_768


def build(name: str, device: str = "cuda", layers: int | None = None) -> Runner:
    """Random weights of about the released models' scale; norms, decays and step biases as they are initialised."""
    raw = CONFIGS[name] | ({} if layers is None else {"n_layer": layers})
    with torch.device(device):
        model = MambaLM(ModelConfig.read(raw))
    for weight_name, weight in model.named_parameters():
        if weight.ndim == 2 and "A_log" not in weight_name:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if weight_name.endswith(("dt_bias", "dt_proj.bias")):  # steps about 0.001 to 0.1, as released models begin
            torch.nn.init.uniform_(weight, -7.0, -2.3)
    return Runner(cast(model, torch.bfloat16).eval().requires_grad_(False))


def prompt(length: int, batch: int = 1, device: str = "cuda") -> Tokens:
    return Tokens(torch.randint(50_000, (batch, length), device=device), (length,) * batch)


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Median of a few rounds, after one that compiles and tunes."""
    work()
    spent = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        spent.append(float(begin.elapsed_time(end)) / 1e3)
    return sorted(spent)[rounds // 2]


@torch.inference_mode()
def prefill(runner: Runner, length: int, method: Method = VANILLA) -> dict[str, float]:
    tokens = prompt(length)
    torch.cuda.empty_cache()
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    spent = seconds(lambda: method.prefill(runner, tokens), 1 if length > METHOD_LENGTH else 3)
    return {"tokens_a_second": length / spent, "peak_bytes": torch.cuda.max_memory_allocated() - resting}


@torch.inference_mode()
def decode(runner: Runner, batch: int, state_dtype: torch.dtype | None = None, count: int = 64) -> dict[str, float]:
    """Wall clock over some windows of tokens; `replay_a_second` leaves out the host's part."""
    runner.graphs = GraphPool(runner.step, state_dtype=state_dtype, model=runner.model)
    rows = decoding(runner, batch)
    best = rows.step([1] * batch).best
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        assert best is not None
        best = rows.step([token for token, _ in best]).best
    spent = (time.perf_counter() - started) / count
    assert all(abs(logprob) < 1e4 for _, logprob in best or ())  # no NaN
    replay = seconds(lambda: [rows._graph.replay() for _ in range(32)], 3) / 32  # type: ignore[attr-defined]
    rows.close()
    return {"tokens_a_second": batch / spent, "replay_a_second": batch / replay}


def decoding(runner: Runner, batch: int) -> Steps:
    return steps(runner, runner.prefill(prompt(64, batch)).cache)


def methods(runner: Runner) -> dict[str, tuple[Method, float]]:
    """Each method at 32,768 tokens with what its arithmetic promises, as a share of vanilla's time."""
    from statespan.methods.adapter import Adapter, Selection
    from statespan.methods.base import ModelFacts
    from statespan.methods.calibration import Calibration
    from statespan.methods.step_statistics import StepStatistics
    from statespan.methods.table import build_method

    config, trained = runner.model.config, 2048
    facts = ModelFacts(kind=config.kind, n_layer=config.n_layer, channels=config.channels, d_model=config.d_model,
                       train_length=trained)  # fmt: skip
    channels = (config.n_layer, config.channels)
    made_up = torch.full((*channels, 1), 0.02)  # thresholds in the midst of the steps
    found = StepStatistics(torch.ones(channels), -torch.rand(channels), made_up, made_up)
    recorded = Calibration(trained, (METHOD_LENGTH,), {(0.05, "max"): found})
    window, ratio, from_layer = 0.5, 0.02, config.n_layer // 2
    kept = METHOD_LENGTH // 4
    dropping = {"layers": [from_layer], "base_tokens": kept}
    shared = {"window": window, "start": 0.0, "ratio": ratio}
    adapter = Adapter(Selection.like(runner.model), {})
    return {
        "longmamba": (build_method("longmamba", {"share": 0.5}, facts, {"calibration": recorded}), 1.05),
        # half of the layers read a quarter; the one that chooses is projected twice
        "decimamba": (build_method("decimamba", dropping, facts), 0.5 + 0.5 / 4 + 1.5 / config.n_layer),
        "remamba": (build_method("remamba", shared, facts, {"adapter": adapter}), (2 - window * (1 - ratio)) * 1.05),
    }


def method_cost(runner: Runner, method: Method, promised: float, plain: float) -> dict[str, float]:
    found = prefill(runner, METHOD_LENGTH, method)
    return found | {"share": plain / found["tokens_a_second"], "promised": promised}


def kernels_of(work: Callable[[], Any], title: str, most: int = 16) -> list[str]:
    """Device time by kernel, the largest first."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    lines = [f"{title}: {total / 1e3:.2f} ms of kernels"]
    for row in rows[:most]:
        share = row.self_device_time_total / total
        lines.append(
            f"  {share:6.1%} {row.count:>6} x {row.self_device_time_total / row.count:9.1f} us  {row.key[:90]}"
        )
    return lines


def repeat(replay: Callable[[], None], count: int = 8) -> None:
    for _ in range(count):
        replay()


@torch.inference_mode()
def profiled(runner: Runner, name: str, length: int, batches: list[int]) -> None:
    tokens = prompt(length)
    lines = kernels_of(lambda: runner.prefill(tokens), f"{name} prefill {length}")
    for batch in batches:
        rows = decoding(runner, batch)
        lines += kernels_of(partial(repeat, rows._graph.replay), f"{name} eight steps of {batch}")  # type: ignore[attr-defined]
        rows.close()
    print("\n".join(lines), flush=True)


def line(row: dict[str, Any]) -> str:
    recorded = MAMBA_SSM.get((row["model"], row["what"].rstrip("*"), row["size"]))
    if "share" in row:
        more = f"  {row['share']:.3f} of vanilla's time, promised {row['promised']:.3f}"
    else:
        more = beside(row["tokens_a_second"], row.get("peer_tokens_a_second"), recorded)
    if "replay_a_second" in row:
        more += f"  (the graph alone {row['replay_a_second']:,.0f})"
    memory = f"  peak {row['peak_bytes'] / 2**30:.2f} GiB over the weights" if "peak_bytes" in row else ""
    return f"{row['model']:<12} {row['what']:<9} {row['size']:>7} {row['tokens_a_second']:>12,.0f} tok/s{more}{memory}"


def warm(name: str, batches: list[int]) -> None:
    """Compile what two layers of a model need."""
    runner = build(name, layers=2)
    runner.chunk = 4096
    with torch.inference_mode():
        runner.prefill(prompt(4096 + 512))
        for batch in batches:
            decoding(runner, batch).close()


def warm_all(names: list[str], batches: list[int]) -> None:
    """One process a model and batch. What they find fastest beside each other is thrown away."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[subprocess.Popen[bytes]] = []
        for name in names:
            for batch in batches:
                command = [sys.executable, "-m", "perf.gpu_model", name, "--warm", "--batches", str(batch)]
                jobs.append(subprocess.Popen(command, env=os.environ | {"STATESPAN_CACHE": f"{folder}/{len(jobs)}"}))
        for job in jobs:
            job.wait()
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)


def measure(name: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    runner = build(name)
    rows: list[dict[str, Any]] = []
    jobs: list[tuple[str, int, Callable[[], dict[str, Any]]]] = []
    jobs += [("prefill", size, partial(prefill, runner, size)) for size in asked.lengths]
    jobs += [("decode", size, partial(decode, runner, size)) for size in asked.batches]
    if asked.narrow_states:
        jobs.append(("decode*", max(asked.batches), partial(decode, runner, max(asked.batches), torch.bfloat16)))
    if asked.methods:
        with torch.inference_mode():
            plain, built = prefill(runner, METHOD_LENGTH)["tokens_a_second"], methods(runner)
        for what, (method, promised) in built.items():
            jobs.append((what, METHOD_LENGTH, partial(method_cost, runner, method, promised, plain)))
    for what, size, job in jobs:
        try:
            rows.append({"model": name, "what": what, "size": size, **job()})
        except Exception as error:  # one that fails must not cost the others
            print(f"{name} {what} {size}: {type(error).__name__} {str(error)[:300]}", flush=True)
            continue
        print(line(rows[-1]), flush=True)
    if asked.profile:
        profiled(runner, name, asked.lengths[0], asked.batches)
    if asked.peer:
        peers(runner, name, rows)
    return rows


@torch.inference_mode()
def peers(runner: Runner, name: str, rows: list[dict[str, Any]]) -> None:
    """Adds mamba_ssm's figure to each row that it has one for."""
    peer, ids = PeerModel(runner.model, CONFIGS[name]), prompt(1024).ids
    ours, theirs = (
        runner.model.logits(runner.prefill(Tokens(ids, (1024,))).hidden[:, -1]).float(),
        peer.logits(ids).float(),
    )
    off = float((ours - theirs).norm() / theirs.norm())
    print(f"{name}: logits of 1,024 tokens are {off:.1e} from mamba_ssm's", flush=True)
    assert off < 5e-2, f"{name} and mamba_ssm compute something else: off by {off:.1e}"  # both in bfloat16
    for row in rows:
        size = row["size"]
        try:
            if row["what"] == "prefill":
                spent = peer.prefill(prompt(size).ids, seconds, 1 if size > METHOD_LENGTH else 3)
                row["peer_tokens_a_second"] = size / spent
            elif row["what"].startswith("decode"):
                row["peer_tokens_a_second"] = size / peer.decode(size)
            else:
                continue
        except Exception as error:  # the figures there are must not be lost
            print(f"mamba_ssm {name} {row['what']} {size}: {type(error).__name__} {str(error)[:300]}", flush=True)
            continue
        print(line(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(CONFIGS), metavar="model", help=", ".join(CONFIGS))
    parser.add_argument("--lengths", nargs="*", type=int, default=[8192, 32_768, 131_072])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64])
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--narrow-states", action="store_true", help="decode with bfloat16 states, too: decode*")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peer", metavar="FOLDER", help="of mamba_ssm and causal_conv1d, to run beside ours")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-warm", action="store_true", help="compile as kernels are met")
    asked = parser.parse_args()
    if asked.warm:
        warm(asked.models[0], asked.batches)
        return
    use(asked.peer)
    if not asked.no_warm:
        warm_all(asked.models, asked.batches)
    rows: list[dict[str, Any]] = []
    for name in asked.models:
        rows += measure(name, asked)
        torch.cuda.empty_cache()
        if "OUT" in os.environ:
            (Path(os.environ["OUT"]) / "gpu_model.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    main()
