"""StudyData from a study's folder: what report, compare, gate and the verdict read. Needs no torch, Ray or Optuna."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from statespan.errors import UserError
from statespan.orchestration.files import read_json, read_table
from statespan.orchestration.items import BASELINE
from statespan.orchestration.journal import Asked, Journal, Told
from statespan.orchestration.ledger import Ledger
from statespan.orchestration.study_data import SAMPLE_COLUMNS, BenchmarkFacts, RungResult, StudyData, TrialData

FACTS = "facts.json"
CHOICE = "choice.json"


def study_folder(target: str, output: Path = Path("runs")) -> Path:
    """A study's folder from its path or its name below `output`."""
    for folder in (Path(target), output / target):
        if (folder / FACTS).is_file():
            return folder
    known = sorted(path.parent.name for path in output.glob(f"*/{FACTS}"))
    raise UserError(f"no study at {target!r}; studies in {output}: {', '.join(known) or 'none'}")


def load_study_data(folder: Path) -> StudyData:
    """Everything that is known of a study, finished or running."""
    facts = read_json(folder / FACTS)
    if facts is None:
        raise UserError(f"{folder} holds no study that began: run `statespan sweep` first")
    settings = yaml.safe_load((folder / "study.yaml").read_text())
    choice = read_json(folder / CHOICE) or {}
    trials = Journal(folder / "search", facts["version"]).trials()
    baseline = TrialData(id=BASELINE, number=-1, method="vanilla", params={}, state="complete")
    return StudyData(
        name=settings["study"],
        settings=settings,
        model=facts["model"],
        train_length=facts["train_length"],
        benchmarks=[BenchmarkFacts(**one) for one in facts["benchmarks"]],
        trials=[baseline, *(trial_data(asked, told) for asked, told in trials)],
        samples=sample_table(
            Ledger(folder / "ledger"), {BASELINE, *(asked.id for asked, _ in trials)}, folder / "samples.parquet"
        ),
        baseline_id=BASELINE,
        winner_id=choice.get("winner_id"),
        runner_up_id=choice.get("runner_up_id"),
        provenance=facts["provenance"] | choice.get("provenance", {}),
        serve_command=f"statespan serve {folder}" if choice.get("winner_id") else "",
        links=facts["links"],
        margin=settings["selection"]["margin"],
        alpha=settings["selection"]["alpha"],
        seed=settings["search"]["seed"],
    )


def trial_data(asked: Asked, told: Told | None) -> TrialData:
    return TrialData(
        id=asked.id,
        number=asked.number,
        method=asked.method,
        params=asked.params,
        state=cast(Any, told.state) if told else "running",
        rungs=[rung_result(one) for one in (told.rungs if told else ())],
        message=told.message if told else "",
        published=asked.origin == "published",
        wall_seconds=told.wall_seconds if told else float("nan"),
    )


def rung_result(record: Mapping[str, Any]) -> RungResult:
    names = ("rung", "samples", "score", "decision", "reason", "p", "incumbent_id")
    return RungResult(**{name: record[name] for name in names})


def sample_table(ledger: Ledger, trial_ids: set[str], samples: Path) -> pa.Table:
    """The ledger's rows of these trials on the study's samples as SAMPLE_COLUMNS.

    A study that was made smaller keeps the rows of samples it no longer asks for; they do not count. Text and times of
    a reused result are its computation's.
    """
    rows = ledger.read()
    rows = rows.filter(pc.is_in(rows["trial_id"], value_set=pa.array(sorted(trial_ids), pa.string())))
    if (asked := read_table(samples)) is not None:
        wanted = _places(asked["task"], asked["id"], asked["split"])
        rows = rows.filter(pc.is_in(_places(rows["task"], rows["sample_id"], rows["split"]), value_set=wanted))
    computed = pc.equal(rows["origin"], "computed")
    total = pc.add(rows["layer_tokens"], rows["layer_tokens_shared"])
    share = pc.divide(pc.cast(rows["layer_tokens"], pa.float64()), pc.cast(pc.max_element_wise(total, 1), pa.float64()))
    partly = pc.greater(rows["layer_tokens_shared"], 0)
    alone = pc.divide(rows["prefill_seconds"], share)  # as long as the prompt would have taken with nothing shared
    scaled = pc.if_else(pc.and_(computed, pc.greater(share, 0.0)), alone, rows["prefill_seconds"])
    rows = rows.set_column(rows.schema.get_field_index("prefill_seconds"), "prefill_seconds", scaled)
    columns: dict[str, Any] = {
        "benchmark": rows["task"],
        "prefill_seconds": _filled(rows, "prefill_seconds"),
        "decode_seconds": _filled(rows, "decode_seconds"),
        "peak_bytes": _filled(rows, "peak_bytes"),
        "tokens_new": _filled(rows, "tokens_new"),
        "text": _filled(rows, "text"),
        "cached": pc.equal(rows["origin"], "reused"),
        "shared": pc.or_(partly, pc.is_in(rows["origin"], value_set=pa.array(["vanilla", "twin"]))),
        "computed_share": pc.if_else(computed, share, 0.0),
    }
    arrays = [
        pc.cast(columns[name] if name in columns else rows[name], kind)
        for name, kind in zip(SAMPLE_COLUMNS.names, SAMPLE_COLUMNS.types, strict=True)
    ]
    return pa.table(arrays, schema=SAMPLE_COLUMNS)


def _places(task: pa.ChunkedArray, sample: pa.ChunkedArray, split: pa.ChunkedArray) -> pa.ChunkedArray:
    """(task, sample, split) of each row as one string."""
    parts = [pc.cast(part, pa.string()) for part in (task, sample, split)]
    return pc.binary_join_element_wise(*parts, "\x00")


def _filled(rows: pa.Table, name: str) -> pa.ChunkedArray:
    """A column in which rows that were taken from elsewhere have what was computed for their key."""
    if rows.num_rows == 0 or rows[name].null_count == 0:
        return rows[name]
    source = rows.filter(pc.is_valid(rows[name]))
    place = pc.index_in(rows["key"], value_set=source["key"])
    return pc.coalesce(rows[name], source[name].take(place))


def setting_line(method: str, params: Mapping[str, Any]) -> str:
    """A setting in one line."""
    inside = ", ".join(f"{name}={_plain(value)}" for name, value in params.items())
    return f"{method}({inside})" if inside else method


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def best_first(trials: Sequence[tuple[Asked, Told | None]]) -> list[tuple[Asked, Told]]:
    """Complete trials, best quality first; the earlier one where two are equal."""
    done = [(asked, told) for asked, told in trials if told is not None and told.state == "complete"]
    return sorted(done, key=lambda one: (-one[1].rungs[-1]["score"], one[0].number))
