"""The causal convolution: the definition against published numbers, the CPU kernels against the definition."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan.errors import UserError
from statespan.kernels.causal_conv import causal_conv, causal_conv_ref, causal_conv_update, causal_conv_update_ref
from statespan.kernels.dispatch import use_backend
from tests.close import assert_close, parity_case, parity_names
from tests.gpu import poisoned_buffers

__all__ = ["poisoned_buffers"]
CASES = [pytest.param(name, id=name) for name in parity_names("scan", "conv_")]
REL = 1e-6  # float32 sums of a handful of terms, and an exponential


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
            for t, x in enumerate(v["step_x"].unbind(1) if "step_x" in v else ()):
                out = causal_conv_update(state, x, weight, bias, activation=activation)
                assert_close(out, v["step_out"][:, t], rel, f"step {t} after {length}")


@pytest.mark.parametrize(
    "batch, length, width, taps, continued, pads",
    [
        pytest.param(1, 1, 1, 1, False, None, id="one_of_each"),
        pytest.param(2, 65, 70, 4, True, None, id="several_blocks"),
        pytest.param(2, 2, 5, 4, True, None, id="shorter_than_the_kernel"),
        pytest.param(3, 9, 66, 3, True, (0, 9, 8), id="pads"),
        pytest.param(2, 0, 5, 4, True, None, id="no_token"),
        pytest.param(1, 257, 64, 2, False, (3,), id="no_bias_before_pads"),
    ],
)
def test_shapes(batch: int, length: int, width: int, taps: int, continued: bool, pads: tuple[int, ...] | None) -> None:
    x, weight = torch.randn(batch, length, width), torch.randn(width, taps)
    bias = torch.randn(width) if continued else None
    state = torch.randn(batch, taps - 1, width) if continued else None
    wide = [None if v is None else v.double() for v in (bias, state)]
    want, want_state = causal_conv_ref(x.double(), weight.double(), wide[0], pads=pads, state=wide[1])
    y, after = causal_conv(x, weight, bias, pads=pads, state=state)
    assert_close(y, want, REL, "y")
    assert torch.equal(after.double(), want_state)
    exact, _ = causal_conv(x.double(), weight.double(), wide[0], pads=pads, state=wide[1])
    assert_close(exact, want, 1e-12, "y in float64")


def test_a_slice_of_a_wider_tensor_is_read_in_place_and_pads_are_not_read() -> None:
    joined, weight = torch.randn(2, 9, 20), torch.randn(6, 4)
    joined[0, :3] = float("nan")
    for x in (joined[..., 7:13], joined[..., 7:13].mT.contiguous().mT):
        y, state = causal_conv(x, weight, pads=(3, 0))
        want, want_state = causal_conv_ref(x, weight, pads=(3, 0))
        assert_close(y, want, REL)
        assert torch.equal(state, want_state)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(0, 40), cut=st.floats(0, 1), seed=st.integers(0, 99))
def test_chunks_are_the_whole_bit_for_bit(length: int, cut: float, seed: int) -> None:
    random, at = torch.Generator().manual_seed(seed), round(cut * length)
    x, weight = torch.randn(2, length, 9, generator=random), torch.randn(9, 4, generator=random)
    y, final = causal_conv(x, weight)
    first, state = causal_conv(x[:, :at], weight)
    second, last = causal_conv(x[:, at:], weight, state=state)
    assert torch.equal(torch.cat([first, second], 1), y)
    assert torch.equal(last, final)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_steps_continue_a_sequence(taps: int) -> None:
    x, weight, bias, state = torch.randn(3, 5, 70), torch.randn(70, taps), torch.randn(70), torch.randn(3, taps - 1, 70)
    wide_state = state.double()
    for t in range(5):
        want = causal_conv_update_ref(wide_state, x[:, t].double(), weight.double(), bias.double())
        assert_close(causal_conv_update(state, x[:, t], weight, bias), want, REL, f"y of step {t}")
        assert torch.equal(state.double(), wide_state)


def test_a_state_in_lower_precision_is_updated_too() -> None:
    state, x, weight = torch.randn(1, 3, 8).bfloat16(), torch.randn(1, 8).bfloat16(), torch.randn(8, 4)
    want = torch.cat([state[:, 1:], x[:, None]], dim=1)
    assert causal_conv_update(state, x, weight).dtype == torch.bfloat16
    assert torch.equal(state, want)


def test_a_wrong_argument_is_named() -> None:
    x, weight = torch.zeros(2, 8, 6), torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"weight \(width, kernel\); got \[2, 8, 6\] and \[5, 4\]"):
        causal_conv(x, weight[:5])
    with pytest.raises(ValueError, match="needs state"):
        causal_conv(x, weight, state=torch.zeros(2, 4, 6))
    with pytest.raises(UserError, match="did you mean 'silu'"):
        causal_conv(x, weight, activation="siluu")
