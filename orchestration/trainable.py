"""Ray Tune's side of a study: light trials that report what the conductor finds, rung by rung.

A Tune trial is a function in a small process without torch. It asks the router, a mailbox actor, for its next rung,
waits, and reports it; the work is done by the pool, which the conductor feeds from a thread of the driver. One Tune
trial runs at a time and its process is reused: the trials of a batch are computed together whatever Tune does, so more
processes would only wait (trials that finish together lose their processes, which costs 2 s each to start again).

With racing, decisions are the conductor's and Tune is told. With a scheduler of Tune's own, the conductor works on one
trial at a time and waits for Tune's decision after each rung; trials of an earlier run are reported to it again first,
so that it decides as if nothing had been interrupted. Schedulers that pause, perturb or restart trials are refused.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from statespan.errors import UserError, unknown
from statespan.orchestration.journal import Asked, Told

Reply = dict[str, Any]
SCHEDULERS = {
    "asha": "AsyncHyperBandScheduler",
    "median": "MedianStoppingRule",
    "ASHAScheduler": "AsyncHyperBandScheduler",
    "AsyncHyperBandScheduler": "AsyncHyperBandScheduler",
    "MedianStoppingRule": "MedianStoppingRule",
}
OWN = ("racing", "none")


class Router:
    """Mailbox between Tune's trials and the driver. Answers stay, so a trial that is begun again gets them at once."""

    def __init__(self) -> None:
        self._replies: dict[tuple[int, int], Reply] = {}
        self._asked: set[tuple[int, int]] = set()
        self._changed = asyncio.Condition()
        self._over = False

    async def rung(self, number: int, rung: int) -> Reply | None:
        """A trial's rung, when it is known; None when there will be no more."""
        async with self._changed:
            self._asked.add((number, rung))
            self._changed.notify_all()
            await self._changed.wait_for(lambda: (number, rung) in self._replies or self._over)
            return self._replies.get((number, rung))

    async def answer(self, number: int, rung: int, reply: Reply) -> None:
        async with self._changed:
            self._replies[number, rung] = reply
            self._changed.notify_all()

    async def asked(self, number: int, rung: int) -> bool:
        """Whether the trial has asked for this rung."""
        return (number, rung) in self._asked

    async def stop(self) -> None:
        async with self._changed:
            self._over = True
            self._changed.notify_all()


def follow(config: Mapping[str, Any]) -> None:
    """The Tune trial: report every rung."""
    import ray
    from ray import tune

    get: Callable[[Any], Reply | None] = ray.get
    router = ray.get_actor(config["router"], namespace=config["namespace"])
    rung = 0
    while (reply := get(router.rung.remote(config["number"], rung))) is not None:
        tune.report(reply["metrics"])
        if reply["last"]:
            return
        rung += 1


def check_scheduler(name: str, options: Mapping[str, Any], objectives: int) -> None:
    """Refuse what cannot work before anything is started."""
    if name in OWN:
        if options:
            raise UserError(f"racing.scheduler {name} takes no scheduler_options")
        return
    if name not in SCHEDULERS:
        raise unknown("racing.scheduler", name, [*OWN, *SCHEDULERS])
    if objectives > 1:
        raise UserError(f"racing.scheduler {name} has one objective only; use racing or none with several")


def make_scheduler(name: str, options: Mapping[str, Any], rungs: int) -> Any:
    """Tune's scheduler. Ours stops what the conductor says shall stop."""
    from ray.tune import schedulers

    if name in OWN:
        return _told_scheduler()
    cls = getattr(schedulers, SCHEDULERS[name])
    defaults: dict[str, Any] = {"time_attr": "climbed"}
    if cls is schedulers.AsyncHyperBandScheduler:
        defaults |= {"max_t": rungs, "grace_period": 1, "reduction_factor": 2}
    else:
        defaults |= {"grace_period": 1, "min_samples_required": 3}
    try:
        return cls(metric="quality", mode="max", **{**defaults, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"racing.scheduler_options do not suit {name}: {error}") from error


def _told_scheduler() -> Any:
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class ToldScheduler(FIFOScheduler):
        """Stops a trial when its result says so: racing.decide has decided."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            stop: str = TrialScheduler.STOP
            return stop if result.get("decision") == "stop" else str(TrialScheduler.CONTINUE)

    make: Callable[[], TrialScheduler] = ToldScheduler
    return make()


STAGES: dict[str, Stage] = {}
"""Of this process, by the router's name."""


class Stage:
    """What the conductor's thread and Tune's searcher share."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Asked] = deque()
        self._ended: set[int] = set()
        self._over = False

    def offer(self, trials: Sequence[Asked]) -> None:
        with self._changed:
            self._waiting.extend(trials)
            self._changed.notify_all()

    def close(self) -> None:
        """No more trials will be offered."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def take(self, seconds: float) -> Asked | None:
        """The next trial; None where none came within this time, or none will."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._over, timeout=seconds)
            return self._waiting.popleft() if self._waiting else None

    @property
    def over(self) -> bool:
        with self._changed:
            return self._over and not self._waiting

    def ended(self, number: int) -> None:
        """Tune has done with a trial."""
        with self._changed:
            self._ended.add(number)
            self._changed.notify_all()

    def has_ended(self, number: int, seconds: float = 0.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: number in self._ended, timeout=seconds)


def _take(router: str) -> Asked | None:
    return STAGES[router].take(seconds=0.5)


def _over(router: str) -> bool:
    return STAGES[router].over


def _ended(router: str, number: int) -> None:
    STAGES[router].ended(number)


def make_searcher(router: str, namespace: str) -> Any:
    """Tune's searcher: hands out the trials that the search has asked, in order.

    Tune pickles it with all the globals its class names, so the stage's locks stay behind functions.
    """
    from ray.tune.search import Searcher

    class StageSearcher(Searcher):
        def __init__(self) -> None:
            super().__init__(metric="quality", mode="max")
            self.numbers: dict[str, int] = {}

        def suggest(self, trial_id: str) -> Any:
            """A config, FINISHED or None. Tune's own annotation forgets FINISHED, a string."""
            asked = _take(router)
            if asked is None:
                return str(Searcher.FINISHED) if _over(router) else None
            self.numbers[trial_id] = asked.number
            return {
                "number": asked.number,
                "trial": asked.id,
                "method": asked.method,
                "params": dict(asked.params),
                "router": router,
                "namespace": namespace,
            }

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            _ended(router, self.numbers[trial_id])

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the journal holds all there is."""

        def restore(self, checkpoint_path: str) -> None:
            raise AssertionError("a study goes on by the same command, not by Tuner.restore")

    return StageSearcher()


class TuneRun:
    """Tune beside the conductor: `run` drives it in this thread while `work` feeds it from another."""

    def __init__(self, *, namespace: str, study: str, storage: str, scheduler: str, options: Mapping[str, Any]) -> None:
        self.namespace, self.storage = namespace, storage
        self.scheduler, self.options = scheduler, options
        self.stage = Stage()
        self.router_name = f"{study}-router-{os.urandom(4).hex()}"
        self._router: Any = None

    @property
    def lockstep(self) -> bool:
        """Whether Tune's decisions count."""
        return self.scheduler not in OWN

    def open(self) -> None:
        import ray

        STAGES[self.router_name] = self.stage
        remote: Any = ray.remote(Router)
        self._router = remote.options(
            name=self.router_name, namespace=self.namespace, num_cpus=0, max_concurrency=1000
        ).remote()

    def answer(self, number: int, record: Mapping[str, Any], last: bool) -> None:
        """Tell a trial's rung to the Tune trial that waits, or will wait, for it."""
        metrics = {name: record[name] for name in ("rung", "samples", "decision", "reason")}
        metrics |= {"quality": record["score"], "climbed": record["rung"] + 1}
        self._router.answer.remote(number, record["rung"], {"metrics": metrics, "last": last})

    def goes_on(self, number: int, rung: int, stopping: Callable[[], bool]) -> bool:
        """Tune's decision after a rung: it asks for the next one, or ends the trial."""
        import ray

        while not stopping():
            if ray.get(self._router.asked.remote(number, rung + 1)):
                return True
            if self.stage.has_ended(number, seconds=0.02):
                return bool(ray.get(self._router.asked.remote(number, rung + 1)))
        return True

    def replay(self, asked: Asked, told: Told) -> None:
        """Report a trial of an earlier run again, for a scheduler that has to know it."""
        self.stage.offer([asked])
        for record in told.rungs:
            self.answer(asked.number, record, last=record is told.rungs[-1])

    def run(self, rungs: int) -> None:
        """Drive Tune until the stage is over and every trial has reported."""
        import logging

        import ray
        from ray import tune

        for name in ("ray.tune", "ray.air", "ray._private"):
            logging.getLogger(name).setLevel(logging.ERROR)
        tuner = tune.Tuner(
            tune.with_resources(follow, {"cpu": 0.01}),
            tune_config=tune.TuneConfig(
                search_alg=make_searcher(self.router_name, self.namespace),
                scheduler=make_scheduler(self.scheduler, self.options, rungs),
                num_samples=-1,
                max_concurrent_trials=1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: f"{trial.config.get('trial', 'trial')}-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=self.storage,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=10),
            ),
        )
        tuner.fit()
        ray.get(self._router.stop.remote())

    def stop(self) -> None:
        """Let every waiting trial go."""
        self.stage.close()
        if self._router is not None:
            self._router.stop.remote()
