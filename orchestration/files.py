"""Files that are there whole or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class DiskFull(OSError):
    """No space for a result. The study stops; nothing that was written is lost."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file durably. Raises DiskFull where there is no space; the old file, if any, is then untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(error.errno, f"no space left to write {path}") from error
        raise


def write_if_changed(path: Path, data: bytes) -> None:
    """Leave a file that holds this already as old as it is, so that what is made from it is seen to be up to date."""
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


def sweep_up(folder: Path) -> None:
    """Remove what a process that was killed had not finished writing."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_if_changed(path, (json.dumps(value, indent=1, allow_nan=True) + "\n").encode())


def read_json(path: Path) -> Any | None:
    """The value of a JSON file, or None where it is not there or cut short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def write_table(table: pa.Table, path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_if_changed(path, sink.getvalue().to_pybytes())


def read_table(path: Path) -> pa.Table | None:
    """A Parquet file, or None where it is not there or cut short."""
    try:
        return pq.ParquetFile(path, pre_buffer=False).read(use_threads=False)  # files are small
    except (FileNotFoundError, pa.ArrowInvalid, OSError):
        return None
