"""The passkey prompts of DeciMamba's own test, with what is odd about them (assafbk/DeciMamba@6290e95).

The odd parts, by name:
`context_length`: the length counts the context alone, not the instruction (which comes first) or the answer cue.
`joined_ids`: instruction, haystack sentences, needle and cue are tokenised one by one and their ids joined.
`running_haystack`: each cell reads on where the last one stopped, so a sample's text depends on the cells before it.
`short_keys`: str(randint(0, 99999)): one key in ten has fewer than five digits.
`cue_space`: the cue ends in a space, which a BPE model rarely sees before a digit; `strip_cue` drops it.
`word_match`: right is a key that stands between single spaces: "12345." and "12345\\n" are wrong, "1 2345" too.
`one_trial`: the published grid has one sample a cell: set trials: 1 for it.

Needles stand between sentences, uniformly among the gaps within a tenth of the length around the depth; sentences of
fewer than 10 tokens are dropped. The wording is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from random import Random
from typing import NamedTuple

from statespan.benchmarks import needles as wording
from statespan.benchmarks.base import Tokenizer
from statespan.benchmarks.haystack import Haystack
from statespan.benchmarks.puzzle import Sized
from statespan.errors import UserError

CUE = "\nAnswer: "
SHORTEST_SENTENCE = 10


class Cell(NamedTuple):
    length: int
    depth: float
    trial: int


class Published(NamedTuple):
    prompt: Sized
    document: str
    answer: str


def published_prompts(
    tokenizer: Tokenizer, hay: Haystack, cells: Sequence[Cell], rngs: Sequence[Random], strip_cue: bool
) -> Iterator[Published]:
    """One for every cell; the haystack runs on from each to the next."""
    sentences = [ids for text in hay.sentences() if len(ids := tokenizer.encode(" " + text)) >= SHORTEST_SENTENCE]
    if not sentences:
        raise UserError(f"passkey: the haystack {hay.name!r} has no sentence of {SHORTEST_SENTENCE} tokens")
    intro = tokenizer.encode(wording.PASSKEY_INTRO + "\n")
    cue = tokenizer.encode(CUE.rstrip(" ") if strip_cue else CUE)
    place = 0
    for cell, rng in zip(cells, rngs, strict=True):
        answer = str(rng.randrange(100_000))
        needle = tokenizer.encode(" " + wording.PASSKEY_NEEDLE.format(value=answer))
        room = cell.length - len(needle)
        if room < SHORTEST_SENTENCE:
            raise UserError(f"passkey: length must be at least {len(needle) + SHORTEST_SENTENCE}; got {cell.length}")
        document = f"{hay.name}@{place % len(sentences)}"
        taken: list[list[int]] = []
        while (missing := room - sum(map(len, taken))) > 0:
            taken.append(sentences[place % len(sentences)][:missing])
            place += 1
        gap = _gap(taken, cell.depth, rng)
        prompt = tuple(chain(intro, *taken[:gap], needle, *taken[gap:], cue))
        start = len(intro) + sum(map(len, taken[:gap]))
        yield Published(Sized(prompt, len(taken), ((start, start + len(needle)),)), document, answer)


def _gap(sentences: Sequence[Sequence[int]], depth: float, rng: Random) -> int:
    """How many sentences stand before the needle."""
    starts = list(accumulate(map(len, sentences), initial=0))
    low, high = max(depth - 0.1, 0.0) * starts[-1], min(depth + 0.1, 1.0) * starts[-1]
    gaps = [number for number, start in enumerate(starts) if low <= start <= high]
    # sentences longer than a fifth of the context may leave no gap there: the nearest one, then
    return rng.choice(gaps or [min(range(len(starts)), key=lambda n: abs(starts[n] - depth * starts[-1]))])
