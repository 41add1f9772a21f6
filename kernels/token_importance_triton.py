"""Token importance on CUDA: dt read once, one number a token written. `kernels/token_importance.py` defines it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statespan.kernels.launch import relaunched
from statespan.kernels.triton_common import parts, softplus, unit_stride

BLOCK_T, BLOCK_D, NUM_WARPS = 8, 512, 4


@relaunched
@triton.jit(do_not_specialize=["length"])
def _norms(
    dt_ptr, bias_ptr, out_ptr, length, width, dt_batch, dt_row,
    NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    t_ok = t < length
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)  # summed over the channels once, at the end
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        ok = t_ok[:, None] & (d < width)[None, :]
        v = tl.load(dt_ptr + batch * dt_batch + t[:, None] * dt_row + d[None, :], mask=ok, other=0.0).to(tl.float32)
        v += tl.load(bias_ptr + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
        step = tl.where(ok, softplus(v), 0.0)
        if NORM == "l2":
            total += step * step
        elif NORM == "l1":
            total += step
        else:
            total = tl.maximum(total, step)
    norm = tl.max(total, axis=1) if NORM == "max" else tl.sum(total, axis=1)
    if NORM == "l2":
        norm = tl.sqrt(norm)
    tl.store(out_ptr + batch * length + t, norm, mask=t_ok)


def token_importance(dt: Tensor, dt_bias: Tensor, *, norm: str = "l2") -> Tensor:
    """dt (batch, length, channels), dt_bias (channels,) -> (batch, length) float32"""
    dt = unit_stride(dt)
    batch, length, width = dt.shape
    out = torch.empty(batch, length, dtype=torch.float32, device=dt.device)
    if out.numel():
        _norms[(parts(length, BLOCK_T), batch)](
            dt, dt_bias.contiguous(), out, length, width, *dt.stride()[:2],
            NORM=norm, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out
