"""The sections of the HTML report on the verdict, each a function from Facts to a piece of page; empty for nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from statespan.orchestration import report_charts as charts
from statespan.orchestration.paired import facts_by_name
from statespan.orchestration.report_charts import marker, short
from statespan.orchestration.report_facts import Curve, Facts, Row
from statespan.orchestration.study_data import TrialData
from statespan.orchestration.verdict import amount, is_percent, label, metric, p_text
from statespan.stats import Interval

Cell = tuple[str, str]
"""(class, inner HTML) of a table cell."""

LEFT = ("settings", "why", "vanilla says", "winner says", "best trial says", "state")
"""Columns of words."""


def score(facts: Facts, value: float) -> str:
    """A quality for people: percent where it is a share. A dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:.1f}%" if is_percent(facts.study) else short(value) + metric(facts.study)


def span(facts: Facts, interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.low):
        return "–"
    scale = 100 if is_percent(facts.study) else 1
    return f"{short(scale * interval.low)} to {short(scale * interval.high)}"


def seconds(value: float) -> str:
    return "–" if math.isnan(value) else f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def size(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value / 2**20:.0f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"


def setting(trial: TrialData) -> str:
    """Parameters in one line."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in trial.params.items()) or "no parameters"


def setting_html(trial: TrialData) -> str:
    """The same, broken between short parameters only."""
    words = [f"{name} {value_text(value)}" for name, value in trial.params.items()]
    return ", ".join(f"<span>{escape(w)}</span>" if len(w) < 34 else escape(w) for w in words) or "no parameters"


def value_text(value: Any) -> str:
    return short(value) if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def table(head: Sequence[str], body: Iterable[tuple[str, Sequence[str | Cell]]]) -> str:
    """Rows are (class, cells); a cell is HTML, or (class, HTML)."""
    parts = ["<tr>" + "".join(f'<th class="{"left" if name in LEFT else ""}">{name}</th>' for name in head) + "</tr>"]
    for kind, cells in body:
        inner = "".join(f'<td class="{c[0]}">{c[1]}</td>' if isinstance(c, tuple) else f"<td>{c}</td>" for c in cells)
        parts.append(f'<tr class="{kind}">{inner}</tr>')
    return f'<div class="scroll"><table>{"".join(parts)}</table></div>'


def figure(title: str, note: str, inner: str) -> str:
    return f"<figure><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>{inner}</figure>"


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def note(words: str) -> str:
    return f'<p class="soft">{escape(words)}</p>'


def verdict(facts: Facts) -> str:
    said = facts.verdict
    caveats = "".join(f"<li>{escape(one)}</li>" for one in said.caveats)
    kind, head = ("beats", "✓ A method wins") if said.beats_baseline else ("", "= Nothing beats vanilla")
    head = "… No verdict yet" if said.overall is None else head
    model = facts.study.model.get("name", "")
    title = f"<h1>{escape(facts.study.name)}</h1>" + note(f"context extension for {model}" if model else "")
    box = f'<div class="verdict {kind}"><strong>{head}</strong><p>{escape(said.sentence)}</p>'
    return title + box + (f'<ul class="caveats">{caveats}</ul>' if caveats else "") + "</div>"


def tiles(facts: Facts) -> str:
    said, study = facts.verdict, facts.study
    if said.overall is None:
        return ""
    shown = [("gain on vanilla, held-out, all lengths", amount(study, said.overall.gain.mean, signed=True))]
    if said.past is not None:
        words = f"gain past the {study.train_length:,} tokens of training"
        shown.append((words, amount(study, said.past.gain.mean, signed=True)))
    if said.within is not None:
        words = f"change up to there: {said.within_status}"
        shown.append((words, amount(study, said.within.gain.mean, signed=True)))
    if said.runner_up is not None:
        words = f"ahead of the runner-up, corrected p {p_text(said.runner_up.p_corrected)}"
        shown.append((words, amount(study, said.runner_up.gain.mean, signed=True)))
    if said.gap is not None:
        words = f"search score above the held-out one: what choosing flattered ({span(facts, said.gap)})"
        shown.append((words, amount(study, said.gap.mean, signed=True)))
    shown.append(("trials tried", f"{said.trials_tried:,}"))
    inner = "".join(f'<div class="tile"><b>{value}</b><span>{escape(words)}</span></div>' for words, value in shown)
    return f'<div class="tiles">{inner}</div>'


def picture(facts: Facts) -> str:
    """Per benchmark: a heatmap a trial side by side, then the curves and their figures."""
    parts = []
    for name in dict.fromkeys(curve.benchmark for curve in facts.curves):
        shown = [curve for curve in facts.curves if curve.benchmark == name]
        parts.append(_benchmark(facts, name, shown))
    split = "held-out" if facts.curves_split == "heldout" else "search"
    words = f"On {split} samples. Each cell shows its mean." + _all_past(facts)
    return section("Quality by prompt length and depth", note(words), *parts)


def _all_past(facts: Facts) -> str:
    """Says so where no length lies on this side of the training length, for then no line can show it."""
    trained = facts.study.train_length
    lengths = [length for curve in facts.curves for length, _ in curve.points]
    if trained is None or not lengths or min(lengths) <= trained:
        return ""
    return f" All lengths lie past the {trained:,} tokens of training."


def _benchmark(facts: Facts, name: str, shown: Sequence[Curve]) -> str:
    known = facts_by_name(facts.study).get(name)
    percent = known is not None and (known.low, known.high) == (0.0, 1.0)
    means = [cell.mean for curve in shown for cell in curve.cells]
    low, high = (0.0, 1.0) if percent else (min(means, default=0.0), max(means, default=1.0))
    heatmaps = [
        figure(
            who(curve.role, curve.trial),
            setting(curve.trial) if curve.trial.params else "the model as it is",
            charts.heatmap(
                curve.cells, facts.study.train_length, low, high, percent, f"{name}, {curve.role}, by length and depth"
            ),
        )
        for curve in shown
        if curve.cells
    ]
    heading = known.metric if known else "score"
    chart = charts.curves(shown, facts.study.train_length, heading, percent)
    lines = figure(f"{name}: {heading} by length", "95% intervals, clustered by document", key(shown) + chart)
    unit = ", percent" if percent else ""
    scale = f"Dark is low, yellow is high{unit}. Depth: where in the prompt the answer lies." if heatmaps else ""
    maps = f'<div class="charts">{"".join(heatmaps)}</div>' + (note(scale) if scale else "")
    return f'<h3>{escape(name)}</h3>{maps}<div class="charts">{lines}{_by_length(shown, percent)}</div>'


def who(role: str, trial: TrialData) -> str:
    if role == "baseline":
        return "Vanilla"
    return f"{role.capitalize()}: {label(trial)}" if role else label(trial)


def key(shown: Sequence[Curve]) -> str:
    def sample(role: str) -> str:
        return f'<svg viewBox="0 0 34 12"><path d="M1 6H33" class="l {role}"/>{marker(17, 6, role, size=4)}</svg>'

    inner = "".join(f"<li>{sample(curve.role)}{escape(who(curve.role, curve.trial))}</li>" for curve in shown)
    return f'<ul class="key">{inner}</ul>'


def _by_length(shown: Sequence[Curve], percent: bool) -> str:
    lengths = sorted({length for curve in shown for length, _ in curve.points})
    scale = 100 if percent else 1
    body = []
    for length in lengths:
        points = [dict(curve.points).get(length) for curve in shown]
        samples = max((point.samples for point in points if point), default=0)
        cells = [
            f"{short(scale * p.mean)}<small>{short(scale * p.low)} to {short(scale * p.high)}</small>" if p else "–"
            for p in points
        ]
        body.append(("", [f"{length:,}<small>{samples} samples</small>", *cells]))
    head = ["length", *("vanilla" if curve.role == "baseline" else curve.role for curve in shown)]
    return f"<div>{table(head, body)}</div>"


def best(facts: Facts) -> str:
    """The table of configurations."""
    head = ["configuration", "search", "held-out", "gain on vanilla", "corrected p", "p, search", "time", "memory"]
    head.append("settings")
    note_text = (
        "Held-out samples are scored for vanilla and the chosen two only; the others were never compared on them. "
        "“p, search” is corrected for all trials (Romano and Wolf). Time is the mean a sample, memory the peak."
    )
    body = [(row.role, _cells(facts, row)) for row in facts.top()]
    return section("Best configurations", table(head, body), note(note_text))


def _cells(facts: Facts, row: Row) -> list[str | Cell]:
    tag = f'<span class="tag">{row.role}</span>' if row.role and row.role != "baseline" else ""
    tag += '<span class="tag">published</span>' if row.trial.published else ""
    name = "vanilla" if row.role == "baseline" else escape(label(row.trial))
    corrected = _corrected(facts, row)
    gain = row.gain
    return [
        ("left", name + tag + (f"<small>{row.failed} samples failed</small>" if row.failed else "")),
        f"{score(facts, row.search)}<small>{row.search_samples} samples</small>",
        f"{score(facts, row.heldout.mean)}<small>{span(facts, row.heldout)}</small>" if row.heldout else "–",
        f"{amount(facts.study, gain.gain.mean, signed=True)}<small>{span(facts, gain.gain)}</small>" if gain else "–",
        p_text(corrected),
        p_text(row.search_p),
        seconds(row.seconds),
        size(row.peak_bytes),
        ("wrap", setting_html(row.trial)),
    ]


def _corrected(facts: Facts, row: Row) -> float:
    """Of the declared comparison with the baseline; other trials have none."""
    chosen = row.role in ("winner", "candidate") and facts.verdict.overall is not None
    return facts.verdict.overall.p_corrected if chosen and facts.verdict.overall else math.nan


def examples(facts: Facts) -> str:
    body: list[tuple[str, Sequence[str | Cell]]] = [
        (
            "",
            [
                ("wrap", escape(one.sample)),
                f"{one.length:,}",
                "–" if math.isnan(one.depth) else charts.depth_name(one.depth),
                ("wrap", _answer(one.baseline_score, one.baseline_text)),
                ("wrap", _answer(one.winner_score, one.winner_text)),
            ],
        )
        for one in facts.examples
    ]
    chosen = "winner says" if facts.verdict.beats_baseline else "best trial says"
    return (
        section("Samples where they differ", table(["sample", "length", "depth", "vanilla says", chosen], body))
        if body
        else ""
    )


def _answer(value: float, words: str) -> str:
    said = f"<code>{escape(words)}</code>" if words else "<i>no text</i>"
    return f"{said}<small>score {short(value)}</small>"


def serving(facts: Facts) -> str:
    command = facts.study.serve_command
    return section("Serve it", f"<pre>{escape(command)}</pre>") if command and facts.verdict.candidate_id else ""


def method_notes(facts: Facts) -> str:
    study = facts.study
    words = (
        "Configurations were chosen on search samples alone; the verdict rests on held-out samples of other documents. "
        f"Intervals of gains are {1 - study.alpha:.0%}, by bootstrap over documents. p is a two-sided sign-flip test "
        "by document; the comparisons declared beforehand (vanilla at all lengths, vanilla past the training length, "
        "the runner-up) are corrected by Holm. A failed sample counts as the worst score. "
        f"“Not worse” means that the lower end of a one-sided interval lies above −{amount(study, study.margin)}."
    )
    return section("How these figures were made", f"<p>{escape(words)}</p>")


def provenance(facts: Facts) -> str:
    study = facts.study
    shown = {"model": study.model, "where from": study.provenance, "also in": study.links}
    blocks = "".join(f"<h3>{name}</h3>{_facts_table(values)}" for name, values in shown.items() if values)
    settings = escape(json.dumps(study.settings, indent=2, default=str, ensure_ascii=False))
    return section(
        "Where it comes from",
        blocks,
        f"<details><summary>The study's settings</summary><pre>{settings}</pre></details>",
    )


def _facts_table(values: Mapping[str, Any]) -> str:
    words = {name: _plainly(said) for name, said in values.items()}
    return table(["", ""], [("", [("left", escape(name)), ("wrap", escape(said))]) for name, said in words.items()])


def _plainly(said: Any) -> str:
    """A flat mapping as `torch 2.13.0, ray 2.60.0`; what is deeper as JSON."""
    if isinstance(said, Mapping) and not any(isinstance(one, Mapping | list | tuple) for one in said.values()):
        return ", ".join(f"{name} {value}" for name, value in said.items())
    return said if isinstance(said, str) else json.dumps(said, default=str)
