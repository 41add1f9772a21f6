"""SQLite files that are there with all their tables or not at all.

MLflow and Optuna make a new file's tables one by one. A process that is killed meanwhile leaves a file that MLflow can
neither use nor repair. So the tables are made under a temporary name, and the file gets its own only when it is whole.

MLflow makes its tables by all the migrations it ever had, 3 seconds of CPU. Of each version an empty database is kept
in the user's cache folder and copied for the next output folder.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

PREFIX = "sqlite:///"


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL; None for another database."""
    return Path(url.removeprefix(PREFIX)) if url.startswith(PREFIX) else None


def make_whole(url: str, create: Callable[[str], None]) -> None:
    """Have `create` make the database of a URL, where that is a SQLite file that is not there yet."""
    path = sqlite_file(url)
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        create(f"{PREFIX}{temporary}")
        try:
            os.link(temporary, path)  # unlike a rename, it leaves what another study has made meanwhile
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)


def copied(url: str, name: str, create: Callable[[str], None]) -> None:
    """Have a SQLite file made by copying the empty database that is kept under this name; `create` makes that one, and
    this one where nothing can be kept."""
    path = sqlite_file(url)
    assert path is not None, "only a file can be copied"
    kept = _cache_folder() / f"{name}.db"
    if _readable(kept):
        shutil.copyfile(kept, path)
        return
    create(url)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
        shutil.copyfile(path, temporary)
        os.replace(temporary, kept)


def _cache_folder() -> Path:
    own = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(own) / "statespan" / "databases"


def _readable(path: Path) -> bool:
    if not path.is_file():
        return False
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return bool(database.execute("PRAGMA quick_check").fetchone() == ("ok",))
    return False
