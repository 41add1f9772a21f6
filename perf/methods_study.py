"""What each method does for a shipped model at 1 to 32 times its training length, on passkey and perplexity.

    python -m perf.methods_study run mamba1-5m longmamba --device cuda --out study.jsonl
    python -m perf.methods_study cost mamba1-5m --device cuda --out study.jsonl
    python -m perf.methods_tables study.jsonl

`run` tries the search space's published settings and then random draws on search documents, takes the best for passkey
and the best for perplexity (ties: the first), and scores each on held-out documents at every length. The split, the
spaces, the samples and the scores are those of a study; only Ray is left out, so that it runs on a bare GPU host.
Each appends lines to one JSON-lines file, of which methods_tables.py makes docs/results.md's tables. `cost` times one
prompt's prefill.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import pickle
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from statespan.benchmarks.base import Benchmark, Sample
from statespan.benchmarks.evaluate import evaluate
from statespan.benchmarks.table import build_benchmark
from statespan.methods.base import ModelFacts
from statespan.methods.table import build_method
from statespan.models.checkpoint import Loaded, load_model
from statespan.models.hook import Method
from statespan.models.runner import Runner, Tokens
from statespan.orchestration.samples import split_documents
from statespan.search_spaces.loader import Range, load_space

MULTIPLES = (1, 2, 4, 8, 16, 32)
SEARCHED = (2, 8, 32)
"""Multiples of the training length at which a search looks."""

TRIALS, WINDOWS = 16, 24  # passkey samples a cell, perplexity targets a book; half of the documents are held out
SEARCH_SAMPLES = 8  # of each length and benchmark
TOKENS_AT_ONCE = {"cuda": 262_144, "cpu": 8_192}
BASELINES = {"baseline, same time": "remamba-baseline", "baseline, same steps": "remamba-baseline-steps"}
Split = dict[str, list[Sample]]


def samples_of(benchmark: Benchmark, loaded: Loaded) -> Split:
    samples = list(benchmark.samples(loaded.tokenizer))
    rows: list[dict[str, Any]] = [
        {
            "task": benchmark.name,
            "document": s.document,
            "length": s.length,
            "depth": s.depth,
            "meta": "{}",
            "sample": s,
        }
        for s in samples
    ]
    split_documents(rows, 0.5, 0, {}, ("length", "depth"))
    return {side: [row["sample"] for row in rows if row["split"] == side] for side in ("search", "heldout")}


def benchmarks_of(train_length: int) -> dict[str, Benchmark]:
    lengths = [train_length * multiple for multiple in MULTIPLES]
    return {
        "passkey": build_benchmark("passkey", {"lengths": lengths, "trials": TRIALS}),
        "perplexity": build_benchmark("perplexity", {"lengths": lengths, "windows": WINDOWS}),
    }


class Study:
    def __init__(self, model: str, device: str, kept: Path | None, adapters: Path | None = None) -> None:
        self.loaded = load_model(model, dtype="float32", device=device)
        self.facts, self.device, self.adapters = ModelFacts.of(self.loaded), device, adapters
        assert self.facts.train_length is not None
        self.train_length = self.facts.train_length
        self.runner = Runner(self.loaded.model)
        self.benchmarks = benchmarks_of(self.train_length)
        self.samples = self._samples(kept)

    def _samples(self, kept: Path | None) -> dict[str, Split]:
        """Fitting prompts to their lengths takes a minute; `kept` is a file that holds them for the next process."""
        if kept is not None and kept.is_file():
            with gzip.open(kept, "rb") as file:
                found: dict[str, Split] = pickle.load(file)
            return found
        made = {name: samples_of(one, self.loaded) for name, one in self.benchmarks.items()}
        if kept is not None:
            with gzip.open(kept, "wb") as file:
                pickle.dump(made, file)
        return made

    def method(self, name: str, params: dict[str, Any]) -> Method:
        """A method; ReMamba's adapter from the folder given, where one is."""
        if name == "remamba" and self.adapters is not None:
            params = params | {"adapter": str(self.adapters / f"{params.get('adapter', 'remamba')}.safetensors")}
        return build_method(name, params, self.facts)

    def score(self, name: str, params: dict[str, Any], task: str, samples: list[Sample]) -> list[float]:
        """A score a sample, in order. Samples of one length run together where there is room."""
        method = self.method(name, params)
        scores: dict[str, float] = {}
        by_length: dict[int, list[Sample]] = {}
        for sample in samples:
            by_length.setdefault(sample.length, []).append(sample)
        with torch.inference_mode():
            for length, group in by_length.items():
                at_once = max(TOKENS_AT_ONCE[self.device] // length, 1) if task == "passkey" else 1
                found = evaluate(self.runner, method, self.benchmarks[task], group, self.loaded.tokenizer, at_once)
                scores |= {one.sample_id: one.score for one in found}
        return [scores[sample.id] for sample in samples]

    def search_samples(self, task: str) -> list[Sample]:
        chosen = []
        for multiple in SEARCHED:
            group = [s for s in self.samples[task]["search"] if s.length == multiple * self.train_length]
            step = max(len(group) // SEARCH_SAMPLES, 1)
            chosen += group[::step][:SEARCH_SAMPLES]
        return chosen

    def points(self, name: str, draws: int) -> list[dict[str, Any]]:
        """The published settings, then random draws that keep the space's constraints."""
        config = self.loaded.config
        facts = {"n_layer": config.n_layer, "d_model": config.d_model, "d_inner": config.d_inner,
                 "d_state": config.d_state, "n_heads": config.channels, "train_length": self.train_length,
                 "longest": max(MULTIPLES) * self.train_length}  # fmt: skip
        space, source = load_space(name, facts), random.Random(0)
        fixed = {key: value for key, value in space.params.items() if not isinstance(value, Range)}
        points = [{**fixed, **point} for point in space.published]
        while len(points) < draws:
            point = space.draw(lambda _, one: drawn(source, one))
            if not space.broken(point):
                points.append(point)
        return points[:draws]

    def search(self, name: str, draws: int, seconds: float) -> tuple[dict[str, dict[str, Any]], int]:
        """The best setting for each task, and how many were tried before the time was over."""
        best: dict[str, tuple[float, dict[str, Any]]] = {}
        started, tried = time.monotonic(), 0
        for params in self.points(name, draws):
            if time.monotonic() - started > seconds:
                break
            for task in self.benchmarks:
                mean = statistics.fmean(self.score(name, params, task, self.search_samples(task)))
                if task not in best or mean > best[task][0]:
                    best[task] = mean, params
            tried += 1
        return {task: params for task, (_, params) in best.items()}, tried


def drawn(source: random.Random, one: Range) -> Any:
    if one.type == "choice":
        return source.choice(one.choices)
    low, high = (math.log(one.low), math.log(one.high)) if one.log else (one.low, one.high)
    if one.type == "int" and not one.log:
        return source.randint(int(one.low), int(one.high))
    value = source.uniform(low, high)
    value = min(max(math.exp(value) if one.log else value, one.low), one.high)
    return round(value) if one.type == "int" else value


def run(arguments: argparse.Namespace) -> None:
    study = Study(arguments.model, arguments.device, arguments.samples, arguments.adapters)
    name = arguments.method
    method, tried = name, 0
    if name in BASELINES:
        method, settings = "remamba", {"selector": "none", "adapter": BASELINES[name]}
        chosen = dict.fromkeys(study.benchmarks, settings)
    elif name == "vanilla":
        chosen = {task: {} for task in study.benchmarks}
    else:
        chosen, tried = study.search(name, arguments.draws, arguments.seconds)
    _score_heldout(study, arguments, name, method, chosen, tried)
    if name == "remamba":  # the truncation control: the same window, nothing inserted
        cut = {task: {k: v for k, v in params.items() if k != "ratio"} | {"kept": 0} for task, params in chosen.items()}
        _score_heldout(study, arguments, "remamba, K = 0", method, cut, tried)


def _score_heldout(
    study: Study, arguments: argparse.Namespace, label: str, method: str, chosen: dict[str, Any], tried: int
) -> None:
    for task, params in chosen.items():
        samples = study.samples[task]["heldout"]
        scores = study.score(method, params, task, samples)
        append(arguments.out, {
            "kind": "scores", "model": arguments.model, "method": label, "task": task, "params": params, "tried": tried,
            "train_length": study.train_length, "device": device_name(arguments.device),
            "rows": [[s.length, s.document, round(x, 6)] for s, x in zip(samples, scores, strict=True)],
        })  # fmt: skip
        print(arguments.model, label, task, f"{statistics.fmean(scores):.3f}", params, f"{tried} tried", flush=True)


def cost(arguments: argparse.Namespace) -> None:
    """Seconds to read one prompt, median of 5 after one, for each method with its passkey setting."""
    study = Study(arguments.model, arguments.device, arguments.samples, arguments.adapters)
    for record in read(arguments.out, "scores"):
        if (record["model"], record["task"]) != (arguments.model, "passkey"):
            continue
        name = "remamba" if "," in record["method"] else record["method"]
        method = study.method(name, record["params"])
        for multiple in (8, 32):
            length = multiple * study.train_length
            sample = next(s for s in study.samples["passkey"]["heldout"] if s.length == length)
            prompt = Tokens.pad([sample.prompt_ids], study.loaded.model.device)
            times = [timed(method, study.runner, prompt, arguments.device) for _ in range(6)][1:]
            append(arguments.out, {"kind": "cost", "model": arguments.model, "method": record["method"],
                                   "length": length, "seconds": statistics.median(times),
                                   "device": device_name(arguments.device)})  # fmt: skip
            print(arguments.model, record["method"], length, f"{statistics.median(times):.4f} s", flush=True)


def timed(method: Any, runner: Runner, prompt: Tokens, device: str) -> float:
    started = time.monotonic()
    with torch.inference_mode():
        read = method.prefill(method.runner(runner), prompt)
        runner.model.logits(read.hidden[:, -1]).argmax().item()  # waits for the device
    return time.monotonic() - started


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path, kind: str) -> list[dict[str, Any]]:
    return [record for line in path.read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.add_argument("model")
    one.add_argument("method")
    one.add_argument("--draws", type=int, default=24)
    one.add_argument("--seconds", type=float, default=math.inf, help="a search ends then at the latest")
    two = commands.add_parser("cost")
    two.add_argument("model")
    for command, act in ((one, run), (two, cost)):
        command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        command.add_argument("--out", type=Path, default=Path("methods_study.jsonl"))
        command.add_argument("--adapters", type=Path, help="folder with ReMamba's, in place of the checkpoint's")
        command.add_argument("--samples", type=Path, help="file that keeps the samples for the next process")
        command.set_defaults(act=act)
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
