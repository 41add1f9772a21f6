"""After the search: choose on the search samples, prove on the held-out ones, export.

Vanilla, the winner and the runner-up are evaluated on held-out samples, which no trial has met before. What is exported
to best.json is the winner if it beats vanilla there, else vanilla: to serve anything else would be to serve luck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from statespan.orchestration.assemble import CHOICE, FACTS, load_study_data, setting_line
from statespan.orchestration.conductor import Conductor
from statespan.orchestration.contents import heldout_metrics
from statespan.orchestration.files import write_json
from statespan.orchestration.journal import Asked
from statespan.orchestration.plan import Candidate, Plan
from statespan.orchestration.searcher import Search
from statespan.orchestration.served import (
    FILE,
    ServedConfig,
    ServedMethod,
    ServedModel,
    ServedNumerics,
    ServedSample,
)
from statespan.orchestration.study_data import StudyData
from statespan.orchestration.verdict import Verdict, adjudicate, choose


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a sweep came to."""

    folder: Path
    data: StudyData
    verdict: Verdict
    heldout: Mapping[str, Mapping[str, float]]
    served: str
    """The exported setting in one line."""

    mlflow: str | None = None

    def text(self) -> str:
        """For people: the verdict, where everything is, and what comes next."""
        lines = [
            "",
            self.verdict.sentence,
            *(f"  {caveat}" for caveat in self.verdict.caveats),
            "",
            *_table(self),
            "",
            f"report   {self.folder / 'report.html'}",
            f"ledger   {self.folder / 'ledger'} (Parquet)",
        ]
        if self.mlflow:
            lines.append(f"MLflow   mlflow ui --backend-store-uri {self.mlflow}")
        lines.append(f"serve    statespan serve {self.folder}    # {self.served}")
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        overall = self.verdict.overall
        return {
            "event": "done",
            "study": self.data.name,
            "winner": self.verdict.winner_id,
            "candidate": self.verdict.candidate_id,
            "sentence": self.verdict.sentence,
            "gain": overall.gain.mean if overall else None,
            "gain_low": overall.gain.low if overall else None,
            "gain_high": overall.gain.high if overall else None,
            "p": overall.p_corrected if overall else None,
            "trials": {state: sum(one.state == state for one in self.data.trials) for state in _states(self.data)},
            "best": str(self.folder / FILE),
            "report": str(self.folder / "report.html"),
            "ledger": str(self.folder / "ledger"),
            "mlflow": self.mlflow,
        }


def _table(result: Result) -> list[str]:
    """Held-out scores by task and length: vanilla, the best trial, the runner-up."""
    ids = [one for one in (result.data.baseline_id, result.data.winner_id, result.data.runner_up_id) if one]
    names = sorted({name for one in ids for name in result.heldout.get(one, {})}, key=_by_length)
    label = {one: result.data.trial(one).method + (f" {one}" if one != result.data.baseline_id else "") for one in ids}
    lines = [f"{'held-out samples':<34}" + "".join(f"{label[one]:>20}" for one in ids)]
    for name in names:
        values = "".join(f"{result.heldout[one][name]:>20.3f}" for one in ids)
        lines.append(f"  {name.removeprefix('heldout/'):<32}" + values)
    return lines


def _by_length(name: str) -> tuple[str, int]:
    head, _, tail = name.rpartition("/")
    return (head, int(tail)) if tail.isdigit() else (name, 1 << 62)


def _states(data: StudyData) -> list[str]:
    return sorted({trial.state for trial in data.trials})


def finish(plan: Plan, conductor: Conductor, search: Search) -> Result:
    """Choose, prove, export. Raises WorkNeeded where held-out samples are still to be evaluated without workers."""
    folder = plan.study.folder
    conductor.results.ledger.merge()
    chosen = choose(load_study_data(folder))
    asked = {one.id: one for one in search.trials}
    picked = [asked[one] for one in (chosen.winner_id, chosen.runner_up_id) if one is not None]
    candidates = [plan.baseline, *(plan.candidate(one.id, one.method, one.params) for one in picked)]
    results = conductor.results.of(candidates, dict.fromkeys(plan.samples.of_split("heldout"), -1), "heldout")
    write_json(folder / CHOICE, {"winner_id": chosen.winner_id, "runner_up_id": chosen.runner_up_id})
    data = load_study_data(folder)
    verdict = adjudicate(data)
    served = next((one for one in candidates if one.trial_id == verdict.winner_id), plan.baseline)
    export(plan, conductor, served, asked.get(served.trial_id))
    return Result(
        folder=folder,
        data=data,
        verdict=verdict,
        heldout=heldout_metrics(plan, results),
        served=setting_line(served.setting.method, served.setting.params),
    )


def export(plan: Plan, conductor: Conductor, served: Candidate, asked: Asked | None) -> None:
    """Write best.json."""
    study = plan.study
    given = {name: value for name, value in served.setting.params.items() if isinstance(value, Path)}
    config = ServedConfig(
        study=study.study,
        model=ServedModel(
            ref=plan.worker_spec().model,
            revision=study.revision,
            digest=plan.model.weights,
            tokenizer_digest=plan.model.tokenizer,
            train_length=study.train_length,
        ),
        method=ServedMethod(
            name=served.setting.method,
            params={**served.identity.params, **{name: str(path) for name, path in given.items()}},
            artifacts=dict(served.identity.artifacts),
        ),
        numerics=ServedNumerics(
            dtype=plan.numerics.dtype,
            device="cuda" if plan.numerics.device == "cuda" else "cpu",
            deterministic=plan.numerics.deterministic,
            threads=study.workers.threads,
        ),
        samples=tuple(served_samples(plan, conductor, served)),
    )
    config.save(study.folder / FILE)


def served_samples(plan: Plan, conductor: Conductor, served: Candidate) -> list[ServedSample]:
    """Held-out samples with the tokens that were generated for them, spread over lengths."""
    entries = [one for one in plan.samples.of_split("heldout") if not one.target_tokens]
    entries.sort(key=lambda entry: (entry.prompt_tokens, entry.row))
    wanted = plan.study.selection.serve_samples
    step = max(len(entries) // wanted, 1)
    chosen = entries[::step][:wanted]
    keys = {entry.row: plan.key(served, entry) for entry in chosen}
    rows = conductor.results.ledger.rows_of(keys.values())
    out = []
    for entry in chosen:
        row = rows.get(keys[entry.row])
        if row is None or row["ids"] is None:
            continue
        sample = plan.samples.sample(entry.row)
        out.append(
            ServedSample(
                id=sample.id,
                prompt_ids=sample.prompt_ids,
                max_new_tokens=sample.max_new_tokens,
                stop=sample.stop,
                ids=tuple(row["ids"]),
                text=row["text"] or "",
            )
        )
    return out


def with_mlflow(result: Result, place: str | None) -> Result:
    return replace(result, mlflow=place)


def prepare_report() -> None:
    """Import what the report is made with."""
    from statespan.orchestration import breakdown, importance, report

    importance.prepare()
    assert breakdown and report


def write_report(result: Result) -> None:
    """report.html, report.md and trials.csv, where something they are made from is newer."""
    folder, made = result.folder, result.folder / "report.html"
    sources = [*(folder / "ledger").glob("*.parquet"), *(folder / "search").rglob("*told*.json")]
    sources += [folder / name for name in (CHOICE, FACTS, "study.yaml")]
    sources += [*Path(__file__).parent.glob("report*")]
    if made.is_file() and all(made.stat().st_mtime_ns > path.stat().st_mtime_ns for path in sources):
        return
    from statespan.orchestration.breakdown import with_questions
    from statespan.orchestration.importance import with_importance
    from statespan.orchestration.report import build_report

    build_report(with_questions(with_importance(result.data, folder), folder)).write(folder)
