"""The guard: does a method that helps at long contexts hurt at short ones? Six multiple-choice tasks by log-likelihood.

Contexts, tokenisation, ties and normalisation are lm-evaluation-harness 0.4.13's, so that vanilla scores equal its
scores (choice_tasks.py; a test compares them where it is installed). One thing differs, and only for a method: it
acts on the context, never on the choice.

A choice is right where its log-probability is the highest (`acc`), or that divided by its characters (`acc_norm`) or
its UTF-8 bytes (`acc_bytes`); of equal ones the first counts. WinoGrande scores the same text after two contexts:
the prompt is what both have in common, and a context's own tokens are scored and taken off again. Where they have
nothing in common, the option being the first word, the prompt is empty: each context is then read from its own start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from statespan.benchmarks.base import Completion, Sample, Tokenizer
from statespan.benchmarks.catalog import locate
from statespan.benchmarks.choice_tasks import CHOICE_TASKS, Item
from statespan.benchmarks.records import provenance, read_rows
from statespan.benchmarks.settings import Settings
from statespan.errors import UserError

Task = Literal["hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa"]
ALL: tuple[Task, ...] = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa")


class ShortContext(Settings):
    """HellaSwag, PIQA, ARC, WinoGrande and OpenBookQA, zero-shot; the score is accuracy."""

    name: ClassVar[str] = "short_context"
    version: ClassVar[int] = 2
    metric: ClassVar[str] = "accuracy"
    group_by: ClassVar[tuple[str, ...]] = ("task",)

    tasks: tuple[Task, ...] = ALL
    """Which tasks."""

    measure: Literal["published", "acc", "acc_norm", "acc_bytes"] = "published"
    """`published`: acc_norm for HellaSwag, ARC-challenge and OpenBookQA, acc for the others, as papers on Mamba do."""

    rows: Annotated[int, Field(ge=1)] | None = None
    """The first so many rows of each task; all of them where not given."""

    data_root: str | None = None
    """The folder with your data sets (docs/data.md); the environment variable STATESPAN_DATA where not given."""

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        for task in self.tasks:
            found = CHOICE_TASKS[task]
            (path,) = locate(found.data_set, self.data_root)
            for number, row in enumerate(read_rows(path, found.schema)[: self.rows]):
                yield _sample(task, number, found.item(row), tokenizer)

    def score(self, completion: Completion, sample: Sample) -> float:
        totals = [likelihood.total for likelihood in completion.likelihoods]
        if sample.meta["own_contexts"]:
            totals = [whole - context for whole, context in zip(totals[::2], totals[1::2], strict=True)]
        measure = CHOICE_TASKS[sample.meta["task"]].measure if self.measure == "published" else self.measure
        sizes = {"acc": [1] * len(totals), "acc_norm": sample.meta["characters"], "acc_bytes": sample.meta["bytes"]}
        weighed = [total / size for total, size in zip(totals, sizes[measure], strict=True)]
        return float(weighed.index(max(weighed)) == sample.meta["right"])

    def summary(self, samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
        """Accuracy a task, and their unweighted mean."""
        by_task: dict[str, list[float]] = {}
        for sample, score in zip(samples, scores, strict=True):
            by_task.setdefault(sample.meta["task"], []).append(score)
        means = {task: self.aggregate(found) for task, found in by_task.items()}
        return means | {"headline": self.aggregate(list(means.values()))}

    def provenance(self) -> Mapping[str, Any]:
        out: dict[str, Any] = {}
        for task in self.tasks:
            (path,) = locate(CHOICE_TASKS[task].data_set, self.data_root)
            out[task] = provenance(path) | {"rows": len(read_rows(path, CHOICE_TASKS[task].schema))}
        return out


def _sample(task: Task, number: int, item: Item, tokenizer: Tokenizer) -> Sample:
    own = len(item.contexts) > 1
    if own:
        prompt, targets = _common_prompt(item, tokenizer)
    else:
        split = [split_tokens(item.contexts[0], f" {choice}", tokenizer) for choice in item.choices]
        prompt, targets = split[0][0], [target for _, target in split]
    return Sample(
        id=f"short_context-{task}-{number}",
        prompt_ids=tuple(prompt),
        kind="likelihood",
        document=f"{task}-{number}",
        length=1 << (len(prompt or max(targets, key=len)) - 1).bit_length(),
        target_ids=tuple(tuple(target) for target in targets),
        meta={
            "task": task,
            "right": item.right,
            "own_contexts": own,
            "characters": [max(len(choice), 1) for choice in item.choices],
            "bytes": [max(len(choice.encode()), 1) for choice in item.choices],
        },
    )


def split_tokens(context: str, continuation: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Context and continuation as lm-eval tokenises them: together, with the context's trailing spaces on the right
    side, parted where the context alone would end. An empty context is the end-of-text token."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    if not context:
        if tokenizer.eos_id is None:
            raise UserError("short_context: an empty context needs an end-of-text token, and the tokenizer has none")
        return [tokenizer.eos_id], tokenizer.encode(continuation)
    ids = tokenizer.encode(context)
    return ids, tokenizer.encode(context + continuation)[len(ids) :]


def _common_prompt(item: Item, tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """What all contexts share, and for each choice two targets: the rest of its context with and without the choice."""
    split = [
        split_tokens(context, f" {choice}", tokenizer)
        for context, choice in zip(item.contexts, item.choices, strict=True)
    ]
    shared = 0
    limit = min(len(context) for context, _ in split) - 1
    while shared < limit and len({context[shared] for context, _ in split}) == 1:
        shared += 1
    prompt = split[0][0][:shared]
    targets = [part for context, choice in split for part in (context[shared:] + choice, context[shared:])]
    return prompt, targets
