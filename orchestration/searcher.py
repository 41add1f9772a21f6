"""The search: Optuna's ask and tell in batches, exact under any crash.

Draws of a batch are made one after the other; the batch is told in order when all its trials are done. Each draw has
a sampler of its own, seeded by the draw's number (samplers.py), and all a sampler keeps is journalled (journal.py). So
what is asked depends on the study file and on results, never on time, the number of workers, or interruptions.

The stock glue (ray.tune.search.optuna.OptunaSearch) differs in four ways, each held by a test: it tells a trial that a
scheduler stopped as COMPLETE with its partial score; it drops intermediate results where there are several objectives;
it leaves the running trials of a dead driver RUNNING for ever and draws others in their place; it draws the start-up
points again after a restore.

Trials are numbered without gaps. Draws that repeat an earlier setting are told FAIL, draws that break a constraint
PRUNED with the constraint's value, and neither counts as a trial.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from statespan.config import Search as SearchConfig
from statespan.errors import UserError
from statespan.orchestration.journal import Asked, Journal, Told, asked_from, told_from
from statespan.orchestration.keys import MethodIdentity, digest
from statespan.orchestration.samplers import GRID, make_sampler
from statespan.search_spaces.loader import Range, Space

if TYPE_CHECKING:
    from optuna.study import Study as OptunaStudy
    from optuna.trial import FrozenTrial, Trial

Identify = Callable[[str, Mapping[str, Any]], MethodIdentity]
"""(method, params) -> what it is; raises UserError where it cannot be built for this model."""

TRIES = 50
"""Draws for one trial before the space counts as exhausted."""


class Search:
    """Asks for batches of trials and is told what became of them."""

    def __init__(
        self,
        config: SearchConfig,
        spaces: Mapping[str, Space],
        points: Sequence[tuple[str, str, Mapping[str, Any]]],
        identify: Identify,
        journal: Journal,
    ) -> None:
        """
        Args:
            config: the study's `search`.
            spaces: method -> its space.
            points: (origin, method, params) to try first, in order.
            identify: checks a setting and gives its canonical form.
            journal: what was asked and told before, and where it is written.
        """
        self.config, self.spaces, self.identify, self.journal = config, spaces, identify, journal
        self.points = [*self._kept(), *points]
        self.trials: list[Asked] = []
        self.told: dict[int, Told] = {}
        self.exhausted = False
        self._seen: set[str] = set()
        self._fixed = 0
        self._batch = 0
        self._study: OptunaStudy | None = None
        self._grid: Iterator[tuple[str, dict[str, Any]]] | None = None

    def _kept(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        return [("kept", one.method, one.params) for one in self.journal.earlier() if one.method in self.spaces]

    # ---- asking

    def next_batch(self) -> list[Asked] | None:
        """The next trials, or those of a batch that was asked and not told; None when the search is over.

        Raises UserError where it is over and not one setting that was drawn could be tried.
        """
        assert self._batch == 0 or self.journal.told(self._batch - 1) is not None, "the last batch was not told"
        record = self.journal.asked(self._batch)
        if record is None:
            record = self._draw_batch()
            if record is None:
                self._check_some()
                return None
            if self._batch == 0:
                record["earlier"] = [asdict(one) for one in self.journal.earlier()]
            self.journal.write_asked(self._batch, record)
        else:
            self._recall(record)
        asked = [asked_from(draw["trial"]) for draw in record["draws"] if draw["trial"] is not None]
        self.trials += asked
        if record.get("exhausted"):
            self.exhausted = True
        if not asked:  # nothing new was found: the draws are told as they stand
            self.tell([])
            self._check_some()
            return None
        return asked

    def _check_some(self) -> None:
        refused = (self.journal.asked(0) or {"draws": []})["draws"]
        if refused and not self.trials:
            raise UserError(
                f"none of the {len(refused)} settings drawn can be tried; the first: {refused[0]['why']}. "
                "The study file's `methods` say what is drawn"
            )

    def _draw_batch(self) -> dict[str, Any] | None:
        room = min(self.config.batch, self.config.trials - len(self.trials))
        if room <= 0 or self.exhausted:
            return None
        draws: list[dict[str, Any]] = []
        exhausted = False
        for place in range(room):
            number = len(self.trials) + place
            found = self._draw_trial(number)
            draws += found
            if not found or found[-1]["trial"] is None:
                exhausted = True
                break
        return {"draws": draws, "study_attrs": self._study_attrs(), "exhausted": exhausted}

    def _draw_trial(self, number: int) -> list[dict[str, Any]]:
        """Draws until one is a trial; the last one is, unless the space has no more."""
        draws: list[dict[str, Any]] = []
        while len(draws) < TRIES:
            origin, method, fixed = self._next_point()
            if origin == "over":
                break
            trial = self._ask(method, fixed)
            chosen, params = self._suggest(trial)
            draws.append(self._judge(trial, number, origin, chosen, params))
            if draws[-1]["trial"] is not None:
                break
        return draws

    def _next_point(self) -> tuple[str, str, Mapping[str, Any] | None]:
        if self._fixed < len(self.points):
            self._fixed += 1
            return self.points[self._fixed - 1]
        if self.config.sampler not in GRID:
            return "sampled", "", None
        if self._grid is None:
            self._grid = ((method, point) for method, space in self.spaces.items() for point in space.grid())
        method, point = next(self._grid, ("", {}))
        return ("grid", method, point) if method else ("over", "", None)

    def _ask(self, method: str, fixed: Mapping[str, Any] | None) -> Trial:
        study = self.study
        number = len(study.get_trials(deepcopy=False))
        sampler = self.config.sampler if self.config.sampler not in GRID else "random"
        study.sampler = make_sampler(sampler, self.config.sampler_options, self.config.seed, number)
        if fixed is not None:
            named = {f"{method}.{name}": _stored(value) for name, value in fixed.items()}
            study.enqueue_trial({"method": method, **named} if len(self.spaces) > 1 else named)
        return study.ask()

    def _suggest(self, trial: Trial) -> tuple[str, dict[str, Any]]:
        methods = sorted(self.spaces)
        method = methods[0] if len(methods) == 1 else trial.suggest_categorical("method", methods)
        assert method is not None
        return method, self.spaces[method].draw(lambda name, one: _suggest_one(trial, f"{method}.{name}", one))

    def _judge(self, trial: Trial, number: int, origin: str, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """The record of a draw; `trial` is None where it is a repetition or not allowed."""
        asked, why = None, ""
        broken = self.spaces[method].broken(params)
        if broken:
            trial.set_constraint(broken[0][:100], 1.0)
            why = f"breaks the constraint {broken[0]}"
        else:
            try:
                identity = self.identify(method, params)
            except UserError as error:
                trial.set_constraint("can be built", 1.0)
                why = str(error)
            else:
                name = digest(identity.facts())
                if name in self._seen:
                    why = "repeats an earlier setting"
                else:
                    self._seen.add(name)
                    asked = Asked(
                        number=number,
                        id=trial_id(number),
                        method=method,
                        params=dict(params),
                        canonical=dict(identity.params),
                        artifacts=dict(identity.artifacts),
                        origin=origin,
                        draw=trial.number,
                    )
        trial.set_user_attr("trial", asked.id if asked else None)
        trial.set_user_attr("origin", origin)
        if why:
            trial.set_user_attr("not_run", why)
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        return {"trial": asdict(asked) if asked else None, "why": why, "optuna": _record(frozen)}

    # ---- telling

    def tell(self, results: Sequence[Told]) -> None:
        """What became of the trials of the batch asked last. Journalled first, then known to the sampler."""
        record = {"trials": [asdict(one) for one in results]}
        by_draw = {self.trials[one.number].draw: one for one in results}
        self._apply(by_draw)
        self.journal.write_told(self._batch, record | self._after(by_draw))
        self.told |= {one.number: one for one in results}
        self._batch += 1

    def _apply(self, by_draw: Mapping[int, Told]) -> None:
        from optuna.trial import TrialState

        study = self.study
        for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.sampler = make_sampler(self._sampler(), self.config.sampler_options, self.config.seed, frozen.number)
            one = by_draw.get(frozen.number)
            if one is None:
                repeated = not frozen.constraints
                study.tell(frozen.number, state=TrialState.FAIL if repeated else TrialState.PRUNED)
                continue
            self._report(frozen, one)
            if one.state == "complete":
                study.tell(frozen.number, list(one.values))
            else:
                study.tell(frozen.number, state=TrialState.PRUNED if one.state == "pruned" else TrialState.FAIL)

    def _report(self, frozen: FrozenTrial, told: Told) -> None:
        """Intermediate values: Optuna's own, which it refuses with several objectives, and always an attribute."""
        storage, study = self.study._storage, self.study
        if len(study.directions) == 1:
            for one in told.rungs:
                if one["values"]:
                    storage.set_trial_intermediate_value(frozen._trial_id, one["rung"], one["values"][0])
        rungs = [[one["rung"], list(one["values"])] for one in told.rungs]
        storage.set_trial_user_attr(frozen._trial_id, "rungs", rungs)
        if told.message:
            storage.set_trial_user_attr(frozen._trial_id, "message", told.message[:1000])

    def _after(self, by_draw: Mapping[int, Told]) -> dict[str, Any]:
        frozen = self.study.get_trials(deepcopy=False)
        first = min((draw["optuna"]["number"] for draw in self._record()["draws"]), default=len(frozen))
        return {"optuna": [_record(one) for one in frozen[first:]], "study_attrs": self._study_attrs()}

    def _record(self) -> dict[str, Any]:
        record = self.journal.asked(self._batch)
        assert record is not None
        return record

    def _sampler(self) -> str:
        return self.config.sampler if self.config.sampler not in GRID else "random"

    # ---- remembering

    def replay(self) -> None:
        """Take in every batch that was asked and told before."""
        while (told := self.journal.told(self._batch)) is not None and (
            record := self.journal.asked(self._batch)
        ) is not None:
            self._recall(record)
            self.trials += [asked_from(draw["trial"]) for draw in record["draws"] if draw["trial"] is not None]
            self.told |= {one["number"]: told_from(one) for one in told["trials"]}
            self.exhausted = self.exhausted or bool(record.get("exhausted"))
            self._batch += 1

    def _recall(self, record: Mapping[str, Any]) -> None:
        """Mark the settings and fixed points of a batch as used; Optuna's side waits until it is needed."""
        for draw in record["draws"]:
            origin = draw["optuna"]["user_attrs"]["origin"]
            if origin == "grid":
                self._skip_grid()
            elif origin != "sampled":
                self._fixed += 1
            if draw["trial"] is not None:
                one = asked_from(draw["trial"])
                identity = MethodIdentity(name=one.method, params=one.canonical, artifacts=one.artifacts)
                self._seen.add(digest(identity.facts()))
        if self._study is not None:
            self._load(record, None)

    def _skip_grid(self) -> None:
        fixed, self._fixed = self._fixed, len(self.points)
        self._next_point()
        self._fixed = fixed

    @property
    def study(self) -> OptunaStudy:
        """The sampler's view: all finished batches, and the draws of the one that is under way."""
        if self._study is None:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.ERROR)
            directions = [one.direction for one in self.config.objectives]
            self._study = optuna.create_study(directions=directions, sampler=optuna.samplers.RandomSampler(seed=0))
            for batch in range(self._batch):
                self._load(self.journal.asked(batch) or {}, self.journal.told(batch))
            if (under_way := self.journal.asked(self._batch)) is not None:
                self._load(under_way, None)
        return self._study

    def _load(self, asked: Mapping[str, Any], told: Mapping[str, Any] | None) -> None:
        study = self.study
        storage = study._storage
        records = told["optuna"] if told else [draw["optuna"] for draw in asked["draws"]]
        have = len(study.get_trials(deepcopy=False))
        for one in records:
            if one["number"] >= have:
                storage.create_new_trial(study._study_id, template_trial=frozen_trial(one))
        for name, value in (told or asked)["study_attrs"].items():
            storage.set_study_system_attr(study._study_id, name, value)

    def _study_attrs(self) -> dict[str, Any]:
        return dict(self.study._storage.get_study_system_attrs(self.study._study_id))


def trial_id(number: int) -> str:
    return f"t{number:04d}"


def _suggest_one(trial: Trial, name: str, one: Range) -> Any:
    if one.type == "choice":
        plain = all(isinstance(choice, bool | int | float | str) for choice in one.choices)
        value = trial.suggest_categorical(name, one.choices if plain else [json.dumps(c) for c in one.choices])
        return value if plain else json.loads(str(value))
    if one.type == "int":
        return trial.suggest_int(name, int(one.low), int(one.high), step=int(one.step or 1), log=one.log)
    step = float(one.step) if one.step is not None else None
    return trial.suggest_float(name, float(one.low), float(one.high), step=step, log=one.log)


def _stored(value: Any) -> Any:
    """The form of a value in Optuna's parameters, where a choice is a scalar."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _record(frozen: FrozenTrial) -> dict[str, Any]:
    from optuna.distributions import distribution_to_json

    return {
        "number": frozen.number,
        "state": frozen.state.name,
        "values": frozen.values,
        "params": frozen.params,
        "distributions": {name: distribution_to_json(one) for name, one in frozen.distributions.items()},
        "user_attrs": frozen.user_attrs,
        "system_attrs": frozen.system_attrs,
        "intermediate_values": {str(step): value for step, value in frozen.intermediate_values.items()},
        "started": frozen.datetime_start.isoformat() if frozen.datetime_start else None,
        "finished": frozen.datetime_complete.isoformat() if frozen.datetime_complete else None,
    }


def frozen_trial(record: Mapping[str, Any]) -> FrozenTrial:
    """Optuna's trial from the journal."""
    from datetime import datetime

    from optuna.distributions import json_to_distribution
    from optuna.trial import FrozenTrial, TrialState

    state, values = TrialState[record["state"]], record["values"]
    return FrozenTrial(
        number=record["number"],
        state=state,
        value=None,
        values=values,
        datetime_start=datetime.fromisoformat(record["started"]) if record["started"] else None,
        datetime_complete=datetime.fromisoformat(record["finished"]) if record["finished"] else None,
        params=dict(record["params"]),
        distributions={name: json_to_distribution(text) for name, text in record["distributions"].items()},
        user_attrs=dict(record["user_attrs"]),
        system_attrs=dict(record["system_attrs"]),
        intermediate_values={int(step): value for step, value in record["intermediate_values"].items()},
        trial_id=-1,
    )


def space_version(spaces: Mapping[str, Space], objective: Any) -> str:
    """Names what makes two told values comparable: the spaces and the objective."""
    facts = {"spaces": {name: space.described() for name, space in spaces.items()}, "objective": objective}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:10]
