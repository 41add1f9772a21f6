"""MLflow: one experiment a study, one parent run, one child run a trial, each found again by its identity.

A run's identity is a tag, so a study that goes on continues its runs and opens no second ones. A run is written in
whole batches: parameters before results, metrics with the rung as step, nothing per sample. The tag `statespan.synced`
names what a run holds; one that holds it already is left alone, so writing again, or filling what MLflow missed while
it was down, is the same call.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from statespan.config import Study
from statespan.orchestration.databases import copied, make_whole
from statespan.orchestration.files import read_json, write_json, write_table
from statespan.orchestration.items import BASELINE
from statespan.orchestration.journal import Asked, Told
from statespan.orchestration.keys import digest
from statespan.orchestration.ledger import Ledger
from statespan.study_file import from_environment

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)
FINISHED = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "oom": "FAILED"}
PARAM_LIMIT, TAG_LIMIT = 6000, 8000
BATCH_PARAMS, BATCH_METRICS, BATCH_TAGS = 100, 800, 100
WRITER = ("mlflow.source.git.commit", "statespan.version", "statespan.package.")
SYNCED = "statespan.synced"
IDENTITY = "statespan.identity"
T = TypeVar("T")
_READYING = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContent:
    """All that one MLflow run shall hold."""

    identity: str
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    metrics: Sequence[tuple[str, float, int]]
    """(name, value, step)"""

    status: str | None = None
    """MLflow's; None leaves it running."""

    parent: bool = False

    @property
    def digest(self) -> str:
        """Names the content; which commit and versions wrote it is not part of it."""
        metrics = [[name, repr(value), step] for name, value, step in self.metrics]
        tags = {key: value for key, value in self.tags.items() if not key.startswith(WRITER)}
        return digest([{key: str(value) for key, value in self.params.items()}, tags, metrics, self.status])[:32]


@dataclass(frozen=True, slots=True)
class Held:
    """A run as MLflow has it."""

    run_id: str
    synced: str
    """Digest of the content it holds."""

    status: str


def tracking_uri(study: Study) -> str | None:
    """Where MLflow is; None where it is off."""
    named = study.tracking.mlflow
    if named == "off":
        return None
    if named == "auto":
        return f"sqlite:///{(study.output / 'mlflow.db').resolve()}"
    return from_environment(named)


class Tracker:
    """Keeps an experiment like the study. `contents` gives the runs as they shall be now."""

    def __init__(
        self,
        study: Study,
        facts: Mapping[str, Any],
        contents: Callable[[], Iterable[RunContent]],
        system: Callable[[], Sequence[tuple[str, float, int]]] = list,
    ) -> None:
        """
        Args:
            study: the study.
            facts: `datasets` by task and side.
            contents: what MLflow shall hold, told anew at each call.
            system: (name, value, milliseconds since the epoch) of the workers' system metrics since the last call.
        """
        self.study, self.facts, self.contents, self.system = study, facts, contents, system
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._parent = ""
        self._runs: dict[str, Held] = {}
        self._written: dict[str, RunContent] = {}
        """What each run was last found to hold; the same object again is not looked at."""

    # ---- the note an earlier run left

    def note(self) -> dict[str, Any]:
        note = read_json(self._note_path())
        return note if isinstance(note, dict) else {}

    def _note_path(self) -> Path:
        return self.study.folder / "mlflow.json"

    def wanted(self) -> str:
        """Names what MLflow shall hold now."""
        return digest([content.digest for content in self.contents()])

    def up_to_date(self, wanted: str) -> bool:
        """Whether MLflow was left holding what `wanted` names; asks no server."""
        note = self.note()
        uri = tracking_uri(self.study)
        if uri is None:
            return True
        there = not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()
        return there and note.get("uri") == self.study.tracking.mlflow and note.get("holds") == wanted

    # ---- writing

    def prepare(self) -> None:
        """Import MLflow and make its tables, some seconds that a study has while its workers start."""
        uri = tracking_uri(self.study)
        if uri is not None:
            with contextlib.suppress(Exception):  # `sync` will say what is wrong
                _ready(uri)
                from statespan.orchestration import champion

                assert champion

    def sync(self) -> None:
        """Bring every run up to its content."""
        contents = list(self.contents())
        try:
            if self._client is None:
                self._open(contents)
            for content in contents:
                self._write(content)
            self._log_system()
        except BaseException:
            self._client = None  # a server that failed may have done what it was asked: look again before the next try
            raise

    def conclude(self, folder: Path, winner_id: str | None, wanted: str) -> None:
        """The last word: runs, artifacts, the winner as a registered model, and a note that all of it is there."""
        self.sync()
        for name in ("best.json", "report.html", "report.md", "trials.csv", "study.yaml"):
            if (folder / name).is_file():
                self.client.log_artifact(self._parent, str(folder / name))
        with tempfile.TemporaryDirectory() as place:
            # one file of one name, so that a study that went on leaves no second copy of a row
            table = Path(place) / "samples.parquet"
            write_table(Ledger(folder / "ledger").read(), table)
            self.client.log_artifact(self._parent, str(table))
        if winner_id is not None:
            from statespan.orchestration.champion import register

            name = self.study.tracking.register_as or f"statespan-{self.study.study}"
            register(self.client, self._parent, folder / "best.json", name)
        self._seal(wanted)

    def _seal(self, wanted: str) -> None:
        place = {"uri": self.study.tracking.mlflow, "experiment": self._experiment, "parent": self._parent}
        write_json(self._note_path(), place | {"holds": wanted})

    def _open(self, contents: Sequence[RunContent]) -> None:
        uri = tracking_uri(self.study)
        assert uri is not None, "tracking is off"
        _ready(uri)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        name = self.study.tracking.experiment or self.study.study
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on runs, not on chat traces
            self._experiment = client.create_experiment(name, artifact_location=self._artifacts(uri), tags=kind)
        else:
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment.experiment_id)
            self._experiment = experiment.experiment_id
        self._client = client
        self._runs, self._written = self._existing(), {}
        parent = next(content for content in contents if content.parent)
        self._parent = self._write(parent)

    def _artifacts(self, uri: str) -> str | None:
        """SQLite stores artifacts in a folder beside the studies; a server knows its own place."""
        return (self.study.output / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite") else None

    def _existing(self) -> dict[str, Held]:
        """Our runs by identity. Of two, which a request that was sent twice can leave, the younger one is deleted."""
        found: dict[str, Held] = {}
        for run in self._ours():
            identity = run.data.tags[IDENTITY]
            if identity in found:
                self.client.delete_run(run.info.run_id)
            else:
                found[identity] = Held(run.info.run_id, run.data.tags.get(SYNCED, ""), run.info.status)
        return found

    def _ours(self) -> Iterator[Run]:
        """Every run of the study, the oldest first."""
        token = None
        while True:
            page = self.client.search_runs(
                [self._experiment],
                filter_string=f"tags.`statespan.study` = '{self.study.study}'",
                order_by=["attributes.start_time ASC"],
                max_results=1000,
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    @property
    def client(self) -> MlflowClient:
        assert self._client is not None
        return self._client

    @property
    def parent(self) -> str:
        return self._parent

    def _write(self, content: RunContent) -> str:
        if self._written.get(content.identity) is content:
            return self._runs[content.identity].run_id
        status = content.status or "RUNNING"
        held = self._runs.get(content.identity)
        if held is not None and (held.synced, held.status) == (content.digest, status):
            self._written[content.identity] = content
            return held.run_id
        self._note_path().unlink(missing_ok=True)  # until the last word, MLflow holds something in between
        run = self.client.get_run(held.run_id) if held is not None else self._create(content)
        run_id = str(run.info.run_id)
        self._log(run, content)
        if held is None or held.status != status:
            self._set_status(run_id, status)
        self._runs[content.identity] = Held(run_id, content.digest, status)
        self._written[content.identity] = content
        return run_id

    def _create(self, content: RunContent) -> Run:
        tags = {"statespan.study": self.study.study, IDENTITY: content.identity, "mlflow.runName": content.name}
        if not content.parent:
            tags["mlflow.parentRunId"] = self._parent
        return self.client.create_run(self._experiment, tags=tags, run_name=content.name)

    def _set_status(self, run_id: str, status: str) -> None:
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status)

    def _log(self, run: Run, content: RunContent) -> None:
        """What the run lacks: parameters first, results next, and last the tag that says what it holds."""
        from mlflow.entities import Param, RunTag

        self._log_inputs(run, content)
        had = run.data.params
        params = [Param(key, _text(value, PARAM_LIMIT)) for key, value in content.params.items() if key not in had]
        metrics = self._metrics(run, content)
        tags = [RunTag(key, _text(value, TAG_LIMIT)) for key, value in content.tags.items()]
        tags.append(RunTag(SYNCED, content.digest))
        parts: dict[str, tuple[list[Any], int]] = {
            "params": (params, BATCH_PARAMS),
            "metrics": (metrics, BATCH_METRICS),
            "tags": (tags, BATCH_TAGS),
        }
        last: dict[str, list[Any]] = {}
        log: Callable[..., Any] = self.client.log_batch
        for name, (values, size) in parts.items():
            *whole, last[name] = _batches(values, size)
            for batch in whole:
                log(run.info.run_id, **{name: batch})
        log(run.info.run_id, **last)  # MLflow writes the parts of one call in this order

    def _metrics(self, run: Run, content: RunContent) -> list[Metric]:
        """Those that the run does not hold yet: writing a run again doubles no point of a chart."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        held = {name: self._newest(run.info.run_id, name) for name in run.data.metrics}
        wanted = [(metric_name(name), value, step) for name, value, step in content.metrics if math.isfinite(value)]
        return [
            Metric(name, value, now, step)
            for name, value, step in wanted
            if held.get(name, {}).get(step, math.nan) != value
        ]

    def _newest(self, run_id: str, name: str) -> dict[int, float]:
        """Step -> the value logged last."""
        history = sorted(self.client.get_metric_history(run_id, name), key=lambda one: one.timestamp)
        return {one.step: one.value for one in history}

    def _log_system(self) -> None:
        """The workers' CPU and memory, on the study's run; the step is the run's second."""
        from mlflow.entities import Metric

        found = self.system()
        if not found:
            return
        began = self.client.get_run(self._parent).info.start_time
        points = [Metric(metric_name(name), value, when, max(when - began, 0) // 1000) for name, value, when in found]
        for batch in _batches(points, BATCH_METRICS):
            self.client.log_batch(self._parent, metrics=batch)

    def _log_inputs(self, run: Run, content: RunContent) -> None:
        """The samples as MLflow datasets; the digest is cut to MLflow's 36 characters, whole in a tag."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        had = {(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs} if run.inputs else set()
        inputs = [
            DatasetInput(
                Dataset(name=one["name"], digest=one["digest"][:36], source_type="statespan", source=one["source"]),
                tags=[InputTag("mlflow.data.context", one["context"])],
            )
            for one in self.facts["datasets"]
            if (content.parent or one["context"] == "search") and (one["name"], one["digest"][:36]) not in had
        ]
        if inputs:
            self.client.log_inputs(run.info.run_id, datasets=inputs)


def _batches(values: list[T], size: int) -> list[list[T]]:
    """In order; one that is empty where there are no values."""
    return [values[start : start + size] for start in range(0, len(values), size)] or [[]]


def metric_name(name: str) -> str:
    """MLflow takes letters, digits, and _ - . space / : only."""
    return re.sub(r"[^\w\-. /:]", "_", name.replace("@", "_at_"))


def _text(value: Any, limit: int) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _modest() -> None:
    """A server that is down is given up on soon: the study fills it later."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def _ready(uri: str) -> None:
    """MLflow imported, quiet, and its tables there; one thread at a time."""
    with _READYING:
        _modest()
        import mlflow

        _silence()
        mlflow.set_tracking_uri(uri)
        make_whole(uri, make_tables)


def make_tables(uri: str) -> None:
    """All of MLflow's tables in a new SQLite file."""
    from mlflow.version import VERSION

    copied(uri, f"mlflow-{VERSION}", _migrate)


def _migrate(uri: str) -> None:
    from mlflow.store.db import utils

    db: Any = utils
    engine = db.create_sqlalchemy_engine(uri)
    db._initialize_tables(engine)
    engine.dispose()


def _silence() -> None:
    for name in ("mlflow", "alembic", "mlflow.store", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # a locked database is told once, by the clerk, and not by a page of stack
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # a hint about the champion's model, whose signature is given; its text is coloured, so it begins anywhere
    warnings.filterwarnings("ignore", message="(?s).*input example was not provided")


# ---- contents


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    out: dict[str, Any] = {}
    for key, one in value.items():
        if isinstance(one, Mapping) and one:
            out |= flat(one, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = one
    return out


def trial_content(
    study: Study, asked: Asked, told: Told | None, metrics: Sequence[tuple[str, float, int]], common: Mapping[str, str]
) -> RunContent:
    """A trial's run."""
    tags = {
        **common,
        "statespan.trial": asked.id,
        "statespan.trial_number": str(asked.number),
        "statespan.method": asked.method,
        "statespan.origin": asked.origin,
        "statespan.state": told.state if told else "running",
        "statespan.status_reason": told.message if told else "",
    }
    rungs = [("quality", one["score"], one["rung"]) for one in (told.rungs if told else ())]
    samples = [("samples", float(one["samples"]), one["rung"]) for one in (told.rungs if told else ())]
    return RunContent(
        identity=f"{study.study}/{asked.id}-{digest([asked.method, dict(asked.canonical)])[:12]}",
        name=f"{asked.id} {asked.method}",
        params={"method": asked.method, **{f"{asked.method}.{name}": value for name, value in asked.params.items()}},
        tags=tags,
        metrics=[*rungs, *samples, *metrics],
        status=FINISHED[told.state] if told else None,
    )


def baseline_content(study: Study, metrics: Sequence[tuple[str, float, int]], common: Mapping[str, str]) -> RunContent:
    return RunContent(
        identity=f"{study.study}/{BASELINE}",
        name=BASELINE,
        params={"method": BASELINE},
        tags={**common, "statespan.trial": BASELINE, "statespan.method": BASELINE, "statespan.state": "complete"},
        metrics=metrics,
        status="FINISHED",
    )


def study_content(
    study: Study, metrics: Sequence[tuple[str, float, int]], tags: Mapping[str, str], status: str | None
) -> RunContent:
    """The parent run."""
    settings = study.model_dump(mode="json", exclude={"output", "tracking"})
    return RunContent(
        identity=study.study,
        name=study.study,
        params=flat(settings),
        tags=tags,
        metrics=metrics,
        status=status,
        parent=True,
    )
