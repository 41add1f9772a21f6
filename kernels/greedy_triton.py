"""The greedy choice on CUDA: `kernels/greedy.py` defines it. Parts of a row first, then the row of its parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from statespan.kernels.triton_common import LOG2E, early, unit_stride

BLOCK, NUM_WARPS = 2048, 4


@triton.jit
def _parts(
    logits_ptr, most_ptr, where_ptr, sum_ptr, width, parts, row_stride, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    column = part * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    v = tl.load(logits_ptr + row * row_stride + column, mask=ok, other=float("-inf")).to(tl.float32)
    most = tl.max(v, axis=0)
    at = row * parts + part
    tl.store(most_ptr + at, most)
    tl.store(where_ptr + at, tl.min(tl.where((v == most) & ok, column, width), axis=0))
    # of a part of -inf alone nothing remains, and not the NaN of inf - inf
    tl.store(sum_ptr + at, tl.sum(tl.where(v == float("-inf"), 0.0, tl.exp2((v - most) * LOG2E)), axis=0))


@triton.jit
def _whole(
    most_ptr, where_ptr, sum_ptr, best_ptr, rows, parts, width, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    ok = part < parts
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.load(most_ptr + row * parts + part, mask=ok, other=float("-inf"))
    most = tl.max(m, axis=0)
    where = tl.load(where_ptr + row * parts + part, mask=ok & (m == most), other=width)
    total = tl.load(sum_ptr + row * parts + part, mask=ok, other=0.0)
    total = tl.sum(tl.where(total == 0.0, 0.0, total * tl.exp2((m - most) * LOG2E)), axis=0)
    tl.store(best_ptr + row, tl.min(where, axis=0).to(tl.float64))
    tl.store(best_ptr + rows + row, (-tl.log(total)).to(tl.float64))


def greedy(logits: Tensor) -> Tensor:
    """(rows, vocab_size) -> (2, rows) float64"""
    logits = unit_stride(logits)
    rows, width = logits.shape
    parts = triton.cdiv(width, BLOCK)
    most, total = (torch.empty(rows, parts, dtype=torch.float32, device=logits.device) for _ in range(2))
    where = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    best = torch.empty(2, rows, dtype=torch.float64, device=logits.device)
    options: dict[str, object] = early()
    _parts[(parts, rows)](
        logits, most, where, total, width, parts, logits.stride(0), BLOCK=BLOCK, **options, num_warps=NUM_WARPS
    )
    _whole[(rows,)](
        most, where, total, best, rows, parts, width, BLOCK=triton.next_power_of_2(parts), **options, num_warps=1
    )
    return best
