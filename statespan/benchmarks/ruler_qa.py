"""RULER's question answering: the paragraphs that answer a question, among numbered paragraphs that do not.

After NVIDIA/RULER@c3f5e3b, scripts/data/synthetic/qa.py: qa_1 is SQuAD v2 (dev, answerable questions), qa_2 HotpotQA
(dev, distractor setting). Sample i asks the data set's question i; for SQuAD the other paragraphs of the same
article come first among the distractors. Ours differs: a paragraph comes once however many questions it has, so the
gold one is never a distractor too. The data are read from data_root; the words of instruction are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import Field

from statespan.benchmarks import needles as wording
from statespan.benchmarks.catalog import locate
from statespan.benchmarks.puzzle import Puzzle
from statespan.benchmarks.records import Row, read_rows
from statespan.benchmarks.squad import Text, read_squad

INTRO = "Answer the question from the documents below, in as few words as you can."
DOCUMENT = "Document {number}:\n{text}"


@dataclass(frozen=True, slots=True)
class QaItem:
    id: str
    document: str
    """What its samples are clustered by: the article, or the question itself."""

    question: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    near: tuple[str, ...]
    """Distractors that come first."""


class Hotpot(Row):
    id: Annotated[str, Field(alias="_id", min_length=1)]
    question: Text
    answer: Text
    context: Annotated[list[Annotated[tuple[str, list[str]], Field(strict=False)]], Field(min_length=1)]
    """(title, sentences) of ten paragraphs, two of them gold."""


def qa_items(task: str, data_root: str | None) -> tuple[tuple[QaItem, ...], tuple[str, ...]]:
    """The questions in the file's order, and every paragraph once."""
    if task == "qa_1":
        return _squad_items(data_root)
    (path,) = locate("hotpotqa", data_root)
    return _hotpot_items(path, path.stat().st_mtime_ns)


def _squad_items(data_root: str | None) -> tuple[tuple[QaItem, ...], tuple[str, ...]]:
    asked = read_squad(data_root)
    articles: dict[str, dict[str, None]] = {}
    for question in asked:
        articles.setdefault(question.title, {})[question.paragraph] = None
    items = (
        QaItem(
            q.id,
            q.title,
            q.question,
            q.answers,
            (q.paragraph,),
            tuple(p for p in articles[q.title] if p != q.paragraph),
        )
        for q in asked
    )
    return tuple(items), tuple(dict.fromkeys(question.paragraph for question in asked))


@lru_cache(maxsize=2)
def _hotpot_items(path: Path, mtime_ns: int) -> tuple[tuple[QaItem, ...], tuple[str, ...]]:
    rows = read_rows(path, Hotpot)
    paragraphs = [tuple(f"{title}\n{''.join(sentences)}" for title, sentences in row.context) for row in rows]
    items = (
        QaItem(row.id, row.id, row.question, (row.answer,), own, ()) for row, own in zip(rows, paragraphs, strict=True)
    )
    return tuple(items), tuple(dict.fromkeys(paragraph for own in paragraphs for paragraph in own))


def qa_puzzle(item: QaItem, pool: Sequence[str], rng: Random) -> Puzzle:
    """Units are documents, the gold ones included."""
    near, own = list(item.near), {*item.gold, *item.near}
    far = [paragraph for paragraph in pool if paragraph not in own]
    rng.shuffle(near)
    rng.shuffle(far)
    others, order_seed = near + far, rng.getrandbits(64)

    def render(units: int) -> str:
        shown = [*item.gold, *others[: units - len(item.gold)]]
        Random(order_seed).shuffle(shown)
        text = "\n\n".join(DOCUMENT.format(number=n, text=paragraph) for n, paragraph in enumerate(shown, start=1))
        return wording.prompt(INTRO, text, item.question, "")

    gold = len(item.gold)
    return Puzzle(render=render, answers=item.answers, hidden=item.gold, least=gold, most=gold + len(others), step=10)
