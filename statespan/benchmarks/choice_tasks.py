"""Six short multiple-choice tasks, as lm-evaluation-harness 0.4.13 poses them: rows, contexts, choices, right answers.

A choice follows its context after one space. WinoGrande is the odd one: both sentences up to and with the option are
contexts, and the same rest of the sentence is scored after each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from statespan.benchmarks.records import Row
from statespan.benchmarks.squad import Text


@dataclass(frozen=True, slots=True)
class Item:
    contexts: tuple[str, ...]
    """One for all choices, or one a choice."""

    choices: tuple[str, ...]
    """Without the space before them; one a context where contexts differ."""

    right: int


@dataclass(frozen=True, slots=True)
class ChoiceTask:
    data_set: str
    schema: type[Row]
    item: Callable[[Any], Item]
    measure: Literal["acc", "acc_norm"]
    """What papers on Mamba report."""


class HellaSwagRow(Row):
    ctx_a: str
    ctx_b: str
    activity_label: Text
    endings: Annotated[list[str], Field(min_length=4, max_length=4)]
    label: Annotated[str, Field(pattern=r"^[0-3]$")]


class PiqaRow(Row):
    goal: Text
    sol1: str
    sol2: str
    label: Annotated[int, Field(ge=0, le=1)]


class Choices(Row):
    text: Annotated[list[Text], Field(min_length=2)]
    label: Annotated[list[Text], Field(min_length=2)]


class _Lettered(Row):
    choices: Choices
    answerKey: Text

    @model_validator(mode="after")
    def _the_key_is_a_label(self) -> _Lettered:
        if len(self.choices.text) != len(self.choices.label):
            raise ValueError(f"has {len(self.choices.text)} choices and {len(self.choices.label)} labels")
        if self.answerKey.strip() not in self.choices.label:
            raise ValueError(f"answerKey {self.answerKey!r} is none of the labels {', '.join(self.choices.label)}")
        return self

    @property
    def right(self) -> int:
        return self.choices.label.index(self.answerKey.strip())


class ArcRow(_Lettered):
    question: Text


class OpenBookRow(_Lettered):
    question_stem: Text


class WinoGrandeRow(Row):
    sentence: Annotated[str, Field(pattern="_")]
    option1: Text
    option2: Text
    answer: Annotated[str, Field(pattern=r"^[12]$")]


def _hellaswag(row: HellaSwagRow) -> Item:
    context = f"{row.activity_label}: {row.ctx_a} {row.ctx_b.capitalize()}"
    return Item((_cleaned(context),), tuple(_cleaned(ending) for ending in row.endings), int(row.label))


def _cleaned(text: str) -> str:
    """WikiHow's markup: titles become sentences, other brackets go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(row: PiqaRow) -> Item:
    return Item((f"Question: {row.goal}\nAnswer:",), (row.sol1, row.sol2), row.label)


def _arc(row: ArcRow) -> Item:
    return Item((f"Question: {row.question}\nAnswer:",), tuple(row.choices.text), row.right)


def _openbook(row: OpenBookRow) -> Item:
    return Item((row.question_stem,), tuple(row.choices.text), row.right)


def _winogrande(row: WinoGrandeRow) -> Item:
    before, _, after = row.sentence.partition("_")
    options = before + row.option1, before + row.option2
    return Item(options, (after.strip(),) * 2, int(row.answer) - 1)


CHOICE_TASKS = {
    "hellaswag": ChoiceTask("hellaswag", HellaSwagRow, _hellaswag, "acc_norm"),
    "piqa": ChoiceTask("piqa", PiqaRow, _piqa, "acc"),
    "arc_easy": ChoiceTask("arc_easy", ArcRow, _arc, "acc"),
    "arc_challenge": ChoiceTask("arc_challenge", ArcRow, _arc, "acc_norm"),
    "winogrande": ChoiceTask("winogrande", WinoGrandeRow, _winogrande, "acc"),
    "openbookqa": ChoiceTask("openbookqa", OpenBookRow, _openbook, "acc_norm"),
}
