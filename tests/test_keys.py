"""The key of a result: changing any part of it must miss, and what is no part must not."""

from dataclasses import replace

import pytest

from statespan.benchmarks.base import Benchmark, Sample
from statespan.orchestration import keys
from statespan.orchestration.keys import (
    MethodIdentity,
    ModelIdentity,
    NumericMode,
    benchmark_facts,
    result_key,
    sample_digest,
    scope_digest,
)

MODEL = ModelIdentity(weights="w", tokenizer="t", train_length=1024)
NUMERICS = NumericMode(dtype="float32", device="cpu", deterministic=False, batch_tokens=64)
METHOD = MethodIdentity(name="decimamba", params={"layers": [2], "base_tokens": 64}, artifacts={"calibration": "c"})
SAMPLE = Sample(
    id="s", prompt_ids=(1, 2, 3), kind="generate", document="d", length=3, targets=("x",), target_ids=((4,),),
    max_new_tokens=5, stop=("\n",), depth=0.5, meta={"a": 1},
)  # fmt: skip


class Quiz(Benchmark):
    name, version, metric = "quiz", 1, "accuracy"

    def samples(self, tokenizer):
        yield SAMPLE

    def score(self, completion, sample):
        return 1.0


class NewerQuiz(Quiz):
    version = 2


class WindowQuiz(Quiz):
    scope = "window"


def key(model=MODEL, numerics=NUMERICS, method=METHOD, benchmark=None, settings=None, sample=SAMPLE):
    facts = benchmark_facts(benchmark or Quiz(), settings or {"strip_cue": False, "lengths": [3]})
    return result_key(scope_digest(model, numerics), method, facts, sample_digest(sample))


MUTATIONS = {
    "weights": {"model": replace(MODEL, weights="v")},
    "tokenizer": {"model": replace(MODEL, tokenizer="v")},
    "train_length": {"model": replace(MODEL, train_length=512)},
    "dtype": {"numerics": replace(NUMERICS, dtype="bfloat16")},
    "device": {"numerics": replace(NUMERICS, device="cuda")},
    "deterministic": {"numerics": replace(NUMERICS, deterministic=True)},
    "batch_tokens": {"numerics": replace(NUMERICS, batch_tokens=128)},
    "method": {"method": replace(METHOD, name="longmamba")},
    "a_parameter": {"method": replace(METHOD, params={"layers": [3], "base_tokens": 64})},
    "type_of_a_parameter": {"method": replace(METHOD, params={"layers": [2], "base_tokens": 64.0})},
    "artifact": {"method": replace(METHOD, artifacts={"calibration": "b"})},
    "benchmark": {"benchmark": type("Other", (Quiz,), {"name": "other"})()},
    "version": {"benchmark": NewerQuiz()},
    "scope": {"benchmark": WindowQuiz()},
    "scoring_setting": {"settings": {"strip_cue": True, "lengths": [3]}},
    "prompt": {"sample": replace(SAMPLE, prompt_ids=(1, 2, 4))},
    "kind": {"sample": replace(SAMPLE, kind="likelihood")},
    "targets": {"sample": replace(SAMPLE, targets=("y",))},
    "target_ids": {"sample": replace(SAMPLE, target_ids=((5,),))},
    "max_new_tokens": {"sample": replace(SAMPLE, max_new_tokens=6)},
    "stop": {"sample": replace(SAMPLE, stop=())},
    "depth": {"sample": replace(SAMPLE, depth=0.25)},
    "meta": {"sample": replace(SAMPLE, meta={"a": 2})},
}


@pytest.mark.parametrize("change", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_changed_part_is_another_key(change):
    assert key(**change) != key()


def test_a_newer_numeric_path_is_another_key(monkeypatch):
    before = key()
    monkeypatch.setattr(keys, "NUMERIC_VERSION", keys.NUMERIC_VERSION + 1)
    assert key() != before


@pytest.mark.parametrize(
    "same",
    [
        pytest.param({"sample": replace(SAMPLE, id="other", document="other")}, id="id_and_document"),
        pytest.param({"settings": {"strip_cue": False, "lengths": [3, 4], "trials": 9}}, id="more_samples"),
        pytest.param({"method": replace(METHOD, params={"base_tokens": 64, "layers": [2]})}, id="order_of_parameters"),
    ],
)
def test_what_is_no_part_keeps_the_key(same):
    assert key(**same) == key()


def test_batch_size_is_no_part_where_samples_run_alone():
    alone = replace(NUMERICS, deterministic=True)
    assert key(numerics=alone) == key(numerics=replace(alone, batch_tokens=9))
