"""Fit a text to a token budget: the most units (words, lines, documents) whose prompt still has at most so many tokens.

Published generators step down by a fixed number of units until a sample fits (RULER: 500 words at a time), which leaves
prompts of 402 tokens for a target of 1,024. Here every sample is bisected on its own, to the last unit.
"""

from __future__ import annotations

from collections.abc import Callable


def most_that_fits(size: Callable[[int], int], limit: int, most: int, guess: float, near: int = 0) -> int:
    """The largest n in 0..most with size(n) <= limit, or -1 where not even size(0) fits; or one that leaves at most
    `near` of the limit unused.

    `size` must not decrease. Counting tokens is what costs, so the search interpolates from `guess` and falls back to
    halves: three or four counts for a text whose words are alike, never more than about 2 log2(most).
    """
    fits, fits_size = -1, 0
    fails, fails_size = most + 1, 0
    probe = min(max(round(guess), 0), most)
    for step in range(4 * most.bit_length() + 8):
        if fails - fits <= 1:
            break
        measured = size(probe)
        if measured <= limit:
            fits, fits_size = probe, measured
            if limit - measured < near:
                return fits
        else:
            fails, fails_size = probe, measured
        probe = _next_probe(fits, fits_size, fails, fails_size, limit, most, halve=step % 3 == 2)
    assert fails - fits <= 1, (fits, fails)
    return fits


def _next_probe(fits: int, fits_size: int, fails: int, fails_size: int, limit: int, most: int, *, halve: bool) -> int:
    """Somewhere strictly between, where a straight line through what was measured meets the limit."""
    if halve and fits >= 0 and fails <= most:
        probe = (fits + fails) // 2
    elif fails <= most and fits >= 0:
        probe = fits + int((limit - fits_size) * (fails - fits) / max(fails_size - fits_size, 1))
    elif fits > 0:
        # only ever too small so far: grow in proportion, with a little over so that the next one brackets
        probe = int(fits * limit / max(fits_size, 1)) + 2
    elif fails <= most:
        probe = int(fails * limit / fails_size * 0.98)
    else:
        probe = 8
    return min(max(probe, fits + 1), fails - 1)
