"""What must hold of LongMamba whatever the numbers: the specification's invariants, on both mixers."""

import itertools
from dataclasses import replace
from functools import cache
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan.errors import UserError
from statespan.kernels.selective_scan import step_sizes
from statespan.methods import artifacts
from statespan.methods.calibration import AUTHORS_GRID, calibrate, cut_sequences
from statespan.methods.calibration_files import from_artifact, to_tensors
from statespan.methods.longmamba import LongMamba
from statespan.methods.step_statistics import StepStatistics, aggregate, log_rates, step_statistics
from statespan.methods.table import build_method
from statespan.models.hook import VANILLA
from statespan.models.runner import Runner, Tokens
from tests.method_conformance import EXACT, TRAIN_LENGTH, MethodConformance, TinyModels, facts_of, prompts
from tests.methods import facts_for, stand_ins
from tests.tiny import tiny_model


def descending(steps):
    return steps.double().sort(dim=-1, descending=True).values


@cache
def calibrated(kind, exact=False):
    model = tiny_model(kind)
    return calibrate(Runner(model), prompts(*[TRAIN_LENGTH] * 3, seed=9), exact=exact)


class LongMambaTests:
    def calibration(self, runner, exact=False):
        return calibrated(runner.model.config.kind, exact)

    def of(self, runner, exact=False, calibration=None, **params):
        given = {"share": 0.5, **params} if "theta" not in params else params
        artifacts = {"calibration": calibration or self.calibration(runner, exact)}
        return build_method("longmamba", given, facts_of(runner), artifacts)


class TestConformance(LongMambaTests, MethodConformance):
    NAME = "longmamba"
    PARAMS: ClassVar = {"share": 0.5}
    ACTS_AT = 200
    IDLE_AT = TRAIN_LENGTH

    def artifacts(self, runner):
        return {"calibration": self.calibration(runner)}


class TestConformanceOfBound(TestConformance):
    PARAMS: ClassVar = {"share": 0.5, "selector": "bound", "factor": 0.6}


class TestConformanceOfNorm(TestConformance):
    PARAMS: ClassVar = {"share": 0.5, "selector": "norm"}


class TestConformanceOfAlpha(TestConformance):
    PARAMS: ClassVar = {"share": 0.5, "selector": "alpha", "lengths": "exact"}

    def artifacts(self, runner):
        return {"calibration": self.calibration(runner, exact=True)}


def layer_scan(runner, method, row, layer=0):
    """Inputs of a layer, what the method makes of them, and its steps: (length, channels)"""
    stream = runner.run(runner.stream(Tokens.pad([row])), VANILLA, 0, layer)
    inputs, _ = runner.model.layers[layer].mixer.project(
        runner.model.layers[layer].norm(stream.hidden), stream.span, None
    )
    ahead = method.looks_ahead(layer, inputs.span)
    seen = method.settle(layer, method.survey(layer, inputs), inputs.span) if ahead else None
    changed = method.before_scan(layer, inputs, seen)
    steps = step_sizes(inputs.dt, inputs.dt_bias, True, inputs.dt_limit, changed.keep_above, changed.dt_scale)
    return inputs, changed, steps[0]


class TestInvariants(LongMambaTests, TinyModels):
    """The specification's list, on both mixers."""

    def test_without_a_global_channel_it_is_vanilla_and_reads_no_threshold(self, runner):
        method = self.of(runner, theta=0.9999999)
        assert not method.globals.any() and method.first_layer_changed(500) is None
        prompt = Tokens.pad(prompts(150))
        assert torch.equal(method.prefill(runner, prompt).hidden, runner.prefill(prompt, VANILLA).hidden)
        assert not method.curves._found

    def test_a_filtered_token_leaves_the_state_and_still_reads_it(self, runner):
        method, (row,) = self.of(runner), prompts(150)
        inputs, changed, steps = layer_scan(runner, method, row)
        mixer, config = runner.model.layers[0].mixer, runner.model.config
        t = int((steps == 0).any(-1).nonzero()[-1])
        filtered = steps[t] == 0
        before, after = (
            mixer.scan(replace(changed.select(torch.arange(n)[None], (n,)), kept=None), None)[1] for n in (t, t + 1)
        )
        if config.kind == "mamba1":
            assert torch.equal(before[0, filtered], after[0, filtered])
            C, read = inputs.C[0, t], (after[0] @ inputs.C[0, t])[filtered]
            assert C.shape == (config.d_state,) and (read != 0).all()
        else:
            assert torch.equal(before[0, filtered], after[0, filtered])
        # what stands at that token is C·h + D x, gated: the step of size 0 changes nothing else
        plain = replace(changed, keep_above=None, dt=changed.dt.clone())
        plain.dt[0, :, :] = torch.where(steps == 0, -1e9, changed.dt[0])
        torch.testing.assert_close(mixer.scan(plain, None)[0], mixer.scan(changed, None)[0], **EXACT)

    def test_local_channels_keep_their_steps(self, runner):
        method, (row,) = self.of(runner), prompts(150)
        inputs, _, steps = layer_scan(runner, method, row)
        local = ~method.globals[0]
        assert torch.equal(steps[:, local], inputs.step_sizes()[0][:, local])
        reached = steps[:, method.globals[0]]
        assert (reached == 0).any() and (reached != 0).any()

    def test_removing_a_channels_filtered_tokens_gives_its_final_state(self, runner):
        method, (row,) = self.of(runner), prompts(150)
        inputs, changed, steps = layer_scan(runner, method, row)
        mixer = runner.model.layers[0].mixer
        state = mixer.scan(changed, None)[1]
        channel = int(method.globals[0].nonzero()[0])
        kept = steps[:, channel].nonzero().T
        shortened = mixer.scan(inputs.select(kept, (kept.shape[1],)), None)[1]
        torch.testing.assert_close(shortened[0, channel], state[0, channel], **EXACT)

    def test_thresholds_grow_with_length_up_to_the_cap(self, runner):
        calibration = self.calibration(runner, exact=True)
        steps = calibration.order[0].double().flatten(0, 1)
        for share in (0.0, 0.1):
            found = step_statistics(
                steps, log_rates_of(calibration), share, range(TRAIN_LENGTH + 1, 40 * TRAIN_LENGTH, 37)
            )
            cap = steps[..., max(1, int(share * TRAIN_LENGTH)) - 1]
            assert (found.threshold >= 0).all() and (found.threshold <= cap[..., None] * (1 + 1e-12)).all()
            # non-decreasing but for rounding
            assert (found.threshold.diff(dim=-1) >= -1e-12 * cap[..., None]).all()
            lengths = torch.arange(TRAIN_LENGTH + 1, 40 * TRAIN_LENGTH, 37)
            assert (found.alpha * lengths <= TRAIN_LENGTH + 1 + 1e-9).all()

    def test_kept_sets_shrink_as_the_factor_grows_to_nothing(self, runner):
        (row,) = prompts(150)
        kept = [layer_scan(runner, self.of(runner, factor=b), row)[2] > 0 for b in (0.5, 1.0, 2.0, float("inf"))]
        for fewer, more in itertools.pairwise(reversed(kept)):
            assert (fewer <= more).all()
        method = self.of(runner)
        assert not kept[-1][:, method.globals[0]].any() and kept[-1][:, ~method.globals[0]].all()

    def test_raising_theta_never_adds_a_global_channel_and_share_is_a_theta(self, runner):
        grown = [self.of(runner, theta=theta).globals for theta in (1e-30, 1e-10, 1e-3, 0.5)]
        assert all((fewer <= more).all() for more, fewer in itertools.pairwise(grown))
        shared = self.of(runner, share=0.25)
        assert shared.globals.sum() == round(0.25 * shared.globals.numel())
        log_decay = shared.calibration.table(0.05, "max").log_decay
        assert log_decay[shared.globals].min() > log_decay[~shared.globals].max()
        assert (log_decay < 0).all()

    def test_faster_channels_leave_that_power_of_their_memory(self, runner):
        calibration = self.calibration(runner, exact=True)
        steps, A = calibration.order[0, 1].double(), calibration.A[1].double()
        shape = A if A.ndim == 1 else A[:, :1].expand_as(A)  # a mean over states is no power of one
        once, thrice = (step_statistics(steps, log_rates(steps, scale * shape), 0.1, [100]) for scale in (1.0, 3.0))
        torch.testing.assert_close(thrice.log_decay, 3 * once.log_decay, rtol=1e-9, atol=0)
        assert torch.equal(thrice.budget, once.budget) and torch.equal(thrice.threshold, once.threshold)

    def test_a_step_that_equals_its_threshold_is_dropped(self, runner):
        dt, least = (
            torch.full((1, 3, 2), 0.7, dtype=torch.float64),
            torch.tensor([[0.7, 0.7 - 1e-12]], dtype=torch.float64),
        )
        kept = step_sizes(dt, None, False, None, least, None) > 0
        assert not kept[..., 0].any() and kept[..., 1].all()

    def test_calibration_leaves_the_model_as_it_was(self, runner):
        before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
        prompt = Tokens.pad(prompts(150))
        read = runner.prefill(prompt).hidden
        calibrate(runner, prompts(TRAIN_LENGTH), shares=(0.05,), lengths=(100,))
        assert all(torch.equal(before[name], tensor) for name, tensor in runner.model.state_dict().items())
        assert torch.equal(runner.prefill(prompt).hidden, read)

    def test_changing_a_token_leaves_what_comes_before_it_unchanged(self, runner):
        (row,) = prompts(150)
        method, other = self.of(runner), [*row[:100], (row[100] + 1) % 256, *row[101:]]
        one, two = (method.prefill(runner, Tokens.pad([ids]), tail=150).hidden for ids in (row, other))
        assert torch.equal(one[:, :100], two[:, :100]) and not torch.equal(one[:, 100:], two[:, 100:])

    def test_decoding_goes_on_unfiltered(self, runner):
        prompt, token = Tokens.pad(prompts(150)), torch.tensor([65])
        read = self.of(runner).prefill(runner, prompt)
        cache = read.cache.clone()
        assert torch.equal(runner.step(read.cache, token), runner.step(cache, token))
        longer = self.of(runner).prefill(runner, Tokens.pad([prompts(150)[0] + [65]]))
        assert not torch.allclose(longer.cache.states[0].ssm, read.cache.states[0].ssm)

    def test_filtered_decay_is_never_faster_than_unfiltered(self, runner):
        inputs, _, steps = layer_scan(runner, self.of(runner), prompts(300)[0])
        assert (steps.sum(0) <= inputs.step_sizes()[0].sum(0)).all()

    def test_exact_thresholds_are_the_stored_ones_at_stored_lengths(self, runner):
        calibration = self.calibration(runner, exact=True)
        everything = torch.ones_like(calibration.table(0.05, "max").budget, dtype=torch.bool)
        for how in ("max", "mean"):
            for at in (0, 7, 20):
                g, _ = calibration.at(calibration.lengths[at], 0.05, how, everything)
                stored = calibration.table(0.05, how).threshold[..., at]
                torch.testing.assert_close(g, stored, rtol=1e-9, atol=0)
                interpolated = calibration.interpolated(calibration.lengths[at], 0.05, how)
                torch.testing.assert_close(interpolated, stored, rtol=1e-9, atol=0)

    def test_interpolated_thresholds_are_near_the_exact_ones(self, runner):
        calibration = self.calibration(runner, exact=True)
        everything = torch.ones_like(calibration.table(0.05, "mean").budget, dtype=torch.bool)
        for length in (100, 333, 1_000, 5_000):
            g, _ = calibration.at(length, 0.05, "mean", everything)
            # 64 recorded steps are few: a threshold is one of them, and neighbours differ by this much
            torch.testing.assert_close(calibration.interpolated(length, 0.05, "mean"), g, rtol=0.06, atol=0)

    def test_a_file_holds_what_was_calibrated(self, runner, tmp_path):
        calibration, facts = self.calibration(runner, exact=True), replace(facts_of(runner), digest="d" * 64)
        artifacts.write(tmp_path / "c.safetensors", to_tensors(calibration), facts, {})
        again = from_artifact(artifacts.read(tmp_path / "c.safetensors", facts, "calibrate"))
        assert again.lengths == calibration.lengths and again.train_length == TRAIN_LENGTH
        assert torch.equal(again.order, calibration.order) and again.digest
        for key, table in calibration.tables.items():
            assert torch.equal(again.tables[key].log_decay, table.log_decay)
            # float16 has 11 bits
            torch.testing.assert_close(again.tables[key].threshold, table.threshold, rtol=2**-11, atol=1e-7)
        with pytest.raises(UserError, match="was made for the weights dddddddddddd, this model's are eeeeeeeeeeee"):
            artifacts.read(tmp_path / "c.safetensors", replace(facts, digest="e" * 64), "calibrate")

    def test_the_authors_files_give_the_tables_they_hold(self, runner, tmp_path):
        facts = facts_of(runner)
        for layer in range(facts.n_layer):
            table = {f"{length // 1000}k": torch.full((facts.channels,), length / 1e4) for length in AUTHORS_GRID}
            stored = {"delta_t-thre": table, "alpha": table, "decay": torch.full((facts.channels,), 3.0),
                      "tA_prod": torch.linspace(0, 1, facts.channels)}  # fmt: skip
            for name, value in stored.items():
                (tmp_path / name).mkdir(exist_ok=True)
                torch.save(value, tmp_path / name / f"{name}_layer_{layer}.pt")
        method = self.of(runner, theta=0.5, lengths="as_published", calibration=tmp_path)
        assert torch.equal(method.globals[1], torch.linspace(0, 1, facts.channels) > 0.5)
        nearest = {3_499: 0.3, 3_500: 0.3, 9_000: 0.8, 9_001: 1.0, 10**6: 19.2}
        for length, want in nearest.items():
            torch.testing.assert_close(method.curves(length)[0][0, 0].item(), want)
        assert not method.filters(2_999) and method.filters(3_000)


def log_rates_of(calibration):
    return torch.cat([log_rates(s, A) for s, A in zip(calibration.order[0].double(), calibration.A, strict=True)])


@given(seed=st.integers(0, 50), length=st.integers(2, 10))
@settings(max_examples=20, deadline=None)
def test_without_a_clamp_the_kept_steps_of_the_same_law_sum_to_the_budget(seed, length):
    random = torch.Generator().manual_seed(seed)
    L, S = 1_000, 1_000 * length
    recorded = torch.randn(128, L, generator=random, dtype=torch.float64).exp()
    fresh = torch.randn(128, S, generator=random, dtype=torch.float64).exp()
    ordered = descending(recorded)
    found = step_statistics(ordered, -ordered, 0.0, [S])
    kept_sum = (fresh * (fresh > found.threshold)).sum(-1)
    # the mean over channels: one channel's largest steps vary by more than the law's 10 %
    assert (kept_sum / found.budget).mean().item() == pytest.approx(1.0, abs=0.15)
    clamped_share = step_statistics(ordered, -ordered, 0.1, [S])
    assert (fresh > clamped_share.threshold).double().mean() > 0.08


def test_aggregates_do_not_depend_on_the_order_and_max_is_above_mean():
    random = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(4):
        ordered = descending(torch.randn(5, 64, generator=random).exp())
        parts.append(step_statistics(ordered, -ordered * 0.01, 0.1, [100, 500]))
    for name in StepStatistics.__slots__:
        largest, mean = (getattr(aggregate(parts, how), name) for how in ("max", "mean"))
        assert (largest >= mean - 1e-12).all()
        torch.testing.assert_close(mean, getattr(aggregate(parts[::-1], "mean"), name), rtol=1e-12, atol=0)
        one = [getattr(aggregate(parts[:1], how), name) for how in ("max", "mean")]
        assert torch.equal(one[0], one[1])


@pytest.mark.parametrize(
    "params, says",
    [
        ({"theta": 0.0}, "longmamba.theta: input should be greater than 0; got 0.0"),
        ({}, "longmamba: give either theta or share"),
        ({"share": 0.1, "selector": "dt_thr"}, "longmamba.selector: input should be 'dt_thre', 'alpha', 'offline', "
         "'bound' or 'norm'; got 'dt_thr'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(params, says):
    with pytest.raises(UserError) as refused:
        build_method("longmamba", params, facts_for(), stand_ins(facts_for()))
    assert str(refused.value) == says


def test_a_calibration_of_another_shape_or_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("STATESPAN_CACHE", str(tmp_path))
    facts = facts_for()
    with pytest.raises(UserError, match=r"this model has no longmamba artifact .* `statespan calibrate MODEL`"):
        build_method("longmamba", {"share": 0.1}, replace(facts, folder=tmp_path))
    with pytest.raises(UserError, match=r"be of 3 layers of 32 channels; got \(4, 32\)"):
        build_method("longmamba", {"share": 0.1}, facts, stand_ins(facts_for(n_layer=4)))
    with pytest.raises(UserError, match="is not in the calibration, which has"):
        build_method("longmamba", {"share": 0.1, "clamp": 0.07}, facts, stand_ins(facts))
    with pytest.raises(UserError, match="lacks the ordered steps; run `statespan calibrate MODEL --exact`"):
        build_method("longmamba", {"share": 0.1, "lengths": "exact"}, facts, stand_ins(facts)).curves(100)


def test_parameters_without_effect_are_no_part_of_a_setting():
    canonical = LongMamba.canonical
    assert canonical({"share": 0.1, "calibration": "a"}) == canonical({"share": 0.1})
    assert canonical({"share": 0.1, "selector": "norm", "lengths": "exact"}) == canonical(
        {"share": 0.1, "selector": "norm"}
    )
    assert canonical({"share": 0.1, "clamp": 0.1}) != canonical({"share": 0.1})


def test_a_text_is_cut_as_the_authors_cut_theirs():
    assert [s[0] for s in cut_sequences(range(1_000), 4, 100)] == [10, 260, 510, 760]
    with pytest.raises(UserError, match="has 300 tokens; 4 sequences of 100 need 410"):
        cut_sequences(range(300), 4, 100)
