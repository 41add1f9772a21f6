"""The most likely token of each row of logits, and its log-probability: what decoding without a temperature asks for.

    token = argmax v  (the first of equals);   logprob = -log Σ exp(vᵢ - v[token])

Ours differs from argmax, log_softmax and gather in rounding only. Bytes: the logits once, where those three and the
widening before them read and write them seven times, most of it by one program a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statespan.kernels.dispatch import kernel, overridden, wide


def greedy_ref(logits: Tensor) -> Tensor:
    """The definition, in torch. Tests call it in float64."""
    rows = logits.to(wide(logits))
    token = rows.argmax(dim=-1, keepdim=True)
    logprob = torch.log_softmax(rows, dim=-1).gather(1, token)
    return torch.cat((token.double(), logprob.double()), dim=1).T


def greedy(logits: Tensor) -> Tensor:
    """(rows, vocab_size) -> (2, rows) float64: the most likely token of each row, and its log-probability"""
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"greedy needs logits (rows, vocab_size); got {[*logits.shape]}")
    fast = overridden() == "triton" or (overridden() is None and logits.is_cuda and logits.dtype != torch.float64)
    best: Tensor = kernel("greedy", "greedy", "triton")(logits) if fast else greedy_ref(logits)
    return best
