"""How RULER's own generator sizes its prompts (NVIDIA/RULER@c3f5e3b): `fitting: as_published`.

One example of `step` units says how many tokens a unit has; the largest count that fits *that example* is searched;
then each sample drops `step` units at a time until it fits. Prompts of 3,440 tokens for a target of 4,096, and of
402 for 1,024, come from there. (The original retries for ever where nothing fits; ours says so.)
"""

from __future__ import annotations

from statespan.benchmarks.base import Tokenizer
from statespan.benchmarks.puzzle import Puzzle, Sized, sized
from statespan.errors import UserError


def published_units(puzzle: Puzzle, tokenizer: Tokenizer, limit: int, reserved: int) -> int:
    """How many units the published generator settles on, from one example; `limit` excludes the answer's tokens."""
    step = puzzle.step
    tokens_a_unit = len(tokenizer.encode(puzzle.render(step))) / step
    low, high = step, max(int((limit + reserved) / tokens_a_unit * 3), 2 * step)
    if puzzle.most is not None:
        high = min(high, puzzle.most)
    best = step
    while low <= high:
        middle = (low + high) // 2
        if len(tokenizer.encode(puzzle.render(middle))) <= limit:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def size_as_published(puzzle: Puzzle, tokenizer: Tokenizer, limit: int, units: int, what: str) -> Sized:
    """From `units` down by whole steps until it fits."""
    while len(ids := tokenizer.encode(puzzle.render(units))) > limit and units > puzzle.step:
        units -= puzzle.step
    if len(ids) > limit or units < puzzle.least:
        raise UserError(f"{what} has {len(ids)} tokens with {units} units, and {limit} are left for its prompt")
    return sized(puzzle, tokenizer, units, ids)
