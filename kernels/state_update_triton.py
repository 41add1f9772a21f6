"""One decode step of either scan on CUDA: the state read once and written once, everything else done on the way.

    Δ = softplus(dt + dt_bias);  h = exp(Δ A) h + Δ x Bᵀ;  y = (h·C + D x) * silu(z)

The definitions are `selective_state_update_ref` and `ssd_state_update_ref`. A step is bound by the state's bytes: at
batch 64 those of mamba-2.8b (d_inner 5120, d_state 16) are 42 MB a layer in float32 where x, dt, z and y are 2.6 MB.
The state may be of any floating dtype; sums are float32 and it is rounded once on its way back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from statespan.kernels.triton_common import LOG2E, early, sigmoid, softplus, unit_stride


@triton.jit
def _selective(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, d_inner, per_group,
    x_batch, dt_batch, z_batch, B_batch, B_group, C_batch, C_group,
    N: tl.constexpr, PADDED_N: tl.constexpr, GROUPED: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, PADDED_N)
    d_ok, n_ok = d < d_inner, n < N
    ok = d_ok[:, None] & n_ok[None, :]
    x = tl.load(x_ptr + batch * x_batch + d, mask=d_ok, other=0.0).to(tl.float32)
    step = tl.load(dt_ptr + batch * dt_batch + d, mask=d_ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias_ptr + d, mask=d_ok, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    if GROUPED:
        group = (d // per_group)[:, None]
        B = tl.load(B_ptr + batch * B_batch + group * B_group + n[None, :], mask=ok, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + batch * C_batch + group * C_group + n[None, :], mask=ok, other=0.0).to(tl.float32)
    else:
        B = tl.load(B_ptr + batch * B_batch + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        C = tl.load(C_ptr + batch * C_batch + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    A = tl.load(A_ptr + d[:, None] * N + n[None, :], mask=ok, other=0.0).to(tl.float32) * LOG2E
    at = state_ptr + (batch * d_inner + d[:, None]) * N + n[None, :]
    h = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    h = tl.exp2(step[:, None] * A) * h + (step * x)[:, None] * B
    tl.store(at, h.to(state_ptr.dtype.element_ty), mask=ok)
    y = tl.sum(h * C, axis=1)
    if HAS_D:
        y += tl.load(D_ptr + d, mask=d_ok, other=0.0).to(tl.float32) * x
    if HAS_Z:
        z = tl.load(z_ptr + batch * z_batch + d, mask=d_ok, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(y_ptr + batch * d_inner + d, y.to(y_ptr.dtype.element_ty), mask=d_ok)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
) -> Tensor:
    """x, dt, z (batch, d_inner), B, C (batch, [groups,] d_state); state (batch, d_inner, d_state) in place -> y."""
    _check_state(state)
    x, dt, B, C = (unit_stride(v) for v in (x, dt, B, C))
    gate = x if z is None else unit_stride(z)
    (batch, d_inner), d_state, grouped = x.shape, A.shape[1], B.ndim == 3
    per_group = d_inner // B.shape[1] if grouped else d_inner
    y = torch.empty(batch, d_inner, dtype=x.dtype, device=x.device)
    block = 16 if batch < 4 else 64
    _selective[(triton.cdiv(d_inner, block), batch)](
        state, x, dt, A.contiguous(), B, C, x if D is None else D, gate, x if dt_bias is None else dt_bias, y,
        d_inner, per_group, x.stride(0), dt.stride(0), gate.stride(0),
        B.stride(0), B.stride(1) if grouped else 0, C.stride(0), C.stride(1) if grouped else 0,
        N=d_state, PADDED_N=triton.next_power_of_2(d_state), GROUPED=grouped, HAS_D=D is not None,
        HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus, BLOCK_D=block,
        num_warps=1 if batch < 4 else 4,
    )  # fmt: skip
    return y


@triton.jit
def _ssd(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, heads, per_group, low, high,
    x_batch, x_head, dt_batch, z_batch, z_head, B_batch, B_group, C_batch, C_group, D_head, D_column,
    P: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, BLOCK_P: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, PADDED_N)
    p_ok, n_ok = p < P, n < N
    ok = p_ok[:, None] & n_ok[None, :]
    at = state_ptr + ((batch * heads + head) * P + p[:, None]) * N + n[None, :]
    if EARLY:
        held = tl.load(at, mask=ok, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if not EARLY:
        held = tl.load(at, mask=ok, other=0.0)
    step = tl.load(dt_ptr + batch * dt_batch + head).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias_ptr + head).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    if LIMITED:
        step = tl.minimum(tl.maximum(step, low), high)
    decay = tl.exp2(step * tl.load(A_ptr + head).to(tl.float32) * LOG2E)
    group = head // per_group
    B = tl.load(B_ptr + batch * B_batch + group * B_group + n, mask=n_ok, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + batch * C_batch + group * C_group + n, mask=n_ok, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + batch * x_batch + head * x_head + p, mask=p_ok, other=0.0).to(tl.float32)
    h = decay * held.to(tl.float32) + (step * x)[:, None] * B[None, :]
    tl.store(at, h.to(state_ptr.dtype.element_ty), mask=ok)
    y = tl.sum(h * C[None, :], axis=1)
    if HAS_D:
        y += tl.load(D_ptr + head * D_head + p * D_column, mask=p_ok, other=0.0).to(tl.float32) * x
    if HAS_Z:
        z = tl.load(z_ptr + batch * z_batch + head * z_head + p, mask=p_ok, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(y_ptr + (batch * heads + head) * P + p, y.to(y_ptr.dtype.element_ty), mask=p_ok)


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    dt_limit: tuple[float, float] | None = None,
    out_dtype: torch.dtype | None = None,
    at_rest: bool = False,
) -> Tensor:
    """x, z (batch, heads, head_dim), dt (batch, heads), B, C (batch, groups, d_state); state in place -> y as x, z."""
    _check_state(state)
    x, dt, B, C = (unit_stride(v) for v in (x, dt, B, C))
    gate = x if z is None else unit_stride(z)
    (batch, heads, head_dim), (groups, d_state) = x.shape, B.shape[1:]
    y = torch.empty(batch, heads, head_dim, dtype=out_dtype or x.dtype, device=x.device)
    skip = x if D is None else D
    block = min(triton.next_power_of_2(head_dim), 8 if batch < 4 else 32)
    low, high = dt_limit or (0.0, 0.0)
    _ssd[(triton.cdiv(head_dim, block), heads, batch)](
        state, x, dt, A, B, C, skip, gate, x if dt_bias is None else dt_bias, y, heads, heads // groups, low, high,
        *x.stride()[:2], dt.stride(0), *gate.stride()[:2], *B.stride()[:2], *C.stride()[:2],
        skip.stride(0), 0 if D is None or D.ndim == 1 else D.stride(1),
        P=head_dim, N=d_state, PADDED_N=triton.next_power_of_2(d_state), HAS_D=D is not None, HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus, LIMITED=dt_limit is not None, BLOCK_P=block,
        EARLY=at_rest, **early(), num_warps=2 if batch < 4 else 4,
    )  # fmt: skip
    return y


def _check_state(state: Tensor) -> None:
    if not state.is_contiguous():
        raise ValueError("a decode step needs a contiguous state, for it is updated in place")
