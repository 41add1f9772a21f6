"""The selective scan of Mamba-1: the definition against published numbers, the kernels against the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from statespan.kernels.dispatch import use_backend
from statespan.kernels.selective_scan import selective_scan
from tests.close import assert_close, parity_case, parity_names

CASES = [pytest.param(name, id=name) for name in parity_names("scan", "m1_")]


def scan_inputs(case: dict[str, Any], tensors: dict[str, Tensor], length: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of one stored case, channel-last."""
    v = {k.removeprefix(f"L{length}."): t.to(dtype) for k, t in tensors.items() if k.startswith(f"L{length}.")}
    rows = {"x": v["u"].mT, "dt": v["delta"].mT, "B": v["B"].movedim(-1, 1), "C": v["C"].movedim(-1, 1)}
    optional = {"D": v.get("D"), "z": v["z"].mT if "z" in v else None, "dt_bias": v.get("delta_bias")}
    return {**rows, **optional, "A": v["A"], "softplus": case["has"]["softplus"], "state": v.get("initial_state")}


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("name", CASES)
def test_published_numbers_in_float64(name: str, backend: Any) -> None:
    case, tensors = parity_case("scan", name)
    for length in case["lengths"]:
        with use_backend(backend):
            y, final = selective_scan(**scan_inputs(case, tensors, length, torch.float64))
        assert_close(y.mT, tensors[f"L{length}.out"], 1e-9, f"y at {length}")
        assert_close(final, tensors[f"L{length}.last_state"], 1e-9, f"state at {length}")


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("name", CASES)
def test_published_numbers_in_float32(name: str, backend: Any) -> None:
    case, tensors = parity_case("scan", name)
    rel = case["tolerance"]["suggested_float32_rtol_of_max"]  # ten times what the source's own float32 run is off by
    for length in case["lengths"]:
        with use_backend(backend):
            y, final = selective_scan(**scan_inputs(case, tensors, length, torch.float32))
        assert_close(y.mT, tensors[f"L{length}.out"], rel, f"y at {length}")
        assert_close(final, tensors[f"L{length}.last_state"], rel, f"state at {length}")


def test_published_gradients() -> None:
    case, tensors = parity_case("scan", "m1_gradients")
    (length,) = case["lengths"]
    inputs = scan_inputs(case, tensors, length, torch.float64)
    names = {"x": "u", "dt": "delta", "dt_bias": "delta_bias"}
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor)}
    y, final = selective_scan(**inputs)
    grad = {k: tensors[f"L{length}.{k}"].double() for k in ("grad_out", "grad_last_state")}
    ((y.mT * grad["grad_out"]).sum() + (final * grad["grad_last_state"]).sum()).backward()
    for name, leaf in leaves.items():
        want = tensors[f"L{length}.grad.{names.get(name, name)}"]
        assert leaf.grad is not None
        got = leaf.grad if name in ("A", "D", "dt_bias") else leaf.grad.mT
        assert_close(got, want, 1e-9, name)
