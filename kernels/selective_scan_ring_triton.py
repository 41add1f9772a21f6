"""The selective scan on CUDA: warps along time, each exponential and each product computed once.

A program owns some channels and walks the length in rounds of WARPS tiles of T tokens, one tile a warp. Of a tile, a
thread holds T consecutive tokens of a channel; LANES lanes share a channel and split its states. State by state (all
LANES at once) a warp takes the carry that the warp before it left, runs the plain recurrence over its T tokens and
hands the carry on, see `warp_ring`. Nothing is done twice and no shuffle composes segments:

    per (token, channel, state)    exp2, 2 multiplications, 2 multiply-adds               5 instructions
    per tile, state and thread     B and C from shared memory, the carry in and out       T / 2 + 8
    per (token, channel)           softplus, threshold, Δx, skip, gate in one of the LANES lanes; Δ and Δx shuffled to
                                   the others, y summed over them: about 45 instructions / d_state

The chip's limits here, H100, d_state 16: an exponential takes the special-function unit 8 cycles of a scheduler's time,
issuing takes 9 to 11, and what a thread gets from shared memory (B, C, carries, rows, shuffles) passes at one word a
lane and cycle of the whole multiprocessor. LANES = 1 shuffles nothing, LANES = 2 and 4 make more warps.

The next round's B and C, and its rows of x, dt and z where they are whole pieces of 16 bytes (COPIED), come to shared
memory by asynchronous copies, and y leaves by way of it: loads of their own would take a thread's registers and some
40 instructions a tile more. At 96 registers five programs share a multiprocessor: all 640 of 5120 channels are there at
once, where with four a second wave of them left it half empty.

Bytes: x, dt, z and y once (x and z once more from shared memory); B and C once in float32, in the order in which tiles
read them (`arrange`).
"""

# ruff: noqa: RUF005 -- Triton compiles no unpacking within a tuple; and a tuple that grows changes its type
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from statespan.kernels.gluon_frontend import (
    LOG2E,
    SliceLayout,
    arange,
    barrier,
    convert,
    filled,
    gl,
    jit,
    over_cluster,
    own_memory,
    same_in_cluster,
    sigmoid,
    softplus,
)
from statespan.kernels.launch import relaunched
from statespan.kernels.selective_scan_ring_layout import Ring, arrange, gathered, halved, number_of
from statespan.kernels.triton_common import pad_counts, parts, unit_stride, vector
from statespan.kernels.warp_ring import (
    await_quads,
    await_word,
    copy_out,
    copy_quads,
    copy_rows,
    early,
    hand_on,
    in_program,
    put,
    put_rows,
    read,
    read_rows,
    shared_base,
    together,
)


@jit
def _walked(decay, drive, carry):
    """What `hand_on` does where there is one warp and no thread: h over axis 1, and the carry after it"""
    T: tl.constexpr = decay.shape[1]
    at, h = tl.arange(0, T)[None, :, None, None], decay * 0.0
    for t in tl.static_range(T):
        kept = tl.sum(tl.where(at == t, decay, 0.0), axis=1)
        carry = kept * carry + tl.sum(tl.where(at == t, drive, 0.0), axis=1)
        h = tl.where(at == t, carry[:, None], h)
    return h, carry


@relaunched
@jit(do_not_specialize=["length"])
def _scan(
    x_ptr, dt_ptr, A_ptr, BC_ptr, D_ptr, z_ptr, bias_ptr, keep_ptr, scale_ptr, pads_ptr, state_ptr, y_ptr, final_ptr,
    length, d_inner, per_group, x_batch, x_row, dt_batch, dt_row, z_batch, z_row,
    GROUPS: tl.constexpr, BLOCKS_A_GROUP: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_PADS: tl.constexpr, HAS_STATE: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr, T: tl.constexpr,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, WARPS: tl.constexpr, PROGRAMS: tl.constexpr,
    WORDS: tl.constexpr, STAGED: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = PADDED_N // LANES  # a lane's states
    R: tl.constexpr = T // LANES  # tokens whose softplus and gate a lane computes
    ROUND: tl.constexpr = WARPS * T
    HERE: tl.constexpr = WARPS // PROGRAMS  # warps of this program
    OWN: tl.constexpr = over_cluster([1, T, 1, 1], [1, 1, CHANNELS, LANES], [HERE, 1, 1, 1], [1, 2, 3, 0], PROGRAMS)
    IO: tl.constexpr = over_cluster([1, R, 1, 1], [1, 1, CHANNELS, LANES], [HERE, 1, 1, 1], [1, 2, 3, 0], PROGRAMS)
    ONE: tl.constexpr = SliceLayout(1, OWN)  # (warp, channel, lane)
    STATE: tl.constexpr = SliceLayout(0, ONE)  # (channel, lane)
    TOKEN: tl.constexpr = SliceLayout(2, OWN)  # (warp, token, lane)
    ROW: tl.constexpr = SliceLayout(2, IO)  # (warp, R, lane)
    COPY: tl.constexpr = over_cluster([1, 1, 1], [1, 1, 32], [HERE, 1, 1], [2, 1, 0], PROGRAMS)
    SLOT: tl.constexpr = 8  # bytes: the carry and the round's number
    RING: tl.constexpr = STEPS * 32 * SLOT  # bytes between two warps
    LINE: tl.constexpr = 2 * T  # words of B and C for a state
    PIECE: tl.constexpr = PADDED_N * LINE  # in a tile
    # copied rows of a tile: pieces of 16 bytes; a gap after each lane's tokens sends the lanes to different banks
    ROW_BYTES: tl.constexpr = 2 * CHANNELS
    PIECES: tl.constexpr = max(ROW_BYTES // 16, 1)
    TENSOR: tl.constexpr = (T + LANES) * ROW_BYTES
    ROWS: tl.constexpr = 4 * TENSOR  # x, dt, z, y

    batch = gl.program_id(1).to(gl.int64)
    group = gl.program_id(0) // BLOCKS_A_GROUP
    block = gl.program_id(0) % BLOCKS_A_GROUP
    c = block * CHANNELS + arange(CHANNELS, SliceLayout(0, SliceLayout(1, SliceLayout(3, IO))))
    c = c[None, None, :, None]  # within the group
    d = group * per_group + c
    t_tile = (
        arange(WARPS, SliceLayout(1, SliceLayout(2, ROW)))[:, None, None] * T
        + arange(LANES, SliceLayout(0, SliceLayout(1, ROW)))[None, None, :] * R
        + arange(R, SliceLayout(0, SliceLayout(2, ROW)))[None, :, None]
    )[:, :, None, :]
    first = 0
    if HAS_PADS:
        first = gl.load(pads_ptr + batch)
    is_channel = c < per_group
    of_row = batch * d_inner + d
    bias = gl.load(bias_ptr + d, mask=is_channel & HAS_BIAS, other=0.0).to(gl.float32)
    keep = gl.load(keep_ptr + of_row, mask=is_channel & HAS_KEEP, other=0.0).to(gl.float32)
    scale = gl.load(scale_ptr + of_row, mask=is_channel & HAS_SCALE, other=0.0).to(gl.float32)
    skip = gl.load(D_ptr + d, mask=is_channel & HAS_D, other=0.0).to(gl.float32)

    channel = arange(CHANNELS, SliceLayout(1, STATE))[:, None]
    lane = arange(LANES, SliceLayout(0, STATE))[None, :]
    c_state = block * CHANNELS + channel
    d_state = group * per_group + c_state
    warp = arange(WARPS, SliceLayout(1, SliceLayout(2, ONE)))[:, None, None]
    each_lane = filled([WARPS, CHANNELS, LANES], 0, gl.int32, ONE)
    rounds = (length + ROUND - 1) // ROUND
    BC_ptr += (batch * GROUPS + group) * rounds * (WARPS * PIECE)
    l_token = arange(LANES, SliceLayout(0, SliceLayout(1, TOKEN)))[None, None, :]
    if STAGED:
        memory = gl.allocate_shared_memory(gl.int32, [WORDS], own_memory(PROGRAMS))
        # Triton keeps no shared memory for a kernel that never touches it; also, no slot has a round's number yet
        memory.store(filled([WORDS], 0, gl.int32, same_in_cluster(HERE, PROGRAMS)))
        barrier()
        source = shared_base(each_lane) + (channel + lane * CHANNELS)[None, :, :] * SLOT
        target = source + (warp + 1) % HERE * RING
        source += warp % HERE * RING
        places = (source[:, None, :, :], target[:, None, :, :])
        slots_at = source[:, None, :, :] + filled([WARPS, T, CHANNELS, LANES], 0, gl.int32, OWN)
        elsewhere = ()
        if PROGRAMS > 1:
            away = in_program(target, (warp // HERE + 1) % PROGRAMS + each_lane)
            at_end = gl.where(warp % HERE == HERE - 1, 1, 0) + each_lane
            elsewhere = (at_end[:, None, :, :], away[:, None, :, :])
        # B and C: two pieces for each warp, one that is read and one that comes
        w_copy = arange(WARPS, SliceLayout(1, SliceLayout(2, COPY)))[:, None, None]
        ours = w_copy % HERE
        quads = arange(PIECE // 128, SliceLayout(0, SliceLayout(2, COPY)))[None, :, None] * 128
        quads += arange(32, SliceLayout(0, SliceLayout(1, COPY)))[None, None, :] * 4
        one_each = w_copy + 0 * arange(32, SliceLayout(0, SliceLayout(1, COPY)))[None, None, :]
        arriving = shared_base(w_copy + 0 * quads) + HERE * RING + 4 * (2 * ours * PIECE + quads)
        coming = w_copy * PIECE + quads
        piece = filled([WARPS, T, LANES], 0, gl.int32, TOKEN)
        piece = shared_base(piece) + HERE * RING
        w_token = arange(WARPS, SliceLayout(1, SliceLayout(2, TOKEN)))[:, None, None] % HERE
        piece += 4 * (2 * w_token * PIECE + l_token * LINE)
        in_tile = arange(LANES, SliceLayout(0, SliceLayout(1, SliceLayout(2, OWN))))[None, None, :][:, :, None, :]
        SHARE: tl.constexpr = over_cluster(
            [1, LANES, R, 1, 1], [1, 1, 1, CHANNELS, LANES], [HERE, 1, 1, 1, 1], [2, 1, 3, 4, 0], PROGRAMS
        )
        whose = CHANNELS * arange(LANES, SliceLayout(0, SliceLayout(2, SliceLayout(3, SliceLayout(4, SHARE)))))
        whose = whose[None, :, None, None, None] + filled([WARPS, LANES, R, CHANNELS, LANES], 0, gl.int32, SHARE)
        in_warp = arange(CHANNELS, SliceLayout(0, SliceLayout(1, SliceLayout(2, SliceLayout(4, SHARE)))))
        whose += in_warp[None, None, None, :, None]
    else:
        piece = l_token * LINE + arange(T, SliceLayout(0, SliceLayout(2, TOKEN)))[None, :, None]
    if COPIED:
        COPIES: tl.constexpr = max(4 * T * PIECES // 32, 1)  # of a lane
        piece_at = arange(32, SliceLayout(0, SliceLayout(1, COPY)))[None, None, :]
        piece_at += 32 * arange(COPIES, SliceLayout(0, SliceLayout(2, COPY)))[None, :, None]
        part, which = piece_at % PIECES, gl.minimum(piece_at // (T * PIECES), 2 if HAS_Z else 1)
        t_part = piece_at // PIECES % T
        at_part = (t_part + t_part // R) * ROW_BYTES + 16 * part
        rows_base = HERE * (RING + 8 * PIECE)
        parts_at = shared_base(w_copy + 0 * piece_at) + rows_base + ours * (2 * ROWS) + which * TENSOR + at_part
        row_bytes = 2 * gl.where(which == 0, x_row, gl.where(which == 1, dt_row, z_row))
        batch_bytes = 2 * gl.where(which == 0, x_batch, gl.where(which == 1, dt_batch, z_batch)).to(gl.int64)
        parts = gl.where(which == 0, x_ptr.to(gl.int64), gl.where(which == 1, dt_ptr.to(gl.int64), z_ptr.to(gl.int64)))
        c_part = block * CHANNELS + 8 * part
        t_part += w_copy * T
        parts += batch * batch_bytes + t_part * row_bytes.to(gl.int64) + 2 * (group * per_group + c_part)
        NEVER: tl.constexpr = 1 << 30
        t_part = gl.where(c_part < per_group, t_part, NEVER)
        copy_rows(parts_at, parts, gl.where((t_part < length) & (t_part >= first), 1, 0))
        parts_step = (ROUND * row_bytes).to(gl.int32)
        # a lane's first token in its channel
        warp_io = arange(WARPS, SliceLayout(1, SliceLayout(2, ROW)))[:, None, None]
        lane_io = arange(LANES, SliceLayout(0, SliceLayout(1, ROW)))[None, None, :]
        channel_io = arange(CHANNELS, SliceLayout(0, SliceLayout(1, SliceLayout(3, IO))))[None, None, :, None]
        own = (warp_io % HERE * (2 * ROWS) + lane_io * ((R + 1) * ROW_BYTES))[:, :, None, :]
        own += channel_io * 2 + filled([WARPS, R, CHANNELS, LANES], 0, gl.int32, IO)
        rows_at = shared_base(own) + rows_base + own
        OUTS: tl.constexpr = max(T * PIECES // 32, 1)
        piece_out = arange(32, SliceLayout(0, SliceLayout(1, COPY)))[None, None, :]
        piece_out += 32 * arange(OUTS, SliceLayout(0, SliceLayout(2, COPY)))[None, :, None]
        t_out, part_out = piece_out // PIECES, piece_out % PIECES
        outs_at = shared_base(w_copy + 0 * piece_out) + rows_base + ours * (2 * ROWS) + 3 * TENSOR
        outs_at += (t_out + t_out // R) * ROW_BYTES + 16 * part_out
        c_out = block * CHANNELS + 8 * part_out
        has_out = (c_out < per_group) & (t_out < T)
        t_out += w_copy * T
        outs_to = y_ptr.to(gl.int64) + 2 * (batch * length * d_inner + t_out * d_inner.to(gl.int64))
        outs_to += 2 * (group * per_group + c_out)
        t_out = gl.where(has_out, t_out, NEVER)
        outs_step = 2 * ROUND * d_inner
        t_lane = (warp_io * T + lane_io * R)[:, :, None, :]
        at_row = arange(R, SliceLayout(0, SliceLayout(2, ROW)))[None, :, None][:, :, None, :]
    if STAGED:
        copy_quads(arriving, BC_ptr + coming, one_each)
    rates, carries = (), ()
    for k in gl.static_range(STEPS):
        n = k * LANES + lane
        ok = (c_state < per_group) & (n < N)
        rates = rates + (gl.load(A_ptr + d_state * N + n, mask=ok, other=0.0).to(gl.float32) * LOG2E,)
        before = filled([CHANNELS, LANES], 0.0, gl.float32, STATE)
        if HAS_STATE:
            before = gl.load(state_ptr + (batch * d_inner + d_state) * N + n, mask=ok, other=0.0).to(gl.float32)
        if STAGED:
            put(source + k * 32 * SLOT, before.to(gl.int32, bitcast=True)[None, :, :] + each_lane)
            # the carry before the first tile is there, all others are to come
            put(source + (k * 32 * SLOT + 4), gl.where(warp == 0, 1, 0) + each_lane)
        else:
            carries = carries + (before[None, :, :],)
    if STAGED:
        together(one_each, PROGRAMS)

    x_ptr += batch * x_batch
    dt_ptr += batch * dt_batch
    z_ptr += batch * z_batch
    y_ptr += batch * length * d_inner
    if not COPIED:
        live = (t_tile < length) & (t_tile >= first) & (c < per_group)
        # 32-bit places are added up before they meet the pointer: in the other order registers spill
        x_next = gl.load(x_ptr + (t_tile * x_row + d), mask=live, other=0.0)
        dt_next = gl.load(dt_ptr + (t_tile * dt_row + d), mask=live, other=0.0)
    for round in range(rounds):
        if STAGED:
            await_quads(one_each)
            BC_ptr += gl.where(round + 1 < rounds, WARPS * PIECE, 0)
            turn = round % 2 * (4 * PIECE)
            if COPIED:
                gone, turn_rows = (round + 1) * ROUND, round % 2 * ROWS
                parts += parts_step
                there = t_part < length - gone
                if HAS_PADS:
                    there &= t_part >= first - gone
                copy_rows(parts_at + (ROWS - turn_rows), parts, gl.where(there, 1, 0))
            copy_quads(arriving + (4 * PIECE - turn), BC_ptr + coming, one_each)
            here = piece + turn
            B_next = read(here, 0)
        if COPIED:
            rows_here = rows_at + turn_rows
            x_here, dt_here = read_rows(rows_here, 0, ROW_BYTES), read_rows(rows_here, TENSOR, ROW_BYTES)
            t_here = round * ROUND + t_lane
            live = at_row < length - t_here  # channels that do not exist are not stored
            if HAS_PADS:
                live &= at_row >= first - t_here
        else:
            x_here, dt_here = x_next, dt_next
            if HAS_Z:
                z_here = gl.load(z_ptr + (t_tile * z_row + d), mask=live, other=0.0)
        x = number_of(x_here, x_ptr.dtype.element_ty)
        step = number_of(dt_here, dt_ptr.dtype.element_ty) + bias
        if SOFTPLUS:
            step = softplus(step)
        if HAS_KEEP:
            step = gl.where(step > keep, step, 0.0)
        if HAS_SCALE:
            step *= scale
        step = gl.where(live, step, 0.0)
        drive = step * x
        if LANES > 1:
            drive, step = gathered(drive, whose, OWN), gathered(step, whose, OWN)
        y = filled([WARPS, T, CHANNELS, LANES], 0.0, gl.float32, OWN)
        was_live = live
        if not COPIED:
            t_next = (round + 1) * ROUND + t_tile
            live = (t_next < length) & (t_next >= first) & (c < per_group)
            # 64-bit, once a round: positions within one stay small
            x_ptr += ROUND * x_row
            dt_ptr += ROUND * dt_row
            x_next = gl.load(x_ptr + (t_tile * x_row + d), mask=live, other=0.0)
            dt_next = gl.load(dt_ptr + (t_tile * dt_row + d), mask=live, other=0.0)
        if STAGED:
            number = (round + 1 + each_lane)[:, None, :, :]
            sent = (round + 1 + gl.where(warp == WARPS - 1, 1, 0) + each_lane)[:, None, :, :]
            slot = early(slots_at)
        for k in gl.static_range(STEPS):
            # B is read one state ahead, C only here, for it is wanted last
            if STAGED:
                B, C = B_next, read(here, k * (LANES * 4 * LINE) + 4 * T)
                if k + 1 < STEPS:
                    B_next = read(here, (k + 1) * (LANES * 4 * LINE))
            else:
                B = gl.load(BC_ptr + piece + k * (LANES * LINE))
                C = gl.load(BC_ptr + piece + (k * (LANES * LINE) + T))
            B = B.to(gl.float32, bitcast=True)[:, :, None, :]
            C = C.to(gl.float32, bitcast=True)[:, :, None, :]
            decay = gl.exp2(step * rates[k][None, None, :, :])
            if STAGED:
                ways = places + (number, sent) + elsewhere
                h, slot = hand_on(
                    decay, drive * B, slot, ways, k * 32 * SLOT, (k + 1) * 32 * SLOT, PROGRAMS, k + 1 == STEPS
                )
            else:
                h, carry = _walked(decay, drive * B, carries[0])
                carries = carries[1:] + (carry,)
            y += h * C
        if COPIED:  # read again: this keeps no registers
            x_here, z_here = read_rows(rows_here, 0, ROW_BYTES), read_rows(rows_here, 2 * TENSOR, ROW_BYTES)
        if LANES == 4:
            y = halved(halved(y, in_tile >= 2, "16"), in_tile % 2 == 1, "8")
        if LANES == 2:
            y = halved(y, in_tile == 1, "16")
        out = convert(y, IO)
        if HAS_D:
            out += skip * number_of(x_here, x_ptr.dtype.element_ty)
        if HAS_Z:
            z = number_of(z_here, z_ptr.dtype.element_ty)
            out *= z * sigmoid(z)
        if HAS_PADS:
            out = gl.where(was_live, out, 0.0)
        out = out.to(y_ptr.dtype.element_ty)
        if COPIED:
            put_rows(rows_here, out.to(gl.int16, bitcast=True).to(gl.int32), 3 * TENSOR, ROW_BYTES)
            copy_out(outs_to, outs_at + turn_rows, gl.where(t_out < length - round * ROUND, 1, 0))
            outs_to += outs_step
        else:
            inside = (round * ROUND + t_tile < length) & (c < per_group)
            gl.store(y_ptr + t_tile * d_inner + d, out, mask=inside)
            z_ptr += ROUND * z_row
            y_ptr += ROUND * d_inner
        if not STAGED:
            BC_ptr += WARPS * PIECE
    for k in gl.static_range(STEPS):
        n = k * LANES + lane
        ok = (c_state < per_group) & (n < N)
        if STAGED:
            slot_at = source + k * 32 * SLOT
            # the last warp leaves it for the first; the others have their last carry already
            after = await_word(slot_at, slot_at + 4, rounds + gl.where(warp == 0, 1, 0) + each_lane)
        else:
            after = carries[k]
        at = ((batch * d_inner + d_state) * N + n)[None, :, :] + each_lane
        gl.store(final_ptr + at, after, mask=(warp == 0) & ok[None, :, :])
    if STAGED:
        memory._keep_alive()


def scan_in_ring(
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
    ring: Ring | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, length, d_inner) in x's dtype and the last state (batch, d_inner, d_state)."""
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    (batch, length, d_inner), (groups, d_state) = x.shape, B.shape[2:]
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    if not length:
        return torch.empty_like(x), torch.zeros(batch, d_inner, d_state, **new) if state is None else state.float()
    x, dt, B, C = (unit_stride(v) for v in (x, dt, B, C))
    gate, counts = x if z is None else unit_stride(z), pad_counts(pads, x)
    ring = ring or Ring()
    copied = ring.copies(groups, x, dt, gate)
    constants, tiles = ring.constants(d_state, copied), parts(length, ring.round) * (ring.round // ring.tokens)
    arranged = torch.empty(
        batch, groups, tiles, constants["PADDED_N"], 2, ring.tokens, dtype=torch.int32, device=x.device
    )
    pad_argument = vector(counts, x)
    arrange[(parts(tiles * ring.tokens, 64), batch, groups)](
        B, C, pad_argument, arranged, length, tiles, *B.stride()[:3], *C.stride()[:3], N=d_state,
        PADDED_N=constants["PADDED_N"], GROUPS=groups, HAS_PADS=counts is not None, T=ring.tokens, BLOCK=64,
    )  # fmt: skip
    y = torch.empty(batch, length, d_inner, dtype=x.dtype, device=x.device)
    final = torch.empty(batch, d_inner, d_state, **new)
    per_group = d_inner // groups
    blocks = parts(per_group, ring.channels)
    _scan[(groups * blocks, batch)](
        x, dt, A.contiguous(), arranged, vector(D, x), gate, vector(dt_bias, x), vector(keep_above, x),
        vector(dt_scale, x), pad_argument, vector(state, x), y, final,
        length, d_inner, per_group, *x.stride()[:2], *dt.stride()[:2], *gate.stride()[:2], GROUPS=groups,
        BLOCKS_A_GROUP=blocks, HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None,
        SOFTPLUS=softplus, HAS_KEEP=keep_above is not None, HAS_SCALE=dt_scale is not None,
        HAS_PADS=counts is not None, HAS_STATE=state is not None, **constants,
    )  # fmt: skip
    return y, final
