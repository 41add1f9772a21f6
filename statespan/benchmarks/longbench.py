"""LongBench (21 data sets) and LongBench-E (13 of them, by length), arXiv:2308.14508, scored as published.

Rows come from longbench/data/ below data_root; prompts are the official ones where longbench/config/ holds them, ours
otherwise (longbench_tasks.py). Three protocols say what else a published number depends on; none of their numbers is
comparable with another's:

`official`: prompts longer than max_length tokens (3,500, for a 4k model) lose their middle; samsum stops at a newline,
which may not be the first thing it writes.
`remamba` (lblankl/ReMamba@cb127bc): the same with 5,500 tokens; a data set's figure is the mean of its three length
buckets.
`longmamba` (GATECH-EIC/LongMamba@5da3e17): nothing is cut, samsum runs on, and the figure is the mean over all rows.

Flaws as published, by name (`scoring: clean` mends the first):
`skipped_labels`: classification keeps labels it means to drop, so a right answer may score 0.5 (metrics.py).
`rouge_overflow`: ROUGE is 0 where its package overflows Python's stack; off unless asked for, and never needed for the
published prediction files.
`difflib`: code similarity depends on the matcher installed with fuzzywuzzy; published numbers are difflib's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from statespan.benchmarks import longbench_tasks
from statespan.benchmarks.base import Completion, Sample, Tokenizer
from statespan.benchmarks.longbench_data import BUCKETS, LongBenchRow, Prompts, read_prompts, rows_of, rows_path
from statespan.benchmarks.longbench_tasks import TASKS, ScoreOptions
from statespan.benchmarks.metrics import require_jieba
from statespan.benchmarks.records import provenance
from statespan.benchmarks.settings import Length, Settings
from statespan.benchmarks.truncate import truncated_in_the_middle
from statespan.errors import unknown

EXTENDED = tuple(name for name, task in TASKS.items() if task.extended)
PYTHON_STACK = 980
"""Calls that are left of Python's 1,000 when the rouge package begins to recurse."""


class LongBench(Settings):
    """LongBench or LongBench-E from your copy of the data; the score is the data set's own metric, 0 to 1."""

    name: ClassVar[str] = "longbench"
    version: ClassVar[int] = 2
    metric: ClassVar[str] = "score"
    group_by: ClassVar[tuple[str, ...]] = ("dataset", "bucket")

    extended: bool = True
    """LongBench-E: 13 English data sets, balanced over three lengths. No: the 21 of LongBench."""

    datasets: tuple[str, ...] | None = None
    """Which data sets; all of them where not given."""

    protocol: Literal["official", "remamba", "longmamba"] = "official"
    """Truncation, samsum's stop and what the headline averages: see the head of longbench.py."""

    max_length: Length | None = None
    """Tokens a prompt may have before its middle is cut out. Where not given: the protocol's."""

    prompts: Literal["auto", "official", "own"] = "auto"
    """`auto`: official where longbench/config/ below data_root has them, our own otherwise."""

    rows: Annotated[int, Field(ge=1)] | None = None
    """The first so many rows of each bucket of each data set; all of them where not given."""

    scoring: Literal["as_published", "clean"] = "as_published"
    """`clean` counts only the labels that classification means to count."""

    rouge_overflow: bool = False
    """Score 0 where the rouge package would overflow Python's stack."""

    matcher: Literal["difflib", "levenshtein"] = "difflib"
    """Behind code similarity; published numbers are difflib's."""

    data_root: str | None = None
    """The folder with your data sets (docs/data.md); the environment variable STATESPAN_DATA where not given."""

    @model_validator(mode="after")
    def _names_are_known(self) -> LongBench:
        known = EXTENDED if self.extended else tuple(TASKS)
        for name in self.datasets or ():
            if name not in known:
                raise unknown("LongBench-E data set" if self.extended else "LongBench data set", name, known)
        return self

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        chinese = [name for name in self._names() if TASKS[name].metric in ("qa_f1_zh", "rouge_zh")]
        if chinese:
            require_jieba(f"longbench.datasets {', '.join(chinese)}")
        prompts = read_prompts(self.prompts, self._names(), self.data_root)
        for name in self._names():
            taken = dict.fromkeys(BUCKETS, 0)
            for row in rows_of(name, self.extended, self.data_root):
                taken[row.bucket] += 1
                if self.rows is None or taken[row.bucket] <= self.rows:
                    yield self._sample(tokenizer, name, row, prompts)

    def _names(self) -> tuple[str, ...]:
        return self.datasets or (EXTENDED if self.extended else tuple(TASKS))

    def _sample(self, tokenizer: Tokenizer, name: str, row: LongBenchRow, prompts: Prompts) -> Sample:
        limit, stops = self._limit(), name == "samsum" and self.protocol != "longmamba"
        ids = truncated_in_the_middle(prompts.fill(name, row), limit, tokenizer)
        file = f"{name}_e" if self.extended else name
        context = hashlib.sha256(row.context.encode()).hexdigest()[:12]
        return Sample(
            id=f"longbench-{self.protocol}-{limit}-{prompts.kind}-{file}-{row.id}",
            prompt_ids=tuple(ids),
            kind="generate",
            document=f"{name}-{context}",  # several questions may be asked about one text
            length=1 << (len(ids) - 1).bit_length(),
            targets=tuple(row.answers),
            max_new_tokens=prompts.new_tokens[name],
            stop=("\n",) if stops else (),
            meta={
                "dataset": name,
                "bucket": row.bucket,
                "prompts": prompts.kind,
                "classes": list(row.all_classes or ()),
                **({"min_new_tokens": 1} if stops else {}),
            },
        )

    def _limit(self) -> int | None:
        return self.max_length or {"official": 3_500, "remamba": 5_500, "longmamba": None}[self.protocol]

    def score(self, completion: Completion, sample: Sample) -> float:
        options = ScoreOptions(
            clean_classes=self.scoring == "clean",
            matcher=self.matcher,
            recursion_limit=PYTHON_STACK if self.rouge_overflow else None,
        )
        task = TASKS[sample.meta["dataset"]]
        return longbench_tasks.score(task, completion.text, sample.targets, sample.meta["classes"], options)

    def summary(self, samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
        return longbench_summary(
            [(s.meta["dataset"], s.meta["bucket"], score) for s, score in zip(samples, scores, strict=True)],
            by_bucket=self.extended and self.protocol != "longmamba",
        )

    def provenance(self) -> Mapping[str, Any]:
        prompts = read_prompts(self.prompts, self._names(), self.data_root)
        out: dict[str, Any] = {"prompts": prompts.kind, "prompt_files": [provenance(path) for path in prompts.files]}
        for name in self._names():
            rows = len(rows_of(name, self.extended, self.data_root))
            out[name] = provenance(rows_path(name, self.extended, self.data_root)) | {"rows": rows}
        return out


def longbench_summary(rows: Sequence[tuple[str, str, float]], *, by_bucket: bool) -> dict[str, float]:
    """Percentages from (data set, bucket, score), rounded as published: each bucket or data set to two places.

    `headline` is the mean over data sets of the mean of the three buckets (ReMamba), or of the plain mean (LongMamba,
    LongBench). A bucket without rows is NaN, and so is what is averaged over it.
    """
    out: dict[str, float] = {}
    figures = []
    for name in dict.fromkeys(name for name, _, _ in rows):
        own = [(bucket, score) for at, bucket, score in rows if at == name]
        plain = percent([score for _, score in own])
        buckets = [percent([score for at, score in own if at == bucket]) for bucket in BUCKETS]
        out |= {f"{name}/{bucket}": figure for bucket, figure in zip(BUCKETS, buckets, strict=True)}
        out |= {f"{name}/rows": len(own), f"{name}/mean": plain, f"{name}/mean_of_buckets": sum(buckets) / 3}
        figures.append(sum(buckets) / 3 if by_bucket else plain)
    return out | {"headline": sum(figures) / len(figures) if figures else float("nan")}


def percent(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / len(scores), 2) if scores else float("nan")
