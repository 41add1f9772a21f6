"""A question in a haystack before its size is known, and how it is fitted to a token budget: every sample on its
own, by bisection, to the last unit (word, line, document) that still fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from statespan.benchmarks.base import Tokenizer
from statespan.benchmarks.fit import most_that_fits
from statespan.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """One question, for as much haystack as its budget takes."""

    render: Callable[[int], str]
    """The whole prompt around so many units (words, lines, other words, documents)."""

    answers: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    """Sentences whose token positions are recorded."""

    depth: float | None = None
    least: int = 0
    """Fewer units than this are no puzzle."""

    most: int | None = None
    """There are no more units than this; None where they never end."""

    step: int = 1
    """RULER drops so many units at a time (`as_published`)."""


@dataclass(frozen=True, slots=True)
class Sized:
    """A fitted prompt."""

    ids: tuple[int, ...]
    units: int
    hidden: tuple[tuple[int, int], ...]
    """Token positions [start, end) of each of the puzzle's hidden sentences."""


def size_to_fit(puzzle: Puzzle, tokenizer: Tokenizer, limit: int, what: str) -> Sized:
    """The puzzle with the most units that leave it at `limit` tokens or fewer."""
    sizes: dict[int, list[int]] = {}

    def size(units: int) -> int:
        sizes[units] = tokenizer.encode(puzzle.render(units))
        return len(sizes[units])

    least = size(puzzle.least)
    if least > limit:
        raise UserError(f"{what} needs {least} tokens at the least; its prompt may have {limit}")
    most = puzzle.least + limit if puzzle.most is None else puzzle.most
    probe = min(puzzle.least + max(40, limit // 20), most)
    per_unit = max(size(probe) - least, 1) / max(probe - puzzle.least, 1)
    guess = puzzle.least + (limit - least) / per_unit
    units = most_that_fits(size, limit, most, guess, near=limit // 8_192)
    return sized(puzzle, tokenizer, units, sizes[units])


def sized(puzzle: Puzzle, tokenizer: Tokenizer, units: int, ids: list[int]) -> Sized:
    prompt = puzzle.render(units)
    return Sized(tuple(ids), units, tuple(_token_span(tokenizer, prompt, sentence) for sentence in puzzle.hidden))


def _token_span(tokenizer: Tokenizer, prompt: str, sentence: str) -> tuple[int, int]:
    start = prompt.index(sentence)
    before = len(tokenizer.encode(prompt[:start].rstrip(" ")))
    return before, before + len(tokenizer.encode(" " + sentence if prompt[start - 1] == " " else sentence))
