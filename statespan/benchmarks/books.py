"""Long texts by name: the novels that ship, PG-19 from your data_root, or any text files of yours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from statespan.benchmarks.catalog import locate
from statespan.benchmarks.data import TEXTS, load_text
from statespan.benchmarks.haystack import Haystack
from statespan.benchmarks.records import Row, provenance, read_rows, read_text
from statespan.errors import UserError

NOVELS = ("emma", "mansfield_park")
"""The held-out books that perplexity is measured on; persuasion served validation, moby_dick is haystack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    name: str
    text: str = field(repr=False)
    path: Path | None = None
    """None for a text that ships."""

    def provenance(self) -> dict[str, Any]:
        known = {"book": self.name, "characters": len(self.text)}
        if self.path:
            return known | provenance(self.path)
        return known | {"file": f"shipped:{self.name}", "sha256": hashlib.sha256(self.text.encode()).hexdigest()}


class LineRow(Row):
    """A line of WikiText; many are empty."""

    text: str


class BookRow(Row):
    """What is read of a PG-19 row."""

    text: Annotated[str, Field(min_length=1)]


def read_books(name: str, data_root: Path | str | None) -> Iterator[Book]:
    """`novels`, a shipped text's name, `pg19` or `wikitext` (from data_root), or a text file or folder of yours."""
    if name == "novels":
        yield from (Book(name=novel, text=load_text(novel)) for novel in NOVELS)
    elif name in TEXTS:
        yield Book(name=name, text=load_text(name))
    elif name == "wikitext":
        yield read_wikitext(data_root)
    else:
        yield from read_files(_files(name, data_root))


def read_haystack(name: str, data_root: Path | str | None) -> Haystack:
    """All books of that name as one text; a shipped one is cut into words once a process."""
    if name in TEXTS:
        return _shipped_haystack(name)
    return Haystack(Path(name).stem, "\n\n".join(book.text for book in read_books(name, data_root)))


@cache
def _shipped_haystack(name: str) -> Haystack:
    return Haystack(name, load_text(name))


def _files(name: str, data_root: Path | str | None) -> list[Path]:
    if name == "pg19":
        return locate(name, data_root)
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        known = ", ".join(["novels", *TEXTS, "pg19", "wikitext"])
        raise UserError(f"no book {name!r}; there are: {known}, or give a .txt, .jsonl or .parquet file or a folder")
    found = sorted(p for suffix in ("txt", "jsonl", "parquet") for p in path.glob(f"*.{suffix}"))
    if not found:
        raise UserError(f"the folder {path} holds no .txt, .jsonl or .parquet file")
    return found


def read_wikitext(data_root: Path | str | None) -> Book:
    """All articles of the test split as one text; the published haystack of passkey retrieval."""
    (path,) = locate("wikitext", data_root)
    if path.suffix == ".txt":
        (book,) = _read_file(path)
        return book
    text = "".join(row.text for row in read_rows(path, LineRow))
    if not text.strip():
        raise UserError(f"{path} holds no text")
    return Book(name="wikitext", text=text, path=path)


def read_files(paths: Iterable[Path]) -> Iterator[Book]:
    for path in paths:
        yield from _read_file(path)


def _read_file(path: Path) -> Iterator[Book]:
    if path.suffix != ".txt":
        for number, row in enumerate(read_rows(path, BookRow), start=1):
            yield Book(name=f"{path.stem}-{number}", text=row.text, path=path)
        return
    yield Book(name=path.stem, text=read_text(path), path=path)
