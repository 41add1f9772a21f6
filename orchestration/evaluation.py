"""One method on one benchmark in this process, outside any study."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from statespan.errors import UserError
from statespan.study_file import parse_override

if TYPE_CHECKING:
    from statespan.benchmarks.base import Benchmark, Sample

Progress = Callable[[int, int], None]
"""Told the tokens that are read, of so many."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    metric: str
    rows: list[dict[str, Any]]
    """One a sample."""

    summary: Mapping[str, float]
    """The benchmark's own headline figures."""

    def lines(self) -> list[dict[str, Any]]:
        """One a length, the whole last."""
        lengths: list[Any] = sorted({row["length"] for row in self.rows})
        out = [self._line(length, [row for row in self.rows if row["length"] == length]) for length in lengths]
        return [*out, {**self._line("all", self.rows), "summary": dict(self.summary)}]

    def _line(self, length: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        seconds, shared = sum(row["seconds"] for row in rows), sum(row["layer_tokens_shared"] for row in rows)
        layer_tokens = shared + sum(row["layer_tokens"] for row in rows)
        return {
            "length": length,
            "score": sum(row["score"] for row in rows) / len(rows) if rows else math.nan,
            "samples": len(rows),
            "shared": shared / layer_tokens if layer_tokens else math.nan,
            "tokens_per_second": sum(row["prompt_tokens"] for row in rows) / seconds if seconds else math.nan,
        }


def evaluate_once(
    model: str,
    benchmark: str,
    settings: Sequence[str],
    method: str,
    params: Sequence[str],
    limit: int | None,
    batch: int,
    dtype: str | None,
    device: str,
    threads: int | None,
    on_progress: Progress = lambda done, total: None,
) -> Evaluation:
    """See `statespan eval --help`."""
    import torch

    from statespan.benchmarks.evaluate import evaluate
    from statespan.benchmarks.table import build_benchmark
    from statespan.methods.base import ModelFacts
    from statespan.methods.table import build_method
    from statespan.models.checkpoint import load_model
    from statespan.models.device import resolve_device
    from statespan.models.prefix import PrefixStore
    from statespan.models.runner import Runner

    if threads is not None:
        torch.set_num_threads(threads)
    asked = build_benchmark(benchmark, _given(settings))
    loaded = load_model(model, dtype=dtype, device=resolve_device(device))
    built = build_method(method, _given(params), ModelFacts.of(loaded))
    samples = list(limited(asked, asked.samples(loaded.tokenizer), limit))
    if not samples:
        raise UserError(f"{benchmark} has no samples with these settings")
    rows, scores, runner = [], [], Runner(loaded.model, prefixes=PrefixStore())
    done, total = 0, sum(map(_tokens, samples))
    on_progress(done, total)
    for start in range(0, len(samples), batch):
        part, begun = samples[start : start + batch], time.perf_counter()
        results = evaluate(runner, built, asked, part, loaded.tokenizer, batch=batch)
        seconds = (time.perf_counter() - begun) / len(part)
        done += sum(map(_tokens, part))
        on_progress(done, total)
        for sample, result in zip(part, results, strict=True):
            scores.append(result.score)
            rows.append(
                {"id": sample.id, "length": sample.length, "depth": sample.depth, "score": result.score,
                 "prompt_tokens": result.tokens_prompt, "text": result.completion.text, "seconds": seconds,
                 "layer_tokens": result.layer_tokens, "layer_tokens_shared": result.layer_tokens_shared}
            )  # fmt: skip
    return Evaluation(asked.metric, rows, asked.summary(samples, scores))


def _tokens(sample: Sample) -> int:
    """Tokens to read."""
    return len(sample.prompt_ids) + sum(map(len, sample.target_ids))


def _given(pairs: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for pair in pairs:
        out |= parse_override(pair)
    return out


def limited(benchmark: Benchmark, samples: Iterable[Sample], limit: int | None) -> Iterator[Sample]:
    """So many of each length, and of each task where the benchmark has several; all where no limit is given."""
    columns = [name for name in benchmark.group_by if name not in ("length", "depth")]
    seen: Counter[tuple[Any, ...]] = Counter()
    for sample in samples:
        cell = (sample.length, *(sample.meta[name] for name in columns))
        seen[cell] += 1
        if limit is None or seen[cell] <= limit:
            yield sample
