"""DeciMamba against the authors' numbers, and what must hold whatever the numbers."""

import json

import pytest
import torch

from statespan.errors import UserError
from statespan.methods.base import ModelFacts
from statespan.methods.decimamba import DeciMamba, DeciMambaParams
from statespan.models.hook import ScanInputs, Span
from statespan.models.runner import Runner, Tokens
from tests.cases import ROOT, build_model, case

SELECTIONS = case("decimamba", "selection_a").facts["cases"]
MODELS = sorted(path.stem for path in (ROOT / "decimamba").glob("model_*.json"))
RUNS = [(name, run) for name in MODELS for run in case("decimamba", name).facts["runs"]]
RUN_IDS = [f"{name}-{run['key']}" for name, run in RUNS]


def decimamba(layers, base, *, n_layer=16, kind="mamba1", **params):
    given = DeciMambaParams.build({"layers": layers, "base_tokens": base, **params})
    return DeciMamba(given, ModelFacts(kind=kind, n_layer=n_layer, channels=1, d_model=1))


def of_run(run, n_layer):
    return decimamba(run["decimating_layers"], run["L_base"], n_layer=n_layer, beta=run["beta"],
                     min_tokens=run["min_seq_len"])  # fmt: skip


def layer_inputs(dt, bias, tail):
    """What the hook sees of one layer of one row, the scan's other inputs left empty."""
    length, channels = dt.shape
    none = dt.new_zeros(1, length, 0)
    span = Span(length=length, lengths=(length,), prompt_lengths=(length,), tail=tail)
    return ScanInputs(x=none, z=none, dt=dt[None], B=none, C=none, dt_bias=bias, A=dt.new_zeros(channels), span=span)


def selected(method, layer, inputs):
    seen = method.survey(layer, inputs) if method.looks_ahead(layer, inputs.span) else None
    kept = method.before_scan(layer, inputs, seen).kept
    return torch.arange(inputs.length) if kept is None else kept[0]


@pytest.mark.parametrize("chosen", SELECTIONS, ids=lambda c: c["key"])
def test_a_layer_keeps_the_tokens_the_authors_keep(chosen):
    recorded, key = case("decimamba", "selection_a"), chosen["key"]
    inputs = layer_inputs(recorded[f"{key}.raw_dt"][0].T, recorded[f"{key}.dt_bias"], chosen["protected_tail"])
    base = 10**9 if chosen["L_base"] == "inf" or not chosen["activate"] else chosen["L_base"]
    floor = chosen["min_seq_len"] if chosen["activate"] else 10**9
    method = decimamba(chosen["decimating_layers"], base, beta=chosen["beta"], min_tokens=floor)
    assert torch.equal(selected(method, chosen["layer"], inputs), recorded[f"{key}.kept"])


@pytest.mark.parametrize("chosen", [c for c in SELECTIONS if "source_raises" in c], ids=lambda c: c["key"])
def test_as_published_fails_where_the_authors_code_fails(chosen):
    recorded, key = case("decimamba", "selection_a"), chosen["key"]
    inputs = layer_inputs(recorded[f"{key}.raw_dt"][0].T, recorded[f"{key}.dt_bias"], chosen["protected_tail"])
    method = decimamba(chosen["decimating_layers"], chosen["L_base"], beta=chosen["beta"],
                       min_tokens=chosen["min_seq_len"], behaviour="as_published")  # fmt: skip
    with pytest.raises(UserError, match="as published fails"):
        selected(method, chosen["layer"], inputs)


def test_caps_shrink_by_the_place_in_the_list():
    for row in json.loads((ROOT / "decimamba" / "caps_a.json").read_text())["rows"]:
        layers = list(range(row["layers"]))
        base = 10**9 if row["L_base"] == "inf" else row["L_base"]
        method = decimamba(layers, base, beta=row["beta"], min_tokens=row["min_seq_len"])
        want = row["caps_for_a_very_long_prefix"]
        assert [method.kept_of(layer, 10**8 + 1, 1) for layer in layers] == [
            10**8 if cap == "inf" else cap for cap in want
        ]


def watched(method):
    """The method, and a list that fills with (layer, scores, kept) wherever it drops something."""
    log, rule = [], method.before_scan

    def before_scan(layer, inputs, seen=None):
        changed = rule(layer, inputs, seen)
        if changed.kept is not None:
            log.append((layer, seen[0, :, 0], changed.kept[0] + inputs.span.start))
        return changed

    method.before_scan = before_scan
    return log


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
