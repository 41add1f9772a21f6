"""SQuAD v2 questions that have an answer, from the official JSON file or from the hub's flat rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from statespan.benchmarks.catalog import locate
from statespan.benchmarks.records import Row, read_document, read_rows
from statespan.errors import UserError

Text = Annotated[str, Field(min_length=1)]


class Answer(Row):
    text: Text


class Question(Row):
    id: Text
    question: Text
    answers: list[Answer]


class Paragraph(Row):
    context: Text
    qas: list[Question]


class Article(Row):
    title: Text
    paragraphs: list[Paragraph]


class Squad(Row):
    data: list[Article]


class FlatAnswers(Row):
    text: list[Text]


class FlatQuestion(Row):
    id: Text
    title: Text
    context: Text
    question: Text
    answers: FlatAnswers


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, the paragraph that answers it, and the article it is from."""

    id: str
    title: str
    paragraph: str
    question: str
    answers: tuple[str, ...]


def read_squad(data_root: str | None) -> tuple[Asked, ...]:
    """Answerable questions in the file's order."""
    (path,) = locate("squad", data_root)
    found = _read(path, path.stat().st_mtime_ns)
    if not found:
        raise UserError(f"{path} holds no question that has an answer")
    return found


@lru_cache(maxsize=2)
def _read(path: Path, mtime_ns: int) -> tuple[Asked, ...]:
    if path.suffix != ".json":
        flat = read_rows(path, FlatQuestion)
        asked = [Asked(row.id, row.title, row.context, row.question, tuple(row.answers.text)) for row in flat]
    else:
        asked = [
            Asked(q.id, article.title, paragraph.context, q.question, tuple(answer.text for answer in q.answers))
            for article in read_document(path, Squad).data
            for paragraph in article.paragraphs
            for q in paragraph.qas
        ]
    return tuple(question for question in asked if question.answers)
