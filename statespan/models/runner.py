"""Running a model under a method: prefill by layer ranges, continue, step. All that trials can share starts here.

Layers that a method does not change compute what vanilla computes. `Runner.vanilla` keeps their output (store.py), so
that the next trial on the same prompt starts at the layer where it diverges; and as a method steps in behind `project`,
what the layer of divergence projects is shared, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from statespan.kernels.dispatch import on_device
from statespan.models import fused_step
from statespan.models.attention import KeyValues
from statespan.models.hook import VANILLA, Method, Span
from statespan.models.hybrid import Passage
from statespan.models.lm import MambaLM, Projected
from statespan.models.mixer import MixerState
from statespan.models.prefix import PrefixStore, beginnings, read, shared_rule
from statespan.models.step_graph import GraphPool
from statespan.models.store import StreamStore, moved


@dataclass(frozen=True, slots=True)
class Tokens:
    """Prompts of a batch, left-padded.

    ids: (batch, length) int64; what stands on pads is never read
    lengths: true length of each row
    """

    ids: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def pad(cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tokens:
        """Raises ValueError for an empty row: there is no last position to continue from."""
        lengths = tuple(len(row) for row in rows)
        if not lengths or min(lengths) == 0:
            raise ValueError(f"every prompt needs at least one token; got lengths {lengths}")
        longest = max(lengths)
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], dtype=torch.int64)
        return cls(ids.to(device), lengths)

    def digest(self) -> str:
        """Names the exact batch: rows, order and padding."""
        raw = self.ids.cpu().numpy().tobytes() + repr(self.lengths).encode()
        return hashlib.sha256(raw).hexdigest()


@dataclass(slots=True)
class Cache:
    """What decoding continues from: one constant-size state a Mamba layer, and what a hybrid's attention has seen."""

    states: list[MixerState] = field(default_factory=list)
    attention: list[KeyValues] = field(default_factory=list)

    def clone(self) -> Cache:
        return Cache([state.clone() for state in self.states], [one.clone() for one in self.attention])

    def rows(self, index: Tensor | Sequence[int]) -> Cache:
        """A copy of some rows, in that order; an index may repeat."""
        at = torch.as_tensor(index, dtype=torch.int64, device=self.states[0].conv.device)
        return Cache([state.rows(at) for state in self.states], [one.rows(at) for one in self.attention])

    @property
    def bytes(self) -> int:
        return sum(state.bytes for state in self.states) + sum(one.bytes for one in self.attention)

    @staticmethod
    def join(caches: Sequence[Cache]) -> Cache:
        """Rows of several caches as one batch."""
        return Cache(
            [MixerState.join(list(states)) for states in zip(*(c.states for c in caches), strict=True)],
            [KeyValues.join(parts) for parts in zip(*(c.attention for c in caches), strict=True)],
        )


@dataclass(slots=True)
class Stream:
    """A prompt on its way through the layers.

    hidden: (batch, length, d_model) residual stream
    positions: (batch, length) place of each row in the prompt, counted from its first true token, -1 on pads
    embeds: (batch, length, d_model) what entered layer 0, where a hybrid reads it again; never written over
    """

    hidden: Tensor
    span: Span
    cache: Cache
    positions: Tensor
    embeds: Tensor | None = None

    def clone(self) -> Stream:
        return Stream(self.hidden.clone(), self.span, self.cache.clone(), self.positions, self.embeds)

    @property
    def bytes(self) -> int:
        return self.hidden.nbytes + self.cache.bytes


@dataclass(slots=True)
class Prefilled:
    """A prompt that has been read.

    hidden: (batch, tail, d_model) last positions after the final norm; `model.logits` turns them into logits
    positions: (batch, length) which prompt positions reached the last layer, -1 on pads
    """

    hidden: Tensor
    cache: Cache
    span: Span
    positions: Tensor


@dataclass(slots=True)
class Work:
    """Layer-tokens (one token through one layer), counted."""

    computed: int = 0
    shared: int = 0


def chunk_of(model: MambaLM) -> int:
    """Tokens a layer walks at a time: on a CPU within its cache's reach; on a GPU about a GiB of activations, enough
    work for every launch and little beside the stream."""
    if model.device.type == "cpu":
        return 2048
    token = 6 * model.config.d_inner * model.dtype.itemsize  # gate, conv in and out, steps, scanned, and the stream's
    return 1 << ((1 << 30) // token).bit_length() - 1


class Runner:
    """A model, the chunk its layers walk in, and the streams that trials share."""

    def __init__(
        self,
        model: MambaLM,
        *,
        chunk: int | None = None,
        store: StreamStore | None = None,
        prefixes: PrefixStore | None = None,
        name: str = "",
    ) -> None:
        self.model = model
        self.name = name
        """Tells runners that share a store apart: empty for the loaded model, an adapter's digest for a derived one."""

        self._derived: dict[str, Runner] = {}
        self.chunk = chunk or chunk_of(model)
        self.store = store
        self.prefixes = prefixes
        self.work = Work()
        self.graphs = GraphPool(self.step, model=model)

    @property
    def n_layer(self) -> int:
        return len(self.model.layers)

    def even_chunk(self, length: int) -> int:
        """A chunk that parts this length evenly, at most a quarter longer than the runner's own: few tokens in a last
        chunk would leave a GPU idle. Only for what shares nothing, for shared chunks begin at multiples of one length.
        """
        parts = -(-length // (self.chunk + self.chunk // 4))
        return -(-length // max(parts, 1))

    def derive(self, name: str, make: Callable[[MambaLM], MambaLM]) -> Runner:
        """A runner of a changed model that shares this one's store and counters; made once for each name."""
        if name not in self._derived:
            other = Runner(make(self.model), chunk=self.chunk, prefixes=self.prefixes, name=name)
            other.work = self.work
            self._derived[name] = other
        self._derived[name].store = self.store
        return self._derived[name]

    def free(self) -> None:
        """Drop the decode steps that are captured and not in use."""
        for runner in (self, *self._derived.values()):
            runner.graphs.clear()

    def stream(self, prompt: Tokens, embeds: Tensor | None = None) -> Stream:
        """The residual stream on entry to layer 0; `embeds` (batch, length, d_model) in place of the embedding."""
        length = prompt.ids.shape[1]
        span = Span(length=length, lengths=prompt.lengths, prompt_lengths=prompt.lengths)
        place = torch.arange(length, device=prompt.ids.device)
        pads = on_device(tuple(length - own for own in prompt.lengths), prompt.ids.device)
        positions = (place - pads[:, None]).clamp_min(-1)
        hidden = self.model.embed(prompt.ids) if embeds is None else embeds
        passage = Passage.begin(self.model.around, hidden, positions, self.chunk)
        return Stream(hidden, span, Cache(attention=passage.caches), positions, passage.embeds)

    def run(
        self,
        stream: Stream,
        method: Method,
        first: int,
        last: int,
        tail: int = 1,
        projected: Projected | None = None,
        chunk: int | None = None,
    ) -> Stream:
        """Layers first … last-1 under a method's hook. `stream` is consumed: its memory may be written over.

        `projected` is what layer `first` projects of this stream, where another trial left it; `chunk` what the layers
        walk in if not the runner's own, for a stream that shares nothing.
        """
        chunk = chunk or self.chunk
        hidden, span = stream.hidden, replace(stream.span, tail=tail)
        passage = Passage(self.model.around, stream.embeds, stream.positions, stream.cache.attention, chunk)
        states, blocks = list(stream.cache.states), self.model.blocks()
        for layer in range(first, last):
            given = projected if layer == first else None
            hidden, beside = passage.enter(layer, hidden, span)
            walked = blocks[layer].walk(hidden, span, method, layer, None, chunk, given, beside)
            # a token that was projected for another trial and is dropped for this one has cost nothing
            dropped = sum(span.lengths) - sum(walked.span.lengths)
            spared = dropped if given is not None and given.shared else 0
            self.work.computed += sum(span.lengths) - spared
            self.work.shared += spared
            hidden, span = walked.hidden, walked.span
            if walked.kept is not None:
                passage.keep(walked.kept)
            states.append(walked.state)
        if first < last == self.n_layer:
            hidden, _ = passage.enter(last, hidden, span)
        return Stream(hidden, span, Cache(states, passage.caches), passage.positions, passage.embeds)

    def vanilla(self, prompt: Tokens, upto: int, keep: bool = True) -> Stream:
        """The unmodified stream on entry to layer `upto`, taken from the store as far as it reaches.

        The caller may write over it. With a store, the result is kept for the next trial unless `keep` is False.
        """
        key = self.key(prompt) if self.store is not None else ""
        found = self.store.deepest(key, upto) if self.store is not None else None
        if found is None:
            layer, stream = 0, self.stream(prompt)
        else:
            layer, stream = found[0], found[1].clone()
            self.work.shared += layer * sum(prompt.lengths)
        projected = self.store.projected(key, layer) if self.store is not None else None
        stream = self.run(stream, VANILLA, layer, upto, projected=projected)
        if self.store is not None and projected is not None and upto > layer:
            counted = self.store.counted(key, layer)  # by the trial that projected them and dropped them
            self.work.computed -= counted
            self.work.shared += counted
        if self.store is not None and keep and upto > layer:
            self.store.put(key, upto, stream.clone())
        return stream

    def key(self, prompt: Tokens) -> str:
        """Names a prompt and the weights that read it, in the store."""
        return f"{self.name}:{prompt.digest()}"

    def _projected(self, prompt: Tokens, stream: Stream, layer: int) -> Projected | None:
        """What a layer projects of vanilla's stream, if the next trial left it or shall find it; None where nothing is
        kept, and for several rows, in which a layer may have to be walked row by row."""
        if self.store is None or not self.store.holds_projections() or len(prompt.lengths) > 1:
            return None
        if layer == self.n_layer or torch.is_grad_enabled() or self.model.around is not None:
            return None
        key = self.key(prompt)
        found = self.store.projected(key, layer)
        if found is not None:
            return replace(found, shared=True)
        made = self.model.blocks()[layer].project_all(stream.hidden, stream.span, self.chunk)
        made = moved(made, torch.Tensor.contiguous)  # slices of wider rows would keep the rest of them alive
        self.store.put_projected(key, layer, made)
        return made

    def finish(self, stream: Stream, tail: int) -> Prefilled:
        hidden = self.model.norm_f(stream.hidden[:, -tail:])
        return Prefilled(hidden, stream.cache, stream.span, stream.positions)

    def diverges_at(self, method: Method, lengths: Sequence[int]) -> int:
        """The first layer of which any row's computation differs from vanilla's; n_layer for none."""
        layers = [method.first_layer_changed(length) for length in lengths]
        return min((layer for layer in layers if layer is not None), default=self.n_layer)

    def prefill(self, prompt: Tokens, method: Method = VANILLA, tail: int = 1) -> Prefilled:
        """Read the prompt with the method's hook in every layer it changes."""
        first = self.diverges_at(method, prompt.lengths)
        if self.prefixes is not None and (rule := shared_rule(self, prompt, method, first, tail)) is not None:
            hidden, states = read(self, prompt, method, first, beginnings(prompt, self.chunk, rule))
            stream = self.stream(prompt, hidden)  # the last chunk's rows: all that finish asks for
            return self.finish(replace(stream, cache=Cache(states)), tail)
        stream = self.vanilla(prompt, first)
        projected = self._projected(prompt, stream, first)
        if projected is not None:
            stream = self.run(stream, method, first, first + 1, tail, projected)
            dropped = sum(prompt.lengths) - sum(stream.span.lengths)
            if self.store is not None and dropped and not projected.shared:
                self.store.count(self.key(prompt), first, dropped)
            first += 1
        return self.finish(self.run(stream, method, first, self.n_layer, tail), tail)

    def extend(self, cache: Cache, ids: Tensor) -> Tensor:
        """Continue with (batch, length) more tokens, unmodified; the cache moves on.

        Returns (batch, length, d_model) after the final norm.
        """
        batch, length = ids.shape
        span = Span(length=length, lengths=(length,) * batch, prompt_lengths=(length,) * batch)
        hidden = self.model.embed(ids)
        passage = Passage.go_on(self.model.around, hidden, cache.attention, self.chunk)
        for layer, block in enumerate(self.model.blocks()):
            hidden, beside = passage.enter(layer, hidden, span)
            walked = block.walk(hidden, span, VANILLA, layer, cache.states[layer], self.chunk, beside=beside)
            hidden, cache.states[layer] = walked.hidden, walked.state
        hidden, _ = passage.enter(self.n_layer, hidden, span)
        normed: Tensor = self.model.norm_f(hidden)
        return normed

    def step(self, cache: Cache, ids: Tensor) -> Tensor:
        """One more token a row: (batch,) -> logits (batch, vocab_size); the cache moves on."""
        hidden = self.model.embed(ids)
        if self.model.around is not None:
            return self._step_hybrid(cache, hidden)
        if fused_step.in_rows(self.model, hidden):
            return self.model.logits(fused_step.step_rows(self.model, cache.states, hidden))
        for block, state in zip(self.model.blocks(), cache.states, strict=True):
            hidden = block.step(hidden, state)
        if fused_step.allowed(self.model.norm_f, hidden):
            return fused_step.logits(self.model, hidden)
        return self.model.logits(self.model.norm_f(hidden))

    def _step_hybrid(self, cache: Cache, hidden: Tensor) -> Tensor:
        hidden, rows = hidden[:, None], (1,) * len(hidden)
        span = Span(length=1, lengths=rows, prompt_lengths=rows)
        passage = Passage.go_on(self.model.around, hidden, cache.attention, self.chunk)
        for layer, (block, state) in enumerate(zip(self.model.blocks(), cache.states, strict=True)):
            hidden, beside = passage.enter(layer, hidden, span)
            near = None if beside is None else beside[:, 0]
            hidden = block.step(hidden[:, 0].clone(), state, near)[:, None]  # attention may read this row again
        hidden, _ = passage.enter(self.n_layer, hidden, span)
        return self.model.logits(self.model.norm_f(hidden[:, 0]))
