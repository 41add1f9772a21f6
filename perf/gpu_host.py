"""What a prefill costs the host, beside what its kernels cost the GPU: where the first is more, Python is what waits.

    python -m perf.gpu_host [mamba-130m mamba2-130m mamba1-5m mamba2-5m] [--lengths 8192] [--methods] [--operators]
                            [--profile]

Host time runs until `prefill` has returned, with everything launched and nothing waited for; if a method has to wait
for the GPU on its way, that is in it. The whole is wall clock with the GPU's end; the kernels' own time and their
number are the profiler's. All a layer of the model, random weights in bfloat16, medians of half a second of calls; of
the host the least, too, for whatever else runs on its cores is in the median. `--methods` prefills the longest of the
lengths under each method, before and after decode steps were captured; `--operators` times single operators;
`--profile` prints where the host's time goes, by function, at the longest length and under each method asked for. The
table comes last; it goes to $OUT/gpu_host.json, too.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from perf.gpu_model import CONFIGS, build, decoding, methods, prompt
from statespan.kernels.causal_conv import causal_conv
from statespan.kernels.rms_norm import rms_norm
from statespan.kernels.selective_scan import selective_scan
from statespan.kernels.ssd import ssd
from statespan.models.hook import VANILLA, Method
from statespan.models.runner import Runner

SHIPPED = {"d_model": 256, "n_layer": 8, "vocab_size": 50_288}  # the shipped models' shape, with a vocabulary of theirs
CONFIGS |= {
    "mamba2-130m": {"d_model": 768, "n_layer": 24, "vocab_size": 50_288, "ssm_cfg": {"layer": "Mamba2"}},
    "mamba1-5m": SHIPPED,
    "mamba2-5m": SHIPPED | {"ssm_cfg": {"layer": "Mamba2", "d_state": 64, "headdim": 32}},
}
NAMES = ["mamba-130m", "mamba2-130m", "mamba1-5m", "mamba2-5m"]
Row = dict[str, Any]


def timed(work: Callable[[], Any], rounds: int = 9, least_seconds: float = 0.5) -> tuple[float, float, float]:
    """Seconds until the host is done, median and least, and until the GPU is, too, median."""
    for _ in range(2):
        work()
    host: list[float] = []
    whole: list[float] = []
    while len(host) < rounds or sum(whole) < least_seconds:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - begin)
    return statistics.median(host), min(host), statistics.median(whole)


def on_gpu(work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of kernels, and how many."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    rows = [row for row in found.key_averages() if row.self_device_time_total > 0]
    return sum(row.self_device_time_total for row in rows) / 1e6, sum(row.count for row in rows)


def cost(name: str, what: str, size: int, parts: int, work: Callable[[], Any]) -> Row:
    """Microseconds a part, printed as they come."""
    host, least, whole = timed(work)
    kernels, count = on_gpu(work)
    row: Row = {"model": name, "what": what, "size": size, "parts": parts, "whole_ms": whole * 1e3,
                "launches": count / parts}  # fmt: skip
    per_part = {"host_us": host, "least_host_us": least, "kernels_us": kernels}
    row |= {key: seconds / parts * 1e6 for key, seconds in per_part.items()}
    print(line(row), flush=True)
    return row


def line(row: Row) -> str:
    bound = "the host's" if row["host_us"] > row["kernels_us"] else ""
    return (
        f"{row['model']:<12} {row['what']:<26} {row['size']:>7}  host {row['host_us']:7.0f} us, least "
        f"{row['least_host_us']:5.0f}  kernels {row['kernels_us']:7.0f} us in {row['launches']:5.1f}  "
        f"whole {row['whole_ms']:8.3f} ms  {bound}"
    )


def under(runner: Runner, method: Method, length: int) -> Callable[[], Any]:
    tokens = prompt(length)
    return lambda: method.prefill(runner, tokens)


def of_model(name: str, asked: argparse.Namespace) -> list[Row]:
    runner = build(name)
    n_layer, longest = runner.n_layer, max(asked.lengths)
    rows = [cost(name, "prefill", size, n_layer, under(runner, VANILLA, size)) for size in asked.lengths]
    asked_for: dict[str, Method] = {"vanilla": VANILLA}
    if asked.methods:
        asked_for |= {what: method for what, (method, _) in methods(runner).items()}
        for when in ("", ", steps captured"):
            for what, method in asked_for.items():
                rows.append(cost(name, what + when, longest, n_layer, under(runner, method, longest)))
            decoding(runner, 1)  # is kept by the runner
    if asked.profile:
        for what, method in asked_for.items():
            by_function(f"{name} {what}", under(runner, method, longest), n_layer)
    return rows


def by_function(name: str, work: Callable[[], Any], n_layer: int, rounds: int = 5, most: int = 40) -> None:
    """Where the host's time goes; the profiler's own cost is in it, so read shares."""
    found = cProfile.Profile()
    for _ in range(rounds):
        torch.cuda.synchronize()
        found.runcall(work)
    print(f"{name}: {rounds} prefills of {n_layer} layers, seconds")
    pstats.Stats(found).sort_stats("tottime").print_stats(most)


def operators() -> list[Row]:
    """Single calls at the shapes of mamba-130m and mamba2-2.7b, 8,192 tokens."""
    length, width = 8192, 1536
    new = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    x, z, dt, B = new(1, length, width), new(1, length, width), new(1, length, width), new(1, length, 16)
    A, D, taps = -torch.rand(width, 16, device="cuda"), new(width), new(width, 4)
    heads, wide = new(1, length, 80, 64), new(1, length, 1, 128)
    steps, rates, skip = new(1, length, 80), -torch.rand(80, device="cuda"), new(80)
    works: dict[str, Callable[[], Any]] = {
        "selective_scan 1536": lambda: selective_scan(x, dt, A, B, B, D=D, z=z, dt_bias=D),
        "ssd 80 x 64 x 128": lambda: ssd(heads, steps, rates, wide, wide, D=skip, dt_bias=skip),
        "ssd, gated": lambda: ssd(heads, steps, rates, wide, wide, D=skip, z=heads, dt_bias=skip),
        "causal_conv 1536": lambda: causal_conv(x, taps, D),
        "rms_norm 1536": lambda: rms_norm(x, D, 1e-5),
    }
    return [cost("one call", what, length, 1, work) for what, work in works.items()]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=NAMES, metavar="model", help=", ".join(CONFIGS))
    parser.add_argument("--lengths", nargs="*", type=int, default=[8192])
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--operators", action="store_true")
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    rows = operators() if asked.operators else []
    for name in asked.models:
        rows += of_model(name, asked)
        torch.cuda.empty_cache()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for row in rows:
        print(line(row))
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "gpu_host.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
