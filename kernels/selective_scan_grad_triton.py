"""The selective scan with gradients, for training: a forward that leaves the state before every tile, and a backward.

With g_t the gradient of the loss by the state h_t and y' = dL/dy * silu(z):

    g_t = C_t y'_t + exp(Δ_{t+1} A) g_{t+1}                         from the last token to the first
    dx = Δ Σ_n g B + D y'          dB = Σ_channels g Δ x            dC = Σ_channels y' h
    dΔ = Σ_n g (A exp(Δ A) h_{t-1} + x B)                           dA = Σ_tokens Δ g exp(Δ A) h_{t-1}

Source: the recurrence differentiated by hand; the checks are the reference's own gradients in float64. The backward
walks the tiles of `selective_scan_tiles_triton` from last to first, with its split of a tile over threads: states are
computed again from the one saved before the tile, then g runs the other way, each in the two sweeps described there.
The states of one turn of the loop do not wait for each other.
Nothing of size length x d_inner x d_state is ever written. Sums over channels (dB, dC) and rows (dA, dD, d dt_bias) are
partial sums per block, added by torch in a fixed order: no atomics, so a training run repeats to the bit.
`keep_above`, `dt_scale` and `pads` are constants here.
"""

from __future__ import annotations

from dataclasses import replace
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
    async_copy,
    backwards,
    backwards_code,
    compose,
    convert,
    filled,
    former,
    gl,
    jit,
    latter,
    sigmoid,
    softplus,
    through,
)
from statespan.kernels.selective_scan_tiles_triton import Tiling, arrange, scan_in_tiles
from statespan.kernels.triton_common import pad_counts, unit_stride, wide_vector

# more tokens a thread would need more registers than there are: seven values of each, and five of each state; with
# 168 registers three programs share a multiprocessor
TILING = Tiling(tokens=8, segments=16, channels=8, warps=4, unroll=2, registers=168)


@jit(do_not_specialize=["length"])
def _backward(
    x_ptr, dt_ptr, A_ptr, BC_ptr, D_ptr, z_ptr, bias_ptr, keep_ptr, scale_ptr, pads_ptr, starts_ptr, dy_ptr, dfinal_ptr,
    dx_ptr, ddt_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, dstate_ptr, length, d_inner, per_group,
    x_batch, x_row, dt_batch, dt_row, z_batch, z_row,
    GROUPS: tl.constexpr, BLOCKS_A_GROUP: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_PADS: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr, STAGED: tl.constexpr, UNROLL: tl.constexpr,
    TOKENS: tl.constexpr, SEGMENTS: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr, CODE: tl.constexpr,
    NAMES: tl.constexpr,
):  # fmt: skip
    # layouts and the order of B and C as in selective_scan_tiles_triton
    TILE: tl.constexpr = TOKENS * SEGMENTS
    OWN: tl.constexpr = BlockedLayout([1, TOKENS, 1], [SEGMENTS, 1, 32 // SEGMENTS], [1, 1, WARPS], [1, 0, 2])
    VECTOR: tl.constexpr = min(CHANNELS, 8)
    ROWS: tl.constexpr = 32 * VECTOR // CHANNELS
    DOWN: tl.constexpr = min(ROWS, TOKENS)
    IO: tl.constexpr = BlockedLayout([1, 1, VECTOR], [ROWS // DOWN, DOWN, CHANNELS // VECTOR], [WARPS, 1, 1], [2, 1, 0])
    SEG: tl.constexpr = BlockedLayout([1, 1], [SEGMENTS, 32 // SEGMENTS], [1, WARPS], [0, 1])
    TOKEN: tl.constexpr = SliceLayout(2, OWN)

    batch = gl.program_id(1).to(gl.int64)
    group = gl.program_id(0) // BLOCKS_A_GROUP
    block = gl.program_id(0) % BLOCKS_A_GROUP
    tiles = (length + TILE - 1) // TILE
    c = block * CHANNELS + arange(CHANNELS, SliceLayout(0, SliceLayout(1, IO)))
    c_ok = c < per_group
    d = group * per_group + c
    c_state = block * CHANNELS + arange(CHANNELS, SliceLayout(0, SEG))
    d_state = (group * per_group + c_state)[None, :]
    n = arange(PADDED_N, SliceLayout(1, SEG))[:, None]
    state_ok = (n < N) & (c_state < per_group)[None, :]
    in_segment = arange(SEGMENTS, SliceLayout(1, SliceLayout(2, IO)))[:, None]
    t_tile = in_segment * TOKENS + arange(TOKENS, SliceLayout(0, SliceLayout(2, IO)))[None, :]

    bias = gl.load(bias_ptr + d, mask=c_ok & HAS_BIAS, other=0.0)
    keep = gl.load(keep_ptr + batch * d_inner + d, mask=c_ok & HAS_KEEP, other=0.0)
    scale = gl.load(scale_ptr + batch * d_inner + d, mask=c_ok & HAS_SCALE, other=0.0)
    skip = gl.load(D_ptr + d, mask=c_ok & HAS_D, other=0.0)
    from_ = 0
    if HAS_PADS:
        from_ = gl.load(pads_ptr + batch)

    this = filled([SEGMENTS, CHANNELS], 0, gl.int32, SEG)
    at_first = filled([PADDED_N, CHANNELS], 0, gl.int32, SEG)
    token = arange(TOKENS, SliceLayout(0, SliceLayout(2, OWN)))[None, :, None]

    # what flows into the state at the tile's end from the tokens after it
    inflow = gl.load(dfinal_ptr + (batch * d_inner + d_state) * N + n, mask=state_ok, other=0.0)
    dA = filled([PADDED_N, CHANNELS], 0.0, gl.float32, SEG)
    dD = filled([SEGMENTS, TOKENS, CHANNELS], 0.0, gl.float32, IO)  # summed over a tile's tokens once, at the end
    dbias = filled([SEGMENTS, TOKENS, CHANNELS], 0.0, gl.float32, IO)
    # 64-bit, to the last tile; then back by one tile a turn
    skipped = ((length + TILE - 1) // TILE - 1).to(gl.int64) * TILE
    x_ptr += batch * x_batch + skipped * x_row
    dt_ptr += batch * dt_batch + skipped * dt_row
    z_ptr += batch * z_batch + skipped * z_row
    dense = (batch * length + skipped) * d_inner
    dy_ptr += dense
    dx_ptr += dense
    ddt_ptr += dense
    dz_ptr += dense
    BC_ptr += (batch * GROUPS + group) * tiles * (2 * N * TILE) + skipped * (2 * N)
    # (batch, block, N, tile, TOKENS / 4, SEGMENTS, 4): each block's share of dB and dC, zeros after the end
    share = (batch * gl.num_programs(0) + gl.program_id(0)) * N * tiles * TILE
    if STAGED:
        FIRST: tl.constexpr = 32 // SEGMENTS
        COPY: tl.constexpr = BlockedLayout([1, 1, 1, 4], [1, FIRST, SEGMENTS, 1], [1, WARPS, 1, 1], [3, 2, 1, 0])
        QUADS: tl.constexpr = SliceLayout(
            3, BlockedLayout([1, TOKENS // 4, 4, 1], [SEGMENTS, 1, 1, 32 // SEGMENTS], [1, 1, 1, WARPS], [2, 1, 0, 3])
        )
        whole_tile = gl.allocate_shared_memory(
            gl.float32, [N, TOKENS // 2, SEGMENTS, 4], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
        )
        shared = whole_tile._reinterpret(
            gl.float32, [N, TOKENS // 2, SEGMENTS, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
        )
        NO_QUAD: tl.constexpr = SliceLayout(3, COPY)
        line = arange(N, SliceLayout(1, SliceLayout(2, NO_QUAD)))[:, None, None] * (2 * TILE)
        line += arange(TOKENS // 2, SliceLayout(0, SliceLayout(2, NO_QUAD)))[None, :, None] * (SEGMENTS * 4)
        line += arange(SEGMENTS, SliceLayout(0, SliceLayout(1, NO_QUAD)))[None, None, :] * 4
        column = arange(4, SliceLayout(0, SliceLayout(1, SliceLayout(2, COPY))))
        piece = line[:, :, :, None] + column[None, None, None, :]
        # all channels of a token to one thread, which adds them: (channel, quad, segment, 4)
        ADDED: tl.constexpr = BlockedLayout([CHANNELS, 1, 1, 1], [1, 1, 8, 4], [1, WARPS // 2, 2, 1], [3, 2, 1, 0])
        SUMS: tl.constexpr = SliceLayout(0, ADDED)
        sums = arange(TOKENS // 4, SliceLayout(1, SliceLayout(2, SUMS)))[:, None, None] * (SEGMENTS * 4)
        sums += arange(SEGMENTS, SliceLayout(0, SliceLayout(2, SUMS)))[None, :, None] * 4
        sums += arange(4, SliceLayout(0, SliceLayout(1, SUMS)))[None, None, :]
        PRODUCTS: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
        products = ()
        for _turn in gl.static_range(2 * UNROLL):
            products = products + (  # type: ignore[assignment]  # noqa: RUF005 -- Triton knows no unpacking here
                gl.allocate_shared_memory(gl.float32, [CHANNELS, TOKENS // 4, SEGMENTS, 4], PRODUCTS),
            )
    else:
        quad = arange(TOKENS, SliceLayout(0, TOKEN))[None, :]
        piece = quad // 4 * (SEGMENTS * 4) + quad % 4 + arange(SEGMENTS, SliceLayout(1, TOKEN))[:, None] * 4

    for back in range(tiles):
        tile = tiles - 1 - back
        if STAGED:
            async_copy.async_copy_global_to_shared(whole_tile, BC_ptr + piece)
            async_copy.commit_group()
        at = (batch * tiles + tile) * N * d_inner + n * d_inner + d_state
        starts = gl.load(starts_ptr + at, mask=state_ok, other=0.0)
        t = tile * TILE + t_tile
        ok = ((t < length) & (t >= from_))[:, :, None] & c_ok[None, None, :]
        at_x = t_tile[:, :, None] * x_row + d[None, None, :]
        at_dt = t_tile[:, :, None] * dt_row + d[None, None, :]
        at_z = t_tile[:, :, None] * z_row + d[None, None, :]
        at_dense = t_tile[:, :, None] * d_inner + d[None, None, :]
        x = gl.load(x_ptr + at_x, mask=ok, other=0.0).to(gl.float32)
        step = gl.load(dt_ptr + at_dt, mask=ok, other=0.0).to(gl.float32) + bias[None, None, :]
        if SOFTPLUS:
            step = softplus(step)
        if HAS_KEEP:
            step = gl.where(step > keep[None, None, :], step, 0.0)
        if HAS_SCALE:
            step *= scale[None, None, :]
        step = gl.where(ok, step, 0.0)
        dy = gl.load(dy_ptr + at_dense, mask=ok, other=0.0).to(gl.float32)
        if HAS_Z:
            z = gl.load(z_ptr + at_z, mask=ok, other=0.0).to(gl.float32)
            dy *= z * sigmoid(z)
        step_x = convert(step * x, OWN)
        step = convert(step, OWN)
        dy = convert(dy, OWN)  # y' of the formula
        elapsed = convert(gl.sum(step, axis=1), SEG)
        y = filled([SEGMENTS, TOKENS, CHANNELS], 0.0, gl.float32, OWN)
        g_B = filled([SEGMENTS, TOKENS, CHANNELS], 0.0, gl.float32, OWN)
        dstep = filled([SEGMENTS, TOKENS, CHANNELS], 0.0, gl.float32, OWN)
        if STAGED:
            async_copy.wait_group(0)
        for some in range(N // UNROLL):
            for u in gl.static_range(UNROLL):
                k = some * UNROLL + u
                A = gl.load(A_ptr + k * d_inner + d_state, mask=(c_state < per_group)[None, :], other=0.0)
                A_own = convert(A, SliceLayout(1, OWN))[:, None, :]
                if STAGED:
                    rows = shared.index(k).permute([1, 0, 2])
                    B = rows.slice(0, TOKENS // 4, 1).load(QUADS)
                    C = rows.slice(TOKENS // 4, TOKENS // 4, 1).load(QUADS)
                    B = convert(B.reshape([SEGMENTS, TOKENS]), TOKEN)[:, :, None]
                    C = convert(C.reshape([SEGMENTS, TOKENS]), TOKEN)[:, :, None]
                else:
                    B = gl.load(BC_ptr + 2 * k * TILE + piece)[:, :, None]
                    C = gl.load(BC_ptr + (2 * k + 1) * TILE + piece)[:, :, None]
                decay = gl.exp2(step * (A_own * LOG2E))
                whole = gl.exp2(elapsed * (A * LOG2E))  # of a segment
                # the states, from first to last
                drive = step_x * B
                _, alone = gl.associative_scan((decay, drive), 1, compose)
                end = convert(gl.reduce(alone, 1, latter), SEG)
                entering, _ = through(whole, end, gl.gather(starts, this + k, 0), False)
                entering = convert(entering, SliceLayout(1, OWN))[:, None, :]
                _, h = gl.associative_scan((decay, gl.where(token == 0, decay * entering + drive, drive)), 1, compose)
                # their gradients, from last to first
                own = C * dy
                alone = backwards(decay, own, TOKENS, CODE, NAMES)
                out = convert(gl.reduce(decay * alone, 1, former), SEG)
                entering, out = through(whole, out, gl.gather(inflow, this + k, 0), True)
                inflow = gl.where(n == k, gl.gather(out, at_first, 0), inflow)
                entering = convert(entering, SliceLayout(1, OWN))[:, None, :]
                own = gl.where(token == TOKENS - 1, own + entering, own)
                g = backwards(decay, own, TOKENS, CODE, NAMES)

                y += C * h
                g_B += g * B
                carried = g * (h - drive)  # g exp(Δ A) h_{t-1}
                dstep += carried * A_own
                added = gl.sum(convert(gl.sum(carried * step, axis=1), SEG), axis=0)
                dA = gl.where(n == k, dA + added[None, :], dA)
                row = share + (k * tiles + tile) * TILE
                by_B, by_C = g * step_x, dy * h
                if STAGED:
                    # memory of its own for each of the loop's turns: one barrier a state is enough
                    by_B = by_B.reshape([SEGMENTS, TOKENS // 4, 4, CHANNELS]).permute([3, 1, 0, 2])
                    by_C = by_C.reshape([SEGMENTS, TOKENS // 4, 4, CHANNELS]).permute([3, 1, 0, 2])
                    products[2 * u].store(by_B)
                    products[2 * u + 1].store(by_C)
                    gl.store(dB_ptr + row + sums, gl.sum(products[2 * u].load(ADDED), axis=0))
                    gl.store(dC_ptr + row + sums, gl.sum(products[2 * u + 1].load(ADDED), axis=0))
                else:
                    gl.store(dB_ptr + row + piece, gl.sum(by_B, axis=2))
                    gl.store(dC_ptr + row + piece, gl.sum(by_C, axis=2))
        g_B = convert(g_B, IO)
        dstep = convert(dstep, IO)
        step = convert(step, IO)
        dy = convert(dy, IO)
        x = gl.load(x_ptr + at_x, mask=ok, other=0.0).to(gl.float32)
        dstep = gl.where(step != 0.0, dstep + x * g_B, 0.0) if HAS_KEEP else gl.where(ok, dstep + x * g_B, 0.0)
        if SOFTPLUS:
            dt = gl.load(dt_ptr + at_dt, mask=ok, other=0.0).to(gl.float32)
            dstep *= sigmoid(dt + bias[None, None, :])
        if HAS_SCALE:
            dstep *= scale[None, None, :]
        dbias += dstep
        dD += dy * x
        dx = step * g_B + skip[None, None, :] * dy
        inside = (t < length)[:, :, None] & c_ok[None, None, :]
        gl.store(dx_ptr + at_dense, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        gl.store(ddt_ptr + at_dense, dstep.to(ddt_ptr.dtype.element_ty), mask=inside)
        if HAS_Z:
            y = convert(y, IO) + skip[None, None, :] * x
            z = gl.load(z_ptr + at_z, mask=ok, other=0.0).to(gl.float32)
            gate = sigmoid(z)
            dy = gl.load(dy_ptr + at_dense, mask=ok, other=0.0).to(gl.float32)
            dz = gl.where(ok, dy * y * gate * (1.0 + z * (1.0 - gate)), 0.0)
            gl.store(dz_ptr + at_dense, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        x_ptr -= TILE * x_row
        dt_ptr -= TILE * dt_row
        z_ptr -= TILE * z_row
        dy_ptr -= TILE * d_inner
        dx_ptr -= TILE * d_inner
        ddt_ptr -= TILE * d_inner
        dz_ptr -= TILE * d_inner
        BC_ptr -= 2 * N * TILE
    at = (batch * d_inner + d_state) * N + n
    gl.store(dA_ptr + at, dA, mask=state_ok)
    gl.store(dstate_ptr + at, inflow, mask=state_ok)
    gl.store(dD_ptr + batch * d_inner + d, gl.sum(gl.sum(dD, axis=1), axis=0), mask=c_ok)
    gl.store(dbias_ptr + batch * d_inner + d, gl.sum(gl.sum(dbias, axis=1), axis=0), mask=c_ok)


class SelectiveScan(torch.autograd.Function):
    """B and C come as (batch, length, groups, d_state); what is None has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, state: Tensor | None, softplus: bool, keep_above: Tensor | None,
        dt_scale: Tensor | None, pads: tuple[int, ...] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, final, starts = scan_in_tiles(
            x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, softplus=softplus, keep_above=keep_above, dt_scale=dt_scale,
            pads=pads, state=state, tiling=replace(TILING, registers=None), save=True,  # 96: five programs
        )  # fmt: skip
        vectors = [wide_vector(v, x) for v in (A.T, D, dt_bias, keep_above, dt_scale)]
        rows = [v if v is None else unit_stride(v) for v in (x, dt, z, B, C)]
        ctx.save_for_backward(*rows, *vectors, pad_counts(pads, x), starts)
        ctx.flags = {
            "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": softplus,
            "HAS_KEEP": keep_above is not None, "HAS_SCALE": dt_scale is not None, "HAS_PADS": pads is not None,
        }  # fmt: skip
        ctx.dtypes = tuple(v if v is None else v.dtype for v in (x, dt, A, B, C, D, z, dt_bias, state))
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, z, B, C, A, D, bias, keep, scale, counts, starts = ctx.saved_tensors
        (batch, length, d_inner), (groups, d_state) = x.shape, B.shape[2:]
        new: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
        dy = torch.zeros_like(x, memory_format=torch.contiguous_format) if dy is None else dy.contiguous()
        dfinal = torch.zeros(batch, d_inner, d_state, **new) if dfinal is None else dfinal.float().contiguous()
        dx, ddt = (torch.empty(x.shape, dtype=v.dtype, device=x.device) for v in (x, dt))
        gate, dz = (x, dx) if z is None else (z, torch.empty(x.shape, dtype=z.dtype, device=x.device))
        dA, dstate = (torch.empty(batch, d_inner, d_state, **new) for _ in range(2))
        dD, dbias = (torch.empty(batch, d_inner, **new) for _ in range(2))
        blocks = triton.cdiv(d_inner // groups, TILING.channels)
        tiles = triton.cdiv(length, TILING.tile)
        shares = (batch, groups, blocks, d_state, tiles, TILING.tokens // 4, TILING.segments, 4)
        dB, dC = (torch.empty(shares, **new) for _ in range(2))
        code, names = backwards_code(TILING.tokens)
        flags = ctx.flags | {"HAS_PADS": counts is not None}
        _backward[(groups * blocks, batch)](
            x, dt, A, arrange(B, C, counts, TILING), D, gate, bias, keep, scale, x if counts is None else counts,
            starts, dy, dfinal, dx, ddt, dz, dA, dB, dC, dD, dbias, dstate, length, d_inner, d_inner // groups,
            *x.stride()[:2], *dt.stride()[:2], *gate.stride()[:2], GROUPS=groups, BLOCKS_A_GROUP=blocks, **flags,
            **TILING.constants(d_state), CODE=code, NAMES=names,
        )  # fmt: skip
        dB, dC = (v.sum(2).permute(0, 3, 5, 4, 6, 1, 2).reshape(batch, -1, groups, d_state) for v in (dB, dC))
        dB, dC = dB[:, :length], dC[:, :length]
        sums = (dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0), dstate)
        grads = (g if dtype is None else g.to(dtype) for g, dtype in zip(sums, ctx.dtypes, strict=True))
        present = (None if dtype is None else g for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *present, None, None, None, None


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
    """x, dt, z (batch, length, d_inner) -> y like x, the last state (batch, d_inner, d_state) in float32."""
    for name, value in (("keep_above", keep_above), ("dt_scale", dt_scale)):
        if value is not None and value.requires_grad:
            raise ValueError(f"the scan on CUDA has no gradient by {name}; use_backend('reference') has")
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    y, final = SelectiveScan.apply(x, dt, A, B, C, D, z, dt_bias, state, softplus, keep_above, dt_scale, pads)
    return y, final
