"""RMS norms on CUDA, one program a row (and group): `kernels/rms_norm.py` defines them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from statespan.kernels.launch import relaunched
from statespan.kernels.triton_common import INTERPRETED, early, power_of_2, sigmoid


@relaunched
@triton.jit
def _norm(
    x_ptr, residual_ptr, z_ptr, weight_ptr, y_ptr, stream_ptr, eps, width, x_row, z_row,
    ADD: tl.constexpr, GATE: tl.constexpr, GATE_LAST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    ok = column < width
    column += group * width
    full = width * tl.num_programs(1)  # of a row
    scale = tl.load(weight_ptr + column, mask=ok, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    v = tl.load(x_ptr + row * x_row + column, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual_ptr + row * full + column, mask=ok, other=0.0).to(tl.float32)
        kept = v.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + row * full + column, kept, mask=ok)
        v = kept.to(tl.float32)
    if GATE:
        z = tl.load(z_ptr + row * z_row + column, mask=ok, other=0.0).to(tl.float32)
        gate = z * sigmoid(z)
        if not GATE_LAST:
            v *= gate
    v *= tl.rsqrt(tl.sum(v * v, axis=0) / width + eps)
    v *= scale
    if GATE and GATE_LAST:
        v *= gate
    tl.store(y_ptr + row * full + column, v.to(y_ptr.dtype.element_ty), mask=ok)


def _launch(
    x: Tensor, residual: Tensor | None, z: Tensor | None, weight: Tensor, eps: float, groups: int, gate_last: bool
) -> tuple[Tensor, Tensor]:
    """x, residual, z (..., width) -> norm in the weight's dtype, sum in the residual's (or x)"""
    width = x.shape[-1] // groups
    rows, gate = _rows(x), None if z is None else _rows(z)
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    stream = x if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    block = power_of_2(width)
    if y.numel():
        _norm[(rows.shape[0], groups)](
            rows, rows if residual is None else residual.contiguous(), rows if gate is None else gate, weight, y,
            stream, eps, width, rows.stride(0), 0 if gate is None else gate.stride(0),
            ADD=residual is not None, GATE=z is not None, GATE_LAST=gate_last, BLOCK=block,
            # behind a state kernel, early programs would take room from it
            **early(on=z is None and not INTERPRETED), num_warps=min(max(block // 512, 1), 8),
        )  # fmt: skip
    return y, stream


def _rows(x: Tensor) -> Tensor:
    """(..., width) -> (rows, width) with dense columns, in place where the strides allow it"""
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def rms_norm(rows: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(..., width) -> the norm of residual + rows in the weight's dtype, and that sum in the residual's."""
    return _launch(rows, residual, None, weight, eps, 1, False)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, *, groups: int = 1, norm_before_gate: bool = False
) -> Tensor:
    """(..., width) twice -> the gated norm in the weight's dtype."""
    return _launch(y, None, z, weight, eps, groups, norm_before_gate)[0]
