"""Multi-query associative recall: pairs of random tokens, then each key again; what was its value? (arXiv:2312.04927)

Re-implemented from the paper and the facts of HazyResearch/zoology@d88d6f5 (multiquery_ar.py). Keys come from the
lower half of the vocabulary, values from the upper half, both without repeats. After the pairs each key stands once
more, at a gap drawn from a power law over the even slots that are left; all other slots hold random tokens.
Published accuracy is the share of right argmaxes at the repeated keys. Every repeated key is one sample here: its
prompt ends with that key.

No text, no data: token ids are drawn directly, from `vocabulary` ids that skip the first `reserved` (special tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from statespan.benchmarks.base import Completion, Sample, Tokenizer
from statespan.benchmarks.settings import Lengths, Settings
from statespan.errors import UserError


class MQAR(Settings):
    """Associative recall over random tokens; the score is 1 where the value is the most likely next token."""

    name: ClassVar[str] = "mqar"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"
    group_by: ClassVar[tuple[str, ...]] = ("length", "pairs")

    lengths: Lengths = (64, 128, 256, 512)
    """Sequence lengths in tokens."""

    pairs: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (4, 8, 16)
    """Key-value pairs in a sequence; four times as many must fit its length."""

    trials: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Sequences for each length and number of pairs; each gives as many samples as it has pairs."""

    vocabulary: Annotated[int, Field(ge=32)] = 8_192
    """Token ids to draw from, at most the model's own; more than the length."""

    reserved: Annotated[int, Field(ge=0)] = 1
    """The first so many ids are left out: special tokens."""

    power: Annotated[float, Field(gt=0.0, le=10.0)] = 0.01
    """Exponent of the gaps' power law: the smaller, the closer a key follows the pairs."""

    @model_validator(mode="after")
    def _sequences_can_be_built(self) -> MQAR:
        for pairs in self.pairs:
            if 4 * pairs > min(self.lengths):
                raise ValueError(f"{pairs} pairs need lengths of {4 * pairs} or more; got {min(self.lengths)}")
        if self.vocabulary - self.reserved <= max(self.lengths):
            raise ValueError(f"vocabulary must exceed reserved and the longest length ({max(self.lengths)})")
        return self

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        known = getattr(tokenizer, "vocab_size", None)
        if known is not None and self.vocabulary > known:
            raise UserError(f"mqar.vocabulary must be at most the tokenizer's {known} ids; got {self.vocabulary}")
        for length in self.lengths:
            for pairs in self.pairs:
                for trial in range(self.trials):
                    yield from self._sequence(length, pairs, trial)

    def _sequence(self, length: int, pairs: int, trial: int) -> Iterator[Sample]:
        rng = self.rng(length, pairs, trial)
        middle = (self.reserved + self.vocabulary) // 2
        keys = rng.sample(range(self.reserved, middle), pairs)
        values = rng.sample(range(middle, self.vocabulary), pairs)
        ids = [rng.randrange(self.reserved, self.vocabulary) for _ in range(length)]
        for number, pair in enumerate(zip(keys, values, strict=True)):
            ids[2 * number : 2 * number + 2] = pair
        slots = _gaps(rng, (length - 2 * pairs) // 2, pairs, self.power)
        for number, slot in enumerate(slots):
            ids[2 * pairs + 2 * slot] = keys[number]
        for number, slot in enumerate(slots):
            place = 2 * pairs + 2 * slot
            yield Sample(
                id=f"mqar-s{self.seed}-{self.vocabulary}-{self.reserved}-{self.power}-{length}-{pairs}-{trial}-{number}",
                prompt_ids=tuple(ids[: place + 1]),
                kind="likelihood",
                document=f"{length}-{pairs}-{trial}",
                length=length,
                target_ids=((values[number],),),
                depth=2 * number / (place + 1),
                meta={"pairs": pairs, "gap": slot},
            )

    def score(self, completion: Completion, sample: Sample) -> float:
        return float(completion.likelihoods[0].greedy)


def _gaps(rng: Random, slots: int, count: int, power: float) -> list[int]:
    """Different slots, slot g drawn with weight proportional to (g + 1)^(power - 1)."""
    # Efraimidis and Spirakis: the largest u^(1/w) are a draw without replacement with weights w
    weight = [(slot + 1) ** (power - 1.0) for slot in range(slots)]
    ranked = sorted(range(slots), key=lambda slot: rng.random() ** (1.0 / weight[slot]), reverse=True)
    return ranked[:count]
