"""The selective scan of Mamba-1 (S6), with the step size's threshold and scale, skip and gate in the same pass.

    Δ = softplus(dt + dt_bias);  Δ = Δ if Δ > keep_above else 0;  Δ = Δ * dt_scale     per token and channel
    h = exp(Δ A) h + Δ B x                                                             per token, channel and state
    y = (C·h + D x) * silu(z)

Source: Mamba, arXiv:2312.00752, Algorithm 2 with the zero-order hold simplified to Δ B as in its section 3.6 and in
selective_scan_ref (state-spaces/mamba@e9594ce). Ours differs: tensors are (batch, length, channel), leading pads are
skipped, and `keep_above` and `dt_scale` reach into the scan, where the reference would make a second pass over dt: a
step set to exactly 0 leaves the channel's state untouched (the filter of LongMamba, arXiv:2504.16053).

Bytes: x, dt, z and y once, B and C once; the states, d_state times as large, never leave registers or cache. At 131,072
tokens, d_inner 5120 and d_state 16 that is 5.4 GB in bfloat16 against 43 GB for one tensor of float32 states.
"""

from __future__ import annotations

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
    pad_mask,
    wide,
)


def step_sizes(
    dt: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    limit: tuple[float, float] | None,
    keep_above: Tensor | None,
    dt_scale: Tensor | None,
) -> Tensor:
    """Δ of (batch, length, channels) in dt's dtype: bias, softplus, clamp, threshold, scale, in this order."""
    steps = dt if dt_bias is None else dt + dt_bias
    steps = F.softplus(steps) if softplus else steps
    steps = steps if limit is None else steps.clamp(*limit)
    if keep_above is not None:
        steps = steps.masked_fill(steps <= keep_above[:, None], 0.0)
    return steps if dt_scale is None else steps * dt_scale[:, None]


def selective_scan_ref(
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
    """The definition, token by token in differentiable torch. Tests call it in float64."""
    batch, length, d_inner = x.shape
    dtype = wide(x)
    mask = pad_mask(pads, length, x.device)
    inputs, dt, B, C = (clear(rows.to(dtype), mask) for rows in (x, dt, B, C))
    bias, threshold, scale = (None if v is None else v.to(dtype) for v in (dt_bias, keep_above, dt_scale))
    steps = clear(step_sizes(dt, bias, softplus, None, threshold, scale), mask)
    h = x.new_zeros(batch, d_inner, A.shape[1], dtype=dtype) if state is None else state.to(dtype)
    rates, outputs = A.to(dtype), [x.new_zeros(batch, 0, d_inner, dtype=dtype)]
    for t in range(length):
        drive = (steps[:, t] * inputs[:, t])[..., None] * _per_channel(B[:, t], d_inner)
        h = (steps[:, t, :, None] * rates).exp() * h + drive  # (batch, d_inner, d_state)
        outputs.append((h * _per_channel(C[:, t], d_inner)).sum(-1)[:, None])
    y = torch.cat(outputs, dim=1)
    y = y if D is None else y + D.to(dtype) * inputs
    y = y if z is None else y * F.silu(clear(z.to(dtype), mask))
    return clear(y, mask).to(x.dtype), h


def _per_channel(rows: Tensor, d_inner: int) -> Tensor:
    """(batch, d_state) or (batch, groups, d_state) -> (batch, d_inner or 1, d_state)"""
    return rows[:, None] if rows.ndim == 2 else rows.repeat_interleave(d_inner // rows.shape[1], dim=1)


def selective_state_update_ref(
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
    """The definition of one decode step: a scan of length 1 whose final state is written into `state`."""
    rows = (None if row is None else row[:, None] for row in (x, dt, B, C, z))
    x, dt, B, C, z = rows  # type: ignore[assignment]
    y, after = selective_scan_ref(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, softplus=softplus, state=state)
    state.copy_(after)
    return y[:, 0]


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
    """Scan a sequence, or the next chunk of one.

    Args:
        x, dt, z: (batch, length, d_inner); dt before bias and softplus, z before its SiLU. Length 0 is allowed.
        A: (d_inner, d_state), negative.
        B, C: (batch, length, d_state), or (batch, length, groups, d_state) with consecutive blocks of channels a group.
        D, dt_bias: (d_inner,).
        keep_above, dt_scale: (batch, d_inner), applied to the step after softplus, the threshold first.
        pads: leading positions of each row to skip: y is 0 there and the state passes untouched, whatever lies there.
        state: (batch, d_inner, d_state) before the first token, zeros if None; not modified.

    Returns:
        y (batch, length, d_inner) in x's dtype; the state after the last token, float32 (float64 if x is).
    """
    _check(x, dt, A, B, C, D, z, dt_bias)
    batch, length, d_inner = x.shape
    for name, per_row in (("keep_above", keep_above), ("dt_scale", dt_scale)):
        expect("selective_scan", name, per_row, (batch, d_inner), "(batch, d_inner)")
    expect("selective_scan", "state", state, (batch, *A.shape), "(batch, d_inner, d_state)")
    expect_pads("selective_scan", pads, batch, length)
    backend = backend_for("selective_scan", x, dt, A, B, C, D, z, dt_bias, keep_above, dt_scale, state)
    chosen = selective_scan_ref if backend == "reference" else kernel("selective_scan", "selective_scan", backend)
    y, final = chosen(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, softplus=softplus, keep_above=keep_above, dt_scale=dt_scale,
        pads=pads, state=state,
    )  # fmt: skip
    return y, final


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
    """One token of decoding: x, dt, z (batch, d_inner), B, C (batch, d_state) or (batch, groups, d_state).

    `state` (batch, d_inner, d_state), contiguous float32 (float64 if x is), is updated in place. Returns y like x.
    """
    _check(x, dt, A, B, C, D, z, dt_bias)
    expect("selective_state_update", "state", state, (x.shape[0], *A.shape), "(batch, d_inner, d_state)")
    expect_in_place("selective_state_update", state, x)
    backend = backend_for("selective_state_update", x, dt, A, B, C, D, z, dt_bias, state)
    update = selective_state_update_ref
    if backend != "reference":
        update = kernel("selective_scan", "selective_state_update", backend)
    return update(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, softplus=softplus)


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None
) -> None:
    """The shapes that a scan (x of three axes) and a step (two axes) share."""
    op, *leading, d_inner = "selective_scan", *x.shape
    if x.ndim not in (2, 3) or A.ndim != 2 or A.shape[0] != d_inner:
        raise ValueError(f"{op} needs x (..., d_inner) and A (d_inner, d_state); got {[*x.shape]} and {[*A.shape]}")
    expect(op, "dt", dt, (*leading, d_inner), "like x")
    expect(op, "z", z, (*leading, d_inner), "like x")
    expect(op, "D", D, (d_inner,), "(d_inner,)")
    expect(op, "dt_bias", dt_bias, (d_inner,), "(d_inner,)")
    groups = B.shape[x.ndim - 1 : -1]  # () or (groups,)
    if len(groups) > 1 or (groups and (groups[0] < 1 or d_inner % groups[0])):
        raise ValueError(f"{op} needs B (..., d_state) or (..., groups, d_state) with groups dividing {d_inner}; "
                         f"got {[*B.shape]}")  # fmt: skip
    for name, rows in (("B", B), ("C", C)):
        expect(op, name, rows, (*leading, *groups, A.shape[1]), "(..., d_state) or (..., groups, d_state)")
