"""Search spaces narrowed by what was measured: where a method's parameters can matter in this model at these lengths.

Each rule reads a few figures of the analysis and gives a part of the shipped range, with its reason; it never leaves
that range. What no figure speaks for keeps its range. L is the training length, n the longest prompt over L.

    longmamba    share: channels with e^-20 < P < e^-0.5 over L, those whose memory ends at the training's edge
                 clamp: within a factor of four of 1/n, the share of a prompt that is as many tokens as were trained on
                 selector: where steps keep their law beyond L, the one that trusts thresholds made there: bound and
                 norm hold each sum of steps to what L had, with no floor, and leave little of a long prompt
                 aggregate: where texts agree on which channels are global, both rank alike
    decimamba    layers: from one before those whose mean distance is at least half of the furthest's; tokens: L to
                 what is read
    upi          share: channels whose mean distance is between L/32 and L/4; γ: as much as the loss asks for
    mambaextend  scales: knots near which every layer forgets within L keep their steps
    remamba      window: what must go for the rest to be read
    oprm         chunks: up to what is read

Settings to try first are no random draws: they are spread over the parameter that matters most, so that few trials
see all of its range. Where a method can only take away, its mildest setting is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from statespan.analysis.facts import Analysis
from statespan.search_spaces.loader import Range, Space

STEADY = 0.25
"""Mean steps that change by less than this beyond the training length follow the law of training."""

AGREES = 0.85
"""Texts agree on which channels are global where they share so much of the top tenth."""

SOME = 0.1
"""A layer with so large a share of global channels has some to squeeze."""

Entries = dict[str, Any]
"""Parameter -> an entry of a search space: a mapping is a range, anything else a value."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What replaces entries of a method's space, and settings to try first."""

    method: str
    params: Entries
    enqueue: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class _Case:
    """What a rule reads."""

    analysis: Analysis
    space: Space
    lengths: tuple[int, ...]

    @property
    def L(self) -> int:
        return self.analysis.train_length

    @property
    def n(self) -> float:
        return max(self.lengths) / self.L

    def narrowed(self, name: str, low: float, high: float, why: str) -> Entries:
        """A part of a range; of one that is not counted, at least a tenth (of its logarithm, where that is drawn)."""
        old = self.space.params.get(name)
        if not isinstance(old, Range) or old.type == "choice":
            return {}
        to, back = (math.log, math.exp) if old.log else (float, float)
        least = 0.0 if old.type == "int" else (to(old.high) - to(old.low)) / 10
        a, b = (min(max(to(value), to(old.low)), to(old.high)) for value in (max(low, 1e-9), max(high, 1e-9)))
        if b - a < least:
            middle = min(max((a + b) / 2, to(old.low) + least / 2), to(old.high) - least / 2)
            a, b = middle - least / 2, middle + least / 2
        new = {"type": old.type, "low": _plain(back(a), old, math.floor), "high": _plain(back(b), old, math.ceil)}
        rest = {"log": True} if old.log else {}
        return {name: new | rest | ({"grid": old.grid} if old.grid else {}) | {"why": why}}

    def chosen(self, name: str, keep: Callable[[Any], bool], why: str) -> Entries:
        """Some of a range's choices; nothing where all stay or none would."""
        old = self.space.params.get(name)
        if not isinstance(old, Range) or old.type != "choice":
            return {}
        left = [one for one in old.choices if keep(one)]
        if not left or len(left) == len(old.choices):
            return {}
        when = {"when": old.when} if old.when else {}
        return {name: {"type": "choice", "choices": left, "why": why} | when}

    def told_apart(self, name: str) -> Entries:
        """Of choices that are multiples of L from which on a method acts: one for each set of prompts it acts on."""
        seen: dict[tuple[int, ...], Any] = {}
        old = self.space.params.get(name)
        for one in old.choices if isinstance(old, Range) else ():
            seen.setdefault(tuple(length for length in self.lengths if length > one * self.L), one)
        why = "one of each that treat this study's lengths alike"
        return self.chosen(name, lambda one: one in seen.values(), why)


def _plain(value: float, old: Range, towards: Callable[[float], int]) -> float | int:
    """Rounded outwards to two digits, within the old range: no machine's last digits decide what is searched."""
    if old.type == "int":
        return min(max(towards(round(value, 6)), int(old.low)), int(old.high))
    size = 10.0 ** (math.floor(math.log10(abs(value))) - 1) if value else 1.0
    return min(max(float(f"{towards(round(value / size, 6)) * size:.6g}"), old.low), old.high)


def suggest(analysis: Analysis, space: Space, lengths: Sequence[int]) -> Suggestion:
    """What of a method's space to search for a model that was analysed.

    Args:
        analysis: of the model.
        space: the method's, as it ships or as the study has it; only ranges it has are narrowed.
        lengths: the study's prompts, in tokens.
    """
    beyond = tuple(sorted({length for length in lengths if length > analysis.train_length}))
    rule = RULES.get(space.method)
    if rule is None or not beyond:
        return Suggestion(space.method, {})
    params, points = rule(_Case(analysis, space, beyond))
    return Suggestion(space.method, params, tuple(points))


def within(space: Space, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of settings to try first, those that the space can hold."""
    return [
        dict(point)
        for point in points
        if all(
            value in one if isinstance(one := space.params.get(name), Range) else value == one
            for name, value in point.items()
        )
    ]


def _longmamba(case: _Case) -> tuple[Entries, list[dict[str, Any]]]:
    analysis, low, high = case.analysis, case.analysis.share_above(-0.5), case.analysis.share_above(-20.0)
    why = f"{low:.1%} of the channels keep e^-0.5 over the training length, {high:.1%} keep e^-20: those at its edge"
    params = case.narrowed("share", low, high, why)
    why = f"C is the least share of tokens kept; 1/{case.n:g} of the longest prompt is as much as was trained on"
    params |= case.chosen("clamp", lambda share: bool(0.25 <= share * case.n <= 4.0), why)
    if analysis.drift < STEADY and case.n > 2:
        why = f"mean steps change by at most {analysis.drift:.0%} beyond the training length: thresholds made there fit"
        params |= case.chosen("selector", lambda name: name == "dt_thre", why)
    if analysis.agreement is not None and analysis.agreement >= AGREES:
        why = f"texts share {analysis.agreement:.0%} of the most global channels: max and mean rank them alike"
        params |= case.chosen("aggregate", lambda how: how == "max", why)
    params |= case.told_apart("min_ratio")
    clamps = params.get("clamp", {}).get("choices") or getattr(case.space.params.get("clamp"), "choices", (0.05,))
    clamp = 0.05 if 0.05 in clamps else min(clamps, key=lambda one: abs(one * case.n - 1.0))
    shares = [max(analysis.share_above(log_theta), 0.02) for log_theta in (-5.0, -8.0, -2.0)]
    return params, [{"share": _short(one), "clamp": clamp, "factor": 1.0, "selector": "dt_thre"} for one in shares]


def _short(value: float) -> float:
    return float(f"{value:.2g}")


def _decimamba(case: _Case) -> tuple[Entries, list[dict[str, Any]]]:
    trained, reads = case.analysis.distance[0], case.analysis.holds
    old = case.space.params.get("first_layer")
    inside = [layer for layer in range(len(trained)) if not isinstance(old, Range) or layer in old]
    most = max(trained[layer] for layer in inside)
    far = [layer for layer in inside if trained[layer] >= 0.5 * most]
    why = f"{_layers(far)} at least half as far as the furthest, {most:.0f} tokens; one before, they read survivors"
    params = case.narrowed("first_layer", min(far) - 1, max(inside), why)
    params |= case.chosen(
        "layer_count", lambda count: bool(count <= len(far)), f"{len(far)} of the layers look back far"
    )
    why = f"text is read well up to {reads:g} training lengths; fewer tokens than one need not be kept"
    params |= case.narrowed("base_tokens", case.L, max(reads, 2.0) * case.L, why)
    tails, base = case.space.params.get("extra_tail"), case.space.params.get("base_tokens")
    # a question that is dropped cannot be answered
    tail = {"extra_tail": max(tails.choices)} if isinstance(tails, Range) else {}
    first = sorted({far[0], far[len(far) // 2], far[-1]})
    points = [{"first_layer": layer, "layer_count": 1, "base_tokens": 2 * case.L, **tail} for layer in first]
    if isinstance(base, Range):
        points.append({"first_layer": max(inside), "layer_count": 1, "base_tokens": int(base.high), **tail})
    return params, points


def _layers(some: Sequence[int]) -> str:
    listed = ", ".join(map(str, some))
    return f"layers {listed} look back" if len(some) > 1 else f"layer {listed} looks back"


def _upi(case: _Case) -> tuple[Entries, list[dict[str, Any]]]:
    analysis = case.analysis
    low, high = analysis.share_beyond(case.L / 4), analysis.share_beyond(case.L / 32)
    why = f"{low:.1%} of the channels look back a quarter of the training length on average, {high:.1%} a thirty-second"
    params = case.narrowed("share", low, high, why)
    least = 1.0 - math.log(max(analysis.holds, 1.0)) / math.log(case.n)
    why = f"text is read well up to {analysis.holds:g} training lengths"
    params |= case.narrowed("gamma", max(least, 0.25), 1.0, why)
    params |= case.told_apart("min_ratio")
    return params, [{"share": _short(analysis.share_beyond(case.L / 8)), "gamma": max(_short(least), 0.5)}]


def _mambaextend(case: _Case) -> tuple[Entries, list[dict[str, Any]]]:
    """Knots stand at layer 0, half the depth and the last layer."""
    analysis, last = case.analysis, case.analysis.layers - 1
    params, moved = Entries(), dict[str, bool]()
    for name, at in (("first", 0.0), ("middle", last / 2), ("last", float(last))):
        near = [layer for layer in range(last + 1) if abs(layer - at) <= max(last / 4, 0.5)]
        most = max(analysis.share_above(-3.0, [layer]) for layer in near)
        moved[name] = most >= SOME
        why = f"at most {most:.0%} of the channels in layers {near[0]} to {near[-1]} are global"
        if moved[name]:  # how far to squeeze those no share tells
            params |= case.narrowed(name, 0.0, 1.1, f"{why} and may need smaller steps")
        else:
            params |= case.narrowed(name, case.n**-most, 1.1, f"{why}; the others must keep their steps")
    if not any(moved.values()):
        return params, []
    # between leaving a prompt as it is and squeezing it all into L
    squeezed = [max(_short(case.n**-power), 0.3) for power in (0.25, 0.5, 0.125)]
    return params, [
        {name: one if moves else 1.0 for name, moves in moved.items()} | {"per_doubling": False} for one in squeezed
    ]


def _remamba(case: _Case) -> tuple[Entries, list[dict[str, Any]]]:
    reads = case.analysis.holds
    why = f"text is read well up to {reads:g} training lengths"
    params = case.chosen("min_length", lambda tokens: bool(tokens <= reads * case.L), why)
    if reads < case.n:
        params |= case.narrowed("window", 1.0 - reads / case.n, 0.5, f"{why}: the rest of a prompt must go")
    return params, []


def _oprm(case: _Case) -> tuple[Entries, list[dict[str, Any]]]:
    """What is read without loss may be more than answers are found in, so no measurement says what is too short."""
    reads = case.analysis.holds
    why = f"text is read well up to {reads:g} training lengths"
    params = case.narrowed("chunk_tokens", 16, max(reads, 1.0) * case.L, why)
    # an instruction stands before every chunk, and no fact is cut in two
    around = {"question_tokens": 64, "head_tokens": 32, "overlap": 0.25}
    return params, [{"chunk_tokens": int(case.L * part), **around} for part in (0.5, 1.0, 0.25, 2.0)]


RULES: dict[str, Callable[[_Case], tuple[Entries, list[dict[str, Any]]]]] = {
    "longmamba": _longmamba,
    "decimamba": _decimamba,
    "upi": _upi,
    "mambaextend": _mambaextend,
    "remamba": _remamba,
    "oprm": _oprm,
}
