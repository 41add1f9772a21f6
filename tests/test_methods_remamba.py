"""What must hold of ReMamba whatever the numbers: the specification's invariants, on both mixers."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from statespan.errors import UserError
from statespan.methods import artifacts
from statespan.methods.adapter import Adapter, Selection, from_artifact, to_tensors
from statespan.methods.insertion import Inserted, Window, insertions, pick, similarity, window_of
from statespan.methods.remamba import ReMamba
from statespan.methods.splice import Adapted, spliced, vector_columns
from statespan.methods.table import build_method
from statespan.models.hook import VANILLA
from statespan.models.runner import Runner, Tokens
from tests.method_conformance import EXACT, MethodConformance, TinyModels, facts_of, prompts
from tests.methods import facts_for, random_adapter


class TestConformance(MethodConformance):
    NAME = "remamba"
    # near the end: a tiny random model forgets fast
    PARAMS: ClassVar = {"window": 0.3, "ratio": 0.2, "start": 0.65, "min_length": 70}
    ACTS_AT = 150
    IDLE_AT = 60

    def artifacts(self, runner):
        return {"adapter": random_adapter(facts_of(runner))}


class TestConformanceOfRandom(TestConformance):
    PARAMS: ClassVar = {"start": 0.65, "window": 0.3, "kept": 5, "selector": "random", "mix": "insert_only",
                        "order": "reversed", "min_length": 70}  # fmt: skip


class TestInvariants(TinyModels):
    """The specification's list, on both mixers."""

    def of(self, runner, adapter=None, **params):
        facts, given = facts_of(runner), {"window": 0.3, "ratio": 0.2, **params}
        return build_method("remamba", given, facts, {"adapter": adapter or random_adapter(facts)})

    def test_without_a_window_it_is_vanilla(self, runner):
        prompt = Tokens.pad(prompts(80))
        for method in (self.of(runner, window=0.0), self.of(runner, selector="none")):
            assert method.first_layer_changed(80) is None
            assert torch.equal(method.prefill(runner, prompt).hidden, runner.prefill(prompt, VANILLA).hidden)

    def test_the_windows_own_embeddings_at_weight_one_and_no_theta_are_vanilla(self, runner, monkeypatch):
        prompt = Tokens.pad(prompts(80))
        vanilla = runner.prefill(prompt, VANILLA)
        for theta, same in ((0.0, True), (0.5, False)):
            adapter = random_adapter(facts_of(runner))
            for parameter in adapter.selection.theta:
                parameter.fill_(theta)
            method = self.of(runner, adapter, ratio=1.0, start=0.65)

            def own(params, selection, states, query, window, ids):
                places = torch.arange(window.start, window.start + window.size)
                embedded = runner.model.embed(prompt.ids)[0, places]
                return [Inserted(places, embedded, torch.ones(window.size, dtype=embedded.dtype))]

            monkeypatch.setattr("statespan.methods.remamba.insertions", own)
            ours = method.prefill(runner, prompt)
            assert torch.allclose(ours.hidden, vanilla.hidden, **EXACT) == same

    def test_decoding_from_the_cache_is_reading_on_with_the_same_vectors(self, runner):
        method, (row,) = self.of(runner), prompts(90)
        answer = prompts(6, seed=4)[0]
        whole = method.prefill(runner, Tokens.pad([row + answer]), tail=7)
        read = method.prefill(runner, Tokens.pad([row]))
        steps = torch.cat((read.hidden, runner.extend(read.cache, torch.tensor([answer]))), dim=1)
        torch.testing.assert_close(steps, whole.hidden, **EXACT)

    def test_the_answer_changes_neither_places_nor_weights_nor_vectors(self, runner):
        method, (row,) = self.of(runner), prompts(90)
        window, found = method._window(86), []
        for answer in ([1, 2, 3, 4], [9, 9, 9, 9]):
            prompt = Tokens.pad([row[:86] + answer])
            found.append(method.insertions(runner, prompt, [window], 5)[0])
        assert torch.equal(found[0].places, found[1].places)
        assert torch.equal(found[0].alpha, found[1].alpha) and torch.equal(found[0].vectors, found[1].vectors)

    def test_a_weight_of_zero_makes_the_step_depend_on_theta_and_bias_alone(self, runner):
        adapter = random_adapter(facts_of(runner))
        inputs = self.layer_inputs(runner, 40)
        changed = self.adapted(adapter, inputs, alpha=0.0)
        want = F.softplus(adapter.selection.theta[1] + inputs.dt_bias)
        torch.testing.assert_close(changed.step_sizes()[0, 10:20], want.expand(10, -1), **EXACT)
        assert (changed.step_sizes() > 0).all()

    def test_only_inserted_positions_get_another_step(self, runner):
        inputs = self.layer_inputs(runner, 40)
        for rule in ("official", "scaled_bias", "multiply"):
            changed = self.adapted(random_adapter(facts_of(runner)), inputs, alpha=0.3, rule=rule)
            outside = torch.ones(40, dtype=torch.bool)
            outside[10:20] = False
            assert torch.equal(changed.dt[0, outside], inputs.dt[0, outside])
            assert (changed.dt[0, 10:20] != inputs.dt[0, 10:20]).all()

    def test_each_rule_gives_the_step_it_says(self, runner):
        adapter, inputs = random_adapter(facts_of(runner)), self.layer_inputs(runner, 40)
        raw, bias, theta = inputs.dt[0, 10:20], inputs.dt_bias, adapter.selection.theta[1]
        for alpha in (0.0, 1e-6, 0.4, 1.0):
            for rule, want in (
                ("official", F.softplus(alpha * raw + theta + bias)),
                ("scaled_bias", F.softplus(alpha * (raw + bias) + theta)),
                ("multiply", alpha * F.softplus(raw + bias)),
            ):
                steps = self.adapted(adapter, inputs, alpha=alpha, rule=rule).step_sizes()[0, 10:20]
                torch.testing.assert_close(steps, want, atol=1e-12, rtol=1e-9)

    def test_rows_whose_vectors_stand_elsewhere_keep_their_own_steps(self, runner):
        adapter, inputs = random_adapter(facts_of(runner)), self.layer_inputs(runner, 40)
        both = replace(inputs, dt=inputs.dt.repeat(2, 1, 1))
        mask, alpha = torch.zeros(2, 40, dtype=torch.bool), torch.full((2, 40), 0.3, dtype=torch.float64)
        mask[0, 10:15], mask[1, 13:20] = True, True
        for rule in ("official", "scaled_bias", "multiply"):
            own = replace(both, dt=both.dt.clone())
            changed = Adapted(adapter.selection, alpha, mask, rule, (10, 20)).before_scan(1, own).dt != both.dt
            assert torch.equal(changed, mask[..., None].expand_as(changed))

    def layer_inputs(self, runner, length, layer=1):
        stream = runner.run(runner.stream(Tokens.pad(prompts(length))), VANILLA, 0, layer)
        block = runner.model.layers[layer]
        return block.mixer.project(block.norm(stream.hidden), stream.span, None)[0]

    def adapted(self, adapter, inputs, alpha, rule="official", layer=1):
        weights, mask = torch.zeros(2, 1, inputs.length, dtype=torch.float64)
        weights[0, 10:20], mask[0, 10:20] = alpha, 1
        own = replace(inputs, dt=inputs.dt.clone())  # stage 2 writes into the layer's own steps
        return Adapted(adapter.selection, weights, mask.bool(), rule, (10, 20)).before_scan(layer, own)

    def test_changing_theta_changes_outputs_from_the_window_on_only(self, runner):
        prompt, hidden = Tokens.pad(prompts(80)), []
        for seed in (0, 1):
            adapter = random_adapter(facts_of(runner))
            for parameter in adapter.selection.theta:
                parameter.copy_(random_adapter(facts_of(runner), seed).selection.theta[0])
            method = self.of(runner, adapter, start=0.4)
            whole = SimpleNamespace(hidden=None)
            finish, runner.finish = runner.finish, lambda s, tail, w=whole: setattr(w, "hidden", s.hidden.clone())
            method.prefill(runner, prompt)
            runner.finish = finish
            hidden.append(whole.hidden)
        assert torch.equal(hidden[0][:, :32], hidden[1][:, :32])
        assert (hidden[0][:, 32:] != hidden[1][:, 32:]).any(-1).all()

    def test_unselected_tokens_of_the_window_are_felt_through_stage_one(self, runner):
        method, (row,) = self.of(runner, kept=1, ratio=None, start=0.65), prompts(90)
        before = method.insertions(runner, Tokens.pad([row]), [method._window(90)], 1)[0]
        other, at = list(row), before.places.item() - 1
        other[at] = (other[at] + 1) % 256
        after = method.insertions(runner, Tokens.pad([other]), [method._window(90)], 1)[0]
        assert not torch.equal(before.vectors, after.vectors)

    def test_tokens_outside_the_window_enter_stage_two_as_they_are(self, runner):
        prompt = Tokens.pad(prompts(90, 61))
        method = self.of(runner, start=0.2)
        windows = [method._window(own) for own in prompt.lengths]
        stream, _, mask = spliced(runner, prompt, windows, method.insertions(runner, prompt, windows, 1))
        for row, own in enumerate(prompt.lengths):
            text = ~mask[row] & (stream.positions[row] >= 0)
            places = stream.positions[row, text] + prompt.ids.shape[1] - own
            assert torch.equal(stream.hidden[row, text], runner.model.embed(prompt.ids)[row, places])
            assert mask[row].sum() == windows[row].kept

    def test_vectors_stand_between_the_columns_that_are_worked_out_without_the_mask(self, runner):
        prompt = Tokens.pad(prompts(90, 61, 12))
        for changed in ({"start": 0.2}, {"start": 0.0, "min_length": 70}, {"ratio": 0.0}):
            method = self.of(runner, **changed)
            windows = [method._window(own) for own in prompt.lengths]
            rows = method.insertions(runner, prompt, windows, 1)
            stream, _, mask = spliced(runner, prompt, windows, rows)
            at = mask.any(0).nonzero()[:, 0].tolist()
            want = (at[0], at[-1] + 1) if at else (0, 0)
            assert vector_columns(stream.span.lengths, windows, rows) == want

    @pytest.mark.parametrize("selector, mix", [("topk", "adapt"), ("fixed", "insert_only"), ("last", "insert_only")])
    def test_vectors_enter_in_the_order_asked_for(self, runner, selector, mix):
        prompt, found = Tokens.pad(prompts(90)), {}
        for order in ("text", "reversed", *(["score"] if selector == "topk" else [])):
            method = self.of(runner, start=0.2, selector=selector, mix=mix, order=order)
            found[order] = method.insertions(runner, prompt, [method._window(90)], 1)[0]
        text, reverse = found["text"], found["reversed"]
        assert (text.places.diff() > 0).all() and torch.equal(reverse.places, text.places.flip(0))
        torch.testing.assert_close(reverse.vectors, text.vectors.flip(0), **EXACT)
        if selector == "topk":
            assert (found["score"].alpha.diff() <= 0).all()
            assert set(found["score"].places.tolist()) == set(text.places.tolist())

    def test_the_final_norm_is_given_rows(self, runner):
        # a GPU's norm takes (…, width) with at least one leading axis, which no CPU run would miss
        seen = []
        hook = runner.model.norm_f.register_forward_pre_hook(lambda _, given: seen.append(given[0].ndim))
        self.of(runner).prefill(runner, Tokens.pad(prompts(90, 61)))
        hook.remove()
        assert len(seen) == 2 * 2 + 1 and min(seen) >= 2

    def test_scores_do_not_feel_the_length_of_query_or_keys(self, runner):
        adapter = random_adapter(facts_of(runner))
        states = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        before = similarity(adapter.selection, states[:-1], states[-1])
        for network in (adapter.selection.query, adapter.selection.key):
            network[2].weight.mul_(7.0)
            network[2].bias.mul_(7.0)
        torch.testing.assert_close(similarity(adapter.selection, states[:-1], states[-1]), before, **EXACT)
        assert (before.abs() <= 1).all()

    def test_keeping_nothing_is_vanilla_on_the_prompt_without_the_window(self, runner):
        prompt, (row,) = Tokens.pad(prompts(90)), prompts(90)
        for params in ({"ratio": 0.0}, {"ratio": None, "kept": 0}):
            method = self.of(runner, start=0.2, adapter=None, **params)
            ours = method.prefill(runner, prompt)
            cut = row[:18] + row[18 + 27 :]
            torch.testing.assert_close(ours.hidden, runner.prefill(Tokens.pad([cut])).hidden, **EXACT)
            assert ours.positions[0].tolist() == [*range(18), *range(45, 90)]

    def test_it_costs_two_passes_less_what_was_compressed(self, runner):
        fresh = Runner(runner.model)
        method = self.of(fresh, window=0.25, ratio=0.1)
        caches = [method.prefill(fresh, Tokens.pad(prompts(200))).cache.bytes]
        assert fresh.work.computed == fresh.n_layer * (200 + 200 - 50 + 5)
        caches.append(method.prefill(fresh, Tokens.pad(prompts(90))).cache.bytes)
        assert caches[0] == caches[1] == fresh.prefill(Tokens.pad(prompts(50))).cache.bytes

    def test_an_adapter_file_gives_the_same_outputs_and_merges_its_changes(self, runner, tmp_path):
        facts, prompt = replace(facts_of(runner), digest="d" * 64), Tokens.pad(prompts(90))
        adapter = random_adapter(facts)
        random = torch.Generator().manual_seed(0)
        name = "layers.1.mixer.in_proj.weight"
        wide, narrow = runner.model.state_dict()[name].shape
        changes = {
            f"lora.{name}.A": torch.randn(2, narrow, generator=random, dtype=torch.float64),
            f"lora.{name}.B": torch.randn(wide, 2, generator=random, dtype=torch.float64) * 0.01,
            "full.norm_f.weight": torch.rand(narrow, generator=random, dtype=torch.float64) + 0.5,
        }
        artifacts.write(tmp_path / "remamba.safetensors", to_tensors(adapter.selection, changes), facts, {})
        params = {"window": 0.3, "ratio": 0.2, "adapter": str(tmp_path / "remamba.safetensors")}
        loaded = build_method("remamba", params, facts)
        before = runner.model.state_dict()[name].clone()
        ours = loaded.prefill(runner, prompt).hidden
        direct = ReMamba(loaded.params, facts, Adapter(adapter.selection, changes, "direct"))
        assert torch.equal(ours, direct.prefill(runner, prompt).hidden)
        plain = self.of(runner, adapter).prefill(runner, prompt).hidden
        assert not torch.allclose(ours, plain) and torch.equal(runner.model.state_dict()[name], before)
        merged = loaded.runner(runner)
        want = before + changes[f"lora.{name}.B"] @ changes[f"lora.{name}.A"]
        torch.testing.assert_close(merged.model.state_dict()[name], want, **EXACT)
        assert merged.model.layers[0].mixer.A_log is runner.model.layers[0].mixer.A_log or torch.equal(
            merged.model.layers[0].mixer.A_log, runner.model.layers[0].mixer.A_log
        )
        assert loaded.runner(merged) is merged and loaded.first_layer_changed(5) == 0


class TestGradients(TinyModels):
    """Exact through both passes."""

    @pytest.fixture(autouse=True)
    def with_gradients(self, runner):
        with torch.inference_mode(False), torch.enable_grad():
            yield

    def setting(self, runner, **params):
        adapter = random_adapter(facts_of(runner))
        adapter.selection.requires_grad_(True)
        given = {"window": 0.4, "kept": 4, **params}
        return adapter.selection, build_method("remamba", given, facts_of(runner), {"adapter": adapter})

    def loss(self, runner, method, row, answer=3):
        read = method.prefill(runner, Tokens.pad([row[:-1]]), tail=answer)
        return F.cross_entropy(runner.model.logits(read.hidden)[0], torch.tensor(row[-answer:]))

    def test_finite_differences_agree(self, runner):
        selection, method = self.setting(runner)
        (row,) = prompts(30)
        self.loss(runner, method, row).backward()
        theta, query, key, value = selection.theta, selection.query, selection.key, selection.value
        probes = [(theta[0], 0), (theta[2], 1), (key[2].weight, 17), (query[0].weight, 5), (value[2].bias, 2)]
        for parameter, at in probes:
            flat, step, sides = parameter.data.view(-1), 1e-5, []
            for sign in (1, -1):
                flat[at] += sign * step
                with torch.no_grad():
                    sides.append(self.loss(runner, method, row).item())
                flat[at] -= sign * step
            slope = (sides[0] - sides[1]) / (2 * step)
            assert parameter.grad.view(-1)[at].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)

    def test_every_trained_part_gets_a_gradient_and_frozen_ones_none(self, runner):
        selection, method = self.setting(runner)
        self.loss(runner, method, prompts(30)[0]).backward()
        for name, parameter in selection.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert all(parameter.grad is None for parameter in runner.model.parameters())

    def test_negative_scores_stop_the_gradient_to_query_and_key_only(self, runner):
        selection, method = self.setting(runner)
        with torch.no_grad():  # the key of any state is the negative of the query of the last one
            for network in (selection.key, selection.query):
                network[2].weight.zero_()
            selection.key[2].bias.copy_(-selection.query[2].bias)
        self.loss(runner, method, prompts(30)[0]).backward()
        for network in (selection.query, selection.key):
            assert all(parameter.grad.abs().sum() == 0 for parameter in network.parameters())
        assert selection.value[0].weight.grad.abs().sum() > 0 and selection.theta[0].grad.abs().sum() > 0

    def test_the_score_gradient_can_be_scaled_by_the_score(self, runner, monkeypatch):
        (row,), found = prompts(30), {}
        for rule in ("exact", "times_score"):
            _, method = self.setting(runner, score_grad=rule)
            made = []

            def noted(*args, made=made):
                (one,) = insertions(*args)
                one.alpha.retain_grad()
                made.append(one.alpha)
                return [one]

            monkeypatch.setattr("statespan.methods.remamba.insertions", noted)
            self.loss(runner, method, row).backward()
            found[rule] = (made[0].detach(), made[0].grad)
        alpha, exact = found["exact"]
        torch.testing.assert_close(found["times_score"][1], alpha * exact, atol=1e-15, rtol=1e-9)

    def test_detaching_stage_one_leaves_the_loss_and_cuts_its_gradient(self, runner):
        runner.model.requires_grad_(True)
        try:
            (row,), grads = prompts(30), []
            for detach in (False, True):
                _, method = self.setting(runner, detach_stage1=detach)
                loss = self.loss(runner, method, row)
                runner.model.zero_grad()
                loss.backward()
                grads.append((loss.item(), runner.model.layers[1].mixer.in_proj.weight.grad.clone()))
            assert grads[0][0] == pytest.approx(grads[1][0], abs=1e-12)
            assert not torch.allclose(grads[0][1], grads[1][1])
        finally:
            runner.model.requires_grad_(False).zero_grad()


@given(length=st.integers(2, 5_000), start=st.floats(0, 0.6), share=st.floats(0, 0.4), ratio=st.floats(0, 1))
def test_a_window_lies_in_the_prompt_and_keeps_no_more_than_it_holds(length, start, share, ratio):
    window = window_of(length, start, share, ratio, None)
    assert 0 <= window.start <= window.start + window.size <= length
    assert 0 <= window.kept <= window.size
    if window.size and not window.kept:
        assert window.start + window.size < length


def test_ablation_selectors_pick_what_they_say():
    window = Window(0, 100, 30)
    fixed = pick("fixed", window, None, 0, ())
    assert len(fixed) == math.ceil(100 / math.ceil(100 / 30)) == 25 and fixed[-1] == 100 and fixed[0] > 0
    draws = [
        pick("random", window, None, seed, ids) for seed, ids in ((0, (1, 2)), (0, (1, 2)), (1, (1, 2)), (0, (3,)))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    assert all((one.diff() > 0).all() and len(one) == 30 and one.max() < 100 for one in draws)
    assert pick("first", window, None, 0, ()).tolist() == list(range(30))
    assert pick("last", window, None, 0, ()).tolist() == list(range(70, 100))
    scores = torch.randn(100)
    assert torch.equal(pick("topk", window, scores, 0, ()), scores.argsort(descending=True)[:30].sort().values)


@pytest.mark.parametrize(
    "params, says",
    [
        ({"window": 0.9, "start": 0.3, "ratio": 0.1}, "remamba: start + window must be at most 1; got 0.3 + 0.9"),
        ({"window": 0.2}, "remamba: give either ratio or kept"),
        ({"window": 0.2, "kept": 3, "selector": "first"},
         "remamba: mix adapt needs the scores of selector topk; use insert_only with first"),
        ({"ratio": 0.1, "adapter": None},
         "remamba: adapter may be none only with selector none, window 0, or nothing kept"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(params, says):
    with pytest.raises(UserError) as refused:
        build_method("remamba", params, facts_for())
    assert str(refused.value) == says


def test_more_kept_than_the_window_holds_is_refused_with_both_numbers():
    with pytest.raises(UserError, match="must be at most the window, 10 of this prompt's 100 tokens; got 40"):
        window_of(100, 0.0, 0.1, None, 40)


def test_an_adapter_that_is_missing_or_of_another_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("STATESPAN_CACHE", str(tmp_path / "cache"))
    facts = replace(facts_for(), digest="d" * 64, folder=tmp_path)
    with pytest.raises(UserError, match=r"no remamba artifact .*; train one with `statespan train --method remamba`"):
        build_method("remamba", {"ratio": 0.1}, facts)
    path = tmp_path / "artifacts" / "remamba.safetensors"
    artifacts.write(path, to_tensors(Selection(16, 3, 32), {}), replace(facts, digest="e" * 64), {})
    with pytest.raises(UserError, match="was made for the weights eeeeeeeeeeee, this model's are dddddddddddd"):
        build_method("remamba", {"ratio": 0.1}, facts)
    artifacts.write(path, to_tensors(Selection(16, 3, 40), {}), facts, {})
    with pytest.raises(UserError, match=r"the adapter does not fit this model: size mismatch for theta\.0"):
        build_method("remamba", {"ratio": 0.1}, facts)
    baseline = from_artifact(SimpleNamespace(tensors={"full.norm_f.weight": torch.ones(16)}, digest="b"), facts)
    with pytest.raises(UserError, match="holds no Query, Key and Value"):
        build_method("remamba", {"ratio": 0.1}, facts, {"adapter": baseline})
    assert build_method("remamba", {"selector": "none"}, facts, {"adapter": baseline}).first_layer_changed(9) == 0


def test_parameters_without_effect_are_no_part_of_a_setting():
    canonical = ReMamba.canonical
    assert canonical({"ratio": 0.1, "seed": 3, "detach_stage1": True}) == canonical({"ratio": 0.1})
    assert canonical({"ratio": 0.1, "window": 0.0}) == canonical({"selector": "none"})
    assert canonical({"ratio": 0.0, "order": "reversed"}) == canonical({"ratio": 0.0})
    assert canonical({"ratio": 0.1, "window": 0.2}) != canonical({"ratio": 0.1})
