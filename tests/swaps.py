"""200 methods swapped through one worker's engine: prints its memory before and after, in bytes. Run as a process of
its own, so that nothing else moves the figure."""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import torch

from statespan.benchmarks.table import build_benchmark
from statespan.models.checkpoint import load_model
from statespan.orchestration.items import Setting
from statespan.orchestration.model_engine import load_engine
from statespan.orchestration.worker import WorkerSpec

STORE = 1 << 20
TASK = {"lengths": [200], "depths": [0.5], "trials": 3}


def setting(number):
    """No two alike; vanilla in between."""
    kinds = (
        Setting(method="decimamba", params={"first_layer": number % 3, "base_tokens": 20 + number}),
        Setting(method="mambaextend", params={"first": 0.3 + number / 1000, "middle": 0.9, "last": 1.0}),
        Setting(method="oprm", params={"chunk_tokens": 32 + number, "question_tokens": 8}),
        Setting(method="vanilla"),
    )
    return kinds[number % len(kinds)]


def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(folder):
    loaded = load_model(folder)
    spec = WorkerSpec(
        model=folder, revision=None, digest=loaded.digest, train_length=None, dtype="float32", device="cpu",
        deterministic=True, batch_tokens=1, tasks={"quiz": ("passkey", TASK)}, store_bytes=STORE,
    )  # fmt: skip
    engine = load_engine(spec)
    samples = list(build_benchmark("passkey", TASK).samples(loaded.tokenizer))
    seen = []
    for number in range(260):
        engine.evaluate(setting(number), "quiz", [samples[number % len(samples)]], False)
        if number in (59, 259):
            seen.append(resident())
    print(json.dumps({"before": seen[0], "after": seen[1], "store": engine.runner.store.bytes}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
