"""What every benchmark must hold, as a kit its test subclasses, and a tokenizer to count on one's fingers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import pytest

from statespan.benchmarks.base import Benchmark, Completion, Likelihood, Sample
from statespan.benchmarks.table import build_benchmark
from statespan.errors import UserError
from statespan.orchestration.samples import build_samples, sides


class ByteTokenizer:
    """A token is a byte; 256 ends a text."""

    eos_id: int | None = 256
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


BYTES = ByteTokenizer()


@cache
def _samples(name: str, settings: str) -> list[Sample]:
    return list(build_benchmark(name, json.loads(settings)).samples(BYTES))


def samples_of(name: str, settings: dict[str, Any]) -> list[Sample]:
    """Remembered, since every test below wants the same ones."""
    return _samples(name, json.dumps(settings))


def likelihood(nats: float, tokens: int = 1, greedy: bool = True) -> Likelihood:
    return Likelihood(total=nats, tokens=tokens, greedy=greedy)


class BenchmarkConformance:
    """Subclass it, name the benchmark, and give settings that make a few samples."""

    NAME: ClassVar[str]
    SETTINGS: ClassVar[dict[str, Any]] = {}
    WIDER: ClassVar[dict[str, Any]] = {}
    """Settings on top of SETTINGS that add lengths, trials or rows."""

    SEEDED: ClassVar[bool] = True
    """False where the samples are a file's rows, which no seed changes."""

    SLACK: ClassVar[int | None] = 40
    """Tokens a prompt may stay below its length class, the longest word being 35 bytes; None where the length is a
    class of the data's own."""

    BEST: ClassVar[float] = 1.0
    WORST: ClassVar[float] = 0.0

    def perfect(self, sample: Sample) -> Completion:
        return Completion(text=" " + sample.targets[0])

    def empty(self, sample: Sample) -> Completion:
        return Completion(text="")

    def build(self, **more: Any) -> Benchmark:
        return build_benchmark(self.NAME, self.SETTINGS | more)

    @property
    def samples(self) -> list[Sample]:
        return samples_of(self.NAME, self.SETTINGS)

    def test_same_settings_give_the_same_samples(self) -> None:
        assert list(self.build().samples(BYTES)) == self.samples

    def test_another_seed_gives_other_prompts(self) -> None:
        if not self.SEEDED:
            pytest.skip("the samples are a file's rows")
        other = samples_of(self.NAME, self.SETTINGS | {"seed": 1})
        assert {s.prompt_ids for s in other} != {s.prompt_ids for s in self.samples}
        assert not {s.id for s in other} & {s.id for s in self.samples}

    def test_ids_are_unique(self) -> None:
        assert self.samples
        assert len({sample.id for sample in self.samples}) == len(self.samples)

    def test_prompts_fit_their_length(self) -> None:
        for sample in self.samples:
            used = len(sample.prompt_ids) + self.reserved(sample)
            assert sample.prompt_ids or sample.kind == "likelihood"
            if self.SLACK is not None:
                assert sample.length - self.SLACK <= used <= sample.length, sample.id

    def reserved(self, sample: Sample) -> int:
        """Tokens of the length that are kept free for the answer or the target."""
        return 0

    def test_a_perfect_answer_scores_best_and_an_empty_one_worst(self) -> None:
        benchmark = self.build()
        for sample in self.samples:
            assert benchmark.score(self.perfect(sample), sample) == pytest.approx(self.BEST), sample.id
            assert benchmark.score(self.empty(sample), sample) == pytest.approx(self.WORST), sample.id

    def test_widening_keeps_every_older_sample(self) -> None:
        if not self.WIDER:
            pytest.skip("nothing to widen")
        wider = {sample.id: sample for sample in samples_of(self.NAME, self.SETTINGS | self.WIDER)}
        assert len(wider) > len(self.samples)
        assert all(wider[sample.id] == sample for sample in self.samples)

    def test_documents_part_the_samples(self) -> None:
        assert len({sample.document for sample in self.samples}) > 1

    def test_search_and_held_out_share_no_document(self) -> None:
        split = build_samples({"task": self.build()}, BYTES, heldout=0.5, seed=0)
        on = {side: {entry.document for entry in split.of_split(side)} for side in ("search", "heldout")}
        assert on["search"] and on["heldout"] and not on["search"] & on["heldout"]
        if self.WIDER:  # a document keeps its side
            wider = build_samples({"task": self.build(**self.WIDER)}, BYTES, heldout=0.5, seed=0, assigned=sides(split))
            assert sides(split).items() <= sides(wider).items()

    def test_samples_are_plain_data(self) -> None:
        for sample in self.samples:
            assert json.loads(json.dumps(dict(sample.meta))) == dict(sample.meta)
            assert (sample.kind == "generate") == (sample.max_new_tokens > 0)
            assert sample.targets if sample.kind == "generate" else sample.target_ids
            assert sample.depth is None or 0.0 <= sample.depth <= 1.0

    def test_summary_and_provenance_are_plain_data(self) -> None:
        benchmark = self.build()
        scores = [benchmark.score(self.perfect(sample), sample) for sample in self.samples]
        summary = benchmark.summary(self.samples, scores)
        assert all(isinstance(value, int | float) for value in summary.values())
        json.dumps(dict(benchmark.provenance()))

    def test_an_unknown_setting_is_refused_with_a_hint(self) -> None:
        with pytest.raises(UserError, match=r"no setting of benchmark .*did you mean 'seed'"):
            self.build(sead=1)
