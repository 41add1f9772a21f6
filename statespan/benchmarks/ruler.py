"""RULER: thirteen tasks of retrieval, tracing, counting and question answering, at any length (arXiv:2404.06654).

Tasks, haystacks, counts and scores are those of NVIDIA/RULER@c3f5e3b; the wording is ours, so scores are comparable
among models and methods here, and not with published ones. A length counts the prompt and the answer's tokens. Eleven
tasks are generated from nothing; the five with running text read it from `moby_dick`, where RULER has Paul Graham's
essays; qa_1 and qa_2 need SQuAD v2 and HotpotQA below data_root.

`as_published` changes, by name:
`coarse_fit`: samples are sized in RULER's large steps (ruler_published.py), not bisected one by one.
`same_essay`: every sample's running text starts at the book's first word; ours starts in another place each time.
`no_stop`: the model writes on to its last token; ours stops it at a newline, since a cue asks for one line.

One sample of niah_multikey_1, haystack cut short:

    Some special magic numbers are hidden in the text below. Remember them.

    Call me Ishmael. ... The special magic number for calm-lamp is: 4120937. ... the flood-gates of the wonder-world ...

    Question: What is the special magic number for calm-lamp?
    Answer: The special magic number for calm-lamp is:                                          -> 4120937
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from statespan.benchmarks.base import Completion, Sample, Tokenizer
from statespan.benchmarks.books import read_books, read_haystack
from statespan.benchmarks.catalog import locate
from statespan.benchmarks.metrics import ruler_all, ruler_cleaned, ruler_part
from statespan.benchmarks.puzzle import Puzzle, Sized, size_to_fit
from statespan.benchmarks.records import provenance
from statespan.benchmarks.ruler_lists import common_words_puzzle, frequent_words_puzzle, tracking_puzzle
from statespan.benchmarks.ruler_needles import NEEDLE_TASKS, needle_puzzle
from statespan.benchmarks.ruler_published import published_units, size_as_published
from statespan.benchmarks.ruler_qa import qa_items, qa_puzzle
from statespan.benchmarks.settings import Lengths, Settings
from statespan.errors import UserError

Task = Literal[
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
]  # fmt: skip
NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
NEEDLE_NEW_TOKENS = 128
GENERATED: tuple[Task, ...] = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe",
)  # fmt: skip
EFFECTIVE = 0.856
"""Llama-2-7B's mean at 4k: a length counts as effective where a model is no worse (RULER's leaderboard)."""


class Ruler(Settings):
    """RULER's tasks by length; the score is the share of the wanted strings found in the answer."""

    name: ClassVar[str] = "ruler"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "recall"
    group_by: ClassVar[tuple[str, ...]] = ("task", "length")

    variant: Literal["clean", "as_published"] = "clean"
    """`as_published` sizes, starts and ends samples as NVIDIA's scripts do."""

    tasks: tuple[Task, ...] = GENERATED
    """Which tasks. qa_1 and qa_2 need data; all thirteen make the published mean."""

    lengths: Lengths = (1_024, 2_048, 4_096)
    """Tokens of prompt and answer together. Published: 4,096 to 131,072."""

    trials: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Samples for each task and length. Published: 500."""

    examples: bool = True
    """Put RULER's worked example before vt and cwe prompts. It takes 500 tokens and more at 4,096 and above, some 150
    to 300 below."""

    haystack: str = "moby_dick"
    """Running text for five of the needle tasks: a text as in `perplexity.books`."""

    data_root: str | None = None
    """The folder with your data sets (docs/data.md); the environment variable STATESPAN_DATA where not given."""

    @model_validator(mode="after")
    def _tasks_come_once(self) -> Ruler:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks must name at least one task, and each once")
        return self

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        for task in self.tasks:
            for length in self.lengths:
                units = None
                for trial in range(self.trials):
                    sample, units = self._sample(tokenizer, task, length, trial, units)
                    yield sample

    def _sample(
        self, tokenizer: Tokenizer, task: Task, length: int, trial: int, units: int | None
    ) -> tuple[Sample, int | None]:
        """The sample, and the units that the published rule settled on for this task and length."""
        puzzle, document = self._puzzle(task, length, trial)
        new_tokens = NEW_TOKENS.get(task, NEEDLE_NEW_TOKENS)
        limit, what = length - new_tokens, f"ruler.{task} at length {length}"
        if limit <= 0:
            raise UserError(f"{what}: the answer alone may have {new_tokens} tokens")
        if self.variant == "clean":
            prompt = size_to_fit(puzzle, tokenizer, limit, what)
        else:
            units = units or published_units(puzzle, tokenizer, limit, new_tokens)
            prompt = size_as_published(puzzle, tokenizer, limit, units, what)
        return self._made(task, length, trial, puzzle, prompt, document), units

    def _puzzle(self, task: Task, length: int, trial: int) -> tuple[Puzzle, str]:
        """The puzzle and the document it is clustered by."""
        rng, own = self.rng(task, length, trial), f"{task}-{length}-{trial}"
        if task in ("qa_1", "qa_2"):
            items, pool = qa_items(task, self.data_root)
            if trial >= len(items):
                raise UserError(f"ruler.{task} has {len(items)} questions; ask for no more trials than that")
            return qa_puzzle(items[trial], pool, rng), items[trial].document
        if task == "vt":
            return tracking_puzzle(rng, length, examples=self.examples), own
        if task == "cwe":
            return common_words_puzzle(rng, length, examples=self.examples), own
        if task == "fwe":
            return frequent_words_puzzle(rng, length), own
        kind = NEEDLE_TASKS[task]
        if kind.haystack != "essay":
            return needle_puzzle(kind, rng, length, None, 0), own
        essay = read_haystack(self.haystack, self.data_root)
        if self.variant == "as_published":
            return needle_puzzle(kind, rng, length, essay, 0), own
        segment = self.segment(trial, task, length)
        return needle_puzzle(kind, rng, length, essay, essay.start_in(segment, rng)), f"{essay.name}#{segment}"

    def _made(self, task: Task, length: int, trial: int, puzzle: Puzzle, prompt: Sized, document: str) -> Sample:
        return Sample(
            id=f"ruler-{self.variant}-{task}-s{self.seed}-{length}-{trial}",
            prompt_ids=prompt.ids,
            kind="generate",
            document=document,
            length=length,
            targets=puzzle.answers,
            max_new_tokens=NEW_TOKENS.get(task, NEEDLE_NEW_TOKENS),
            stop=("\n",) if self.variant == "clean" else (),
            depth=puzzle.depth,
            meta={"task": task, "units": prompt.units, "needle_tokens": [list(span) for span in prompt.hidden]},
        )

    def score(self, completion: Completion, sample: Sample) -> float:
        rule = ruler_part if sample.meta["task"].startswith("qa_") else ruler_all
        return rule(ruler_cleaned(completion.text), sample.targets)

    def summary(self, samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
        """Each task's mean by length, their unweighted mean, the effective length and the two weighted averages."""
        cells: dict[tuple[str, int], list[float]] = {}
        for sample, score in zip(samples, scores, strict=True):
            cells.setdefault((sample.meta["task"], sample.length), []).append(score)
        means = {cell: self.aggregate(found) for cell, found in cells.items()}
        lengths = sorted({length for _, length in means})
        overall = [self.aggregate([mean for (_, at), mean in means.items() if at == length]) for length in lengths]
        return {
            **{f"{task}@{length}": mean for (task, length), mean in means.items()},
            **{f"mean@{length}": mean for length, mean in zip(lengths, overall, strict=True)},
            **headline(lengths, overall),
        }

    def provenance(self) -> Mapping[str, Any]:
        out: dict[str, Any] = {}
        if any(task in NEEDLE_TASKS and NEEDLE_TASKS[task].haystack == "essay" for task in self.tasks):
            out["haystack"] = [book.provenance() for book in read_books(self.haystack, self.data_root)]
        for task, data_set in (("qa_1", "squad"), ("qa_2", "hotpotqa")):
            if task in self.tasks:
                rows = len(qa_items(task, self.data_root)[0])
                out[data_set] = [provenance(path) | {"rows": rows} for path in locate(data_set, self.data_root)]
        return out


def headline(lengths: Sequence[int], means: Sequence[float]) -> dict[str, float]:
    """Effective length (the longest with a mean of 85.6 % or more; NaN where there is none) and the averages whose
    weights rise and fall linearly with the length's rank."""

    def weighted(weights: Iterable[int]) -> float:
        pairs = list(zip(weights, means, strict=True))
        return sum(w * m for w, m in pairs) / sum(w for w, _ in pairs) if pairs else float("nan")

    rising = range(1, len(lengths) + 1)
    effective = [length for length, mean in zip(lengths, means, strict=True) if mean >= EFFECTIVE]
    return {
        "effective_length": max(effective, default=float("nan")),
        "weighted_increasing": weighted(rising),
        "weighted_decreasing": weighted(reversed(rising)),
    }
