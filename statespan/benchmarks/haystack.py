"""Running text to hide needles in: taken by whole words from any place, going round at the end, cut between sentences.

Sentences end at . ! or ? (with closing quotes or brackets), at a blank line and at the text's end: an own rule,
version 1, where the published generators use three different nltk models and so put needles in three different places.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from random import Random

SEGMENTS = 40
"""A sample's text begins in one of so many parts of a long haystack; samples that share one are one cluster."""

_WORD = re.compile(r"\S+")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")


@dataclass(frozen=True, slots=False)
class Haystack:
    name: str
    text: str = field(repr=False)

    def __post_init__(self) -> None:
        assert self.text.strip(), f"the haystack {self.name} is empty"

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        return [match.span() for match in _WORD.finditer(self.text)]

    @cached_property
    def _sentence_starts(self) -> list[int]:
        """Word numbers that open a sentence, and the number after the last word."""
        spans, text = self._spans, self.text
        starts = [0]
        for number in range(1, len(spans)):
            before, here = spans[number - 1], spans[number]
            ended = _SENTENCE_END.search(text[before[0] : before[1]])
            if ended or "\n\n" in text[before[1] : here[0]]:
                starts.append(number)
        return [*starts, len(spans)]

    def __len__(self) -> int:
        """Words."""
        return len(self._spans)

    def sentence_start(self, word: int) -> int:
        """The first sentence start at or after this word."""
        word %= len(self)
        return self._sentence_starts[bisect_left(self._sentence_starts, word)] % len(self)

    def start_in(self, segment: int, rng: Random) -> int:
        """A sentence start drawn from one of the text's SEGMENTS parts."""
        return self.sentence_start((segment * len(self) + rng.randrange(len(self))) // SEGMENTS)

    def sentences(self) -> list[str]:
        starts, spans = self._sentence_starts, self._spans
        return [self.text[spans[a][0] : spans[b - 1][1]] for a, b in pairwise(starts)]

    def passage(self, first: int, words: int) -> str:
        """So many words from word `first` on; after the last word the text begins again, as a new paragraph."""
        pieces = []
        first %= len(self)
        while words > 0:
            last = min(first + words, len(self))
            pieces.append(self.text[self._spans[first][0] : self._spans[last - 1][1]])
            words -= last - first
            first = 0
        return "\n\n".join(pieces)

    def gap(self, word: int) -> str:
        """The white space before a word."""
        word %= len(self)
        return self.text[self._spans[word - 1][1] : self._spans[word][0]] if word else "\n\n"

    def cut(self, first: int, words: int, depth: float) -> int:
        """Where a needle at this depth goes, as the number of words before it: the nearest break, or an end."""
        wanted = round(words * depth)
        rounds, inside = divmod(first + wanted, len(self))
        place = bisect_left(self._sentence_starts, inside)
        starts = self._sentence_starts[max(place - 1, 0) : place + 1]
        breaks = [0, words, *(rounds * len(self) + start - first for start in starts)]
        return min((cut for cut in breaks if 0 <= cut <= words), key=lambda cut: abs(cut - wanted))
