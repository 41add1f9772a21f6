"""Whole models against the reference implementations' numbers: logits, hidden states, caches, greedy decoding."""

import pytest
import torch

from statespan.models.runner import Runner, Tokens
from tests.cases import build_model, case

STATE_SPACES = ["ss_m1_tied_padvocab", "ss_m1_untied_d8", "ss_m2_n64_tied"]
TRANSFORMERS = ["hf_mamba_untied_bias", "hf_falcon_mamba"]
RUNS = [(name, length) for name in STATE_SPACES + TRANSFORMERS for length in case("forward", name).facts["lengths"]]


def read(name, length, dtype, chunk=None):
    recorded = case("forward", name)
    runner = Runner(build_model(recorded, dtype), chunk=chunk)
    ids = recorded[f"L{length}.input_ids"]
    with torch.inference_mode():
        prefilled = runner.prefill(Tokens(ids, (ids.shape[1],) * ids.shape[0]), tail=length)
    return recorded, runner, prefilled


def tolerance(recorded, dtype):
    facts = recorded.facts["tolerance"]
    if dtype == torch.float64 and "suggested_float64_atol" in facts:
        return facts["suggested_float64_atol"]
    return facts["suggested_float32_atol"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name, length", RUNS)
def test_logits_and_greedy_tokens_are_the_references(name, length, dtype):
    recorded, runner, prefilled = read(name, length, dtype)
    atol = tolerance(recorded, dtype)
    logits = runner.model.logits(prefilled.hidden)
    torch.testing.assert_close(logits, recorded[f"L{length}.logits"].to(dtype), atol=atol, rtol=0)
    ids, want = recorded[f"L{length}.decode_ids"], recorded[f"L{length}.decode_logits"].to(dtype)
    step = logits[:, -1]
    for i in range(ids.shape[1]):
        torch.testing.assert_close(step, want[:, i], atol=atol, rtol=0)
        assert torch.equal(step.argmax(-1), ids[:, i])
        if i + 1 < ids.shape[1]:
            with torch.inference_mode():
                step = runner.step(prefilled.cache, ids[:, i])


@pytest.mark.parametrize("name, length", [run for run in RUNS if run[0] in STATE_SPACES])
def test_hidden_states_and_caches_are_the_references(name, length):
    recorded, runner, prefilled = read(name, length, torch.float64)
    if (key := f"L{length}.hidden") in recorded.tensors:
        torch.testing.assert_close(prefilled.hidden, recorded[key], atol=1e-9, rtol=0)
    width, last = runner.model.config.d_conv - 1, len(prefilled.cache.states) - 1
    state = prefilled.cache.states[last]
    if (key := f"L{length}.conv_state.{last}") in recorded.tensors:
        conv = recorded[key][..., -width:].transpose(1, 2)
        torch.testing.assert_close(state.conv, conv, atol=1e-9, rtol=0)
    if (key := f"L{length}.ssm_state.{last}") in recorded.tensors:
        torch.testing.assert_close(state.ssm, recorded[key], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name, length", [("ss_m1_untied_d8", 67), ("ss_m2_n64_tied", 129)])
@pytest.mark.parametrize("chunk", [1, 16, 63])
def test_walking_in_chunks_is_the_whole(name, length, chunk):
    recorded, runner, prefilled = read(name, length, torch.float64, chunk)
    logits = runner.model.logits(prefilled.hidden)
    torch.testing.assert_close(logits, recorded[f"L{length}.logits"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["ss_m1_untied_d8", "ss_m2_n64_tied"])
@pytest.mark.parametrize("chunk", [None, 16])
def test_a_padded_row_equals_the_row_alone(name, chunk):
    recorded = case("forward", name)
    length = recorded.facts["lengths"][0]
    full = recorded[f"L{length}.input_ids"][0].tolist()
    runner = Runner(build_model(recorded), chunk=chunk)
    rows = [full, full[-40:], full[-1:], full[-17:]]
    with torch.inference_mode():
        together = runner.prefill(Tokens.pad(rows))
        for i, row in enumerate(rows):
            alone = runner.prefill(Tokens.pad([row]))
            torch.testing.assert_close(together.hidden[i : i + 1], alone.hidden, atol=1e-12, rtol=0)
            for ours, theirs in zip(together.cache.rows([i]).states, alone.cache.states, strict=True):
                torch.testing.assert_close(ours.conv, theirs.conv, atol=1e-12, rtol=0)
                torch.testing.assert_close(ours.ssm, theirs.ssm, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["ss_m1_untied_d8", "ss_m2_n64_tied"])
def test_extending_a_cache_equals_reading_it_all_at_once(name):
    recorded = case("forward", name)
    length = recorded.facts["lengths"][0]
    ids = recorded[f"L{length}.input_ids"][:1]
    runner = Runner(build_model(recorded))
    with torch.inference_mode():
        whole = runner.prefill(Tokens(ids, (length,)), tail=20)
        part = runner.prefill(Tokens(ids[:, :-20], (length - 20,)))
        hidden = runner.extend(part.cache, ids[:, -20:])
    torch.testing.assert_close(hidden, whole.hidden, atol=1e-12, rtol=0)
    for ours, theirs in zip(part.cache.states, whole.cache.states, strict=True):
        torch.testing.assert_close(ours.ssm, theirs.ssm, atol=1e-12, rtol=0)
