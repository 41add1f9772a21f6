"""The key of a result: a hash of everything that can change it. Same key, same result; any part changed, another key.

| part       | what goes in                                                                                   |
|------------|------------------------------------------------------------------------------------------------|
| weights    | sha256 of config.json and of the weights' bytes; the training length the study goes by          |
| tokenizer  | sha256 of tokenizer.json                                                                       |
| method     | name and canonical parameters: what has no effect is dropped, so that equal trials share        |
| artifacts  | sha256 of the calibration tables and adapters the method loads                                 |
| sample     | prompt ids, targets, stop strings, token limit, and the facts its scorer reads                 |
| benchmark  | name, version, scope, and its settings other than those that only choose samples               |
| numerics   | dtype, kind of device, deterministic or the batch's token limit, NUMERIC_VERSION                |

The sample's id, split, rung, the trial's number and the study's name are not in it: they say who asked, not what.
A trial whose method changes nothing at a prompt's length has vanilla's key there, and so vanilla's result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from statespan.benchmarks.base import Benchmark, Sample

NUMERIC_VERSION = 1
"""Raise it when a change of models, kernels or methods changes results beyond rounding: old results are then stale."""

CHOOSES_SAMPLES = frozenset(
    {"seed", "lengths", "depths", "trials", "samples", "windows", "books", "data_root", "fixed_books", "limit"}
    | {"rows", "tasks", "datasets", "documents", "queries", "keys", "haystack", "pairs", "facts", "examples"}
)
"""Settings of benchmarks that say which samples there are; what a sample is stands in the sample itself."""


def digest(value: Any) -> str:
    """sha256 of a JSON value, keys sorted. Tuples are lists and 1 is not 1.0."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sample_digest(sample: Sample) -> str:
    """What a sample asks and accepts; neither its id nor the document it stands in."""
    return digest(
        {
            "prompt": sample.prompt_ids,
            "kind": sample.kind,
            "targets": sample.targets,
            "target_ids": sample.target_ids,
            "max_new_tokens": sample.max_new_tokens,
            "stop": sample.stop,
            "length": sample.length,
            "depth": sample.depth,
            "meta": dict(sample.meta),
        }
    )


def benchmark_facts(benchmark: Benchmark, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a benchmark decides how one sample is run and scored. `settings` are the resolved ones."""
    scoring = {name: value for name, value in settings.items() if name not in CHOOSES_SAMPLES}
    return {"name": benchmark.name, "version": benchmark.version, "scope": benchmark.scope, "settings": scoring}


@dataclass(frozen=True, kw_only=True, slots=True)
class NumericMode:
    dtype: str
    device: str
    """Kind of device: cpu or cuda. Two kinds of GPU may differ by rounding and still share results."""

    deterministic: bool
    batch_tokens: int = 0
    """Only where not deterministic: then a sample may feel its neighbours."""

    def facts(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "device": self.device,
            "deterministic": self.deterministic,
            "batch_tokens": 0 if self.deterministic else self.batch_tokens,
            "version": NUMERIC_VERSION,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    weights: str
    tokenizer: str
    train_length: int | None = None
    """What methods take for a parameter that is left out; a study may say another one than the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodIdentity:
    """A method as far as results depend on it."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    """Canonical ones."""

    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Artifact -> sha256 of its bytes."""

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "params": dict(self.params), "artifacts": dict(self.artifacts)}


VANILLA_IDENTITY = MethodIdentity(name="vanilla")


def scope_digest(model: ModelIdentity, numerics: NumericMode) -> str:
    """Names all that the results of one study have in common."""
    return digest(
        {
            "weights": model.weights,
            "tokenizer": model.tokenizer,
            "train_length": model.train_length,
            "numerics": numerics.facts(),
        }
    )


def result_key(scope: str, method: MethodIdentity, benchmark: Mapping[str, Any], sample: str) -> str:
    """The key of one sample under one method.

    Args:
        scope: `scope_digest`.
        method: vanilla's where the method changes nothing at this prompt's length.
        benchmark: `benchmark_facts`.
        sample: `sample_digest`.
    """
    return digest({"scope": scope, "method": method.facts(), "benchmark": dict(benchmark), "sample": sample})
