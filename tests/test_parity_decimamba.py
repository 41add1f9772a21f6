"""DeciMamba against the numbers of the authors' code: chosen tokens, caps, whole models with decoding."""

import pytest
import torch

from statespan.errors import UserError
from statespan.models.runner import Runner, Tokens
from tests.cases import build_model, case, names
from tests.decimamba_hooks import decimamba, layer_inputs, selected, watched

SELECTIONS = [
    (name, one) for name in names("decimamba", "selection_?") for one in case("decimamba", name).facts["cases"]
]
RUNS = [(name, run) for name in names("decimamba", "model_?") for run in case("decimamba", name).facts["runs"]]
RUN_IDS = [f"{name}-{run['key']}" for name, run in RUNS]


def of_run(run, n_layer):
    return decimamba(run["decimating_layers"], run["L_base"], n_layer=n_layer, beta=run["beta"],
                     min_tokens=run["min_seq_len"])  # fmt: skip


@pytest.mark.parametrize("name, chosen", SELECTIONS, ids=lambda c: c if isinstance(c, str) else c["key"])
def test_a_layer_keeps_the_tokens_the_authors_keep(name, chosen):
    recorded, key = case("decimamba", name), chosen["key"]
    inputs = layer_inputs(recorded[f"{key}.raw_dt"][0].T, recorded[f"{key}.dt_bias"], chosen["protected_tail"])
    base = 10**9 if chosen["L_base"] == "inf" or not chosen["activate"] else chosen["L_base"]
    floor = chosen["min_seq_len"] if chosen["activate"] else 10**9
    method = decimamba(chosen["decimating_layers"], base, beta=chosen["beta"], min_tokens=floor)
    assert torch.equal(selected(method, chosen["layer"], inputs), recorded[f"{key}.kept"])


@pytest.mark.parametrize("name, chosen", [one for one in SELECTIONS if "source_raises" in one[1]])
def test_as_published_fails_where_the_authors_code_fails(name, chosen):
    recorded, key = case("decimamba", name), chosen["key"]
    inputs = layer_inputs(recorded[f"{key}.raw_dt"][0].T, recorded[f"{key}.dt_bias"], chosen["protected_tail"])
    method = decimamba(chosen["decimating_layers"], chosen["L_base"], beta=chosen["beta"],
                       min_tokens=chosen["min_seq_len"], behaviour="as_published")  # fmt: skip
    with pytest.raises(UserError, match="as published fails"):
        selected(method, chosen["layer"], inputs)


def test_caps_shrink_by_the_place_in_the_list():
    for row in [row for name in names("decimamba", "caps_?") for row in case("decimamba", name).facts["rows"]]:
        layers = list(range(row["layers"]))
        base = 10**9 if row["L_base"] == "inf" else row["L_base"]
        method = decimamba(layers, base, beta=row["beta"], min_tokens=row["min_seq_len"])
        want = row["caps_for_a_very_long_prefix"]
        assert [method.kept_of(layer, 10**8 + 1, 1) for layer in layers] == [
            10**8 if cap == "inf" else cap for cap in want
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name, run", RUNS, ids=RUN_IDS)
@torch.inference_mode()
def test_a_model_under_decimamba_is_the_authors(name, run, dtype):
    recorded = case("decimamba", name)
    runner, key, tail = Runner(build_model(recorded, dtype)), run["key"], run["protected_tail"]
    atol = 1e-9 if dtype == torch.float64 else recorded.facts["tolerance"]["suggested_float32_atol"]
    ids = recorded[f"input_ids.L{run['length']}"]
    method = of_run(run, runner.n_layer)
    log = watched(method)
    read = runner.prefill(Tokens(ids, (run["length"],)), method, tail)
    torch.testing.assert_close(runner.model.logits(read.hidden), recorded[f"{key}.logits"].to(dtype), atol=atol, rtol=0)
    for layer, scores, kept in log:
        assert torch.equal(kept, recorded[f"{key}.layer{layer}.kept"])
        torch.testing.assert_close(scores, recorded[f"{key}.layer{layer}.scores"].to(dtype), atol=atol, rtol=0)
    if log:
        assert torch.equal(read.positions[0], recorded[f"{key}.layer{log[-1][0]}.kept_original_positions"])
    assert len(log) == sum(f"{key}.layer{layer}.kept" in recorded.tensors for layer in range(runner.n_layer))


@pytest.mark.parametrize("chunk", [None, 16], ids=["whole", "chunked"])
@pytest.mark.parametrize("name, run", RUNS, ids=RUN_IDS)
@torch.inference_mode()
def test_greedy_decoding_goes_on_from_the_survivors(name, run, chunk):
    recorded = case("decimamba", name)
    runner, key = Runner(build_model(recorded), chunk=chunk), run["key"]
    prompt = Tokens(recorded[f"input_ids.L{run['length']}"], (run["length"],))
    read = runner.prefill(prompt, of_run(run, runner.n_layer))
    if f"{key}.prefill_ssm_state.0" in recorded.tensors:
        width = runner.model.config.d_conv - 1
        for layer, state in enumerate(read.cache.states):
            conv = recorded[f"{key}.prefill_conv_state.{layer}"][..., -width:].transpose(1, 2)
            torch.testing.assert_close(state.conv, conv, atol=1e-9, rtol=0)
            torch.testing.assert_close(state.ssm, recorded[f"{key}.prefill_ssm_state.{layer}"], atol=1e-9, rtol=0)
    if f"{key}.greedy_ids" not in recorded.tensors:
        return
    logits = runner.model.logits(read.hidden[:, -1])
    for i, token in enumerate(recorded[f"{key}.greedy_ids"][0]):
        torch.testing.assert_close(logits, recorded[f"{key}.greedy_logits"][:, i], atol=1e-9, rtol=0)
        assert logits.argmax() == token
        logits = runner.step(read.cache, token[None])
