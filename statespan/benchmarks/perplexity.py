"""Perplexity by context length: the last k tokens of a window of a long text, given all tokens before them.

Two rules say where windows lie.

`clean`: every length scores the *same* tokens. Targets are spread over each book (van der Corput points, so that
asking for more keeps the old ones); a window of length W is a target and the W - k tokens before it. A curve over W
then shows what more context does, and nothing else.

`as_published`: the PG-19 rule of DeciMamba and LongMamba (assafbk/DeciMamba@6290e95, GATECH-EIC/LongMamba@5da3e17).
A book of S tokens gives windows at 0, step, 2 step, ... below S - W with step = max(10, (S - W) // 10): normally 11
of them, none where S <= W. Window NLL is the mean over its last 100 tokens; perplexity is exp of the mean over all
windows of all books. Its flaw by name, `shrinking_books`: longer windows come from fewer books, so the curve mixes
length with choice of book; `fixed_books: true` keeps only books that are longer than the longest window.

One sample: prompt_ids are tokens [end - W, end - k) of Emma, target_ids its tokens [end - k, end).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from statespan.benchmarks.base import Completion, Sample, Tokenizer
from statespan.benchmarks.books import Book, read_books
from statespan.benchmarks.settings import Lengths, Settings
from statespan.errors import UserError


class Perplexity(Settings):
    """Sliding windows over held-out long texts; the score is minus nats per token."""

    name: ClassVar[str] = "perplexity"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "minus nats per token"

    variant: Literal["clean", "as_published"] = "clean"
    """Where windows lie: `clean` scores the same tokens at every length; `as_published` is the papers' PG-19 rule."""

    lengths: Lengths = (1_024, 2_048, 4_096, 8_192)
    """Window lengths in tokens, the scored ones included."""

    scored_tokens: Annotated[int, Field(ge=1, le=65_536)] = 100
    """How many tokens at each window's end are scored."""

    windows: Annotated[int, Field(ge=1, le=1_000)] = 10
    """`clean`: targets a book. `as_published`: the divisor of the step (10 in the papers, which gives 11 windows)."""

    books: str = "novels"
    """`novels`: the held-out public-domain novels that ship; `pg19`: your copy below data_root; or a .txt, .jsonl or
    .parquet file, or a folder of such files."""

    data_root: str | None = None
    """The folder with your data sets (docs/data.md); the environment variable STATESPAN_DATA where not given."""

    fixed_books: bool | None = None
    """Keep only books (`as_published`) or targets (`clean`) that every length can use. Where not given: yes for
    `clean`, no for `as_published`."""

    @model_validator(mode="after")
    def _windows_hold_their_targets(self) -> Perplexity:
        shortest = min(self.lengths, default=0)
        if shortest <= self.scored_tokens:
            raise ValueError(f"lengths must be longer than scored_tokens ({self.scored_tokens})")
        return self

    @property
    def scope(self) -> Literal["prefix", "window"]:
        """The papers' methods act on the scored tokens too."""
        return "window" if self.variant == "as_published" else "prefix"

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        found = False
        for book in read_books(self.books, self.data_root):
            ids = tokenizer.encode(book.text)
            for length in self.lengths:
                for end in self._ends(len(ids), length):
                    found = True
                    yield self._sample(book, ids, length, end, tokenizer)
        if not found:
            raise UserError(
                f"perplexity: no book in {self.books!r} is longer than {max(self.lengths):,} tokens; "
                "give shorter lengths, longer books, or fixed_books: false"
            )

    def _ends(self, book_tokens: int, length: int) -> list[int]:
        fixed = self.variant == "clean" if self.fixed_books is None else self.fixed_books
        longest = max(self.lengths) if fixed else length
        if self.variant == "as_published":
            if book_tokens <= longest:
                return []
            step = max(10, (book_tokens - length) // self.windows)
            return [start + length for start in range(0, book_tokens - length, step)]
        room = book_tokens - self.scored_tokens
        ends = {self.scored_tokens + int(_van_der_corput(i + 1) * room) for i in range(self.windows)}
        return sorted(end for end in ends if end >= longest)

    def _sample(self, book: Book, ids: list[int], length: int, end: int, tokenizer: Tokenizer) -> Sample:
        target = tuple(ids[end - self.scored_tokens : end])
        text = tokenizer.decode(target)
        meta = {"book": book.name, "bytes": len(text.encode()), "words": len(text.split()), "tokens": len(target)}
        return Sample(
            id=f"{self.name}-{self.variant}-{book.name}-{length}-{end}-{self.scored_tokens}",
            prompt_ids=tuple(ids[end - length : end - self.scored_tokens]),
            kind="likelihood",
            # windows on one target are one observation; windows of the published rule overlap all over the book
            document=f"{book.name}@{end}" if self.variant == "clean" else book.name,
            length=length,
            target_ids=(target,),
            meta=meta,
        )

    def score(self, completion: Completion, sample: Sample) -> float:
        likelihood = completion.likelihoods[0]
        return likelihood.total / likelihood.tokens

    def summary(self, samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
        """Per length: token and word perplexity, bits per byte, and how many books and windows they come from."""
        out: dict[str, float] = {}
        for length in sorted({sample.length for sample in samples}):
            rows = [(s, score) for s, score in zip(samples, scores, strict=True) if s.length == length]
            nats = -sum(score * s.meta["tokens"] for s, score in rows)
            out[f"perplexity@{length}"] = math.exp(-self.aggregate([score for _, score in rows]))
            out[f"word_perplexity@{length}"] = math.exp(nats / max(sum(s.meta["words"] for s, _ in rows), 1))
            out[f"bits_per_byte@{length}"] = nats / math.log(2) / max(sum(s.meta["bytes"] for s, _ in rows), 1)
            out[f"books@{length}"] = len({s.meta["book"] for s, _ in rows})
            out[f"windows@{length}"] = len(rows)
        return out

    def provenance(self) -> Mapping[str, Any]:
        return {"books": [book.provenance() for book in read_books(self.books, self.data_root)]}


def _van_der_corput(index: int) -> float:
    """0.5, 0.25, 0.75, 0.125, ...: fills (0, 1) evenly, each longer list beginning with the shorter one."""
    value, weight = 0.0, 0.5
    while index:
        index, bit = divmod(index, 2)
        value += bit * weight
        weight /= 2
    return value
