"""RULER's eight needle tasks: keys and values hidden in noise, in running text, or among other needles.

After NVIDIA/RULER@c3f5e3b, scripts/data/synthetic/niah.py and synthetic.yaml. Counts, haystacks, depths and answers are
its own; words and sentences are ours (needles.py). A puzzle's draws never depend on how many units it is asked for, so
that fitting changes its size and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from statespan.benchmarks import needles as wording
from statespan.benchmarks.haystack import Haystack
from statespan.benchmarks.hiding import Needle, context
from statespan.benchmarks.puzzle import Puzzle

SHORT = 4_096
"""Below this length RULER has smaller steps, counts and worked examples."""


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """A needle task of synthetic.yaml: what is hidden where, and how much of it."""

    haystack: Literal["noise", "essay", "needles"]
    key: wording.Kind
    value: wording.Kind
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("noise", "word", "number"),
    "niah_single_2": NeedleTask("essay", "word", "number"),
    "niah_single_3": NeedleTask("essay", "word", "code"),
    "niah_multikey_1": NeedleTask("essay", "word", "number", keys=4),
    "niah_multikey_2": NeedleTask("needles", "word", "number"),
    "niah_multikey_3": NeedleTask("needles", "code", "code"),
    "niah_multivalue": NeedleTask("essay", "word", "number", values=4),
    "niah_multiquery": NeedleTask("essay", "word", "number", keys=4, queries=4),
}


def needle_puzzle(task: NeedleTask, rng: Random, length: int, essay: Haystack | None, first: int) -> Puzzle:
    keys = _distinct(rng, task.key, max(task.keys, task.queries))
    pairs = [(key, value) for key in keys for value in _distinct(rng, task.value, task.values)]
    sentences = [_sentence(task.value, key, value) for key, value in pairs]
    asked = keys[: task.queries]
    answers = tuple(value for key, value in pairs if key in asked)
    question, cue = wording.named_question(task.value, asked, len(answers))
    depths = [place / 39 for place in rng.sample(range(40), len(sentences))]  # RULER's 40 evenly spaced depths
    distractors = Distractors(task, frozenset(keys), Random(rng.getrandbits(64)))

    def render(units: int) -> str:
        if essay:
            needles = [Needle(sentence, depth) for sentence, depth in zip(sentences, depths, strict=True)]
            text = context(essay, first, units, needles)
        else:
            lines = [wording.NOISE] * units if task.haystack == "noise" else distractors.first(units)
            text = lines_with(lines, sentences, depths)
        return wording.prompt(wording.NAMED_INTRO.format(kind=task.value), text, question, cue)

    return Puzzle(
        render=render,
        answers=answers,
        hidden=tuple(s for s, (key, _) in zip(sentences, pairs, strict=True) if key in asked),
        depth=depths[0] if len(sentences) == 1 else None,
        step=500 if task.haystack == "essay" else _line_step(length),
    )


def _sentence(kind: wording.Kind, key: str, value: str) -> str:
    return wording.NAMED_NEEDLE.format(kind=kind, key=key, value=value)


def _distinct(rng: Random, kind: wording.Kind, count: int) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[wording.draw_value(rng, kind)] = None
    return list(drawn)


class Distractors:
    """Other needles as lines; the asked keys are not among them."""

    def __init__(self, task: NeedleTask, taken: frozenset[str], rng: Random) -> None:
        self._task, self._taken, self._rng = task, taken, rng
        self._lines: list[str] = []

    def first(self, count: int) -> list[str]:
        while len(self._lines) < count:
            key = wording.draw_value(self._rng, self._task.key)
            if key not in self._taken:
                self._lines.append(_sentence(self._task.value, key, wording.draw_value(self._rng, self._task.value)))
        return self._lines[:count]


def lines_with(lines: Sequence[str], inserted: Sequence[str], depths: Sequence[float]) -> str:
    places = sorted((round(depth * len(lines)), number) for number, depth in enumerate(depths))
    out, done = list[str](), 0
    for place, number in places:
        out += [*lines[done:place], inserted[number]]
        done = place
    return "\n".join([*out, *lines[done:]])


def _line_step(length: int) -> int:
    return 5 if length < SHORT else 25
