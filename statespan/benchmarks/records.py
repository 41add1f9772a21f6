"""Rows of local data files, checked against a schema: what does not fit is refused by file and line, never skipped.

A schema is a strict pydantic model, so "5" is no number and null is no text. Fields it does not name are ignored, since
data sets carry more than we read. `.jsonl` holds one object a line, `.parquet` one a row, `.json` a list of them or one
document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from statespan.errors import UserError

MAX_LINE = 8 * 1024 * 1024
"""Bytes in a line, and characters in a text. The longest record of any benchmark here has about 1 MB; more means lost
line ends or quotes."""

LFS_POINTER = b"version https://git-lfs"


class Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, str_max_length=MAX_LINE)


R = TypeVar("R", bound=Row)


def read_rows(path: Path, schema: type[R]) -> list[R]:
    """Every row of a .jsonl or .parquet file, or of a .json file that is a list."""
    rows = [_checked(schema, value, path, place) for value, place in _values(path)]
    if not rows:
        raise UserError(f"{path} is empty; it should hold objects with {_names(schema)}")
    return rows


def read_document(path: Path, schema: type[R]) -> R:
    """The one JSON document of a .json file."""
    raw = _bytes(path)
    if not raw.strip():
        raise UserError(f"{path} is empty; it should hold one object with {_names(schema)}")
    return _checked(schema, _parsed(raw, path, 1), path, "")


def read_text(path: Path) -> str:
    """A plain text. A byte order mark, with which many begin, is no part of it."""
    try:
        text = _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise UserError(f"{path} is empty; a text is expected")
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > MAX_LINE:
            _refuse(path, f" line {number}", f"has {len(line):,} characters; a line may have {MAX_LINE:,}")
    return text


def refuse_repeated(path: Path, field: str, values: Sequence[str]) -> None:
    """Raises UserError where two rows share what should tell them apart."""
    first: dict[str, int] = {}
    for number, value in enumerate(values, start=1):
        if value in first:
            raise UserError(f"{path} row {number} has the same {field} as row {first[value]}: {_shown(value)}")
        first[value] = number


def provenance(path: Path) -> dict[str, Any]:
    """What a result says about its data: the file's name, bytes and sha256. Remembered until the file changes."""
    found = path.stat()
    digest = _sha256(path, found.st_size, found.st_mtime_ns)
    return {"file": "/".join(path.parts[-3:]), "bytes": found.st_size, "sha256": digest}


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path} is a folder; a data file is expected there (docs/data.md)")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"no data file {path}; `statespan data fetch` brings it, or copy it there (docs/data.md)"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if raw.startswith(LFS_POINTER):
        raise UserError(f"{path} is a Git LFS pointer, not the data; run `git lfs pull` where you cloned it")
    return raw


def _values(path: Path) -> Iterator[tuple[object, str]]:
    """Parsed rows, each with where it stands: " line 3", " row 3", " record 3"."""
    if path.suffix == ".parquet":
        yield from _parquet_values(path)
    elif path.suffix == ".json":
        raw = _bytes(path)
        if not raw.strip():
            _refuse(path, "", "is empty; a list of records is expected")
        document = _parsed(raw, path, 1)
        if not isinstance(document, list):
            _refuse(path, "", f"holds a {_kind(document)}; a list of records is expected")
        yield from ((value, f" record {number}") for number, value in enumerate(document, start=1))
    else:
        yield from _line_values(path)


def _line_values(path: Path) -> Iterator[tuple[object, str]]:
    lines = _bytes(path).split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        place = f" line {number}"
        if len(line) > MAX_LINE:
            _refuse(path, place, f"has {len(line):,} bytes; a record may have {MAX_LINE:,}")
        if not line.strip():
            _refuse(path, place, "is blank; every line should hold one JSON object")
        yield _parsed(line, path, number), place


def _parquet_values(path: Path) -> Iterator[tuple[object, str]]:
    import pyarrow
    import pyarrow.parquet

    _bytes_head(path)
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no whole parquet file: {str(error).splitlines()[0]}") from None
    yield from ((row, f" row {number}") for number, row in enumerate(table.to_pylist(), start=1))


def _bytes_head(path: Path) -> None:
    if not path.is_file() or path.open("rb").read(len(LFS_POINTER)) == LFS_POINTER:
        _bytes(path)


def _parsed(raw: bytes, path: Path, line: int) -> object:
    """JSON that begins on this line."""
    place = f" line {line}"
    if raw.startswith(b"\xef\xbb\xbf"):
        _refuse(path, place, "begins with a byte order mark; save the file as UTF-8 without one")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        _refuse(path, place, "is UTF-16; save the file as UTF-8")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character
        return value
    except UnicodeEncodeError:
        _refuse(path, place, "holds half a surrogate pair, which is no character")
    except UnicodeDecodeError as error:
        _refuse(path, place, f"is not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        _refuse(path, f" line {line + error.lineno - 1}", f"is not whole JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        _refuse(path, place, "is nested too deeply")
    except ValueError as error:
        _refuse(path, place, str(error))


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has the field {twice!r} twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")


def _checked(schema: type[R], value: object, path: Path, place: str) -> R:
    if not isinstance(value, Mapping):
        _refuse(path, place, f"holds a {_kind(value)}; an object with {_names(schema)} is expected")
    try:
        return schema.model_validate(value)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    if error["type"] == "missing":
        _refuse(path, place, f"has no field {field!r}")
    message = error["msg"].removeprefix("Value error, ")
    where = f"field {field!r}: " if field else ""
    _refuse(path, place, f"{where}{message[0].lower() + message[1:]}; got {_shown(error['input'])}")


def _names(schema: type[Row]) -> str:
    return ", ".join(info.alias or name for name, info in schema.model_fields.items())


def _kind(value: object) -> str:
    return {list: "list", dict: "object", str: "text", int: "number", float: "number", bool: "truth value"}.get(
        type(value), "null"
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(path: Path, place: str, what: str) -> NoReturn:
    raise UserError(f"{path}{place} {what}")
