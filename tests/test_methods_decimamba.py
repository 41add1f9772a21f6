"""What must hold of DeciMamba whatever the numbers: the specification's invariants, on both mixers."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statespan.errors import UserError
from statespan.methods.decimamba import DeciMamba, keep_largest
from statespan.methods.table import build_method
from statespan.models.hook import VANILLA
from statespan.models.runner import Tokens
from tests.decimamba_hooks import decimamba, layer_inputs, selected, watched
from tests.method_conformance import EXACT, MethodConformance, TinyModels, facts_of, prompts
from tests.methods import facts_for


class TestConformance(MethodConformance):
    NAME = "decimamba"
    PARAMS: ClassVar = {"layers": [1, 2], "base_tokens": 100, "beta": 0.6, "extra_tail": 3}
    ACTS_AT = 200
    IDLE_AT = 60


class TestInvariants(TinyModels):
    """The specification's list, on both mixers."""

    def of(self, runner, layers, base, **params):
        return build_method("decimamba", {"layers": layers, "base_tokens": base, **params}, facts_of(runner))

    def test_a_cap_above_the_prefix_and_a_tail_of_everything_are_vanilla(self, runner):
        prompt = Tokens.pad(prompts(120))
        vanilla = runner.prefill(prompt, VANILLA, tail=120)
        for method in (self.of(runner, [0, 2], 119, beta=1.0), self.of(runner, [1], 10, extra_tail=119)):
            assert method.first_layer_changed(120) is None
            assert torch.equal(method.prefill(runner, prompt, tail=120).hidden, vanilla.hidden)
        assert torch.equal(self.of(runner, [1], 10).prefill(runner, prompt, tail=120).hidden, vanilla.hidden)

    def test_survivors_increase_end_in_the_tail_and_lie_in_the_survivors_before(self, runner):
        log = watched(method := self.of(runner, [0, 1, 2], 90, beta=0.5))
        read = method.prefill(runner, Tokens.pad(prompts(150)), tail=4)
        assert [len(kept) for _, _, kept in log] == [94, 49, 26]
        before = torch.arange(150)
        for _, _, kept in log:
            assert (kept.diff() > 0).all() and torch.equal(kept[-4:], torch.arange(len(before) - 4, len(before)))
            before = before[kept]
        assert torch.equal(read.positions[0], before)

    def test_reading_then_stepping_equals_one_pass_with_the_answer_protected(self, runner):
        method, (row,) = self.of(runner, [0, 2], 50, beta=0.7), prompts(140)
        whole = method.prefill(runner, Tokens.pad([row]), tail=9)
        read = method.prefill(runner, Tokens.pad([row[:-8]]))
        hidden = torch.cat((read.hidden, runner.extend(read.cache, torch.tensor([row[-8:]]))), dim=1)
        torch.testing.assert_close(hidden, whole.hidden, **EXACT)

    def test_the_answer_does_not_change_which_tokens_are_kept_but_the_prompt_does(self, runner):
        (row,) = prompts(140)
        seen = []
        for changed in (row, row[:-6] + [7] * 6, row[:100] + [65] * 30 + row[130:]):
            log = watched(method := self.of(runner, [1], 40))
            method.prefill(runner, Tokens.pad([changed]), tail=6)
            seen.append(log[0][2])
        assert torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[0], seen[2])

    def test_bigger_budgets_keep_supersets_and_a_second_equal_cap_drops_nothing(self, runner):
        sets = []
        for base in (20, 50, 90):
            log = watched(method := self.of(runner, [1, 2], base, beta=1.0))
            method.prefill(runner, Tokens.pad(prompts(150)))
            assert len(log) == 1
            sets.append(set(log[0][2].tolist()))
        assert sets[0] < sets[1] < sets[2]

    def test_the_order_of_the_list_permutes_the_caps(self, runner):
        one, other = (self.of(runner, layers, 100, beta=0.5) for layers in ([0, 1, 2], [2, 0, 1]))
        assert one.caps == {0: 100, 1: 50, 2: 25} and other.caps == {2: 100, 0: 50, 1: 25}
        read = other.prefill(runner, Tokens.pad(prompts(150)))
        assert read.span.lengths == (26,)

    def test_before_the_first_dropping_layer_everything_is_vanillas(self, runner):
        prompt = Tokens.pad(prompts(150))
        method = self.of(runner, [2], 40)
        ours, vanilla = method.prefill(runner, prompt), runner.prefill(prompt, VANILLA)
        for layer in range(2):
            assert torch.equal(ours.cache.states[layer].ssm, vanilla.cache.states[layer].ssm)
        # the conv saw every neighbour, and its state is that of the whole sequence
        assert torch.equal(ours.cache.states[2].conv, vanilla.cache.states[2].conv)

    def test_kept_tokens_still_saw_their_dropped_neighbours(self, runner):
        log = watched(method := self.of(runner, [0], 40))
        prompt = Tokens.pad(prompts(150))
        stream = runner.stream(prompt)
        inputs, _ = runner.model.layers[0].mixer.project(runner.model.layers[0].norm(stream.hidden), stream.span, None)
        changed = method.before_scan(0, inputs, method.survey(0, inputs))
        for name in ("x", "z", "dt", "B", "C"):
            assert torch.equal(getattr(changed, name), getattr(inputs, name)[:, log[0][2]])

    def test_scores_under_any_rising_map_keep_the_same_tokens(self, runner):
        scores = torch.rand(90, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        kept = keep_largest(scores, 20, 4)
        for mapped in (7 * scores, scores.exp(), scores.pow(3), scores - 5):
            assert torch.equal(keep_largest(mapped, 20, 4), kept)

    def test_dropped_tokens_get_no_gradient_from_later_layers(self, runner):
        with torch.inference_mode(False), torch.enable_grad():
            rows = Tokens.pad(prompts(60))
            hidden = runner.model.embed(rows.ids).clone().requires_grad_()
            log = watched(method := self.of(runner, [0], 20, min_tokens=0))
            stream = runner.stream(rows, embeds=hidden)
            block, span = runner.model.layers[0], stream.span
            inputs, _ = block.mixer.project(block.norm(hidden), span, None)
            inputs.z.retain_grad()
            changed = method.before_scan(0, inputs, method.survey(0, inputs))
            block.mixer.scan(changed, None)[0].square().sum().backward()
        dropped = torch.ones(60, dtype=torch.bool)
        dropped[log[0][2]] = False
        assert (inputs.z.grad[0][dropped] == 0).all() and (inputs.z.grad[0][~dropped] != 0).any(-1).all()
        # it is felt through the conv windows of kept neighbours only
        far = torch.tensor([not any(0 <= k - t < 4 for k in log[0][2].tolist()) for t in range(60)])
        assert (hidden.grad[0][far] == 0).all() and (hidden.grad[0][~dropped] != 0).any(-1).all()

    def test_a_needle_with_large_steps_survives_any_length(self, runner):
        for length in (80, 300):
            inputs = layer_inputs(torch.randn(length, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(8), 1)
            inputs.dt[0, 17:20] += 6.0
            kept = selected(self.of(runner, [1], 12, min_tokens=0), 1, inputs)
            assert {17, 18, 19} <= set(kept.tolist())

    def test_random_scores_keep_every_place_alike(self, runner):
        method, hits = self.of(runner, [1], 25, min_tokens=0), torch.zeros(100)
        for seed in range(400):
            dt = torch.randn(101, 8, generator=torch.Generator().manual_seed(seed))
            hits[selected(method, 1, layer_inputs(dt, torch.zeros(8), 1))[:-1]] += 1
        # 400 draws at a quarter each: six standard deviations are 52
        assert (hits - 100).abs().max() < 52

    @pytest.mark.parametrize("norm", ["l2", "l1", "max"])
    def test_the_choice_ignores_the_order_of_channels(self, runner, norm):
        dt = torch.randn(90, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        bias, order = torch.linspace(-1, 1, 8, dtype=torch.float64), torch.randperm(8)
        method = self.of(runner, [1], 20, norm=norm)
        one = selected(method, 1, layer_inputs(dt, bias, 1))
        assert torch.equal(one, selected(method, 1, layer_inputs(dt[:, order], bias[order], 1)))
        steps = torch.nn.functional.softplus(dt + bias)
        score = {"l2": steps.square().sum(-1), "l1": steps.sum(-1), "max": steps.amax(-1)}[norm]
        assert torch.equal(one[:-1], score[:-1].topk(20).indices.sort().values)

    def test_tokens_without_a_step_can_be_dropped_unnoticed(self, runner):
        block, prompt = runner.model.layers[0], Tokens.pad(prompts(40))
        stream = runner.stream(prompt)
        inputs, _ = block.mixer.project(block.norm(stream.hidden), stream.span, None)
        idle = torch.zeros(40, dtype=torch.bool)
        idle[5:30:3] = True
        inputs.dt[0, idle] = -1e4  # a softplus of exactly 0
        whole, state = block.mixer.scan(inputs, None)
        kept = (~idle).nonzero().T
        out, shortened = block.mixer.scan(inputs.select(kept, (kept.shape[1],)), None)
        torch.testing.assert_close(out, whole[:, kept[0]], **EXACT)
        torch.testing.assert_close(shortened, state, **EXACT)

    def test_a_prefix_shorter_than_the_floor_is_kept_whole(self, runner):
        prompt = Tokens.pad(prompts(15))
        ours = self.of(runner, [0], 4, min_tokens=20).prefill(runner, prompt)
        assert torch.equal(ours.hidden, runner.prefill(prompt, VANILLA).hidden)


@pytest.mark.parametrize(
    "params, says",
    [
        ({"layers": [3], "base_tokens": 10}, "decimamba.layers must lie in 0 … 2, the model's layers; got [3]"),
        (
            {"layers": [1, 1], "base_tokens": 10},
            "decimamba: layers must be different layers counted from 0; got [1, 1]",
        ),
        ({"base_tokens": 10}, "decimamba: give either layers, a list, or first_layer with layer_count"),
        ({"layers": [1], "beta": 1.5}, "decimamba.beta: input should be less than or equal to 1; got 1.5"),
        ({"layers": [1], "norm": "l3"}, "decimamba.norm: input should be 'l2', 'l1' or 'max'; got 'l3'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(params, says):
    with pytest.raises(UserError) as refused:
        build_method("decimamba", params, facts_for(n_layer=3))
    assert str(refused.value) == says


def test_without_a_known_training_length_the_base_must_be_given():
    with pytest.raises(UserError, match="base_tokens must be given"):
        build_method("decimamba", {"layers": [1]}, replace(facts_for(n_layer=3), train_length=None))


def test_beta_is_no_part_of_a_setting_with_one_layer():
    canonical = DeciMamba.canonical
    assert canonical({"first_layer": 1, "beta": 0.5}) == canonical({"layers": [1], "beta": 0.9})
    assert canonical({"layers": [1, 2], "beta": 0.5}) != canonical({"layers": [1, 2], "beta": 0.9})
    assert canonical({"layers": [1, 2]}) == canonical({"first_layer": 1, "layer_count": 2})


@given(length=st.integers(1, 400), base=st.integers(1, 300), floor=st.integers(0, 50), tail=st.integers(1, 30))
def test_a_layer_never_keeps_more_than_there_is_nor_less_than_the_floor(length, base, floor, tail):
    method, prefix = decimamba([0, 1], base, beta=0.5, min_tokens=floor), length - min(tail, length)
    for layer in (0, 1):
        kept = method.kept_of(layer, length, tail)
        assert min(floor, prefix) <= kept <= prefix
        assert kept <= max(base, floor)
