"""Samples through a model under a method: the one numeric path that evaluation, search and the deploy check share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from statespan.benchmarks.base import Benchmark, Completion, Likelihood, Sample, Tokenizer
from statespan.models.generate import Decoding, generate, score
from statespan.models.hook import Method
from statespan.models.runner import Runner, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """What one sample came to. Seconds are wall time, shared evenly by samples that were read or decoded together."""

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
    """Tokens through layers that had to be computed; of a batch that was read together, shared evenly."""

    layer_tokens_shared: int
    """Tokens through layers that another trial, or a prompt with the same beginning, had left in a store."""


def evaluate(
    runner: Runner,
    method: Method,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    batch: int = 1,
    apart: bool = False,
) -> list[SampleResult]:
    """Run samples in the given order, `batch` generated ones at a time.

    With batch 1 a sample's result does not depend on which samples stand beside it; with `apart`, which reads prompts
    one by one and decodes a batch together, neither where the model's steps keep rows apart (`fused_step.rows_apart`).
    torch.OutOfMemoryError passes through: the caller halves the batch.
    """
    results: list[SampleResult] = []
    for start in range(0, len(samples), batch):
        results += _evaluate_batch(runner, method, benchmark, samples[start : start + batch], tokenizer, apart)
    return results


@dataclass(frozen=True, slots=True)
class _Answer:
    completion: Completion
    prefill_seconds: float
    decode_seconds: float
    computed: int
    shared: int


def _evaluate_batch(
    runner: Runner, method: Method, benchmark: Benchmark, samples: Sequence[Sample], tokenizer: Tokenizer, apart: bool
) -> list[SampleResult]:
    device = runner.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    answers = _answers(runner, method, benchmark, samples, tokenizer, apart)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return [
        SampleResult(
            sample_id=sample.id,
            score=benchmark.score(answer.completion, sample),
            completion=answer.completion,
            tokens_prompt=len(sample.prompt_ids),
            tokens_new=len(answer.completion.ids) + sum(part.tokens for part in answer.completion.likelihoods),
            prefill_seconds=answer.prefill_seconds,
            decode_seconds=answer.decode_seconds,
            peak_bytes=peak,
            layer_tokens=answer.computed,
            layer_tokens_shared=answer.shared,
        )
        for sample, answer in zip(samples, answers, strict=True)
    ]


def _answers(
    runner: Runner, method: Method, benchmark: Benchmark, samples: Sequence[Sample], tokenizer: Tokenizer, apart: bool
) -> list[_Answer]:
    """What each sample was answered with, and what that took."""
    kinds, n = {sample.kind for sample in samples}, len(samples)
    if kinds == {"likelihood"}:
        return [_likelihoods(runner, method, benchmark, sample) for sample in samples]
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
    prompts = [sample.prompt_ids for sample in samples]
    generated = generate(runner, method, prompts, decodings, tokenizer, apart=apart)
    decode = generated.timing.decode_seconds / n
    read = list(zip(generated.read, generated.read_seconds, strict=True))
    if not apart:
        ((whole, seconds),) = read
        read = [(Work(whole.computed // n, whole.shared // n), seconds / n)] * n
    return [
        _Answer(Completion(text=row.text, ids=row.ids), seconds, decode, one.computed, one.shared)
        for row, (one, seconds) in zip(generated.rows, read, strict=True)
    ]


def _likelihoods(runner: Runner, method: Method, benchmark: Benchmark, sample: Sample) -> _Answer:
    computed, shared = runner.work.computed, runner.work.shared
    scored = score(runner, method, sample.prompt_ids, sample.target_ids, benchmark.scope)
    parts = tuple(Likelihood(total=s.total, tokens=s.tokens, greedy=s.greedy) for s in scored.rows)
    return _Answer(
        Completion(likelihoods=parts),
        scored.timing.prefill_seconds,
        scored.timing.decode_seconds,
        runner.work.computed - computed,
        runner.work.shared - shared,
    )
