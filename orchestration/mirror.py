"""The study in Optuna's database, for optuna-dashboard and every other reader of Optuna storages.

The journal is what counts; this is its mirror. A mirror that does not agree with the journal (a crash between the two,
a database that was lost or is another study's) is made again. A trial that a dead driver left RUNNING here is the one
that the next driver carries on under the same number, so none stays RUNNING and none is drawn twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statespan.config import Study
from statespan.errors import UserError
from statespan.orchestration.databases import make_whole
from statespan.orchestration.files import read_json, write_json
from statespan.orchestration.journal import Journal
from statespan.study_file import from_environment

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)
OURS = "statespan"
LOCKED_SECONDS = 10
"""To wait for another writer of the SQLite file."""


def storage_url(study: Study) -> str:
    """SQLAlchemy URL of the study's Optuna database."""
    if study.search.storage:
        return from_environment(study.search.storage)
    return f"sqlite:///{(study.folder / 'optuna.db').resolve()}"


class Mirror:
    def __init__(self, study: Study, journal: Journal) -> None:
        self.study, self.journal = study, journal
        self._storage: RDBStorage | None = None
        self._id = -1
        self._trials: list[tuple[int, str]] = []
        """(Optuna's id, state) of each mirrored trial."""

        self._batches = 0
        """Batches mirrored to the end."""

    def up_to_date(self) -> bool:
        """Whether an earlier run left the mirror as the journal is now, by its note; opens no database."""
        note = read_json(self._note())
        if not isinstance(note, dict) or note.get("version") != self.journal.version:
            return False
        default = self.study.search.storage is None
        there = not default or (self.study.folder / "optuna.db").is_file()
        return there and note.get("told") == self._told() and note.get("storage") == self.study.search.storage

    def _note(self) -> Path:
        return self.study.folder / "search" / "mirror.json"

    def _told(self) -> int:
        told = 0
        while self.journal.told(told) is not None:
            told += 1
        return told

    def sync(self) -> None:
        """Bring the database up to the journal."""
        if self._storage is None:
            self._open()
        while (asked := self.journal.asked(self._batches)) is not None:
            told = self.journal.told(self._batches)
            first = min((draw["optuna"]["number"] for draw in asked["draws"]), default=len(self._trials))
            records = told["optuna"] if told else [draw["optuna"] for draw in asked["draws"]]
            for offset, record in enumerate(records):
                self._put(first + offset, record)
            for name, value in (told or asked)["study_attrs"].items():
                self._db.set_study_system_attr(self._id, name, value)
            if told is None:
                return
            self._batches += 1
        note = {"version": self.journal.version, "told": self._batches, "storage": self.study.search.storage}
        write_json(self._note(), note)

    @property
    def _db(self) -> RDBStorage:
        assert self._storage is not None
        return self._storage

    def _put(self, number: int, record: Mapping[str, Any]) -> None:
        from statespan.orchestration.searcher import frozen_trial

        if number == len(self._trials):
            trial_id = self._db.create_new_trial(self._id, template_trial=frozen_trial(record))
            self._trials.append((trial_id, record["state"]))
        elif self._trials[number][1] != record["state"]:
            self._finish(self._trials[number][0], frozen_trial(record))
            self._trials[number] = (self._trials[number][0], record["state"])

    def _finish(self, trial_id: int, frozen: FrozenTrial) -> None:
        for name, value in frozen.user_attrs.items():
            self._db.set_trial_user_attr(trial_id, name, value)
        for name, value in frozen.system_attrs.items():
            self._db.set_trial_system_attr(trial_id, name, value)
        for step, value in frozen.intermediate_values.items():
            self._db.set_trial_intermediate_value(trial_id, step, value)
        self._db.set_trial_state_values(trial_id, frozen.state, frozen.values)

    # ---- opening

    def _open(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # what fails is told once, by the clerk
        self._note().unlink(missing_ok=True)  # until all is told, the database holds something in between
        url = storage_url(self.study)
        options: dict[str, Any] = {"connect_args": {"timeout": LOCKED_SECONDS}} if url.startswith("sqlite") else {}
        make_whole(url, make_tables)
        storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
        if url.startswith("sqlite"):
            _hurry(storage)
        names = {one.study_name for one in optuna.get_all_study_summaries(storage, include_best_trial=False)}
        self._storage = storage
        if self.study.study in names and not self._agrees():
            optuna.delete_study(study_name=self.study.study, storage=storage)
            names.remove(self.study.study)
        if self.study.study not in names:
            self._create()

    def _agrees(self) -> bool:
        """Whether the study in the database is this one, as far as it goes."""
        study_id = self._db.get_study_id_from_name(self.study.study)
        attrs = self._db.get_study_user_attrs(study_id)
        if OURS not in attrs:
            raise UserError(
                f"search.storage holds a study {self.study.study!r} that statespan did not make; "
                "give this one another name or another storage"
            )
        have = self._db.get_all_trials(study_id, deepcopy=False)
        want = self._records()
        if attrs[OURS]["version"] != self.journal.version or len(have) > len(want):
            return False
        same = all(
            one.params == record["params"] and one.state.name in ("RUNNING", record["state"])
            for one, record in zip(have, want, strict=False)
        )
        if same:
            self._id = study_id
            self._trials = [(one._trial_id, one.state.name) for one in have]
        return same

    def _records(self) -> list[Mapping[str, Any]]:
        out: list[Mapping[str, Any]] = []
        batch = 0
        while (asked := self.journal.asked(batch)) is not None:
            told = self.journal.told(batch)
            out += told["optuna"] if told else [draw["optuna"] for draw in asked["draws"]]
            batch += 1
        return out

    def _create(self) -> None:
        from optuna.study import StudyDirection

        directions = [StudyDirection[one.direction.upper()] for one in self.study.search.objectives]
        self._id = self._db.create_new_study(directions, self.study.study)
        facts = {"version": self.journal.version, "sampler": self.study.search.sampler, "seed": self.study.search.seed}
        self._db.set_study_user_attr(self._id, OURS, facts)
        metrics = [one.metric for one in self.study.search.objectives]
        self._db.set_study_system_attr(self._id, "study:metric_names", metrics)
        self._trials = []


def make_tables(url: str) -> None:
    import optuna

    optuna.storages.RDBStorage(url).engine.dispose()


def _hurry(storage: RDBStorage) -> None:
    """No fsync for SQLite: what a power cut takes from a mirror is made again from the journal (0.5 s a trial less)."""
    from sqlalchemy import event

    @event.listens_for(storage.engine, "connect")
    def unsynced(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    storage.engine.dispose()
