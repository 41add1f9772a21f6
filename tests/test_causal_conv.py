"""The causal convolution: the definition against published numbers, the kernels against the definition."""

from typing import Any

import pytest
import torch

from statespan.kernels.causal_conv import causal_conv, causal_conv_update
from statespan.kernels.dispatch import use_backend
from tests.close import assert_close, parity_case, parity_names

CASES = [pytest.param(name, id=name) for name in parity_names("scan", "conv_")]


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_published_numbers(name: str, dtype: torch.dtype, rel: float, backend: Any) -> None:
    case, tensors = parity_case("scan", name)
    weight, bias = tensors["weight"].to(dtype), tensors["bias"].to(dtype) if "bias" in tensors else None
    activation = "silu" if case["has"]["silu"] else None
    for length in case["lengths"]:
        v = {k.removeprefix(f"L{length}."): t.to(dtype).mT for k, t in tensors.items() if k.startswith(f"L{length}.")}
        with use_backend(backend):
            y, state = causal_conv(v["x"], weight, bias, activation=activation, state=v.get("initial_state"))
            assert_close(y, v["out"], rel, f"y at {length}")
            assert_close(state, v["final_state"], rel, f"state at {length}")
            if "step_x" in v:
                steps = [
                    causal_conv_update(state, x, weight, bias, activation=activation) for x in v["step_x"].unbind(1)
                ]
                assert_close(torch.stack(steps, 1), v["step_out"], rel, f"steps after {length}")
                assert_close(state, v["step_state_after"][:, 1:], rel, f"state of the steps after {length}")
