"""The report's tables of what benchmarks say of their own samples (breakdown.py), for the page and its Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from statespan.orchestration import report_sections as page
from statespan.orchestration.breakdown import Breakdown
from statespan.orchestration.paired import facts_by_name
from statespan.orchestration.report_charts import short
from statespan.orchestration.report_facts import Facts
from statespan.stats import Interval

Words = tuple[str, list[str], list[list[str]]]
"""Title, head and rows of a table."""


def tables(facts: Facts) -> Iterator[Words]:
    """For every benchmark one table a trial of its cells, then one of all trials' figures."""
    for name in dict.fromkeys(one.benchmark for one in facts.breakdowns):
        shown = [one for one in facts.breakdowns if one.benchmark == name]
        known = facts_by_name(facts.study).get(name)
        scale = 100 if known and (known.low, known.high) == (0.0, 1.0) else 1
        yield from (_cells(name, one, scale) for one in shown if one.cells)
        keys = dict.fromkeys(key for one in shown for key in one.figures)
        if keys:
            body = [[key, *(_number(one.figures.get(key)) for one in shown)] for key in keys]
            yield f"{name}: its own figures", ["", *(page.who(one.role, one.trial) for one in shown)], body


def _cells(name: str, one: Breakdown, scale: int) -> Words:
    columns = _in_order(column for _, column in one.cells)
    head = [one.by[0], *(f"{column:,}" if isinstance(column, int) else str(column) for column in columns)]
    body = [
        [str(row), *(_cell(one.cells.get((row, column)), scale) for column in columns)]
        for row in dict.fromkeys(row for row, _ in one.cells)
    ]
    return f"{name}: {page.who(one.role, one.trial)}{', percent' if scale == 100 else ''}", head, body


def _in_order(columns: Iterable[Any]) -> list[Any]:
    found = list(dict.fromkeys(columns))
    return sorted(found) if all(isinstance(one, int) for one in found) else sorted(found, key=str)


def _cell(interval: Interval | None, scale: int) -> str:
    if interval is None:
        return "–"
    low, high = short(scale * interval.low), short(scale * interval.high)
    return f"{short(scale * interval.mean)} ({low} to {high}; {interval.samples})"


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else short(value)


def note(facts: Facts) -> str:
    split = "held-out" if facts.curves_split == "heldout" else "search"
    return f"On {split} samples. In brackets: the 95% interval, and how many samples; few samples say little."


def section(facts: Facts) -> str:
    """Empty where no benchmark has columns or figures of its own."""
    figures = [page.figure(title, "", _table(head, body)) for title, head, body in tables(facts)]
    inner = f'<div class="charts">{"".join(figures)}</div>'
    return page.section("As the benchmarks report it", page.note(note(facts)), inner) if figures else ""


def _table(head: list[str], body: list[list[str]]) -> str:
    rows: list[tuple[str, list[str | page.Cell]]] = [
        ("", [("left", escape(first)), *(escape(one) for one in rest)]) for first, *rest in body
    ]
    return page.table([escape(one) for one in head], rows)
