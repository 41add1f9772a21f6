"""Which backend an operator runs on: by device and by need of a gradient, never by what happens to be missing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from statespan.errors import UserError
from statespan.kernels.dispatch import backend_for, kernel, use_backend
from statespan.kernels.selective_scan import selective_scan


def on_gpu(index: int = 0) -> Any:
    return SimpleNamespace(is_cuda=True, requires_grad=False, device=torch.device("cuda", index))


def test_the_device_and_the_need_of_a_gradient_choose() -> None:
    x, weight = torch.zeros(1), torch.zeros(1, requires_grad=True)
    assert backend_for("op", x, None, x) == "numba"
    assert backend_for("op", x, weight) == "reference"
    assert backend_for("op", on_gpu(), on_gpu()) == "triton"
    with torch.no_grad():
        assert backend_for("op", x, weight) == "numba"


def test_an_override_holds_within_its_block() -> None:
    x = torch.zeros(1)
    with use_backend("reference"):
        assert backend_for("op", x) == "reference"
        with use_backend("triton"):
            assert backend_for("op", x) == "triton"
        assert backend_for("op", x) == "reference"
    assert backend_for("op", x) == "numba"


def test_an_unknown_backend_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'triton'"), use_backend("tritn"):  # type: ignore[arg-type]
        pass


def test_a_missing_gpu_kernel_is_an_error_and_no_slow_path() -> None:
    with pytest.raises(RuntimeError, match="no triton kernel here"):
        kernel("no_such_operator", "no_such_operator", "triton")


def test_tensors_on_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="all tensors on one device"):
        backend_for("op", torch.zeros(1), on_gpu())
    with pytest.raises(ValueError, match="all tensors on one device"):
        backend_for("op", on_gpu(0), on_gpu(1))


def test_numba_says_that_it_has_no_gradients() -> None:
    x, A, B = torch.zeros(1, 2, 4, requires_grad=True), -torch.ones(4, 16), torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="have no gradients"), use_backend("numba"):
        selective_scan(x, x, A, B, B)
