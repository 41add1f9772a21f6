"""Public-domain novels that no shipped model was trained on, and the words that retrieval keys are made of (README.md).

Cleaned by `statespan.training.corpus`: ASCII punctuation, paragraphs parted by one empty line.
"""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path

from statespan.errors import unknown

_FOLDER = Path(__file__).parent
TEXTS = tuple(sorted(path.name.removesuffix(".txt.xz") for path in _FOLDER.glob("*.txt.xz")))


@cache
def load_text(name: str) -> str:
    """The whole text of one of `TEXTS`."""
    if name not in TEXTS:
        raise unknown("text", name, TEXTS)
    return lzma.decompress((_FOLDER / f"{name}.txt.xz").read_bytes()).decode("utf-8")


def load_words(name: str) -> tuple[str, ...]:
    """One of the two word lists, "adjectives" or "nouns"."""
    return tuple((_FOLDER / f"{name}.txt").read_text(encoding="ascii").split())


@cache
def xz_bits_per_byte(name: str) -> float:
    """What `xz -9` makes of the same bytes: the mark a language model has to beat."""
    data = load_text(name).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
