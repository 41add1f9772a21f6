"""What an analysis keeps: figures small enough for a page and a JSON file, made of what was measured.

The file names the weights it is of. Figures are rounded to four digits, so that the spaces made from them do not depend
on the machine that measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statespan.analysis.measure import Measured
from statespan.errors import UserError
from statespan.methods.base import ModelFacts

FORMAT = 1
THETAS = tuple(-k for k in (0.25, 0.5, 1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 50, 69, 92))
"""Natural logarithms of θ at which the share of global channels is told; the last is 1e-40."""

PROFILE = 64
HOLDS = 1.02
"""A length is read well where the loss is at most so many times that of the same tokens read anew."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    model: str
    digest: str
    kind: str
    layers: int
    channels: int
    train_length: int
    text: str
    texts: int
    lengths: tuple[int, ...]
    """Tokens; the training length first."""

    loss: tuple[float, ...]
    """Length -> nats a token over half a training length before it."""

    fresh: tuple[float, ...]
    """The same tokens, when reading begins one training length before: what the model can do that was trained."""

    steps: tuple[tuple[float, ...], ...]
    """Length -> layer: mean step there, relative to the training length."""

    distance: tuple[tuple[float, ...], ...]
    """Length -> layer: Mamba Mean Distance of the last token, mean over channels, in tokens."""

    fields_: tuple[tuple[float, ...], ...]
    """Layer -> receptive fields of its channels in tokens, ascending, in PROFILE quantiles: after so many tokens of
    training text a share 1/e of what entered is left."""

    distances: tuple[tuple[float, ...], ...]
    """Layer -> mean distances of its channels at the training length, ascending, in PROFILE quantiles."""

    thetas: tuple[float, ...]
    """ln θ."""

    globals: tuple[tuple[float, ...], ...]
    """θ -> layer: share of channels whose memory over the training length survives beyond θ."""

    agreement: float | None
    """Share of the most global tenth of channels that two texts have in common; None for one text."""

    maps: Mapping[str, tuple[tuple[float, ...], ...]]
    """Layer -> where in the longest text its attention lies, (cells, cells)."""

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    @property
    def holds(self) -> float:
        """How far the model reads without losing on text: a multiple of the training length, among those measured."""
        good = 1.0
        for length, nats, anew in zip(self.lengths, self.loss, self.fresh, strict=True):
            if nats > HOLDS * anew:
                break
            good = length / self.train_length
        return good

    @property
    def drift(self) -> float:
        """Largest relative change of any layer's mean step beyond the training length."""
        return max((abs(step - 1.0) for row in self.steps for step in row), default=0.0)

    def share_above(self, log_theta: float, layers: Sequence[int] | None = None) -> float:
        """Share of channels (of some layers) that are global at θ, linear between the stored thetas."""
        chosen = range(self.layers) if layers is None else layers
        rows = [sum(row[layer] for layer in chosen) / len(chosen) for row in self.globals]
        at = -log_theta
        places = [-theta for theta in self.thetas]
        for (low, a), (high, b) in zip(
            zip(places, rows, strict=True), zip(places[1:], rows[1:], strict=True), strict=False
        ):
            if at <= high:
                return a + (b - a) * max(at - low, 0.0) / (high - low)
        return rows[-1]

    def share_beyond(self, tokens: float) -> float:
        """Share of channels whose mean distance at the training length exceeds so many tokens."""
        values = [value for row in self.distances for value in row]
        return sum(value > tokens for value in values) / len(values)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **{name.rstrip("_"): value for name, value in asdict(self).items()}}

    @classmethod
    def read(cls, path: Path) -> Analysis:
        """Raises UserError for a file that is none."""
        try:
            raw = json.loads(path.read_text())
            if raw.pop("format") != FORMAT:
                raise ValueError("another format")
            raw["fields_"] = raw.pop("fields")
            known = {one.name for one in fields(cls)}
            return cls(**{name: _frozen(value) for name, value in raw.items() if name in known})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no analysis ({error}); `statespan analyze MODEL` makes one") from error


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else (
        {name: _frozen(one) for name, one in value.items()} if isinstance(value, dict) else value
    )  # fmt: skip


def summarize(measured: Measured, facts: ModelFacts, model: str, text: str) -> Analysis:
    """The figures of one measurement."""
    survival, distance = measured.survival.mean(0), measured.distance.mean(0)  # (layers, channels)
    fields_ = measured.lengths[0] / (-survival).clamp_min(1e-9)
    return Analysis(
        model=model,
        digest=facts.digest,
        kind=facts.kind,
        layers=facts.n_layer,
        channels=facts.channels,
        train_length=measured.lengths[0],
        text=text,
        texts=len(measured.survival),
        lengths=measured.lengths,
        loss=_rounded(measured.loss),
        fresh=_rounded(measured.fresh),
        steps=_table(measured.steps),
        distance=_table(measured.far),
        fields_=_table(_profile(fields_)),
        distances=_table(_profile(distance)),
        thetas=tuple(float(theta) for theta in THETAS),
        globals=_table(torch.stack([(survival > theta).double().mean(1) for theta in THETAS])),
        agreement=_agreement(measured.survival),
        maps={str(layer): _table(one) for layer, one in measured.maps.items()},
    )


def _profile(values: Tensor) -> Tensor:
    """(layers, channels) -> (layers, PROFILE) ascending; as they are where there are fewer"""
    count = min(PROFILE, values.shape[1])
    return values.quantile(torch.linspace(0, 1, count, dtype=values.dtype), dim=1).T


def _agreement(survival: Tensor) -> float | None:
    if len(survival) < 2:
        return None
    count = max(1, survival[0].numel() // 10)
    first, second = (set(one.flatten().topk(count).indices.tolist()) for one in survival[:2])
    return round(len(first & second) / count, 4)


def _table(rows: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(_rounded(row) for row in rows)


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values.tolist())
