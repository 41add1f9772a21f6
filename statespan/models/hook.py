"""The one place where a context-extension method may step in, and what it sees there.

A mixer is cut in two: `project` (in_proj, conv, x_proj, dt_proj), then the hook, then `scan` (selective scan, gate,
out_proj). The hook gets the frozen `ScanInputs` of a layer and returns what shall be scanned instead. The model knows
no method by name.

A layer's sequence is walked in chunks, so that a prompt of any length needs the memory of one hidden stream and one
chunk. `ScanInputs` holds one chunk; its `Span` says where that chunk lies. A method that must see a whole layer before
it can choose says so (`looks_ahead`) and gives a per-token statistic (`survey`); a layer of several chunks is then
projected twice.

Rows of unequal length are left-padded. On pads the conv input and dt are zero, so a padded row equals the row alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from statespan.kernels.dispatch import pad_mask
from statespan.kernels.take import take

if TYPE_CHECKING:
    from statespan.models.runner import Prefilled, Runner, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Which part of which sequence a chunk is. Lengths are tokens; rows are left-padded to `length`."""

    length: int
    """Padded length of the layer's whole sequence."""

    lengths: tuple[int, ...]
    """True length of each row in this layer, after what earlier layers dropped."""

    prompt_lengths: tuple[int, ...]
    """True length of each row's prompt on entry to the model: the S of LongMamba's thresholds."""

    tail: int = 1
    """Last positions of every row that no method may drop: their outputs are asked for."""

    start: int = 0
    """Where the chunk begins in the padded sequence."""

    def pads(self, chunk_length: int) -> tuple[int, ...]:
        """Leading positions of each row of the chunk that are padding."""
        return tuple(min(max(self.length - own - self.start, 0), chunk_length) for own in self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanInputs:
    """All that the selective scan of one layer reads, one row per token; the one thing a method may change.

    "Channel" is the unit that owns one step size: an inner feature in Mamba-1, a head in Mamba-2.

    x: (batch, length, d_inner), after the causal conv and its SiLU
    z: (batch, length, d_inner), the gate before its SiLU
    dt: (batch, length, channels), before bias and softplus
    B, C: (batch, length, n_groups * d_state); Mamba-1 has one group
    dt_bias: (channels,)
    A: (channels, d_state) for Mamba-1, (channels,) for Mamba-2, negative
    keep_above: (batch, channels) or None. A step softplus(dt + dt_bias) at or below it becomes exactly 0, so the token
        leaves the channel's state untouched (it still reads the state). A negative threshold keeps every step.
    dt_scale: (batch, channels) or None. Multiplies the step after softplus (and after keep_above was applied).
    dt_limit: the model's own clamp of the step after softplus, before keep_above.
    n_groups: B and C hold so many groups, each for a consecutive block of channels.
    bypass: (batch, length, d_mlp) or None: Mamba-2's channels that skip the scan (d_ssm < d_inner), already gated.
    kept: (batch, length) int64 or None: position in the chunk that entered the hook of each row now held, -1 for a
        pad. Set by `select`; the block gathers the residual stream with it.
    """

    x: Tensor
    z: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor
    A: Tensor
    span: Span
    keep_above: Tensor | None = None
    dt_scale: Tensor | None = None
    dt_limit: tuple[float, float] | None = None
    n_groups: int = 1
    bypass: Tensor | None = None
    kept: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens in this chunk, pads included."""
        return self.x.shape[1]

    def pad_mask(self) -> Tensor | None:
        """(batch, length) bool, True on pads; None where no row has any."""
        return pad_mask(self.span.pads(self.length), self.length, self.x.device)

    def step_sizes(self) -> Tensor:
        """softplus(dt + dt_bias), clamped as the model does: (batch, length, channels), float32 or wider, 0 on pads."""
        wide = torch.promote_types(self.dt.dtype, torch.float32)
        steps = torch.nn.functional.softplus(self.dt.to(wide) + self.dt_bias.to(wide))
        if self.dt_limit is not None:
            steps = steps.clamp(*self.dt_limit)
        mask = self.pad_mask()
        return steps if mask is None else steps.masked_fill(mask[..., None], 0.0)

    def select(self, kept: Tensor, lengths: tuple[int, ...]) -> ScanInputs:
        """Keep only some rows; the others neither write to nor decay the state, and vanish for all later layers.

        Args:
            kept: (batch, new_length) int64, rising positions in the layer's whole padded sequence, -1 for left pads.
            lengths: true length of each row afterwards.

        Of a chunk only the positions that lie in it are taken; that needs batch 1, which the runner sees to.
        """
        stop = self.span.start + self.length
        if self.span.start > 0 or stop < self.span.length:
            if kept.shape[0] != 1:
                raise AssertionError("a layer that drops tokens is walked in chunks one row at a time")
            kept = kept[:, (kept[0] >= self.span.start) & (kept[0] < stop)]
        local = torch.where(kept >= 0, kept - self.span.start, kept)  # (batch, rows of this chunk)
        rows: dict[str, Any] = {name: take(getattr(self, name), local) for name in ("x", "z", "dt", "B", "C")}
        bypass = None if self.bypass is None else take(self.bypass, local)
        span = replace(self.span, length=max(lengths), lengths=lengths)
        return replace(self, **rows, bypass=bypass, kept=local, span=span)


class Method:
    """A context-extension method. A subclass overrides what it changes; as it stands this is vanilla.

    Instances are immutable and hold their artifacts (calibration tables, adapters), not the model.
    """

    name: ClassVar[str] = "vanilla"
    supports: ClassVar[frozenset[str]] = frozenset({"mamba1", "mamba2"})
    """Mixer kinds it can act on."""

    artifacts: Mapping[str, str] = MappingProxyType({})
    """sha256 of each artifact it holds, by name; part of every result's key."""

    def first_layer_changed(self, length: int) -> int | None:
        """The first layer whose computation differs from vanilla's for a prompt of this length; None for no layer.

        What lies before it is shared between trials, and a None makes the trial reuse vanilla's result.
        """
        return None

    def prefix_rule(self, length: int) -> Hashable | None:
        """What, beside a token and those before it, decides how a prompt of this length is read; None where later
        tokens do, too.

        Prompts that begin alike under one rule share the reading of that beginning (prefix.py).
        """
        return () if self.first_layer_changed(length) is None else None

    def looks_ahead(self, layer: int, span: Span) -> bool:
        """True where `before_scan` needs `survey` of the whole layer: one of several chunks is then projected twice."""
        return False

    def survey(self, layer: int, inputs: ScanInputs) -> Tensor:
        """Per-token statistic (batch, length, any width) of a chunk. Asked for only where `looks_ahead`."""
        raise NotImplementedError

    def settle(self, layer: int, surveyed: Tensor, span: Span) -> Tensor:
        """What `before_scan` gets of the whole layer's survey, worked out once however many chunks follow."""
        return surveyed

    def before_scan(self, layer: int, inputs: ScanInputs, seen: Tensor | None = None) -> ScanInputs:
        """Return what layer `layer` shall scan; `inputs` itself leaves the layer as it is.

        `seen` is what `settle` made of the whole layer's `survey` (chunks joined along length), where the method looks
        ahead.
        """
        return inputs

    def runner(self, runner: Runner) -> Runner:
        """What to run on: the model itself, or one with the weights this method brings (an adapter's).

        Whoever decodes takes it first, for prefill and steps must use the same weights. Asked of its own answer, a
        method gives that answer back.
        """
        return runner

    def prefill(self, runner: Runner, prompt: Tokens, tail: int = 1) -> Prefilled:
        """Read the prompt; give the hidden states of the last `tail` positions and the cache to decode from.

        The default runs every layer once with this method's hook. Sequence-level methods (two passes, chunks of the
        prompt) override it.
        """
        return runner.prefill(prompt, self, tail)

    @classmethod
    def canonical(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with those that have no effect removed, so that equal trials share their results."""
        return dict(params)


VANILLA = Method()
