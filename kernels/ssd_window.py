"""Mamba-2's decode step with a state that is written every few tokens only, and to the same values but for rounding.

A window of up to W tokens keeps what entered the state since it was last written; h₀ is that state and 1 … p are the
tokens since, the current one last. With Δ and a as in `kernels/ssd.py` and cₜ = Δ₁A + … + ΔₜA:

    y = exp(c_p) (h₀ C)  +  Σⱼ exp(c_p - cⱼ) Δⱼ (Bⱼ·C) xⱼ  +  D x,   gated by silu(z)
    and at p = W:   h₀ ← exp(c_p) h₀ + Σⱼ exp(c_p - cⱼ) Δⱼ xⱼ Bⱼᵀ

Source: the recurrence of arXiv:2405.21060, equation 1, unrolled over the window; its dual form, section 6, with one
query. Ours differs from `ssd_state_update` in rounding only: a state held in a narrower dtype is rounded once in W
tokens, not at each. And the state lies in memory as (batch, heads, d_state, head_dim), so that a sum over d_state needs
no other lane.

Bytes: the state read a token, and written every W tokens. At batch 64 a layer of mamba2-2.7b has 168 MB of it in
float32, so W = 8 moves 0.56 of what a step that reads and writes does; the window's own rows are 1 % of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.kernels.dispatch import backend_for, expect, kernel, wide
from statespan.kernels.selective_scan import step_sizes
from statespan.kernels.ssd import Limit


@dataclass(frozen=True, slots=True)
class Window:
    """What entered a state since it was written.

    x: (batch, W, heads, head_dim); B: (batch, W, groups, d_state)
    steps: (batch, W, heads) Δ, and logs: (batch, W, heads) c, both in float32 (float64 if x is)
    count: (1,) int64, tokens seen since the window was begun; of them count % W are not in the state. The windows of
    all layers share it: it is moved on once a token, behind the last layer.
    """

    x: Tensor
    B: Tensor
    steps: Tensor
    logs: Tensor
    count: Tensor

    @classmethod
    def beside(cls, state: Tensor, length: int, groups: int, dtype: torch.dtype, count: Tensor) -> Window:
        """An empty window of `length` tokens for a state (batch, heads, head_dim, d_state) and rows in `dtype`."""
        batch, heads, head_dim, d_state = state.shape
        new = state.new_zeros
        held = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            new(batch, length, heads, head_dim, dtype=dtype), new(batch, length, groups, d_state, dtype=dtype),
            new(batch, length, heads, dtype=held), new(batch, length, heads, dtype=held), count,
        )  # fmt: skip

    @property
    def length(self) -> int:
        return self.x.shape[1]

    @property
    def bytes(self) -> int:
        return self.x.nbytes + self.B.nbytes + self.steps.nbytes + self.logs.nbytes

    def rows(self, index: Tensor) -> Window:
        """A copy of some rows, with the count as it is now."""
        return Window(self.x[index], self.B[index], self.steps[index], self.logs[index], self.count.clone())

    def settled(self, state: Tensor) -> Tensor:
        """The state with the window's tokens in it, contiguous, in float32 or wider; nothing is written over."""
        state = state.to(wide(self.x))
        return _settled(state, self, int(self.count) % self.length).contiguous()


def laid_out(state: Tensor) -> Tensor:
    """A copy of a state (batch, heads, head_dim, d_state) as steps through windows want it: dense in head_dim."""
    return state.mT.contiguous().mT


def _weights(window: Window, upto: int) -> Tensor:
    """What became of each token's drive by the last: (batch, upto, heads)"""
    logs = window.logs[:, :upto]
    return (logs[:, -1:] - logs).exp() * window.steps[:, :upto]


def _settled(state: Tensor, window: Window, upto: int) -> Tensor:
    if upto == 0:
        return state.clone()
    batch, heads = window.logs[:, upto - 1].shape
    drive = _weights(window, upto)[..., None] * window.x[:, :upto].to(state.dtype)  # (batch, upto, heads, head_dim)
    B = window.B[:, :upto].to(state.dtype).repeat_interleave(heads // window.B.shape[2], dim=2)
    decay = window.logs[:, upto - 1].exp().reshape(batch, heads, 1, 1)
    return decay * state + torch.einsum("bwhp,bwhn->bhpn", drive, B)


def ssd_window_step_ref(
    state: Tensor, window: Window, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_limit: Limit | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The definition, in torch. Tests call it in float64."""
    place, kind = int(window.count) % window.length, wide(x)
    bias = None if dt_bias is None else dt_bias.to(kind)
    steps = step_sizes(dt.to(kind), bias, True, dt_limit, None, None)
    logs = steps * A
    window.x[:, place], window.B[:, place], window.steps[:, place] = x, B, steps
    window.logs[:, place] = logs if place == 0 else window.logs[:, place - 1] + logs
    after = _settled(state.to(kind), window, place + 1)
    heads = x.shape[1]
    y = torch.einsum("bhpn,bhn->bhp", after, C.to(kind).repeat_interleave(heads // C.shape[1], dim=1))
    if place == window.length - 1:
        state.copy_(after)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D).to(kind) * x.to(kind)
    y = y if z is None else y * F.silu(z.to(kind))
    return y.to(out_dtype or x.dtype)


def ssd_window_step(
    state: Tensor, window: Window, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_limit: Limit | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """One token of decoding, as `ssd_state_update` with softplus; the caller moves `window.count` on afterwards.

    Args:
        state: (batch, heads, head_dim, d_state), as `laid_out` gives it; written where the window is full.
        window: what entered since, for rows of x's dtype; the token is added to it.
        x, z: (batch, heads, head_dim); dt: (batch, heads); B, C: (batch, groups, d_state).
        A, dt_bias: (heads,); D: (heads,) or (heads, head_dim).

    Returns:
        (batch, heads, head_dim), in `out_dtype` where given, else in x's.
    """
    (batch, heads, head_dim), (groups, d_state) = x.shape, B.shape[1:]
    expect("ssd_window_step", "state", state, (batch, heads, head_dim, d_state), "(batch, heads, head_dim, d_state)")
    length = window.length
    expect("ssd_window_step", "window.x", window.x, (batch, length, *x.shape[1:]), "(batch, W, heads, head_dim)")
    expect("ssd_window_step", "window.B", window.B, (batch, length, groups, d_state), "(batch, W, groups, d_state)")
    expect("ssd_window_step", "window.steps", window.steps, (batch, length, heads), "(batch, W, heads)")
    expect("ssd_window_step", "dt", dt, (batch, heads), "(batch, heads)")
    expect("ssd_window_step", "C", C, (batch, groups, d_state), "(batch, groups, d_state)")
    if not state.mT.is_contiguous():
        raise ValueError("ssd_window_step needs a state with head_dim dense in memory, as laid_out gives it")
    if backend_for("ssd_window_step", x, dt, A, B, C, state) == "triton":
        step = kernel("ssd_window", "ssd_window_step", "triton")
    else:
        step = ssd_window_step_ref
    y: Tensor = step(state, window, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_limit=dt_limit, out_dtype=out_dtype)
    return y
