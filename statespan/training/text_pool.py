"""The corpus as token ids, and passages of it that begin with a paragraph and end with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from statespan.errors import UserError
from statespan.training.vocabulary import Encoder

_ENDS = ".!?"
_CLOSERS = "\"')]"
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Passage:
    ids: list[int]
    cuts: list[int]
    """Places inside it where a sentence begins with a space: where a needle may go."""


class TextPool:
    """One array of token ids, drawn from by source with given weights."""

    def __init__(self, sources: Mapping[str, np.ndarray], encoder: Encoder, weights: Mapping[str, float]) -> None:
        """`weights` multiply a source's size; 1 where a source is not named."""
        if not sources:
            raise UserError("the training corpus holds no text; run python -m statespan.training.vocabulary first")
        names = sorted(sources)
        self.ids = np.concatenate([sources[name] for name in names])
        self.bounds = np.cumsum([0] + [len(sources[name]) for name in names])
        self._shares = np.cumsum([len(sources[name]) * weights.get(name, 1.0) for name in names]).tolist()
        spellings = encoder.spellings
        ends = np.array([text.rstrip(_CLOSERS)[-1:] in tuple(_ENDS) for text in spellings])
        closers = np.array([bool(text) and not text.strip(_CLOSERS) for text in spellings])
        spaced = np.array([text[:1] == " " and text.strip() != "" for text in spellings])
        breaks = np.array(["\n\n" in text and not text.strip() for text in spellings])
        ended = ends[self.ids]
        ended[1:] |= closers[self.ids[1:]] & ended[:-1]
        self.sentences = np.flatnonzero(ended[:-1] & spaced[self.ids[1:]]) + 1
        self.paragraphs = np.flatnonzero(breaks[self.ids[:-1]]) + 1
        self.documents = np.flatnonzero(self.ids == encoder.end)

    @classmethod
    def load(cls, folder: Path, encoder: Encoder, weights: Mapping[str, float]) -> TextPool:
        return cls({path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}, encoder, weights)

    def draw(self, rng: Random) -> int:
        """A position, its source drawn by weight."""
        source = int(np.searchsorted(self._shares, rng.random() * self._shares[-1], side="right"))
        return rng.randrange(int(self.bounds[source]), int(self.bounds[source + 1]))

    def window(self, rng: Random, tokens: int) -> list[int]:
        """So many tokens from anywhere, ends of documents included."""
        start = min(self.draw(rng), len(self.ids) - tokens)
        window: list[int] = self.ids[start : start + tokens].tolist()
        return window

    def passage(self, rng: Random, tokens: int) -> Passage:
        """At most so many tokens of one document, from a paragraph's start to a sentence's end."""
        best = Passage([], [])
        for _ in range(_TRIES):
            found = self._passage(self.draw(rng), tokens)
            if len(found.ids) > len(best.ids):
                best = found
            if len(best.ids) > 0.8 * tokens:
                break
        return best

    def _passage(self, near: int, tokens: int) -> Passage:
        at = int(np.searchsorted(self.paragraphs, near))
        start = int(self.paragraphs[min(at, len(self.paragraphs) - 1)])
        document = int(np.searchsorted(self.documents, start))
        end = int(self.documents[document]) if document < len(self.documents) else len(self.ids)
        stop = min(start + tokens, end)
        first, last = np.searchsorted(self.sentences, np.array((start + 1, stop + 1)))
        cuts = (self.sentences[first:last] - start).tolist()
        if stop - start == tokens and cuts:
            stop = start + cuts.pop()
        return Passage(self.ids[start:stop].tolist(), cuts)
