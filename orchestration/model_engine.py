"""The engine of a worker: one loaded checkpoint, methods swapped in place, hidden streams kept for the next trial."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from statespan.benchmarks.base import Benchmark, Sample
from statespan.benchmarks.evaluate import SampleResult, evaluate
from statespan.benchmarks.table import build_benchmark
from statespan.errors import UserError
from statespan.methods.base import ModelFacts
from statespan.methods.table import build_method
from statespan.models.checkpoint import load_model
from statespan.models.fused_step import rows_apart
from statespan.models.hook import Method
from statespan.models.prefix import PrefixStore
from statespan.models.runner import Runner
from statespan.models.store import StreamStore
from statespan.orchestration.items import SampleOutcome, Setting
from statespan.orchestration.worker import Engine, OutOfMemory, WorkerSpec


def load_engine(spec: WorkerSpec) -> Engine:
    """Load the model as a worker of this study runs it."""
    torch.set_num_threads(spec.threads)
    _set_numba_threads(spec.threads)
    if spec.device == "cuda":
        _claim_gpu(spec.memory_fraction)
    return ModelEngine(spec)


def _claim_gpu(fraction: float) -> None:
    if not torch.cuda.is_available():
        raise UserError("a worker finds no CUDA device; set numerics.device to cpu or run it where there is one")
    torch.cuda.set_per_process_memory_fraction(fraction)


def _set_numba_threads(threads: int) -> None:
    import numba

    config: Any = numba.config
    numba.set_num_threads(min(threads, config.NUMBA_NUM_THREADS))


def _store(spec: WorkerSpec) -> StreamStore | None:
    """Half of the memory for streams, half for projections, on the GPU as in host memory."""
    if not spec.store_bytes:
        return None
    host, device = spec.store_bytes // 2, spec.gpu_store_bytes // 2
    return StreamStore(host, host, device=torch.device(spec.device), device_bytes=device, projected_device_bytes=device)


class ModelEngine:
    def __init__(self, spec: WorkerSpec) -> None:
        loaded = load_model(spec.model, dtype=spec.dtype, device=spec.device, revision=spec.revision)
        if loaded.digest != spec.digest:
            raise UserError(
                f"{spec.model!r} holds other weights here ({loaded.digest[:12]}) than where the study was started "
                f"({spec.digest[:12]}); copy the same checkpoint to every node"
            )
        self.tokenizer, self.deterministic = loaded.tokenizer, spec.deterministic
        self.facts = ModelFacts.of(loaded, spec.train_length)
        prefixes = PrefixStore() if spec.store_bytes else None
        self.runner = Runner(loaded.model, store=_store(spec), prefixes=prefixes)
        self.rows_apart = rows_apart(loaded.model)
        self.solo = Runner(loaded.model)
        """Shares nothing: what is measured on it is what a trial costs by itself."""

        self.benchmarks: dict[str, Benchmark] = {
            task: build_benchmark(name, settings) for task, (name, settings) in spec.tasks.items()
        }
        self._methods: dict[str, Method] = {}

    def evaluate(self, setting: Setting, task: str, samples: Sequence[Sample], alone: bool) -> list[SampleOutcome]:
        runner, method = self.solo if alone else self.runner, self.method(setting)
        together = 1 if alone else len(samples)
        apart = self.deterministic and self.rows_apart
        try:
            results = evaluate(
                runner, method, self.benchmarks[task], samples, self.tokenizer, batch=together, apart=apart
            )
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemory(str(error)) from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise OutOfMemory(str(error)) from error
        return [_outcome(result) for result in results]

    def method(self, setting: Setting) -> Method:
        """The method, built once for each setting; the last few are kept."""
        name = json.dumps([setting.method, dict(setting.params), dict(setting.artifacts)], sort_keys=True)
        if name not in self._methods:
            while len(self._methods) >= 64:
                self._methods.pop(next(iter(self._methods)))
            self._methods[name] = build_method(setting.method, setting.params, self.facts)
        return self._methods[name]

    def free(self) -> None:
        """Drop every kept stream, and the decode steps that are captured."""
        for runner in (self.runner, self.solo):
            runner.free()
        if self.runner.store is not None:
            self.runner.store.clear()
        if self.runner.prefixes is not None:
            self.runner.prefixes.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _outcome(result: SampleResult) -> SampleOutcome:
    parts = result.completion.likelihoods
    return SampleOutcome(
        row=-1,
        key="",
        status="done",
        score=result.score,
        text=None if parts else result.completion.text,
        ids=result.completion.ids,
        logprobs=tuple(part.total for part in parts),
        target_tokens=tuple(part.tokens for part in parts),
        greedy=tuple(part.greedy for part in parts),
        tokens_new=result.tokens_new,
        prefill_seconds=result.prefill_seconds,
        decode_seconds=result.decode_seconds,
        peak_bytes=result.peak_bytes,
        layer_tokens=result.layer_tokens,
        layer_tokens_shared=result.layer_tokens_shared,
    )
