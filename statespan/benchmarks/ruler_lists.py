"""RULER's variable tracking (vt), common words (cwe) and frequent words (fwe).

After NVIDIA/RULER@c3f5e3b, scripts/data/synthetic: variable_tracking.py, common_words_extraction.py and
freq_words_extraction.py. Counts, examples and answers are its own; words and sentences are ours (needles.py). Unlike
the copies in lm-evaluation-harness 0.4.13 the worked example of cwe is in the prompt, that of vt is drawn anew for
every sample, lines are parted by newlines, and the answer's tokens are part of fwe's budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from statespan.benchmarks import needles as wording
from statespan.benchmarks.puzzle import Puzzle
from statespan.benchmarks.ruler_needles import SHORT, lines_with


def tracking_puzzle(rng: Random, length: int, *, examples: bool) -> Puzzle:
    """vt: one chain of five variables, four hops, among lines of noise."""
    answers, lines, value = _chain(rng, letters=5)
    depths = sorted(rng.random() for _ in lines)
    example = _tracking_example(rng, 3 if length < SHORT else 15) if examples else ""

    def render(units: int) -> str:
        return example + _tracking_prompt(lines_with([wording.NOISE] * units, lines, depths), value)

    return Puzzle(render=render, answers=answers, hidden=lines, step=5 if length < SHORT else 10)


def _chain(rng: Random, letters: int) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Names, assignments in order, and the value they all hold."""
    names: dict[str, None] = {}
    while len(names) < 5:
        names[wording.draw_variable(rng, letters)] = None
    first, *others = names
    value = str(rng.randrange(10_000, 99_999))
    lines = [wording.TRACKING_VALUE.format(name=first, value=value)]
    for source, name in zip(names, others, strict=False):
        lines.append(wording.TRACKING_COPY.format(name=name, source=source))
    return tuple(names), tuple(lines), value


def _tracking_prompt(text: str, value: str) -> str:
    question, cue = wording.TRACKING_QUESTION.format(value=value), wording.TRACKING_CUE.format(value=value)
    return wording.prompt(wording.TRACKING_INTRO, text, question, cue)


def _tracking_example(rng: Random, noise_lines: int) -> str:
    """A solved puzzle with names of three letters. RULER's budget for it is 500 tokens at every length."""
    answers, lines, value = _chain(rng, letters=3)
    text = lines_with([wording.NOISE] * noise_lines, lines, sorted(rng.random() for _ in lines))
    return f"{_tracking_prompt(text, value)} {wording.listed(answers)}\n\n"


def common_words_puzzle(rng: Random, length: int, *, examples: bool) -> Puzzle:
    """cwe: ten words thirty times each among others that come three times, as one numbered list."""
    often, seldom = (6, 1) if length < SHORT else (30, 3)
    words = _Words(rng)
    others, shuffle_seed = 20 if length < SHORT else 40, rng.getrandbits(64)
    example = _common_example(rng, others, *((3, 1) if length < SHORT else (10, 3))) if examples else ""

    def render(units: int) -> str:
        listed = _numbered(words.common, words.others(units), often, seldom, Random(shuffle_seed))
        return example + _common_prompt(listed)

    return Puzzle(render=render, answers=tuple(words.common), step=10)


class _Words:
    """Ten common words and as many others as asked for, all different: single words first, then pairs."""

    def __init__(self, rng: Random) -> None:
        self._pool = list(dict.fromkeys((*wording.NOUNS, *wording.ADJECTIVES)))
        rng.shuffle(self._pool)
        self._rng = Random(rng.getrandbits(64))
        self._taken = set(self._pool)
        self.common = self._pool[:10]

    def others(self, count: int) -> list[str]:
        while len(self._pool) < count + 10:
            word = wording.draw_key(self._rng)
            if word in self._taken:  # there are some ten thousand pairs; very long lists number them
                word = f"{word}-{self._rng.randrange(10, 10_000)}"
            if word not in self._taken:
                self._taken.add(word)
                self._pool.append(word)
        return self._pool[10 : count + 10]


def _numbered(common: Sequence[str], others: Sequence[str], often: int, seldom: int, rng: Random) -> str:
    words = [*common] * often + [*others] * seldom
    rng.shuffle(words)
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _common_prompt(text: str) -> str:
    question = wording.COMMON_QUESTION.format(count=10)
    return wording.prompt(wording.COMMON_INTRO, text, question, wording.COMMON_CUE)


def _common_example(rng: Random, words: int, often: int, seldom: int) -> str:
    pool = _Words(Random(rng.getrandbits(64)))
    text = _numbered(pool.common, pool.others(words - 10), often, seldom, Random(rng.getrandbits(64)))
    return f"{_common_prompt(text)} {', '.join(pool.common)}\n\n"


ZETA_2 = 1.6449340668482264
FEWEST_CODED = 53
"""From so many words on, the fourth most frequent word comes more often than the fifth."""


def frequent_words_puzzle(rng: Random, length: int) -> Puzzle:
    """fwe: coded words whose counts fall with the square of their rank; the first rank is dots."""
    vocabulary = _coded_words(rng, max(length // 50, 6))
    shuffle_seed = rng.getrandbits(64)

    def render(units: int) -> str:
        counts = (int(units / ZETA_2 / rank**2) for rank in range(1, len(vocabulary) + 1))
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        Random(shuffle_seed).shuffle(words)
        question = wording.FREQUENT_QUESTION.format(count=3)
        return wording.prompt(wording.FREQUENT_INTRO, " ".join(words), question, wording.FREQUENT_CUE)

    return Puzzle(render=render, answers=tuple(vocabulary[1:4]), least=FEWEST_CODED, step=max(length // 32, 1))


def _coded_words(rng: Random, count: int) -> list[str]:
    words: dict[str, None] = {"...": None}
    while len(words) < count:
        words["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))] = None
    return list(words)
