"""Captured decode steps with a capture that works on a CPU: what is fixed, what is loaded, and who gets which graph."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from statespan.kernels.greedy import greedy
from statespan.models import fused_step, step_graph
from statespan.models.attention import KeyValues
from statespan.models.generate import Decoding, RowDecoder, generate
from statespan.models.hook import VANILLA
from statespan.models.runner import Cache, Runner, Tokens
from statespan.models.step_graph import EagerSteps, GraphPool, GraphSteps, Stepped, class_of, on_host, steps
from tests.tiny import byte_tokenizer, tiny_model


def repeated(work):
    """As a graph does: the results of every repetition go to the same tensors."""
    work()
    results = work()

    def replay():
        for fixed, new in zip(results, work(), strict=True):
            fixed.copy_(new)

    return replay, results


@pytest.fixture(params=["mamba1", "mamba2"])
def runner(request):
    return Runner(tiny_model(request.param))


def read(runner, rows):
    return runner.prefill(Tokens.pad([[1 + row, 2, 3, 4, 5] for row in range(rows)])).cache


@torch.inference_mode()
def test_captured_steps_are_the_eager_ones_while_rows_leave(runner, monkeypatch):
    pool = GraphPool(runner.step, repeated)
    eager, captured = EagerSteps(runner, read(runner, 6)), GraphSteps(pool, read(runner, 6))
    monkeypatch.setattr(
        step_graph, "greedy", lambda logits: torch.stack((logits.sum(-1), logits.amax(-1)))
    )  # of its row
    tokens, classes = [7, 8, 9, 10, 11, 12], []
    for kept in ([0, 1, 2, 3, 4, 5], [0, 2, 3, 5, 4], [2, 1], [0], []):
        for one in (eager, captured):
            one.keep(kept)
        if not kept:
            break
        tokens = [tokens[row] for row in kept]
        ours, theirs = captured.step(tokens), eager.step(tokens)
        # a graph of another class multiplies matrices of another size
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-12, rtol=0)
        assert [chosen for _, chosen in ours.best] == ours.logits.amax(-1).tolist()
        for mine, other in zip(captured.cache().states, eager.cache().states, strict=True):
            torch.testing.assert_close(mine.ssm, other.ssm, atol=1e-12, rtol=0)
        classes.append(captured._graph.rows)
    assert classes == [8, 8, 2, 1] and [graph.rows for graph in pool._free] == [8, 2, 1]


@torch.inference_mode()
def test_steps_through_windows_are_the_eager_ones_while_rows_leave_and_states_are_copied(monkeypatch):
    """Mamba-2's states are written every third token; rows leave, and others join, within a window."""
    monkeypatch.setattr(step_graph, "WINDOWED_ROWS", 2)
    runner = Runner(tiny_model("mamba2"))
    pool = GraphPool(runner.step, repeated, model=runner.model, window=3)
    eager, captured = EagerSteps(runner, read(runner, 3)), GraphSteps(pool, read(runner, 3))
    classes = []
    for turn, kept in enumerate(([0, 1, 2], [2, 0, 1], [0, 1, 2], [2, 1, 0], [0, 2], [0, 1], [1, 0], [1])):
        for one in (eager, captured):
            one.keep(kept)
        fed = [turn + row for row in kept]
        theirs, ours = eager.step(fed), captured.step(fed)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-12, rtol=0)
        copied, other = captured.cache(), eager.cache()
        windowed = captured._graph.rows >= 2
        assert all((state.window is not None) == windowed for state in captured._graph.cache.states)
        for mine, plain in zip(copied.states, other.states, strict=True):
            assert mine.window is None
            torch.testing.assert_close(mine.ssm, plain.ssm, atol=1e-12, rtol=0)
        classes.append(captured._graph.rows)
    assert classes == [4, 4, 4, 4, 2, 2, 2, 1]
    joined = Cache.join([captured.cache(), read(runner, 1)])  # as a server does
    captured.close()
    captured = GraphSteps(pool, joined)
    assert captured._graph.count.item() == 0
    eager = EagerSteps(runner, Cache.join([eager.cache(), read(runner, 1)]))
    for turn in range(4):
        theirs, ours = eager.step([turn, 9]), captured.step([turn, 9])
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-12, rtol=0)


@torch.inference_mode()
def test_a_graph_is_used_again_and_remembers_nothing(runner):
    captures = []

    def counting(work):
        captures.append(1)
        return repeated(work)

    pool = GraphPool(runner.step, counting)
    logits = []
    for _ in range(2):
        captured = GraphSteps(pool, read(runner, 2))
        captured.step([3, 4])
        logits.append(captured.step([5, 6]).logits.clone())
        captured.close()
        captured.close()  # as after an error
    assert len(captures) == 1 and torch.equal(*logits)
    side_by_side = [GraphSteps(pool, read(runner, 2)) for _ in range(2)]
    assert side_by_side[0]._graph is not side_by_side[1]._graph and len(captures) == 2


@torch.inference_mode()
def test_graphs_that_nobody_uses_are_dropped_past_the_limit(runner, monkeypatch):
    pool = GraphPool(runner.step, repeated)
    monkeypatch.setattr(step_graph, "KEPT_BYTES", 2 * read(runner, 1).bytes)
    for rows in (1, 2):
        GraphSteps(pool, read(runner, rows)).close()
    assert [graph.rows for graph in pool._free] == [2]
    pool.clear()
    assert not pool._free


def test_a_step_that_cannot_be_captured_is_an_error_with_a_way_out(runner):
    def failing(work):
        raise RuntimeError("operation not permitted\nwhen the stream is capturing")

    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"2 rows.*not permitted\); set STATESPAN_DECODE"):
        GraphPool(runner.step, failing).take(read(runner, 2))


def test_a_failed_capture_names_its_first_error(runner):
    def failing(work):
        try:
            raise RuntimeError("out of room\nmore")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904 -- as CUDA's

    with pytest.raises(RuntimeError, match=r"\(out of room\); set STATESPAN_DECODE=eager"):
        GraphPool(runner.step, failing).take(read(runner, 2))


@pytest.mark.parametrize("on", [True, False])
def test_no_garbage_is_collected_within_a_capture(on):
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ZeroDivisionError), step_graph.no_collection():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind, rows, windowed", [("mamba2", 4, True), ("mamba2", 2, False), ("mamba1", 4, False)])
def test_states_of_mamba_2_in_four_rows_or_more_get_windows(kind, rows, windowed, dtype):
    runner = Runner(tiny_model(kind))
    pool = GraphPool(runner.step, lambda work: (lambda: None, work_of_nothing()), dtype, runner.model)
    graph = pool.take(read(runner, rows))
    assert [state.window is not None for state in graph.cache.states] == [windowed] * len(graph.cache.states)


@torch.inference_mode()
def test_narrow_states_are_rounded_once_a_window(monkeypatch):
    """A state of bfloat16 keeps 8 bits of what it is written with; between, the tokens are kept as they came."""
    runner = Runner(tiny_model("mamba2"))
    pool = GraphPool(runner.step, repeated, torch.bfloat16, runner.model, window=3)
    eager, captured = EagerSteps(runner, read(runner, 4)), GraphSteps(pool, read(runner, 4))
    written = [state.ssm.clone() for state in captured._graph.cache.states]
    for turn in range(6):
        fed = [turn + row for row in range(4)]
        theirs, ours = eager.step(fed), captured.step(fed)
        assert ((ours.logits - theirs.logits).norm() / theirs.logits.norm()).item() < 2e-2
        now = [state.ssm.clone() for state in captured._graph.cache.states]
        changed = [not torch.equal(one, other) for one, other in zip(written, now, strict=True)]
        assert changed == [turn % 3 == 2] * len(now)
        written = now


def work_of_nothing():
    return torch.zeros(1), torch.zeros(1)


def test_row_counts_share_classes():
    assert [class_of(rows) for rows in (1, 2, 3, 5, 16, 33, 64, 65, 129)] == [1, 2, 4, 8, 16, 64, 64, 128, 192]


def test_rows_decode_by_the_kernels_that_their_class_decodes_by():
    """Else a captured step and one that is not would add in another order."""
    bounds = (fused_step.ROWS + 1, fused_step.MORE_ROWS, fused_step.MANY_ROWS + 1)
    for rows in range(1, 200):
        assert all((rows < bound) == (class_of(rows) < bound) for bound in bounds), rows


@torch.inference_mode()
def test_generating_through_graphs_gives_the_eager_tokens(runner, monkeypatch):
    decodings = [Decoding(max_new_tokens=n, temperature=t, seed=n) for n, t in ((3, 0.0), (8, 0.0), (5, 2.0))]
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8]]
    tokenizer = byte_tokenizer()
    want = generate(runner, VANILLA, prompts, decodings, tokenizer).rows
    pool = GraphPool(runner.step, repeated)
    monkeypatch.setattr("statespan.models.generate.steps", lambda _, cache: GraphSteps(pool, cache))
    got = generate(runner, VANILLA, prompts, decodings, tokenizer).rows
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.ids, ours.text, ours.finish) == (theirs.ids, theirs.text, theirs.finish)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-9)
    assert pool._free


def test_the_devices_greedy_choice_is_the_decoders_own():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    best = Stepped(logits, on_host(greedy(logits))).best
    for row, (token, logprob) in zip(logits, best, strict=True):
        own = RowDecoder(Decoding(max_new_tokens=1), byte_tokenizer())
        own.accept(row)
        assert own.ids == [token] and own.logprobs == [logprob]


def test_only_what_stays_where_it_is_gets_captured(runner, monkeypatch):
    on_gpu = SimpleNamespace(
        model=SimpleNamespace(device=torch.device("cuda")), graphs=GraphPool(runner.step, repeated)
    )
    with torch.inference_mode():
        cache = read(runner, 1)
        assert isinstance(steps(runner, cache), EagerSteps) and isinstance(steps(on_gpu, cache), GraphSteps)
        hybrid = replace(cache, attention=[KeyValues.empty(1, SimpleNamespace(kv_heads=1, head_dim=2), torch.empty(1))])
        assert isinstance(steps(on_gpu, hybrid), EagerSteps)
        monkeypatch.setenv("STATESPAN_DECODE", "eager")
        assert isinstance(steps(on_gpu, cache), EagerSteps)
