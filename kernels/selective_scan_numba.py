"""The selective scan on the CPU: one pass, 64 channels side by side in SIMD lanes, their states in the nearest cache.

A task is one row of the batch and one block of channels. What a block needs of A and its states lie transposed as
(d_state, LANES) in 9 KB of scratch, and a token is a few short loops over lanes: the steps, four states at a time, the
gate. There is no horizontal sum, B and C enter as scalars, and x, dt and z are read once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.kernels.dispatch import wide
from statespan.kernels.fast_math import Int, Ints, Real, constant, decay, exp2, given, inlined, larger, shift, smaller
from statespan.kernels.lanes_numba import (
    AHEAD,
    LANES,
    clear_rows,
    dot,
    drive_lanes,
    fill_lanes,
    gate_lanes,
    prefetch_lanes,
    raw_steps,
)
from statespan.kernels.native import Kernel, pointer, rows, settled

UNROLLED = 4
"""States that go through the lanes together; d_state is padded to a multiple of it."""
LOG2E = 1.4426950408889634


@inlined
def advance_states(h, rates, steps, driven, y, B, B_at, C, C_at, d_state):
    """h = 2^(Δ rate) h + Δ x B and y += C·h for one token of LANES channels."""
    for n in range(0, d_state, UNROLLED):
        b0, b1, b2, b3 = B[B_at + n], B[B_at + n + 1], B[B_at + n + 2], B[B_at + n + 3]
        c0, c1, c2, c3 = C[C_at + n], C[C_at + n + 1], C[C_at + n + 2], C[C_at + n + 3]
        at = n * LANES
        for j in range(LANES):
            i0, i1, i2, i3 = at + j, at + j + LANES, at + j + 2 * LANES, at + j + 3 * LANES
            h0 = decay(steps[j] * rates[i0]) * h[i0] + driven[j] * b0
            h1 = decay(steps[j] * rates[i1]) * h[i1] + driven[j] * b1
            h2 = decay(steps[j] * rates[i2]) * h[i2] + driven[j] * b2
            h3 = decay(steps[j] * rates[i3]) * h[i3] + driven[j] * b3
            h[i0], h[i1], h[i2], h[i3] = h0, h1, h2, h3
            y[j] = (((y[j] + h0 * c0) + h1 * c1) + h2 * c2) + h3 * c3


@inlined
def limit_steps(steps, least, most):
    """Steps within which no decay of their channel passes 2^127."""
    for j in range(LANES):
        steps[j] = smaller(most[j], larger(least[j], steps[j]))


@inlined
def load_limits(least, most, rates, d_state):
    """The steps at which 2^(Δ rate) reaches 2^127: beyond any that a negative A and a positive step can come near."""
    for j in range(LANES):
        lowest, highest = constant(rates, 0.0), constant(rates, 0.0)
        for n in range(d_state):
            lowest = smaller(lowest, rates[n * LANES + j])
            highest = larger(highest, rates[n * LANES + j])
        least[j], most[j] = constant(rates, 127.0) / lowest, constant(rates, 127.0) / highest


@inlined
def load_block(rates, h, A, A_at, state, at, d_state, count):
    """Rates log2(e) A and states of a block, transposed; zeros in lanes of no channel."""
    for i in range(d_state * LANES):
        rates[i] = constant(h, 0.0)
        h[i] = constant(h, 0.0)
    for j in range(count):
        for n in range(d_state):
            rates[n * LANES + j] = A[A_at + j * d_state + n] * constant(h, LOG2E)
            if given(state):
                h[n * LANES + j] = state[at + j * d_state + n]


def _scan(
    x: Real, dt: Real, A: Real, B: Real, C: Real, D: Real, z: Real, dt_bias: Real, keep_above: Real, dt_scale: Real,
    pads: Ints, state: Real, y: Real, final: Real,
    length: Int, d_inner: Int, d_state: Int, groups: Int, with_softplus: Int,
    x_row: Int, x_token: Int, dt_row: Int, dt_token: Int, z_row: Int, z_token: Int,
    B_row: Int, B_token: Int, B_group: Int, C_row: Int, C_token: Int, C_group: Int,
    scratch: Real, first: Int, last: Int,
) -> None:  # fmt: skip
    rates, h, lanes = scratch, shift(scratch, d_state * LANES), shift(scratch, 2 * d_state * LANES)
    steps, driven, out, bias = lanes, shift(lanes, LANES), shift(lanes, 2 * LANES), shift(lanes, 3 * LANES)
    threshold, scale, skip = shift(lanes, 4 * LANES), shift(lanes, 5 * LANES), shift(lanes, 6 * LANES)
    least, most = shift(lanes, 7 * LANES), shift(lanes, 8 * LANES)
    zero, per_group = constant(x, 0.0), d_inner // groups
    blocks = (per_group + LANES - 1) // LANES
    for task in range(first, last):
        row, group = task // (groups * blocks), task // blocks % groups
        begin = group * per_group + task % blocks * LANES
        count = min(LANES, (group + 1) * per_group - begin)
        fill_lanes(bias, dt_bias, begin, count, zero)
        fill_lanes(skip, D, begin, count, zero)
        fill_lanes(threshold, keep_above, row * d_inner + begin, count, constant(x, -float("inf")))
        fill_lanes(scale, dt_scale, row * d_inner + begin, count, constant(x, 1.0))
        for j in range(2 * LANES):
            steps[j] = zero  # and driven, in lanes of no channel
        at = (row * d_inner + begin) * d_state
        load_block(rates, h, A, begin * d_state, state, at, d_state, count)
        load_limits(least, most, rates, d_state)
        pad = pads[row] if given(pads) else 0
        x_at, dt_at, z_at = row * x_row + begin, row * dt_row + begin, row * z_row + begin
        y_at, B_at, C_at = row * length * d_inner + begin, row * B_row + group * B_group, row * C_row + group * C_group
        clear_rows(y, y_at, pad, d_inner, count)
        for t in range(pad, length):
            prefetch_lanes(x, x_at + (t + AHEAD) * x_token)
            prefetch_lanes(dt, dt_at + (t + AHEAD) * dt_token)
            prefetch_lanes(z, z_at + (t + AHEAD) * z_token)
            prefetch_lanes(y, y_at + (t + AHEAD) * d_inner)
            raw_steps(steps, dt, dt_at + t * dt_token, count, bias, with_softplus)
            for j in range(LANES):
                step = zero if steps[j] <= threshold[j] else steps[j]
                steps[j] = step * scale[j]
            drive_lanes(driven, out, steps, skip, x, x_at + t * x_token, count)
            limit_steps(steps, least, most)
            advance_states(h, rates, steps, driven, out, B, B_at + t * B_token, C, C_at + t * C_token, d_state)
            gate_lanes(y, y_at + t * d_inner, out, z, z_at + t * z_token, count)
        for j in range(count):
            for n in range(d_state):
                final[at + j * d_state + n] = h[n * LANES + j]


def _scan_step(
    state: Real, x: Real, dt: Real, A: Real, B: Real, C: Real, D: Real, z: Real, dt_bias: Real, y: Real,
    d_inner: Int, d_state: Int, groups: Int, with_softplus: Int,
    x_row: Int, dt_row: Int, z_row: Int, B_row: Int, B_group: Int, C_row: Int, C_group: Int,
    scratch: Real, first: Int, last: Int,
) -> None:  # fmt: skip
    """Here states lie side by side as they are stored: transposing them would cost more than the step."""
    steps, driven, out = scratch, shift(scratch, LANES), shift(scratch, 2 * LANES)
    bias, skip = shift(scratch, 3 * LANES), shift(scratch, 4 * LANES)
    per_group = d_inner // groups
    blocks = (per_group + LANES - 1) // LANES
    for task in range(first, last):
        row, group = task // (groups * blocks), task // blocks % groups
        begin = group * per_group + task % blocks * LANES
        count = min(LANES, (group + 1) * per_group - begin)
        fill_lanes(bias, dt_bias, begin, count, constant(x, 0.0))
        fill_lanes(skip, D, begin, count, constant(x, 0.0))
        raw_steps(steps, dt, row * dt_row + begin, count, bias, with_softplus)
        drive_lanes(driven, out, steps, skip, x, row * x_row + begin, count)
        B_at, C_at = row * B_row + group * B_group, row * C_row + group * C_group
        for j in range(count):
            A_at, at = (begin + j) * d_state, (row * d_inner + begin + j) * d_state
            step, drive = steps[j] * constant(x, LOG2E), driven[j]
            for n in range(d_state):
                state[at + n] = exp2(step * A[A_at + n]) * state[at + n] + drive * B[B_at + n]
            out[j] += dot(state, at, C, C_at, d_state)
        gate_lanes(y, row * d_inner + begin, out, z, row * z_row + begin, count)


_scan_kernel, _step_kernel = Kernel(_scan), Kernel(_scan_step)


def selective_scan(
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
    keep_above: Tensor | None = None,
    dt_scale: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `statespan.kernels.selective_scan.selective_scan`, which has checked the shapes."""
    dtype, (batch, length, d_inner), d_state = wide(x), x.shape, A.shape[1]
    if extra := -d_state % UNROLLED:
        A, B, C, state = (None if v is None else F.pad(v, (0, extra)) for v in (A, B, C, state))  # type: ignore[assignment]
    inputs, dt, B, C, gate = (rows(v, dtype) for v in (x, dt, B, C, z))
    A, D, dt_bias, keep_above, dt_scale, state = (
        settled(v, dtype) for v in (A, D, dt_bias, keep_above, dt_scale, state)
    )
    B, C = (v if v.ndim == 4 else v[:, :, None] for v in (B, C))
    groups, states = B.shape[2], B.shape[3]
    y = torch.empty(batch, length, d_inner, dtype=dtype)
    final = torch.empty(batch, d_inner, states, dtype=dtype)
    skips = None if pads is None else torch.tensor(pads, dtype=torch.int64)
    _scan_kernel(
        dtype, batch * groups * -(-d_inner // groups // LANES), length * d_inner * states * batch,
        (2 * states + 9) * LANES,
        *map(pointer, (inputs, dt, A, B, C, D, gate, dt_bias, keep_above, dt_scale, skips, state, y, final)),
        length, d_inner, states, groups, int(softplus),
        *inputs.stride()[:2], *dt.stride()[:2], *(inputs if gate is None else gate).stride()[:2],
        *B.stride()[:3], *C.stride()[:3],
    )  # fmt: skip
    return y.to(x.dtype), final[..., :d_state].contiguous()


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
    """As `statespan.kernels.selective_scan.selective_state_update`, which has checked the shapes."""
    dtype, (batch, d_inner), d_state = wide(x), x.shape, A.shape[1]
    inputs, dt, B, C, gate = (rows(v, dtype) for v in (x, dt, B, C, z))
    A, D, dt_bias = (settled(v, dtype) for v in (A, D, dt_bias))
    groups, B_group, C_group = (1, 0, 0) if B.ndim == 2 else (B.shape[1], B.stride(1), C.stride(1))
    y = torch.empty(batch, d_inner, dtype=dtype)
    _step_kernel(
        dtype, batch * groups * -(-d_inner // groups // LANES), batch * d_inner * d_state, 5 * LANES,
        *map(pointer, (state, inputs, dt, A, B, C, D, gate, dt_bias, y)),
        d_inner, d_state, groups, int(softplus),
        inputs.stride(0), dt.stride(0), 0 if gate is None else gate.stride(0),
        B.stride(0), B_group, C.stride(0), C_group,
    )  # fmt: skip
    return y if y.dtype is x.dtype else y.to(x.dtype)
