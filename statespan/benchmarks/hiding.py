"""Needles hidden in running text, between its sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from statespan.benchmarks.haystack import Haystack


@dataclass(frozen=True, slots=True)
class Needle:
    text: str
    depth: float
    """0 before the haystack's first word, 1 after its last; the nearest sentence break is taken."""


def context(haystack: Haystack, first: int, words: int, needles: Sequence[Needle]) -> str:
    """The haystack's words with every needle between two sentences: after a space, or, before all text, as a paragraph
    of its own, which is how the shipped models saw them in training."""
    cuts = sorted((haystack.cut(first, words, needle.depth), number) for number, needle in enumerate(needles))
    text, done = "", 0
    for cut, number in cuts:
        if cut > done:
            text += (haystack.gap(first + done) if done else "") + haystack.passage(first + done, cut - done)
            done = cut
        text += f" {needles[number].text}" if done else f"{needles[number].text}\n\n"
    if words > done:
        text += (haystack.gap(first + done) if done else "") + haystack.passage(first + done, words - done)
    return text.rstrip("\n")
