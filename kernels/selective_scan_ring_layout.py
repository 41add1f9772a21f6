"""How the ring of `selective_scan_ring_triton` lays channels, states and time on threads, and what moves them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from statespan.kernels.gluon_frontend import convert, gl, jit
from statespan.kernels.triton_common import INTERPRETED
from statespan.kernels.warp_ring import across, from_lane, hand_on_code, read_code

LANES_OF_A_WARP = 2 if INTERPRETED else 32


@dataclass(frozen=True)
class Ring:
    """How channels, states and time lie on the threads."""

    tokens: int = 8
    """Of a thread; a multiple of 4 and of `lanes`."""
    lanes: int = 1 if INTERPRETED else 4
    """That share a channel's states: 1, 2 or 4."""
    each: int = 1
    """Neighbouring channels of a thread: 1, or 2 where they are 16 bits each."""
    warps: int = 1 if INTERPRETED else 4
    registers: int | None = 96
    """At most so many a thread, None: as many as the compiler likes. With 96, five programs share a multiprocessor."""

    @property
    def channels(self) -> int:
        """Of a program"""
        return LANES_OF_A_WARP // self.lanes * self.each

    def fits(self, groups: int, *rows: Tensor) -> bool:
        """Whether two channels can be loaded as one word, and lie in one group"""
        return self.each == 1 or all(
            v.element_size() == 2 and v.data_ptr() % 4 == 0
            and not any(s % 2 for s in (*v.stride()[:2], v.shape[2] // groups))
            for v in rows
        )  # fmt: skip

    def constants(self, d_state: int) -> dict[str, Any]:
        """The kernel's constexpr arguments"""
        padded = max(triton.next_power_of_2(d_state), self.lanes)
        if not INTERPRETED:
            padded = max(padded, 64 // self.tokens)  # 16 bytes of B and C for each lane to copy
        words = self.warps * (padded // self.lanes * 64 * self.each + 4 * padded * self.tokens)
        (code, names), (load, load_names) = hand_on_code(self.tokens, self.each), read_code(self.tokens)
        return {
            "N": d_state, "PADDED_N": padded, "T": self.tokens, "LANES": self.lanes, "EACH": self.each,
            "CHANNELS": LANES_OF_A_WARP // self.lanes, "WARPS": self.warps, "WORDS": triton.next_power_of_2(words),
            "CODE": code, "NAMES": names, "LOAD": load, "LOAD_NAMES": load_names, "STAGED": not INTERPRETED,
            "num_warps": self.warps, "maxnreg": self.registers,
        }  # fmt: skip


@triton.jit(do_not_specialize=["length", "tiles"])
def arrange(
    B_ptr, C_ptr, pads_ptr, out_ptr, length, tiles, B_batch, B_row, B_group, C_batch, C_row, C_group,
    N: tl.constexpr, PADDED_N: tl.constexpr, GROUPS: tl.constexpr, HAS_PADS: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """B, C (batch, length, groups, N) -> (batch, group, tile, PADDED_N, 2, T), zeros off the ends"""
    batch, group = tl.program_id(1).to(tl.int64), tl.program_id(2)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    n = tl.arange(0, PADDED_N)
    first = 0
    if HAS_PADS:
        first = tl.load(pads_ptr + batch)
    ok = ((t < length) & (t >= first))[:, None] & (n < N)[None, :]
    B = tl.load(B_ptr + batch * B_batch + t[:, None] * B_row + group * B_group + n[None, :], mask=ok, other=0.0)
    C = tl.load(C_ptr + batch * C_batch + t[:, None] * C_row + group * C_group + n[None, :], mask=ok, other=0.0)
    at = ((batch * GROUPS + group) * tiles + t // T) * (2 * PADDED_N * T) + t % T
    at = out_ptr + at[:, None] + n[None, :] * (2 * T)
    exists = (t < tiles * T)[:, None]
    tl.store(at, B.to(tl.float32), mask=exists)
    tl.store(at + T, C.to(tl.float32), mask=exists)


@jit
def fetch(ptr, offset, ok, EACH: tl.constexpr):
    """A thread's neighbouring channels, two as one word: taken apart at once, they would be waited for at once"""
    if EACH == 1:
        found = gl.load(ptr + offset, mask=ok, other=0.0)
    else:
        found = gl.load((ptr + offset).to(gl.pointer_type(gl.int32), bitcast=True), mask=ok, other=0)
    return found


@jit
def parted(v, dtype: tl.constexpr, EACH: tl.constexpr):
    """A tuple, float32 for each of a thread's channels"""
    if EACH == 1:
        found = (v.to(gl.float32),)
    else:
        low = (v & 0xFFFF).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        high = (v >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        found = (low, high)  # type: ignore[assignment]
    return found


@jit
def gathered(v, channel, T: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr):
    """(warp, T / LANES, channel, lane), a lane's own tokens -> (warp, T, channel, lane), all of them in each lane"""
    CHANNELS: tl.constexpr = 32 // LANES
    SHAPE: tl.constexpr = [v.shape[0], T, CHANNELS, LANES]
    if LANES == 1:
        found = v
    elif LANES == 2:
        found = gl.join(from_lane(v, channel), from_lane(v, channel + CHANNELS))
        found = gl.reshape(gl.permute(found, [0, 4, 1, 2, 3]), SHAPE)
    else:
        even = gl.join(from_lane(v, channel), from_lane(v, channel + 2 * CHANNELS))
        odd = gl.join(from_lane(v, channel + CHANNELS), from_lane(v, channel + 3 * CHANNELS))
        found = gl.reshape(gl.permute(gl.join(even, odd), [0, 4, 5, 1, 2, 3]), SHAPE)
    return convert(found, OWN)


@jit
def halved(y, upper, DISTANCE: tl.constexpr):
    """(warp, 2 R, channel, lane) -> (warp, R, channel, lane): two lanes' sums, the upper one keeps the later tokens"""
    SHAPE: tl.constexpr = [y.shape[0], 2, y.shape[1] // 2, y.shape[2], y.shape[3]]
    low, high = gl.split(gl.permute(gl.reshape(y, SHAPE), [0, 2, 3, 4, 1]))
    LAYOUT: tl.constexpr = low.type.layout
    upper = convert(upper, LAYOUT)
    return gl.where(upper, high, low) + across(gl.where(upper, low, high), DISTANCE)
