"""Read every data set under a data_root as its benchmark would: what is there, what is missing, what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from statespan.benchmarks import leval
from statespan.benchmarks.books import read_files, read_wikitext
from statespan.benchmarks.catalog import DATA_SETS, data_folder, locate
from statespan.benchmarks.choice_tasks import CHOICE_TASKS
from statespan.benchmarks.longbench import EXTENDED
from statespan.benchmarks.longbench_data import read_prompts, rows_of
from statespan.benchmarks.longbench_tasks import TASKS
from statespan.benchmarks.records import Row, provenance, read_document, read_rows
from statespan.benchmarks.ruler_qa import qa_items
from statespan.benchmarks.squad import read_squad
from statespan.errors import UserError, unknown

SOURCE = "SOURCE.json"
"""Beside a fetched data set: its sources, and what its files were."""


class FetchedFile(Row):
    file: str
    sha256: str


class Fetched(Row):
    """What is read of SOURCE.json."""

    files: list[FetchedFile]


@dataclass(frozen=True, slots=True)
class Checked:
    name: str
    status: Literal["ok", "missing", "bad"]
    files: tuple[dict[str, Any], ...] = ()
    """Name, bytes, sha256 and rows of each file found."""

    problem: str = ""
    """What is wrong or missing, in one line."""

    missing_parts: tuple[str, ...] = field(default=())
    """Parts of a data set (LongBench's tasks) that are not there; the others were read."""


def check(names: Iterable[str] | None, data_root: str | None) -> list[Checked]:
    """One result a data set, in the catalogue's order; all of them where no names are given."""
    wanted = list(DATA_SETS) if names is None else list(names)
    refuse_unknown(wanted)
    if data_folder(data_root) is None:
        locate(wanted[0], data_root)  # says how to name a data_root
    return [_check(name, data_root) for name in wanted]


def refuse_unknown(names: Iterable[str]) -> None:
    for name in names:
        if name not in DATA_SETS:
            raise unknown("data set", name, DATA_SETS)


def _check(name: str, data_root: str | None) -> Checked:
    parts = PARTS.get(name, ("",))
    present = {part: found for part in parts if (found := _found(name, part, data_root))}
    if not present:
        return Checked(name, "missing", problem=_problem(lambda: locate(name, data_root, part=parts[0])))
    try:
        _refuse_changed(name, [path for paths in present.values() for path in paths], data_root)
        rows = {part: READERS[name](part, data_root) for part in present}
        if name == "longbench":
            read_prompts("auto", (), data_root)
    except UserError as error:
        return Checked(name, "bad", problem=str(error))
    files = tuple(
        provenance(path) | ({"rows": rows[part]} if len(paths) == 1 else {})
        for part, paths in present.items()
        for path in paths
    )
    return Checked(name, "ok", files, missing_parts=tuple(part for part in parts if part not in present))


def _refuse_changed(name: str, paths: Sequence[Path], data_root: str | None) -> None:
    """A fetched file must still be what was fetched; one that was copied there by hand is taken as it is."""
    folder = data_folder(data_root)
    assert folder is not None
    note = folder / name / SOURCE
    if not note.is_file():
        return
    fetched = {file.file: file.sha256 for file in read_document(note, Fetched).files}
    for path in paths:
        wanted, got = fetched.get(path.relative_to(folder).as_posix()), provenance(path)["sha256"]
        if wanted is not None and got != wanted:
            raise UserError(
                f"{path} has sha256 {got[:12]}..., {wanted[:12]}... was fetched; fetch it again, "
                f"or remove {note} if the change is yours"
            )


def _found(name: str, part: str, data_root: str | None) -> Sequence[Path]:
    try:
        return locate(name, data_root, part=part)
    except UserError:
        return ()


def _problem(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    raise AssertionError("nothing is missing")


def _longbench(part: str, data_root: str | None) -> int:
    return len(rows_of(part.removesuffix("_e"), part.endswith("_e"), data_root))


def _leval(part: str, data_root: str | None) -> int:
    (path,) = locate("leval", data_root, part=part)
    return len(read_rows(path, leval.SciFiRow if part == "sci_fi" else leval.LEvalRow))


def _choices(name: str) -> Callable[[str, str | None], int]:
    def read(part: str, data_root: str | None) -> int:
        (path,) = locate(name, data_root)
        return len(read_rows(path, CHOICE_TASKS[name].schema))

    return read


PARTS: dict[str, tuple[str, ...]] = {
    "longbench": (*TASKS, *(f"{name}_e" for name in EXTENDED)),
    "leval": get_args(leval.Task),
}

READERS: dict[str, Callable[[str, str | None], int]] = {
    "pg19": lambda part, root: len(list(read_files(locate("pg19", root)))),
    "wikitext": lambda part, root: len(read_wikitext(root).text.splitlines()),
    "squad": lambda part, root: len(read_squad(root)),
    "hotpotqa": lambda part, root: len(qa_items("qa_2", root)[0]),
    "longbench": _longbench,
    "leval": _leval,
    **{name: _choices(name) for name in CHOICE_TASKS},
}
