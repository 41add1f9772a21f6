"""`statespan calibrate MODEL`: record a model's step sizes, for LongMamba and UPI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    model: Annotated[str, typer.Argument(help="A shipped name, a checkpoint folder or a hub id.")],
    text: Annotated[
        str, typer.Option(help="A shipped text, or a .txt, .jsonl or .parquet file of yours like the training data.")
    ] = "persuasion",
    sequences: Annotated[int, typer.Option(min=1, help="How many stretches of the text are read.")] = 20,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of each; by default the length the model was trained on.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Keep all ordered steps: any length and clamp share, a large file.")
    ] = False,
    published_grid: Annotated[
        bool, typer.Option("--published-grid", help="Thresholds at the authors' 25 lengths, 1,000 … 192,000 tokens.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File to write; by default beside the checkpoint.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for other programs.")] = False,
) -> None:
    """Record the step sizes of the unmodified model on texts of its training length, for LongMamba's thresholds.

    Example: statespan calibrate mamba1-5m --sequences 20
    """
    from statespan.benchmarks.books import read_books
    from statespan.errors import UserError
    from statespan.methods import artifacts
    from statespan.methods.base import ModelFacts
    from statespan.methods.calibration import AUTHORS_GRID, cut_sequences
    from statespan.methods.calibration import calibrate as record
    from statespan.methods.calibration_files import to_tensors
    from statespan.models.checkpoint import load_model
    from statespan.models.device import resolve_device
    from statespan.models.runner import Runner

    loaded = load_model(model, dtype="float32", device=resolve_device(device))
    facts = ModelFacts.of(loaded, length)
    if facts.train_length is None:
        raise UserError(f"{model} does not say what length it was trained on; give --length, in tokens")
    ids = loaded.tokenizer.encode("\n\n".join(book.text for book in read_books(text, None)))
    chosen = cut_sequences(ids, sequences, facts.train_length)
    with typer.progressbar(length=len(chosen), label="recording", file=typer.get_text_stream("stderr")) as bar:
        found = record(
            Runner(loaded.model),
            chosen,
            lengths=AUTHORS_GRID if published_grid else None,
            exact=exact,
            on_progress=lambda done, total: bar.update(1),
        )
    path = out or artifacts.writable_place(facts, "longmamba")
    artifacts.write(path, to_tensors(found), facts, {"text": text, "sequences": str(sequences), "dtype": "float32"})
    size = path.stat().st_size
    report = {
        "file": str(path),
        "bytes": size,
        "layers": facts.n_layer,
        "channels": facts.channels,
        "length": facts.train_length,
    }
    typer.echo(json.dumps(report) if as_json else f"{path}: {size / 1e6:.1f} MB, {sequences} sequences of {text}")
