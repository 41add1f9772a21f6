"""The ledger: one Parquet file per finished work item, the only record that counts.

A row is one sample under one trial. Files appear whole (files.py); one that cannot be read is moved to `quarantine/`
and what it held is computed again. Many small files are merged now and then: the merged file is durable before a part
goes, and a row that stands in two files counts once, so a crash in between is harmless.

Rows that were not computed for their trial say where they are from in `origin`: `vanilla` (the method changes nothing
at this length), `twin` (another trial of this study is the same here), `reused` (another study). Open it at any time:

    duckdb -c "select trial_id, avg(score) from 'runs/quickstart/ledger/*.parquet' group by 1 order by 2 desc"
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from statespan.orchestration.files import read_table, sync_folder, write_table
from statespan.orchestration.keys import digest

SCHEMA = pa.schema(
    [
        ("trial_id", pa.string()),
        ("method", pa.string()),
        ("params", pa.string()),  # JSON, canonical
        ("task", pa.string()),
        ("sample_id", pa.string()),
        ("document", pa.string()),
        ("split", pa.string()),
        ("rung", pa.int32()),  # -1 on the held-out side
        ("length", pa.int32()),
        ("depth", pa.float64()),
        ("key", pa.string()),
        ("scope", pa.string()),  # keys.scope_digest: weights, tokenizer, numerics
        ("origin", pa.string()),  # computed | vanilla | twin | reused
        ("status", pa.string()),
        ("score", pa.float64()),
        ("error", pa.string()),
        ("text", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("target_tokens", pa.list_(pa.int32())),
        ("greedy", pa.list_(pa.bool_())),
        ("tokens_prompt", pa.int64()),
        ("tokens_new", pa.int64()),
        ("prefill_seconds", pa.float64()),
        ("decode_seconds", pa.float64()),
        ("peak_bytes", pa.int64()),
        ("layer_tokens", pa.int64()),
        ("layer_tokens_shared", pa.int64()),
        ("worker", pa.string()),
        ("finished_at", pa.timestamp("ms", tz="UTC")),
    ]
)
IDENTITY = ["trial_id", "task", "sample_id", "split"]
MERGE_AT = 256
"""Small files in the folder before they are merged."""

MERGED_AT = 8
"""Merged files of a level before these are merged in turn."""


@dataclass(frozen=True, slots=True)
class Known:
    """A result as the search needs it."""

    score: float
    layer_tokens: int = 0
    """Of the sample when nothing is shared."""

    status: str = "done"
    error: str = ""


class Ledger:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quarantined: list[Path] = []
        self._small = len(list(folder.glob("item-*.parquet")))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write the rows of one finished work item durably. Writing the same item again replaces its file."""
        name = digest(sorted([row["trial_id"], row["key"], row["sample_id"]] for row in rows))[:24]
        path = self.folder / f"item-{name}.parquet"
        write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA), path)
        self._small += 1
        if self._small >= MERGE_AT:
            self.merge()
        return path

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Every readable file. One that is cut short goes to quarantine."""
        for path in self.files():
            table = read_table(path)
            if table is None or table.schema.names != SCHEMA.names:
                if path.exists():  # else a merge has just taken it
                    self._quarantine(path)
                continue
            yield table.select(list(columns)) if columns else table

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, each (trial, task, sample, split) once; a computed row wins over one taken from elsewhere."""
        whole = self._concat(list(self.tables()))
        return whole.select(list(columns)) if columns else whole

    def known(self, scope: str) -> dict[str, Known]:
        """Key -> result, of all rows with this scope that are done."""
        found: dict[str, Known] = {}
        for table in self.tables(["key", "scope", "status", "score", "layer_tokens", "layer_tokens_shared"]):
            mine = table.filter(pc.and_(pc.equal(table["scope"], scope), pc.equal(table["status"], "done")))
            tokens = pc.add(mine["layer_tokens"], mine["layer_tokens_shared"])
            for key, score, cost in zip(
                *(one.to_pylist() for one in (mine["key"], mine["score"], tokens)), strict=True
            ):
                found[key] = Known(score, cost)
        return found

    def results(self, scope: str) -> pa.Table:
        """Whole rows of this scope that are done, computed here or copied from another study."""
        whole = self.read()
        own = pc.is_in(whole["origin"], value_set=pa.array(["computed", "reused"]))
        return whole.filter(pc.and_(pc.and_(pc.equal(whole["scope"], scope), pc.equal(whole["status"], "done")), own))

    def rows_of(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Key -> one whole row that is done, for those of the keys that are here."""
        wanted = pa.array(list(set(keys)), pa.string())
        found: dict[str, dict[str, Any]] = {}
        for table in self.tables():
            mine = table.filter(pc.and_(pc.is_in(table["key"], value_set=wanted), pc.equal(table["status"], "done")))
            for row in mine.to_pylist():
                # a row that was only taken from vanilla or a twin has no text
                if row["key"] not in found or row["origin"] in ("computed", "reused"):
                    found[row["key"]] = row
        return found

    def present(self) -> set[tuple[str, str, str, str]]:
        """(trial, task, sample, split) of every row."""
        out: set[tuple[str, str, str, str]] = set()
        for table in self.tables(IDENTITY):
            out.update(zip(*(table[name].to_pylist() for name in IDENTITY), strict=True))
        return out

    def merge(self) -> None:
        """Small files into one of level 0; many of a level into one of the next, so that no row is written often."""
        self._small = 0
        self._merge([path for path in self.files() if _level(path) < 0], 0)
        level = 0
        while len(parts := [path for path in self.files() if _level(path) == level]) > MERGED_AT:
            level += 1
            self._merge(parts, level)

    def _merge(self, parts: Sequence[Path], level: int) -> None:
        tables = [(path, read_table(path)) for path in parts]
        good = [(path, table) for path, table in tables if table is not None and table.schema.names == SCHEMA.names]
        if len(good) < 2:
            return
        name = digest(sorted(path.name for path, _ in good))[:24]
        write_table(self._concat([table for _, table in good]), self.folder / f"merged-{level}-{name}.parquet")
        for path, _ in good:
            path.unlink(missing_ok=True)
        sync_folder(self.folder)

    def _concat(self, tables: Sequence[pa.Table]) -> pa.Table:
        if not tables:
            return SCHEMA.empty_table()
        whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
        return _once(whole)

    def _quarantine(self, path: Path) -> None:
        target = self.folder / "quarantine" / path.name
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        self.quarantined.append(target)


def _level(path: Path) -> int:
    """-1 for the file of a work item, else how often its rows were merged; 0 where its name does not say."""
    kind, _, rest = path.stem.partition("-")
    level = rest.partition("-")[0]
    return -1 if kind == "item" else int(level) if level.isdigit() and "-" in rest else 0


def _once(table: pa.Table) -> pa.Table:
    """Each identity once: done before failed, computed before taken from elsewhere, then the latest."""
    doubt = pc.add(
        pc.multiply(pc.cast(pc.not_equal(table["status"], "done"), pa.int8()), 2),
        pc.cast(pc.not_equal(table["origin"], "computed"), pa.int8()),
    )
    place = pa.array(range(table.num_rows), pa.int64())
    keyed = table.select(IDENTITY).append_column("doubt", doubt).append_column("place", place)
    if keyed.group_by(IDENTITY).aggregate([]).num_rows == table.num_rows:
        return table
    keyed = keyed.sort_by([("doubt", "ascending"), ("place", "descending")])
    first = keyed.group_by(IDENTITY, use_threads=False).aggregate([("place", "first")])
    return table.take(first["place_first"].sort())


def size(folder: Path) -> tuple[int, int, int]:
    """(files, rows, bytes) of a ledger, from the files' footers."""
    files = rows = total = 0
    for path in sorted(folder.glob("*.parquet")):
        try:
            rows += pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError):
            continue
        files, total = files + 1, total + path.stat().st_size
    return files, rows, total


def params_text(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(params), sort_keys=True)
