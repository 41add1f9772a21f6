"""Gradients of the Triton selective scan against the reference's autograd in float64, in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import selective_scan_grad_triton
from statespan.kernels.selective_scan import selective_scan_ref
from statespan.kernels.selective_scan_grad_triton import selective_scan
from statespan.kernels.selective_scan_tiles_triton import Tiling
from tests.close import assert_close
from tests.gpu import DEVICE, draw, gradients, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 2e-5  # float32 sums over a few hundred terms


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter walks a scan element by element: small tiles keep several of them affordable."""
    if DEVICE == "cpu":
        monkeypatch.setattr(selective_scan_grad_triton, "TILING", Tiling(tokens=4, segments=2, channels=4, warps=1))


def inputs(batch, length, d_inner, d_state, groups=1, without=()):
    tensors = {
        "x": draw(batch, length, d_inner),
        "dt": draw(batch, length, d_inner),
        "A": -draw(d_inner, d_state).exp(),
        "B": draw(batch, length, groups, d_state),
        "C": draw(batch, length, groups, d_state),
        "D": draw(d_inner),
        "z": draw(batch, length, d_inner),
        "dt_bias": draw(d_inner),
        "state": draw(batch, d_inner, d_state),
    }
    return {name: value for name, value in tensors.items() if name not in without}


def assert_same(tensors, constants):
    want = gradients(selective_scan_ref, tensors, constants, torch.float64)
    got = gradients(selective_scan, tensors, constants, torch.float32)
    for name, value in want.items():
        assert_close(got[name], value, REL, name)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(dict(batch=2, length=11, d_inner=7, d_state=3), id="odd_everything"),
        pytest.param(dict(batch=1, length=1, d_inner=5, d_state=2), id="one_token"),
        pytest.param(dict(batch=1, length=6, d_inner=10, d_state=2, groups=2), id="two_groups"),
        pytest.param(dict(batch=1, length=5, d_inner=3, d_state=2, without=("D", "z", "dt_bias", "state")), id="bare"),
    ],
)
def test_gradients_match_the_float64_reference(case):
    assert_same(inputs(**case), {})


def test_threshold_scale_and_pads_are_constants_that_steer_the_gradients():
    constants = {
        "keep_above": torch.rand(2, 5).to(DEVICE),
        "dt_scale": (torch.rand(2, 5) + 0.5).to(DEVICE),
        "pads": (0, 5),
    }
    assert_same(inputs(batch=2, length=9, d_inner=5, d_state=2), constants)


def test_a_linear_step_has_no_softplus_in_its_gradient():
    tensors = inputs(batch=1, length=5, d_inner=3, d_state=2)
    for name in ("dt", "dt_bias"):
        tensors[name] = tensors[name].abs() * 0.1
    assert_same(tensors, {"softplus": False})
