"""The scan of Mamba-2: the definition against published numbers, chunked form and kernels against the definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statespan.kernels.dispatch import use_backend
from statespan.kernels.ssd import ssd, ssd_chunked, ssd_ref
from tests.close import assert_close, parity_case, parity_names

CASES = [pytest.param(name, id=name) for name in parity_names("scan", "m2_")]
Scan = Callable[..., tuple[Tensor, Tensor]]


def ssd_numba(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with use_backend("numba"):
        return ssd(*args, **kwargs)


FORMS = [
    pytest.param(ssd_ref, id="reference"),
    pytest.param(ssd_chunked, id="chunked"),
    pytest.param(ssd_numba, id="numba"),
]


def ssd_inputs(case: dict[str, Any], tensors: dict[str, Tensor], length: int, dtype: torch.dtype) -> dict[str, Any]:
    v = {k.removeprefix(f"L{length}."): t.to(dtype) for k, t in tensors.items() if k.startswith(f"L{length}.")}
    has = case["has"]
    optional = {name: v.get(name) for name in ("z", "D", "dt_bias")}
    names = {"softplus": has["softplus"], "dt_limit": has["dt_limit"], "state": v.get("initial_state")}
    return {name: v[name] for name in ("x", "dt", "A", "B", "C")} | optional | names


@pytest.mark.parametrize("scan", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_published_numbers_in_float64(name: str, scan: Scan) -> None:
    case, tensors = parity_case("scan", name)
    for length in case["lengths"]:
        y, final = scan(**ssd_inputs(case, tensors, length, torch.float64))
        assert_close(y, tensors[f"L{length}.out"], 1e-9, f"y at {length}")
        assert_close(final, tensors[f"L{length}.final_state"], 1e-9, f"state at {length}")


@pytest.mark.parametrize("scan", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_published_numbers_in_float32(name: str, scan: Scan) -> None:
    case, tensors = parity_case("scan", name)
    rel = case["tolerance"]["suggested_float32_rtol_of_max"]  # over ten times what the source's float32 run is off by
    for length in case["lengths"]:
        y, final = scan(**ssd_inputs(case, tensors, length, torch.float32))
        assert_close(y, tensors[f"L{length}.out"], rel, f"y at {length}")
        assert_close(final, tensors[f"L{length}.final_state"], rel, f"state at {length}")


@pytest.mark.parametrize("scan", FORMS[:2])
def test_published_gradients(scan: Scan) -> None:
    case, tensors = parity_case("scan", "m2_gradients")
    (length,) = case["lengths"]
    inputs = ssd_inputs(case, tensors, length, torch.float64)
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor)}
    y, final = scan(**inputs)
    grad = {k: tensors[f"L{length}.{k}"].double() for k in ("grad_out", "grad_final_state")}
    ((y * grad["grad_out"]).sum() + (final * grad["grad_final_state"]).sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert_close(leaf.grad, tensors[f"L{length}.grad.{name}"], 1e-9, name)
