"""What of a hybrid lies around its Mamba layers: attention, gated MLPs, and Zamba2's shared transformer blocks.

    Bamba    hidden += mamba or attention(norm(hidden));  hidden += mlp(norm(hidden))
    Zamba2   hidden += mamba(norm(hidden + linear(block(hidden, embeddings))))     at some layers; no block at others

Source: transformers@v5.23.0, models/bamba and models/zamba2 (arXiv:2411.15242). Ours differs in its order: layers are
counted by their Mamba mixers, which is what methods act on, and `Around` brings the stream from one to the next. So
layer ranges, sharing and hooks are those of any model. The shared blocks stand once, not under every layer's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statespan.kernels.take import take
from statespan.models.attention import Attention, KeyValues, Places, low_rank
from statespan.models.config import AttentionConfig, ModelConfig
from statespan.models.hook import Span
from statespan.models.norm import RMSNorm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
CHUNK = 2048  # rows that attend at once, at most: their mask is (rows, all before them)


class Part(NamedTuple):
    """One thing on the way to a Mamba layer: its kind, the released layer it belongs to, its place among its kind."""

    kind: str
    released: int
    place: int


def parts_of(config: AttentionConfig) -> list[list[Part]]:
    """What lies before each Mamba layer, and behind the last."""
    found: list[list[Part]] = [[]]
    places = {"attention": 0, "shared": 0, "mlp": 0}

    def add(kind: str, released: int) -> None:
        found[-1].append(Part(kind, released, places[kind]))
        places[kind] += 1

    for released, kind in enumerate(config.layout):
        if kind != "mamba":
            add(kind, released)
        if kind != "attention":
            found.append([])
        if not config.shared_blocks:
            add("mlp", released)
    return found


class MLP(nn.Module):
    """norm, then down(act(gate) * up)"""

    def __init__(self, config: AttentionConfig, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, eps)
        self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.activation]

    def forward(self, rows: Tensor, places: Places, caches: Sequence[KeyValues]) -> Tensor:
        rows = self.norm(rows)
        out: Tensor = self.down_proj(self.act(self.gate_proj(rows)) * self.up_proj(rows))
        return out


class AttentionLayer(nn.Module):
    """norm, then attention; `place` says which of the caches is its own."""

    def __init__(self, config: AttentionConfig, eps: float, place: int) -> None:
        super().__init__()
        self.norm, self.attention, self.place = RMSNorm(config.d_model, eps), Attention(config), place

    def forward(self, rows: Tensor, places: Places, caches: Sequence[KeyValues]) -> Tensor:
        out: Tensor = self.attention(self.norm(rows), places, caches[self.place])
        return out


class SharedMLP(nn.Module):
    """A gated MLP with a low-rank change of its own at each place it is used."""

    def __init__(self, config: AttentionConfig, places: Sequence[int]) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.d_model, 2 * config.d_mlp, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=config.mlp_bias)
        self.gate_up_proj_adapter_list = low_rank(config.d_model, config.adapter_rank, 2 * config.d_mlp, places)
        self.act = ACTIVATIONS[config.activation]

    def forward(self, rows: Tensor, place: int) -> Tensor:
        gate, up = (self.gate_up_proj(rows) + self.gate_up_proj_adapter_list[str(place)](rows)).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.act(gate) * up)
        return out


class SharedBlock(nn.Module):
    """Zamba2's transformer block. It has no residual: what it says goes through a linear map into one Mamba layer."""

    def __init__(self, config: AttentionConfig, eps: float, places: Sequence[int]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, eps)
        self.self_attn = Attention(config, places)
        self.pre_ff_layernorm = RMSNorm(config.d_model, eps)
        self.feed_forward = SharedMLP(config, places)

    def forward(self, rows: Tensor, embeds: Tensor, places: Places, cache: KeyValues, place: int) -> Tensor:
        both = self.input_layernorm(torch.cat((rows, embeds), dim=-1))
        out: Tensor = self.feed_forward(self.pre_ff_layernorm(self.self_attn(both, places, cache, place)), place)
        return out


class SharedUse(nn.Module):
    """One place where a shared block is read."""

    def __init__(self, config: AttentionConfig, place: int) -> None:
        super().__init__()
        self.linear = nn.Linear(config.d_model, config.d_model, bias=False)
        self.place, self.block = place, place % config.shared_blocks


class Residual(Protocol):
    def __call__(self, rows: Tensor, places: Places, caches: Sequence[KeyValues]) -> Tensor: ...


class Around(nn.Module):
    """Brings the residual stream from one Mamba layer to the next."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.attention is not None
        self.config = own = config.attention
        parts = parts_of(own)
        self.parts = nn.ModuleList(nn.ModuleList(_build(part, own, config.norm_eps) for part in some) for some in parts)
        self.uses = [part.place for some in parts for part in some if part.kind == "shared"]
        self.shared = nn.ModuleList(
            SharedBlock(own, config.norm_eps, self.uses[block :: own.shared_blocks])
            for block in range(own.shared_blocks)
        )

    @property
    def reads_embeddings(self) -> bool:
        return bool(self.uses)

    def caches(self, batch: int) -> list[KeyValues]:
        """Empty ones, of every attention there is."""
        like, count = next(self.parameters()), sum(kind != "mamba" for kind in self.config.layout)
        return [KeyValues.empty(batch, self.config, like) for _ in range(count)]

    def enter(
        self,
        layer: int,
        hidden: Tensor,
        embeds: Tensor | None,
        positions: Tensor,
        span: Span,
        caches: Sequence[KeyValues],
        chunk: int = CHUNK,
    ) -> tuple[Tensor, Tensor | None]:
        """What Mamba layer `layer` finds: the stream, and what its input has beside it, or None.

        Args:
            layer: a Mamba layer, or their number for what lies behind the last.
            hidden: (batch, length, d_model) as the layer before left it. Written in place when gradients are off.
            embeds: (batch, length, d_model) what entered layer 0, where `reads_embeddings`.
            positions: (batch, length) of the tokens in their prompts, -1 on pads.
            span: the sequence.
            caches: of all attention; those met here take the sequence in.
            chunk: tokens of a row that attend at once.
        """
        chunk = span.length if torch.is_grad_enabled() else min(chunk, CHUNK)
        beside = None
        for part in cast(nn.ModuleList, self.parts[layer]):
            if isinstance(part, SharedUse):
                assert embeds is not None
                beside = self._read_shared(part, hidden, embeds, positions, span, caches, chunk)
            else:
                hidden = _add(cast(Residual, part), hidden, positions, span, caches, chunk)
        return hidden, beside

    def _read_shared(
        self,
        use: SharedUse,
        hidden: Tensor,
        embeds: Tensor,
        positions: Tensor,
        span: Span,
        caches: Sequence[KeyValues],
        chunk: int,
    ) -> Tensor:
        block = self.shared[use.block]
        said = [
            use.linear(block(hidden[:, here], embeds[:, here], places, caches[use.place], use.place))
            for here, places in _chunks(positions, span, chunk)
        ]
        return torch.cat(said, dim=1)


@dataclass(slots=True)
class Passage:
    """One batch's way through the layers, between the Mamba layers; in a model of nothing else it does nothing.

    embeds: (batch, length, d_model) what entered layer 0, where a hybrid reads it again
    positions: (batch, length) of the tokens in their prompts, -1 on pads
    caches: of all attention there is
    """

    around: Around | None
    embeds: Tensor | None
    positions: Tensor
    caches: list[KeyValues]
    chunk: int

    @classmethod
    def begin(cls, around: Around | None, hidden: Tensor, positions: Tensor, chunk: int) -> Passage:
        """Of a text that begins; `hidden` is the stream on entry to layer 0, which is written over later."""
        if around is None:
            return cls(None, None, positions, [], chunk)
        embeds = hidden.clone() if around.reads_embeddings else None
        return cls(around, embeds, positions, around.caches(len(hidden)), chunk)

    @classmethod
    def go_on(cls, around: Around | None, hidden: Tensor, caches: list[KeyValues], chunk: int) -> Passage:
        """Of a text that goes on."""
        if around is None:
            return cls(None, None, hidden.new_empty(0), caches, chunk)
        embeds = hidden.clone() if around.reads_embeddings else None
        at = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        return cls(around, embeds, caches[0].position[:, None] + at if caches else at, caches, chunk)

    def enter(self, layer: int, hidden: Tensor, span: Span) -> tuple[Tensor, Tensor | None]:
        """What Mamba layer `layer` finds: the stream, and what its input has beside it; `Around.enter`."""
        if self.around is None:
            return hidden, None
        return self.around.enter(layer, hidden, self.embeds, self.positions, span, self.caches, self.chunk)

    def keep(self, kept: Tensor) -> None:
        """A layer has dropped tokens: (batch, new_length) are those that stay, -1 for pads."""
        self.positions = self.positions.gather(1, kept.clamp_min(0)).masked_fill(kept < 0, -1)
        if self.embeds is not None:
            self.embeds = take(self.embeds, kept)


def _build(part: Part, config: AttentionConfig, eps: float) -> nn.Module:
    if part.kind == "mlp":
        return MLP(config, eps)
    return AttentionLayer(config, eps, part.place) if part.kind == "attention" else SharedUse(config, part.place)


def _chunks(positions: Tensor, span: Span, chunk: int) -> Iterator[tuple[slice, Places]]:
    for start in range(0, span.length, chunk):
        here = slice(start, min(start + chunk, span.length))
        pads = replace(span, start=start).pads(here.stop - start)
        yield here, Places(positions[:, here], pads)


def _add(
    part: Residual, hidden: Tensor, positions: Tensor, span: Span, caches: Sequence[KeyValues], chunk: int
) -> Tensor:
    if torch.is_grad_enabled():
        return hidden + part(hidden, Places(positions, span.pads(span.length)), caches)
    for here, places in _chunks(positions, span, chunk):
        rows = hidden[:, here]
        rows.add_(part(rows, places, caches))
    return hidden


def released_names(config: ModelConfig) -> dict[str, str]:
    """Prefix of a released weight's name (without `model.`) -> ours."""
    own = config.attention
    assert own is not None
    names = {"embed_tokens": "embedding", "final_layernorm": "norm_f"}
    mamba = [released for released, kind in enumerate(own.layout) if kind != "attention"]
    for layer, released in enumerate(mamba):
        old = f"layers.{released}" + (".mamba_decoder" if own.layout[released] == "shared" else "")
        names |= {f"{old}.input_layernorm": f"layers.{layer}.norm", f"{old}.mamba": f"layers.{layer}.mixer"}
    for layer, some in enumerate(parts_of(own)):
        for at, part in enumerate(some):
            names |= _released_part(part, f"layers.{part.released}", f"around.parts.{layer}.{at}", own)
    return names


def _released_part(part: Part, old: str, new: str, config: AttentionConfig) -> dict[str, str]:
    if part.kind == "mlp":
        return {f"{old}.pre_ff_layernorm": f"{new}.norm", f"{old}.feed_forward": new}
    if part.kind == "attention":
        return {f"{old}.input_layernorm": f"{new}.norm", f"{old}.self_attn": f"{new}.attention"}
    # a copy of a shared block under a later layer's name holds the same weights
    shared = f"around.shared.{part.place % config.shared_blocks}"
    return {f"{old}.linear": f"{new}.linear", f"{old}.shared_transformer": shared}
