"""`statespan cache`: what results there are, what of them nobody needs, and whether they still hold."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from statespan.errors import UserError
from statespan.orchestration.assemble import FACTS
from statespan.orchestration.files import read_json, write_table
from statespan.orchestration.items import BASELINE, Setting, WorkItem
from statespan.orchestration.journal import Journal
from statespan.orchestration.ledger import Ledger, size
from statespan.orchestration.lock import is_running, study_lock
from statespan.orchestration.plan import Plan, make_plan
from statespan.orchestration.repair import saved_study
from statespan.orchestration.worker import MakeEngine, Worker


@dataclass(frozen=True, slots=True)
class Held:
    """What one study's ledger holds."""

    study: str
    files: int
    rows: int
    bytes: int
    model: str
    quarantined: int


def held(output: Path) -> list[Held]:
    """Every study below a folder."""
    out = []
    for path in sorted(output.glob(f"*/{FACTS}")):
        facts = read_json(path) or {}
        files, rows, total = size(path.parent / "ledger")
        torn = len(list((path.parent / "ledger" / "quarantine").glob("*")))
        model = facts.get("model", {})
        out.append(
            Held(path.parent.name, files, rows, total, f"{model.get('name')} {model.get('digest', '')[:12]}", torn)
        )
    return out


@dataclass(frozen=True, slots=True)
class Swept:
    rows: int
    bytes: int
    torn: int


def collect(folder: Path, dry_run: bool) -> Swept:
    """Drop rows of trials that the study no longer has, failed tries, and torn files; merge what is left.

    The results of the study's own trials stay, whether or not another study uses them.
    """
    if is_running(folder):
        raise UserError(f"study {folder.name!r} is running; collect when it is done")
    with study_lock(folder):
        ledger = Ledger(folder / "ledger")
        version = (read_json(folder / FACTS) or {})["version"]
        trials = {BASELINE, *(asked.id for asked, _ in Journal(folder / "search", version).trials())}
        whole = ledger.read()
        mine = pc.is_in(whole["trial_id"], value_set=pa.array(sorted(trials), pa.string()))
        kept = whole.filter(pc.and_(mine, pc.equal(whole["status"], "done")))
        quarantine = folder / "ledger" / "quarantine"
        torn = len(list(quarantine.glob("*")))
        before = size(folder / "ledger")[2]
        if not dry_run:
            _replace(ledger, kept)
            shutil.rmtree(quarantine, ignore_errors=True)
        freed = 0 if dry_run else before - size(folder / "ledger")[2]
        return Swept(whole.num_rows - kept.num_rows, freed, torn)


def _replace(ledger: Ledger, kept: pa.Table) -> None:
    """The new file is durable before the old ones go; a crash in between doubles rows, which count once."""
    old = ledger.files()
    path = ledger.folder / "merged-collected.parquet"
    write_table(kept, path)
    for one in old:
        if one != path:
            one.unlink()


@dataclass(frozen=True, slots=True)
class Difference:
    """A result that does not come out again."""

    trial_id: str
    task: str
    sample_id: str
    field: str
    was: Any
    now: Any


@dataclass(frozen=True, slots=True)
class Verified:
    checked: int
    differences: list[Difference]
    bound: bool
    """Whether results are promised to repeat exactly: in deterministic mode on the same kind of device."""


def verify(folder: Path, samples: int, seed: int, make_engine: MakeEngine | None = None) -> Verified:
    """Run random results of a study again and compare score, tokens and log-probabilities.

    Raises UserError where the model, the data or the code that made them is no longer the same.
    """
    study = saved_study(folder)
    plan = make_plan(study)
    facts = read_json(folder / FACTS) or {}
    if plan.scope != facts.get("scope"):
        raise UserError(
            f"study {folder.name!r} was made by other weights, another device or an older numeric path; its results "
            "cannot be run again as they were (run the sweep again to have new ones)"
        )
    rows = _drawn(Ledger(folder / "ledger"), plan.scope, samples, seed)
    if make_engine is None:
        from statespan.orchestration.model_engine import load_engine

        make_engine = load_engine
    worker = Worker(plan.worker_spec(), plan.samples.table, make_engine, "verify")
    differences = [found for row in rows for found in _again(plan, worker, row, folder)]
    return Verified(len(rows), differences, plan.numerics.deterministic)


def _drawn(ledger: Ledger, scope: str, samples: int, seed: int) -> list[dict[str, Any]]:
    whole = ledger.results(scope)
    places = Random(seed).sample(range(whole.num_rows), min(samples, whole.num_rows))
    rows: list[dict[str, Any]] = whole.take(pa.array(sorted(places), pa.int64())).to_pylist()
    return rows


def _again(plan: Plan, worker: Worker, row: dict[str, Any], folder: Path) -> list[Difference]:
    entry = next(one for one in plan.samples.entries if (one.task, one.id) == (row["task"], row["sample_id"]))
    params = {} if row["trial_id"] == BASELINE else _params(folder, row["trial_id"])
    candidate = plan.candidate(row["trial_id"], row["method"], params)
    if plan.key(candidate, entry) != row["key"]:
        return [
            Difference(row["trial_id"], row["task"], row["sample_id"], "key", row["key"], plan.key(candidate, entry))
        ]
    setting = Setting(
        method=candidate.setting.method, params=candidate.setting.params, artifacts=candidate.setting.artifacts
    )
    item = WorkItem(
        id="verify",
        trial_id=row["trial_id"],
        setting=setting,
        task=entry.task,
        rung=-1,
        split=entry.split,
        rows=(entry.row,),
        keys=(row["key"],),
        length=entry.prompt_tokens,
        tokens=entry.prompt_tokens,
        layers=plan.facts.n_layer,
        pack="verify",
        alone=True,
    )
    (outcome,) = worker.run(item).outcomes
    now = {
        "status": outcome.status,
        "score": outcome.score,
        "ids": list(outcome.ids),
        "logprobs": list(outcome.logprobs),
    }
    return [
        Difference(row["trial_id"], row["task"], row["sample_id"], name, row[name], value)
        for name, value in now.items()
        if value != row[name]
    ]


def _params(folder: Path, trial_id: str) -> dict[str, Any]:
    version = (read_json(folder / FACTS) or {})["version"]
    return dict(next(asked.params for asked, _ in Journal(folder / "search", version).trials() if asked.id == trial_id))


def total(found: Sequence[Held]) -> tuple[int, int]:
    """(rows, bytes)"""
    return sum(one.rows for one in found), sum(one.bytes for one in found)
