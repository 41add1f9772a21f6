"""Data that does not fit is refused by file and line, and what is fetched is there whole or not at all."""

import json
import re
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from statespan.benchmarks import fetch as fetching
from statespan.benchmarks.books import BookRow
from statespan.benchmarks.catalog import DATA_SETS, FIXTURES, locate
from statespan.benchmarks.choice_tasks import ArcRow, HellaSwagRow, PiqaRow, WinoGrandeRow
from statespan.benchmarks.data_check import PARTS, check
from statespan.benchmarks.fetch import SOURCES, HubSplit, HubZip, fetch
from statespan.benchmarks.leval import LEvalRow, SciFiRow
from statespan.benchmarks.longbench_data import ClassificationRow, LongBenchRow, RetrievalRow
from statespan.benchmarks.offline import HUB_SWITCHES, no_network
from statespan.benchmarks.records import MAX_LINE, Row, provenance, read_document, read_rows, read_text
from statespan.benchmarks.ruler_qa import Hotpot
from statespan.benchmarks.squad import FlatQuestion, Squad
from statespan.benchmarks.table import build_benchmark
from statespan.cli import build_app, run
from statespan.errors import UserError
from tests.benchmark_conformance import BYTES

LONG: dict[str, Any] = {
    "input": "q",
    "context": "c",
    "answers": ["a"],
    "length": 5,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}
LEVAL = {"input": "d", "instructions": ["q"], "outputs": ["A"]}
HELLA = {"ctx_a": "A", "ctx_b": "b", "activity_label": "x", "endings": ["a", "b", "c", "d"], "label": "0"}
PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}
ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
WINO = {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}
HOTPOT = {"_id": "1", "question": "q", "answer": "a", "context": [["t", ["s"]]]}
FLAT = {"id": "1", "title": "t", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}


def line(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


def without(row: dict[str, Any], field: str) -> bytes:
    return line({key: value for key, value in row.items() if key != field})


GOOD = line(LONG)

MALFORMED: list[tuple[str, type[Row], bytes, str]] = [
    # bytes that are no JSON lines
    ("empty_file", LongBenchRow, b"", "rows.jsonl is empty; it should hold objects with _id, input"),
    ("only_a_newline", LongBenchRow, b"\n", "line 1 is blank"),
    ("blank_line_between", LongBenchRow, GOOD + b"\n" + GOOD, "line 2 is blank"),
    ("line_of_spaces", LongBenchRow, GOOD + b"   \n", "line 2 is blank"),
    ("byte_order_mark", LongBenchRow, b"\xef\xbb\xbf" + GOOD, "line 1 begins with a byte order mark"),
    ("mark_on_a_later_line", LongBenchRow, GOOD + b"\xef\xbb\xbf" + GOOD, "line 2 begins with a byte order mark"),
    ("utf_16", LongBenchRow, json.dumps(LONG).encode("utf-16"), "line 1 is UTF-16"),
    ("utf_16_big_endian", LongBenchRow, b"\xfe\xff" + json.dumps(LONG).encode("utf-16-be"), "line 1 is UTF-16"),
    ("latin_1", LongBenchRow, GOOD + b'{"input": "caf\xe9"}\n', r"line 2 is not UTF-8 \(byte 14\)"),
    ("truncated_line", LongBenchRow, GOOD + GOOD[: len(GOOD) // 2], "line 2 is not whole JSON"),
    ("truncated_in_a_text", LongBenchRow, GOOD + b'{"input": "qu', "line 2 is not whole JSON: Unterminated string"),
    ("two_objects_on_a_line", LongBenchRow, GOOD.strip() + GOOD, "line 1 is not whole JSON: Extra data"),
    ("carriage_returns_only", LongBenchRow, GOOD.strip() + b"\r" + GOOD, "line 1 is not whole JSON: Extra data"),
    ("trailing_comma", LongBenchRow, b'{"input": "q",}\n', "line 1 is not whole JSON"),
    ("single_quotes", LongBenchRow, b"{'input': 'q'}\n", "line 1 is not whole JSON"),
    ("python_none", LongBenchRow, b'{"all_classes": None}\n', "line 1 is not whole JSON"),
    ("a_web_page", LongBenchRow, b"<!DOCTYPE html>\n<html>\n", "line 1 is not whole JSON"),
    ("null_bytes", LongBenchRow, b"\x00" * 64, "line 1 is not whole JSON"),
    ("gzip", LongBenchRow, b"\x1f\x8b\x08\x00\x00\x00", "line 1 is not UTF-8"),
    (
        "ten_megabytes",
        LongBenchRow,
        GOOD + b'"' + b"x" * 10_485_758 + b'"\n',
        r"line 2 has 10,485,760 bytes; .* 8,388,608",
    ),
    (
        "lfs_pointer",
        LongBenchRow,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "is a Git LFS pointer",
    ),
    ("nested_too_deeply", LongBenchRow, b"[" * 100_000 + b"\n", "line 1 is nested too deeply"),
    ("not_a_number", LongBenchRow, b'{"length": NaN}\n', "line 1 holds NaN, which is not JSON"),
    ("infinity", LongBenchRow, b'{"length": -Infinity}\n', "line 1 holds -Infinity, which is not JSON"),
    ("field_twice", LongBenchRow, b'{"input": "a", "input": "b"}\n', "line 1 has the field 'input' twice"),
    ("number_of_many_digits", LongBenchRow, b'{"length": ' + b"9" * 5000 + b"}\n", "line 1 .*digits"),
    # JSON that is no object
    ("a_list", LongBenchRow, b"[1, 2]\n", "line 1 holds a list; an object with _id, input"),
    ("a_text", LongBenchRow, b'"row"\n', "line 1 holds a text"),
    ("a_number", LongBenchRow, b"7\n", "line 1 holds a number"),
    ("a_null", LongBenchRow, GOOD + b"null\n", "line 2 holds a null"),
    # objects of another shape
    *[
        (f"no_{field}", LongBenchRow, GOOD + without(LONG, field), f"line 2 has no field '{field}'")
        for field in ("input", "context", "answers", "length", "all_classes", "_id")
    ],
    ("input_is_null", LongBenchRow, line(LONG | {"input": None}), "line 1 field 'input': .*valid string; got None"),
    ("input_is_a_number", LongBenchRow, line(LONG | {"input": 7}), "line 1 field 'input': .*valid string; got 7"),
    ("answers_is_a_text", LongBenchRow, line(LONG | {"answers": "a"}), "line 1 field 'answers': .*valid list; got 'a'"),
    ("answers_is_empty", LongBenchRow, line(LONG | {"answers": []}), "line 1 field 'answers': .*at least 1 item"),
    (
        "an_answer_is_a_number",
        LongBenchRow,
        line(LONG | {"answers": ["a", 4]}),
        r"line 1 field 'answers\[1\]': .*got 4",
    ),
    ("length_is_a_text", LongBenchRow, line(LONG | {"length": "5"}), "line 1 field 'length': .*valid integer; got '5'"),
    ("length_is_a_fraction", LongBenchRow, line(LONG | {"length": 5.5}), "line 1 field 'length': .*got 5.5"),
    ("length_is_true", LongBenchRow, line(LONG | {"length": True}), "line 1 field 'length': .*got True"),
    (
        "length_is_negative",
        LongBenchRow,
        line(LONG | {"length": -1}),
        "line 1 field 'length': .*greater than or equal to 0",
    ),
    ("empty_id", LongBenchRow, line(LONG | {"_id": ""}), "line 1 field '_id': .*at least 1 character"),
    ("half_a_surrogate", LongBenchRow, GOOD.replace(b'"q"', b'"\\ud800"'), "line 1 holds half a surrogate pair"),
    ("no_classes", ClassificationRow, GOOD, "line 1 field 'all_classes': .*valid list; got None"),
    ("no_paragraph_number", RetrievalRow, GOOD, r"line 1 field 'answers\[0\]': .*match pattern"),
    ("fewer_outputs", LEvalRow, line(LEVAL | {"instructions": ["a", "b"]}), "line 1 has 2 instructions and 1 outputs"),
    ("blank_output", LEvalRow, line(LEVAL | {"outputs": [" "]}), r"line 1 field 'outputs\[0\]'"),
    (
        "sci_fi_without_fact",
        SciFiRow,
        line(LEVAL | {"outputs": ["True"]}),
        r"line 1 field 'outputs\[0\]': .*match pattern",
    ),
    ("three_endings", HellaSwagRow, line(HELLA | {"endings": ["a"] * 3}), "line 1 field 'endings': .*at least 4 items"),
    ("label_is_a_number", HellaSwagRow, line(HELLA | {"label": 0}), "line 1 field 'label': .*valid string; got 0"),
    ("label_out_of_range", PiqaRow, line(PIQA | {"label": 2}), "line 1 field 'label': .*less than or equal to 1"),
    ("hidden_label", PiqaRow, line(PIQA | {"label": -1}), "line 1 field 'label': .*greater than or equal to 0"),
    ("key_of_no_choice", ArcRow, line(ARC | {"answerKey": "C"}), "line 1 answerKey 'C' is none of the labels A, B"),
    (
        "fewer_labels",
        ArcRow,
        line(ARC | {"choices": {"text": ["a", "b"], "label": ["A"]}}),
        "line 1 field 'choices.label'",
    ),
    ("no_gap", WinoGrandeRow, line(WINO | {"sentence": "a b"}), "line 1 field 'sentence': .*match pattern"),
    ("answer_is_empty", WinoGrandeRow, line(WINO | {"answer": ""}), "line 1 field 'answer'"),
    ("book_without_text", BookRow, line({"text": ""}), "line 1 field 'text': .*at least 1 character"),
    ("answers_without_text", FlatQuestion, line(FLAT | {"answers": {}}), "line 1 has no field 'answers.text'"),
]


@pytest.mark.parametrize(
    "schema, content, message", [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED]
)
def test_a_malformed_line_is_refused_by_file_and_line(
    schema: type[Row], content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read_rows(path, schema)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_there_are_fifty_malformed_cases_and_more() -> None:
    assert len({case[0] for case in MALFORMED}) == len(MALFORMED) >= 50


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""], ids=["newline", "carriage_return", "none"])
def test_good_lines_are_read_whatever_ends_them(ending: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    second = LONG | {"_id": "2", "extra": {"ignored": 1}, "length": 9000}
    path.write_bytes(GOOD.strip() + b"\n" + json.dumps(second).encode() + ending)
    first, last = read_rows(path, LongBenchRow)
    assert (first.id, first.bucket, last.id, last.bucket) == ("1", "0-4k", "2", "8k+")


def test_a_line_of_just_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    room = MAX_LINE - len(line({"text": ""})) + 1  # the newline does not count
    path.write_bytes(line({"text": "x" * room}))
    assert len(read_rows(path, BookRow)[0].text) == room


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty", b"", "squad.json is empty; it should hold one object with data"),
        ("truncated", b'{"data": [{"title": "t",\n "paragraphs": [', "squad.json line 2 is not whole JSON"),
        ("list", b"[]", "squad.json holds a list; an object with data is expected"),
        ("no_data", b'{"version": "v2.0"}', "squad.json has no field 'data'"),
        (
            "question_without_id",
            b'{"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}]}',
            r"squad.json has no field 'data\[0\].paragraphs\[0\].qas\[0\].id'",
        ),
        (
            "answers_null",
            b'{"data": [{"title": "t", "paragraphs": null}]}',
            r"field 'data\[0\].paragraphs': .*got None",
        ),
    ],
)
def test_a_malformed_document_is_refused_by_file_and_place(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "squad.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_document(path, Squad)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{}", "holds a object; a list of records is expected"),
        (b"[]", "is empty; it should hold objects with _id, question"),
        (json.dumps([HOTPOT, {"_id": "2"}]).encode(), "record 2 has no field 'question'"),
        (json.dumps([HOTPOT | {"context": []}]).encode(), "record 1 field 'context': .*at least 1 item"),
        (json.dumps([HOTPOT | {"context": [["t"]]}]).encode(), r"record 1 has no field 'context\[0\]\[1\]'"),
    ],
    ids=["object", "empty", "missing", "no_paragraphs", "no_sentences"],
)
def test_a_malformed_list_is_refused_by_record(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hotpot.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(path, Hotpot)


def parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p.write_bytes(b""), "is no whole parquet file"),
        (lambda p: p.write_bytes(b"PAR1 and nothing"), "is no whole parquet file"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        (lambda p: parquet(p, {"goal": ["g"], "sol1": ["a"], "sol2": ["b"]}), "row 1 has no field 'label'"),
        (lambda p: parquet(p, {key: [value, None] for key, value in PIQA.items()}), "row 2 field 'goal': .*got None"),
        (lambda p: parquet(p, {key: [str(value)] for key, value in PIQA.items()}), "row 1 field 'label': .*got '1'"),
        (lambda p: parquet(p, {key: [] for key in PIQA}), "is empty"),
    ],
    ids=["empty", "no_parquet", "folder", "lfs_pointer", "no_column", "null", "other_type", "no_rows"],
)
def test_a_malformed_parquet_file_is_refused(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    make(path)
    with pytest.raises(UserError, match=message):
        read_rows(path, PiqaRow)


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet(path, {key: [value] * 100 for key, value in PIQA.items()})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="is no whole parquet file"):
        read_rows(path, PiqaRow)


def test_parquet_and_json_lines_hold_the_same_rows(tmp_path: Path) -> None:
    parquet(tmp_path / "rows.parquet", {key: [value] for key, value in HELLA.items()})
    (tmp_path / "rows.jsonl").write_bytes(line(HELLA))
    assert read_rows(tmp_path / "rows.parquet", HellaSwagRow) == read_rows(tmp_path / "rows.jsonl", HellaSwagRow)


# Every data set's own reader


def fixture_of(name: str) -> tuple[str, bytes]:
    """The data set's first file below data_root, and our sample rows in it."""
    (path, *_) = locate(name, "fixtures", part=PARTS.get(name, ("",))[0])
    return path.relative_to(FIXTURES).as_posix(), path.read_bytes()


NEEDED = {"squad": "data", "hotpotqa": "question", "longbench": "context", "leval": "input", "hellaswag": "ctx_a",
          "piqa": "goal", "arc_easy": "question", "arc_challenge": "question", "winogrande": "sentence",
          "openbookqa": "question_stem", "pg19": "text", "wikitext": "text"}  # fmt: skip


def with_last(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with its last row (or, of one document, the whole) changed."""
    if content.lstrip().startswith(b"["):
        rows = json.loads(content)
        return json.dumps([*rows[:-1], change(rows[-1])]).encode()
    *lines, last = content.strip().split(b"\n") if b'"paragraphs"' not in content else [content]
    return b"\n".join([*lines, json.dumps(change(json.loads(last))).encode()]) + b"\n"


def long_as(value: object) -> object:
    """Ten megabytes of text where there was text, or in a title deep inside."""
    text = "x" * 10_485_760
    return text if isinstance(value, str) else [{"title": text, "paragraphs": []}]


DEFECTS: dict[str, Callable[[bytes, str], bytes]] = {
    "missing_field": lambda content, field: with_last(content, lambda row: {k: row[k] for k in row if k != field}),
    "wrong_type": lambda content, field: with_last(content, lambda row: row | {field: 7}),
    "truncated": lambda content, field: content[: len(content) * 3 // 4].rstrip(b"}\n"),
    "empty": lambda content, field: b"",
    "byte_order_mark": lambda content, field: b"\xef\xbb\xbf" + content,
    "ten_megabytes": lambda content, field: with_last(content, lambda row: row | {field: long_as(row[field])}),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_every_data_sets_reader_refuses_by_file_and_line(name: str, defect: str, tmp_path: Path) -> None:
    place, content = fixture_of(name)
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert check([name], str(tmp_path))[0].status == "ok"
    path.write_bytes(DEFECTS[defect](content, NEEDED[name]))
    (found,) = check([name], str(tmp_path))
    assert found.status == "bad" and str(path) in found.problem
    assert "\n" not in found.problem and len(found.problem) < 400
    where = {"empty": " is empty", "byte_order_mark": " line 1 ", "truncated": r" line \d+ is not whole JSON"}
    one_document = r" (has no )?field" if name == "squad" else ""
    assert re.search(where.get(defect) or one_document or r" (line|record) \d+ ", found.problem), found.problem
    if defect in ("missing_field", "wrong_type"):
        assert repr(NEEDED[name]) in found.problem


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "book.txt is empty"),
        (b" \n", "book.txt is empty"),
        (b"caf\xe9", r"book.txt is not UTF-8 \(byte 3\)"),
        (b"one\n" + b"x" * 10_485_760, r"book.txt line 2 has 10,485,760 characters; a line may have 8,388,608"),
        (b"version https://git-lfs.github.com/spec/v1\n", "book.txt is a Git LFS pointer"),
    ],
    ids=["empty", "blank", "latin_1", "ten_megabytes", "lfs_pointer"],
)
def test_a_malformed_text_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(path)


def test_a_texts_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfCall me Ishmael.")
    assert read_text(path) == "Call me Ishmael."


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "longbench" / "data"
    folder.mkdir(parents=True)
    (folder / "qasper_e.jsonl").write_bytes(GOOD + GOOD)
    with pytest.raises(UserError, match=r"qasper_e.jsonl row 2 has the same _id as row 1: '1'"):
        list(build_benchmark("longbench", {"datasets": ["qasper"], "data_root": str(tmp_path)}).samples(BYTES))


def test_a_files_hash_follows_its_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    before = provenance(path)
    path.write_bytes(GOOD + GOOD)
    assert provenance(path)["sha256"] != before["sha256"] and before["bytes"] == len(GOOD)


# Where data lie


def test_every_data_set_has_fixture_rows_that_its_benchmark_reads() -> None:
    found = check(None, "fixtures")
    assert {checked.name: checked.problem for checked in found if checked.status != "ok"} == {}
    assert not any(checked.missing_parts for checked in found)
    assert all(row["rows"] > 0 and len(row["sha256"]) == 64 for checked in found for row in checked.files)


def test_check_says_what_is_missing_and_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_bytes(line(PIQA | {"label": 2}))
    (tmp_path / "leval").mkdir()
    (tmp_path / "leval" / "tpo.jsonl").write_bytes(line(LEVAL))
    piqa, leval, squad = check(["piqa", "leval", "squad"], str(tmp_path))
    assert piqa.status == "bad" and "line 1 field 'label'" in piqa.problem
    assert leval.status == "ok" and "coursera" in leval.missing_parts and len(leval.files) == 1
    assert squad.status == "missing" and "statespan data fetch squad" in squad.problem


def test_a_data_root_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STATESPAN_DATA", raising=False)
    with pytest.raises(UserError, match="piqa needs your copy of the data: give data_root or set STATESPAN_DATA"):
        locate("piqa", None)
    monkeypatch.setenv("STATESPAN_DATA", str(tmp_path))
    with pytest.raises(UserError, match=f"no piqa/validation.parquet or piqa/validation.jsonl in {tmp_path}"):
        locate("piqa", None)
    monkeypatch.setenv("STATESPAN_DATA", "fixtures")
    assert locate("piqa", None) == [FIXTURES / "piqa" / "validation.jsonl"]
    with pytest.raises(UserError, match="no data set named 'pica'; did you mean 'piqa'"):
        locate("pica", None)


# Fetching


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch in HUB_SWITCHES:
        monkeypatch.delenv(switch, raising=False)


class Table(list[dict[str, Any]]):
    """As much of a `datasets.Dataset` as fetching uses."""

    def to_parquet(self, path: str) -> None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(self)), path)


class Shelf:
    """A network that has what it is given."""

    def __init__(self, rows: list[dict[str, Any]] | None = None, files: dict[str, bytes] | None = None) -> None:
        self.rows, self.files, self.asked = rows, files or {}, list[tuple[str, str]]()

    def split(self, source: HubSplit) -> Table:
        self.asked.append((source.repo, source.revision))
        if self.rows is None:
            raise ConnectionError("no route to host\nand more")
        return Table(self.rows)

    def hub_file(self, repo: str, revision: str, file: str) -> Path:
        self.asked.append((repo, revision))
        return Path(self.files[file].decode())

    def git_file(self, repo: str, revision: str, path: str) -> bytes:
        self.asked.append((repo, revision))
        return self.files[path.rsplit("/", 1)[1]]


def held(path: Path) -> dict[str, Any]:
    known = provenance(path)
    return {"bytes": known["bytes"], "sha256": known["sha256"], "rows": 2}


def test_every_data_set_has_a_pinned_source() -> None:
    assert set(SOURCES) == set(DATA_SETS)
    for sources in SOURCES.values():
        for source in sources:
            assert len(source.revision) == 40 and int(source.revision, 16)


def test_a_fetched_split_is_checked_and_says_where_it_came_from(tmp_path: Path) -> None:
    shelf = Shelf([PIQA, PIQA])
    found = fetch("piqa", str(tmp_path), network=shelf)
    path = tmp_path / "piqa" / "validation.parquet"
    assert found.status == "ok" and found.files == ({"file": "piqa/validation.parquet", **held(path)},)
    assert len(read_rows(path, PiqaRow)) == 2
    assert shelf.asked == [("baber/piqa", SOURCES["piqa"][0].revision)]
    noted = json.loads((tmp_path / "piqa" / "SOURCE.json").read_text())
    assert noted["sources"][0]["revision"] == SOURCES["piqa"][0].revision and noted["files"] == list(found.files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["piqa"]
    fetch("piqa", str(tmp_path), revision="f" * 40, network=shelf)
    assert shelf.asked[-1] == ("baber/piqa", "f" * 40)


def test_hotpotqa_is_kept_as_its_official_file(tmp_path: Path) -> None:
    row = {"id": "x", "question": "q", "answer": "a", "context": {"title": ["t"], "sentences": [["s ", "u"]]}}
    fetch("hotpotqa", str(tmp_path), network=Shelf([row]))
    path = tmp_path / "hotpotqa" / "hotpot_dev_distractor_v1.json"
    assert read_rows(path, Hotpot)[0].context == [("t", ["s ", "u"])]


def test_longbench_comes_with_its_official_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("data/qasper_e.jsonl", GOOD)
        members.writestr("data/../../escape.jsonl", GOOD)
    files = {"data.zip": str(archive).encode(), "dataset2prompt.json": b'{"qasper": "{context} {input}"}'}
    shelf = Shelf(files=files | {"dataset2maxlen.json": b'{"qasper": 5}'})
    with pytest.raises(UserError, match=r"data\.zip has sha256 .*; cb45b11a4133\.\.\. is expected"):
        fetch("longbench", str(tmp_path / "root"), network=shelf)
    assert list((tmp_path / "root").iterdir()) == []
    fetch("longbench", str(tmp_path / "root"), revision="e" * 40, network=shelf)
    asked = {"datasets": ["qasper"], "data_root": str(tmp_path / "root")}
    (sample,) = build_benchmark("longbench", asked).samples(BYTES)
    assert BYTES.decode(sample.prompt_ids) == "c q" and sample.meta["prompts"] == "official"
    assert not (tmp_path / "escape.jsonl").exists() and (tmp_path / "root/longbench/data/escape.jsonl").exists()


def test_leval_comes_from_its_repository(tmp_path: Path) -> None:
    files = {f"{task}.jsonl": line(LEVAL) for task in ("coursera", "quality", "tpo", "gsm100", "codeU")}
    files |= {"topic_retrieval_longchat.jsonl": line(LEVAL)}
    files |= {"sci_fi.jsonl": line(LEVAL | {"outputs": ["True [fact: False]"]})}
    found = fetch("leval", str(tmp_path), network=Shelf(files=files))
    assert len(found.files) == 7 and all(file["rows"] == 1 for file in found.files)


@pytest.mark.parametrize(
    "rows, message",
    [
        (None, "baber/piqa at 142f6d7367fd could not be fetched: no route to host$"),
        ([PIQA | {"label": 2}], "piqa was fetched and cannot be used, nothing is kept: .*row 1 field 'label'"),
        ([], "piqa was fetched and cannot be used, nothing is kept"),
    ],
    ids=["no_network", "bad_rows", "no_rows"],
)
def test_what_cannot_be_used_leaves_nothing_behind(
    rows: list[dict[str, Any]] | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.parquet").write_bytes(b"as it was")
    with pytest.raises(UserError, match=message):
        fetch("piqa", str(tmp_path), network=Shelf(rows))
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == [
        "piqa/validation.parquet"
    ]
    assert (tmp_path / "piqa" / "validation.parquet").read_bytes() == b"as it was"


def test_offline_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"offline: piqa is not fetched; copy piqa/validation\.parquet to"):
        fetch("piqa", str(tmp_path / "root"), offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="offline: piqa is not fetched"):
        fetch("piqa", str(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


def test_a_fetched_file_that_was_changed_is_told(tmp_path: Path) -> None:
    fetch("piqa", str(tmp_path), network=Shelf([PIQA, PIQA]))
    assert check(["piqa"], str(tmp_path))[0].status == "ok"
    parquet(tmp_path / "piqa" / "validation.parquet", {key: [value] for key, value in PIQA.items()})
    (found,) = check(["piqa"], str(tmp_path))
    assert found.status == "bad" and "was fetched; fetch it again, or remove" in found.problem
    (tmp_path / "piqa" / "SOURCE.json").unlink()
    assert check(["piqa"], str(tmp_path))[0].status == "ok"


# The command


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """What `statespan data fetch` finds outside."""
    shelf = Shelf([PIQA, PIQA])
    monkeypatch.setattr(fetching, "Online", lambda: shelf)
    return shelf


def test_data_fetch_and_check_from_the_command_line(shelf: Shelf, tmp_path: Path) -> None:
    root = str(tmp_path)
    fetched = CliRunner().invoke(build_app(), ["data", "fetch", "piqa", "--data-root", root])
    assert fetched.exit_code == 0 and fetched.stdout.startswith("piqa           ok       2 rows, ")
    assert fetched.stderr.splitlines() == [
        f"piqa: fetching baber/piqa at {SOURCES['piqa'][0].revision[:12]}",
        "piqa: checking every row",
    ]
    checked = CliRunner().invoke(build_app(), ["data", "check", "--json"], env={"STATESPAN_DATA": root})
    rows = {row["name"]: row for row in map(json.loads, checked.stdout.splitlines())}
    assert checked.exit_code == 0 and set(rows) == set(DATA_SETS)
    assert rows["piqa"]["files"][0]["rows"] == 2 and rows["squad"]["status"] == "missing"


def test_data_check_fails_on_what_is_wrong_and_on_what_was_asked_for_and_is_missing(tmp_path: Path) -> None:
    asked = ["data", "check", "--data-root", str(tmp_path)]
    assert CliRunner().invoke(build_app(), asked).exit_code == 0  # nothing there, nothing asked for by name
    assert CliRunner().invoke(build_app(), [*asked, "piqa"]).exit_code == 1
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_bytes(line(PIQA) + line(PIQA | {"label": 2}))
    found = CliRunner().invoke(build_app(), asked)
    assert found.exit_code == 1 and "validation.jsonl line 2 field 'label'" in found.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["piqua"], "no data set named 'piqua'; did you mean 'piqa'?"),
        (["piqa"], "piqa needs a folder to go to: give --data-root or set STATESPAN_DATA (docs/data.md)"),
        (["piqa", "--data-root", "fixtures"], "'fixtures' is the folder of sample rows that ships"),
        (["piqa", "--data-root", "{tmp}", "--offline"], "offline: piqa is not fetched; copy piqa/validation.parquet"),
        (["piqa", "--data-root", "{tmp}/file/root"], "cannot be written: Not a directory"),
        (["piqa", "squad", "--data-root", "{tmp}", "--revision", "f" * 40], "is of one data set; 2 are named"),
        (["hellaswag", "--data-root", "{tmp}"], "hellaswag was fetched and cannot be used, nothing is kept"),
    ],
)
def test_data_fetch_says_what_is_wrong_in_one_line(
    arguments: list[str],
    message: str,
    shelf: Shelf,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("STATESPAN_DATA", raising=False)
    (tmp_path / "file").write_text("")
    code = run(["data", "fetch", *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)])
    *steps, last = capsys.readouterr().err.splitlines()
    assert code == 2 and last.startswith("statespan: ") and message in last
    assert all(": fetching " in step or ": checking " in step for step in steps)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_network_refuses_every_way_out_and_leaves_this_machine_open() -> None:
    with no_network():
        with pytest.raises(UserError, match=r"offline: something tried to look up 'example\.org'"):
            socket.create_connection(("example.org", 80))
        with pytest.raises(UserError, match=r"offline: something tried to reach 192\.0\.2\.1:80"):
            socket.socket().connect(("192.0.2.1", 80))
        with pytest.raises(UserError, match="offline: something tried to look up"):
            fetching.Online().git_file("a/b", "c", "d")
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
    assert socket.getaddrinfo("127.0.0.1", 80)


def test_every_benchmark_runs_on_fixtures_without_a_network() -> None:
    with no_network():
        for name in ("longbench", "leval", "short_context", "document_retrieval"):
            settings = {"data_root": "fixtures"}
            small = {"documents": [3], "queries": 2} if name == "document_retrieval" else {}
            benchmark = build_benchmark(name, settings | small)
            assert next(iter(benchmark.samples(BYTES))).prompt_ids
        pg19 = {"books": "pg19", "lengths": [200], "windows": 2, "data_root": "fixtures"}
        assert len(list(build_benchmark("perplexity", pg19).samples(BYTES))) == 4
        passkey = {"haystack": "wikitext", "lengths": [400], "trials": 1, "data_root": "fixtures"}
        assert len(list(build_benchmark("passkey", passkey).samples(BYTES))) == 5


def test_a_zip_source_needs_no_hash_when_another_revision_is_asked_for() -> None:
    (first, _) = fetching._pinned(SOURCES["longbench"], "e" * 40)
    assert isinstance(first, HubZip) and first.sha256 == "" and first.revision == "e" * 40
