"""The page of `statespan analyze`: what a model's channels remember, drawn in the report's look.

One file without scripts or requests, for light and dark screens, wide or narrow; every figure has its table beside it
or its numbers in it. They come from statespan.analysis; nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from statespan.analysis.facts import HOLDS, Analysis
from statespan.analysis.suggest import Suggestion
from statespan.orchestration.report_charts import (
    Frame,
    heat_color,
    line,
    marker,
    rect,
    short,
    svg,
    text,
    tokens,
)

ROLES = ("winner", "runner-up", "best", "baseline")


def to_html(analysis: Analysis, suggestions: Mapping[str, Suggestion], target: int) -> str:
    """The page; `target` is the longest prompt the suggestions are for."""
    template = Template(resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8"))
    parts = (
        _head(analysis),
        _tiles(analysis),
        _receptive(analysis),
        _distances(analysis),
        _reading(analysis),
        _attention(analysis),
        _spaces(suggestions, target),
        _origin(analysis),
    )
    return template.substitute(title=escape(f"{analysis.model} · statespan analyze"), body="\n".join(parts))


def _head(analysis: Analysis) -> str:
    far = sorted(range(analysis.layers), key=lambda layer: -analysis.distance[0][layer])[:2]
    reads = f"{analysis.holds:g} times its training length" + (
        ", as far as was measured" if _to_the_end(analysis) else ""
    )
    said = (
        f"{analysis.share_above(-5.0):.0%} of its channels remember across the {analysis.train_length:,} tokens it was "
        f"trained on; layers {' and '.join(map(str, sorted(far)))} look back furthest. "
        f"Plain text it reads without loss up to {reads}."
    )
    what = f"{analysis.layers} {analysis.kind.replace('mamba', 'Mamba-')} layers of {analysis.channels:,} channels"
    return (
        f"<h1>{escape(analysis.model)}</h1><p class='soft'>{what}</p><div class='verdict'><p>{escape(said)}</p></div>"
    )


def _to_the_end(analysis: Analysis) -> bool:
    return analysis.holds * analysis.train_length >= analysis.longest


def _tiles(analysis: Analysis) -> str:
    rows = [value for row in analysis.fields_ for value in row]
    median = sorted(rows)[len(rows) // 2]
    tiles = (
        (f"{short(median)} tokens", "median receptive field of a channel: after it 1/e of what entered is left"),
        (f"{max(analysis.distance[0]):,.0f} tokens", "mean distance of the layer that looks back furthest"),
        (f"{analysis.share_above(-5.0):.1%}", "of channels global at θ = e⁻⁵"),
        (f"{analysis.drift:.0%}", "largest change of a layer's mean step beyond the training length"),
    )
    cells = "".join(f"<div class='tile'><b>{big}</b><span>{small}</span></div>" for big, small in tiles)
    return f"<div class='tiles'>{cells}</div>"


def _figure(title: str, note: str, drawing: str) -> str:
    return f"<figure><figcaption>{title}<small>{note}</small></figcaption>{drawing}</figure>"


# ---- receptive fields


def _receptive(analysis: Analysis) -> str:
    fields = _figure(
        "Receptive field of every channel",
        "tokens after which 1/e of what entered is left; each row a layer, its channels in ascending order",
        _strips(analysis, analysis.fields_, "receptive field", analysis.train_length * 100.0),
    )
    shares = _figure(
        "Share of global channels against θ",
        "global: more than θ of a channel's memory survives the training length",
        _theta_chart(analysis),
    )
    return f"<h2>What channels remember</h2><div class='charts'>{fields}{shares}</div>{_theta_table(analysis)}"


def _strips(analysis: Analysis, rows: Sequence[Sequence[float]], name: str, most: float) -> str:
    """Layers by channel quantiles, colour on a logarithmic scale from one token on."""
    left, top, height = 34.0, 6.0, max(min(240 / analysis.layers, 24), 7)
    width, count = 400.0, len(rows[0])
    high = math.log(max(min(most, max(max(row) for row in rows)), 2.0))
    parts = []
    for layer, row in enumerate(rows):
        y = top + layer * height
        for at, value in enumerate(row):
            fill, _ = heat_color(math.log(max(min(value, most), 1.0)) / high)
            share = 100 * at / max(count - 1, 1)
            hint = f"layer {layer}, {share:.0f} % of channels below: {short(value)} tokens"
            parts.append(rect(left + at * width / count, y, width / count + 0.4, height - 1, "", f"fill:{fill}", hint))
        if analysis.layers <= 32 or layer % 4 == 0:
            parts.append(text(left - 5, y + height / 2 + 4, str(layer), "tick", "end"))
    bottom = top + analysis.layers * height
    parts += [text(left + width * share, bottom + 15, f"{share:.0%}", "tick") for share in (0.0, 0.5, 1.0)]
    parts.append(text(left + width / 2, bottom + 31, "channels of the layer, ascending", "axis"))
    parts.append(_legend(left, bottom + 42, width, [1.0, *_decades(math.exp(high))], high))
    return svg(left + width + 16, bottom + 76, f"{name} by layer and channel", "".join(parts))


def _decades(most: float) -> list[float]:
    return [10.0**power for power in range(1, math.floor(math.log10(most)) + 1)]


def _legend(left: float, top: float, width: float, places: Sequence[float], high: float) -> str:
    cells = 40
    parts = []
    for at in range(cells):
        fill, _ = heat_color(at / (cells - 1))
        parts.append(rect(left + at * width / cells, top, width / cells + 0.4, 9, "", f"fill:{fill}"))
    for place in places:
        parts.append(text(left + width * math.log(place) / high, top + 23, _count(place), "tick"))
    return "".join(parts)


def _count(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _theta_chart(analysis: Analysis) -> str:
    logs = [-theta for theta in analysis.thetas]
    every = [analysis.share_above(theta) for theta in analysis.thetas]
    layers = list(zip(*analysis.globals, strict=True))
    frame = Frame(
        x_low=logs[0], x_high=logs[-1], x_log=True, y_low=0.0, y_high=max(max(max(one) for one in layers), 0.05)
    )
    parts = [frame.y_axis("share of channels", True)]
    places = [(1.0, "e⁻¹"), (3.0, "e⁻³"), (11.5, "1e-5"), (30.0, "e⁻³⁰"), (69.0, "1e-30")]
    parts.append(frame.x_axis("θ, falling", places))
    for layer, shares in enumerate(layers):
        path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(logs, shares, strict=True))
        thin = 'class="l baseline" style="stroke-width:1;opacity:.55"'
        parts.append(f'<path d="M{path}" {thin}><title>layer {layer}</title></path>')
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(logs, every, strict=True))
    parts.append(f'<path d="M{path}" class="l"/>')
    for x, y in zip(logs, every, strict=True):
        parts.append(marker(frame.x(x), frame.y(y), "winner", f"ln θ = −{x:g}: {y:.1%}", 3))
    parts.append(text(frame.x(logs[-1]) - 4, frame.y(every[-1]) - 8, "all layers", "mark", "end"))
    return svg(frame.width, frame.height, "share of global channels against theta", "".join(parts))


def _theta_table(analysis: Analysis) -> str:
    shown = [theta for theta in analysis.thetas if theta in (-0.5, -1, -3, -5, -8, -12, -20, -30, -69)]
    head = "".join(f"<th>e^{theta:g}</th>" for theta in shown)
    body = []
    for layer in range(analysis.layers):
        cells = "".join(f"<td>{analysis.share_above(theta, [layer]):.1%}</td>" for theta in shown)
        body.append(f"<tr><td>{layer}</td>{cells}</tr>")
    every = "".join(f"<td>{analysis.share_above(theta):.1%}</td>" for theta in shown)
    body.append(f"<tr class='winner'><td>all</td>{every}</tr>")
    table = f"<table><tr><th>layer</th>{head}</tr>{''.join(body)}</table>"
    return f"<details><summary>Share of global channels, by layer</summary><div class='scroll'>{table}</div></details>"


# ---- distances


def _distances(analysis: Analysis) -> str:
    chart = _figure(
        "Mamba Mean Distance by length",
        "how far the last token of a text looks back, mean over a layer's channels; dashed: half of the text",
        _distance_chart(analysis),
    )
    strips = _figure(
        "Mean distance of every channel",
        f"at the training length, {analysis.train_length:,} tokens; each row a layer, channels in ascending order",
        _strips(analysis, analysis.distances, "mean distance", float(analysis.train_length)),
    )
    head = "".join(f"<th>{tokens(length)}</th>" for length in analysis.lengths)
    rows = "".join(
        f"<tr><td>{layer}</td>" + "".join(f"<td>{row[layer]:,.0f}</td>" for row in analysis.distance) + "</tr>"
        for layer in range(analysis.layers)
    )
    table = f"<table><tr><th>layer</th>{head}</tr>{rows}</table>"
    details = f"<summary>Mean distance in tokens, by layer and length</summary><div class='scroll'>{table}</div>"
    figures = f"<div class='charts'>{chart}{strips}</div>"
    return f"<h2>How far layers look back</h2>{figures}<details>{details}</details>"


def _distance_chart(analysis: Analysis) -> str:
    lengths, rows = analysis.lengths, analysis.distance
    top = max(max(row) for row in rows)
    frame = Frame(x_low=lengths[0], x_high=lengths[-1], x_log=True, y_low=0.0, y_high=top * 1.08, right=34)
    parts = [frame.y_axis("tokens", False)]
    parts.append(frame.x_axis("length of the text, tokens", [(float(one), tokens(one)) for one in lengths]))
    if lengths[0] / 2 < frame.y_high:
        half = "L".join(f"{frame.x(one):.1f} {frame.y(one / 2):.1f}" for one in _reach(lengths, 2 * frame.y_high))
        parts.append(f'<path d="M{half}" class="l baseline"/>')
    order = sorted(range(analysis.layers), key=lambda layer: -rows[-1][layer])
    labelled: list[float] = []
    for place, layer in enumerate(order):
        kind = ROLES[place] if place < 2 else "other"
        path = "L".join(f"{frame.x(x):.1f} {frame.y(row[layer]):.1f}" for x, row in zip(lengths, rows, strict=True))
        style = "" if place < 2 else ' style="stroke-width:1.2;opacity:.6"'
        parts.append(f'<path d="M{path}" class="l {kind}"{style}><title>layer {layer}</title></path>')
        y = frame.y(rows[-1][layer])
        if all(abs(y - other) > 12 for other in labelled):
            parts.append(text(frame.width - frame.right + 5, y + 4, str(layer), "mark", "start"))
            labelled.append(y)
    return svg(frame.width, frame.height, "mean distance by length and layer", "".join(parts))


def _reach(lengths: Sequence[int], most: float) -> list[float]:
    """Lengths up to where a line leaves the plot, drawn densely, for the axis is logarithmic."""
    low, high = math.log(lengths[0]), math.log(min(float(lengths[-1]), most))
    return [math.exp(low + (high - low) * i / 24) for i in range(25)]


# ---- reading


def _reading(analysis: Analysis) -> str:
    reading = _figure(
        "What a long text costs in loss",
        "nats a token more than when reading begins one training length before the same tokens; dotted: what counts as "
        "a loss",
        _excess_chart(analysis),
    )
    steps = _figure(
        "Mean step beyond the training length",
        "relative to within it; far from 1, thresholds made at the training length no longer fit",
        _steps_chart(analysis),
    )
    return f"<h2>What length does to it</h2><div class='charts'>{reading}{steps}</div>"


def _excess_chart(analysis: Analysis) -> str:
    excess = [nats - anew for nats, anew in zip(analysis.loss, analysis.fresh, strict=True)]
    bound = (HOLDS - 1.0) * analysis.fresh[0]
    low, high = min(0.0, *excess), max(bound, *excess)
    frame = Frame(
        x_low=analysis.lengths[0],
        x_high=analysis.longest,
        x_log=True,
        y_low=low - 0.1 * (high - low),
        y_high=high + 0.1 * (high - low),
        right=24,
    )
    parts = [frame.y_axis("nats a token", False)]
    parts.append(frame.x_axis("place in the text, tokens", [(float(one), tokens(one)) for one in analysis.lengths]))
    for kind, at in (("rule", 0.0), ("l runner-up", bound)):
        parts.append(line(frame.left, frame.y(at), frame.width - frame.right, frame.y(at), kind))
    points = [(frame.x(x), frame.y(y)) for x, y in zip(analysis.lengths, excess, strict=True)]
    parts.append(f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}" class="l"/>')
    for (x, y), length, nats, anew in zip(points, analysis.lengths, analysis.loss, analysis.fresh, strict=True):
        parts.append(marker(x, y, "winner", f"{length:,} tokens: {nats:.3f} nats, anew {anew:.3f}", 4))
    return svg(frame.width, frame.height, "loss that length costs, by place in the text", "".join(parts))


def _steps_chart(analysis: Analysis) -> str:
    rows, lengths = analysis.steps[1:] or analysis.steps, analysis.lengths[1:] or analysis.lengths
    values = [value for row in rows for value in row]
    frame = Frame(
        x_low=-0.5, x_high=analysis.layers - 0.5, y_low=min(0.9, *values) - 0.02, y_high=max(1.1, *values) + 0.02
    )
    every = max(1, analysis.layers // 12)
    parts = [frame.y_axis("mean step, relative", False)]
    parts.append(frame.x_axis("layer", [(float(one), str(one)) for one in range(0, analysis.layers, every)]))
    parts.append(line(frame.left, frame.y(1.0), frame.width - frame.right, frame.y(1.0), "trained"))
    for place, row in enumerate(rows):
        for layer, value in enumerate(row):
            at = frame.x(layer + (place - (len(rows) - 1) / 2) * 0.12)
            hint = f"layer {layer}, up to {tokens(lengths[place])}: {value:.3f}"
            parts.append(marker(at, frame.y(value), "winner" if place == len(rows) - 1 else "other", hint, 3))
    return svg(frame.width, frame.height, "mean step by layer beyond the training length", "".join(parts))


# ---- attention


def _attention(analysis: Analysis) -> str:
    if not analysis.maps:
        return ""
    figures = "".join(
        _figure(f"Layer {layer}", "", _map(cells, analysis.longest, f"hidden attention of layer {layer}"))
        for layer, cells in analysis.maps.items()
    )
    note = (
        f"Where the hidden attention of some channels lies in a text of {analysis.longest:,} tokens: each row is a "
        "place in the text, each column what it looks back at; rows add up to one, colours are logarithmic from 0.1 % "
        "to all."
    )
    return f"<h2>Hidden attention</h2><p class='soft'>{note}</p><div class='charts small'>{figures}</div>"


def _map(cells: Sequence[Sequence[float]], longest: int, label: str) -> str:
    left, top, size = 40.0, 6.0, 230.0
    step = size / len(cells)
    parts = []
    for i, row in enumerate(cells):
        for j, share in enumerate(row[: i + 1]):
            fill, _ = heat_color(1 + math.log10(max(share, 1e-3)) / 3)
            parts.append(rect(left + j * step, top + i * step, step + 0.3, step + 0.3, "", f"fill:{fill}"))
    for share in (0.0, 0.5, 1.0):
        parts.append(text(left + size * share, top + size + 15, tokens(longest * share), "tick"))
        parts.append(
            text(left - 5, top + size * share + 4 + (4 if share == 0 else 0), tokens(longest * share), "tick", "end")
        )
    return svg(left + size + 18, top + size + 22, label, "".join(parts))


# ---- spaces


def _spaces(suggestions: Mapping[str, Suggestion], target: int) -> str:
    parts = [
        "<h2>Where to search</h2>",
        f"<p>For prompts of up to {target:,} tokens. <code>space: auto</code> in a study narrows its search spaces in "
        "this way for the study's own lengths; what is not listed keeps the shipped range.</p>",
    ]
    for method, one in suggestions.items():
        if not one.params:
            continue
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td class='left'>{escape(entry_text(entry))}</td>"
            f"<td class='wrap'>{escape(str(entry.get('why', '')) if isinstance(entry, Mapping) else '')}</td></tr>"
            for name, entry in one.params.items()
        )
        first = "".join(f"<p class='soft'>first: <code>{escape(setting(point))}</code></p>" for point in one.enqueue)
        table = f"<table><tr><th>parameter</th><th class='left'>range</th><th class='left'>why</th></tr>{rows}</table>"
        parts.append(f"<h3>{escape(method)}</h3><div class='scroll'>{table}</div>{first}")
    return "".join(parts)


def entry_text(entry: Any) -> str:
    """A range in few words."""
    if not isinstance(entry, Mapping):
        return str(entry)
    if "choices" in entry:
        return ", ".join(str(one) for one in entry["choices"])
    return f"{entry['low']:,} to {entry['high']:,}" + (", log" if entry.get("log") else "")


def setting(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in point.items())


def _origin(analysis: Analysis) -> str:
    items = {
        "weights": analysis.digest[:16],
        "text": f"{analysis.texts} stretches of {analysis.text}, {analysis.longest:,} tokens each",
        "lengths": ", ".join(f"{one:,}" for one in analysis.lengths),
        "command": f"statespan analyze {analysis.model}",
    }
    rows = "".join(
        f"<tr><td>{name}</td><td class='left wrap'>{escape(value)}</td></tr>" for name, value in items.items()
    )
    return f"<h2>Where it comes from</h2><div class='scroll'><table>{rows}</table></div>"
