"""Which of many documents answers the question? DeciMamba's multi-document retrieval on SQuAD v2.

After assafbk/DeciMamba@6290e95 (finetune_ssm.py, squad_retrieve). The question's paragraph is hidden among N others;
the question stands before every one of them, and each has a random number of up to three digits, which is the
answer. SQuAD is read from data_root.

`as_published` has, by name:
`second_gold`: noise is drawn from question rows, so a paragraph may come twice, and the gold one may be among the
noise.
`shared_noise`: the noise of query i is the rows i N to i N + N of one fixed order, which starts again for every N.
`cue_space`: the prompt ends in a space, which a BPE model rarely sees before a number.
`clean` takes different paragraphs, drawn anew for every sample, and ends without the space. The published orders are
pickled in its repository; ours are drawn from the seed.

One sample:
    <|Query|> Who built the clock? <|Document 517|> The harbour clock was ... <|Query|> Who built the clock?
    <|Document 31|> Moss gardens need ... <|Answer|> <|Document
        -> 517|>
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from statespan.benchmarks.base import Completion, Sample, Tokenizer
from statespan.benchmarks.catalog import locate
from statespan.benchmarks.records import provenance
from statespan.benchmarks.settings import Settings
from statespan.benchmarks.squad import Asked, read_squad
from statespan.errors import UserError

NUMBERS = 1_000
Count = Annotated[int, Field(ge=1, lt=NUMBERS)]


class DocumentRetrieval(Settings):
    """Name the document that answers a question; the score is 1 for its number."""

    name: ClassVar[str] = "document_retrieval"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"
    group_by: ClassVar[tuple[str, ...]] = ("documents",)

    variant: Literal["clean", "as_published"] = "clean"
    """`as_published` repeats paragraphs and ends in a space: see the head of document_retrieval.py."""

    documents: Annotated[tuple[Count, ...], Field(min_length=1)] = (10, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200)
    """Noise documents beside the right one. The published grid goes on to 300; its models were trained on 11."""

    queries: Annotated[int, Field(ge=1)] = 100
    """Questions for each number of documents, drawn from the data set."""

    data_root: str | None = None
    """The folder with your data sets (docs/data.md); the environment variable STATESPAN_DATA where not given."""

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        asked = read_squad(self.data_root)
        if self.queries > len(asked):
            raise UserError(f"document_retrieval: {self.queries} queries asked for; the data hold {len(asked)}")
        order = list(range(len(asked)))
        self.rng("queries").shuffle(order)
        for count in self.documents:
            for query in range(self.queries):
                yield self._sample(tokenizer, asked, order[query], query, count)

    def _sample(self, tokenizer: Tokenizer, asked: Sequence[Asked], row: int, query: int, count: int) -> Sample:
        rng, gold = self.rng(count, query), asked[row]
        noise = self._noise(asked, gold, query, count, rng)
        shown = [*noise]
        place = rng.randrange(count + 1)
        shown.insert(place, gold.paragraph)
        numbers = rng.sample(range(NUMBERS), count + 1)
        text = " ".join(
            f"<|Query|> {gold.question} <|Document {number}|> {paragraph}"
            for number, paragraph in zip(numbers, shown, strict=True)
        )
        cue = "<|Answer|> <|Document" + (" " if self.variant == "as_published" else "")
        ids = tokenizer.encode(f"{text} {cue}")
        return Sample(
            id=f"document_retrieval-{self.variant}-s{self.seed}-{count}-{gold.id}",
            prompt_ids=tuple(ids),
            kind="generate",
            document=gold.title,
            length=1 << (len(ids) - 1).bit_length(),
            targets=(str(numbers[place]),),
            max_new_tokens=10,
            stop=() if self.variant == "as_published" else ("|>",),
            depth=place / count,
            meta={"documents": count},
        )

    def _noise(self, asked: Sequence[Asked], gold: Asked, query: int, count: int, rng: Random) -> list[str]:
        if self.variant == "as_published":
            order = list(range(len(asked)))
            self.rng("noise").shuffle(order)
            return [asked[order[(query * count + i) % len(order)]].paragraph for i in range(count)]
        others = list(dict.fromkeys(q.paragraph for q in asked if q.paragraph != gold.paragraph))
        if count > len(others):
            raise UserError(f"document_retrieval: {count} documents asked for; the data hold {len(others)} others")
        return rng.sample(others, count)

    def score(self, completion: Completion, sample: Sample) -> float:
        number = completion.text.partition("|>")[0]
        return float((number if self.variant == "as_published" else number.strip()) == sample.targets[0])

    def provenance(self) -> Mapping[str, Any]:
        rows = len(read_squad(self.data_root))
        return {"squad": [provenance(path) | {"rows": rows} for path in locate("squad", self.data_root)]}
