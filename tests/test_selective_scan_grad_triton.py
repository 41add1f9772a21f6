"""Gradients of the Triton selective scan against the reference's autograd in float64, in Triton's interpreter."""

import os
import re

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import selective_scan_grad_triton
from statespan.kernels.gluon_frontend import through_code
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


def run_on_a_warp(code, registers):
    """PTX of shuffles up or down and of arithmetic; a register holds 32 lanes; `there`: who found a source."""
    lane, there = torch.arange(32), torch.ones(32, dtype=torch.bool)
    for guard, name, operands in re.findall(r"(@!?there )?(shfl\S+|fma\S+|mul\S+|mov\S+) ([^;]+);", code):
        out, *words = operands.split(", ")
        if name.startswith("shfl"):
            distance, bound = int(words[1]), int(words[2])
            group = bound >> 8
            limit = lane & group | bound & 31 & ~group
            source = lane + distance if ".down" in name else lane - distance
            there = source <= limit if ".down" in name else source >= limit
            registers[out.removesuffix("|there")] = registers[words[0]][torch.where(there, source, lane)]
            continue
        factor, *more = (registers[word] for word in words)
        result = factor * more[0] + sum(more[1:]) if more else factor
        kept = {"": lane < 32, "@there ": there, "@!there ": ~there}[guard]
        registers[out] = torch.where(kept, result, registers.get(out, torch.tensor(float("nan"))))


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("segments", [2, 16, 32])
def test_the_way_through_the_segments_is_the_recurrence(segments, back):
    """Its PTX, run here: only a GPU would."""
    whole, own, outside = torch.rand(3, 32 // segments, segments)
    outside[:] = outside[:, :1]
    registers = {"$2": whole.flatten(), "$3": own.flatten(), "$4": outside.flatten()}
    run_on_a_warp(through_code(segments, back), registers)
    entering, after, flow = torch.zeros_like(own), torch.zeros_like(own), outside[:, 0]
    for at in reversed(range(segments)) if back else range(segments):
        entering[:, at], flow = flow, whole[:, at] * flow + own[:, at]
        after[:, at] = flow
    torch.testing.assert_close(registers["$0"], entering.flatten())
    torch.testing.assert_close(registers["$1"], after.flatten())
