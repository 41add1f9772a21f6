"""Worker, schedule and pool, without a cluster: a stand-in backend dies, stalls and runs out of memory on command."""

from collections import deque
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statespan.benchmarks.base import Sample
from statespan.orchestration.items import SampleOutcome, Setting, WorkItem, WorkResult
from statespan.orchestration.pool import (
    ATTEMPTS,
    DEATHS,
    Event,
    InlineBackend,
    Interrupted,
    NoBackend,
    Pool,
    PoolBroken,
    WorkNeeded,
)
from statespan.orchestration.samples import SCHEMA
from statespan.orchestration.schedule import Board, CostModel, owner
from statespan.orchestration.worker import BatchLimit, Worker, WorkerSpec
from tests.fake_engine import InstantEngine

SETTING = Setting(method="decimamba", params={"first_layer": 1, "base_tokens": 100})


def spec(**changes):
    values = dict(
        model="m", revision=None, digest="d", train_length=8, dtype="float32", device="cpu", deterministic=False,
        batch_tokens=40, tasks={},
    )  # fmt: skip
    return WorkerSpec(**(values | changes))


def table(count=8, length=10):
    rows = [
        {"task": "quiz", "id": f"s{i}", "prompt_ids": [1] * length, "kind": "generate", "document": f"d{i}",
         "length": length, "depth": None, "targets": [], "target_ids": [], "max_new_tokens": 1, "stop": [],
         "meta": "{}", "digest": f"{i}", "split": "search"}
        for i in range(count)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def item(name="i0", rows=(0, 1, 2, 3), pack="p0", tokens=40, layers=4):
    return WorkItem(
        id=name, trial_id="t0000", setting=SETTING, task="quiz", rung=0, split="search", rows=tuple(rows),
        keys=tuple(f"{name}-{row}" for row in rows), length=10, tokens=tokens, layers=layers, pack=pack,
    )  # fmt: skip


# ---- worker


def test_a_worker_answers_every_row_in_order():
    result = Worker(spec(), table(), InstantEngine).run(item())
    assert [one.row for one in result.outcomes] == [0, 1, 2, 3]
    assert [one.key for one in result.outcomes] == list(item().keys)
    assert {one.status for one in result.outcomes} == {"done"} and not result.ran_out


def test_out_of_memory_halves_the_batch_and_is_remembered():
    worker = Worker(spec(), table(), lambda s: InstantEngine(s, fits_tokens=20))
    first, second = worker.run(item()), worker.run(item("i1"))
    assert {one.status for one in first.outcomes} == {"done"}
    assert first.ran_out and first.batch == 20 and not second.ran_out


def test_what_other_workers_learned_is_taken_over():
    calls = []

    class Counting(InstantEngine):
        def evaluate(self, setting, task, samples, alone):
            calls.append(len(samples))
            return super().evaluate(setting, task, samples, alone)

    Worker(spec(), table(), Counting).run(item(), batch_tokens=10)
    assert calls == [1, 1, 1, 1]


def test_a_sample_that_never_fits_is_an_outcome():
    result = Worker(spec(), table(), lambda s: InstantEngine(s, fits_tokens=5)).run(item(rows=(0, 1)))
    assert [one.status for one in result.outcomes] == ["oom", "oom"]
    assert "2 GiB" in result.outcomes[0].error and result.outcomes[0].score != result.outcomes[0].score


def test_memory_kept_for_speed_is_given_back_before_a_batch_is_cut():
    class Hoarder(InstantEngine):
        hoard = 30

        def evaluate(self, setting, task, samples, alone):
            self.fits_tokens = 40 - self.hoard
            return super().evaluate(setting, task, samples, alone)

        def free(self):
            self.hoard = 0

    result = Worker(spec(), table(), Hoarder).run(item())
    assert {one.status for one in result.outcomes} == {"done"} and not result.ran_out


def test_one_bad_sample_does_not_take_the_others_with_it():
    def fail(setting, sample: Sample):
        return "weights on fire" if sample.id == "s2" else ""

    result = Worker(spec(), table(), lambda s: InstantEngine(s, fail=fail)).run(item())
    assert [one.status for one in result.outcomes] == ["done", "done", "failed", "done"]
    assert "weights on fire" in result.outcomes[2].error


@pytest.mark.parametrize("rows_apart, sizes", [(False, [1, 1, 1, 1]), (True, [4])])
def test_a_deterministic_batch_is_one_sample_unless_the_engine_keeps_rows_apart(rows_apart, sizes):
    calls = []

    class Counting(InstantEngine):
        def evaluate(self, setting, task, samples, alone):
            calls.append(len(samples))
            return super().evaluate(setting, task, samples, alone)

    result = Worker(spec(deterministic=True), table(), lambda s: Counting(s, rows_apart=rows_apart)).run(item())
    assert calls == sizes and [one.row for one in result.outcomes] == [0, 1, 2, 3]


def test_deterministic_runs_each_sample_alone():
    assert BatchLimit(1000, one_by_one=True).samples(10) == 1
    assert BatchLimit(1000, one_by_one=False).samples(10) == 100
    assert BatchLimit(5, one_by_one=False).samples(10) == 1


# ---- schedule


@given(st.integers(2, 6), st.integers(0, 99))
def test_a_lost_worker_moves_only_its_own_share(workers, seed):
    names = [f"w{i}" for i in range(workers)]
    packs = [f"{seed}-{i}" for i in range(40)]
    gone = names[seed % workers]
    left = [name for name in names if name != gone]
    for pack in packs:
        if owner(pack, names) != gone:
            assert owner(pack, left) == owner(pack, names)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), min_size=1, max_size=30), st.integers(1, 4))
def test_every_item_is_given_out_once(shapes, workers):
    names = [f"w{i}" for i in range(workers)]
    board = Board(CostModel())
    items = [item(f"i{i}", pack=f"p{pack}", tokens=tokens) for i, (pack, tokens) in enumerate(shapes)]
    board.fill(items, names)
    taken, turn = [], 0
    while len(board):
        got = board.take(names[turn % workers])
        turn += 1
        if got is not None:
            taken.append(got.id)
    assert sorted(taken) == sorted(one.id for one in items)


def test_long_packs_go_first_and_a_pack_keeps_its_order():
    board = Board(CostModel())
    board.fill([item("a", pack="short", tokens=1), item("b", pack="long", tokens=9), item("c", pack="long")], ["w"])
    assert [board.take("w").id for _ in range(3)] == ["b", "c", "a"]


@pytest.mark.parametrize("shared, takes", [(0, True), (2, True), (40, False)])
def test_a_pack_is_parted_only_where_computing_the_shared_layers_again_is_the_shorter_way(shared, takes):
    board = Board(CostModel())
    first = item("a", pack="p", layers=8)
    rest = [replace(item(f"b{i}", pack="p", layers=4), shared_layers=shared) for i in range(3)]
    board.fill([first, *rest], ["w0"])
    board.queues["w1"] = []
    taken = board.take("w1")
    assert (taken is not None and taken.id == "b1") is takes


def test_a_worker_without_work_takes_a_whole_pack_before_it_parts_one():
    board = Board(CostModel())
    board.queues = {"w0": [[item("a", pack="x"), item("b", pack="x")], [item("c", pack="y"), item("d", pack="y")]],
                    "w1": []}  # fmt: skip
    assert board.take("w1").id == "c"
    board.queues["w1"] = []
    assert board.take("w1").id == "b"


def test_the_cost_model_finds_what_a_token_and_a_sample_cost():
    cost = CostModel()
    for rows, tokens in [((0,), 1000), ((0, 1), 5000), ((0, 1, 2), 300)]:
        cost.learn(item(rows=rows), 2e-4 * tokens + 0.5 * len(rows), tokens)
    assert cost.seconds_per_layer_token == pytest.approx(2e-4) and cost.seconds_per_sample == pytest.approx(0.5)


# ---- pool


@dataclass
class ScriptedBackend:
    """Workers that do what the script says at each item; `ok` when it is used up."""

    names: list[str]
    script: dict[str, deque] = field(default_factory=dict)
    queue: dict[str, deque] = field(default_factory=dict)
    events: deque = field(default_factory=deque)
    restarted: list[str] = field(default_factory=list)
    limits: list[int | None] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)

    def start(self):
        self.events.extend(Event(name, "ready") for name in self.names)
        self.queue = {name: deque() for name in self.names}
        return self.names

    def submit(self, worker, item, batch_tokens):
        self.limits.append(batch_tokens)
        self.queue[worker].append(item)

    def wait(self, seconds):
        if self.events:
            return [self.events.popleft()]
        for worker, queue in self.queue.items():
            if queue:
                return self._step(worker, queue)
        return []

    def _step(self, worker, queue):
        script = self.script.get(worker)
        act = script.popleft() if script else "ok"
        if act == "die":
            queue.clear()
            return [Event(worker, "died", error="killed")]
        if act == "stall":
            return []
        one = queue.popleft()
        self.log.append((worker, one.id))
        outcomes = tuple(
            SampleOutcome(row=row, key=key, status="done", score=1.0)
            for row, key in zip(one.rows, one.keys, strict=True)
        )
        return [Event(worker, "done", WorkResult(item_id=one.id, outcomes=outcomes, seconds=0.1, worker=worker,
                                                 batch=7, ran_out=act == "oom"))]  # fmt: skip

    def restart(self, worker):
        self.restarted.append(worker)
        self.queue[worker].clear()
        self.events.append(Event(worker, "ready"))

    def close(self):
        self.queue = {}


def items(count):
    return [item(f"i{i}", pack=f"p{i}") for i in range(count)]


def done(pool, count=6):
    return {one.id: result for one, result in pool.run(items(count))}


def test_all_items_come_back():
    results = done(Pool(ScriptedBackend(["w0", "w1"])))
    assert sorted(results) == [f"i{i}" for i in range(6)]
    assert all(outcome.status == "done" for result in results.values() for outcome in result.outcomes)


def test_a_dead_worker_is_started_again_and_loses_nothing():
    backend = ScriptedBackend(["w0"], {"w0": deque(["ok", "die", "ok", "die"])})
    results = done(Pool(backend))
    assert sorted(results) == [f"i{i}" for i in range(6)] and backend.restarted == ["w0", "w0"]
    assert all(outcome.status == "done" for result in results.values() for outcome in result.outcomes)


def test_an_item_that_kills_its_worker_is_given_up_and_the_others_go_on():
    backend = ScriptedBackend(["w0"], {"w0": deque(["die"] * ATTEMPTS)})
    results = done(Pool(backend))
    lost = [name for name, result in results.items() if result.outcomes[0].status == "failed"]
    assert len(results) == 6 and len(lost) == 1
    assert f"given up after {ATTEMPTS} tries: killed" in results[lost[0]].outcomes[0].error


def test_a_worker_that_keeps_dying_leaves_its_share_to_the_others():
    backend = ScriptedBackend(["w0", "w1"], {"w0": deque(["die"] * DEATHS)})
    pool = Pool(backend)
    results = done(pool, 12)
    assert len(results) == 12 and list(pool.slots) == ["w1"]


def test_no_worker_left_is_said():
    backend = ScriptedBackend(["w0"], {"w0": deque(["die"] * 50)})
    with pytest.raises(PoolBroken, match="every worker died 5 times in a row; the last one said: killed"):
        done(Pool(backend), 20)


def test_a_death_that_cannot_be_helped_stops_at_once():
    class Refusing(ScriptedBackend):
        def start(self):
            names = super().start()
            self.events = deque([Event("w0", "died", error="other weights here", fatal=True)])
            return names

    with pytest.raises(PoolBroken, match="other weights here"):
        done(Pool(Refusing(["w0"])))


def test_an_item_that_takes_too_long_is_tried_again_and_given_up():
    now = [0.0]

    class Slow(ScriptedBackend):
        def _step(self, worker, queue):
            if queue[0].id == "i3":
                now[0] += 1.0
                return []
            return super()._step(worker, queue)

    pool = Pool(Slow(["w0"]), item_timeout=5.0, clock=lambda: now[0])
    results = done(pool)
    assert results["i3"].outcomes[0].status == "timeout" and len(results) == 6
    assert sum(result.outcomes[0].status == "done" for result in results.values()) == 5


def test_a_smaller_batch_once_learned_holds_for_all_workers():
    backend = ScriptedBackend(["w0", "w1"], {"w0": deque(["oom"])})
    pool = Pool(backend)
    done(pool, 12)
    assert pool.batch_tokens == 7 and backend.limits[0] is None and backend.limits[-1] == 7


def test_no_more_than_two_items_wait_at_a_worker():
    class Watched(ScriptedBackend):
        most = 0

        def submit(self, worker, item, batch_tokens):
            super().submit(worker, item, batch_tokens)
            self.most = max(self.most, len(self.queue[worker]))

    backend = Watched(["w0"])
    done(Pool(backend), 9)
    assert backend.most == 2


def test_stopping_finishes_what_is_in_flight_and_begins_nothing():
    backend = ScriptedBackend(["w0"])
    pool = Pool(backend)
    seen = []
    with pytest.raises(Interrupted):
        for one, _ in pool.run(items(9)):
            seen.append(one.id)
            pool.stop()
    assert len(seen) == 2 and len(backend.log) == 2


def test_nothing_to_do_starts_nobody():
    assert list(Pool(NoBackend()).run([])) == []
    with pytest.raises(WorkNeeded):
        list(Pool(NoBackend()).run(items(1)))


def test_the_inline_worker_is_made_when_there_is_work():
    made = []

    def make(name):
        made.append(name)
        return Worker(spec(), table(), InstantEngine, name)

    pool = Pool(InlineBackend(make))
    assert list(pool.run([])) == [] and made == []
    assert len(done(pool)) == 6 and made == ["inline"]
