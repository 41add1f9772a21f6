"""Gradients of the Triton selective scan against the reference's autograd in float64, in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported

from tests.close import assert_close

pytest.importorskip("triton")
from statespan.kernels import selective_scan_grad_triton as grad_triton
from statespan.kernels.selective_scan import selective_scan_ref
from statespan.kernels.selective_scan_triton import selective_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REL = 2e-5  # float32 sums over a few hundred terms


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter walks a scan element by element: small tiles keep several of them affordable."""
    monkeypatch.setattr(grad_triton, "BLOCK_T", 4)
    monkeypatch.setattr(grad_triton, "BLOCK_D", 4)


def inputs(batch, length, d_inner, d_state, groups=1, **extras):
    random = torch.Generator().manual_seed(length * 1000 + d_inner)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
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
    return {name: value.to(DEVICE) for name, value in tensors.items() if name not in extras.get("without", ())}


def gradients(scan, tensors, constants, dtype):
    leaves = {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}
    y, final = scan(**leaves, **constants)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(v.shape, generator=random).to(DEVICE, dtype) for v in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    return {"y": y, "final": final} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


CASES = {
    "odd_everything": dict(batch=2, length=11, d_inner=7, d_state=3),
    "one_token": dict(batch=1, length=1, d_inner=5, d_state=2),
    "two_groups": dict(batch=1, length=6, d_inner=10, d_state=2, groups=2),
    "bare": dict(batch=1, length=5, d_inner=3, d_state=2, without=("D", "z", "dt_bias", "state")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_match_the_float64_reference(case):
    tensors = inputs(**case)
    want = gradients(selective_scan_ref, tensors, {}, torch.float64)
    got = gradients(selective_scan, tensors, {}, torch.float32)
    for name, value in want.items():
        assert_close(got[name], value, REL, name)


def test_threshold_scale_and_pads_are_constants_that_steer_the_gradients():
    tensors = inputs(batch=2, length=9, d_inner=5, d_state=2)
    random = torch.Generator().manual_seed(3)
    constants = {
        "keep_above": torch.rand(2, 5, generator=random).to(DEVICE),
        "dt_scale": (torch.rand(2, 5, generator=random) + 0.5).to(DEVICE),
        "pads": (0, 5),
    }
    want = gradients(selective_scan_ref, tensors, constants, torch.float64)
    got = gradients(selective_scan, tensors, constants, torch.float32)
    for name, value in want.items():
        assert_close(got[name], value, REL, name)


def test_a_linear_step_has_no_softplus_in_its_gradient():
    tensors = inputs(batch=1, length=5, d_inner=3, d_state=2)
    tensors["dt"] = tensors["dt"].abs() * 0.1
    tensors["dt_bias"] = tensors["dt_bias"].abs() * 0.1
    want = gradients(selective_scan_ref, tensors, {"softplus": False}, torch.float64)
    got = gradients(selective_scan, tensors, {"softplus": False}, torch.float32)
    for name, value in want.items():
        assert_close(got[name], value, REL, name)
