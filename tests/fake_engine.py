"""An instant engine for tests of everything around the model: the score is a known function of setting and sample."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from statespan.benchmarks.base import Sample
from statespan.orchestration.items import SampleOutcome, Setting
from statespan.orchestration.worker import OutOfMemory, WorkerSpec

LAYERS = 4


def unit(*parts: object) -> float:
    """A number in [0, 1) that depends on its parts only."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6]) / 2**48


def score(setting: Setting, sample: Sample) -> float:
    """1 or 0; right more often the nearer `first_layer` is to 1 and the longer the budget."""
    if setting.method == "vanilla":
        chance = 0.3
    else:
        chance = 0.9 - 0.2 * abs(setting.params["first_layer"] - 1) - 10 / setting.params["base_tokens"]
    return float(unit(sample.id) < chance)


@dataclass
class InstantEngine:
    spec: WorkerSpec
    seconds: float = 0.0
    fits_tokens: int | None = None
    fail: Callable[[Setting, Sample], str] = lambda setting, sample: ""
    rows_apart: bool = False

    def evaluate(self, setting: Setting, task: str, samples: Sequence[Sample], alone: bool) -> list[SampleOutcome]:
        if self.seconds:
            time.sleep(self.seconds * len(samples))
        if self.fits_tokens is not None and sum(len(one.prompt_ids) for one in samples) > self.fits_tokens:
            raise OutOfMemory("tried to allocate 2 GiB")
        for sample in samples:
            if why := self.fail(setting, sample):
                raise RuntimeError(why)
        return [
            SampleOutcome(
                row=-1,
                key="",
                status="done",
                score=score(setting, sample),
                text="12345",
                ids=(1, 2),
                tokens_new=2,
                prefill_seconds=0.01,
                decode_seconds=0.01,
                layer_tokens=LAYERS * len(sample.prompt_ids),
            )
            for sample in samples
        ]

    def free(self) -> None:
        return None


def instant(spec: WorkerSpec) -> InstantEngine:
    return InstantEngine(spec)


def slow(spec: WorkerSpec) -> InstantEngine:
    """Ten milliseconds a sample."""
    return InstantEngine(spec, seconds=0.01)


def dies_once(marker: Path) -> Callable[[WorkerSpec], InstantEngine]:
    """An engine whose process dies at its third batch, the first time only."""

    class Mortal(InstantEngine):
        batches = 0

        def evaluate(self, setting: Setting, task: str, samples: Sequence[Sample], alone: bool) -> list[SampleOutcome]:
            self.batches += 1
            if self.batches == 3 and not marker.exists():
                marker.touch()
                os._exit(1)
            return super().evaluate(setting, task, samples, alone)

    return lambda spec: Mortal(spec)
