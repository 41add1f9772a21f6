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
from statespan.models.runner import Runner, Tokens
from tests.close import assert_close
from tests.tiny import tiny_model

REL = 2e-5  # float32 through three layers


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@torch.inference_mode()
def test_steps_are_those_of_the_plain_form(kind, rows, monkeypatch):
    # few programs: the interpreter runs them one after the other
    monkeypatch.setattr(step_linear_triton, "form_of", lambda *_, **__: Narrow(64, 32, 1))
    used = []
    fused = fused_step.step
    monkeypatch.setattr(fused_step, "step", lambda *given: used.append(1) or fused(*given))
    narrow, wide = (Runner(tiny_model(kind, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    prompt = Tokens.pad([[1 + row, 2, 3, 4, 5] for row in range(rows)])
    ours, exact = narrow.prefill(prompt).cache, wide.prefill(prompt).cache
    for token in range(2):
        ids = torch.arange(rows) + 7 * token
        with use_backend("triton"):
            got = narrow.step(ours, ids)
        assert_close(got, wide.step(exact, ids), REL, "logits")
    for mine, theirs in zip(ours.states, exact.states, strict=True):
        assert_close(mine.ssm, theirs.ssm, REL, "state")
        assert_close(mine.conv, theirs.conv, REL, "conv")
    assert len(used) == (2 * 3 if kind == "mamba1" or rows < 3 else 0)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.inference_mode()
def test_steps_of_some_dozens_of_rows_are_those_of_the_plain_form(kind, monkeypatch):
    monkeypatch.setattr(fused_step, "MORE_ROWS", 3)
    monkeypatch.setattr(fused_step, "NARROW", (torch.float32,))  # for a tolerance that tells
    used = []
    monkeypatch.setattr(fused_step, "linear_norm", lambda *given: used.append(1) or linear_norm(*given))
    narrow, wide = (Runner(tiny_model(kind, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    prompt = Tokens.pad([[1 + row, 2, 3, 4, 5] for row in range(3)])
    ours, exact = narrow.prefill(prompt).cache, wide.prefill(prompt).cache
    for token in range(2):
        ids = torch.arange(3) + 7 * token
        with use_backend("triton"):
            got = narrow.step(ours, ids)
        assert_close(got, wide.step(exact, ids), REL, "logits")
    for mine, theirs in zip(ours.states, exact.states, strict=True):
        assert_close(mine.ssm, theirs.ssm, REL, "state")
        assert_close(mine.conv, theirs.conv, REL, "conv")
    assert len(used) == 2 * 3


@pytest.mark.parametrize("rows, own", [(3, False), (8, False), (9, True), (17, True), (64, True), (65, False)])
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
