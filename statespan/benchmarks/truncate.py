"""LongBench's middle truncation: the first and the last half of a prompt's tokens, as text, read again."""

from __future__ import annotations

from statespan.benchmarks.base import Tokenizer


def truncated_in_the_middle(text: str, max_length: int | None, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt of about max_length tokens (THUDM/LongBench@2e00731, pred.py).

    The halves are decoded, joined as strings and tokenised again, so the result may differ from max_length by a few
    tokens: an odd length loses one, and tokens may merge or split at the seam.
    """
    ids = tokenizer.encode(text)
    if max_length is None or len(ids) <= max_length:
        return ids
    half = max_length // 2
    return tokenizer.encode(tokenizer.decode(ids[:half]) + tokenizer.decode(ids[len(ids) - half :]))
