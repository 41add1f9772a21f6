"""One reading of a text by the unmodified model, and what every channel of every layer did in it.

    survival     log Π_t (decay of step t) over the training length; Mamba-1: of the mean over its states
    distance     Mamba Mean Distance of token S, in tokens (statespan/models/hidden_attention.py)
    attention    share of |M_{i,j}| that lies in each stretch of the text, for some i, mean over some channels
    step         mean step size by stretch of the text
    loss         nats a token at each length, beside the same tokens read from less than the training length before them

The model is causal, so one pass over S tokens tells of every shorter length, too. Beyond the training length some
evenly spaced channels stand for all: their order means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.errors import UserError
from statespan.methods.step_statistics import log_rates
from statespan.models.hidden_attention import last_row, mean_distance
from statespan.models.hook import Method, ScanInputs
from statespan.models.lm import MambaLM
from statespan.models.runner import Runner, Tokens

MAP_CELLS = 32
MAP_CHANNELS = 12
FAR_CHANNELS = 64
"""Channels of a layer that are measured beyond the training length."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over the texts that were read. Lengths increase: the training length first, the whole of each text last.

    survival, distance: (texts, layers, channels) at the training length
    far: (lengths, layers) mean distance over some channels
    steps: (lengths, layers) mean step between each length and the one before, relative to the first
    loss: (lengths,) nats a token, over half a training length before each length
    fresh: (lengths,) the same tokens, when reading begins one training length before
    maps: layer -> (cells, cells) share of attention from the row's stretch of the first text to the column's
    """

    lengths: tuple[int, ...]
    survival: Tensor
    distance: Tensor
    far: Tensor
    steps: Tensor
    loss: Tensor
    fresh: Tensor
    maps: dict[int, Tensor]


@dataclass
class _Observer(Method):
    """Takes its measurements where a method would step in, and changes nothing."""

    lengths: Sequence[int]
    mapped: Sequence[int]
    on_layer: Progress
    survival: list[Tensor] = field(default_factory=list)
    distance: list[Tensor] = field(default_factory=list)
    far: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    maps: dict[int, Tensor] = field(default_factory=dict)

    def first_layer_changed(self, length: int) -> int | None:
        return 0

    def before_scan(self, layer: int, inputs: ScanInputs, seen: Tensor | None = None) -> ScanInputs:
        steps = inputs.step_sizes()[0]  # (length, channels)
        trained = steps[: self.lengths[0]]
        self.survival.append(log_rates(trained.T, inputs.A).sum(-1).cpu())
        self.distance.append(mean_distance(last_row(inputs, trained)).cpu())
        some = spaced(steps.shape[1], FAR_CHANNELS, steps.device)
        rows = [mean_distance(last_row(inputs, steps[:length], some)).mean() for length in self.lengths]
        self.far.append(torch.stack(rows).cpu())
        parts = [part.mean() for part in steps.tensor_split(self.lengths[:-1])]
        self.steps.append(torch.stack(parts).cpu() / parts[0].cpu())
        if layer in self.mapped:
            self.maps[layer] = attention_shares(inputs, steps).cpu()
        self.on_layer(f"layer {layer}")
        return inputs


def spaced(width: int, count: int, device: torch.device) -> Tensor:
    """Indices of `count` evenly spaced channels, or of all."""
    return torch.linspace(0, width - 1, min(count, width), device=device).long()


def attention_shares(inputs: ScanInputs, steps: Tensor, cells: int = MAP_CELLS) -> Tensor:
    """(cells, cells): where the last token of each stretch of the text looks, mean over evenly spaced channels."""
    length, width = steps.shape
    cells = min(cells, length)
    chosen = spaced(width, MAP_CHANNELS, steps.device)
    ends = torch.linspace(0, length, cells + 1, device=steps.device).long()[1:]
    cell_of = torch.bucketize(torch.arange(length, device=steps.device), ends, right=True)
    rows = []
    for end in ends.tolist():
        weights = last_row(inputs, steps[:end], chosen)
        shares = weights / weights.sum(0).clamp_min(torch.finfo(weights.dtype).tiny)
        rows.append(shares.new_zeros(cells).index_add(0, cell_of[:end], shares.mean(1)))
    return torch.stack(rows)


@torch.inference_mode()
def measure(
    model: MambaLM,
    texts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    mapped: Sequence[int] = (),
    on_progress: Progress = lambda _: None,
) -> Measured:
    """Read texts of one length with the unmodified model.

    Args:
        texts: token ids, each as long as the longest of `lengths`.
        lengths: S at which to measure, the training length first.
        mapped: layers whose attention is drawn.
        on_progress: called with a word on what was done.
    """
    lengths = tuple(sorted(set(lengths)))
    if not texts or {len(ids) for ids in texts} != {lengths[-1]}:
        raise AssertionError("every text must be as long as the longest length")
    if missing := [layer for layer in mapped if not 0 <= layer < model.config.n_layer]:
        raise UserError(f"--layers must lie in 0 … {model.config.n_layer - 1}, the model's layers; got {missing[0]}")
    runner, found, losses, fresh = Runner(model, chunk=lengths[-1]), list[_Observer](), [], []
    for number, ids in enumerate(texts, 1):
        observer = _Observer(lengths, mapped if number == 1 else (), _named(on_progress, f"text {number}"))
        prompt = Tokens.pad([ids], model.device)
        hidden = runner.prefill(prompt, observer, tail=len(ids)).hidden[0]
        windows = [slice(length - lengths[0], length) for length in lengths]
        anew = runner.prefill(Tokens.pad([ids[one] for one in windows], model.device), tail=lengths[0]).hidden
        losses.append(torch.stack([_loss(model, hidden[one], prompt.ids[0, one]) for one in windows]))
        fresh.append(torch.stack([_loss(model, anew[i], prompt.ids[0, one]) for i, one in enumerate(windows)]))
        found.append(observer)

    def each(name: str) -> Tensor:
        """(texts, layers, …)"""
        return torch.stack([torch.stack(getattr(one, name)) for one in found]).double()

    far, steps = (each(name).mean(0).T for name in ("far", "steps"))
    loss, anew = (torch.stack(one).mean(0) for one in (losses, fresh))
    return Measured(lengths, each("survival"), each("distance"), far, steps, loss, anew, found[0].maps)


def _named(on_progress: Progress, name: str) -> Progress:
    return lambda what: on_progress(f"{name}, {what}")


def _loss(model: MambaLM, hidden: Tensor, ids: Tensor) -> Tensor:
    """Mean nats of the second half of a stretch, (length, d_model) and its (length,) tokens -> ()"""
    half = len(ids) // 2
    logits = model.logits(hidden[half - 1 : -1]).float()
    return F.cross_entropy(logits, ids[half:]).double().cpu()
