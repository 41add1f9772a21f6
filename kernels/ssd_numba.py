"""Mamba-2's scan on the CPU: the recurrence itself, the head's features side by side in SIMD lanes.

A task is one row of the batch, one head and one block of its features, its states transposed to (d_state, LANES) in
scratch. A state costs a multiplication and two fused multiply-adds a token; the chunked form (`ssd_chunked`) is more
arithmetic in matrix products and passes over memory (perf/RESULTS.md has both).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.kernels.dispatch import wide
from statespan.kernels.fast_math import Float, Int, Ints, Real, constant, exp, given, inlined, shift, softplus
from statespan.kernels.lanes_numba import AHEAD, LANES, clear_rows, dot, fill_lanes, gate_lanes, prefetch_lanes
from statespan.kernels.native import Kernel, pointer, rows, settled

UNROLLED = 4
"""States that go through the lanes together; d_state is padded to a multiple of it."""


@inlined
def head_step(raw, with_softplus, low, high, keep_above, dt_scale):
    """Δ of one token of one head."""
    step = softplus(raw) if with_softplus != 0 else raw
    if step < constant(raw, low):
        step = constant(raw, low)
    if step > constant(raw, high):
        step = constant(raw, high)
    if step <= keep_above:
        step = constant(raw, 0.0)
    return step * dt_scale


@inlined
def advance_head(h, decay, driven, y, B, B_at, C, C_at, d_state):
    """h = decay h + Δ x B and y += C·h for one token of LANES features."""
    for n in range(0, d_state, UNROLLED):
        b0, b1, b2, b3 = B[B_at + n], B[B_at + n + 1], B[B_at + n + 2], B[B_at + n + 3]
        c0, c1, c2, c3 = C[C_at + n], C[C_at + n + 1], C[C_at + n + 2], C[C_at + n + 3]
        at = n * LANES
        for j in range(LANES):
            i0, i1, i2, i3 = at + j, at + j + LANES, at + j + 2 * LANES, at + j + 3 * LANES
            h0, h1 = decay * h[i0] + driven[j] * b0, decay * h[i1] + driven[j] * b1
            h2, h3 = decay * h[i2] + driven[j] * b2, decay * h[i3] + driven[j] * b3
            h[i0], h[i1], h[i2], h[i3] = h0, h1, h2, h3
            y[j] = (((y[j] + h0 * c0) + h1 * c1) + h2 * c2) + h3 * c3


def _ssd(
    x: Real, dt: Real, A: Real, B: Real, C: Real, D: Real, z: Real, dt_bias: Real, keep_above: Real, dt_scale: Real,
    pads: Ints, state: Real, y: Real, final: Real,
    length: Int, heads: Int, head_dim: Int, d_state: Int, groups: Int, with_softplus: Int, low: Float, high: Float,
    x_row: Int, x_token: Int, x_head: Int, dt_row: Int, dt_token: Int, z_row: Int, z_token: Int, z_head: Int,
    B_row: Int, B_token: Int, B_group: Int, C_row: Int, C_token: Int, C_group: Int,
    scratch: Real, first: Int, last: Int,
) -> None:  # fmt: skip
    h, driven = scratch, shift(scratch, d_state * LANES)
    out, skip = shift(driven, LANES), shift(driven, 2 * LANES)
    zero, blocks = constant(x, 0.0), (head_dim + LANES - 1) // LANES
    for task in range(first, last):
        row, head, begin = task // (heads * blocks), task // blocks % heads, task % blocks * LANES
        count, group = min(LANES, head_dim - begin), head // (heads // groups)
        fill_lanes(skip, D, head * head_dim + begin, count, zero)
        bias = dt_bias[head] if given(dt_bias) else zero
        threshold = keep_above[row * heads + head] if given(keep_above) else constant(x, -float("inf"))
        scale = dt_scale[row * heads + head] if given(dt_scale) else constant(x, 1.0)
        at = ((row * heads + head) * head_dim + begin) * d_state
        for i in range((d_state + 1) * LANES):
            h[i] = zero  # and driven
        if given(state):
            for j in range(count):
                for n in range(d_state):
                    h[n * LANES + j] = state[at + j * d_state + n]
        pad = pads[row] if given(pads) else 0
        x_at, z_at = row * x_row + head * x_head + begin, row * z_row + head * z_head + begin
        y_row = heads * head_dim
        y_at = row * length * y_row + head * head_dim + begin
        B_at, C_at, dt_at = row * B_row + group * B_group, row * C_row + group * C_group, row * dt_row + head
        clear_rows(y, y_at, pad, y_row, count)
        for t in range(pad, length):
            prefetch_lanes(x, x_at + (t + AHEAD) * x_token)
            prefetch_lanes(z, z_at + (t + AHEAD) * z_token)
            prefetch_lanes(y, y_at + (t + AHEAD) * y_row)
            step = head_step(dt[dt_at + t * dt_token] + bias, with_softplus, low, high, threshold, scale)
            for j in range(count):
                driven[j] = step * x[x_at + t * x_token + j]
                out[j] = skip[j] * x[x_at + t * x_token + j]
            advance_head(h, exp(step * A[head]), driven, out, B, B_at + t * B_token, C, C_at + t * C_token, d_state)
            gate_lanes(y, y_at + t * y_row, out, z, z_at + t * z_token, count)
        for j in range(count):
            for n in range(d_state):
                final[at + j * d_state + n] = h[n * LANES + j]


def _ssd_step(
    state: Real, x: Real, dt: Real, A: Real, B: Real, C: Real, D: Real, z: Real, dt_bias: Real, y: Real,
    heads: Int, head_dim: Int, d_state: Int, groups: Int, with_softplus: Int, low: Float, high: Float,
    x_row: Int, x_head: Int, dt_row: Int, z_row: Int, z_head: Int, B_row: Int, B_group: Int, C_row: Int, C_group: Int,
    scratch: Real, first: Int, last: Int,
) -> None:  # fmt: skip
    """Here states lie side by side as they are stored: transposing them would cost more than the step."""
    minus_infinity, one = constant(x, -float("inf")), constant(x, 1.0)
    for task in range(first, last):
        row, head = task // heads, task % heads
        group = head // (heads // groups)
        bias = dt_bias[head] if given(dt_bias) else constant(x, 0.0)
        step = head_step(dt[row * dt_row + head] + bias, with_softplus, low, high, minus_infinity, one)
        decay = exp(step * A[head])
        B_at, C_at = row * B_row + group * B_group, row * C_row + group * C_group
        y_at = task * head_dim
        for p in range(head_dim):
            value, at = x[row * x_row + head * x_head + p], (y_at + p) * d_state
            for n in range(d_state):
                state[at + n] = decay * state[at + n] + step * value * B[B_at + n]
            skip = D[head * head_dim + p] * value if given(D) else constant(x, 0.0)
            scratch[p] = dot(state, at, C, C_at, d_state) + skip
        gate_lanes(y, y_at, scratch, z, row * z_row + head * z_head, head_dim)


_scan_kernel, _step_kernel = Kernel(_ssd), Kernel(_ssd_step)


def ssd(
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
    keep_above: Tensor | None = None,
    dt_scale: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `statespan.kernels.ssd.ssd`, which has checked the shapes."""
    dtype, (batch, length, heads, head_dim), d_state = wide(x), x.shape, B.shape[3]
    if extra := -d_state % UNROLLED:
        B, C, state = (None if v is None else F.pad(v, (0, extra)) for v in (B, C, state))  # type: ignore[assignment]
    inputs, dt, B, C, gate = (rows(v, dtype) for v in (x, dt, B, C, z))
    A, dt_bias, keep_above, dt_scale, state = (settled(v, dtype) for v in (A, dt_bias, keep_above, dt_scale, state))
    (groups, states), (low, high) = B.shape[2:], dt_limit or (-math.inf, math.inf)
    y = torch.empty(batch, length, heads, head_dim, dtype=dtype)
    final = torch.empty(batch, heads, head_dim, states, dtype=dtype)
    skips = None if pads is None else torch.tensor(pads, dtype=torch.int64)
    per_feature = _per_feature(D, heads, head_dim, dtype)
    _scan_kernel(
        dtype, batch * heads * -(-head_dim // LANES), y.numel() * states // 4, (states + 3) * LANES,
        *map(pointer, (inputs, dt, A, B, C, per_feature, gate, dt_bias, keep_above, dt_scale, skips, state, y, final)),
        length, heads, head_dim, states, groups, int(softplus), low, high,
        *inputs.stride()[:3], *dt.stride()[:2], *(inputs if gate is None else gate).stride()[:3],
        *B.stride()[:3], *C.stride()[:3],
    )  # fmt: skip
    return y.to(x.dtype), final[..., :d_state].contiguous()


def _per_feature(D: Tensor | None, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor | None:
    """D as (heads, head_dim)"""
    if D is None or D.ndim == 2:
        return D if D is None else D.to(dtype).contiguous()
    return D.to(dtype)[:, None].expand(heads, head_dim).contiguous()


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
) -> Tensor:
    """As `statespan.kernels.ssd.ssd_state_update`, which has checked the shapes."""
    dtype, (batch, heads, head_dim), (groups, d_state) = wide(x), x.shape, B.shape[1:]
    inputs, dt, B, C, gate = (rows(v, dtype) for v in (x, dt, B, C, z))
    A, dt_bias = settled(A, dtype), settled(dt_bias, dtype)
    low, high = dt_limit or (-math.inf, math.inf)
    y, per_feature = torch.empty(batch, heads, head_dim, dtype=dtype), _per_feature(D, heads, head_dim, dtype)
    _step_kernel(
        dtype, batch * heads, y.numel() * d_state // 4, head_dim,
        *map(pointer, (state, inputs, dt, A, B, C, per_feature, gate, dt_bias, y)),
        heads, head_dim, d_state, groups, int(softplus), low, high,
        *inputs.stride()[:2], dt.stride(0), *(inputs if gate is None else gate).stride()[:2],
        *B.stride()[:2], *C.stride()[:2],
    )  # fmt: skip
    return y if y.dtype is x.dtype else y.to(x.dtype)
