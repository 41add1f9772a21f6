"""SQLite files that are there with all their tables or not at all.

MLflow and Optuna make a new file's tables one by one. A process that is killed meanwhile leaves a file that MLflow can
neither use nor repair. So the tables are made under a temporary name, and the file gets its own only when it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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
