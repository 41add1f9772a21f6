"""How published protocols shorten what is too long: LongBench in the middle, L-Eval at one end."""

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


def truncated_at_one_end(text: str, max_length: int, tokenizer: Tokenizer, *, keep_end: bool) -> str:
    """L-Eval's truncation of a document (OpenLMLab/LEval@cd34b05): at first as many words as it may have tokens,
    then 250 fewer at each try, until it fits."""
    words = text.split(" ")
    kept = max_length
    while len(tokenizer.encode(text)) > max_length:
        text = " ".join((words[-kept:] if keep_end else words[:kept]) if kept > 0 else [])
        kept -= 250
    return text
