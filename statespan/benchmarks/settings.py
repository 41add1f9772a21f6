"""What every benchmark's settings share: pydantic checks, one seed, and draws that no other sample can disturb."""

from __future__ import annotations

import hashlib
import json
from random import Random
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from statespan.benchmarks.base import Benchmark
from statespan.benchmarks.haystack import SEGMENTS
from statespan.errors import UserError, unknown

Length = Annotated[int, Field(ge=16, le=16_777_216)]
"""A prompt's length in tokens."""

Lengths = Annotated[tuple[Length, ...], Field(min_length=1)]

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseModel, Benchmark):
    """A benchmark whose fields are the settings a study file may give."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seed: int = Field(default=0, ge=0)
    """Same seed, same samples. Nothing else enters a draw but the sample's own place (length, depth, trial), so that
    adding lengths or trials leaves every older sample as it was."""

    def rng(self, *place: str | int | float) -> Random:
        """A generator for one sample, from the seed, the benchmark's name and the sample's place."""
        key = json.dumps([self.seed, self.name, *place])
        return Random(int.from_bytes(hashlib.sha256(key.encode()).digest()))

    def segment(self, trial: int, *cell: str | int | float) -> int:
        """Which part of a haystack this trial's text begins in: a cell takes every part once before one comes twice."""
        order = list(range(SEGMENTS))
        self.rng("segments", *cell, trial // SEGMENTS).shuffle(order)
        return order[trial % SEGMENTS]

    @classmethod
    def build(cls, settings: object) -> Self:
        """The benchmark with these settings; a UserError names the first setting that is wrong."""
        try:
            return cls.model_validate(settings)
        except ValidationError as invalid:
            raise _first_error(cls, invalid) from None


def _first_error(cls: type[Settings], invalid: ValidationError) -> UserError:
    error = invalid.errors(include_url=False)[0]
    place = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return unknown(f"setting of benchmark {cls.name}", place[-1], cls.model_fields)
    where = ".".join([cls.name, *place])
    message = error["msg"].removeprefix("Value error, ")
    got = f"; got {_short(error['input'])}" if place else ""
    return UserError(f"{where}: {message[0].lower() + message[1:]}{got}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
