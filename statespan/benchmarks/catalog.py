"""Where every outside data set lies below one data_root, and where it comes from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from statespan.errors import UserError, unknown

FIXTURES = Path(__file__).parent / "fixtures"
"""Self-written rows in every data set's exact schema: a data_root for tests."""

ENVIRONMENT = "STATESPAN_DATA"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """One data set. `files` are glob patterns below data_root; the first that matches is used, and {part} is one of the
    data set's own parts."""

    files: tuple[str, ...]
    what: str


def _split(stem: str) -> tuple[str, ...]:
    return f"{stem}.parquet", f"{stem}.jsonl"


DATA_SETS: dict[str, DataSet] = {
    "pg19": DataSet(
        files=("pg19/test.parquet", "pg19/test.jsonl", "pg19/test/*.txt"), what="PG-19, the test split's 100 books"
    ),
    "wikitext": DataSet(
        files=tuple(f"wikitext/wikitext-2-raw-v1/test.{kind}" for kind in ("parquet", "jsonl", "txt")),
        what="WikiText-2 raw, test split",
    ),
    "hellaswag": DataSet(files=_split("hellaswag/validation"), what="HellaSwag, validation split"),
    "piqa": DataSet(files=_split("piqa/validation"), what="PIQA, validation split"),
    "arc_easy": DataSet(files=_split("arc_easy/test"), what="ARC-Easy, test split"),
    "arc_challenge": DataSet(files=_split("arc_challenge/test"), what="ARC-Challenge, test split"),
    "winogrande": DataSet(files=_split("winogrande/validation"), what="WinoGrande XL, validation split"),
    "openbookqa": DataSet(files=_split("openbookqa/test"), what="OpenBookQA main, test split"),
    "longbench": DataSet(
        files=("longbench/data/{part}.jsonl", "longbench/data/{part}.parquet"), what="LongBench and LongBench-E (_e)"
    ),
    "leval": DataSet(files=("leval/{part}.jsonl",), what="L-Eval's closed-ended tasks"),
    "squad": DataSet(
        files=("squad/dev-v2.0.json", "squad/validation.parquet", "squad/validation.jsonl"),
        what="SQuAD v2, development set",
    ),
    "hotpotqa": DataSet(
        files=("hotpotqa/hotpot_dev_distractor_v1.json",), what="HotpotQA, development set, distractor setting"
    ),
}


def data_folder(data_root: Path | str | None) -> Path | None:
    """The setting, or the environment variable; `fixtures` is the folder of sample rows that ships."""
    given = str(data_root) if data_root else os.environ.get(ENVIRONMENT, "")
    if given == "fixtures":
        return FIXTURES
    return Path(given).expanduser() if given else None


def locate(name: str, data_root: Path | str | None, part: str = "") -> list[Path]:
    """The files of a data set, sorted. Raises UserError where there are none."""
    if name not in DATA_SETS:
        raise unknown("data set", name, DATA_SETS)
    folder = data_folder(data_root)
    wanted = [pattern.format(part=part) for pattern in DATA_SETS[name].files]
    if folder is None:
        raise UserError(
            f"{name} needs your copy of the data: give data_root or set {ENVIRONMENT} to a folder with {wanted[0]} "
            "(docs/data.md); data_root: fixtures runs on a few sample rows"
        )
    for pattern in wanted:
        if found := sorted(folder.glob(pattern)):
            return found
    raise UserError(f"no {' or '.join(wanted)} in {folder}; `statespan data fetch {name}` brings it (docs/data.md)")
