"""A sweep from study file to exported winner. Running it again goes on where it stopped, and is quick when all is done.

plan → lock → [what is known: search and race from the ledger alone]
            → [what is missing: workers, and Ray Tune beside the conductor]
            → choose on search samples → prove on held-out samples → export, report, MLflow
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from statespan.analysis.auto import FILE as AUTO_SPACES
from statespan.config import Study
from statespan.orchestration.assemble import FACTS
from statespan.orchestration.clerk import Clerk
from statespan.orchestration.cluster import Layout, RayBackend, layout
from statespan.orchestration.conductor import Conductor, Watcher
from statespan.orchestration.contents import Contents
from statespan.orchestration.facts import study_facts
from statespan.orchestration.files import read_json, sweep_up, write_if_changed, write_json
from statespan.orchestration.finish import Result, finish, prepare_report, with_mlflow, write_report
from statespan.orchestration.gpu_share import equal_parts, measure
from statespan.orchestration.journal import Asked, Journal, Told
from statespan.orchestration.ledger import Ledger
from statespan.orchestration.lock import study_lock
from statespan.orchestration.mirror import Mirror
from statespan.orchestration.neighbours import OtherStudies
from statespan.orchestration.plan import Plan, make_plan
from statespan.orchestration.pool import InlineBackend, Interrupted, NoBackend, Pool, WorkNeeded
from statespan.orchestration.progress import Progress
from statespan.orchestration.ray_session import Session
from statespan.orchestration.results import Results
from statespan.orchestration.samples import save_samples
from statespan.orchestration.searcher import Search, space_version
from statespan.orchestration.standings import Standings, make_race
from statespan.orchestration.tracking import Tracker, tracking_uri
from statespan.orchestration.trainable import TuneRun, check_scheduler
from statespan.orchestration.worker import MakeEngine, Worker
from statespan.study_file import saved_form

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def sweep(
    study: Study,
    progress: Progress | None = None,
    make_engine: MakeEngine | None = None,
    session: Session | None = None,
) -> Result:
    """Do all of a study that is not done yet.

    Args:
        study: the checked study file.
        progress: where to show how far it is; by default nowhere.
        make_engine: what computes; by default the study's model.
        session: the stay in a Ray cluster, where the caller has begun one; it is left when the study has ended.

    Raises:
        UserError: something is wrong with the study; nothing was written.
        Interrupted: SIGINT or SIGTERM; what was in flight has been kept.
        PoolBroken, BaselineFailed, DiskFull: the study cannot go on now; nothing that was computed is lost.
    """
    racing = study.racing
    check_scheduler(racing.scheduler, racing.scheduler_options, len(study.search.objectives))
    plan = make_plan(study)
    progress = progress or Progress(study, Console(), "quiet")
    with study_lock(study.folder):
        try:
            choice = Run(plan, make_engine, progress, session or Session(study)).run()
            progress.phase("done")
            return choice
        except (Interrupted, KeyboardInterrupt):
            progress.phase("stopped", "the same command goes on")
            raise
        except Exception as error:
            progress.phase("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise
        finally:
            progress.close()


class Run:
    """One process's work on a study, under its lock."""

    def __init__(
        self, plan: Plan, make_engine: MakeEngine | None, progress: Progress, session: Session | None = None
    ) -> None:
        self.session = session or Session(plan.study)
        self.plan, self.study, self.folder = plan, plan.study, plan.study.folder
        self.make_engine, self.progress = make_engine, progress
        self.watchers: list[Watcher] = [progress]
        self.version = space_version(plan.spaces, plan.objective())
        sweep_up(self.folder)
        self._write_facts()
        entries = plan.samples.of_split("search")
        self.race = make_race(self.study, entries, plan.bounds())
        self.entries = entries
        self.ledger = Ledger(self.folder / "ledger")
        self.journal = Journal(self.folder / "search", self.version)
        self.stopping = False
        self.clerk: Clerk | None = None
        self._preparing: threading.Thread | None = None
        self.pool = Pool(NoBackend())
        self.conductor = self._conductor()
        self.search = self._search()

    def _write_facts(self) -> None:
        save_samples(self.plan.samples, self.folder / "samples.parquet", self.plan.samples_from)
        write_if_changed(self.folder / "study.yaml", saved_form(self.study).encode())
        if self.plan.suggested is not None:
            write_json(self.folder / AUTO_SPACES, self.plan.suggested)
        write_json(self.folder / FACTS, study_facts(self.plan, self.version, read_json(self.folder / FACTS)))

    def _make_clerk(self) -> Clerk:
        """Mirrors of this run's search and standings."""
        contents = Contents(self.plan, self.search, self.conductor.standings)
        self.contents = contents
        self.mirror = Mirror(self.study, self.journal)
        gauges = self.conductor.results.gauges
        self.tracker = Tracker(self.study, {"datasets": contents.datasets()}, contents, gauges.take)
        mirrors = {"the Optuna database": self.mirror.sync}
        if tracking_uri(self.study) is not None:
            mirrors["MLflow"] = self.tracker.sync
        return Clerk(mirrors)

    def _conductor(self) -> Conductor:
        neighbours = OtherStudies(self.study, self.plan.scope) if self.study.reuse else None
        results = Results(self.plan, self.ledger, self.pool, neighbours)
        return Conductor(self.plan, results, Standings(self.race, self.entries), self.watchers)

    def _search(self) -> Search:
        search = Search(self.study.search, self.plan.spaces, self.plan.points, self.plan.identify, self.journal)
        search.replay()
        return search

    # ---- the whole

    def run(self) -> Result:
        left: threading.Thread | None = None
        with self._signals():
            try:
                try:
                    result = self._known() or self._work()
                finally:
                    self.pool.close()
                    left = _beside(self.session.leave, "leaving Ray")
                    if self._preparing is not None:
                        self._preparing.join()
                    if self.clerk is not None:
                        self.clerk.close()
                return self._publish(result)
            finally:
                if left is not None:
                    left.join()

    def remake(self) -> tuple[Result, dict[str, str]]:
        """Report and mirrors from what is known, and what of it failed. Raises WorkNeeded where results are missing."""
        result = self._from_ledger()
        return result, self._mirror(result)

    def _publish(self, result: Result) -> Result:
        """Report and mirrors; after a run that changed nothing all of it is already there."""
        self._mirror(result)
        return with_mlflow(result, tracking_uri(self.study))

    def _mirror(self, result: Result) -> dict[str, str]:
        self.contents.final = {
            "winner_id": result.verdict.winner_id,
            "runner_up_id": result.data.runner_up_id,
            "verdict": result.verdict,
            "heldout": result.heldout,
        }
        self.ledger.merge()
        write_report(result)
        clerk = Clerk({})
        if not self.mirror.up_to_date():
            clerk.mirrors["the Optuna database"] = self.mirror.sync
        wanted = self.tracker.wanted()
        if not self.tracker.up_to_date(wanted):
            clerk.mirrors["MLflow"] = lambda: self.tracker.conclude(result.folder, result.verdict.winner_id, wanted)
        clerk.close()
        return clerk.failed

    def _known(self) -> Result | None:
        """The study from the ledger alone, or None where something has to be computed."""
        try:
            return self._from_ledger()
        except WorkNeeded:
            return None

    def _from_ledger(self) -> Result:
        self._make_clerk()
        self.progress.follow(self.conductor, workers=False)
        self._search_all(self.conductor.race)
        return finish(self.plan, self.conductor, self.search)

    def _work(self) -> Result:
        self._preparing = _beside(self._prepare, "MLflow's start")
        self.pool = self._make_pool()
        self.conductor = self._conductor()
        self.search = self._search()
        self.progress.follow(self.conductor, workers=True)
        self.clerk = self._make_clerk()
        self.clerk.start()
        self.watchers.append(self.clerk)
        self.conductor.watchers = self.watchers
        if self.stopping:
            raise Interrupted
        if self.study.workers.backend == "inline":
            self._search_all(self.conductor.race)
        else:
            self._search_with_tune()
        return finish(self.plan, self.conductor, self.search)

    def _prepare(self) -> None:
        """What the end needs and takes seconds to import, while there is time."""
        self.tracker.prepare()
        prepare_report()

    def _search_all(self, race: Callable[[Sequence[Asked]], list[Told]]) -> None:
        """The trials that are done (their rows may have to be made again), then batch after batch."""
        self.progress.phase("searching")
        for asked, told in zip(self.search.trials, self._told(), strict=True):
            self.conductor.restore(asked, told)
        while not self.stopping and (batch := self.search.next_batch()) is not None:
            self.search.tell(race(batch))
        if self.stopping:
            raise Interrupted
        self.conductor.baseline()

    def _told(self) -> Iterator[Told]:
        for asked in self.search.trials:
            yield self.search.told[asked.number]

    # ---- with Ray Tune

    def _search_with_tune(self) -> None:
        tune = TuneRun(
            namespace=self.study.cluster.namespace,
            study=self.study.study,
            storage=str((self.folder / "tune").resolve()),
            scheduler=self.study.racing.scheduler,
            options=self.study.racing.scheduler_options,
        )
        tune.open()
        failure: list[BaseException] = []
        thread = threading.Thread(target=self._feed, args=(tune, failure), name="conductor", daemon=True)
        thread.start()
        try:
            tune.run(self.race.last_rung + 1)
        finally:
            tune.stop()
            thread.join()
        if failure:
            raise failure[0]

    def _feed(self, tune: TuneRun, failure: list[BaseException]) -> None:
        """The conductor's thread."""
        self.conductor.watchers = [*self.watchers, _Reporter(tune, self.race.last_rung)]
        if tune.lockstep:
            numbers = {asked.id: asked.number for asked in self.search.trials}
            self.conductor.proceed = lambda trial_id, rung: tune.goes_on(
                numbers.get(trial_id, int(trial_id[1:])), rung, lambda: self.stopping
            )
            for asked in self.search.trials:
                tune.replay(asked, self.search.told[asked.number])

        def race(batch: Sequence[Asked]) -> list[Told]:
            tune.stage.offer(batch)
            if not tune.lockstep:
                return self.conductor.race(batch)
            return [told for one in batch for told in self.conductor.race([one])]

        try:
            self._search_all(race)
        except BaseException as error:
            failure.append(error)
            tune.stop()
        finally:
            self.conductor.watchers = self.watchers
            self.conductor.proceed = lambda trial_id, rung: True
            tune.stage.close()

    # ---- workers

    def _make_pool(self) -> Pool:
        if self.make_engine is None:
            from statespan.orchestration.model_engine import load_engine

            self.make_engine = load_engine
        timeout = self.study.workers.item_timeout_seconds
        if self.study.workers.backend == "inline":
            return Pool(InlineBackend(self._inline_worker), item_timeout=timeout)
        self.session.wait()
        self._listen()
        import ray

        device, workers = self.plan.numerics.device, self.study.workers
        resources: Callable[[], dict[str, float]] = ray.cluster_resources
        share = None
        if device == "cuda" and workers.per_gpu == "auto":
            alone = self._backend(Layout(1, 0.5, 1.0, equal_parts(1).memory_fraction), "probe", detached=False)
            probing = Pool(alone, item_timeout=timeout)
            share = measure(self.plan, probing, alone.gpu_bytes)
            probing.close()
            logger.info("%d workers share a GPU", share.per_gpu)
        pool = Pool(self._backend(layout(workers, device, resources(), share), "worker"), item_timeout=timeout)
        pool.start()
        return pool

    def _backend(self, shape: Layout, role: str, detached: bool | None = None) -> RayBackend:
        assert self.make_engine is not None
        cluster = self.study.cluster
        return RayBackend(
            self.plan.worker_spec(shape.memory_fraction),
            self.plan.samples.table,
            self.make_engine,
            names=[f"{self.study.study}-{role}-{i}" for i in range(shape.count)],
            cluster=cluster if detached is None else cluster.model_copy(update={"detached": detached}),
            cpus=shape.cpus,
            gpus=shape.gpus,
            own_environment=not self.session.has_environment,
            prepared=self.session.actors if role == "worker" else (),
        )

    def _inline_worker(self, name: str) -> Worker:
        assert self.make_engine is not None
        return Worker(self.plan.worker_spec(), self.plan.samples.table, self.make_engine, name)

    # ---- signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """First signal: begin nothing new and finish what is in flight. Second: stop at once."""
        before = {name: signal.getsignal(name) for name in SIGNALS}
        self._listen()
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for name, handler in before.items():
                    signal.signal(name, handler or signal.SIG_DFL)  # None: not set by Python

    def _listen(self) -> None:
        """Again once Ray has started, which takes SIGTERM for itself and would die of it."""
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                signal.signal(name, self._drain)

    def _drain(self, number: int, frame: Any) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.pool.stop()
        logger.warning("stopping: waiting for %d work items; once more stops at once", self.pool.in_flight)


def _beside(work: Callable[[], None], name: str) -> threading.Thread:
    """Begin some work in a thread of its own."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


class _Reporter:
    """Passes every rung on to Tune."""

    def __init__(self, tune: TuneRun, last_rung: int) -> None:
        self.tune, self.last_rung = tune, last_rung

    def rung_done(self, asked: Asked | None, rung: Any) -> None:
        if asked is not None:
            self.tune.answer(asked.number, rung, last=rung["decision"] in ("stop", "finish"))

    def trial_done(self, asked: Asked, told: Told) -> None:
        return None

    def progress(self) -> None:
        return None
