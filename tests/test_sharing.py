"""What trials share changes no bit, whatever the method, the order of trials and the size of the store."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from statespan.methods.table import METHODS, build_method
from statespan.models.prefix import PrefixStore
from statespan.models.runner import Runner, Tokens
from statespan.models.store import Rack, Shelf, StreamStore, moved, tensors
from statespan.orchestration.items import Setting
from statespan.orchestration.model_engine import load_engine
from statespan.orchestration.packs import make_items
from statespan.orchestration.plan import make_plan
from statespan.search_spaces.loader import load_space
from tests.method_conformance import TRAIN_LENGTH, prompts
from tests.methods import facts_for, stand_ins
from tests.studies import small_study
from tests.swaps import STORE
from tests.test_search_space_files import drawer, space_facts
from tests.tiny import save_checkpoint, tiny_model

ROOT = Path(__file__).parent.parent
CHUNK = 64
LENGTHS = (40, 150, 230)
"""Shorter than the training length, and of several chunks."""

model_of = cache(lambda kind: tiny_model(kind, dtype=torch.float32))


def settings(name, facts):
    """The published setting and a few from the space."""
    if name == "vanilla":
        return [{}]
    space = load_space(name, space_facts(facts))
    drawn = (space.draw(drawer(seed)) for seed in range(100))
    return [space.published[0], *[point for point in drawn if not space.broken(point)][:4]]


def read(runner, method, ids):
    """Everything that a trial gets of a prompt: hidden states, cache, and three decoded tokens' logits."""
    runner = method.runner(runner)
    prefilled = method.prefill(runner, Tokens.pad([ids]), tail=2)
    logits = [runner.model.logits(prefilled.hidden[:, -1])]
    states = list(tensors(prefilled.cache.clone()))
    for _ in range(3):
        logits.append(runner.step(prefilled.cache, logits[-1].argmax(dim=-1)))
    return [prefilled.hidden, prefilled.positions, *states, *logits]


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("store", [pytest.param(1 << 26, id="roomy"), pytest.param(30_000, id="tight")])
@pytest.mark.parametrize("name", METHODS)
def test_a_shared_run_is_bit_for_bit_the_unshared_one(name, store, kind):
    facts = facts_for(kind, train_length=TRAIN_LENGTH)
    if kind not in METHODS[name].supports:
        pytest.skip(f"{name} does not act on {kind}")
    trials = [build_method(name, point, facts, stand_ins(facts)) for point in settings(name, facts)]
    sharing = Runner(model_of(kind), chunk=CHUNK, store=StreamStore(store, 4 * store))
    with torch.inference_mode():
        for ids in prompts(*LENGTHS):
            for method in [*trials, build_method("vanilla", {}, facts), *reversed(trials)]:
                plain = Runner(model_of(kind), chunk=CHUNK)
                before = sharing.work.computed + sharing.work.shared
                ours, theirs = read(sharing, method, ids), read(plain, method, ids)
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), (name, method)
                spent = sharing.work.computed + sharing.work.shared - before
                assert spent == plain.work.computed, "a layer-token is computed or shared, not both"
    assert sharing.work.shared > 0 or store < 1 << 26


def test_a_worker_gives_a_sample_of_a_batch_what_it_gets_alone(tmp_path):
    plan = make_plan(small_study(tmp_path))
    engine = load_engine(replace(plan.worker_spec(), store_bytes=1 << 26))
    assert engine.rows_apart
    samples = [plan.samples.sample(row) for row in range(5)]
    for setting in (
        Setting(method="vanilla"),
        Setting(method="decimamba", params={"first_layer": 1, "base_tokens": 32}),
    ):
        engine.free()
        batch = engine.evaluate(setting, "passkey", samples, False)
        engine.free()
        alone = [engine.evaluate(setting, "passkey", [sample], False)[0] for sample in samples]
        for mine, own in zip(batch, alone, strict=True):
            timeless = {"prefill_seconds": 0.0, "decode_seconds": 0.0}
            assert replace(mine, **timeless) == replace(own, **timeless)


def test_a_trial_that_drops_tokens_behind_a_projection_computes_only_what_it_keeps():
    facts = facts_for(train_length=TRAIN_LENGTH)
    runner = Runner(model_of("mamba1"), chunk=CHUNK, store=StreamStore(1 << 26, 1 << 26))
    (ids,) = prompts(200)
    computed = []
    with torch.inference_mode():
        for base in (60, 50, 40):
            method = build_method("decimamba", {"first_layer": 1, "base_tokens": base}, facts)
            before = runner.work.computed
            read(runner, method, ids)
            computed.append(runner.work.computed - before)
    # layer 0, layer 1 and what is kept of it in layer 2; then only what is kept, in layers 1 and 2
    assert computed == [200 + 200 + 62, 2 * 52, 2 * 42]


def test_vanilla_goes_on_from_where_a_trial_left_vanillas_stream_also_where_beginnings_are_shared():
    facts = facts_for(train_length=TRAIN_LENGTH)
    runner = Runner(model_of("mamba1"), chunk=CHUNK, store=StreamStore(1 << 26, 1 << 26), prefixes=PrefixStore())
    (ids,) = prompts(200)
    with torch.inference_mode():
        read(runner, build_method("decimamba", {"first_layer": 2, "base_tokens": 60}, facts), ids)
        before = runner.work.computed
        read(runner, build_method("vanilla", {}, facts), ids)
    assert runner.work.computed - before == 62, "what the trial dropped in the last layer was counted as its own"


def test_a_token_on_vanillas_way_is_counted_once_in_a_layer_whoever_comes_first():
    facts, (ids,) = facts_for(train_length=TRAIN_LENGTH), prompts(200)
    trials = [build_method("decimamba", {"first_layer": first, "base_tokens": 60}, facts) for first in (0, 1, 1, 2)]
    kept = [3 * 62, 2 * 62, 2 * 62, 62]  # what each of them alone computes: its survivors from its layer on
    for order in ([0, 1, 2, 3, "vanilla"], ["vanilla", 3, 2, 1, 0]):
        runner = Runner(model_of("mamba1"), chunk=CHUNK, store=StreamStore(1 << 26, 1 << 26))
        with torch.inference_mode():
            for one in order:
                read(runner, build_method("vanilla", {}, facts) if one == "vanilla" else trials[one], ids)
        if order[0] != "vanilla":
            assert runner.work.computed == 3 * 200 + sum(kept)
        else:  # its stream was kept before none of the layers, so each has to be reached again
            assert runner.work.computed > 3 * 200 + sum(kept)


def test_notes_of_what_was_counted_leave_with_their_projections(monkeypatch):
    monkeypatch.setattr("statespan.models.store.COUNTED", 3)
    store = StreamStore(1 << 20, 10)  # one projection of eight bytes
    for prompt in "abcdefgh":
        store.put_projected(prompt, 0, (torch.zeros(1, dtype=torch.float64),))
        store.count(prompt, 0, 5)
    assert len(store._counted) <= 4 and store.counted("h", 0) == 5 and store.counted("h", 0) == 0
    store.count("never kept", 0, 5)
    assert store.counted("never kept", 0) == 0


@pytest.mark.parametrize("workers, packs", [(1, 1), (2, 2), (8, 5)])
def test_every_worker_gets_packs_and_each_pack_all_candidates_the_first_to_diverge_first(workers, packs, tmp_path):
    plan = make_plan(small_study(tmp_path, workers={"item_samples": 16}))
    entries = [entry for entry in plan.samples.of_split("search") if entry.length == 400][:5]
    late, early = (plan.candidate(f"t{n}", "decimamba", {"first_layer": n, "base_tokens": 64}) for n in (1, 0))
    trials = [plan.baseline, late, early]
    todo = {one.trial_id: [(entry, f"{one.trial_id}-{entry.row}") for entry in entries] for one in trials}
    items = list(make_items(plan, trials, todo, 0, "search", workers))
    assert len({one.pack for one in items}) == packs and len(items) == 3 * packs
    for start in range(0, len(items), 3):
        pack = items[start : start + 3]
        assert len({(one.pack, one.rows) for one in pack}) == 1
        assert [(one.trial_id, one.shared_layers) for one in pack] == [("t0", 0), ("t1", 0), ("vanilla", 1)]


# ---- shelves


def thing(megabytes, value=0):
    return (torch.full((megabytes, 250_000), float(value)),)


def test_what_leaves_the_fast_shelf_waits_on_the_slow_one_and_comes_back():
    trips = []

    def arrive(name):
        def move(tensor):
            trips.append(name)
            return tensor.clone()

        return move

    rack = Rack([Shelf(2_000_000, arrive("gpu")), Shelf(3_000_000, arrive("host"))])
    for i in range(5):
        rack.put(i, thing(1, i))
    assert [list(shelf.things) for shelf in rack.shelves] == [[3, 4], [0, 1, 2]]
    assert rack.bytes == 5_000_000 and trips.count("host") == 3
    assert float(rack.get(1)[0][0, 0]) == 1.0
    assert [list(shelf.things) for shelf in rack.shelves] == [[4, 1], [0, 2, 3]]
    rack.put(5, thing(1, 5))
    assert [list(shelf.things) for shelf in rack.shelves] == [[1, 5], [2, 3, 4]], "the least recently used is forgotten"
    assert rack.get(0) is None and rack.get(9) is None


def test_what_is_too_large_for_the_fast_shelf_goes_to_the_slow_one_and_what_fits_nowhere_is_not_kept():
    rack = Rack([Shelf(1_000_000), Shelf(2_000_000)])
    rack.put("large", thing(2))
    rack.put("small", thing(1))
    rack.put("huge", thing(3))
    assert [list(shelf.things) for shelf in rack.shelves] == [["small"], ["large"]]
    assert rack.get("large") is not None and rack.bytes == 3_000_000


def test_what_comes_back_is_in_the_fast_memory_also_where_it_is_too_large_to_stay_there():
    fast, slow = torch.float32, torch.int32  # stand for two memories
    rack = Rack([Shelf(1_000_000, lambda one: one.to(fast)), Shelf(9_000_000, lambda one: one.to(slow))])
    rack.put("large", thing(2))
    for _ in range(2):
        assert [one.dtype for one in rack.get("large")] == [fast]
        assert [list(shelf.things) for shelf in rack.shelves] == [[], ["large"]]


def test_moving_reaches_every_tensor_of_a_stream():
    runner = Runner(model_of("mamba1"))
    with torch.inference_mode():
        stream = runner.vanilla(Tokens.pad(prompts(20)), 2)
    doubled = moved(stream, lambda tensor: tensor.double())
    assert len(list(tensors(stream))) == 2 + 2 * 2  # hidden, positions, and two states of two layers
    assert {one.dtype for one in tensors(doubled)} == {torch.float64}
    assert doubled.span == stream.span


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_comes_back_from_pinned_memory_is_what_went_there():
    facts, model = facts_for(train_length=TRAIN_LENGTH), tiny_model(dtype=torch.float32).cuda()
    store = StreamStore(
        1 << 26, 1 << 26, device=torch.device("cuda"), device_bytes=30_000, projected_device_bytes=100_000
    )
    sharing = Runner(model, chunk=CHUNK, store=store)
    trials = [build_method("decimamba", point, facts) for point in settings("decimamba", facts)]
    with torch.inference_mode():
        for method in [*trials, *trials]:
            for ids in prompts(*LENGTHS):
                read = [method.prefill(one, Tokens.pad([ids], "cuda")) for one in (sharing, Runner(model, chunk=CHUNK))]
                assert torch.equal(read[0].hidden, read[1].hidden)
    assert all(shelf.things for shelf in store.streams.shelves)
    assert {one.is_pinned() for one in tensors(list(store.streams.shelves[1].things.values()))} == {True}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_hundred_swaps_of_the_method_leave_the_workers_memory_where_it_was(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    command = [sys.executable, "-m", "tests.swaps", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["after"] - found["before"]) < 0.01 * found["before"], found
    assert 0 < found["store"] <= STORE
