"""The conductor: carries a batch of trials up the rungs, computing each result once.

At a rung the trials that are still in meet the same new samples. What the ledger, vanilla, another trial or another
study has already shown is taken from there; the rest goes to the pool as work items. When all of it is in, racing
decides who climbs on. Decisions wait for the whole batch, so they depend on results only, not on the order of arrival.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from statespan.orchestration import racing
from statespan.orchestration.items import BASELINE, SampleOutcome, WorkItem, WorkResult
from statespan.orchestration.journal import Asked, Told
from statespan.orchestration.keys import digest
from statespan.orchestration.ledger import Known, Ledger, params_text
from statespan.orchestration.plan import Candidate, Plan
from statespan.orchestration.pool import Pool
from statespan.orchestration.samples import Entry, Split
from statespan.orchestration.standings import Standings

logger = logging.getLogger(__name__)
PROBES = 8
"""Samples of a trial that are measured alone where seconds or memory are objectives."""


class Neighbours(Protocol):
    """Results of other studies."""

    def find(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Key -> a whole ledger row, for those that are there."""
        ...


@dataclass(slots=True)
class Counters:
    """What a study has cost and spared; the live view and the report read it."""

    computed: int = 0
    shared: int = 0
    """Samples taken from vanilla or a twin."""

    cached: int = 0
    """Samples known from an earlier run or another study."""

    failed: int = 0
    layer_tokens: int = 0
    layer_tokens_shared: int = 0
    prompt_tokens: int = 0
    busy_seconds: float = 0.0


class Watcher(Protocol):
    """Hears what happens; the live view, the status file and MLflow are watchers. Must not raise."""

    def rung_done(self, asked: Asked | None, rung: Mapping[str, Any]) -> None: ...
    def trial_done(self, asked: Asked, told: Told) -> None: ...
    def progress(self) -> None: ...


@dataclass
class Conductor:
    plan: Plan
    ledger: Ledger
    pool: Pool
    standings: Standings
    neighbours: Neighbours | None = None
    watchers: list[Watcher] = field(default_factory=list)
    proceed: Callable[[str, int], bool] = lambda trial_id, rung: True
    """Asked after each rung where a scheduler of Ray Tune decides."""

    counters: Counters = field(default_factory=Counters)
    known: dict[str, Known] = field(default_factory=dict)
    _present: set[tuple[str, str, str, str]] = field(default_factory=set)
    _seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _errors: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Trial -> (status, message) of its first failed sample."""

    def __post_init__(self) -> None:
        self.known = self.ledger.known(self.plan.scope)
        self._present = self.ledger.present()
        self.pool.on_change = self._progress

    # ---- a batch

    def baseline(self) -> None:
        """Evaluate vanilla on every search sample: what all trials are compared with, and part of their results."""
        for rung in range(self.standings.race.last_rung + 1):
            self._meet([self.plan.baseline], rung)
            self._tell_rung(None, self._rung_record(BASELINE, rung, "finish" if self._last(rung) else "keep", ""))
        if BASELINE in self._errors:
            raise BaselineFailed(self._errors[BASELINE][1])

    def restore(self, asked: Asked, told: Told) -> None:
        """Take in a trial of an earlier run. Rows that were lost since are computed again."""
        candidate = self.plan.candidate(asked.id, asked.method, asked.params)
        if told.state in ("complete", "pruned"):
            for record in told.rungs:
                self._meet([candidate], record["rung"])
        for record in told.rungs:
            self._tell_rung(asked, record)
        self._tell_trial(asked, told)

    def race(self, batch: Sequence[Asked]) -> list[Told]:
        """Carry a batch up the rungs; what became of each, in order."""
        candidates = {one.id: self.plan.candidate(one.id, one.method, one.params) for one in batch}
        rungs: dict[str, list[dict[str, Any]]] = {one.id: [] for one in batch}
        told: dict[str, Told] = {}
        climbing = list(batch)
        for rung in range(self.standings.race.last_rung + 1):
            self._meet([candidates[one.id] for one in climbing], rung)
            incumbents = self.standings.incumbents(rung)
            staying = []
            for one in climbing:
                record = self._decide(one.id, rung, incumbents)
                rungs[one.id].append(record)
                self._tell_rung(one, record)
                outcome = self._outcome(one, candidates[one.id], rungs[one.id])
                if outcome is None:
                    staying.append(one)
                else:
                    told[one.id] = outcome
                    self._tell_trial(one, outcome)
            climbing = staying
        assert not climbing, "the last rung ends every trial"
        return [told[one.id] for one in batch]

    def _decide(self, trial_id: str, rung: int, incumbents: Sequence[racing.Standing]) -> dict[str, Any]:
        if trial_id in self._errors:
            return self._rung_record(trial_id, rung, "stop", self._errors[trial_id][1])
        if self._last(rung):
            return self._rung_record(trial_id, rung, "finish", "")
        if self.plan.study.racing.scheduler != "racing":
            return self._rung_record(trial_id, rung, "keep", "")
        decision = racing.decide(self.standings.race, self.standings.of(trial_id), incumbents, rung)
        return self._rung_record(trial_id, rung, decision.action, decision.reason) | {
            "p": decision.p,
            "incumbent_id": decision.incumbent_id,
        }

    def _rung_record(self, trial_id: str, rung: int, decision: str, reason: str) -> dict[str, Any]:
        return {
            "rung": rung,
            "samples": self.standings.met(trial_id),
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
        common: dict[str, Any] = {"number": one.number, "rungs": tuple(rungs), "wall_seconds": self._seconds[one.id]}
        if one.id in self._errors:
            status, message = self._errors[one.id]
            return Told(state="oom" if status == "oom" else "failed", message=message, **common)
        if last["decision"] == "stop":
            return Told(state="pruned", message=last["reason"], **common)
        if last["decision"] == "finish":
            return self._finish(one, candidate, common)
        if not self.proceed(one.id, last["rung"]):
            return Told(state="pruned", message=f"stopped by {self.plan.study.racing.scheduler}", **common)
        return None

    def _finish(self, one: Asked, candidate: Candidate, common: dict[str, Any]) -> Told:
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
            "layer_tokens": self.standings.layer_tokens(trial_id),
        }
        return [found.get(one.metric) for one in self.plan.study.search.objectives]

    def _measure(self, candidate: Candidate) -> dict[str, float]:
        """Seconds and memory of a few samples spread over lengths, each alone and sharing nothing."""
        entries = sorted(self.standings.entries, key=lambda entry: (entry.prompt_tokens, entry.row))
        step = max(len(entries) // PROBES, 1)
        chosen = entries[step // 2 :: step][:PROBES]
        items = [
            self._item(candidate, [(entry, "measured")], rung=-1, split="search", pack=f"alone-{entry.row}", alone=True)
            for entry in chosen
        ]
        outcomes = [outcome for _, result in self.pool.run(items) for outcome in result.outcomes]
        seconds = [one.prefill_seconds + one.decode_seconds for one in outcomes if one.status == "done"]
        peaks = [one.peak_bytes for one in outcomes if one.peak_bytes is not None]
        return {
            "seconds": statistics.median(seconds) if seconds else float("nan"),
            "peak_bytes": float(max(peaks)) if peaks else float("nan"),
        }

    # ---- results

    def _last(self, rung: int) -> bool:
        return rung == self.standings.race.last_rung

    def _meet(self, candidates: Sequence[Candidate], rung: int) -> None:
        entries = self.standings.at(rung)
        results = self.results(candidates, entries, rung, "search")
        for candidate in candidates:
            self.standings.enter(candidate.trial_id, results[candidate.trial_id])

    def results(
        self, candidates: Sequence[Candidate], entries: Sequence[Entry], rung: int, split: Split
    ) -> dict[str, list[tuple[Entry, Known]]]:
        """Every candidate's result on every sample, known or computed; all of it is then in the ledger."""
        keys = {
            (candidate.trial_id, entry.row): self.plan.key(candidate, entry)
            for candidate in candidates
            for entry in entries
        }
        before = {key for key in keys.values() if key in self.known}
        self._ask_neighbours({key for key in keys.values() if key not in self.known}, candidates, entries, keys, rung)
        failed = self._compute(candidates, entries, keys, rung, split)
        self._note_reused(candidates, entries, keys, rung, split, before)
        return {
            candidate.trial_id: [
                (entry, self.known.get(key) or failed[key])
                for entry in entries
                for key in (keys[candidate.trial_id, entry.row],)
            ]
            for candidate in candidates
        }

    def _compute(
        self,
        candidates: Sequence[Candidate],
        entries: Sequence[Entry],
        keys: Mapping[tuple[str, int], str],
        rung: int,
        split: Split,
    ) -> dict[str, Known]:
        """Work on what nobody knows. Returns the failures, which are not known: another run may do better."""
        missing: set[str] = set()
        todo: dict[str, list[tuple[Entry, str]]] = {}
        for candidate in candidates:
            mine = []
            for entry in entries:
                key = keys[candidate.trial_id, entry.row]
                if key not in self.known and key not in missing:
                    missing.add(key)
                    mine.append((entry, key))
            todo[candidate.trial_id] = mine
        failed: dict[str, Known] = {}
        by_id = {candidate.trial_id: candidate for candidate in candidates}
        for item, result in self.pool.run(self._items(candidates, todo, rung, split)):
            self._record(by_id[item.trial_id], item, result, failed)
        self._blame(candidates, entries, keys, failed)
        return failed

    def _items(
        self,
        candidates: Sequence[Candidate],
        todo: Mapping[str, Sequence[tuple[Entry, str]]],
        rung: int,
        split: Split,
    ) -> Iterator[WorkItem]:
        """Items pack by pack; within a pack the setting that diverges first goes first, so that each layer's stream is
        there when the next one needs it."""
        pack_of = self._packs([entry for mine in todo.values() for entry, _ in mine])
        ordered = sorted(candidates, key=lambda one: self._divergence(one, todo[one.trial_id]))
        packs: dict[str, list[WorkItem]] = defaultdict(list)
        for candidate in ordered:
            chunks: dict[str, list[tuple[Entry, str]]] = defaultdict(list)
            for entry, key in todo[candidate.trial_id]:
                chunks[pack_of[entry.row]].append((entry, key))
            for pack, chunk in chunks.items():
                first = not packs[pack]
                packs[pack].append(self._item(candidate, chunk, rung, split, pack, first=first))
        for items in packs.values():
            yield from items

    def _packs(self, entries: Iterable[Entry]) -> dict[int, str]:
        """Sample -> its pack: samples of one task and length whose streams fit a worker's store together."""
        cells: dict[tuple[str, int], list[Entry]] = defaultdict(list)
        for entry in sorted(set(entries), key=lambda one: one.row):
            cells[entry.task, entry.length].append(entry)
        workers = self.plan.study.workers
        out: dict[int, str] = {}
        for (task, length), members in cells.items():
            stream = max(entry.prompt_tokens for entry in members) * self.plan.facts.d_model * 4
            # a stream is kept at two layers or so: where the last and where the next setting diverge
            fits = int(workers.store_gib * 1024**3 / (2 * stream)) if workers.store_gib else workers.item_samples
            size = max(1, min(workers.item_samples, fits))
            for start in range(0, len(members), size):
                name = f"{task}/{length}/{members[start].id}"
                out |= {entry.row: name for entry in members[start : start + size]}
        return out

    def _divergence(self, candidate: Candidate, mine: Sequence[tuple[Entry, str]]) -> int:
        layers = [self.plan.first_changed(candidate.setting, entry) for entry, _ in mine[:1]]
        return next((layer for layer in layers if layer is not None), self.plan.facts.n_layer)

    def _item(
        self,
        candidate: Candidate,
        chunk: Sequence[tuple[Entry, str]],
        rung: int,
        split: Split,
        pack: str,
        *,
        alone: bool = False,
        first: bool = True,
    ) -> WorkItem:
        depth = 0 if alone or first else self._divergence(candidate, chunk) % self.plan.facts.n_layer
        return WorkItem(
            id=digest([candidate.trial_id, alone, [key for _, key in chunk], [entry.row for entry, _ in chunk]])[:24],
            trial_id=candidate.trial_id,
            setting=candidate.setting,
            task=chunk[0][0].task,
            rung=rung,
            split=split,
            rows=tuple(entry.row for entry, _ in chunk),
            keys=tuple(key for _, key in chunk),
            length=max(entry.prompt_tokens for entry, _ in chunk),
            tokens=sum(entry.prompt_tokens for entry, _ in chunk),
            layers=self.plan.facts.n_layer - depth,
            pack=pack,
            alone=alone,
        )

    def _record(self, candidate: Candidate, item: WorkItem, result: WorkResult, failed: dict[str, Known]) -> None:
        entries = self.plan.samples.entries
        rows = [
            ledger_row(self.plan, candidate, entries[outcome.row], item.rung, outcome, result.worker)
            for outcome in result.outcomes
        ]
        self.ledger.append(rows)
        self._seconds[candidate.trial_id] += result.seconds
        self.counters.busy_seconds += result.seconds
        for row, outcome in zip(rows, result.outcomes, strict=True):
            self._present.add((row["trial_id"], row["task"], row["sample_id"], row["split"]))
            known = Known(
                outcome.score, outcome.layer_tokens + outcome.layer_tokens_shared, outcome.status, outcome.error
            )
            (self.known if outcome.status == "done" else failed)[outcome.key] = known
            self.counters.computed += 1
            self.counters.failed += outcome.status != "done"
            self.counters.layer_tokens += outcome.layer_tokens
            self.counters.layer_tokens_shared += outcome.layer_tokens_shared
            self.counters.prompt_tokens += entries[outcome.row].prompt_tokens

    def _blame(
        self,
        candidates: Sequence[Candidate],
        entries: Sequence[Entry],
        keys: Mapping[tuple[str, int], str],
        failed: Mapping[str, Known],
    ) -> None:
        for candidate in candidates:
            for entry in entries:
                known = failed.get(keys[candidate.trial_id, entry.row])
                if known is not None and candidate.trial_id not in self._errors:
                    message = f"sample {entry.id} of {entry.task}: {known.error}"
                    self._errors[candidate.trial_id] = (known.status, message)
                    logger.warning("%s: %s", candidate.trial_id, message)

    # ---- what is known without computing

    def _ask_neighbours(
        self,
        missing: set[str],
        candidates: Sequence[Candidate],
        entries: Sequence[Entry],
        keys: Mapping[tuple[str, int], str],
        rung: int,
    ) -> None:
        """Copy what other studies know into this ledger, so that it stands by itself."""
        if self.neighbours is None or not missing:
            return
        found = self.neighbours.find(missing)
        rows = []
        for candidate in candidates:
            for entry in entries:
                row = found.pop(keys[candidate.trial_id, entry.row], None)
                if row is not None:
                    rows.append(row | identity_columns(self.plan, candidate, entry, rung) | {"origin": "reused"})
        if rows:
            self.ledger.append(rows)
        for row in rows:
            self.known[row["key"]] = Known(row["score"], row["layer_tokens"] + row["layer_tokens_shared"])
            self._present.add((row["trial_id"], row["task"], row["sample_id"], row["split"]))
            self.counters.cached += 1

    def _note_reused(
        self,
        candidates: Sequence[Candidate],
        entries: Sequence[Entry],
        keys: Mapping[tuple[str, int], str],
        rung: int,
        split: Split,
        before: set[str],
    ) -> None:
        """A row for every result that this trial did not compute itself."""
        rows = []
        for candidate in candidates:
            for entry in entries:
                key = keys[candidate.trial_id, entry.row]
                if (candidate.trial_id, entry.task, entry.id, split) in self._present:
                    self.counters.cached += key in before
                    continue
                if key in self.known:
                    self.counters.shared += 1
                    same = self.plan.first_changed(candidate.setting, entry) is None
                    rows.append(
                        identity_columns(self.plan, candidate, entry, rung)
                        | reused_columns(self.known[key], "vanilla" if same else "twin", key, self.plan.scope)
                    )
        if rows:
            self.ledger.append(rows)
            self._present |= {(row["trial_id"], row["task"], row["sample_id"], row["split"]) for row in rows}

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


class BaselineFailed(RuntimeError):
    """Vanilla failed on a sample, so nothing can be compared with it."""


def identity_columns(plan: Plan, candidate: Candidate, entry: Entry, rung: int) -> dict[str, Any]:
    return {
        "trial_id": candidate.trial_id,
        "method": candidate.setting.method,
        "params": params_text(candidate.identity.params),
        "task": entry.task,
        "sample_id": entry.id,
        "document": entry.document,
        "split": entry.split,
        "rung": rung if entry.split == "search" else -1,
        "length": entry.length,
        "depth": entry.depth,
        "tokens_prompt": entry.prompt_tokens,
    }


def reused_columns(known: Known, origin: str, key: str, scope: str) -> dict[str, Any]:
    return {
        "key": key,
        "scope": scope,
        "origin": origin,
        "status": "done",
        "score": known.score,
        "layer_tokens": 0,
        "layer_tokens_shared": known.layer_tokens,
        "finished_at": datetime.now(UTC),
    }


def ledger_row(
    plan: Plan, candidate: Candidate, entry: Entry, rung: int, outcome: SampleOutcome, worker: str
) -> dict[str, Any]:
    return identity_columns(plan, candidate, entry, rung) | {
        "key": outcome.key,
        "scope": plan.scope,
        "origin": "computed",
        "status": outcome.status,
        "score": outcome.score,
        "error": outcome.error or None,
        "text": outcome.text,
        "ids": list(outcome.ids),
        "logprobs": list(outcome.logprobs),
        "target_tokens": list(outcome.target_tokens),
        "greedy": list(outcome.greedy),
        "tokens_new": outcome.tokens_new,
        "prefill_seconds": outcome.prefill_seconds,
        "decode_seconds": outcome.decode_seconds,
        "peak_bytes": outcome.peak_bytes,
        "layer_tokens": outcome.layer_tokens,
        "layer_tokens_shared": outcome.layer_tokens_shared,
        "worker": worker,
        "finished_at": datetime.now(UTC),
    }
