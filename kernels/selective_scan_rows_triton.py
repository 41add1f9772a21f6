"""The selective scan as a plain loop over time, for batches whose rows x channels fill the chip by themselves.

A thread holds STATES consecutive states of one channel in registers, d_state / STATES lanes make up the channel, and a
program walks all tokens. Softplus, Δx, skip and gate are computed once per token and channel, a tile of tokens at a
time, in the layout that memory likes to be read in; the loop reads Δ, Δx, B and C from shared memory, the last two as
16-byte broadcasts. Per (token, channel, state): 5 arithmetic instructions, one of them an exponential, and under 3 of
loads and sums over lanes. `selective_scan_tiles_triton` needs one more, but no rows to fill the chip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statespan.kernels.gluon_frontend import (
    LOG2E,
    BlockedLayout,
    SliceLayout,
    arange,
    filled,
    gl,
    jit,
    row_of,
    sigmoid,
    softplus,
    staged,
)
from statespan.kernels.triton_common import INTERPRETED, pad_counts, unit_stride, wide_vector


@dataclass(frozen=True)
class Walking:
    """How channels and states lie on the threads; powers of two."""

    tokens: int = 32
    """Tokens staged at once, a multiple of 4."""
    states: int = 4
    """States a thread holds."""
    warps: int = 4
    lanes: int = 1 if INTERPRETED else 32

    def channels(self, padded_states: int) -> int:
        """Channels of a program"""
        return max(self.lanes * self.warps * min(self.states, padded_states) // padded_states, 1)


@jit(do_not_specialize=["length"])
def _scan(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, keep_ptr, scale_ptr, pads_ptr, state_ptr,
    y_ptr, final_ptr, length, d_inner, per_group, x_batch, x_row, dt_batch, dt_row, z_batch, z_row,
    B_batch, B_row, B_group, C_batch, C_row, C_group,
    N: tl.constexpr, PADDED_N: tl.constexpr, BLOCKS_A_GROUP: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_PADS: tl.constexpr, HAS_STATE: tl.constexpr,
    STAGED: tl.constexpr, TOKENS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = PADDED_N // STATES  # lanes of a channel
    OWN: tl.constexpr = BlockedLayout([1, STATES], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])  # (channel, state)
    CHANNEL: tl.constexpr = SliceLayout(1, OWN)
    STATE: tl.constexpr = SliceLayout(0, OWN)
    VECTOR: tl.constexpr = min(CHANNELS, 8)
    IO: tl.constexpr = BlockedLayout([1, VECTOR], [32 * VECTOR // CHANNELS, CHANNELS // VECTOR], [WARPS, 1], [1, 0])
    WIDE: tl.constexpr = min(PADDED_N, 8)
    BC: tl.constexpr = BlockedLayout([1, WIDE], [32 * WIDE // PADDED_N, PADDED_N // WIDE], [WARPS, 1], [1, 0])

    batch = gl.program_id(1).to(gl.int64)
    group = gl.program_id(0) // BLOCKS_A_GROUP
    block = gl.program_id(0) % BLOCKS_A_GROUP
    c = block * CHANNELS + arange(CHANNELS, SliceLayout(0, IO))
    c_ok = (c < per_group)[None, :]
    d = (group * per_group + c)[None, :]
    c_own = block * CHANNELS + arange(CHANNELS, CHANNEL)
    d_own = (group * per_group + c_own)[:, None]
    n = arange(PADDED_N, STATE)[None, :]
    own_ok = (c_own < per_group)[:, None] & (n < N)
    t_tile = arange(TOKENS, SliceLayout(1, IO))[:, None]
    t_rows = arange(TOKENS, SliceLayout(1, BC))[:, None]
    n_rows = arange(PADDED_N, SliceLayout(0, BC))[None, :]

    bias = gl.load(bias_ptr + d, mask=c_ok & HAS_BIAS, other=0.0)
    keep = gl.load(keep_ptr + batch * d_inner + d, mask=c_ok & HAS_KEEP, other=0.0)
    scale = gl.load(scale_ptr + batch * d_inner + d, mask=c_ok & HAS_SCALE, other=0.0)
    skip = gl.load(D_ptr + d, mask=c_ok & HAS_D, other=0.0)
    rates = gl.load(A_ptr + d_own * N + n, mask=own_ok, other=0.0) * LOG2E
    first = 0
    if HAS_PADS:
        first = gl.load(pads_ptr + batch)
    h = filled([CHANNELS, PADDED_N], 0.0, gl.float32, OWN)
    if HAS_STATE:
        h = gl.load(state_ptr + (batch * d_inner + d_own) * N + n, mask=own_ok, other=0.0).to(gl.float32)
    x_ptr += batch * x_batch
    dt_ptr += batch * dt_batch
    z_ptr += batch * z_batch
    B_ptr += batch * B_batch + group * B_group
    C_ptr += batch * C_batch + group * C_group
    y_ptr += batch * length * d_inner
    if STAGED:
        FLAT: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        outputs = gl.allocate_shared_memory(gl.float32, [TOKENS, CHANNELS], FLAT)
        outputs_by_four = outputs._reinterpret(gl.float32, [TOKENS // 4, 4, CHANNELS], FLAT)

    for start in range(0, length, TOKENS):
        t = start + t_tile
        ok = (t < length) & (t >= first) & c_ok
        x = gl.load(x_ptr + t_tile * x_row + d, mask=ok, other=0.0).to(gl.float32)
        dt = gl.load(dt_ptr + t_tile * dt_row + d, mask=ok, other=0.0).to(gl.float32)
        rows_ok = (start + t_rows < length) & (start + t_rows >= first) & (n_rows < N)
        B = gl.load(B_ptr + t_rows * B_row + n_rows, mask=rows_ok, other=0.0).to(gl.float32)
        C = gl.load(C_ptr + t_rows * C_row + n_rows, mask=rows_ok, other=0.0).to(gl.float32)
        step = dt + bias
        if SOFTPLUS:
            step = softplus(step)
        if HAS_KEEP:
            step = gl.where(step > keep, step, 0.0)
        if HAS_SCALE:
            step *= scale
        step = gl.where(ok, step, 0.0)
        steps, drives, Bs, Cs = staged(step, IO), staged(step * x, IO), staged(B, BC), staged(C, BC)
        if not STAGED:
            y = filled([TOKENS, CHANNELS], 0.0, gl.float32, IO)
        for four in range(TOKENS // 4):
            found = ()
            for u in gl.static_range(4):
                at = four * 4 + u
                decay = gl.exp2(row_of(steps, at, CHANNEL)[:, None] * rates)
                h = decay * h + row_of(drives, at, CHANNEL)[:, None] * row_of(Bs, at, STATE)[None, :]
                found = found + (gl.sum(h * row_of(Cs, at, STATE)[None, :], axis=1),)  # type: ignore  # noqa: RUF005
            # (channel, 2, 2)
            four_y = gl.join(gl.join(found[0], found[2]), gl.join(found[1], found[3]))  # type: ignore[misc]
            four_y = gl.permute(gl.reshape(four_y, [CHANNELS, 4]), [1, 0])
            if STAGED:
                outputs_by_four.index(four).store(four_y)
            else:
                for u in gl.static_range(4):
                    y = gl.where(t_tile == four * 4 + u, found[u][None, :], y)
        if STAGED:
            y = outputs.load(IO)
        if HAS_D:
            y += skip * x
        if HAS_Z:
            z = gl.load(z_ptr + t_tile * z_row + d, mask=ok, other=0.0).to(gl.float32)
            y *= z * sigmoid(z)
        if HAS_PADS:
            y = gl.where(ok, y, 0.0)
        gl.store(y_ptr + t_tile * d_inner + d, y.to(y_ptr.dtype.element_ty), mask=(t < length) & c_ok)
        # 64-bit, once a tile: positions within a tile stay small
        x_ptr += TOKENS * x_row
        dt_ptr += TOKENS * dt_row
        z_ptr += TOKENS * z_row
        B_ptr += TOKENS * B_row
        C_ptr += TOKENS * C_row
        y_ptr += TOKENS * d_inner
    gl.store(final_ptr + (batch * d_inner + d_own) * N + n, h, mask=own_ok)


def scan_by_rows(
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
    walking: Walking = Walking(),
) -> tuple[Tensor, Tensor]:
    """y (batch, length, d_inner) in x's dtype and the last state (batch, d_inner, d_state)."""
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    (batch, length, d_inner), (groups, d_state) = x.shape, B.shape[2:]
    x, dt, B, C = (unit_stride(v) for v in (x, dt, B, C))
    gate, counts = x if z is None else unit_stride(z), pad_counts(pads, x)
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    y = torch.empty(batch, length, d_inner, dtype=x.dtype, device=x.device)
    final = torch.empty(batch, d_inner, d_state, **new)
    padded_states = triton.next_power_of_2(d_state)
    per_group, channels = d_inner // groups, walking.channels(padded_states)
    blocks = triton.cdiv(per_group, channels)
    _scan[(groups * blocks, batch)](
        x, dt, wide_vector(A, x), B, C, wide_vector(D, x), gate, wide_vector(dt_bias, x), wide_vector(keep_above, x),
        wide_vector(dt_scale, x), x if counts is None else counts, wide_vector(state, x), y, final,
        length, d_inner, per_group, *x.stride()[:2], *dt.stride()[:2], *gate.stride()[:2], *B.stride()[:3],
        *C.stride()[:3], N=d_state, PADDED_N=padded_states, BLOCKS_A_GROUP=blocks,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus,
        HAS_KEEP=keep_above is not None, HAS_SCALE=dt_scale is not None, HAS_PADS=counts is not None,
        HAS_STATE=state is not None, STAGED=not INTERPRETED,
        TOKENS=walking.tokens, STATES=min(walking.states, padded_states), CHANNELS=channels, WARPS=walking.warps,
        num_warps=walking.warps,
    )  # fmt: skip
    return y, final
