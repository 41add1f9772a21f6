"""OPRM's parameters and what must hold of them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from statespan.methods.base import Params


class OPRMParams(Params):
    method: ClassVar[str] = "oprm"

    chunk_tokens: int | None = Field(default=None, ge=16)
    """Context tokens a chunk; by default what the training length leaves beside head and question."""

    head_tokens: int = Field(default=0, ge=0)
    """The prompt's first tokens, an instruction, that stand before every chunk."""

    question_tokens: int = Field(default=64, ge=1)
    """The prompt's last tokens, the question, that stand behind every chunk."""

    overlap: float = Field(default=0.0, ge=0.0, le=0.9)
    """Share of a chunk that the next one repeats."""

    refusals: tuple[int, ...] = ()
    """Token ids that say the answer is not there; a chunk whose likeliest first token is one is left out."""
