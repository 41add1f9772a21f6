"""LongBench's files: the rows of each data set, and the official prompts where the user has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AliasChoices, ConfigDict, Field, StringConstraints

from statespan.benchmarks.catalog import data_folder, locate
from statespan.benchmarks.longbench_tasks import TASKS
from statespan.benchmarks.records import Row, read_document, read_rows, refuse_repeated
from statespan.errors import UserError

T = TypeVar("T")

BUCKETS = ("0-4k", "4-8k", "8k+")
"""By a row's `length`, which counts words (characters in Chinese): below 4,000, below 8,000, the rest."""


class LongBenchRow(Row):
    id: Annotated[str, Field(alias="_id", min_length=1)]
    input: Annotated[str, Field(validation_alias=AliasChoices("input", "question"))]
    """Called `question` in the hub's parquet copies."""

    context: str
    answers: Annotated[list[str], Field(min_length=1)]
    length: Annotated[int, Field(ge=0)]
    all_classes: list[str] | None

    @property
    def bucket(self) -> str:
        return BUCKETS[(self.length >= 4_000) + (self.length >= 8_000)]


class ClassificationRow(LongBenchRow):
    all_classes: Annotated[list[str], Field(min_length=1)]


class RetrievalRow(LongBenchRow):
    answers: Annotated[list[Annotated[str, StringConstraints(pattern=r"^(Paragraph |段落)\d+")]], Field(min_length=1)]


SCHEMAS = {"classification": ClassificationRow, "retrieval": RetrievalRow, "retrieval_zh": RetrievalRow}


def rows_path(name: str, extended: bool, data_root: str | None) -> Path:
    (path,) = locate("longbench", data_root, part=f"{name}_e" if extended else name)
    return path


def rows_of(name: str, extended: bool, data_root: str | None) -> list[LongBenchRow]:
    path = rows_path(name, extended, data_root)
    rows = read_rows(path, SCHEMAS.get(TASKS[name].metric, LongBenchRow))
    refuse_repeated(path, "_id", [row.id for row in rows])
    return rows


class OfficialPrompts(Row):
    """dataset2prompt.json: a template a data set."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]


class OfficialLengths(Row):
    """dataset2maxlen.json: how many tokens to generate."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]


@dataclass(frozen=True, slots=True)
class Prompts:
    kind: Literal["own", "official"]
    templates: Mapping[str, str]
    new_tokens: Mapping[str, int]
    files: tuple[Path, ...] = ()

    def fill(self, name: str, row: LongBenchRow) -> str:
        try:
            return self.templates[name].format(input=row.input, context=row.context)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"{self.files[0]}: the prompt of {name} cannot be filled in: {error}") from None


OWN = Prompts(
    "own", {name: task.prompt for name, task in TASKS.items()}, {name: task.new_tokens for name, task in TASKS.items()}
)


def read_prompts(wanted: Literal["auto", "official", "own"], names: Sequence[str], data_root: str | None) -> Prompts:
    folder = data_folder(data_root)
    config = folder / "longbench" / "config" if folder else None
    if wanted == "own" or (wanted == "auto" and not (config and (config / "dataset2prompt.json").is_file())):
        return OWN
    if config is None:
        raise UserError("longbench: prompts: official needs a data_root with longbench/config/ (docs/data.md)")
    files = config / "dataset2prompt.json", config / "dataset2maxlen.json"
    templates = _named(files[0], read_document(files[0], OfficialPrompts).__pydantic_extra__, names)
    new_tokens = _named(files[1], read_document(files[1], OfficialLengths).__pydantic_extra__, names)
    return Prompts("official", templates, new_tokens, files)


def _named(path: Path, found: dict[str, T], names: Sequence[str]) -> dict[str, T]:
    for name in names:
        if name not in found:
            raise UserError(f"{path} has nothing for the data set {name!r}")
    return found
