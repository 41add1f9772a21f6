"""Small charts as inline SVG text: no script, no request, and colours from the page's CSS variables, dark or light.

Nothing is told by colour alone: cells carry their figure, series differ in marker and dash, bars are labelled. Heatmap
colours run from dark blue to yellow (a few stops of cividis, made for colour-blind readers: Nuñez et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from statespan.orchestration.report_facts import Cell, Curve

RAMP = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))
MANY = 300
"""Points beyond which dots are drawn as one path, without tooltips."""

Points = Sequence[tuple[float, float]]


def svg(width: float, height: float, label: str, body: str) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width * 1.25:.0f}px"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{body}</svg>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'


def rect(x: float, y: float, width: float, height: float, kind: str, style: str = "", title: str = "") -> str:
    hint = f"<title>{escape(title)}</title>" if title else ""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"'
    return f'<rect {place} class="{kind}" style="{style}">{hint}</rect>'


def marker(x: float, y: float, kind: str, title: str = "", size: float = 4.5) -> str:
    """Square for the baseline, triangle for the runner-up, cross for stopped, circle for the others."""
    hint = f"<title>{escape(title)}</title>" if title else ""
    if kind == "baseline":
        shape = f"M{x - size:.1f} {y - size:.1f}h{2 * size}v{2 * size}h{-2 * size}z"
    elif kind == "runner-up":
        shape = f"M{x:.1f} {y - size * 1.2:.1f}l{size * 1.2:.1f} {size * 2:.1f}h{-size * 2.4:.1f}z"
    elif kind == "pruned":
        shape = f"M{x - 3:.1f} {y - 3:.1f}l6 6M{x + 3:.1f} {y - 3:.1f}l-6 6"
    else:
        shape = f"M{x - size:.1f} {y:.1f}a{size} {size} 0 1 0 {2 * size} 0a{size} {size} 0 1 0 {-2 * size} 0z"
    return f'<path d="{shape}" class="m {kind}">{hint}</path>'


def tokens(count: float) -> str:
    """A length in few characters: 4k for 4,096."""
    whole = int(count)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else f"{whole:,}"


def short(value: float) -> str:
    """A figure for an axis or a cell."""
    if math.isnan(value):
        return "–"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", "−")
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def heat_color(share: float) -> tuple[str, str]:
    """(fill, ink) for a value between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    r, g, b = (a + (c - a) * (place - low) for a, c in zip(RAMP[low], RAMP[low + 1], strict=True))
    luminance = sum(w * (c / 255) ** 2.2 for w, c in zip((0.2126, 0.7152, 0.0722), (r, g, b), strict=True))
    # at 0.18 black and white can be read alike
    return f"rgb({r:.0f},{g:.0f},{b:.0f})", "#fff" if luminance < 0.18 else "#000"


def heatmap(cells: Sequence[Cell], trained: int | None, low: float, high: float, percent: bool, label: str) -> str:
    """Length by depth; the figure in every cell, the training length as a dashed line."""
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    wide, tall = min(max(340 / len(lengths), 34), 56), min(max(170 / len(depths), 22), 32)
    left, top = 56, 20
    parts = []
    for cell in cells:
        x, y = left + wide * lengths.index(cell.length), top + tall * depths.index(cell.depth)
        fill, ink = heat_color((cell.mean - low) / (high - low) if high > low else 1.0)
        shown = f"{100 * cell.mean:.0f}" if percent else short(cell.mean)
        hint = f"{cell.length:,} tokens, depth {cell.depth:g}: {shown}, {cell.samples} samples"
        parts.append(rect(x, y, wide - 2, tall - 2, "cell", f"fill:{fill}", hint))
        place = f'x="{x + wide / 2 - 1:.1f}" y="{y + tall / 2 + 3:.1f}"'
        parts.append(f'<text {place} text-anchor="middle" style="fill:{ink}">{shown}</text>')
    bottom = top + tall * len(depths)
    parts += [text(left + wide * (i + 0.5) - 1, bottom + 14, tokens(one), "tick") for i, one in enumerate(lengths)]
    parts += [text(left - 6, top + tall * (i + 0.5) + 3, depth_name(d), "tick", "end") for i, d in enumerate(depths)]
    parts.append(text(left + wide * len(lengths) / 2, bottom + 30, "prompt length, tokens", "axis"))
    parts.append(trained_mark(lengths, trained, lambda i: left + wide * i - 1, top - 4, bottom))
    return svg(max(left + wide * len(lengths) + 8, 220), bottom + 36, label, "".join(parts))


def depth_name(depth: float) -> str:
    return {0.0: "start", 1.0: "end"}.get(depth, f"{100 * depth:.0f}%")


def trained_mark(
    lengths: Sequence[int], trained: int | None, x_of: Callable[[int], float], top: float, bottom: float
) -> str:
    """A dashed line between the last length trained on and the next."""
    inside = sum(length <= trained for length in lengths) if trained is not None else 0
    if trained is None or inside in (0, len(lengths)):
        return ""
    x = x_of(inside)
    words = text(x, top - 3, f"trained to {tokens(trained)}", "mark", "middle")
    return line(x, top, x, bottom, "trained") + words


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A plot area with its axes."""

    width: float = 440
    height: float = 280
    left: float = 52
    right: float = 14
    top: float = 22
    bottom: float = 44
    x_low: float = 0.0
    x_high: float = 1.0
    y_low: float = 0.0
    y_high: float = 1.0
    x_log: bool = False

    def x(self, value: float) -> float:
        low, high, value = (math.log(v) if self.x_log else v for v in (self.x_low, self.x_high, value))
        return self.left + (value - low) / ((high - low) or 1.0) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1.0)
        return self.height - self.bottom - min(max(share, 0.0), 1.0) * (self.height - self.top - self.bottom)

    def y_axis(self, name: str, percent: bool) -> str:
        parts = [text(self.left, 13, name, "axis", "start")]
        for tick in ticks(self.y_low, self.y_high):
            words = f"{100 * tick:.3g}%" if percent else short(tick)  # steps of 2.5 points need their half
            parts.append(line(self.left, self.y(tick), self.width - self.right, self.y(tick), "grid"))
            parts.append(text(self.left - 6, self.y(tick) + 4, words, "tick", "end"))
        return "".join(parts)

    def x_axis(self, name: str, places: Sequence[tuple[float, str]] | None = None) -> str:
        shown = places or [(tick, short(tick)) for tick in ticks(self.x_low, self.x_high, self.x_log)]
        base = self.height - self.bottom
        parts = [text(self.x(place), base + 16, words, "tick") for place, words in shown]
        parts.append(text((self.left + self.width - self.right) / 2, base + 34, name, "axis"))
        return "".join(parts) + line(self.left, base, self.width - self.right, base, "rule")


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Three to six round figures within the ends."""
    if log and low > 0 and high / low > 3:
        steps = [m * 10.0**e for e in range(-9, 13) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        return steps if len(steps) <= 6 else steps[:: math.ceil(len(steps) / 6)]
    if high <= low:
        return [low]
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Sequence[float], percent: bool) -> tuple[float, float]:
    """Ends of a y axis: the values with a little room, shares never beyond 0 and 100 %."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return 0.0, 1.0
    room = (max(known) - min(known)) * 0.08 or abs(known[0]) * 0.1 or 0.1
    low, high = min(known) - room, max(known) + room
    return (max(low, 0.0), min(high, 1.0)) if percent else (low, high)


def curves(shown: Sequence[Curve], trained: int | None, name: str, percent: bool) -> str:
    """Mean by length with intervals, one line a trial."""
    lengths = sorted({length for curve in shown for length, _ in curve.points})
    ends = [value for curve in shown for _, i in curve.points for value in (i.low, i.high, i.mean)]
    low, high = (0.0, 1.0) if percent else padded(ends, percent)
    frame = Frame(x_low=-0.4, x_high=len(lengths) - 0.6, y_low=low, y_high=high, top=36)
    parts = [frame.y_axis(name, percent), frame.x_axis("prompt length, tokens", list(enumerate(map(tokens, lengths))))]
    parts.append(trained_mark(lengths, trained, lambda i: frame.x(i - 0.5), 32, frame.height - frame.bottom))
    for order, curve in enumerate(shown):
        aside = (order - (len(shown) - 1) / 2) * 5  # so that intervals do not hide one another
        places = [(frame.x(lengths.index(length)) + aside, interval) for length, interval in curve.points]
        path = "L".join(f"{x:.1f} {frame.y(interval.mean):.1f}" for x, interval in places)
        parts.append(f'<path d="M{path}" class="l {curve.role}"/>')
        for x, interval in places:
            if not math.isnan(interval.low):
                parts.append(line(x, frame.y(interval.low), x, frame.y(interval.high), f"bar {curve.role}"))
            ends_text = f"{short(interval.mean)} ({short(interval.low)} to {short(interval.high)})"
            parts.append(marker(x, frame.y(interval.mean), curve.role, f"{ends_text}, {interval.samples} samples"))
    return svg(frame.width, frame.height, f"{name} by prompt length, with intervals", "".join(parts))


def dots(points: Points, frame: Frame, kind: str) -> str:
    """Many equal points as one path: a round cap on a line of no length."""
    path = "".join(f"M{frame.x(x):.1f} {frame.y(y):.1f}h0" for x, y in points)
    return f'<path d="{path}" class="dots {kind}"/>' if path else ""


def bars(items: Sequence[tuple[str, float, str]], label: str, kind: str = "winner") -> str:
    """Labelled horizontal bars, longest first as given; values between 0 and 1."""
    left, right, row = 150, 52, 24
    width = 440
    parts = []
    for index, (name, share, words) in enumerate(items):
        y = index * row + 4
        parts.append(text(left - 8, y + 13, name, "tick", "end"))
        parts.append(rect(left, y, (width - left - right) * share, row - 8, f"fill {kind}"))
        parts.append(text(left + (width - left - right) * share + 6, y + 13, words, "tick", "start"))
    return svg(width, row * len(items) + 6, label, "".join(parts))
