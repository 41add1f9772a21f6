"""Results: every candidate on every sample, each computed once.

What the ledger, vanilla, another trial or another study has already shown is taken from there; the rest goes to the
pool as work items. Whatever the way, a row of it is then in the ledger.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from statespan.orchestration.items import SampleOutcome, WorkResult
from statespan.orchestration.ledger import Known, Ledger
from statespan.orchestration.packs import make_item, make_items
from statespan.orchestration.plan import Candidate, Plan
from statespan.orchestration.pool import Pool
from statespan.orchestration.rows import computed_row, identity_columns, reused_columns
from statespan.orchestration.samples import Entry, Split
from statespan.orchestration.vitals import Gauges

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """Some candidates on some samples."""

    candidates: Sequence[Candidate]
    entries: Mapping[Entry, int]
    """Sample -> the rung at which it is met; -1 on the held-out side."""

    split: Split
    keys: Mapping[tuple[str, int], str]
    """(trial, row of the sample) -> key of the result."""

    def cells(self) -> Iterator[tuple[Candidate, Entry, str]]:
        for candidate in self.candidates:
            for entry in self.entries:
                yield candidate, entry, self.keys[candidate.trial_id, entry.row]


@dataclass
class Results:
    plan: Plan
    ledger: Ledger
    pool: Pool
    neighbours: Neighbours | None = None
    counters: Counters = field(default_factory=Counters)
    gauges: Gauges = field(default_factory=Gauges)
    known: dict[str, Known] = field(default_factory=dict)
    """Key -> result, of everything in the ledger that is done."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Trial -> seconds that workers spent on it."""

    errors: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Trial -> (status, message) of its first failed sample."""

    _present: set[tuple[str, str, str, str]] = field(default_factory=set)
    """(trial, task, sample, split) of every row in the ledger."""

    def __post_init__(self) -> None:
        self.known = self.ledger.known(self.plan.scope)
        self._present = self.ledger.present()

    def of(
        self, candidates: Sequence[Candidate], entries: Mapping[Entry, int], split: Split
    ) -> dict[str, list[tuple[Entry, Known]]]:
        """Trial -> its result on every sample.

        Args:
            entries: sample -> the rung at which it is met; -1 on the held-out side.
        """
        keys = {(one.trial_id, entry.row): self.plan.key(one, entry) for one in candidates for entry in entries}
        query = Query(candidates=candidates, entries=entries, split=split, keys=keys)
        before = {key for key in keys.values() if key in self.known}
        self._ask_neighbours(query)
        failed = self._compute(query)
        self._note_reused(query, before)
        out: dict[str, list[tuple[Entry, Known]]] = {one.trial_id: [] for one in candidates}
        for candidate, entry, key in query.cells():
            out[candidate.trial_id].append((entry, self.known.get(key) or failed[key]))
        return out

    def alone(self, candidate: Candidate, entries: Sequence[Entry]) -> list[SampleOutcome]:
        """Run each sample by itself, sharing nothing, for its seconds and memory. Nothing is recorded."""
        items = [
            make_item(self.plan, candidate, [(entry, "measured")], -1, "search", f"alone-{entry.row}", alone=True)
            for entry in entries
        ]
        return [outcome for _, result in self.pool.run(items) for outcome in result.outcomes]

    # ---- computing

    def _compute(self, query: Query) -> dict[str, Known]:
        """Work on what nobody knows. Returns the failures, which are not known: another run may do better."""
        missing: set[str] = set()
        todo: dict[str, list[tuple[Entry, str]]] = {one.trial_id: [] for one in query.candidates}
        for candidate, entry, key in query.cells():
            if key not in self.known and key not in missing:
                missing.add(key)
                todo[candidate.trial_id].append((entry, key))
        failed: dict[str, Known] = {}
        by_id = {candidate.trial_id: candidate for candidate in query.candidates}
        workers = max(len(self.pool.slots), 1)
        rungs = {entry.row: rung for entry, rung in query.entries.items()}
        items = make_items(self.plan, query.candidates, todo, max(rungs.values(), default=-1), query.split, workers)
        for item, result in self.pool.run(items):
            self._record(by_id[item.trial_id], rungs, result, failed)
        self._blame(query, failed)
        return failed

    def _record(
        self, candidate: Candidate, rungs: Mapping[int, int], result: WorkResult, failed: dict[str, Known]
    ) -> None:
        entries = self.plan.samples.entries
        rows = [
            computed_row(self.plan, candidate, entries[outcome.row], rungs[outcome.row], outcome, result.worker)
            for outcome in result.outcomes
        ]
        self._append(rows)
        self.seconds[candidate.trial_id] += result.seconds
        for outcome in result.outcomes:
            known = Known(
                outcome.score, outcome.layer_tokens + outcome.layer_tokens_shared, outcome.status, outcome.error
            )
            (self.known if outcome.status == "done" else failed)[outcome.key] = known
        self._count(result)

    def _count(self, result: WorkResult) -> None:
        counters, entries = self.counters, self.plan.samples.entries
        if result.vitals is not None:
            self.gauges.note(result.worker, result.seconds, result.vitals)
        counters.busy_seconds += result.seconds
        for outcome in result.outcomes:
            counters.computed += 1
            counters.failed += outcome.status != "done"
            counters.layer_tokens += outcome.layer_tokens
            counters.layer_tokens_shared += outcome.layer_tokens_shared
            counters.prompt_tokens += entries[outcome.row].prompt_tokens

    def _blame(self, query: Query, failed: Mapping[str, Known]) -> None:
        """Note for every trial that met a failed sample the first one; a twin's failure is its own, too."""
        if not failed:
            return
        for candidate, entry, key in query.cells():
            known = failed.get(key)
            if known is not None and candidate.trial_id not in self.errors:
                message = f"sample {entry.id} of {entry.task}: {known.error}"
                self.errors[candidate.trial_id] = (known.status, message)
                logger.warning("%s: %s", candidate.trial_id, message)

    # ---- what is known without computing

    def _ask_neighbours(self, query: Query) -> None:
        """Copy what other studies know into this ledger, so that it stands by itself."""
        missing = {key for key in query.keys.values() if key not in self.known}
        if self.neighbours is None or not missing:
            return
        found, rows = self.neighbours.find(missing), []
        for candidate, entry, key in query.cells():
            row = found.pop(key, None)
            if row is not None:
                rows.append(row | identity_columns(candidate, entry, query.entries[entry]) | {"origin": "reused"})
        self._append(rows)
        for row in rows:
            self.known[row["key"]] = Known(row["score"], row["layer_tokens"] + row["layer_tokens_shared"])
        self.counters.cached += len(rows)

    def _note_reused(self, query: Query, before: set[str]) -> None:
        """A row for every result that a trial did not compute itself.

        Args:
            before: keys that were known when the query came.
        """
        rows = []
        for candidate, entry, key in query.cells():
            if (candidate.trial_id, entry.task, entry.id, query.split) in self._present:
                self.counters.cached += key in before
            elif key in self.known:
                self.counters.shared += 1
                same = self.plan.first_changed(candidate.setting, entry) is None
                rows.append(
                    identity_columns(candidate, entry, query.entries[entry])
                    | reused_columns(self.known[key], "vanilla" if same else "twin", key, self.plan.scope)
                )
        self._append(rows)

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            self.ledger.append(rows)
            self._present.update((row["trial_id"], row["task"], row["sample_id"], row["split"]) for row in rows)
