"""What a sweep would do, and what of it is known already. Writes nothing and starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from statespan.config import Study
from statespan.orchestration.assemble import setting_line
from statespan.orchestration.journal import Journal, states
from statespan.orchestration.ledger import Ledger
from statespan.orchestration.plan import Plan, make_plan
from statespan.orchestration.searcher import space_version
from statespan.orchestration.trainable import check_scheduler
from statespan.search_spaces.loader import Range


@dataclass(frozen=True, slots=True)
class DryRun:
    plan: Plan
    known: int
    states: dict[str, int]

    def summary(self) -> dict[str, Any]:
        study, entries = self.plan.study, self.plan.samples.entries
        search = [one for one in entries if one.split == "search"]
        heldout = [one for one in entries if one.split == "heldout"]
        per_trial = sum(one.prompt_tokens for one in search)
        trials = study.search.trials
        most = per_trial * (trials + 1) + 3 * sum(one.prompt_tokens for one in heldout)
        return {
            "study": study.study,
            "folder": str(study.folder),
            "model": {"name": study.model, "digest": self.plan.model.weights, "kind": self.plan.facts.kind},
            "numerics": self.plan.numerics.facts(),
            "samples": {"search": len(search), "heldout": len(heldout)},
            "prompt_tokens": {"a trial": per_trial, "at most in all": most},
            "trials": trials,
            "begun": self.states,
            "results known": self.known,
            "first": [f"{origin}: {setting_line(method, params)}" for origin, method, params in self.plan.points],
            "spaces": {name: space.described()["params"] for name, space in self.plan.spaces.items()},
        }

    def text(self) -> str:
        found = self.summary()
        lines = [
            f"study    {found['study']} in {found['folder']}",
            f"model    {found['model']['name']} ({found['model']['kind']}, {found['model']['digest'][:12]}), "
            f"{found['numerics']['dtype']} on {found['numerics']['device']}",
            f"samples  {found['samples']['search']} to search on, {found['samples']['heldout']} held out",
            f"tokens   {found['prompt_tokens']['a trial']:,} of prompts a trial; "
            f"{found['prompt_tokens']['at most in all']:,} at most, if no trial were stopped and nothing shared",
            f"trials   {found['trials']}" + (f", of them begun: {self.states}" if self.states else ""),
            f"known    {self.known:,} results in the ledger",
        ]
        lines += [f"first    {point}" for point in found["first"]]
        lines += [f"space    {line}" for name in self.plan.spaces for line in self._space(name)]
        return "\n".join(lines)

    def _space(self, method: str) -> list[str]:
        return [
            f"{method}.{name}: {_range(one) if isinstance(one, Range) else one}"
            for name, one in self.plan.spaces[method].params.items()
        ]


def _range(one: Range) -> str:
    when = f" when {one.when}" if one.when else ""
    if one.type == "choice":
        return "one of " + ", ".join(map(str, one.choices)) + when
    return f"{one.low:g} to {one.high:g}{', log' if one.log else ''}{when}"


def dry_run(study: Study) -> DryRun:
    check_scheduler(study.racing.scheduler, study.racing.scheduler_options, len(study.search.objectives))
    plan = make_plan(study)
    journal = Journal(study.folder / "search", space_version(plan.spaces, plan.objective()))
    known = len(Ledger(study.folder / "ledger").known(plan.scope)) if study.folder.exists() else 0
    return DryRun(plan, known, states(journal.trials()))
