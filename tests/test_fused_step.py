"""The fused decode step against the plain one: same weights, same state, some tokens in a row."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import step_linear_triton
from statespan.kernels.dispatch import use_backend
from statespan.kernels.step_linear_triton import Narrow
from statespan.kernels.step_rows import linear_norm
from statespan.models import fused_step
from statespan.models.mixer import MixerState
from statespan.models.runner import Cache, Runner, Tokens
from tests.close import assert_close
from tests.gpu import DEVICE, poisoned_buffers
from tests.tiny import tiny_model

__all__ = ["poisoned_buffers"]
REL = 2e-5  # float32 through three layers


def both(kind, rows, dtype=torch.float32, **ssm):
    """The same small model in `dtype` where the kernels run and in float64 on the CPU, with the same states."""
    exact, ours = (Runner(tiny_model(kind, dtype=d, **ssm)) for d in (torch.float64, dtype))
    exact.model.load_state_dict(ours.model.state_dict())
    ours.model.to(DEVICE)
    wide = exact.prefill(Tokens.pad([[1 + row, 2, 3, 4, 5] for row in range(rows)])).cache
    states = [MixerState(s.conv.to(DEVICE, dtype), s.ssm.to(DEVICE, torch.float32)) for s in wide.states]
    for state, narrow in zip(wide.states, states, strict=True):
        state.conv.copy_(narrow.conv)
    return ours, Cache(states), exact, wide


def assert_two_steps_agree(rows, rel, ours, cache, exact, wide):
    for token in range(2):
        ids = torch.arange(rows) + 7 * token
        with use_backend("triton"):
            got = ours.step(cache, ids.to(DEVICE))
        with use_backend("reference"):
            assert_close(got, exact.step(wide, ids), rel, "logits")
    for mine, theirs in zip(cache.states, wide.states, strict=True):
        assert_close(mine.ssm, theirs.ssm, rel, "state")
        assert_close(mine.conv, theirs.conv, rel, "conv")


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@torch.inference_mode()
def test_steps_are_those_of_the_plain_form(kind, rows, monkeypatch):
    # few programs: the interpreter runs them one after the other
    monkeypatch.setattr(step_linear_triton, "form_of", lambda *_, **__: Narrow(64, 32, 1))
    used = []
    fused = fused_step.step
    monkeypatch.setattr(fused_step, "step", lambda *given: used.append(1) or fused(*given))
    assert_two_steps_agree(rows, REL, *both(kind, rows))
    assert len(used) == (2 * 3 if kind == "mamba1" or rows < 3 else 0)


@pytest.mark.parametrize("ssm", [{"norm_before_gate": True}, {"ngroups": 2}, {"rmsnorm": False}], ids=str)
@torch.inference_mode()
def test_other_norms_of_mamba_2_and_none(ssm, monkeypatch):
    monkeypatch.setattr(step_linear_triton, "form_of", lambda *_, **__: Narrow(64, 32, 1))
    assert_two_steps_agree(1, REL, *both("mamba2", 1, **ssm))


@torch.inference_mode()
def test_what_the_norm_reads_of_a_gated_state_is_not_rounded(monkeypatch):
    """In bfloat16 out_proj's product meets y as float32 left it: held to what float64 makes of the same rows."""
    ours, cache, exact, wide = both("mamba2", 2, torch.bfloat16)
    block, other = ours.model.blocks()[0], exact.model.blocks()[0]
    monkeypatch.setattr(step_linear_triton, "form_of", lambda *_, **__: Narrow(64, 32, 1))
    config, seen = block.mixer.config, []
    step_linear = fused_step.step_linear
    monkeypatch.setattr(fused_step, "step_linear", lambda *a, **b: seen.append(step_linear(*a, **b)) or seen[-1])
    stream = torch.randn(2, config.d_model, generator=torch.Generator().manual_seed(1))
    with use_backend("triton"):
        got = fused_step.step(block.norm, block.mixer, stream.to(DEVICE), cache.states[0])
    z, xBC, dt = seen[0].cpu().double().split((config.d_ssm, config.conv_width, config.channels), dim=-1)
    y = other.mixer.update(wide.states[0], z, xBC, dt)
    want = stream.double() + other.mixer.out_proj(other.mixer.norm(y, z))
    assert_close(got, want, 5e-6, "the stream")


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.inference_mode()
def test_steps_of_some_dozens_of_rows_are_those_of_the_plain_form(kind, monkeypatch):
    monkeypatch.setattr(fused_step, "MORE_ROWS", 3)
    monkeypatch.setattr(fused_step, "NARROW", (torch.float32,))  # for a tolerance that tells
    used = []
    monkeypatch.setattr(fused_step, "linear_norm", lambda *given: used.append(1) or linear_norm(*given))
    assert_two_steps_agree(3, REL, *both(kind, 3))
    assert len(used) == 2 * 3


@pytest.mark.parametrize("rows, own", [(3, False), (16, False), (17, True), (64, True), (65, False)])
@torch.inference_mode()
def test_row_counts_with_products_of_their_own(rows, own):
    model, hidden = tiny_model("mamba1", dtype=torch.bfloat16), torch.zeros(rows, 16)
    assert not fused_step.in_rows(model, hidden)
    with use_backend("triton"):
        assert fused_step.in_rows(model, hidden) == own
        assert not fused_step.in_rows(model, hidden.double())
        assert not fused_step.in_rows(tiny_model("mamba1", dtype=torch.float32), hidden)


@torch.inference_mode()
def test_a_cpu_float64_and_many_rows_of_mamba_2_take_the_plain_form():
    model = tiny_model("mamba2")
    block, hidden = model.blocks()[0], torch.zeros(1, 16)
    assert not fused_step.applies(block.norm, block.mixer, hidden)
    with use_backend("triton"):
        assert fused_step.applies(block.norm, block.mixer, hidden)
        assert not fused_step.applies(block.norm, block.mixer, hidden.double())
        assert not fused_step.applies(block.norm, block.mixer, hidden.expand(3, -1))
