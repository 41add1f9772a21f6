"""LongMamba against the numbers of the authors' code: statistics, masks, one mixer, a whole model."""

import pytest
import torch

from statespan.kernels.selective_scan import step_sizes
from statespan.methods.base import ModelFacts
from statespan.methods.calibration import AUTHORS_GRID, Calibration, calibrate
from statespan.methods.longmamba import LongMamba
from statespan.methods.longmamba_params import LongMambaParams
from statespan.methods.step_selectors import own_rule, steps_kept
from statespan.methods.step_statistics import Aggregator, StepStatistics, aggregate, log_rates, step_statistics
from statespan.models.config import ModelConfig
from statespan.models.hook import Span
from statespan.models.mixer import Mamba2Mixer, MixerState
from statespan.models.runner import Runner, Tokens
from tests.cases import build_model, case, names


def descending(steps):
    return steps.double().sort(dim=-1, descending=True).values


def assert_same(ours, recorded, prefix, at=(), rtol=1e-9):
    want = {"budget": "budget", "threshold": "threshold", "alpha": "alpha"}
    for name, stored in want.items():
        torch.testing.assert_close(getattr(ours, name), recorded[f"{prefix}.{stored}"][at], rtol=rtol, atol=0)
    torch.testing.assert_close(ours.log_decay.exp(), recorded[f"{prefix}.decay_product"][at], rtol=rtol, atol=1e-300)


@pytest.mark.parametrize("name", names("longmamba", "calibration_?"))
def test_calibration_statistics_are_the_authors(name):
    recorded = case("longmamba", name)
    grid = [1_000 * k for k in recorded.facts["grid_thousands"]]
    layers, sequences = recorded["delta"].shape[1], recorded["delta"].shape[0]
    for share in recorded.facts["clamp_shares"]:
        for layer in range(layers):
            A, parts, running = recorded["A"][layer].double(), [], Aggregator()
            for sequence in range(sequences):
                ordered = descending(recorded["delta"][sequence, layer])
                parts.append(step_statistics(ordered, log_rates(ordered, A), share, grid))
                running.add(parts[-1])
                assert_same(parts[-1], recorded, f"clamp{share}.seq{sequence}", layer)
            for how in ("max", "mean"):
                assert_same(aggregate(parts, how), recorded, f"clamp{share}.{how}", layer)
                assert_same(running.result(how), recorded, f"clamp{share}.{how}", layer)


@pytest.mark.parametrize("name", names("longmamba", "calibration_mamba1_?"))
def test_mamba1_calibration_statistics_are_the_authors(name):
    recorded = case("longmamba", name)
    for share in recorded.facts["clamp_shares"]:
        for layer, (steps, A) in enumerate(zip(recorded["delta"], recorded["A"], strict=True)):
            ordered = descending(steps)
            ours = step_statistics(ordered, log_rates(ordered, A.double()), share, AUTHORS_GRID)
            assert_same(ours, recorded, f"clamp{share}", layer)
            # the products underflow float32 for some channel, their logarithms do not
            want = recorded[f"clamp{share}.log_decay_product"][layer]
            torch.testing.assert_close(ours.log_decay, want, rtol=1e-9, atol=0)


def kept(steps, threshold):
    """What the scan keeps: (batch, length, channels) bool"""
    return step_sizes(steps, None, False, None, threshold[None], None) > 0


@pytest.mark.parametrize("name", names("longmamba", "masks_?"))
def test_token_masks_are_the_authors(name):
    recorded = case("longmamba", name)
    whole, alpha, budget = recorded["delta"].double(), recorded["alpha"], recorded["budget"]
    assert torch.equal(kept(whole, recorded["threshold"]).long(), recorded["kept.threshold"])
    for row, steps in enumerate(whole):
        for selector in ("alpha", "bound", "offline"):
            if f"kept.{selector}" not in recorded.tensors:
                continue
            mask = kept(steps[None], own_rule(selector, steps, 1.0, alpha, budget)).long()
            assert torch.equal(mask[0], recorded[f"kept.{selector}"][row]), selector
            if selector != "offline":
                counts = steps_kept(selector, descending(steps.T), 1.0, alpha, budget)
                assert torch.equal(counts, recorded[f"kept.{selector}_count"][row])
        scale = own_rule("norm", steps, 1.0, alpha, budget)
        torch.testing.assert_close(steps * scale, recorded["rescaled.norm"][row], rtol=1e-9, atol=0)


def longmamba(calibration, n_layer, channels, kind="mamba2", **params):
    given = LongMambaParams.build(params)
    return LongMamba(given, ModelFacts(kind=kind, n_layer=n_layer, channels=channels, d_model=1), calibration)


def authors_calibration(recorded, share, how, layers=True):
    table = {name: recorded[f"table.{name}"] for name in ("budget", "threshold", "alpha")}
    table["log_decay"] = recorded["table.decay_product"].log()
    table = {name: tensor if layers else tensor[None] for name, tensor in table.items()}
    return Calibration(2_000, AUTHORS_GRID, {(share, how): StepStatistics(**table)})


@pytest.mark.parametrize("name", names("longmamba", "block_?"))
def test_a_filtered_mixer_is_the_authors(name):
    recorded = case("longmamba", name)
    facts, shape = recorded.facts, recorded.facts["config"]
    raw = {"d_model": shape["d_model"], "n_layer": 1, "vocab_size": 8, "ssm_cfg": {"layer": "Mamba2", **{
        key: shape[key] for key in ("d_state", "headdim", "ngroups", "expand", "d_conv")}}}  # fmt: skip
    mixer = Mamba2Mixer(ModelConfig.read(raw)).double().requires_grad_(False)
    mixer.load_state_dict({k[2:]: v.double() for k, v in recorded.tensors.items() if k.startswith("w.")})
    how, share = facts["aggregate"], facts["clamp_share"]
    calibration = authors_calibration(recorded, share, how, layers=False)
    for run in facts["runs"]:
        method = longmamba(calibration, 1, facts["heads"], theta=facts["theta"], clamp=share, aggregate=how,
                           factor=run["factor"], lengths="as_published")  # fmt: skip
        check_block(recorded, mixer, method, run)


def check_block(recorded, mixer, method, run):
    length, key = run["length"], run["key"]
    u = recorded["u"][:, :length].double()
    span = Span(length=length, lengths=(length,), prompt_lengths=(length,))
    inputs, conv = mixer.project(u, span, None)
    changed = method.before_scan(0, inputs)
    assert (changed is not inputs) == run["filter_active"]
    steps = step_sizes(inputs.dt, inputs.dt_bias, True, None, changed.keep_above, None)
    assert torch.equal((steps > 0).sum(1), recorded[f"{key}.kept_per_head"])
    torch.testing.assert_close(steps.sum(1), recorded[f"{key}.sum_delta_kept"], atol=0, rtol=1e-9)
    out, ssm = mixer.scan(changed, None)
    torch.testing.assert_close(out[:, recorded[f"{key}.positions"]], recorded[f"{key}.out"], atol=1e-9, rtol=0)
    torch.testing.assert_close(ssm, recorded[f"{key}.ssm_state"], atol=1e-9, rtol=0)
    torch.testing.assert_close(conv, recorded[f"{key}.conv_state"][..., 1:].transpose(1, 2), atol=1e-9, rtol=0)
    after = mixer.step(u[:, 0], MixerState(conv, ssm))
    torch.testing.assert_close(after, recorded[f"{key}.next_out"][:, 0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", names("longmamba", "lm_?"))
@pytest.mark.parametrize("source", ["stored tables", "recalibrated"])
@pytest.mark.parametrize("dtype, chunk", [(torch.float64, None), (torch.float64, 700), (torch.float32, None)], ids=str)
@torch.inference_mode()
def test_a_filtered_model_is_the_authors_from_calibration_to_decode(name, dtype, chunk, source):
    recorded = case("longmamba", name)
    facts, model = recorded.facts, build_model(recorded, dtype)
    runner, how, share = Runner(model, chunk=chunk), facts["aggregate"], facts["clamp_share"]
    if source == "recalibrated":
        sequences = [recorded[f"calibration_ids.{i}"][0].tolist() for i in range(facts["calibration_sequences"])]
        calibration = calibrate(Runner(model), sequences, shares=(share,), lengths=AUTHORS_GRID)
        ours = calibration.table(share, how)
        rtol = 1e-9 if dtype == torch.float64 else 1e-3
        for part in ("budget", "threshold", "alpha"):
            torch.testing.assert_close(getattr(ours, part).double(), recorded[f"table.{part}"], rtol=rtol, atol=0)
    else:
        calibration = authors_calibration(recorded, share, how)
    method = longmamba(calibration, runner.n_layer, model.config.channels, theta=facts["theta"], clamp=share,
                       aggregate=how, factor=facts["factor"], lengths="as_published")  # fmt: skip
    for run in facts["runs"]:
        check_model(recorded, runner, method, run, 1e-8 if dtype == torch.float64 else 1e-3)


def check_model(recorded, runner, method, run, atol):
    length, key = run["length"], f"S{run['length']}"
    read = runner.prefill(Tokens(recorded["input_ids"][:, :length], (length,)), method, tail=length)
    hidden = read.hidden[:, recorded[f"{key}.positions"]]
    want = recorded[f"{key}.logits"].to(hidden.dtype)
    torch.testing.assert_close(runner.model.logits(hidden), want, atol=atol, rtol=0)
    logits = runner.model.logits(read.hidden[:, -1])
    for i, token in enumerate(recorded[f"{key}.decode_ids"][0]):
        want = recorded[f"{key}.decode_logits"][:, i].to(hidden.dtype)
        torch.testing.assert_close(logits, want, atol=atol, rtol=0)
        assert logits.argmax() == token
        logits = runner.step(read.cache, token[None])
