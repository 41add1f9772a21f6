"""The models and the methods once more, in numpy and float64, token by token from the papers' formulas.

Nothing of statespan is used but a model's weights and shape. `read` runs a prompt and an answer behind it through all
layers; a rule may change what the prompt's tokens are scanned with, or drop some of them. The answer is read plainly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Layer(NamedTuple):
    """What one layer is about to scan: rows of tokens, the answer's last."""

    number: int
    raw: np.ndarray  # (tokens, channels) before the bias
    bias: np.ndarray
    steps: np.ndarray  # (tokens, channels) after bias, softplus and the model's own clamp
    A: np.ndarray
    B: np.ndarray  # (tokens, channels, d_state)
    C: np.ndarray


Rule = Callable[[Layer], tuple[np.ndarray, np.ndarray | None]]
"""-> the steps to scan with, and which rows stay (None for all)"""


def plain(layer: Layer) -> tuple[np.ndarray, None]:
    return layer.steps, None


def softplus(x: Any) -> Any:
    return np.logaddexp(0.0, x)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def rms(x: np.ndarray, weight: Any, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


class NumpyLM:
    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def embed(self, ids: Any) -> np.ndarray:
        return self.w["embedding.weight"][np.asarray(ids)]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return hidden @ self.w["lm_head.weight"].T

    def read(self, rows: np.ndarray, rule: Rule = plain) -> np.ndarray:
        """(tokens, d_model) embeddings -> the survivors after the final norm"""
        for number in range(self.config.n_layer):
            out, kept = self.mixer(number, rows, rule)
            rows = (rows if kept is None else rows[kept]) + out
        return rms(rows, self.w["norm_f.weight"], self.config.norm_eps)

    def mixer(self, number: int, rows: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray | None]:
        c, w = self.config, lambda name: self.w.get(f"layers.{number}.mixer.{name}")
        u = rms(rows, self.w[f"layers.{number}.norm.weight"], c.norm_eps) @ w("in_proj.weight").T
        if c.bias:
            u = u + w("in_proj.bias")
        mlp = c.d_inner - c.d_ssm if c.kind == "mamba2" else 0
        bypass = silu(u[:, :mlp]) * u[:, mlp : 2 * mlp]
        u = u[:, 2 * mlp :]
        if c.kind == "mamba1":
            x, z = self.conv(number, u[:, : c.d_inner]), u[:, c.d_inner :]
            low = x @ w("x_proj.weight").T
            low, B, C = np.split(low, [c.dt_rank, c.dt_rank + c.d_state], axis=1)
            if c.mixer_norm_eps is not None:
                low, B, C = (rms(part, 1.0, c.mixer_norm_eps) for part in (low, B, C))
            raw, bias, width = low @ w("dt_proj.weight").T, w("dt_proj.bias"), 1
            A = -np.exp(w("A_log"))
            B, C = (np.repeat(part[:, None], c.d_inner, 1) for part in (B, C))
        else:
            z, inner, raw = np.split(u, [c.d_ssm, c.d_ssm + c.conv_width], axis=1)
            x, B, C = np.split(self.conv(number, inner), [c.d_ssm, c.d_ssm + c.n_groups * c.d_state], axis=1)
            bias, width, heads = w("dt_bias"), c.head_dim, c.channels
            A = np.repeat(-np.exp(w("A_log"))[:, None], c.d_state, 1)
            B, C = (
                np.repeat(part.reshape(len(part), c.n_groups, c.d_state), heads // c.n_groups, 1) for part in (B, C)
            )
        steps = softplus(raw + bias)
        if c.dt_limit is not None:
            steps = steps.clip(*c.dt_limit)
        steps, kept = rule(Layer(number, raw, bias, steps, A, B, C))
        if kept is not None:
            x, z, steps, B, C, bypass = (part[kept] for part in (x, z, steps, B, C, bypass))
        y = scan(x.reshape(len(x), -1, width), steps, A, B, C) + self.skip(number, x)
        y = y * silu(z) if c.kind == "mamba1" or not c.gated_norm else self.gated_norm(number, y, z)
        out = np.concatenate((bypass, y), 1) @ w("out_proj.weight").T
        return (out + w("out_proj.bias") if c.bias else out), kept

    def conv(self, number: int, x: np.ndarray) -> np.ndarray:
        weight, bias = (self.w.get(f"layers.{number}.mixer.conv1d.{name}") for name in ("weight", "bias"))
        taps = weight.shape[-1]
        padded = np.concatenate((np.zeros((taps - 1, x.shape[1])), x))
        out = sum(padded[tap : tap + len(x)] * weight[:, 0, tap] for tap in range(taps))
        return silu(out if bias is None else out + bias)

    def skip(self, number: int, x: np.ndarray) -> np.ndarray:
        D = self.w[f"layers.{number}.mixer.D"]
        return x * (D if len(D) == x.shape[1] else np.repeat(D, x.shape[1] // len(D)))

    def gated_norm(self, number: int, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        c, weight = self.config, self.w[f"layers.{number}.mixer.norm.weight"]
        eps = c.norm_eps if c.gated_norm_eps is None else c.gated_norm_eps
        gated = y if c.norm_before_gate else y * silu(z)
        groups = gated.reshape(len(y), c.n_groups, -1)
        normed = rms(groups, 1.0, eps).reshape(y.shape) * weight
        return normed * silu(z) if c.norm_before_gate else normed


def scan(x: np.ndarray, steps: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray) -> np.ndarray:
    """h ← exp(Δ A) h + Δ B x, y = C h, of x (tokens, channels, width) and A (channels, d_state): (tokens, d_inner)"""
    state, out = np.zeros((*x.shape[1:], A.shape[1])), []
    for t in range(len(x)):
        state = np.exp(steps[t][:, None] * A)[:, None] * state
        state = state + (steps[t][:, None] * B[t])[:, None] * x[t][..., None]
        out.append((state * C[t][:, None]).sum(-1).ravel())
    return np.array(out)


def last_row(layer: Layer) -> np.ndarray:
    """|M_{L,j}| of the last token over all before it: (channels, tokens)"""
    after = layer.steps[::-1].cumsum(0)[::-1] - layer.steps  # Σ over k > j
    weights = np.exp(after[..., None] * layer.A) * layer.steps[..., None] * layer.B * layer.C[-1]
    return np.abs(weights.sum(-1)).T


def longmamba_statistics(steps: np.ndarray, A: np.ndarray, share: float, length: int) -> tuple[float, float, float]:
    """One channel's (L,) steps and (d_state,) rates -> log P, budget, g(length), as the authors work them out."""
    L = len(steps)
    cap = np.sort(steps)[::-1][max(1, math.floor(share * L)) - 1]
    clamped = np.minimum(steps, cap)
    budget = clamped.sum()
    log_decay = float(np.log(np.exp(clamped[:, None] * A).mean(1)).sum())
    if length <= L:
        return log_decay, budget, 0.0
    ordered = np.sort(clamped)[::-1]
    at = ((np.arange(length) + 0.5) * L / length - 0.5).clip(0, L - 1)
    stretched = np.interp(at, np.arange(L), ordered)
    above = np.flatnonzero(stretched.cumsum() > budget)
    return log_decay, budget, float(stretched[(above[0] if len(above) else 0) + 1])
