"""The language model: embedding, residual blocks, final norm, head. Weight names are the released checkpoints' own.

`Block.walk` runs one layer over a whole sequence in chunks (layer-major), so that memory is one hidden stream plus one
chunk for any length and any method; `statespan.models.runner` strings layers together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from statespan.kernels.take import take
from statespan.models import fused_step
from statespan.models.config import ModelConfig
from statespan.models.hook import VANILLA, Method, ScanInputs, Span
from statespan.models.hybrid import Around, Passage
from statespan.models.mixer import MIXERS, MixerState, add_product
from statespan.models.norm import RMSNorm


@dataclass(slots=True)
class Walked:
    """What a layer leaves behind: its output rows, which of the incoming positions they are, and its state."""

    hidden: Tensor
    span: Span
    state: MixerState
    kept: Tensor | None
    """(batch, new_length) positions in the incoming sequence, -1 for pads; None when no row was dropped."""


@dataclass(slots=True)
class Projected:
    """A layer's `project` of a whole sequence, before any method: the same for all that meet the layer unchanged."""

    chunks: tuple[ScanInputs, ...]
    conv: Tensor
    """The conv's state after the last chunk."""

    shared: bool = False
    """Whether another trial has paid for it."""


class Block(nn.Module):
    """Pre-norm residual block around one mixer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = RMSNorm if config.rms_norm else nn.LayerNorm
        self.norm: nn.Module = norm(config.d_model, config.norm_eps)
        self.mixer = MIXERS[config.kind](config)

    def walk(
        self,
        hidden: Tensor,
        span: Span,
        method: Method,
        layer: int,
        state: MixerState | None,
        chunk: int,
        projected: Projected | None = None,
        beside: Tensor | None = None,
    ) -> Walked:
        """Run the layer over a whole sequence.

        Args:
            hidden: (batch, length, d_model) residual stream. Written in place when gradients are off.
            span: the layer's whole sequence (`start` 0).
            method: whose hook is called between project and scan.
            layer: index the hook is told, counting Mamba layers.
            state: what an earlier part of the text left, or None.
            chunk: tokens of a row processed at a time.
            projected: what `project_all` gave for this very sequence, of one row; None projects.
            beside: (batch, length, d_model) what a hybrid adds to the mixer's input, and not to the stream.
        """
        conv, ssm = (state.conv, state.ssm) if state else (None, None)
        if span.length <= chunk or torch.is_grad_enabled():
            ((_, inputs, conv),) = self._chunks(hidden, span, max(chunk, span.length), conv, projected, beside)
            ahead = method.looks_ahead(layer, span)
            seen = method.settle(layer, method.survey(layer, inputs), span) if ahead else None
            changed = method.before_scan(layer, inputs, seen)
            if changed.kept is not None:
                hidden = take(hidden, changed.kept)
            span = replace(changed.span, start=0)
            if torch.is_grad_enabled():
                out, ssm = self.mixer.scan(changed, ssm)
                hidden = hidden + out
            else:
                ssm = self.mixer.scan_onto(hidden, changed, ssm)
            return Walked(hidden, span, MixerState(conv, ssm), changed.kept)
        looks_ahead = method.looks_ahead(layer, span)
        if looks_ahead and hidden.shape[0] > 1:
            return self._walk_rows(hidden, span, method, layer, state, chunk, beside)
        seen = self._survey(hidden, span, method, layer, conv, chunk, projected, beside) if looks_ahead else None
        return self._walk_chunks(hidden, span, method, layer, state, chunk, seen, projected, beside)

    def project_all(self, hidden: Tensor, span: Span, chunk: int) -> Projected:
        """What `walk` would project, to be given to it any number of times."""
        parts = list(self._chunks(hidden, span, chunk, None))
        return Projected(tuple(inputs for _, inputs, _ in parts), parts[-1][2])

    def _chunks(
        self,
        hidden: Tensor,
        span: Span,
        chunk: int,
        conv: Tensor | None,
        projected: Projected | None = None,
        beside: Tensor | None = None,
    ) -> Iterator[tuple[int, ScanInputs, Tensor]]:
        """(where it begins, what the scan reads, the conv's state after it) of each chunk, each projected when it is
        asked for: the walk writes over what lies behind it."""
        for place, start in enumerate(range(0, span.length, chunk)):
            here = replace(span, start=start)
            if projected is not None:
                # decoding goes on in the conv's state, in place
                yield start, replace(projected.chunks[place], span=here), projected.conv.clone()
                continue
            rows = hidden[:, start : start + chunk]
            rows = rows if beside is None else rows + beside[:, start : start + chunk]
            inputs, conv = self.mixer.project(self.norm(rows), here, conv)
            yield start, inputs, conv
            del inputs  # before the next chunk is projected: never two of them

    def _survey(
        self,
        hidden: Tensor,
        span: Span,
        method: Method,
        layer: int,
        conv: Tensor | None,
        chunk: int,
        projected: Projected | None,
        beside: Tensor | None,
    ) -> Tensor:
        """First pass over a layer whose method must see all of it before it can choose."""
        parts = []
        for _, inputs, _ in self._chunks(hidden, span, chunk, conv, projected, beside):
            parts.append(method.survey(layer, inputs))
            del inputs
        return method.settle(layer, torch.cat(parts, dim=1), span)

    def _walk_chunks(
        self,
        hidden: Tensor,
        span: Span,
        method: Method,
        layer: int,
        state: MixerState | None,
        chunk: int,
        seen: Tensor | None,
        projected: Projected | None,
        beside: Tensor | None,
    ) -> Walked:
        conv, ssm = (state.conv, state.ssm) if state else (None, None)
        written, kept, new_span = 0, [], span
        chunks = self._chunks(hidden, span, chunk, conv, projected, beside)
        for start, inputs, conv in chunks:  # noqa: B007 the last one's conv state is the layer's
            changed = method.before_scan(layer, inputs, seen)
            rows = hidden[:, start : start + chunk]
            if changed.kept is not None:
                rows = take(rows, changed.kept)
                kept.append(changed.kept + start)
            new_span = replace(changed.span, start=0)
            # where the chunk begins, counted without what was dropped before it
            changed = replace(changed, span=replace(changed.span, start=written))
            if changed.kept is None and written == start:
                ssm = self.mixer.scan_onto(rows, changed, ssm)
            elif rows.shape[1]:  # the kept rows move to the front; what they overwrite was read already
                out, ssm = self.mixer.scan(changed, ssm)
                hidden[:, written : written + rows.shape[1]] = rows + out
            written += rows.shape[1]
            del inputs, changed
        assert conv is not None and ssm is not None and written == new_span.length
        joined = torch.cat(kept, dim=1) if kept else None
        return Walked(hidden[:, :written], new_span, MixerState(conv, ssm), joined)

    def _walk_rows(
        self,
        hidden: Tensor,
        span: Span,
        method: Method,
        layer: int,
        state: MixerState | None,
        chunk: int,
        beside: Tensor | None,
    ) -> Walked:
        """Rows one by one, unpadded, for a layer that chooses by the whole of each row."""
        walked = []
        for row, own in enumerate(span.lengths):
            alone = replace(span, length=own, lengths=(own,), prompt_lengths=(span.prompt_lengths[row],))
            mine = None if state is None else MixerState(state.conv[row : row + 1], state.ssm[row : row + 1])
            at = (slice(row, row + 1), slice(span.length - own, None))
            near = None if beside is None else beside[at]
            walked.append(self.walk(hidden[at], alone, method, layer, mine, chunk, beside=near))
        lengths = tuple(w.span.length for w in walked)
        joined = replace(span, length=max(lengths), lengths=lengths)
        stream = hidden.new_zeros(len(walked), joined.length, hidden.shape[-1])
        kept = torch.full(stream.shape[:2], -1, dtype=torch.int64, device=hidden.device)
        for row, w in enumerate(walked):
            first, pads = joined.length - w.span.length, span.length - span.lengths[row]
            stream[row, first:] = w.hidden[0]
            own_kept = torch.arange(w.span.length, device=hidden.device) if w.kept is None else w.kept[0]
            kept[row, first:] = own_kept + pads
        dropped = any(w.kept is not None for w in walked)
        return Walked(stream, joined, MixerState.join([w.state for w in walked]), kept if dropped else None)

    def step(self, hidden: Tensor, state: MixerState, beside: Tensor | None = None) -> Tensor:
        """One token: (batch, d_model) -> (batch, d_model); the state is updated in place. `beside` as in `walk`.

        With gradients off `hidden` may be written over.
        """
        if beside is not None:
            return hidden + self.mixer.step(self.norm(hidden + beside), state)
        if fused_step.applies(self.norm, self.mixer, hidden):
            return fused_step.step(cast(RMSNorm, self.norm), self.mixer, hidden, state)
        if torch.is_grad_enabled():
            return hidden + self.mixer.step(self.norm(hidden), state)
        add_product(hidden, self.mixer.mix_step(self.norm(hidden), state), self.mixer.out_proj)
        return hidden


class MambaLM(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.around = Around(config) if config.attention is not None else None
        self.norm_f: nn.Module = (RMSNorm if config.rms_norm else nn.LayerNorm)(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, length) -> the residual stream (batch, length, d_model), in float32 or wider where the config says"""
        hidden: Tensor = self.embedding(ids)
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32)) if self.config.residual_in_fp32 else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, d_model) after the final norm -> (…, vocab_size)"""
        out: Tensor = self.lm_head(hidden.to(self.dtype))
        return out

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of equal length -> hidden states after the final norm, (batch, length, d_model); differentiable."""
        batch, length = ids.shape
        span = Span(length=length, lengths=(length,) * batch, prompt_lengths=(length,) * batch)
        hidden = self.embed(ids)
        positions = torch.arange(length, device=ids.device).expand(batch, -1)
        passage = Passage.begin(self.around, hidden, positions, length)
        for layer, block in enumerate(self.blocks()):
            hidden, beside = passage.enter(layer, hidden, span)
            hidden = block.walk(hidden, span, VANILLA, layer, None, length, beside=beside).hidden
        hidden, _ = passage.enter(len(self.layers), hidden, span)
        normed: Tensor = self.norm_f(hidden)
        return normed
