"""`statespan compare A B`: two configurations on the samples both have met."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from statespan.orchestration.paired import Comparison
    from statespan.orchestration.study_data import StudyData

REFERENCE = "STUDY (its winner), STUDY/vanilla or STUDY/t0007; STUDY is a name below --output or a folder."


def compare(
    a: Annotated[str, typer.Argument(help=REFERENCE)],
    b: Annotated[str, typer.Argument(help=REFERENCE)],
    split: Annotated[str, typer.Option(help="heldout, or search: samples on which trials were chosen.")] = "heldout",
    output: Annotated[Path, typer.Option(help="Folder of the studies.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare two configurations, paired on the samples both were evaluated on: gain of A over B, interval, test.

    Exit 0 where they differ, 2 where the samples do not decide.

    Example: statespan compare quickstart quickstart/vanilla
    """
    from statespan.errors import unknown
    from statespan.orchestration.paired import Samples, difference_bounds, holm_corrected
    from statespan.orchestration.paired import compare as judge
    from statespan.orchestration.verdict import gain_text

    if split not in ("heldout", "search"):
        raise unknown("split", split, ("heldout", "search"))
    study, ids = _side_by_side(a, b, output)
    samples = Samples(study)
    pairs = samples.pair(*ids, "heldout" if split == "heldout" else "search")
    if not len(pairs.gains):
        _none_in_common(a, b, split)
    cuts = [("all lengths", pairs)] + [
        (f"length {length:,}", pairs.where(pairs.lengths == length)) for length in sorted(set(pairs.lengths.tolist()))
    ]
    bounds = difference_bounds(study)
    whole, *by_length = [judge(part, what, bounds=bounds, alpha=study.alpha, seed=study.seed) for what, part in cuts]
    found = [whole, *(one for one in holm_corrected(by_length) if one is not None)]
    decided = found[0].p <= study.alpha
    if as_json:
        rows = [_row(one) for one in found]
        typer.echo(json.dumps({"a": a, "b": b, "split": split, "decided": decided, "comparisons": rows}))
    else:
        typer.echo(f"{a} minus {b}, {split} samples")
        for one in found:
            typer.echo(f"  {one.what:<16} {one.gain.samples:>5} samples  {gain_text(study, one)}")
    raise typer.Exit(0 if decided else 2)


def _side_by_side(a: str, b: str, output: Path) -> tuple[StudyData, tuple[str, str]]:
    """One StudyData that holds both trials, and their ids in it."""
    from dataclasses import replace

    import pyarrow as pa
    import pyarrow.compute as pc

    from statespan.errors import UserError
    from statespan.orchestration.assemble import load_study_data, study_folder

    tables, studies = [], []
    for side, reference in (("A", a), ("B", b)):
        name, trial = _parts(reference, output)
        study = load_study_data(study_folder(name, output))
        wanted = trial or study.winner_id
        if wanted is None:
            raise UserError(f"{reference}: this study has no winner yet; name a trial, such as {name}/t0000")
        rows = study.samples.filter(pc.equal(study.samples["trial_id"], wanted))
        if rows.num_rows == 0:
            known = ", ".join(trial.id for trial in study.trials[:8])
            raise UserError(f"{reference}: no results of trial {wanted!r}; there are {known} …")
        ids = pa.array([side] * rows.num_rows, pa.string())
        tables.append(rows.set_column(rows.schema.get_field_index("trial_id"), "trial_id", ids))
        studies.append(study)
    both = pa.concat_tables(tables)
    return replace(studies[0], samples=both), ("A", "B")


def _parts(reference: str, output: Path) -> tuple[str, str | None]:
    """STUDY or STUDY/TRIAL; a folder may have slashes of its own."""
    head, _, tail = reference.rpartition("/")
    if head and (tail == "vanilla" or (tail.startswith("t") and tail[1:].isdigit())):
        return head, tail
    return reference, None


def _none_in_common(a: str, b: str, split: str) -> None:
    from statespan.errors import UserError

    raise UserError(
        f"{a} and {b} have no {split} sample in common; held-out samples are evaluated for vanilla, the winner and the "
        "runner-up only (try --split search)"
    )


def _row(one: Comparison) -> dict[str, Any]:
    numbers = {
        "gain": one.gain.mean,
        "low": one.gain.low,
        "high": one.gain.high,
        "p": one.p,
        "p_corrected": one.p_corrected,
    }
    return {"what": one.what, "samples": one.gain.samples, **{key: _number(value) for key, value in numbers.items()}}


def _number(value: float) -> Any:
    return None if math.isnan(value) else value
