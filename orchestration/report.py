"""The report of a study: one self-contained HTML page, the same as Markdown, and one CSV line a trial.

Everything is aggregated before it is drawn (report_facts.py), so that the page stays small for thousands of trials. It
makes no request, runs no script, and opens with the verdict in one sentence.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from statespan.orchestration import report_breakdown as breakdown
from statespan.orchestration import report_search as search
from statespan.orchestration import report_sections as sections
from statespan.orchestration.report_charts import short
from statespan.orchestration.report_facts import Facts, Row, gather
from statespan.orchestration.study_data import StudyData
from statespan.orchestration.verdict import Verdict, amount, label, p_text

SECTIONS = (
    sections.verdict,
    sections.tiles,
    sections.picture,
    breakdown.section,
    sections.best,
    search.front,
    search.history,
    search.effects,
    search.cost,
    sections.examples,
    sections.serving,
    sections.method_notes,
    sections.provenance,
)


@dataclass(frozen=True, slots=True)
class Report:
    verdict: Verdict
    html: str
    markdown: str
    csv: str

    def write(self, folder: Path) -> tuple[Path, Path, Path]:
        """report.html, report.md and trials.csv in a folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "report.html", folder / "report.md", folder / "trials.csv"
        for path, content in zip(paths, (self.html, self.markdown, self.csv), strict=True):
            path.write_text(content, encoding="utf-8")
        return paths


def build_report(study: StudyData) -> Report:
    facts = gather(study)
    return Report(facts.verdict, to_html(facts), to_markdown(facts), to_csv(facts))


def to_html(facts: Facts) -> str:
    template = Template(resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8"))
    body = "\n".join(part for part in (make(facts) for make in SECTIONS) if part)
    return template.substitute(title=escape(f"{facts.study.name} · statespan"), body=body)


def to_markdown(facts: Facts) -> str:
    """The verdict, quality by length, the best configurations, the cost and where it all comes from."""
    study = facts.study
    parts = [f"# {study.name}", f"**{facts.verdict.sentence}**", *(f"- {one}" for one in facts.verdict.caveats)]
    for name in dict.fromkeys(curve.benchmark for curve in facts.curves):
        parts += [f"## {name} by prompt length", _length_table(facts, name)]
    parts += [f"_{breakdown.note(facts)}_"] if facts.breakdowns else []
    for title, columns, body in breakdown.tables(facts):
        parts += [f"## {title}", _markdown_table(columns, body)]
    head = ["configuration", "settings", "search", "held-out", "interval", "gain", "p", "time", "memory"]
    parts += ["## Best configurations", _markdown_table(head, [_best_cells(facts, row) for row in facts.top()])]
    spent = facts.cost
    parts += ["## Cost", f"computed {spent.computed:,.0f} prompt tokens, shared {spent.shared:,.0f}, known from before"]
    parts[-1] += f" {spent.cached:,.0f}, spared by racing {spent.raced:,.0f}."
    if study.serve_command and facts.verdict.candidate_id:
        parts += ["## Serve it", f"    {study.serve_command}"]
    parts += ["## Where it comes from", *(f"- {name}: {value}" for name, value in _origins(study))]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


def _length_table(facts: Facts, benchmark: str) -> str:
    shown = [curve for curve in facts.curves if curve.benchmark == benchmark]
    lengths = sorted({length for curve in shown for length, _ in curve.points})
    head = ["length", *(sections.who(curve.role, curve.trial) for curve in shown)]
    body = []
    for length in lengths:
        points = [dict(curve.points).get(length) for curve in shown]
        past = study_past(facts.study, length)
        cells = [f"{short(p.mean)} ({short(p.low)} to {short(p.high)})" if p else "–" for p in points]
        body.append([f"{length:,}{past}", *cells])
    return _markdown_table(head, body)


def study_past(study: StudyData, length: int) -> str:
    """A mark for lengths past the training length."""
    return " (past training)" if study.train_length is not None and length > study.train_length else ""


def _best_cells(facts: Facts, row: Row) -> list[str]:
    name = "vanilla" if row.role == "baseline" else label(row.trial) + (f", {row.role}" if row.role else "")
    gain = row.gain.gain.mean if row.gain else math.nan
    return [
        name,
        sections.setting(row.trial),
        sections.score(facts, row.search),
        sections.score(facts, row.heldout.mean if row.heldout else math.nan),
        sections.span(facts, row.heldout),
        amount(facts.study, gain, signed=True),
        p_text(row.search_p),
        sections.seconds(row.seconds),
        sections.size(row.peak_bytes),
    ]


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _origins(study: StudyData) -> list[tuple[str, str]]:
    return [
        (name, str(value)) for values in (study.model, study.provenance, study.links) for name, value in values.items()
    ]


def to_csv(facts: Facts) -> str:
    """One line a trial; empty where nothing was measured."""
    out = io.StringIO()
    lines = [_csv_row(row) for row in facts.rows]
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: "" if _missing(value) else value for name, value in line.items()})
    return out.getvalue()


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _csv_row(row: Row) -> dict[str, object]:
    held, gain = row.heldout, row.gain
    return {
        "trial_id": row.trial.id,
        "number": row.trial.number,
        "method": row.trial.method,
        "state": row.trial.state,
        "role": row.role,
        "published": row.trial.published,
        "params": json.dumps(dict(row.trial.params), sort_keys=True),
        "search": row.search,
        "search_error": row.search_error,
        "search_samples": row.search_samples,
        "search_p": row.search_p,
        "heldout": held.mean if held else None,
        "heldout_low": held.low if held else None,
        "heldout_high": held.high if held else None,
        "gain": gain.gain.mean if gain else None,
        "gain_low": gain.gain.low if gain else None,
        "gain_high": gain.gain.high if gain else None,
        "gain_p": gain.p if gain else None,
        "seconds_per_sample": row.seconds,
        "peak_bytes": row.peak_bytes,
        "failed_samples": row.failed,
        "rungs": len(row.trial.rungs),
        "message": row.trial.message,
    }
