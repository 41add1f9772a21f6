"""What a mixer keeps between calls, and how its output reaches the residual stream."""

import copy
import weakref
from typing import ClassVar

import pytest
import torch

from statespan.models.hook import Method
from statespan.models.mixer import add_product
from statespan.models.runner import Runner, Tokens
from tests.tiny import tiny_model


@pytest.fixture(params=["mamba1", "mamba2"])
def mixer(request):
    return tiny_model(request.param).blocks()[0].mixer


def test_decay_rates_are_worked_out_once_for_inference(mixer):
    with torch.inference_mode():
        first = mixer.A()
        assert mixer.A() is first and torch.equal(first, -mixer.A_log.exp())
    assert not first.is_inference()  # a later pass may save it for a gradient


def test_decay_rates_follow_every_change_of_their_logarithms(mixer):
    def right():
        return torch.equal(mixer.A(), -mixer.A_log.exp())

    with torch.no_grad():
        assert right()
        mixer.A_log.add_(0.5)  # as an optimizer
        assert right()
        mixer.A_log.data = mixer.A_log.data * 2  # as a cast
        assert right()
        mixer.A_log = torch.nn.Parameter(mixer.A_log - 1)  # as an adapter
        assert right()
        other = copy.deepcopy(mixer)
        other.A_log.mul_(3.0)
        assert torch.equal(other.A(), -other.A_log.exp()) and right()


def test_decay_rates_keep_their_gradient_in_training(mixer):
    with torch.no_grad():
        mixer.A()
    mixer.A_log.requires_grad_()
    mixer.A().sum().backward()
    torch.testing.assert_close(mixer.A_log.grad, -mixer.A_log.exp())


def test_an_output_is_added_where_the_stream_stands():
    linear = torch.nn.Linear(6, 4, bias=False)
    whole, rows = torch.randn(1, 9, 4), torch.randn(1, 3, 6)
    want = whole.clone()
    want[:, 2:5] += linear(rows)
    with torch.no_grad():
        add_product(whole[:, 2:5], rows, linear)
    assert torch.equal(whole, want)


class Ahead(Method):
    """Sees each layer before it scans it, and leaves it as it is."""

    name: ClassVar[str] = "ahead"

    def first_layer_changed(self, length):
        return 0

    def looks_ahead(self, layer, span):
        return True

    def survey(self, layer, inputs):
        return inputs.dt


@pytest.mark.parametrize("method", [Method(), Ahead()], ids=["vanilla", "ahead"])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_no_two_chunks_of_a_layer_are_held_at_once(kind, method, monkeypatch):
    model, made = tiny_model(kind), []

    def project(mixer, *args):
        assert all(before() is None for before in made)
        inputs, state = type(mixer).project(mixer, *args)
        made.append(weakref.ref(inputs.x))
        return inputs, state

    for block in model.blocks():
        monkeypatch.setattr(block.mixer, "project", project.__get__(block.mixer))
    with torch.inference_mode():
        Runner(model, chunk=5).prefill(Tokens.pad([list(range(17))]), method)
    assert len(made) == (4 if method.name == "vanilla" else 8) * len(model.blocks())
