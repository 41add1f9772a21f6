"""Needles hidden in a haystack, and the whole prompt fitted to a token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from statespan.benchmarks.base import Tokenizer
from statespan.benchmarks.fit import most_that_fits
from statespan.benchmarks.haystack import Haystack
from statespan.errors import UserError


@dataclass(frozen=True, slots=True)
class Needle:
    text: str
    depth: float
    """0 before the haystack's first word, 1 after its last; the nearest sentence break is taken."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A fitted prompt."""

    ids: tuple[int, ...]
    needles: tuple[tuple[int, int], ...]
    """Token positions [start, end) of each needle in the prompt, in the order the needles were given."""


def hide(
    tokenizer: Tokenizer,
    haystack: Haystack,
    first: int,
    needles: Sequence[Needle],
    render: Callable[[str], str],
    limit: int,
    what: str,
) -> Hidden:
    """As many words of the haystack, from word `first` on, as the budget of `limit` tokens takes."""

    def text(words: int) -> str:
        return render(context(haystack, first, words, needles))

    ids: dict[int, list[int]] = {}

    def size(words: int) -> int:
        ids[words] = tokenizer.encode(text(words))
        return len(ids[words])

    overhead, probe = size(0), tokenizer.encode(haystack.passage(first, 200))
    guess = (limit - overhead) * 200 / len(probe)
    words = most_that_fits(size, limit, most=max(limit, 1), guess=guess)
    if words < 0:
        raise UserError(f"{what} needs {overhead} tokens for its instructions and needles alone; got length {limit}")
    prompt = text(words)
    return Hidden(tuple(ids[words]), tuple(_token_span(tokenizer, prompt, needle.text) for needle in needles))


def context(haystack: Haystack, first: int, words: int, needles: Sequence[Needle]) -> str:
    """The haystack's words with every needle between two sentences."""
    cuts = [(haystack.cut(first, words, needle.depth), number) for number, needle in enumerate(needles)]
    pieces, done = [], 0
    for cut, number in sorted(cuts):
        if cut > done:
            pieces.append(haystack.passage(first + done, cut - done))
            done = cut
        pieces.append(needles[number].text)
    if words > done:
        pieces.append(haystack.passage(first + done, words - done))
    return " ".join(pieces)


def _token_span(tokenizer: Tokenizer, prompt: str, needle: str) -> tuple[int, int]:
    start = prompt.index(needle)
    before = len(tokenizer.encode(prompt[:start].rstrip(" ")))
    return before, len(tokenizer.encode(prompt[: start + len(needle)]))
