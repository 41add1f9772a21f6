"""The ledger: whole files or none, each row once, and no crash or torn file that loses what was finished."""

import errno
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan.orchestration import files, ledger
from statespan.orchestration.files import DiskFull, write_bytes
from statespan.orchestration.ledger import Ledger


def row(trial="t0000", sample="s0", score=1.0, origin="computed", status="done", split="search"):
    return {
        "trial_id": trial, "method": "m", "params": "{}", "task": "quiz", "sample_id": sample, "document": sample,
        "split": split, "rung": 0, "length": 3, "depth": None, "key": f"{trial}-{sample}", "scope": "scope",
        "origin": origin, "status": status, "score": score, "layer_tokens": 8, "layer_tokens_shared": 4,
        "finished_at": datetime.now(UTC),
    }  # fmt: skip


def test_what_is_appended_is_read(tmp_path):
    book = Ledger(tmp_path)
    book.append([row(sample="s0"), row(sample="s1", score=0.5)])
    assert book.read(["sample_id", "score"]).to_pydict() == {"sample_id": ["s0", "s1"], "score": [1.0, 0.5]}
    assert book.known("scope")["t0000-s1"] == ledger.Known(score=0.5, layer_tokens=12)
    assert book.known("other scope") == {}


def test_the_same_item_again_replaces_its_file(tmp_path):
    book = Ledger(tmp_path)
    assert book.append([row()]) == book.append([row()])
    assert book.read().num_rows == 1


def test_a_failed_sample_is_kept_but_not_known(tmp_path):
    book = Ledger(tmp_path)
    book.append([row(status="failed", score=float("nan"))])
    assert book.read().num_rows == 1 and book.known("scope") == {}


def test_done_wins_over_failed_and_computed_over_taken(tmp_path):
    book = Ledger(tmp_path)
    book.append([row(status="failed", score=0.0) | {"key": "a"}])
    book.append([row(score=0.7) | {"key": "b"}])
    book.append([row(score=0.9, origin="twin") | {"key": "c"}])
    assert book.read(["score"])["score"].to_pylist() == [0.7]


@pytest.mark.parametrize("keep", [0, 4, 100, -9], ids=["empty", "magic_only", "cut_in_the_middle", "footer_cut"])
def test_a_torn_file_goes_to_quarantine_and_the_rest_is_read(tmp_path, keep):
    book = Ledger(tmp_path)
    book.append([row(sample="s0")])
    torn = book.append([row(sample="s1")])
    torn.write_bytes(torn.read_bytes()[:keep])
    assert book.read(["sample_id"])["sample_id"].to_pylist() == ["s0"]
    assert [path.name for path in book.quarantined] == [torn.name] and not torn.exists()


def test_merging_keeps_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "MERGE_AT", 4)
    book = Ledger(tmp_path)
    for i in range(10):
        book.append([row(sample=f"s{i}")])
    assert len(book.files()) < 10
    assert sorted(book.read(["sample_id"])["sample_id"].to_pylist()) == [f"s{i}" for i in range(10)]


def rows_written(folder, items, monkeypatch):
    written, original = [], ledger.write_table
    with monkeypatch.context() as counted:
        counted.setattr(ledger, "MERGE_AT", 4)
        counted.setattr(ledger, "MERGED_AT", 2)
        counted.setattr(ledger, "write_table", lambda table, path: (written.append(len(table)), original(table, path)))
        book = Ledger(folder)
        for i in range(items):
            book.append([row(sample=f"s{i}")])
    assert book.read().num_rows == items
    return sum(written) / items


def test_a_row_is_not_written_more_often_because_there_are_many(tmp_path, monkeypatch):
    few, many = rows_written(tmp_path / "few", 48, monkeypatch), rows_written(tmp_path / "many", 192, monkeypatch)
    assert many < 1.5 * few  # the logarithm of their number; merging all each time gives 3 and more


def test_a_crash_between_merge_and_removal_doubles_nothing(tmp_path, monkeypatch):
    book = Ledger(tmp_path)
    for i in range(3):
        book.append([row(sample=f"s{i}")])
    monkeypatch.setattr(ledger.Path, "unlink", lambda self, missing_ok=False: None)
    book.merge()
    assert len(book.files()) == 4 and book.read().num_rows == 3


def test_a_full_disk_is_said_and_leaves_the_old_file_whole(tmp_path, monkeypatch):
    book = Ledger(tmp_path)
    path = book.append([row()])
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DiskFull, match="no space left to write"):
        book.append([row(score=0.0)])
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == [path.name]


@settings(max_examples=20, deadline=None)
@given(data=st.binary(max_size=200))
def test_a_file_is_written_whole(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("files") / "x"
    write_bytes(path, data)
    assert path.read_bytes() == data


def test_a_ledger_is_plain_parquet(tmp_path):
    path = Ledger(tmp_path).append([row()])
    assert pq.read_table(path).schema.names == ledger.SCHEMA.names
