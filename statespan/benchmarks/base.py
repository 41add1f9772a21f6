"""A benchmark is samples, a score for one completion, and the columns its report groups by. It knows no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol


class Tokenizer(Protocol):
    """What benchmarks need of a tokenizer; `statespan.models.tokenizer.Tokenizer` is one."""

    eos_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question. The prompt is token ids, so that what is hashed, cached and fed is one thing."""

    id: str
    """Stable: the same seed and settings give the same id and the same content."""

    prompt_ids: tuple[int, ...]
    kind: Literal["generate", "likelihood"]
    document: str
    """What samples share when they are not independent (same novel, same haystack): statistics cluster by it, and the
    split into search and held-out never parts it."""

    length: int
    """The length class the report groups by, in tokens; the true length is len(prompt_ids)."""

    targets: tuple[str, ...] = ()
    """Accepted answers of a `generate` sample."""

    target_ids: tuple[tuple[int, ...], ...] = ()
    """Continuations of a `likelihood` sample; each is scored given the prompt, the method acts on the prompt only. Of
    an empty prompt's targets the first token is read and not scored."""

    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    depth: float | None = None
    """Where the answer lies: 0 at the prompt's start, 1 at its end."""

    meta: Mapping[str, Any] = field(default_factory=dict)
    """Columns for the report and facts the scorer needs. JSON types only. Of the first `min_new_tokens` tokens of an
    answer (none where it is not given) none may end it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """The log-probability of one target, in nats, summed over its tokens."""

    total: float
    tokens: int
    greedy: bool
    """True where every target token was the most likely one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a model made of a sample: text for `generate`, one Likelihood a target for `likelihood`."""

    text: str = ""
    ids: tuple[int, ...] = ()
    likelihoods: tuple[Likelihood, ...] = ()


class Benchmark(ABC):
    """Subclasses are pydantic-configured (see passkey.py): their fields are the settings a study file may give."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Raise it whenever the same settings would give other prompts or scores: old results are then not reused."""

    metric: ClassVar[str]
    """What `score` is, for headings: "accuracy", "nats per token" …"""

    group_by: ClassVar[tuple[str, ...]] = ("length",)

    @property
    def scope(self) -> Literal["prefix", "window"]:
        """Where a method acts when a target is scored: on the prompt only, or on prompt and target in one pass with the
        target's positions protected, as DeciMamba's and LongMamba's published perplexities do."""
        return "prefix"

    @abstractmethod
    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """Every sample, in an order that does not depend on anything but the settings and the tokenizer."""

    @abstractmethod
    def score(self, completion: Completion, sample: Sample) -> float:
        """Higher is better. Per-token log-likelihood benchmarks return minus nats per token."""

    def aggregate(self, scores: Sequence[float]) -> float:
        """The figure shown for a group of scores; NaN for none."""
        return sum(scores) / len(scores) if scores else float("nan")

    def summary(self, samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
        """The benchmark's own headline figures (perplexity, effective length, mean of buckets); samples and scores are
        paired. NaN where nothing was measured."""
        return {}

    def provenance(self) -> Mapping[str, Any]:
        """The data the samples come from: path, sha256 and row count of every file read. JSON types only."""
        return {}
