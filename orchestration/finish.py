"""After the search: choose on the search samples, prove on the held-out ones, export.

Vanilla, the winner and the runner-up are evaluated on held-out samples, which no trial has seen before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from statespan.orchestration.assemble import CHOICE, best_first
from statespan.orchestration.conductor import Conductor
from statespan.orchestration.files import write_json
from statespan.orchestration.plan import Plan
from statespan.orchestration.searcher import Search


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a sweep came to."""

    folder: Path
    winner_id: str | None
    runner_up_id: str | None


def finish(plan: Plan, conductor: Conductor, search: Search) -> Choice:
    ranked = best_first([(asked, search.told.get(asked.number)) for asked in search.trials])
    winner = ranked[0][0] if ranked else None
    runner_up = ranked[1][0] if len(ranked) > 1 else None
    candidates = [plan.baseline]
    candidates += [plan.candidate(one.id, one.method, one.params) for one in (winner, runner_up) if one is not None]
    conductor.results(candidates, plan.samples.of_split("heldout"), -1, "heldout")
    choice = {"winner_id": winner.id if winner else None, "runner_up_id": runner_up.id if runner_up else None}
    write_json(plan.study.folder / CHOICE, choice)
    return Choice(folder=plan.study.folder, **choice)
