"""Workers on a GPU: as many as fit, none beyond its part; measured on a stand-in that says what it took."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statespan.config import Workers
from statespan.errors import UserError
from statespan.orchestration.cluster import Layout, layout
from statespan.orchestration.gpu_share import CONTEXT_BYTES, HEADROOM, MOST, USED, Share, fitting, measure, probe
from statespan.orchestration.plan import GIB, make_plan
from statespan.orchestration.pool import InlineBackend, Pool
from statespan.orchestration.worker import Worker
from tests.fake_engine import InstantEngine
from tests.studies import small_study


@given(peak=st.integers(GIB // 4, 100 * GIB), store=st.integers(0, 8 * GIB), total=st.integers(8 * GIB, 200 * GIB))
def test_as_many_workers_as_fit_and_no_more(peak, store, total):
    share = fitting(peak, store, total)
    need = HEADROOM * peak + store + CONTEXT_BYTES
    assert 1 <= share.per_gpu <= MOST
    if share.per_gpu > 1:
        assert share.per_gpu * (share.memory_fraction * total + CONTEXT_BYTES) <= USED * total + 1
        assert share.memory_fraction * total >= HEADROOM * peak + store - 1, "a worker has what it was measured to need"
    if share.per_gpu < MOST:
        assert (share.per_gpu + 1) * need > USED * total


def test_one_worker_has_nearly_all_of_the_gpu():
    assert fitting(70 * GIB, 0, 80 * GIB) == Share(1, USED)


class Hungry(InstantEngine):
    def evaluate(self, setting, task, samples, alone):
        taken = 3 * GIB * len(samples)
        return [replace(one, peak_bytes=taken) for one in super().evaluate(setting, task, samples, alone)]


def pool_of(plan, engine):
    return Pool(InlineBackend(lambda name: Worker(plan.worker_spec(), plan.samples.table, engine, name)))


def test_the_probe_runs_the_longest_samples_as_many_as_run_together(tmp_path):
    numerics = {"deterministic": False, "batch_tokens": 1300}
    plan = make_plan(small_study(tmp_path, numerics=numerics))
    item = probe(plan)
    lengths = [plan.samples.entries[row].length for row in item.rows]
    assert set(lengths) == {400} and len(lengths) == 3
    # three samples at once took 9 GiB; plus headroom and context, twice in 32 GiB
    share = measure(plan, pool_of(plan, Hungry), lambda: 32 * GIB)
    assert share == fitting(9 * GIB, 0, 32 * GIB) and share.per_gpu == 2


def test_what_could_not_be_measured_is_one_worker(tmp_path):
    plan = make_plan(small_study(tmp_path))
    assert measure(plan, pool_of(plan, InstantEngine), lambda: 80 * GIB).per_gpu == 1


def test_the_layout_follows_the_cluster_the_study_and_what_was_measured():
    auto = Workers(per_gpu="auto")
    assert layout(auto, "cuda", {"GPU": 2}, Share(3, 0.3)) == Layout(6, 0.5, 1 / 3, 0.3)
    assert layout(auto, "cuda", {"GPU": 2}) == Layout(2, 0.5, 1.0, USED)
    assert layout(Workers(per_gpu=4), "cuda", {"GPU": 1}) == Layout(4, 0.5, 0.25, USED / 4)
    assert layout(Workers(count=3), "cuda", {}).count == 3, "a study may wait for GPUs"
    with pytest.raises(UserError, match="the cluster has no GPU now"):
        layout(auto, "cuda", {"CPU": 4})
    assert layout(Workers(threads=2), "cpu", {"CPU": 1}).count == 1
