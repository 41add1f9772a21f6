"""The sections of the HTML report on the search: what was traded, tried, stopped, learnt and spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from statespan.orchestration import report_charts as charts
from statespan.orchestration.report_charts import Frame, marker, short
from statespan.orchestration.report_facts import Facts, Row
from statespan.orchestration.report_sections import (
    Cell,
    figure,
    note,
    score,
    section,
    setting_html,
    table,
    value_text,
    who,
)
from statespan.orchestration.study_data import TrialData
from statespan.orchestration.verdict import is_percent, label, p_text

STOPS_SHOWN = 40


def front(facts: Facts) -> str:
    """Quality against seconds and against memory; the front's trials with intervals."""
    done = [row for row in facts.rows if row.trial.state == "complete" and not math.isnan(row.search)]
    measures: list[tuple[str, Callable[[Row], float]]] = [
        ("seconds a sample", lambda row: row.seconds),
        ("peak memory, MiB", lambda row: row.peak_bytes / 2**20),
    ]
    drawn = [
        figure(f"Quality against {name}", "up and to the left is better", _trade(facts, done, name, of))
        for name, of in measures
        if any(of(row) > 0 for row in done)
    ]
    if not drawn:
        return ""
    names = ", ".join(who(row.role, row.trial) for row in facts.rows if row.trial.id in facts.front)
    words = f"Filled, with 95% intervals: trials that no other beats in all three ({names}). Search samples."
    return section("Quality, time and memory", f'<div class="charts">{"".join(drawn)}</div>', note(words))


def _trade(facts: Facts, done: Sequence[Row], name: str, of: Callable[[Row], float]) -> str:
    measured = [row for row in done if of(row) > 0]
    low_x, high_x = min(map(of, measured)), max(map(of, measured))
    ends = [row.search for row in measured]
    ends += [end for interval in facts.front_intervals.values() for end in (interval.low, interval.high)]
    percent = is_percent(facts.study)
    low, high = charts.padded(ends, percent)
    log = high_x / low_x > 5
    room = (high_x - low_x) * 0.05 or low_x * 0.1
    frame = Frame(x_low=low_x * 0.93 if log else low_x - room, x_high=high_x + room, y_low=low, y_high=high, x_log=log)
    plain = [row for row in measured if row.trial.id not in facts.front and not row.role]
    parts = [frame.y_axis("quality", percent), frame.x_axis(name)]
    crowd = "plain many" if len(plain) > charts.MANY else "plain"
    parts.append(charts.dots([(of(row), row.search) for row in plain], frame, crowd))
    labelled: list[tuple[float, float]] = []
    for row in sorted((row for row in measured if row not in plain), key=_importance):
        x, y, interval = frame.x(of(row)), frame.y(row.search), facts.front_intervals.get(row.trial.id)
        if interval is not None and not math.isnan(interval.low):
            parts.append(charts.line(x, frame.y(interval.low), x, frame.y(interval.high), f"bar {row.role}"))
        parts.append(marker(x, y, row.role, f"{label(row.trial)}: {score(facts, row.search)}, {short(of(row))} {name}"))
        if all(abs(x - a) > 40 or abs(y - b) > 14 for a, b in labelled):  # names on top of each other say nothing
            labelled.append((x, y))
            words = "vanilla" if row.role == "baseline" else f"{row.trial.number}"
            parts.append(charts.text(x + 8, y - 6, words, "mark", "start"))
    return charts.svg(frame.width, frame.height, f"quality against {name}", "".join(parts))


def _importance(row: Row) -> int:
    """Whose label goes first where there is room for one."""
    order = ("winner", "candidate", "baseline", "runner-up", "")
    return order.index(row.role)


def history(facts: Facts) -> str:
    """Search score by trial, and what became of the trials at each rung."""
    rows = [row for row in facts.rows if row.role != "baseline"]
    known = [row for row in rows if not math.isnan(row.search)]
    if not known:
        return ""
    chart = figure(
        "Search score by trial", "line: best complete trial so far; crosses: stopped early", _timeline(facts, known)
    )
    return section("The search", f'<div class="charts">{chart}{_survival(rows)}</div>', _stops(rows))


def _timeline(facts: Facts, known: Sequence[Row]) -> str:
    percent = is_percent(facts.study)
    base = next((row.search for row in facts.rows if row.role == "baseline"), math.nan)
    low, high = charts.padded([base, *(row.search for row in known)], percent)
    frame = Frame(x_low=-0.5, x_high=max(row.trial.number for row in known) + 0.5, y_low=low, y_high=high)
    parts = [frame.y_axis("quality on search samples", percent), frame.x_axis("trial")]
    if not math.isnan(base):
        y = frame.y(base)
        parts.append(f'<path d="M{frame.left} {y:.1f}H{frame.width - frame.right}" class="l baseline"/>')
        parts.append(charts.text(frame.left + 4, y + 14, "vanilla", "tick", "start"))
    few = len(known) <= charts.MANY
    for kind, complete in (("other", True), ("pruned", False)):
        group = [row for row in known if (row.trial.state == "complete") == complete]
        if few:
            parts += [_history_mark(facts, frame, row, kind) for row in group]
        else:
            parts.append(charts.dots([(row.trial.number, row.search) for row in group], frame, f"{kind} many"))
    parts.insert(len(parts) if not few else 2, _record(frame, known))
    return charts.svg(frame.width, frame.height, "search score by trial", "".join(parts))


def _record(frame: Frame, known: Sequence[Row]) -> str:
    """The best complete trial so far, as steps."""
    path, record = "", -math.inf
    for row in known:
        if row.trial.state == "complete" and row.search > record:
            record = row.search
            x, y = f"{frame.x(row.trial.number):.1f}", f"{frame.y(record):.1f}"
            path += f"H{x}V{y}" if path else f"M{x} {y}"
    return f'<path d="{path}H{frame.width - frame.right}" class="l best"/>' if path else ""


def _history_mark(facts: Facts, frame: Frame, row: Row, kind: str) -> str:
    role = row.role if row.role in ("winner", "candidate", "runner-up") else kind
    hint = f"{label(row.trial)}: {score(facts, row.search)}, {row.trial.state}"
    return marker(frame.x(row.trial.number), frame.y(row.search), role, hint, size=5 if row.role else 3.5)


def _survival(rows: Sequence[Row]) -> str:
    """How many trials reached each rung, and how the rest ended."""
    rungs = max((len(row.trial.rungs) for row in rows), default=0)
    if not rungs:
        return ""
    reached = [sum(len(row.trial.rungs) > rung for row in rows) for rung in range(rungs)]
    samples = [
        max(row.trial.rungs[rung].samples for row in rows if len(row.trial.rungs) > rung) for rung in range(rungs)
    ]
    items = [
        (f"rung {rung + 1}: {samples[rung]} samples", count / len(rows), f"{count:,}")
        for rung, count in enumerate(reached)
    ]
    states = {
        state: sum(row.trial.state == state for row in rows)
        for state in ("complete", "pruned", "oom", "failed", "running")
    }
    names = {"pruned": "stopped early", "oom": "out of memory", "running": "still running"}
    ended = ", ".join(f"{count:,} {names.get(state, state)}" for state, count in states.items() if count)
    return figure("Trials that reached each rung", ended, charts.bars(items, "trials by rung"))


def _stops(rows: Sequence[Row]) -> str:
    ended = [row for row in rows if row.trial.state in ("pruned", "oom", "failed")]
    if not ended:
        return ""
    body: list[tuple[str, Sequence[str | Cell]]] = [
        (
            "",
            [
                ("left", escape(label(row.trial))),
                row.trial.state,
                ("wrap", escape(_why(row.trial))),
                ("wrap", setting_html(row.trial)),
            ],
        )
        for row in ended[:STOPS_SHOWN]
    ]
    more = note(f"and {len(ended) - STOPS_SHOWN:,} more in the CSV") if len(ended) > STOPS_SHOWN else ""
    inner = table(["trial", "state", "why", "settings"], body)
    return f"<details><summary>Why trials ended early ({len(ended):,})</summary>{inner}{more}</details>"


def _why(trial: TrialData) -> str:
    last = trial.rungs[-1] if trial.rungs else None
    p = (
        f" (corrected p {p_text(last.p)})"
        if last is not None and last.decision == "stop" and last.p is not None
        else ""
    )
    return (trial.message or (last.reason if last else "")) + p


def effects(facts: Facts) -> str:
    """Importance and slices of the parameters, one block a method."""
    methods = dict.fromkeys(row.trial.method for row in facts.rows if row.trial.params)
    blocks = [_method(facts, method) for method in methods]
    words = (
        "A dot is a trial: its search score against one of its settings. Small dots: stopped early, on fewer samples."
    )
    return section("What the settings do", note(words), *blocks) if any(blocks) else ""


def _method(facts: Facts, method: str) -> str:
    rows = [row for row in facts.rows if row.trial.method == method and not math.isnan(row.search)]
    names = list(dict.fromkeys(name for row in rows for name in row.trial.params))
    varied = [name for name in names if len({value_text(row.trial.params.get(name)) for row in rows}) > 1]
    drawn = [figure(name, "", _slice(facts, rows, name)) for name in varied]
    shares = [one for one in facts.study.importance if one.method == method and one.shares]
    for one in shares:
        items = [(name, share, f"{share:.0%}") for name, share in sorted(one.shares.items(), key=lambda i: -i[1])]
        drawn.insert(
            0,
            figure(f"Importance ({one.evaluator})", "share of the spread in quality", charts.bars(items, "importance")),
        )
    return f'<h3>{escape(method)}</h3><div class="charts small">{"".join(drawn)}</div>' if drawn else ""


def _slice(facts: Facts, rows: Sequence[Row], name: str) -> str:
    rows = [row for row in rows if name in row.trial.params]
    values = [row.trial.params[name] for row in rows]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    levels = [] if numeric else sorted({value_text(value) for value in values})
    xs = [float(value) for value in values] if numeric else [float(levels.index(value_text(value))) for value in values]
    percent = is_percent(facts.study)
    low, high = charts.padded([row.search for row in rows], percent)
    log = numeric and min(xs) > 0 and max(xs) / min(xs) > 8
    room = 0.6 if not numeric else 0.0 if log else (max(xs) - min(xs)) * 0.04
    ends = (min(xs) * 0.9, max(xs) * 1.1) if log else (min(xs) - room, max(xs) + room)
    frame = Frame(height=200, x_low=ends[0], x_high=ends[1], y_low=low, y_high=high, x_log=log, bottom=40)
    places = None if numeric else [(float(index), level) for index, level in enumerate(levels)]
    if numeric and all(isinstance(value, int) for value in values) and not log:
        places = [(tick, short(tick)) for tick in charts.ticks(*ends) if tick == int(tick)]
    parts = [frame.y_axis("quality", percent), frame.x_axis(name + (" (log)" if log else ""), places)]
    for kind, complete in (("pruned", False), ("", True)):
        points = [
            (x, row.search) for x, row in zip(xs, rows, strict=True) if (row.trial.state == "complete") == complete
        ]
        parts.append(charts.dots(points, frame, f"{kind} many" if len(points) > charts.MANY else kind))
    return charts.svg(frame.width, frame.height, f"quality by {name}", "".join(parts))


def cost(facts: Facts) -> str:
    """What was read, and what did not have to be."""
    spent = facts.cost
    if spent.naive <= 0:
        return ""
    parts = [
        ("computed", spent.computed),
        ("shared between trials", spent.shared),
        ("known from before", spent.cached),
        ("spared by racing", spent.raced),
    ]
    items = [(name, value / spent.naive, f"{_millions(value)}, {value / spent.naive:.0%}") for name, value in parts]
    times = f"{spent.naive / spent.computed:.1f} times what was computed" if spent.computed else "nothing was computed"
    words = f"Every trial by itself, to the end, would have read {_millions(spent.naive)} tokens: {times}."
    return section("What it cost", note(words), charts.bars([(n, s * 0.8, w) for n, s, w in items], "tokens by source"))


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,.0f}"
