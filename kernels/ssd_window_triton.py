"""Mamba-2's decode step over a window of tokens on CUDA: `kernels/ssd_window.py` defines it.

A program owns one head's state, (d_state, head_dim) in memory: lanes lie along head_dim, so that what a thread holds it
sums over d_state by itself. It reads the state once and meets the window's tokens as W short rows; only where the
window is full does it fold them into the state and write that back. How far the window has come is read from the
device, so that one captured graph serves every place in it. It does not begin before the kernel before it ends: its
early programs would hold the multiprocessors with their states (a step of 64 rows took 13 % longer). Sums are float32;
the state may be of any floating dtype and is rounded where it is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statespan.kernels.ssd import Limit
from statespan.kernels.ssd_window import Window
from statespan.kernels.triton_common import LOG2E, sigmoid, softplus, unit_stride

TILE, NUM_WARPS = 8192, 4
"""Most elements of a state in a program (32 KiB in registers in float32), and its warps."""
REGISTERS = {4: 160, 2: 128}
"""A thread's, by bytes of an element of the state: three and four programs a multiprocessor, and nothing spilled."""


@triton.jit
def _window_step(
    state_ptr, wx_ptr, wB_ptr, steps_ptr, logs_ptr, count_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr,
    bias_ptr, y_ptr, heads, groups, low, high,
    x_batch, x_head, dt_batch, z_batch, z_head, B_batch, B_group, C_batch, C_group, D_head, D_column,
    W: tl.constexpr, PADDED_W: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, LIMITED: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    group = head // (heads // groups)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n, w = tl.arange(0, PADDED_N), tl.arange(0, PADDED_W)
    p_ok, n_ok = p < P, n < N
    WHOLE: tl.constexpr = PADDED_N == N and P % BLOCK_P == 0  # then no lane is masked
    ok = n_ok[:, None] & p_ok[None, :]
    at = state_ptr + ((batch * heads + head) * N + n[:, None]) * P + p[None, :]
    h = tl.load(at) if WHOLE else tl.load(at, mask=ok, other=0.0)  # (PADDED_N, BLOCK_P)
    A = tl.load(A_ptr + head).to(tl.float32)
    place = (tl.load(count_ptr) % W).to(tl.int32)
    step = tl.load(dt_ptr + batch * dt_batch + head).to(tl.float32)
    # the tokens before: (W,) rows of x, of B, and what became of them
    before = w < place
    row = batch * W + w  # of the window
    x_before = tl.load(
        wx_ptr + (row[:, None] * heads + head) * P + p[None, :], mask=before[:, None] & p_ok[None, :], other=0.0
    ).to(tl.float32)
    B_before = tl.load(
        wB_ptr + (row[:, None] * groups + group) * N + n[None, :], mask=before[:, None] & n_ok[None, :], other=0.0
    ).to(tl.float32)
    logs = tl.load(logs_ptr + row * heads + head, mask=before, other=0.0)
    steps = tl.load(steps_ptr + row * heads + head, mask=before, other=0.0)
    so_far = tl.load(logs_ptr + (batch * W + place - 1) * heads + head, mask=place > 0, other=0.0)
    # this token
    if HAS_BIAS:
        step += tl.load(bias_ptr + head).to(tl.float32)
    step = softplus(step)
    if LIMITED:
        step = tl.minimum(tl.maximum(step, low), high)
    B_at, C_at = B_ptr + batch * B_batch + group * B_group, C_ptr + batch * C_batch + group * C_group
    B_kept = tl.load(B_at + n, mask=n_ok, other=0.0)
    x_kept = tl.load(x_ptr + batch * x_batch + head * x_head + p, mask=p_ok, other=0.0)
    B, x = B_kept.to(tl.float32), x_kept.to(tl.float32)
    C = tl.load(C_at + n, mask=n_ok, other=0.0).to(tl.float32)
    now = so_far + step * A
    weights = tl.where(before, tl.exp2((now - logs) * LOG2E) * steps, 0.0)
    decay = tl.exp2(now * LOG2E)
    # y of the state, of the window, of this token
    wide = h.to(tl.float32)
    y = decay * tl.sum(wide * C[:, None], axis=0)
    met = weights * tl.sum(B_before * C[None, :], axis=1)
    y += tl.sum(x_before * met[:, None], axis=0)
    y += step * tl.sum(B * C, axis=0) * x
    if HAS_D:
        y += tl.load(D_ptr + head * D_head + p * D_column, mask=p_ok, other=0.0).to(tl.float32) * x
    if HAS_Z:
        z = tl.load(z_ptr + batch * z_batch + head * z_head + p, mask=p_ok, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(y_ptr + (batch * heads + head) * P + p, y.to(y_ptr.dtype.element_ty), mask=p_ok)
    if place == W - 1:
        wide = decay * wide + (step * x)[None, :] * B[:, None]
        for j in range(0, W - 1):
            here = batch * W + j
            weight = tl.load(steps_ptr + here * heads + head)
            weight *= tl.exp2((now - tl.load(logs_ptr + here * heads + head)) * LOG2E)
            xj = tl.load(wx_ptr + (here * heads + head) * P + p, mask=p_ok, other=0.0).to(tl.float32)
            Bj = tl.load(wB_ptr + (here * groups + group) * N + n, mask=n_ok, other=0.0).to(tl.float32)
            wide += (weight * xj)[None, :] * Bj[:, None]
        if WHOLE:
            tl.store(at, wide.to(state_ptr.dtype.element_ty))
        else:
            tl.store(at, wide.to(state_ptr.dtype.element_ty), mask=ok)
    else:
        mine = batch * W + place
        tl.store(wx_ptr + (mine * heads + head) * P + p, x_kept, mask=p_ok)
        if tl.program_id(0) == 0:
            tl.store(steps_ptr + mine * heads + head, step)
            tl.store(logs_ptr + mine * heads + head, now)
            if head % (heads // groups) == 0:
                tl.store(wB_ptr + (mine * groups + group) * N + n, B_kept, mask=n_ok)


def ssd_window_step(
    state: Tensor, window: Window, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_limit: Limit | None = None,
) -> Tensor:  # fmt: skip
    """x, z (batch, heads, head_dim), dt (batch, heads), B, C (batch, groups, d_state) -> y like x."""
    x, dt, B, C = (unit_stride(v) for v in (x, dt, B, C))
    gate = x if z is None else unit_stride(z)
    (batch, heads, head_dim), (groups, d_state) = x.shape, B.shape[1:]
    y = torch.empty(batch, heads, head_dim, dtype=x.dtype, device=x.device)
    skip = x if D is None else D
    padded = triton.next_power_of_2(d_state)
    block = min(triton.next_power_of_2(head_dim), max(TILE // padded, 1))
    low, high = dt_limit or (0.0, 0.0)
    _window_step[(triton.cdiv(head_dim, block), heads, batch)](
        state, window.x, window.B, window.steps, window.logs, window.count, x, dt, A, B, C, skip, gate,
        x if dt_bias is None else dt_bias, y, heads, groups, low, high,
        *x.stride()[:2], dt.stride(0), *gate.stride()[:2], *B.stride()[:2], *C.stride()[:2],
        skip.stride(0), 0 if D is None or D.ndim == 1 else D.stride(1),
        W=window.length, PADDED_W=triton.next_power_of_2(window.length), P=head_dim, N=d_state,
        PADDED_N=padded, HAS_D=D is not None, HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None, LIMITED=dt_limit is not None, BLOCK_P=block, num_warps=NUM_WARPS,
        maxnreg=REGISTERS.get(state.element_size()),
    )  # fmt: skip
    return y
