"""Attention for hybrids: rotary positions, grouped heads, and the keys and values that decoding continues from.

    out = softmax(scale · R(q) R(k)ᵀ + mask) v

R turns the first `rotary_dim` features of each head by the token's position (RoPE, arXiv:2104.09864; halves, not pairs,
are turned against each other, as transformers does). A head attends to earlier true tokens only: rows are left-padded.

A token keeps the position it had in the prompt. Where a method drops tokens, the survivors' distances therefore stay
what they were, and the tokens that are gone are simply not there to attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statespan.models.config import AttentionConfig

GROW = 256  # tokens of room that a full buffer is enlarged by, at least


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of a chunk stand in their prompts.

    positions: (batch, length), -1 on pads
    pads: leading pads of each row of the chunk
    """

    positions: Tensor
    pads: tuple[int, ...]


@dataclass(slots=True)
class KeyValues:
    """What one attention layer carries from token to token. It grows with the text.

    keys, values: (batch, kv_heads, room, head_dim), of which the first `length` are filled
    pads: leading tokens of each row that are padding
    position: (batch,) of the next token
    """

    keys: Tensor
    values: Tensor
    length: int
    pads: tuple[int, ...]
    position: Tensor

    @classmethod
    def empty(cls, batch: int, config: AttentionConfig, like: Tensor) -> KeyValues:
        room = like.new_empty(batch, config.kv_heads, 0, config.head_dim)
        return cls(room, room, 0, (0,) * batch, torch.zeros(batch, dtype=torch.int64, device=like.device))

    def append(self, keys: Tensor, values: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Take in (batch, kv_heads, new, head_dim). Gives all so far."""
        first, self.length = self.length, self.length + keys.shape[2]
        if torch.is_grad_enabled():  # a tensor that a graph holds is not written over
            self.keys = torch.cat((self.keys[:, :, :first], keys), dim=2)
            self.values = torch.cat((self.values[:, :, :first], values), dim=2)
        else:
            self._make_room()
            self.keys[:, :, first : self.length] = keys
            self.values[:, :, first : self.length] = values
        self.pads = tuple(old + new for old, new in zip(self.pads, places.pads, strict=True))
        self.position = places.positions[:, -1] + 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _make_room(self) -> None:
        missing = self.length - self.keys.shape[2]
        if missing > 0:
            more = max(missing, GROW, self.keys.shape[2] // 2 if self.keys.shape[2] else 0)
            self.keys, self.values = (F.pad(old, (0, 0, 0, more)) for old in (self.keys, self.values))

    def rows(self, index: Tensor) -> KeyValues:
        filled = slice(None, self.length)
        return KeyValues(
            self.keys[index, :, filled],
            self.values[index, :, filled],
            self.length,
            tuple(self.pads[row] for row in index.tolist()),
            self.position[index],
        )

    def clone(self) -> KeyValues:
        return KeyValues(self.keys.clone(), self.values.clone(), self.length, self.pads, self.position)

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @staticmethod
    def join(parts: Sequence[KeyValues]) -> KeyValues:
        """Rows of several caches as one batch, left-padded to the longest."""
        longest = max(part.length for part in parts)
        padded = [(longest - part.length, part) for part in parts]
        keys, values = (
            torch.cat([F.pad(getattr(part, name)[:, :, : part.length], (0, 0, short, 0)) for short, part in padded])
            for name in ("keys", "values")
        )
        pads = tuple(own + short for short, part in padded for own in part.pads)
        return KeyValues(keys, values, longest, pads, torch.cat([part.position for part in parts]))


def rotated(rows: Tensor, positions: Tensor, base: float, rotary_dim: int) -> Tensor:
    """(batch, heads, length, head_dim) with the first `rotary_dim` features turned by (batch, length) positions"""
    wide = torch.promote_types(rows.dtype, torch.float32)
    feature = torch.arange(0, rotary_dim, 2, dtype=wide, device=rows.device)
    angles = positions[:, None, :, None].to(wide) * base ** (-feature / rotary_dim)
    cos, sin = (torch.cat((part, part), dim=-1).to(rows.dtype) for part in (angles.cos(), angles.sin()))
    turned, rest = rows[..., :rotary_dim], rows[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def visible(queries: int, pads: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """(batch, 1, queries, length) bool: which of the tokens so far the last `queries` may attend to.

    A pad attends to itself, so that its row is finite; no true token sees it.
    """
    at = torch.arange(length, device=device)
    asking, first = at[length - queries :, None], torch.tensor(pads, device=device)[:, None, None, None]
    return (at <= asking) & ((at >= first) | (at == asking))


class Attention(nn.Module):
    """Causal attention of a chunk to all before it. Weight names are transformers'."""

    def __init__(self, config: AttentionConfig, places: Sequence[int] = ()) -> None:
        """`places`: where a shared block is used; each has its own low-rank additions to q, k and v."""
        super().__init__()
        self.config = config
        inner, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, inner, bias=config.bias)
        self.k_proj = nn.Linear(config.width, kv, bias=config.bias)
        self.v_proj = nn.Linear(config.width, kv, bias=config.bias)
        self.o_proj = nn.Linear(inner, config.d_model, bias=config.bias)
        self.adapted = bool(places) and config.adapts_attention
        if self.adapted:
            self.linear_q_adapter_list = low_rank(config.width, config.adapter_rank, inner, places)
            self.linear_k_adapter_list = low_rank(config.width, config.adapter_rank, kv, places)
            self.linear_v_adapter_list = low_rank(config.width, config.adapter_rank, kv, places)

    def _projected(self, rows: Tensor, name: str, place: int) -> Tensor:
        """(batch, length, width) -> (batch, heads, length, head_dim)"""
        out = self.get_submodule(f"{name}_proj")(rows)
        if self.adapted:
            out = out + self.get_submodule(f"linear_{name}_adapter_list.{place}")(rows)
        heads: Tensor = out.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        return heads

    def forward(self, rows: Tensor, places: Places, cache: KeyValues, place: int = 0) -> Tensor:
        """(batch, length, width) -> (batch, length, d_model); the cache takes the chunk in"""
        config, base = self.config, self.config.rope_theta
        q, k, v = (self._projected(rows, name, place) for name in ("q", "k", "v"))
        if base is not None:
            q, k = (rotated(part, places.positions, base, config.rotary_dim) for part in (q, k))
        k, v = cache.append(k, v, places)
        first = q.shape[2] == k.shape[2]  # nothing came before this chunk
        masked = any(cache.pads) or (q.shape[2] > 1 and not first)
        mask = visible(q.shape[2], cache.pads, k.shape[2], q.device) if masked else None
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=first and not masked, scale=config.scale, enable_gqa=config.heads > config.kv_heads
        )
        merged: Tensor = self.o_proj(out.transpose(1, 2).flatten(-2))
        return merged


def low_rank(width: int, rank: int, out: int, places: Sequence[int]) -> nn.ModuleDict:
    """W2 W1 for each place"""
    return nn.ModuleDict(
        {
            str(place): nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False))
            for place in places
        }
    )
