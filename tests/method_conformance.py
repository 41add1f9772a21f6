"""What every method must hold to. A method's test class subclasses the kit and says how to build it.

class TestMyMethod(MethodConformance):
    PARAMS = {"strength": 2.0}
"""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from statespan.errors import UserError
from statespan.methods.base import ModelFacts
from statespan.methods.table import build_method, method_class, params_class
from statespan.models.hook import VANILLA
from statespan.models.runner import Runner, Tokens
from statespan.models.store import StreamStore
from tests.tiny import tiny_model

TRAIN_LENGTH = 64
EXACT = {"atol": 1e-10, "rtol": 0}  # float64; the order of a sum may differ between a row alone and one in a batch


def prompts(*lengths, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=random).tolist() for length in lengths]


def facts_of(runner):
    config = runner.model.config
    return ModelFacts(kind=config.kind, n_layer=config.n_layer, channels=config.channels, d_model=config.d_model,
                      train_length=TRAIN_LENGTH)  # fmt: skip


class TinyModels:
    """Gives each test a runner of a tiny random model, once a mixer."""

    KINDS = ("mamba1", "mamba2")
    _models: ClassVar[dict] = {}

    @pytest.fixture(params=["mamba1", "mamba2"])
    def runner(self, request):
        if request.param not in self.KINDS:
            pytest.skip(f"does not act on {request.param}")
        if request.param not in self._models:
            self._models[request.param] = tiny_model(request.param)
        with torch.inference_mode():
            yield Runner(self._models[request.param])


class MethodConformance(TinyModels):
    NAME = ""
    PARAMS: ClassVar[dict] = {}
    ACTS_AT = 200
    """A prompt length at which the method changes something."""

    IDLE_AT: int | None = None
    """A prompt length at which it changes nothing."""

    def artifacts(self, runner):
        return {}

    @pytest.fixture
    def method(self, runner):
        return build_method(self.NAME, self.PARAMS, facts_of(runner), self.artifacts(runner))

    def same(self, ours, theirs):
        torch.testing.assert_close(ours.hidden, theirs.hidden, **EXACT)
        for one, other in zip(ours.cache.states, theirs.cache.states, strict=True):
            torch.testing.assert_close(one.ssm, other.ssm, **EXACT)
            torch.testing.assert_close(one.conv, other.conv, **EXACT)

    def test_it_changes_what_vanilla_computes(self, runner, method):
        prompt = Tokens.pad(prompts(self.ACTS_AT))
        assert method.first_layer_changed(self.ACTS_AT) is not None
        ours, vanilla = method.prefill(runner, prompt), runner.prefill(prompt, VANILLA)
        assert (ours.hidden - vanilla.hidden).abs().max() > 1e-6

    def test_where_it_says_it_changes_nothing_it_is_vanilla_to_the_bit(self, runner, method):
        if self.IDLE_AT is None:
            pytest.skip(f"{self.NAME} acts at every length")
        prompt = Tokens.pad(prompts(self.IDLE_AT))
        assert method.first_layer_changed(self.IDLE_AT) is None
        ours, vanilla = method.prefill(runner, prompt), runner.prefill(prompt, VANILLA)
        assert torch.equal(ours.hidden, vanilla.hidden)
        forced = runner.finish(runner.run(runner.stream(prompt), method, 0, runner.n_layer), 1)
        assert torch.equal(forced.hidden, vanilla.hidden)

    def test_layers_before_the_first_it_changes_are_vanillas(self, runner, method):
        prompt = Tokens.pad(prompts(self.ACTS_AT))
        first = method.first_layer_changed(self.ACTS_AT)
        ours, vanilla = method.prefill(runner, prompt), runner.prefill(prompt, VANILLA)
        for layer in range(first):
            assert torch.equal(ours.cache.states[layer].ssm, vanilla.cache.states[layer].ssm)

    def test_rows_of_unequal_length_equal_each_row_alone(self, runner, method):
        rows = prompts(self.ACTS_AT, self.ACTS_AT - 37, self.IDLE_AT or 90, self.ACTS_AT + 11)
        together = method.prefill(runner, Tokens.pad(rows))
        for i, row in enumerate(rows):
            alone = method.prefill(runner, Tokens.pad([row]))
            torch.testing.assert_close(together.hidden[i : i + 1], alone.hidden, **EXACT)
            for ours, theirs in zip(together.cache.rows([i]).states, alone.cache.states, strict=True):
                torch.testing.assert_close(ours.ssm, theirs.ssm, **EXACT)
                torch.testing.assert_close(ours.conv, theirs.conv, **EXACT)
            own = together.positions[i][together.positions[i] >= 0]
            assert torch.equal(own, alone.positions[0])

    @pytest.mark.parametrize("rows", [1, 2])
    def test_walking_in_chunks_is_the_whole(self, runner, method, rows):
        prompt = Tokens.pad(prompts(self.ACTS_AT, self.ACTS_AT - 23)[:rows])
        whole = method.prefill(runner, prompt, tail=5)
        chunked = method.prefill(Runner(runner.model, chunk=16), prompt, tail=5)
        self.same(chunked, whole)

    def test_sharing_streams_changes_nothing_and_leaves_them_whole(self, runner, method):
        prompt = Tokens.pad(prompts(self.ACTS_AT))
        shared = Runner(runner.model, store=StreamStore(1 << 26, 1 << 26))
        alone = method.prefill(runner, prompt)
        for _ in range(2):
            self.same(method.prefill(shared, prompt), alone)
        self.same(shared.prefill(prompt, VANILLA), runner.prefill(prompt, VANILLA))

    def test_the_weights_stay_as_they_were(self, runner, method):
        before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
        method.prefill(runner, Tokens.pad(prompts(self.ACTS_AT)))
        assert all(torch.equal(before[name], tensor) for name, tensor in runner.model.state_dict().items())

    def test_the_tail_it_is_asked_for_is_there(self, runner, method):
        read = method.prefill(runner, Tokens.pad(prompts(self.ACTS_AT, self.ACTS_AT - 9)), tail=7)
        assert read.hidden.shape[:2] == (2, 7)
        assert torch.equal(read.positions[0, -7:], torch.arange(self.ACTS_AT - 7, self.ACTS_AT))

    def test_canonical_parameters_build_the_same_method(self, runner, method):
        canonical = method_class(self.NAME).canonical(self.PARAMS)
        again = build_method(self.NAME, canonical, facts_of(runner), self.artifacts(runner))
        assert method_class(self.NAME).canonical(canonical) == canonical
        prompt = Tokens.pad(prompts(self.ACTS_AT))
        assert torch.equal(again.prefill(runner, prompt).hidden, method.prefill(runner, prompt).hidden)

    def test_an_unknown_parameter_gets_a_hint(self):
        field = next(iter(params_class(self.NAME).model_fields))
        with pytest.raises(UserError, match=f"did you mean '{field}'"):
            params_class(self.NAME).build({**self.PARAMS, field + "x": 1})

    def test_each_parameter_says_what_it_is(self):
        fields = params_class(self.NAME).model_fields
        assert all(field.description for field in fields.values()), self.NAME

    def test_a_mixer_it_cannot_act_on_is_refused(self, runner):
        with pytest.raises(UserError, match="acts on"):
            build_method(self.NAME, self.PARAMS, replace(facts_of(runner), kind="rwkv"))
