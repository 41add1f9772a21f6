"""The conductor: carries a batch of trials up the rungs, and says what became of each.

At a rung the trials that are still in meet the same new samples (results.py), vanilla beside the first that get there:
what it computes on the way to its own result is what they share. When all of it is in, racing decides who climbs on.
Decisions wait for the whole batch, so they depend on results only, not on the order of arrival. Rungs at which racing
can stop nobody are met together with the next one: there is nothing to wait for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from statespan.orchestration import racing
from statespan.orchestration.items import BASELINE
from statespan.orchestration.journal import Asked, Told
from statespan.orchestration.plan import Candidate, Plan
from statespan.orchestration.results import Results
from statespan.orchestration.standings import Standings

PROBES = 8
"""Samples of a trial that are measured alone where seconds or memory are objectives."""


class Watcher(Protocol):
    """Hears what happens; the live view, the status file and MLflow are watchers. Must not raise."""

    def rung_done(self, asked: Asked | None, rung: Mapping[str, Any]) -> None: ...
    def trial_done(self, asked: Asked, told: Told) -> None: ...
    def progress(self) -> None: ...


class BaselineFailed(RuntimeError):
    """Vanilla failed on a sample, so nothing can be compared with it."""


@dataclass
class Conductor:
    plan: Plan
    results: Results
    standings: Standings
    watchers: list[Watcher] = field(default_factory=list)
    proceed: Callable[[str, int], bool] = lambda trial_id, rung: True
    """Asked after each rung where a scheduler of Ray Tune decides."""

    _baseline: int = 0
    """Rungs that vanilla has climbed."""

    _stopped: int = 0
    """Trials that racing has stopped."""

    def __post_init__(self) -> None:
        self.results.pool.on_change = self._progress

    # ---- a batch

    def baseline(self) -> None:
        """Take vanilla up the rungs that no trial has reached."""
        while self._baseline <= self.standings.race.last_rung:
            self._meet([], self._baseline, self._end(self._baseline))

    def restore(self, asked: Asked, told: Told) -> None:
        """Take in a trial of an earlier run. Rows that were lost since are computed again."""
        candidate = self.plan.candidate(asked.id, asked.method, asked.params)
        if told.state in ("complete", "pruned"):
            for record in told.rungs:
                self._meet([candidate], record["rung"], record["rung"])
        self._stopped += told.state == "pruned"
        for record in told.rungs:
            self._tell_rung(asked, record)
        self._tell_trial(asked, told)

    def race(self, batch: Sequence[Asked]) -> list[Told]:
        """Carry a batch up the rungs; what became of each, in order."""
        candidates = {one.id: self.plan.candidate(one.id, one.method, one.params) for one in batch}
        rungs: dict[str, list[dict[str, Any]]] = {one.id: [] for one in batch}
        told: dict[str, Told] = {}
        climbing, end = list(batch), -1
        for rung in range(self.standings.race.last_rung + 1):
            if rung > end:
                end = self._end(rung)
                self._meet([candidates[one.id] for one in climbing], rung, end)
            incumbents, stopped = self.standings.incumbents(rung), self._stopped
            staying = []
            for one in climbing:
                record = self._decide(one.id, rung, incumbents, stopped)
                rungs[one.id].append(record)
                self._tell_rung(one, record)
                outcome = self._outcome(one, candidates[one.id], rungs[one.id])
                if outcome is None:
                    staying.append(one)
                else:
                    self._stopped += outcome.state == "pruned"
                    told[one.id] = outcome
                    self._tell_trial(one, outcome)
            climbing = staying
        assert not climbing, "the last rung ends every trial"
        return [told[one.id] for one in batch]

    def _end(self, rung: int) -> int:
        """The rung up to which trials climb from this one before anybody can be stopped."""
        racing_decides = self.plan.study.racing.scheduler == "racing"
        return self.standings.race.next_look(rung) if racing_decides else rung

    def _meet(self, candidates: Sequence[Candidate], first: int, last: int) -> None:
        """Evaluate the candidates on these rungs' new samples, and vanilla where it has not met them."""
        ahead = last >= self._baseline
        met = [self.plan.baseline, *candidates] if ahead else candidates
        results = self.results.of(met, self.standings.between(first, last), "search")
        for candidate in met:
            self.standings.enter(candidate.trial_id, results[candidate.trial_id])
        if BASELINE in self.results.errors:
            raise BaselineFailed(self.results.errors[BASELINE][1])
        for rung in range(self._baseline, last + 1):
            self._baseline = rung + 1
            self._tell_rung(None, self._rung_record(BASELINE, rung, "finish" if self._last(rung) else "keep", ""))

    def _last(self, rung: int) -> bool:
        return rung == self.standings.race.last_rung

    def _decide(self, trial_id: str, rung: int, incumbents: Sequence[racing.Standing], stopped: int) -> dict[str, Any]:
        if trial_id in self.results.errors:
            return self._rung_record(trial_id, rung, "stop", self.results.errors[trial_id][1])
        if self._last(rung):
            return self._rung_record(trial_id, rung, "finish", "")
        if self.plan.study.racing.scheduler != "racing":
            return self._rung_record(trial_id, rung, "keep", "")
        decision = racing.decide(self.standings.race, self.standings.of(trial_id), incumbents, rung, stopped)
        return self._rung_record(trial_id, rung, decision.action, decision.reason) | {
            "p": decision.p,
            "incumbent_id": decision.incumbent_id,
        }

    def _rung_record(self, trial_id: str, rung: int, decision: str, reason: str) -> dict[str, Any]:
        return {
            "rung": rung,
            "samples": self.standings.met(trial_id, rung),
            "score": self.standings.quality(trial_id, rung),
            "values": self._cheap_values(trial_id, rung),
            "decision": decision,
            "reason": reason,
            "p": None,
            "incumbent_id": None,
        }

    def _outcome(self, one: Asked, candidate: Candidate, rungs: Sequence[Mapping[str, Any]]) -> Told | None:
        """How a trial ended, or None where it climbs on."""
        last = rungs[-1]
        seconds = self.results.seconds[one.id]
        common: dict[str, Any] = {"number": one.number, "rungs": tuple(rungs), "wall_seconds": seconds}
        if one.id in self.results.errors:
            status, message = self.results.errors[one.id]
            return Told(state="oom" if status == "oom" else "failed", message=message, **common)
        if last["decision"] == "stop":
            return Told(state="pruned", message=last["reason"], **common)
        if last["decision"] == "finish":
            return self._finish(candidate, common)
        if not self.proceed(one.id, last["rung"]):
            return Told(state="pruned", message=f"stopped by {self.plan.study.racing.scheduler}", **common)
        return None

    def _finish(self, candidate: Candidate, common: dict[str, Any]) -> Told:
        values = self.values(candidate)
        if not all(map(math.isfinite, values)):
            return Told(state="failed", message=f"an objective is not a number: {values}", **common)
        return Told(state="complete", values=values, **common)

    # ---- objectives

    def values(self, candidate: Candidate) -> tuple[float, ...]:
        """The objectives of a trial that met every search sample."""
        cheap = self._cheap_values(candidate.trial_id, self.standings.race.last_rung)
        if None not in cheap:
            return tuple(float(value) for value in cheap if value is not None)
        measured = self._measure(candidate)
        metrics = [one.metric for one in self.plan.study.search.objectives]
        return tuple(measured[metric] if value is None else value for metric, value in zip(metrics, cheap, strict=True))

    def _cheap_values(self, trial_id: str, rung: int) -> list[float | None]:
        """Objectives that need no measurement of their own; None for the others."""
        found = {
            "quality": self.standings.quality(trial_id, rung),
            "layer_tokens": self.standings.layer_tokens(trial_id, rung),
        }
        return [found.get(one.metric) for one in self.plan.study.search.objectives]

    def _measure(self, candidate: Candidate) -> dict[str, float]:
        """Seconds and memory of a few samples spread over lengths."""
        entries = sorted(self.standings.entries, key=lambda entry: (entry.prompt_tokens, entry.row))
        step = max(len(entries) // PROBES, 1)
        outcomes = self.results.alone(candidate, entries[step // 2 :: step][:PROBES])
        seconds = [one.prefill_seconds + one.decode_seconds for one in outcomes if one.status == "done"]
        peaks = [one.peak_bytes for one in outcomes if one.peak_bytes is not None]
        return {
            "seconds": statistics.median(seconds) if seconds else float("nan"),
            "peak_bytes": float(max(peaks)) if peaks else float("nan"),
        }

    # ---- watchers

    def _tell_rung(self, asked: Asked | None, record: Mapping[str, Any]) -> None:
        for watcher in self.watchers:
            watcher.rung_done(asked, record)

    def _tell_trial(self, asked: Asked, told: Told) -> None:
        for watcher in self.watchers:
            watcher.trial_done(asked, told)

    def _progress(self) -> None:
        for watcher in self.watchers:
            watcher.progress()
