"""Scores as their benchmark reports them, for the baseline and the chosen trials: by its own columns (RULER's tasks,
LongBench's data sets), and its own figures (effective length, perplexity, mean of buckets)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from statespan import stats
from statespan.benchmarks.base import Benchmark, Sample
from statespan.benchmarks.table import build_benchmark
from statespan.config import Task
from statespan.orchestration.files import read_table
from statespan.orchestration.paired import Codes, Samples, Split, facts_by_name
from statespan.orchestration.study_data import StudyData, TrialData
from statespan.stats import Interval

if TYPE_CHECKING:
    from statespan.orchestration.report_facts import Row

ALL = "score"
"""The one column of a benchmark that has no second one."""


@dataclass(frozen=True, slots=True)
class Questions:
    """A task's benchmark, and its samples by id, without their prompts."""

    benchmark: Benchmark
    samples: Mapping[str, Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """One trial on one benchmark."""

    trial: TrialData
    role: str
    benchmark: str
    by: tuple[str, str]
    """What rows and columns are; empty names where the benchmark has no columns of its own."""

    cells: Mapping[tuple[Any, Any], Interval]
    figures: Mapping[str, float]
    """The benchmark's own, without those that repeat a cell."""


def with_questions(data: StudyData, folder: Path) -> StudyData:
    """The study with what its benchmarks know of its samples, for its report."""
    table = read_table(folder / "samples.parquet")
    if table is None:
        return data
    names = ("task", "id", "kind", "document", "length", "depth", "meta")
    found: dict[str, dict[str, Sample]] = {}
    for row in table.select(names).to_pylist():
        task, meta = row.pop("task"), json.loads(row.pop("meta"))
        found.setdefault(task, {})[row["id"]] = Sample(**row, prompt_ids=(), meta=meta)
    asked = {name: Task.model_validate(one) for name, one in data.settings["benchmarks"].items()}
    return replace(
        data,
        questions={
            name: Questions(build_benchmark(task.benchmark or name, task.settings), found[name])
            for name, task in asked.items()
            if name in found
        },
    )


def breakdowns(study: StudyData, samples: Samples, shown: Sequence[Row], split: Split) -> Iterator[Breakdown]:
    """Of every benchmark that has columns or figures of its own, for these trials."""
    for name, asked in study.questions.items():
        for one in shown:
            rows = samples.rows(one.trial.id, split)
            rows = rows[samples.benchmark[rows] == samples.benchmarks.index(name)] if name in samples.benchmarks else []
            if len(rows):
                found = _of_trial(study, samples, one, name, asked, rows)
                if found.cells or found.figures:
                    yield found


def _of_trial(study: StudyData, samples: Samples, one: Row, name: str, asked: Questions, rows: Codes) -> Breakdown:
    mine = [asked.samples[samples.sample_ids[samples.sample[row]].split("\x1f", 1)[1]] for row in rows]
    by = _by(asked.benchmark)
    cells = _cells(study, samples, name, by, asked, mine, rows) if by[0] else {}
    told = {f"{row}{mark}{column}" for row, column in cells for mark in "@/"}
    figures = asked.benchmark.summary(mine, [float(score) for score in samples.score[rows]])
    return Breakdown(
        trial=one.trial,
        role=one.role,
        benchmark=name,
        by=by,
        cells=cells,
        figures={key: value for key, value in figures.items() if key not in told},
    )


def _by(benchmark: Benchmark) -> tuple[str, str]:
    """Rows are the first column that is neither length nor depth; columns the length, or what else there is."""
    own = [column for column in benchmark.group_by if column not in ("length", "depth")]
    if not own:
        return "", ""
    return own[0], "length" if "length" in benchmark.group_by else own[1] if len(own) > 1 else ALL


def _cells(
    study: StudyData,
    samples: Samples,
    name: str,
    by: tuple[str, str],
    asked: Questions,
    mine: Sequence[Sample],
    rows: Codes,
) -> dict[tuple[Any, Any], Interval]:
    """In the order of the benchmark's own samples, whichever of them this trial met."""
    cells = dict.fromkeys((_value(sample, by[0]), _value(sample, by[1])) for sample in asked.samples.values())
    places: dict[tuple[Any, Any], list[int]] = {cell: [] for cell in cells}
    for place, sample in enumerate(mine):
        places[_value(sample, by[0]), _value(sample, by[1])].append(place)
    facts = facts_by_name(study).get(name)
    bounds = (facts.low, facts.high) if facts and facts.low is not None and facts.high is not None else None
    out = {}
    for cell, chosen in ((cell, chosen) for cell, chosen in places.items() if chosen):
        at = np.asarray(rows)[chosen]
        data = stats.cluster(samples.score[at], samples.document[at])
        out[cell] = stats.mean_interval(data, bounds=bounds, seed=study.seed)
    return out


def _value(sample: Sample, column: str) -> Any:
    return ALL if column == ALL else sample.length if column == "length" else sample.meta[column]
