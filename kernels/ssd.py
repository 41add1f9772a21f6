"""The selective scan of Mamba-2 (SSD): one step size and one decay a head, a matrix state (head_dim, d_state).

    Δ = softplus(dt + dt_bias), clamped to dt_limit;  Δ = Δ if Δ > keep_above else 0;  Δ = Δ * dt_scale
    h = exp(Δ A) h + Δ x Bᵀ;   y = (h C + D x) * silu(z)

Source: Mamba-2, arXiv:2405.21060, equation 1 and section 6 (the chunked form), and selective_state_update_ref with
ssd_chunk_scan_combined_ref (state-spaces/mamba@e9594ce). Ours differs: leading pads are skipped, `keep_above` and
`dt_scale` reach into the scan, and decays are summed in log space and masked before the exponential, so that nothing
overflows and gradients stay finite.

Bytes: x, z, y once, B and C once a group; the chunked form in torch also writes heads x chunk decays a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.kernels.dispatch import (
    backend_for,
    clear,
    expect,
    expect_in_place,
    expect_pads,
    kernel,
    overridden,
    pad_mask,
    wide,
)
from statespan.kernels.selective_scan import step_sizes

Limit = tuple[float, float]


def ssd_ref(
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
    dt_limit: Limit | None = None,
    keep_above: Tensor | None = None,
    dt_scale: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in differentiable torch. Tests call it in float64."""
    length, heads = x.shape[1:3]
    mask = pad_mask(pads, length, x.device)
    inputs, steps, B, C, h = _prepared(x, dt, B, C, dt_bias, softplus, dt_limit, keep_above, dt_scale, mask, state)
    per_group, outputs = heads // B.shape[2], [inputs[:, :0]]
    for t in range(length):
        rows, reads = (v[:, t].repeat_interleave(per_group, dim=1) for v in (B, C))  # (batch, heads, d_state)
        drive = (steps[:, t, :, None] * inputs[:, t])[..., None] * rows[:, :, None]
        h = (steps[:, t] * A.to(steps.dtype)).exp()[..., None, None] * h + drive
        outputs.append((h * reads[:, :, None]).sum(-1)[:, None])
    return _finished(torch.cat(outputs, dim=1), inputs, x.dtype, D, z, mask), h


def ssd_chunked(
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
    dt_limit: Limit | None = None,
    keep_above: Tensor | None = None,
    dt_scale: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same by matrix products within chunks and a recurrence between them, in differentiable torch: for training.

    Under autocast the products run in the lower precision; step sizes, decays and the carried state stay wide.
    """
    (batch, length, heads, head_dim), groups = x.shape, B.shape[2]
    mask = pad_mask(pads, length, x.device)
    inputs, steps, B, C, h = _prepared(x, dt, B, C, dt_bias, softplus, dt_limit, keep_above, dt_scale, mask, state)
    # (batch, chunks, chunk, groups, heads of a group, ...); zero steps fill the last chunk and change nothing
    folded = (batch, -(-length // chunk), chunk, groups, heads // groups)
    driven = _fold(steps[..., None] * inputs, chunk).reshape(*folded, head_dim)
    B, C = _fold(B, chunk), _fold(C, chunk)  # (batch, chunks, chunk, groups, d_state)
    logs = _fold(steps * A.to(steps.dtype), chunk).reshape(folded)

    gaps = _log_decays(logs)
    weights = torch.einsum("bcign,bcjgn->bcijg", C, B)[..., None] * gaps.exp()  # (..., chunk, chunk, groups, heads)
    within = torch.einsum("bcijgr,bcjgrp->bcigrp", weights, driven)

    until_end = gaps[:, :, -1].exp()[..., None]
    added = torch.einsum("bcjgn,bcjgrp->bcgrpn", B, driven * until_end).to(h.dtype)
    logs = logs.cumsum(2)  # since before the chunk
    decay = logs[:, :, -1].exp()[..., None, None]  # of whole chunks
    h, entering = h.reshape(*added.shape[:1], *added.shape[2:]), []
    for c in range(added.shape[1]):
        entering.append(h)
        h = decay[:, c] * h + added[:, c]
    if entering:
        carried = torch.einsum("bcign,bcgrpn->bcigrp", C, torch.stack(entering, 1))
        within = within + carried * logs.exp()[..., None]
    y = within.reshape(batch, -1, heads, head_dim)[:, :length].to(inputs.dtype)
    return _finished(y, inputs, x.dtype, D, z, mask), h.reshape(batch, heads, head_dim, -1)


def _log_decays(logs: Tensor) -> Tensor:
    """(batch, chunks, chunk, ...) -> [i, j]: the sum over the tokens after j up to i, -inf for j > i.

    A sum of its own for each j, where the difference of two cumulative sums would be cheaper: a step that forgets all
    makes those so large that float32 loses the small decays after it.
    """
    ones = torch.ones(logs.shape[2], logs.shape[2], dtype=torch.bool, device=logs.device)
    trailing = (1,) * (logs.ndim - 3)
    after, ahead = (mask.reshape(*mask.shape, *trailing) for mask in (ones.tril(-1), ones.triu(1)))
    sums = torch.where(after, logs[:, :, :, None], 0.0).cumsum(2)
    return sums.masked_fill(ahead, float("-inf"))


def _fold(rows: Tensor, chunk: int) -> Tensor:
    """(batch, length, ...) -> (batch, chunks, chunk, ...), zeros after the end."""
    rows = F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, -rows.shape[1] % chunk))
    return rows.reshape(rows.shape[0], -1, chunk, *rows.shape[2:])


def _prepared(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    dt_limit: Limit | None,
    keep_above: Tensor | None,
    dt_scale: Tensor | None,
    mask: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, Δ, B, C and the first state in the wide dtype, zeros on pads."""
    dtype = wide(x)
    inputs, dt, B, C = (clear(rows.to(dtype), mask) for rows in (x, dt, B, C))
    bias, threshold, scale = (None if v is None else v.to(dtype) for v in (dt_bias, keep_above, dt_scale))
    steps = clear(step_sizes(dt, bias, softplus, dt_limit, threshold, scale), mask)
    shape = (x.shape[0], *x.shape[2:], B.shape[-1])
    return inputs, steps, B, C, x.new_zeros(shape, dtype=dtype) if state is None else state.to(dtype)


def _finished(
    y: Tensor, inputs: Tensor, dtype: torch.dtype, D: Tensor | None, z: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Skip, gate, zeros on pads, and back to the dtype of x."""
    y = y if D is None else y + (D[:, None] if D.ndim == 1 else D).to(y.dtype) * inputs
    y = y if z is None else y * F.silu(clear(z.to(y.dtype), mask))
    return clear(y, mask).to(dtype)


def ssd_state_update_ref(
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
    dt_limit: Limit | None = None,
) -> Tensor:
    """The definition of one decode step: a scan of length 1 whose final state is written into `state`."""
    gate = None if z is None else z[:, None]
    y, after = ssd_ref(
        x[:, None], dt[:, None], A, B[:, None], C[:, None], D=D, z=gate, dt_bias=dt_bias, softplus=softplus,
        dt_limit=dt_limit, state=state,
    )  # fmt: skip
    state.copy_(after)
    return y[:, 0]


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
    dt_limit: Limit | None = None,
    keep_above: Tensor | None = None,
    dt_scale: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a sequence, or the next chunk of one.

    Args:
        x, z: (batch, length, heads, head_dim); z the gate before its SiLU. Length 0 is allowed.
        dt: (batch, length, heads), before bias and softplus.
        A, dt_bias: (heads,), A negative.
        B, C: (batch, length, groups, d_state), consecutive blocks of heads a group.
        D: (heads,) or (heads, head_dim).
        dt_limit: (low, high), the clamp of the step after softplus.
        keep_above, dt_scale: (batch, heads), applied to the step after the clamp, the threshold first.
        pads: leading positions of each row to skip: y is 0 there and the state passes untouched, whatever lies there.
        state: (batch, heads, head_dim, d_state) before the first token, zeros if None; not modified.

    Returns:
        y like x; the state after the last token, float32 (float64 if x is).
    """
    _check(x, dt, A, B, C, D, z, dt_bias)
    batch, length, heads, head_dim = x.shape
    for name, per_row in (("keep_above", keep_above), ("dt_scale", dt_scale)):
        expect("ssd", name, per_row, (batch, heads), "(batch, heads)")
    expect("ssd", "state", state, (batch, heads, head_dim, B.shape[-1]), "(batch, heads, head_dim, d_state)")
    expect_pads("ssd", pads, batch, length)
    backend = backend_for("ssd", x, dt, A, B, C, D, z, dt_bias, keep_above, dt_scale, state)
    tensors = (x, dt, A, B, C, D, z, dt_bias, keep_above, dt_scale, state)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # for a gradient the chunked form on any device, unless a backend is asked for by name
    if overridden() is None and needs_grad:
        scan: Callable[..., tuple[Tensor, Tensor]] = ssd_chunked
    else:
        scan = ssd_ref if backend == "reference" else kernel("ssd", "ssd", backend)
    y, final = scan(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, softplus=softplus, dt_limit=dt_limit, keep_above=keep_above,
        dt_scale=dt_scale, pads=pads, state=state,
    )  # fmt: skip
    return y, final


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
    dt_limit: Limit | None = None,
    out_dtype: torch.dtype | None = None,
    at_rest: bool = False,
) -> Tensor:
    """One token of decoding: x, z (batch, heads, head_dim), dt (batch, heads), B, C (batch, groups, d_state).

    `state` (batch, heads, head_dim, d_state), contiguous float32 (float64 if x is), is updated in place. Returns y, in
    `out_dtype` where given (x's or wider: then it is not rounded to x's on the way), else in x's.
    `at_rest`: nothing that the device may still be at writes the state, so it can be fetched before the kernel before
    this one has ended.
    """
    _check(x, dt, A, B, C, D, z, dt_bias)
    expect("ssd_state_update", "state", state, (*x.shape, B.shape[-1]), "(batch, heads, head_dim, d_state)")
    expect_in_place("ssd_state_update", state, x)
    backend = backend_for("ssd_state_update", x, dt, A, B, C, D, z, dt_bias, state)
    update: Callable[..., Tensor] = ssd_state_update_ref
    if backend != "reference":
        update = kernel("ssd", "ssd_state_update", backend)
    if backend == "triton":
        update = partial(update, out_dtype=out_dtype, at_rest=at_rest)
    elif out_dtype is not None:
        x = x.to(out_dtype)  # theirs is y like x
    return update(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, softplus=softplus, dt_limit=dt_limit)


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None
) -> None:
    """The shapes that a scan (x of four axes) and a step (three axes) share."""
    if x.ndim not in (3, 4) or B.ndim != x.ndim or B.shape[-2] < 1 or x.shape[-2] % B.shape[-2]:
        raise ValueError(f"ssd needs x (..., heads, head_dim) and B (..., groups, d_state) with groups dividing heads; "
                         f"got {[*x.shape]} and {[*B.shape]}")  # fmt: skip
    *leading, heads, head_dim = x.shape
    expect("ssd", "dt", dt, (*leading, heads), "(..., heads)")
    expect("ssd", "z", z, tuple(x.shape), "like x")
    expect("ssd", "A", A, (heads,), "(heads,)")
    expect("ssd", "dt_bias", dt_bias, (heads,), "(heads,)")
    if D is not None and D.ndim != 1:
        expect("ssd", "D", D, (heads, head_dim), "(heads,) or (heads, head_dim)")
    else:
        expect("ssd", "D", D, (heads,), "(heads,) or (heads, head_dim)")
    for name, rows in (("B", B), ("C", C)):
        expect("ssd", name, rows, (*leading, *B.shape[-2:]), "(..., groups, d_state)")
