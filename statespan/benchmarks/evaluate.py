"""Samples through a model under a method: the one numeric path that evaluation, search and the deploy check share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from statespan.benchmarks.base import Benchmark, Completion, Likelihood, Sample, Tokenizer
from statespan.models.generate import Decoding, generate, score
from statespan.models.hook import Method
from statespan.models.runner import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """What one sample came to. Seconds are wall time, shared evenly by the samples of a batch."""

    sample_id: str
    score: float
    completion: Completion
    tokens_prompt: int
    tokens_new: int
    prefill_seconds: float
    decode_seconds: float
    peak_bytes: int | None
    """Most GPU memory the batch held; None on a CPU, where it is not measured."""

    layer_tokens: int
    """Tokens through layers that had to be computed, of the batch, shared evenly."""

    layer_tokens_shared: int
    """Tokens through layers that another trial, or a prompt with the same beginning, had left in a store."""


def evaluate(
    runner: Runner,
    method: Method,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    batch: int = 1,
) -> list[SampleResult]:
    """Run samples in the given order, `batch` generated ones at a time.

    With batch 1 a sample's result does not depend on which samples stand beside it. torch.OutOfMemoryError passes
    through: the caller halves the batch.
    """
    results: list[SampleResult] = []
    for start in range(0, len(samples), batch):
        results += _evaluate_batch(runner, method, benchmark, samples[start : start + batch], tokenizer)
    return results


def _evaluate_batch(
    runner: Runner, method: Method, benchmark: Benchmark, samples: Sequence[Sample], tokenizer: Tokenizer
) -> list[SampleResult]:
    device, n = runner.model.device, len(samples)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    computed, shared = runner.work.computed, runner.work.shared
    completions, prefill_seconds, decode_seconds = _complete(runner, method, benchmark, samples, tokenizer)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return [
        SampleResult(
            sample_id=sample.id,
            score=benchmark.score(completion, sample),
            completion=completion,
            tokens_prompt=len(sample.prompt_ids),
            tokens_new=len(completion.ids) + sum(part.tokens for part in completion.likelihoods),
            prefill_seconds=prefill_seconds / n,
            decode_seconds=decode_seconds / n,
            peak_bytes=peak,
            layer_tokens=(runner.work.computed - computed) // n,
            layer_tokens_shared=(runner.work.shared - shared) // n,
        )
        for sample, completion in zip(samples, completions, strict=True)
    ]


def _complete(
    runner: Runner, method: Method, benchmark: Benchmark, samples: Sequence[Sample], tokenizer: Tokenizer
) -> tuple[list[Completion], float, float]:
    """Completions in order, seconds spent reading prompts, seconds spent on what follows them."""
    kinds = {sample.kind for sample in samples}
    if kinds == {"likelihood"}:
        scored = [_likelihoods(runner, method, benchmark, sample) for sample in samples]
        return [c for c, _, _ in scored], sum(p for _, p, _ in scored), sum(d for _, _, d in scored)
    if kinds != {"generate"}:
        raise AssertionError(f"a batch holds samples of one kind; got {sorted(kinds)}")
    decodings = [
        Decoding(
            max_new_tokens=sample.max_new_tokens,
            min_new_tokens=sample.meta.get("min_new_tokens", 0),
            stop=sample.stop,
            eos_id=tokenizer.eos_id,
        )
        for sample in samples
    ]
    generated = generate(runner, method, [sample.prompt_ids for sample in samples], decodings, tokenizer)
    completions = [Completion(text=row.text, ids=row.ids) for row in generated.rows]
    return completions, generated.timing.prefill_seconds, generated.timing.decode_seconds


def _likelihoods(
    runner: Runner, method: Method, benchmark: Benchmark, sample: Sample
) -> tuple[Completion, float, float]:
    scored = score(runner, method, sample.prompt_ids, sample.target_ids, benchmark.scope)
    parts = tuple(Likelihood(total=s.total, tokens=s.tokens, greedy=s.greedy) for s in scored.rows)
    return Completion(likelihoods=parts), scored.timing.prefill_seconds, scored.timing.decode_seconds
