"""What MLflow is told of a study: one RunContent for the study, the baseline and every trial that is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from statespan.orchestration.facts import PACKAGES, commit, package_version
from statespan.orchestration.items import BASELINE
from statespan.orchestration.journal import Asked, Told
from statespan.orchestration.keys import digest
from statespan.orchestration.tracking import RunContent, baseline_content, study_content, trial_content

if TYPE_CHECKING:
    from statespan.orchestration.plan import Plan
    from statespan.orchestration.searcher import Search
    from statespan.orchestration.standings import Standings
    from statespan.orchestration.verdict import Verdict

Metrics = list[tuple[str, float, int]]


class Contents:
    """Reads the search and the standings when asked. What cannot change any more is made once: a study of thousands of
    trials is told after every batch."""

    def __init__(self, plan: Plan, search: Search, standings: Standings) -> None:
        self.plan, self.search, self.standings = plan, search, standings
        self.final: Mapping[str, Any] = {}
        """After the search: winner_id, runner_up_id, verdict, heldout metrics by trial."""

        self._common = {
            "statespan.model": plan.study.model,
            "statespan.weights": plan.model.weights,
            "statespan.version": package_version("statespan") or "",
            "mlflow.source.git.commit": commit() or "",
        }
        self._datasets = self._describe_samples()
        self._packages = {f"statespan.package.{name}": package_version(name) or "" for name in PACKAGES}
        self._settled: dict[str, RunContent] = {}
        """Trials that are told and have all their results, as they were before the end."""

    def __call__(self) -> Iterable[RunContent]:
        yield self._study()
        met = {standing.trial_id for standing in self.standings.all()}
        if BASELINE in met and self.standings.of(BASELINE).met.all():
            yield baseline_content(self.plan.study, self._metrics(BASELINE), self._common | self._role(BASELINE))
        for asked in list(self.search.trials):
            told = self.search.told.get(asked.number)
            if told is not None and self._is_back(told, asked.id, met):
                yield self._trial(asked, told, asked.id in met)

    def datasets(self) -> list[dict[str, str]]:
        """Samples by task and side."""
        return self._datasets

    def _describe_samples(self) -> list[dict[str, str]]:
        sides: dict[tuple[str, str], list[list[str]]] = {}
        for entry in self.plan.samples.entries:
            sides.setdefault((entry.task, entry.split), []).append([entry.id, entry.digest])
        out = []
        for task, benchmark in self.plan.tasks.items():
            for split in ("search", "heldout"):
                members = sides.get((task, split), [])
                source = f"{benchmark.name} version {benchmark.version}, {len(members)} samples"
                out.append({"name": f"{task}-{split}", "digest": digest(members), "context": split, "source": source})
        return out

    def _is_back(self, told: Told, trial_id: str, met: set[str]) -> bool:
        """While a study goes on, its earlier trials get their results back rung by rung; half of them is no content."""
        if told.state not in ("complete", "pruned"):
            return True
        return trial_id in met and self.standings.met(trial_id) >= told.rungs[-1]["samples"]

    def _trial(self, asked: Asked, told: Told, met: bool) -> RunContent:
        role = self._role(asked.id)
        if not role and asked.id in self._settled:
            return self._settled[asked.id]
        metrics: Metrics = [("wall_seconds", told.wall_seconds, 0)] if told.wall_seconds > 0 else []
        if met:
            metrics += self._metrics(asked.id)
        objectives = [one.metric for one in self.plan.study.search.objectives]
        metrics += [(f"objective/{name}", value, 0) for name, value in zip(objectives, told.values, strict=False)]
        content = trial_content(self.plan.study, asked, told, metrics, self._common | role)
        if not role:
            self._settled[asked.id] = content
        return content

    # ---- parts

    def _study(self) -> RunContent:
        verdict: Verdict | None = self.final.get("verdict")
        tags = {
            **self._common,
            **{f"statespan.data.{one['name']}": one["digest"] for one in self.datasets()},
            **self._packages,
        }
        if verdict is not None:
            tags |= {
                "statespan.verdict": verdict.sentence,
                "statespan.winner": self.final["winner_id"] or "",
                "mlflow.note.content": verdict.sentence,
            }
        metrics = [(name, value, 0) for name, value in self._verdict_metrics(verdict)]
        return study_content(self.plan.study, metrics, tags, "FINISHED" if verdict is not None else None)

    def _verdict_metrics(self, verdict: Verdict | None) -> list[tuple[str, float]]:
        if verdict is None or verdict.overall is None:
            return []
        gain = verdict.overall.gain
        return [
            ("heldout/gain", gain.mean),
            ("heldout/gain_low", gain.low),
            ("heldout/gain_high", gain.high),
            ("heldout/p_corrected", verdict.overall.p_corrected),
        ]

    def _role(self, trial_id: str) -> dict[str, str]:
        roles = {self.final.get("winner_id"): "winner", self.final.get("runner_up_id"): "runner-up"}
        role = roles.get(trial_id) if self.final else None
        return {"statespan.role": role} if role else {}

    def _metrics(self, trial_id: str) -> Metrics:
        """Per rung and task, per length, costs, and held-out figures where there are any."""
        standing, race = self.standings.of(trial_id), self.standings.race
        out: Metrics = []
        for rung in range(race.last_rung + 1):
            met = standing.met & (race.rungs <= rung)
            if not standing.met[race.rungs == rung].any():
                break
            if trial_id == BASELINE:
                out.append(("quality", self.standings.quality(trial_id, rung), rung))
            out += [(name, value, rung) for name, value in self._task_means(standing.scores, met)]
        out.append(("layer_tokens", self.standings.layer_tokens(trial_id), 0))
        return out + [(name, value, 0) for name, value in self.final.get("heldout", {}).get(trial_id, {}).items()]

    def _task_means(self, scores: Any, met: Any) -> list[tuple[str, float]]:
        entries = self.standings.entries
        cells: dict[str, list[int]] = {}
        for place in map(int, np.flatnonzero(met)):
            entry = entries[place]
            metric = f"{entry.task}/{self.plan.tasks[entry.task].metric.replace(' ', '_')}"
            cells.setdefault(metric, []).append(place)
            cells.setdefault(f"{metric}/{entry.length}", []).append(place)
        return [(name, float(np.mean(scores[places]))) for name, places in cells.items()]


def heldout_metrics(plan: Plan, results: Mapping[str, Sequence[tuple[Any, Any]]]) -> dict[str, dict[str, float]]:
    """trial -> metric -> mean on held-out samples, by task and by length."""
    out: dict[str, dict[str, float]] = {}
    for trial_id, pairs in results.items():
        cells: dict[str, list[float]] = {}
        for entry, known in pairs:
            metric = f"heldout/{entry.task}/{plan.tasks[entry.task].metric.replace(' ', '_')}"
            cells.setdefault(metric, []).append(known.score)
            cells.setdefault(f"{metric}/{entry.length}", []).append(known.score)
        out[trial_id] = {name: float(np.mean(values)) for name, values in cells.items()}
    return out
