"""Analysing a model: which texts and lengths, where the result lies, and what is read again instead of measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from statespan.analysis.facts import Analysis, summarize
from statespan.analysis.measure import Progress, measure
from statespan.benchmarks.books import read_books
from statespan.errors import UserError
from statespan.methods.artifacts import cache_folder
from statespan.methods.base import ModelFacts
from statespan.models.checkpoint import Loaded

MULTIPLES = (1, 2, 4, 8, 16)
"""Of the training length: where a model is measured by default."""

TEXT = "persuasion"
"""A shipped novel that no benchmark asks about."""

MAPPED = 12
"""Layers whose attention is drawn by default, at most."""


def analyse(
    loaded: Loaded,
    *,
    train_length: int | None = None,
    lengths: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    text: str = TEXT,
    texts: int = 2,
    on_progress: Progress = lambda _: None,
) -> Analysis:
    """Measure a model on stretches of a text.

    Args:
        loaded: the model; its matrices in float32.
        train_length: tokens it was trained on, where its config.json does not say.
        lengths: tokens at which to measure; the training length is always among them, and none below it.
        layers: whose attention to draw; by default all of few, or some evenly spaced.
        text: a shipped text's name or a file.
        texts: how many stretches of it.
        on_progress: called with a word on what was done.
    """
    facts = ModelFacts.of(loaded, train_length)
    if facts.train_length is None:
        raise UserError(f"{loaded.name} does not say what length it was trained on; give --train-length, in tokens")
    at = sorted({facts.train_length, *(lengths or (facts.train_length * one for one in MULTIPLES))})
    if at[0] < facts.train_length:
        raise UserError(f"--lengths must be at least the training length, {facts.train_length:,}; got {at[0]:,}")
    ids = loaded.tokenizer.encode("\n\n".join(book.text for book in read_books(text, None)))
    if layers is None:
        count = min(facts.n_layer, MAPPED)
        layers = sorted({round(i * (facts.n_layer - 1) / max(count - 1, 1)) for i in range(count)})
    measured = measure(loaded.model, _stretches(ids, texts, at[-1], text), at, layers, on_progress)
    return summarize(measured, facts, loaded.name, text)


def _stretches(ids: Sequence[int], count: int, length: int, name: str) -> list[list[int]]:
    """Evenly spread over the text, without overlap; fewer where it is too short for all."""
    if len(ids) < length:
        raise UserError(f"{name} has {len(ids):,} tokens; --lengths up to {length:,} need a longer text (--text FILE)")
    count = min(count, len(ids) // length)
    return [list(ids[start : start + length]) for start in (i * (len(ids) // count) for i in range(count))]


def places(facts: ModelFacts) -> list[Path]:
    """Where a model's analysis may lie: with the checkpoint, or in the user's cache."""
    own = [] if facts.folder is None else [facts.folder / "artifacts" / "analysis.json"]
    return [*own, cache_folder(facts) / "analysis.json"]


def save(analysis: Analysis, path: Path) -> None:
    """Write the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(analysis.to_json()) + "\n")
    os.replace(temporary, path)


def known_analysis(facts: ModelFacts) -> Analysis | None:
    """What was measured before of these weights at this training length."""
    for path in places(facts):
        if path.is_file():
            found = Analysis.read(path)
            if found.digest == facts.digest and found.train_length == facts.train_length:
                return found
    return None


def analysis_of(facts: ModelFacts, model: str, revision: str | None = None) -> Analysis:
    """A model's analysis: what was measured before, or measured now (a minute or two) and kept in the user's cache."""
    from statespan.models.checkpoint import load_model

    if (found := known_analysis(facts)) is not None:
        return found
    made = analyse(load_model(model, dtype="float32", revision=revision), train_length=facts.train_length)
    save(made, places(facts)[-1])
    return made
