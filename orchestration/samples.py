"""A study's samples: built once by the driver, kept as one Parquet file, sent to the workers as one Arrow table.

Split: documents go to `search` or `heldout` once, in fixed proportion within each stratum (the columns that the
benchmark's report groups by: length, depth, RULER's task) of the samples in which a document first appears. A document
that was ever assigned keeps its side when the study is widened.

The order of the search samples, and the rung at which a trial first meets each, are racing.assign_rungs'.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from statespan.benchmarks.base import Benchmark, Sample, Tokenizer
from statespan.errors import UserError
from statespan.orchestration.files import read_table, write_table
from statespan.orchestration.keys import digest, sample_digest

Split = Literal["search", "heldout"]

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("kind", pa.string()),
        ("document", pa.string()),
        ("length", pa.int32()),
        ("depth", pa.float64()),
        ("targets", pa.list_(pa.string())),
        ("target_ids", pa.list_(pa.list_(pa.int32()))),
        ("max_new_tokens", pa.int32()),
        ("stop", pa.list_(pa.string())),
        ("meta", pa.string()),
        ("digest", pa.string()),
        ("split", pa.string()),
    ]
)


class Entry(NamedTuple):
    """A sample without its prompt: what planning needs."""

    row: int
    task: str
    id: str
    document: str
    length: int
    prompt_tokens: int
    target_tokens: tuple[int, ...]
    depth: float | None
    digest: str
    split: Split


@dataclass(frozen=True, slots=True)
class SampleSet:
    """All samples of a study; rows of `table` are addressed by number."""

    table: pa.Table
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, table: pa.Table) -> SampleSet:
        plain = {name: table[name].to_pylist() for name in SCHEMA.names if name not in ("prompt_ids", "meta")}
        tokens = pc.list_value_length(table["prompt_ids"]).to_pylist()
        entries = (
            Entry(
                row=row,
                prompt_tokens=tokens[row],
                target_tokens=tuple(len(ids) for ids in plain["target_ids"][row]),
                **{name: plain[name][row] for name in Entry._fields if name in plain},
            )
            for row in range(table.num_rows)
        )
        return cls(table, tuple(entries))

    def sample(self, row: int) -> Sample:
        one = {name: self.table[name][row].as_py() for name in SCHEMA.names}
        return Sample(
            id=one["id"],
            prompt_ids=tuple(one["prompt_ids"]),
            kind=one["kind"],
            document=one["document"],
            length=one["length"],
            targets=tuple(one["targets"]),
            target_ids=tuple(tuple(ids) for ids in one["target_ids"]),
            max_new_tokens=one["max_new_tokens"],
            stop=tuple(one["stop"]),
            depth=one["depth"],
            meta=json.loads(one["meta"]),
        )

    def of_split(self, split: Split) -> list[Entry]:
        return [entry for entry in self.entries if entry.split == split]

    def digest(self, split: Split) -> str:
        """Names the samples of one side, in their order."""
        return digest([[e.task, e.id, e.digest, e.document] for e in self.of_split(split)])


def build_samples(
    tasks: Mapping[str, Benchmark],
    tokenizer: Tokenizer,
    *,
    heldout: float,
    seed: int,
    assigned: Mapping[tuple[str, str], Split] | None = None,
) -> SampleSet:
    """Ask every benchmark for its samples, and split them.

    Args:
        tasks: task name -> benchmark.
        heldout: share of documents kept from the search.
        assigned: (task, document) -> side, of an earlier run of the same study.
    """
    rows: list[dict[str, Any]] = []
    for task, benchmark in tasks.items():
        found = [_row(task, sample) for sample in benchmark.samples(tokenizer)]
        _check(task, found)
        split_documents(found, heldout, seed, assigned or {}, benchmark.group_by)
        rows += found
    return SampleSet.of(pa.Table.from_pylist(rows, schema=SCHEMA))


def _row(task: str, sample: Sample) -> dict[str, Any]:
    return {
        "task": task,
        "id": sample.id,
        "prompt_ids": list(sample.prompt_ids),
        "kind": sample.kind,
        "document": sample.document,
        "length": sample.length,
        "depth": sample.depth,
        "targets": list(sample.targets),
        "target_ids": [list(ids) for ids in sample.target_ids],
        "max_new_tokens": sample.max_new_tokens,
        "stop": list(sample.stop),
        "meta": json.dumps(dict(sample.meta), sort_keys=True),
        "digest": sample_digest(sample),
    }


def _check(task: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise UserError(f"task {task} has no samples; look at its settings and its data")
    if len({row["id"] for row in rows}) < len(rows):
        raise AssertionError(f"benchmark of task {task} gave one sample id twice")
    if len({row["document"] for row in rows}) < 2:
        raise UserError(
            f"task {task} draws all its samples from one document, so none can be held out; give it more samples"
        )


def split_documents(
    rows: Sequence[dict[str, Any]],
    heldout: float,
    seed: int,
    assigned: Mapping[tuple[str, str], Split],
    group_by: Sequence[str],
) -> None:
    """Set `split` of every row; rows of one document go together."""
    first: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        if row["document"] not in first:
            columns = {"length": row["length"], "depth": row["depth"], **json.loads(row["meta"])}
            first[row["document"]] = tuple(columns[name] for name in group_by)
    strata: dict[Any, list[str]] = defaultdict(list)
    for document, stratum in first.items():
        strata[stratum].append(document)
    task = rows[0]["task"]
    side: dict[str, Split] = {}
    for stratum, documents in strata.items():
        offset = _unit(seed, "split", task, stratum)
        for i, document in enumerate(documents):
            kept_out = math.floor((i + 1) * heldout + offset) > math.floor(i * heldout + offset)
            side[document] = assigned.get((task, document), "heldout" if kept_out else "search")
    _both_sides(side, heldout)
    for row in rows:
        row["split"] = side[row["document"]]


def _both_sides(side: dict[str, Split], heldout: float) -> None:
    """Few documents in many strata may all fall on one side; then the last ones are moved."""
    for want, share in (("heldout", heldout), ("search", 1.0 - heldout)):
        if want not in side.values():
            for document in list(side)[-max(1, int(share * len(side))) :]:
                side[document] = "heldout" if want == "heldout" else "search"


def _unit(seed: int, *place: Any) -> float:
    """A number in [0, 1) that depends on its place only."""
    return int(digest([seed, *(list(p) if isinstance(p, tuple) else p for p in place)])[:13], 16) / 16**13


def save_samples(samples: SampleSet, path: Path, made_from: str) -> None:
    table = samples.table.replace_schema_metadata({"made_from": made_from})
    write_table(table, path)


def saved_samples(path: Path) -> tuple[SampleSet, str] | None:
    """The samples of an earlier run and what they were made from, or None."""
    table = read_table(path)
    if table is None:
        return None
    made_from = (table.schema.metadata or {}).get(b"made_from", b"").decode()
    return SampleSet.of(table), made_from


def sides(samples: SampleSet) -> dict[tuple[str, str], Split]:
    return {(entry.task, entry.document): entry.split for entry in samples.entries}
