"""Rows picked by position on CUDA, one program a row and block of columns: `kernels/take.py` says what."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statespan.kernels.launch import relaunched
from statespan.kernels.triton_common import parts, power_of_2, unit_stride

BLOCK, NUM_WARPS = 2048, 4


@relaunched
@triton.jit
def _take(rows_ptr, kept_ptr, out_ptr, width, rows_batch, rows_row, BLOCK: tl.constexpr):
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    place = batch * tl.num_programs(0) + row
    source = tl.load(kept_ptr + place)
    values = tl.load(rows_ptr + batch * rows_batch + source * rows_row + column, mask=ok & (source >= 0), other=0.0)
    tl.store(out_ptr + place * width + column, values, mask=ok)


def take(rows: Tensor, kept: Tensor) -> Tensor:
    """(batch, length, width), (batch, new_length) int64 -> (batch, new_length, width); zeros where kept is -1."""
    rows, kept = unit_stride(rows), kept.contiguous()
    (batch, new_length), width = kept.shape, rows.shape[-1]
    out = torch.empty(batch, new_length, width, dtype=rows.dtype, device=rows.device)
    block = min(BLOCK, power_of_2(width))
    if out.numel():
        # rows along x: the other axes of a grid end at 65,535
        _take[(new_length, parts(width, block), batch)](
            rows, kept, out, width, *rows.stride()[:2], BLOCK=block, num_warps=NUM_WARPS
        )
    return out
