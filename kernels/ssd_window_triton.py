"""Mamba-2's decode step over a window of tokens on CUDA: `kernels/ssd_window.py` defines it.

A program walks some heads of a row, one narrow state after the other, and fetches the next one's while it works on this
one: with all programs on the chip at once, none waits for memory with nothing asked for. A wide state has a program of
its own. A state is (d_state, head_dim) in memory: lanes lie along head_dim, so that what a thread holds it sums over
d_state by itself. It is read once and meets the window's tokens as W short rows; only where the window is full are they
folded into it and it is written. How far the window has come is read from the device, so that one captured graph serves
every place in it. The kernel does not begin before the one before it ends: its early programs would hold the
multiprocessors with their states (a step of 64 rows took 13 % longer). Sums are float32; the state may be of any
floating dtype and is rounded where it is written.
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
"""Most elements of a state in a program, and its warps."""
WALKED = 2
"""Bytes of an element of the states that programs walk. Of wider ones each has a program, and three of these share a
multiprocessor: where programs walked them a step of 64 rows took 3 % longer."""
REGISTERS, PROGRAMS = {True: 240, False: 160}, 264
"""A thread's registers where programs walk (two states with nothing spilled; with 160 a step of 64 rows took 14 %
longer) and where not; and the programs that walk on a chip of 132 multiprocessors at once, two on each."""


@triton.jit
def _window_step(
    state_ptr, wx_ptr, wB_ptr, steps_ptr, logs_ptr, count_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr,
    bias_ptr, y_ptr, heads, groups, low, high,
    x_batch, x_head, dt_batch, z_batch, z_head, B_batch, B_group, C_batch, C_group, D_head, D_column,
    W: tl.constexpr, PADDED_W: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, LIMITED: tl.constexpr, BLOCK_P: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    batch, first = tl.program_id(2).to(tl.int64), tl.program_id(1) * HEADS  # all of one group
    group = first // (heads // groups)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n, w = tl.arange(0, PADDED_N), tl.arange(0, PADDED_W)
    p_ok, n_ok = p < P, n < N
    WHOLE: tl.constexpr = PADDED_N == N and P % BLOCK_P == 0  # then no lane is masked
    ok = n_ok[:, None] & p_ok[None, :]
    tile = n[:, None] * P + p[None, :]
    at = state_ptr + (batch * heads + first) * (N * P) + tile
    h_next = tl.load(at) if WHOLE else tl.load(at, mask=ok, other=0.0)  # (PADDED_N, BLOCK_P)
    # the tokens before: (W,) rows of x, of B, and what became of them
    place = (tl.load(count_ptr) % W).to(tl.int32)
    before = w < place
    row = batch * W + w  # of the window
    x_ok = before[:, None] & p_ok[None, :]
    x_tile = row[:, None] * heads * P + p[None, :]
    x_before_next = tl.load(wx_ptr + first * P + x_tile, mask=x_ok, other=0.0)
    logs_next = tl.load(logs_ptr + row * heads + first, mask=before, other=0.0)
    steps_next = tl.load(steps_ptr + row * heads + first, mask=before, other=0.0)
    last = logs_ptr + (batch * W + place - 1) * heads
    so_far_next = tl.load(last + first, mask=place > 0, other=0.0)
    B_before = tl.load(
        wB_ptr + (row[:, None] * groups + group) * N + n[None, :], mask=before[:, None] & n_ok[None, :], other=0.0
    ).to(tl.float32)
    # this token
    B_at, C_at = B_ptr + batch * B_batch + group * B_group, C_ptr + batch * C_batch + group * C_group
    B_kept = tl.load(B_at + n, mask=n_ok, other=0.0)
    B = B_kept.to(tl.float32)
    C = tl.load(C_at + n, mask=n_ok, other=0.0).to(tl.float32)
    x_at, dt_at = x_ptr + batch * x_batch + p, dt_ptr + batch * dt_batch
    x_next = tl.load(x_at + first * x_head, mask=p_ok, other=0.0)
    dt_next = tl.load(dt_at + first)
    met = tl.sum(B_before * C[None, :], axis=1)
    own = tl.sum(B * C, axis=0)
    for j in range(HEADS):
        head = first + j
        h, x_before, logs, steps, so_far = h_next, x_before_next, logs_next, steps_next, so_far_next
        x_kept, step = x_next, dt_next.to(tl.float32)
        later = tl.minimum(head + 1, first + HEADS - 1)  # the last one's is read again, from the cache
        at = state_ptr + (batch * heads + later) * (N * P) + tile
        h_next = tl.load(at) if WHOLE else tl.load(at, mask=ok, other=0.0)
        x_before_next = tl.load(wx_ptr + later * P + x_tile, mask=x_ok, other=0.0)
        logs_next = tl.load(logs_ptr + row * heads + later, mask=before, other=0.0)
        steps_next = tl.load(steps_ptr + row * heads + later, mask=before, other=0.0)
        so_far_next = tl.load(last + later, mask=place > 0, other=0.0)
        x_next = tl.load(x_at + later * x_head, mask=p_ok, other=0.0)
        dt_next = tl.load(dt_at + later)
        if HAS_BIAS:
            step += tl.load(bias_ptr + head).to(tl.float32)
        step = softplus(step)
        if LIMITED:
            step = tl.minimum(tl.maximum(step, low), high)
        now = so_far + step * tl.load(A_ptr + head).to(tl.float32)
        weights = tl.where(before, tl.exp2((now - logs) * LOG2E) * steps, 0.0)
        decay = tl.exp2(now * LOG2E)
        # y of the state, of the window, of this token
        x = x_kept.to(tl.float32)
        y = decay * tl.sum(h.to(tl.float32) * C[:, None], axis=0)
        y += tl.sum(x_before.to(tl.float32) * (weights * met)[:, None], axis=0)
        y += step * own * x
        if HAS_D:
            y += tl.load(D_ptr + head * D_head + p * D_column, mask=p_ok, other=0.0).to(tl.float32) * x
        if HAS_Z:
            z = tl.load(z_ptr + batch * z_batch + head * z_head + p, mask=p_ok, other=0.0).to(tl.float32)
            y *= z * sigmoid(z)
        tl.store(y_ptr + (batch * heads + head) * P + p, y.to(y_ptr.dtype.element_ty), mask=p_ok)
        if place == W - 1:
            wide = decay * h.to(tl.float32) + (step * x)[None, :] * B[:, None]
            for i in range(0, W - 1):
                old = batch * W + i
                weight = tl.load(steps_ptr + old * heads + head)
                weight *= tl.exp2((now - tl.load(logs_ptr + old * heads + head)) * LOG2E)
                xi = tl.load(wx_ptr + (old * heads + head) * P + p, mask=p_ok, other=0.0).to(tl.float32)
                Bi = tl.load(wB_ptr + (old * groups + group) * N + n, mask=n_ok, other=0.0).to(tl.float32)
                wide += (weight * xi)[None, :] * Bi[:, None]
            here = state_ptr + (batch * heads + head) * (N * P) + tile
            if WHOLE:
                tl.store(here, wide.to(state_ptr.dtype.element_ty))
            else:
                tl.store(here, wide.to(state_ptr.dtype.element_ty), mask=ok)
        else:
            mine = batch * W + place
            tl.store(wx_ptr + (mine * heads + head) * P + p, x_kept, mask=p_ok)
            if tl.program_id(0) == 0:
                tl.store(steps_ptr + mine * heads + head, step)
                tl.store(logs_ptr + mine * heads + head, now)
                if head % (heads // groups) == 0:
                    tl.store(wB_ptr + (mine * groups + group) * N + n, B_kept, mask=n_ok)


def heads_each(programs: int, per_group: int) -> int:
    """Heads of a program, where one each would make so many programs: the fewest that fit the chip, of one group."""
    fits = [heads for heads in range(1, per_group + 1) if per_group % heads == 0]
    return next((heads for heads in fits if programs // heads <= PROGRAMS), per_group)


def ssd_window_step(
    state: Tensor, window: Window, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_limit: Limit | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """x, z (batch, heads, head_dim), dt (batch, heads), B, C (batch, groups, d_state) -> y as x, z."""
    x, dt, B, C = (unit_stride(v) for v in (x, dt, B, C))
    gate = x if z is None else unit_stride(z)
    (batch, heads, head_dim), (groups, d_state) = x.shape, B.shape[1:]
    y = torch.empty(batch, heads, head_dim, dtype=out_dtype or x.dtype, device=x.device)
    skip = x if D is None else D
    padded = triton.next_power_of_2(d_state)
    block = min(triton.next_power_of_2(head_dim), max(TILE // padded, 1))
    low, high = dt_limit or (0.0, 0.0)
    blocks = triton.cdiv(head_dim, block)
    walks = state.element_size() <= WALKED
    each = heads_each(blocks * heads * batch, heads // groups) if walks else 1
    _window_step[(blocks, heads // each, batch)](
        state, window.x, window.B, window.steps, window.logs, window.count, x, dt, A, B, C, skip, gate,
        x if dt_bias is None else dt_bias, y, heads, groups, low, high,
        *x.stride()[:2], dt.stride(0), *gate.stride()[:2], *B.stride()[:2], *C.stride()[:2],
        skip.stride(0), 0 if D is None or D.ndim == 1 else D.stride(1),
        W=window.length, PADDED_W=triton.next_power_of_2(window.length), P=head_dim, N=d_state,
        PADDED_N=padded, HAS_D=D is not None, HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None, LIMITED=dt_limit is not None, BLOCK_P=block, HEADS=each,
        num_warps=NUM_WARPS, maxnreg=REGISTERS[walks],
    )  # fmt: skip
    return y
