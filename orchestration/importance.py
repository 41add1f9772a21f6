"""How much of the spread in quality each parameter explains, within one method, by Optuna's evaluators."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from statespan.orchestration.assemble import FACTS
from statespan.orchestration.files import read_json
from statespan.orchestration.journal import Journal
from statespan.orchestration.study_data import Importance, StudyData

logger = logging.getLogger(__name__)
LEAST_TRIALS = 6
"""Complete trials of a method below which a share would be noise."""


def with_importance(data: StudyData, folder: Path) -> StudyData:
    """The study with the importance of its parameters, for its report."""
    facts = read_json(folder / FACTS) or {}
    records = _complete(Journal(folder / "search", facts.get("version", "")))
    found = [one for method, mine in sorted(records.items()) for one in _of_method(method, mine)]
    return replace(data, importance=found)


def prepare() -> None:
    """Import what the evaluators need."""
    import optuna

    with contextlib.suppress(ImportError):  # `with_importance` will say that it is missing
        optuna.importance.FanovaImportanceEvaluator(seed=0)


def _complete(journal: Journal) -> dict[str, list[Mapping[str, Any]]]:
    """Method -> Optuna's records of its complete trials."""
    method = {asked.id: asked.method for asked, _ in journal.trials()}
    out: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for batch in range(journal.batches()):
        for record in (journal.told(batch) or {}).get("optuna", ()):
            name = method.get(record["user_attrs"].get("trial"))
            if name is not None and record["state"] == "COMPLETE":
                out[name].append(record)
    return out


def _of_method(method: str, records: Sequence[Mapping[str, Any]]) -> list[Importance]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shared = set.intersection(*(set(record["params"]) for record in records)) - {"method"}
    varied = sorted(name for name in shared if len({str(record["params"][name]) for record in records}) > 1)
    if len(records) < LEAST_TRIALS or not varied or len({record["values"][0] for record in records}) < 2:
        return []
    study = optuna.create_study(direction="maximize")
    study.add_trials([_plain(record, varied) for record in records])
    evaluators: dict[str, Callable[[], optuna.importance.BaseImportanceEvaluator]] = {
        "fANOVA": lambda: optuna.importance.FanovaImportanceEvaluator(seed=0),
        "PED-ANOVA": optuna.importance.PedAnovaImportanceEvaluator,
    }
    found = []
    for name, make in evaluators.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shares = optuna.importance.get_param_importances(study, evaluator=make(), params=varied)
        except (ValueError, RuntimeError, ImportError) as error:
            logger.warning("importance of %s by %s: %s", method, name, error)
            continue
        plain = {param.removeprefix(f"{method}."): float(share) for param, share in shares.items()}
        found.append(Importance(method=method, evaluator=name, shares=plain))
    return found


def _plain(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    from optuna.distributions import json_to_distribution
    from optuna.trial import create_trial

    return create_trial(
        value=record["values"][0],
        params={name: record["params"][name] for name in names},
        distributions={name: json_to_distribution(record["distributions"][name]) for name in names},
    )
