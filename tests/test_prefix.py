"""What several prompts begin with is read once, and no bit of any result tells."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan.benchmarks.evaluate import evaluate
from statespan.benchmarks.table import build_benchmark
from statespan.methods.table import build_method
from statespan.models.hook import VANILLA
from statespan.models.prefix import PrefixStore
from statespan.models.runner import Runner, Tokens
from statespan.models.store import StreamStore
from tests.benchmark_conformance import BYTES
from tests.cases import build_model, case
from tests.methods import facts_for, stand_ins
from tests.tiny import tiny_model

CHUNK = 16
MODELS = {(kind, dtype): tiny_model(kind, dtype=dtype) for kind in ("mamba1", "mamba2")
          for dtype in (torch.float32, torch.float64)}  # fmt: skip


def draw(*lengths, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=random).tolist() for length in lengths]


def apart(model, prompt, method=VANILLA):
    return Runner(model, chunk=CHUNK).prefill(Tokens.pad([prompt]), method)


def same(one, other):
    assert torch.equal(one.hidden, other.hidden) and torch.equal(one.positions, other.positions)
    assert (one.span.length, one.span.prompt_lengths) == (other.span.length, other.span.prompt_lengths)
    for mine, theirs in zip(one.cache.states, other.cache.states, strict=True):
        assert torch.equal(mine.conv, theirs.conv) and torch.equal(mine.ssm, theirs.ssm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@settings(max_examples=20, deadline=None)
@given(shared=st.integers(1, 70), ends=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 99))
@torch.inference_mode()
def test_a_prompt_read_from_a_shared_beginning_is_equal_to_the_bit(kind, dtype, shared, ends, seed):
    document, *questions = draw(shared, *ends, seed=seed)
    model = MODELS[kind, dtype]
    runner = Runner(model, chunk=CHUNK, prefixes=PrefixStore())
    for number, question in enumerate(questions):
        before = runner.work.shared
        found = runner.prefill(Tokens.pad([document + question]))
        same(found, apart(model, document + question))
        if number:  # at least the document's whole chunks; more where two questions begin alike
            whole = min(shared, len(document + question) - 1) // CHUNK * CHUNK
            assert runner.work.shared - before >= whole * runner.n_layer
        runner.step(found.cache, torch.tensor([7]))  # decoding writes into its own cache only
    assert runner.work.computed + runner.work.shared == sum(shared + end for end in ends) * runner.n_layer


def method_of(name, **params):
    facts = facts_for()
    return build_method(name, params, facts, stand_ins(facts))


@pytest.mark.parametrize(
    "name, params, lengths, shared",
    [
        ("mambaextend", {"first": 0.8}, (90, 75), 4),
        ("mambaextend", {"first": 0.8, "per_doubling": True}, (90, 75), 0),
        ("longmamba", {"share": 0.5}, (90, 90), 5),
        ("longmamba", {"share": 0.5}, (90, 75), 0),  # its thresholds are the length's
        ("longmamba", {"share": 0.5, "selector": "norm"}, (90, 90), 0),  # reads the whole layer first
        ("decimamba", {"first_layer": 1, "base_tokens": 20}, (90, 90), 0),
        ("decimamba", {"first_layer": 1, "base_tokens": 64}, (40, 35), 1),  # too short to drop anything
    ],
)
@torch.inference_mode()
def test_a_method_shares_what_it_declares_and_nothing_else(name, params, lengths, shared):
    method, model = method_of(name, **params), MODELS["mamba1", torch.float32]
    runner = Runner(model, chunk=CHUNK, prefixes=PrefixStore())
    document, *questions = draw(min(lengths) - 5, *(length - min(lengths) + 5 for length in lengths))
    for question in questions:
        same(runner.prefill(Tokens.pad([document + question]), method), apart(model, document + question, method))
    assert runner.work.shared == shared * CHUNK * runner.n_layer


def test_longmambas_published_thresholds_are_one_rule_for_all_lengths_nearest_to_one_entry():
    method = method_of("longmamba", share=0.5, lengths="as_published")
    assert method.prefix_rule(3100) == method.prefix_rule(3400) != method.prefix_rule(9000)
    assert method.prefix_rule(2999) == VANILLA.prefix_rule(9000) == ()  # unfiltered


@torch.inference_mode()
def test_two_settings_of_one_method_do_not_share():
    model = MODELS["mamba1", torch.float32]
    runner, (prompt,) = Runner(model, chunk=CHUNK, prefixes=PrefixStore()), draw(90)
    for first in (0.8, 0.5):
        method = method_of("mambaextend", first=first)
        same(runner.prefill(Tokens.pad([prompt]), method), apart(model, prompt, method))
    assert runner.work.shared == 0


@torch.inference_mode()
def test_the_least_recently_used_beginning_goes_first_and_results_stay():
    model, (one, other) = MODELS["mamba1", torch.float32], draw(50, 50)
    size = apart(model, one).cache.bytes
    runner = Runner(model, chunk=CHUNK, prefixes=PrefixStore(4 * size))
    for prompt in (one, other, one):  # three beginnings each, room for four
        same(runner.prefill(Tokens.pad([prompt])), apart(model, prompt))
    assert len(runner.prefixes) == 4 and runner.work.shared == 3 * CHUNK * runner.n_layer
    small = Runner(model, chunk=CHUNK, prefixes=PrefixStore(size - 1))
    same(small.prefill(Tokens.pad([one])), apart(model, one))
    assert len(small.prefixes) == 0


@torch.inference_mode()
def test_batches_long_tails_and_trials_that_share_streams_are_read_as_ever():
    model, prompts = MODELS["mamba1", torch.float32], draw(50, 50)
    runner = Runner(model, chunk=CHUNK, prefixes=PrefixStore(), store=StreamStore(1 << 20))
    runner.prefill(Tokens.pad(prompts))
    runner.prefill(Tokens.pad(prompts[:1]), tail=3)
    runner.prefill(Tokens.pad([prompts[0] * 2]), method_of("mambaextend", first=0.8))
    assert len(runner.prefixes) == 0


@torch.inference_mode()
def test_a_hybrids_prompts_are_read_whole():
    model, prompt = build_model(case("forward", "hf_bamba"), torch.float32), [token % 64 for token in draw(50)[0]]
    runner = Runner(model, chunk=CHUNK, prefixes=PrefixStore())
    for _ in range(2):
        same(runner.prefill(Tokens.pad([prompt])), apart(model, prompt))
    assert len(runner.prefixes) == runner.work.shared == 0


@pytest.mark.parametrize("benchmark, settings", [
    ("leval", {"data_root": "fixtures", "tasks": ["quality", "coursera"]}),
    ("mqar", {"lengths": [64], "pairs": [8], "trials": 2, "vocabulary": 250}),
])  # fmt: skip
def test_questions_on_one_document_are_evaluated_as_if_each_were_alone(benchmark, settings):
    asked, model = build_benchmark(benchmark, settings), MODELS["mamba1", torch.float32]
    samples = [replace(sample, max_new_tokens=min(sample.max_new_tokens, 5)) for sample in asked.samples(BYTES)]
    alone = evaluate(Runner(model, chunk=CHUNK), VANILLA, asked, samples, BYTES)
    runner = Runner(model, chunk=CHUNK, prefixes=PrefixStore())
    together = evaluate(runner, VANILLA, asked, samples, BYTES)
    assert [one.completion for one in alone] == [one.completion for one in together]
    assert [one.score for one in alone] == [one.score for one in together]
    shared = sum(one.layer_tokens_shared for one in together)
    assert shared > 0 == sum(one.layer_tokens_shared for one in alone)
    assert shared + sum(one.layer_tokens for one in together) == sum(one.layer_tokens for one in alone)
