"""ReMamba against the numbers of the authors' code: windows, scores, vectors, both passes, decoding, training loss."""

import pytest
import torch
import torch.nn.functional as F

from statespan.methods.adapter import Adapter, Selection
from statespan.methods.base import ModelFacts
from statespan.methods.insertion import window_of
from statespan.methods.remamba import ReMamba
from statespan.methods.remamba_params import ReMambaParams
from statespan.models.checkpoint import canonical_name, cast
from statespan.models.config import ModelConfig
from statespan.models.lm import MambaLM
from statespan.models.runner import Runner, Tokens
from tests.cases import case, names

RUNS = [(name, run) for name in names("remamba", "m[12]_*") for run in case("remamba", name).facts["runs"]]
RUN_IDS = [f"{name}-{run['key']}" for name, run in RUNS]
NETWORKS = {"Q_proj": "query", "K_proj": "key", "V_proj": "value"}
VARIANTS = {  # by the first word of what a case says it is
    "fixed": {"selector": "fixed", "mix": "insert_only", "order": "reversed"},
    "random": {"selector": "random", "mix": "insert_only", "order": "reversed"},
    "top-k,": {"mix": "multiplicative_softmax"},
}


def weights_of(recorded):
    """The recorded weights by our names: the model's, and those of Selection."""
    model, selection = {}, {}
    for key, tensor in recorded.tensors.items():
        name = key.removeprefix("w.").removeprefix("backbone.")
        if not key.startswith("w."):
            continue
        if name.split(".")[0] in NETWORKS:
            first, rest = name.split(".", 1)
            selection[f"{NETWORKS[first]}.{rest}"] = tensor
        elif name.endswith("ret_bias.param"):
            selection[f"theta.{name.split('.')[1]}"] = tensor
        else:
            model[canonical_name(name)] = tensor
    return model, selection


def build(name, dtype=torch.float64):
    recorded = case("remamba", name)
    raw = recorded.facts["config"]
    config = ModelConfig.read(raw if "d_model" in raw else {"model_type": "mamba", **raw})
    weights, own = weights_of(recorded)
    model = MambaLM(config)
    model.load_state_dict(weights)
    selection = Selection(config.d_model, config.n_layer, config.channels)
    missing = selection.load_state_dict(own, strict=False).missing_keys
    assert not any(key.startswith("value") for key in missing), "an ablation lacks Query, Key and Θ at most"
    model = cast(model, dtype).eval().requires_grad_(False)
    return recorded, Runner(model), Adapter(selection.to(dtype).requires_grad_(False), {})


def facts(runner):
    config = runner.model.config
    return ModelFacts(kind=config.kind, n_layer=config.n_layer, channels=config.channels, d_model=config.d_model)


def variant(name):
    return case("remamba", name).facts["variant"].split()[0]


def method_of(name, run, runner, adapter):
    params = {"start": run["s"], "window": run["p"], "ratio": run["rho"], **VARIANTS.get(variant(name), {})}
    return ReMamba(ReMambaParams.build(params), facts(runner), adapter)


def test_windows_are_the_authors():
    for row in [row for name in names("remamba", "window_table_?") for row in case("remamba", name).facts["rows"]]:
        window = window_of(row["P"], row["s"], row["p"], row["rho"], None)
        assert (window.start, window.start + window.size, window.size, window.kept) == (
            row["S"], row["E"], row["W"], row["K"]), row  # fmt: skip
        assert row["P"] - window.size + window.kept == row["spliced"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name, run", RUNS, ids=RUN_IDS)
@torch.inference_mode()
def test_scores_vectors_prefill_and_decoding_are_the_authors(name, run, dtype, monkeypatch):
    recorded, runner, adapter = build(name, dtype)
    key, tolerance = run["key"], recorded.facts["tolerance"]
    atol = tolerance["suggested_float64_atol"] if dtype == torch.float64 else tolerance["suggested_float32_atol"]

    def close(ours, stored):
        torch.testing.assert_close(ours, recorded[f"{key}.{stored}"].to(dtype), atol=atol, rtol=0)

    ids = recorded[f"{key}.input_ids"]
    prompt = Tokens(ids, (ids.shape[1],) * ids.shape[0])
    method = method_of(name, run, runner, adapter)
    if variant(name) == "random":
        drawn = recorded[f"{key}.selected_in_text_order"][0]
        monkeypatch.setattr("statespan.methods.insertion.pick", lambda *args: drawn)
    check_selection(recorded, runner, method, prompt, run, close)
    read = method.prefill(runner, prompt)
    assert read.span.lengths == (run["spliced_length"],) * len(ids)
    if f"{key}.ssm_state.0" in recorded.tensors and dtype == torch.float64:
        width = runner.model.config.d_conv - 1
        for layer, state in enumerate(read.cache.states):
            close(state.ssm, f"ssm_state.{layer}")
            conv = recorded[f"{key}.conv_state.{layer}"][..., -width:].transpose(1, 2)
            torch.testing.assert_close(state.conv, conv, atol=atol, rtol=0)
    logits = runner.model.logits(read.hidden[:, -1])
    torch.testing.assert_close(logits, recorded[f"{key}.prefill_logits"][:, -1].to(dtype), atol=atol, rtol=0)
    for i, tokens in enumerate(recorded[f"{key}.decode_ids"].T):
        torch.testing.assert_close(logits, recorded[f"{key}.decode_logits"][:, i].to(dtype), atol=atol, rtol=0)
        assert torch.equal(logits.argmax(-1), tokens)
        logits = runner.step(read.cache, tokens)


def check_selection(recorded, runner, method, prompt, run, close):
    key, window = run["key"], method._window(run["prompt_length"])
    assert (window.start, window.start + window.size, window.kept) == (run["start"], run["end"], run["kept"])
    rows = method.insertions(runner, prompt, [window] * len(prompt.lengths), 1)
    scale = recorded.tensors.get(f"{key}.softmax_of_selected_scores")
    vectors = torch.stack([row.vectors for row in rows])
    close(vectors if scale is None else vectors / scale[..., None].to(vectors), "value_vectors")
    places = torch.stack([row.places for row in rows]) - window.start
    for stored in ("selected", "inserted_order"):
        if f"{key}.{stored}" in recorded.tensors:
            assert torch.equal(places, recorded[f"{key}.{stored}"])
    if f"{key}.alpha" in recorded.tensors:
        close(torch.stack([row.alpha for row in rows]), "alpha")


@pytest.mark.parametrize("name, run", RUNS, ids=RUN_IDS)
@torch.inference_mode()
def test_the_last_prompt_positions_are_the_authors(name, run, monkeypatch):
    recorded, runner, adapter = build(name)
    key, want = run["key"], recorded[f"{run['key']}.prefill_logits"]
    if variant(name) == "random":
        monkeypatch.setattr("statespan.methods.insertion.pick", lambda *a: recorded[f"{key}.selected_in_text_order"][0])
    ids = recorded[f"{key}.input_ids"]
    prompt = Tokens(ids, (ids.shape[1],) * ids.shape[0])
    method = method_of(name, run, runner, adapter)
    # asked for one position, as the authors are, and reading those before it as well
    monkeypatch.setattr(runner, "finish", lambda stream, tail: Runner.finish(runner, stream, want.shape[1]))
    read = method.prefill(runner, prompt)
    torch.testing.assert_close(runner.model.logits(read.hidden), want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", names("remamba", "train_loss_?"))
def test_the_training_loss_is_the_authors(name):
    recorded, runner, adapter = build(name, torch.float64)
    for run in recorded.facts["runs"]:
        ids, P = recorded[f"{run['key']}.input_ids"], run["prompt_length"]
        # up to 1,600 tokens p is 0.1 and the one draw is ρ; beyond, p is drawn before, and the window leaves 1,500
        share, ratio = (0.1, *run["drawn"])[-2:]
        params = ReMambaParams.build({"window": share, "ratio": ratio, "min_tail": 1_500 if P > 1_600 else 0})
        method, answer = ReMamba(params, facts(runner), adapter), ids[:, P:]
        window = method._window(P)
        assert (window.size, window.kept) == (run["window"], run["kept"])
        prompt = Tokens(ids[:, :-1], (ids.shape[1] - 1,))
        rows = method.insertions(runner, prompt, [window], answer.shape[1])
        assert torch.equal(rows[0].places[None], recorded[f"{run['key']}.selected"])
        read = method.prefill(runner, prompt, tail=answer.shape[1])
        loss = F.cross_entropy(runner.model.logits(read.hidden)[0], answer[0])
        assert loss.item() == pytest.approx(run["loss_float64"], abs=1e-9)
        assert loss.item() == pytest.approx(run["loss_by_source_float32"], abs=recorded.facts["tolerance"]["loss"])
