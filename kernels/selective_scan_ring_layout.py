"""How the ring of `selective_scan_ring_triton` lays channels, states and time on threads, and what moves them there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from statespan.kernels.gluon_frontend import SliceLayout, convert, former, gl, jit, latter
from statespan.kernels.launch import relaunched
from statespan.kernels.triton_common import INTERPRETED, power_of_2
from statespan.kernels.warp_ring import across, from_lane

LANES_OF_A_WARP = 2 if INTERPRETED else 32


@dataclass(frozen=True)
class Ring:
    """How channels, states and time lie on the threads."""

    tokens: int = 8
    """Of a thread; a multiple of 4 and of `lanes`."""
    lanes: int = 1 if INTERPRETED else 4
    """That share a channel's states: 1, 2 or 4."""
    warps: int = 1 if INTERPRETED else 4
    """Of a program"""
    programs: int = 1
    """That share a ring, a thread block cluster: more of them are spread over the multiprocessors more evenly."""
    registers: int | None = 96
    """At most so many a thread, None: as many as the compiler likes. With 96, five programs share a multiprocessor."""

    @property
    def channels(self) -> int:
        """Of a ring"""
        return LANES_OF_A_WARP // self.lanes

    @property
    def round(self) -> int:
        """Tokens of all warps' tiles"""
        return self.tokens * self.warps * self.programs

    def copies(self, groups: int, *rows: Tensor) -> bool:
        """Whether rows are to be copied, and consist of whole aligned pieces of 16 bytes in one group"""
        return not INTERPRETED and self.channels % 8 == 0 and all(
            v.element_size() == 2 and v.data_ptr() % 16 == 0 and v.stride(1) < 1 << 20
            and not any(s % 8 for s in (*v.stride()[:2], v.shape[2] // groups))
            for v in rows
        )  # fmt: skip

    @cache  # noqa: B019 a handful of forms, as often as a scan is launched
    def constants(self, d_state: int, copied: bool) -> Mapping[str, Any]:
        """The kernel's constexpr arguments; `copied`: rows are"""
        words_each = 2 * self.tokens  # of B and C, for a state
        padded = max(power_of_2(d_state), self.lanes)
        if not INTERPRETED:
            padded = max(padded, 128 // words_each)  # 16 bytes of B and C for each lane to copy
        words = self.warps * (padded // self.lanes * 64 + 2 * padded * words_each)
        if copied:
            words += self.warps * 2 * 4 * (self.tokens + self.lanes) * self.channels // 2
        return MappingProxyType({
            "N": d_state, "PADDED_N": padded, "T": self.tokens, "LANES": self.lanes,
            "CHANNELS": LANES_OF_A_WARP // self.lanes, "WARPS": self.warps * self.programs, "PROGRAMS": self.programs,
            "WORDS": power_of_2(words), "STAGED": not INTERPRETED, "COPIED": copied,
            "num_warps": self.warps, "num_ctas": self.programs, "maxnreg": self.registers,
        })  # fmt: skip


@relaunched
@triton.jit(do_not_specialize=["length", "tiles"])
def arrange(
    B_ptr, C_ptr, pads_ptr, out_ptr, length, tiles, B_batch, B_row, B_group, C_batch, C_row, C_group,
    N: tl.constexpr, PADDED_N: tl.constexpr, GROUPS: tl.constexpr, HAS_PADS: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """B, C (batch, length, groups, N) -> words (batch, group, tile, PADDED_N, 2, T), zeros off the ends"""
    WORDS: tl.constexpr = 2 * T
    batch, group = tl.program_id(1).to(tl.int64), tl.program_id(2)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    n = tl.arange(0, PADDED_N)
    first = 0
    if HAS_PADS:
        first = tl.load(pads_ptr + batch)
    ok = ((t < length) & (t >= first))[:, None] & (n < N)[None, :]
    B = tl.load(B_ptr + batch * B_batch + t[:, None] * B_row + group * B_group + n[None, :], mask=ok, other=0.0)
    C = tl.load(C_ptr + batch * C_batch + t[:, None] * C_row + group * C_group + n[None, :], mask=ok, other=0.0)
    at = ((batch * GROUPS + group) * tiles + t // T) * (PADDED_N * WORDS) + t % T
    at = out_ptr + at[:, None] + n[None, :] * WORDS
    exists = (t < tiles * T)[:, None]
    tl.store(at, B.to(tl.float32).to(tl.int32, bitcast=True), mask=exists)
    tl.store(at + T, C.to(tl.float32).to(tl.int32, bitcast=True), mask=exists)


@jit
def number_of(v, dtype: tl.constexpr):
    """float32; v is of this type, or its 16 bits are the lower half of a word"""
    if v.dtype != gl.int32:
        found = v.to(gl.float32)
    elif dtype == gl.bfloat16:
        found = (v << 16).to(gl.float32, bitcast=True)
    else:
        found = v.to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    return found


@jit
def gathered(v, lane, OWN: tl.constexpr):
    """(warp, T / LANES, channel, lane), a lane's own tokens -> (warp, T, channel, lane), all of them in each lane

    lane: (warp, LANES, T / LANES, channel, lane), where each token comes from.
    """
    found = from_lane(convert(v, SliceLayout(1, lane.type.layout))[:, None, :, :, :], lane)
    return convert(gl.reshape(found, [v.shape[0], lane.shape[1] * v.shape[1], v.shape[2], v.shape[3]]), OWN)


@jit
def halved(y, upper, DISTANCE: tl.constexpr):
    """(warp, 2 R, channel, lane) -> (warp, R, channel, lane): two lanes' sums, the upper one keeps the later tokens"""
    SHAPE: tl.constexpr = [y.shape[0], 2, y.shape[1] // 2, y.shape[2], y.shape[3]]
    y = gl.reshape(y, SHAPE)  # the second axis lies in a thread: to take one half of it costs nothing
    low, high = gl.reduce(y, 1, former), gl.reduce(y, 1, latter)
    LAYOUT: tl.constexpr = low.type.layout
    upper = convert(upper, LAYOUT)
    return gl.where(upper, high, low) + across(gl.where(upper, low, high), DISTANCE)
