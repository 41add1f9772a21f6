"""Does `space: auto` find as good a setting in half the trials? A matrix of scores, and thousands of searches replayed.

    python -m perf.auto_replay samples samples.pkl.gz
    python -m perf.auto_replay matrix mamba2-5m longmamba --samples samples.pkl.gz --device cuda --out matrix.jsonl
    python -m perf.auto_replay replay matrix.jsonl

`matrix` takes the settings that a study of the default and of the auto space tries first, in its order, and random
draws of either, and scores each on every sample: one key and one of four named keys in two novels, at some lengths
beyond the training length. Half of the stretches of text are for the search, half are held out. Every batch of samples
goes through all settings before the next, so that a matrix that the clock ends is complete on fewer samples;
`--shard 1/4` takes every fourth batch, and the lines of all shards may stand in one file.

`replay` searches in the matrix: the settings tried first, then draws (what TPE does in its first ten trials, too), 2 n
of the default space against n of the auto space; each takes the best on the search samples, ties to the first tried,
and is judged by the held-out ones. Intervals resample stretches of text and the pool of drawn settings.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import pickle
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perf.methods_study import append, device_name, drawn
from statespan.analysis.run import known_analysis
from statespan.analysis.suggest import suggest, within
from statespan.benchmarks.base import Benchmark, Sample
from statespan.benchmarks.evaluate import evaluate
from statespan.benchmarks.table import build_benchmark
from statespan.methods.base import ModelFacts
from statespan.methods.table import build_method, canonical_params
from statespan.models.checkpoint import Loaded, load_model
from statespan.models.hook import VANILLA
from statespan.models.runner import Runner
from statespan.models.store import StreamStore
from statespan.search_spaces.loader import Range, Space, load_space, names_of

MULTIPLES = {"mamba1-5m": (4, 8, 16), "mamba2-5m": (2, 4, 8)}
"""Of the training length: where the model reads worse than within it, up to where some setting still helps."""

HAYSTACKS, KEYS, TRIALS = ("moby_dick", "emma"), (1, 4), 4
TOKENS_AT_ONCE = {"cuda": 65_536, "cpu": 8_192}
COMPLETIONS = 3
"""Ways in which a setting that leaves parameters open is completed, as a search would draw them."""

BUDGETS = (4, 6, 8, 12)  # trials of the auto space; the default space gets twice as many
RESAMPLES, REPLAYS = 400, 100
Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Setting = dict[str, Any]


def benchmarks(train_length: int, multiples: Sequence[int], seed: int) -> list[Benchmark]:
    shared = {"lengths": [train_length * one for one in multiples], "trials": TRIALS, "seed": seed}
    return [build_benchmark("passkey", {**shared, "keys": keys, "haystack": hay}) for hay in HAYSTACKS for keys in KEYS]


def make_samples(arguments: argparse.Namespace) -> None:
    """Fitting prompts to their lengths takes minutes; one file serves all processes of both models."""
    loaded = load_model("mamba2-5m", dtype="float32", device="cpu")  # both have one tokenizer and one training length
    assert loaded.train_length is not None
    multiples = sorted({one for some in MULTIPLES.values() for one in some})
    tasks = benchmarks(loaded.train_length, multiples, arguments.seed)
    made = [sample for one in tasks for sample in one.samples(loaded.tokenizer)]
    with gzip.open(arguments.file, "wb") as file:
        pickle.dump(made, file)
    print(arguments.file, len(made), "samples")


def batches_of(samples: Sequence[Sample], tokens: int) -> list[list[int]]:
    """Samples of one length each, in an order in which every length is covered evenly however early it ends."""
    placed = []
    for length in sorted({sample.length for sample in samples}):
        own = [number for number, sample in enumerate(samples) if sample.length == length]
        random.Random(length).shuffle(own)
        size = max(tokens // length, 1)
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        placed += [((number + 0.5) / len(parts), part) for number, part in enumerate(parts)]
    return [part for _, part in sorted(placed, key=lambda one: one[0])]


def searched(document: str) -> bool:
    """Which side a stretch of text is on: every second of each novel is for the search."""
    return int(document.rpartition("#")[2]) % 2 == 0


def spaces_of(method: str, facts: ModelFacts, lengths: Sequence[int]) -> dict[str, tuple[Space, list[Setting]]]:
    """Both spaces, and what a study of each tries first, in its order (orchestration/plan.py)."""
    names, analysis = names_of(facts, max(lengths)), known_analysis(facts)
    assert analysis is not None, "shipped models bring their analysis"
    shipped = load_space(method, names)
    found = suggest(analysis, shipped, lengths)
    narrowed = load_space(method, names, params=found.params)
    first = within(narrowed, found.enqueue) + within(narrowed, narrowed.published)
    return {"default": (shipped, [dict(one) for one in shipped.published]), "auto": (narrowed, first)}


def settings_of(space: Space, first: Sequence[Setting], draws: int, seed: str) -> Iterator[tuple[int | None, Setting]]:
    """(place among those tried first or None for a draw, setting)"""
    source = random.Random(seed)

    def filled(given: Mapping[str, Any]) -> Setting:
        return space.draw(lambda name, one: given[name] if name in given else drawn(source, one))

    for place, given in enumerate(first):
        is_open = any(isinstance(one, Range) and name not in given for name, one in space.params.items())
        for _ in range(COMPLETIONS if is_open else 1):
            yield place, filled(given)
    count = 0
    while count < draws:
        if not space.broken(point := filled({})):
            count += 1
            yield None, point


class Scorer:
    """Every setting on one batch after another; settings that are the same, or change nothing, are run once."""

    def __init__(self, loaded: Loaded, facts: ModelFacts, method: str, settings: Sequence[Setting]) -> None:
        self.loaded, self.device = loaded, loaded.model.device
        names = [json.dumps(canonical_params(method, one), sort_keys=True) for one in settings]
        self.place = [list(dict.fromkeys(names)).index(name) for name in names]
        first = {name: one for name, one in zip(reversed(names), reversed(settings), strict=True)}
        self.methods = [VANILLA, *(build_method(method, first[name], facts) for name in dict.fromkeys(names))]

    def scores(self, benchmark: Benchmark, samples: Sequence[Sample]) -> list[str]:
        """Vanilla's answers and then each setting's, right ones "1"."""
        cuda = self.device.type == "cuda"
        store = StreamStore(0, device=self.device, device_bytes=2 << 30) if cuda else StreamStore(1 << 30)
        runner, found = Runner(self.loaded.model, store=store), list[str]()
        for method in self.methods:
            if found and runner.diverges_at(method, [samples[0].length]) == runner.n_layer:
                found.append(found[0])
                continue
            results = evaluate(runner, method, benchmark, samples, self.loaded.tokenizer, len(samples))
            found.append("".join(str(int(one.score)) for one in results))
        return [found[0], *(found[place + 1] for place in self.place)]


def make_matrix(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    loaded = load_model(arguments.model, dtype="float32", device=arguments.device)
    facts = ModelFacts.of(loaded)
    assert facts.train_length is not None
    with gzip.open(arguments.samples, "rb") as file:
        made: list[Sample] = pickle.load(file)
    lengths = [facts.train_length * one for one in MULTIPLES[arguments.model]]
    samples = [sample for sample in made if sample.length in lengths]
    rows = list[dict[str, Any]]()
    for name, (space, first) in spaces_of(arguments.method, facts, lengths).items():
        drawn_ones = settings_of(space, first, arguments.draws, f"{arguments.model} {arguments.method} {name}")
        rows += [{"space": name, "first": place, "params": point} for place, point in drawn_ones]
    head = {"model": arguments.model, "method": arguments.method}
    kept = [[s.id, s.length, s.document, searched(s.document)] for s in samples]
    append(arguments.out, {"kind": "matrix", **head, "settings": rows, "samples": kept,
                           "device": device_name(arguments.device)})  # fmt: skip
    scorer = Scorer(loaded, facts, arguments.method, [row["params"] for row in rows])
    benchmark = benchmarks(facts.train_length, (1,), 0)[0]  # all score alike
    part, parts = map(int, arguments.shard.split("/"))
    for number, batch in enumerate(batches_of(samples, TOKENS_AT_ONCE[arguments.device])):
        if number % parts != part:
            continue
        if time.monotonic() - started > arguments.seconds:
            break
        with torch.inference_mode():
            found = scorer.scores(benchmark, [samples[place] for place in batch])
        append(arguments.out, {"kind": "batch", **head, "samples": batch, "scores": found})
        state = f"batch {number}, {time.monotonic() - started:.0f} s, {len(scorer.methods)} methods"
        print(*head.values(), arguments.shard, state, flush=True)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Settings of both spaces on samples. scores: (settings, samples), vanilla: (samples,)"""

    name: str
    scores: Array
    vanilla: Array
    space: NDArray[np.str_]
    first: Indices  # -1 for a draw
    document: Indices
    search: NDArray[np.bool_]

    @classmethod
    def of(cls, head: Mapping[str, Any], batches: Sequence[Mapping[str, Any]], name: str) -> Matrix:
        index = [place for batch in batches for place in batch["samples"]]
        columns = [[int(one) for one in row] for batch in batches for row in zip(*batch["scores"], strict=True)]
        table = np.array(columns, dtype=float).T
        settings, samples = head["settings"], [head["samples"][place] for place in index]
        return cls(
            name=name,
            scores=table[1:],
            vanilla=table[0],
            space=np.array([one["space"] for one in settings]),
            first=np.array([-1 if one["first"] is None else one["first"] for one in settings]),
            document=np.unique([one[2] for one in samples], return_inverse=True)[1],
            search=np.array([one[3] for one in samples], dtype=bool),
        )

    def means(self, weights: Array) -> tuple[Array, Array, float]:
        """Each setting's mean on the search and on the held-out samples, and vanilla's held out."""
        own, kept = weights * self.search, weights * ~self.search
        return self.scores @ own / own.sum(), self.scores @ kept / kept.sum(), float(self.vanilla @ kept / kept.sum())

    def resampled(self, rng: np.random.Generator) -> Array:
        """Weights of the samples when stretches of text are drawn anew, on each side by themselves."""
        weights = np.zeros(len(self.document))
        for side in (True, False):
            own = np.unique(self.document[self.search == side])
            times = np.bincount(rng.choice(len(own), size=len(own)), minlength=len(own))
            chosen = self.search == side
            weights[chosen] = times[np.searchsorted(own, self.document[chosen])]
        return weights

    def searches(
        self, space: str, trials: int, replays: int, rng: np.random.Generator, anew: bool
    ) -> NDArray[np.int64]:
        """(replays, trials) settings in the order tried. `anew` draws the pool of draws with replacement first."""
        own = self.space == space
        fixed = [np.flatnonzero(own & (self.first == place)) for place in range(self.first[own].max() + 1)][:trials]
        pool = np.flatnonzero(own & (self.first < 0))
        pool = rng.choice(pool, size=len(pool)) if anew else pool
        tried = [rng.choice(some, size=(replays, 1)) for some in fixed]
        order = np.argsort(rng.random((replays, len(pool))), axis=1)[:, : trials - len(fixed)]
        return np.concatenate([*tried, pool[order]], axis=1)


def outcomes(
    matrix: Matrix, trials: int, replays: int, weights: Array, rng: np.random.Generator, anew: bool
) -> tuple[Array, Array]:
    """Held-out scores of what each replayed search takes: of the default space with twice the trials, and of auto."""
    search, heldout, _ = matrix.means(weights)
    taken = []
    for space, count in (("default", 2 * trials), ("auto", trials)):
        tried = matrix.searches(space, count, replays, rng, anew)
        best = search[tried].argmax(axis=1)  # the first of equals
        taken.append(heldout[tried[np.arange(replays), best]])
    return taken[0], taken[1]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares of held-out samples answered by what the default space found in twice the trials, and by auto's choice.

    gaps: (resamples,) mean differences when stretches of text and the pool of draws are drawn anew
    """

    default: float
    auto: float
    no_worse: float
    gaps: Array


def replayed(matrix: Matrix, trials: int, seed: int = 0) -> Outcome:
    rng = np.random.default_rng((seed, trials))
    default, auto = outcomes(matrix, trials, 20 * REPLAYS, np.ones(len(matrix.document)), rng, anew=False)
    gaps = []
    for _ in range(RESAMPLES):
        a, b = outcomes(matrix, trials, REPLAYS, matrix.resampled(rng), rng, anew=True)
        gaps.append(float((b - a).mean()))
    no_worse = float((auto >= default - 1e-9).mean())
    return Outcome(float(default.mean()), float(auto.mean()), no_worse, np.array(gaps))


def matrices(path: Path) -> list[Matrix]:
    heads, batches = dict[tuple[str, str], Any](), dict[tuple[str, str], list[Any]]()
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for record in map(json.loads, file):
            key = record["model"], record["method"]
            if record["kind"] == "matrix":
                assert heads.setdefault(key, record) == record, f"the shards of {key} are of different runs"
            else:
                batches.setdefault(key, []).append(record)
    return [Matrix.of(head, batches[key], " ".join(key)) for key, head in sorted(heads.items()) if key in batches]


def interval(gaps: Array) -> str:
    low, high = 100 * np.quantile(gaps, (0.025, 0.975))
    return f"({low:+.1f} to {high:+.1f})"


def replay(arguments: argparse.Namespace) -> None:
    budgets = [f"{trials} against {2 * trials}" for trials in BUDGETS]
    print(f"| model, method | held out | vanilla | {' | '.join(budgets)} |\n{'|---' * (3 + len(BUDGETS))}|")
    gains: dict[int, list[float]] = {trials: [] for trials in BUDGETS}
    gaps: dict[int, list[Array]] = {trials: [] for trials in BUDGETS}
    for number, matrix in enumerate(matrices(arguments.file)):
        cells = []
        for trials in BUDGETS:
            one = replayed(matrix, trials, number)
            gains[trials].append(one.auto - one.default)
            gaps[trials].append(one.gaps)
            cells.append(
                f"{100 * one.default:.1f} → {100 * one.auto:.1f}, {100 * gains[trials][-1]:+.1f} {interval(one.gaps)}, "
                f"{one.no_worse:.0%}"
            )
        vanilla = 100 * matrix.means(np.ones(len(matrix.document)))[2]
        print(f"| {matrix.name} | {(~matrix.search).sum()} | {vanilla:.1f} | {' | '.join(cells)} |", flush=True)
    pooled = [f"{100 * np.mean(gains[one]):+.1f} {interval(np.mean(gaps[one], axis=0))}" for one in BUDGETS]
    print(f"| mean | | | {' | '.join(pooled)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("samples")
    one.add_argument("file", type=Path)
    one.add_argument("--seed", type=int, default=0, help="of the keys and their places")
    one.set_defaults(act=make_samples)
    two = commands.add_parser("matrix")
    two.add_argument("model", choices=sorted(MULTIPLES))
    two.add_argument("method")
    two.add_argument("--samples", type=Path, required=True)
    two.add_argument("--draws", type=int, default=80, help="of each space")
    two.add_argument("--shard", default="0/1")
    two.add_argument("--seconds", type=float, default=math.inf, help="no batch begins later")
    two.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    two.add_argument("--out", type=Path, required=True)
    two.set_defaults(act=make_matrix)
    three = commands.add_parser("replay")
    three.add_argument("file", type=Path)
    three.set_defaults(act=replay)
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
