"""The Triton causal convolution, its gradients and its decode step against the float64 reference."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import causal_conv_triton
from statespan.kernels.causal_conv import causal_conv_ref, causal_conv_update_ref
from tests.close import assert_close
from tests.gpu import draw, gradients, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 1e-5  # float32 sums of a few dozen terms


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(causal_conv_triton, "BLOCK_T", 8)
    monkeypatch.setattr(causal_conv_triton, "BLOCK_W", 4)
    monkeypatch.setattr(causal_conv_triton, "WALK_T", 8)
    monkeypatch.setattr(causal_conv_triton, "WALK_W", 4)


@pytest.mark.parametrize(
    "batch, length, width, taps, activation, continued, pads",
    [
        pytest.param(2, 19, 6, 4, "silu", True, (0, 3), id="several_blocks_and_pads"),
        pytest.param(1, 2, 5, 4, "silu", False, None, id="shorter_than_the_kernel"),
        pytest.param(2, 9, 3, 3, None, True, (9, 8), id="nothing_but_pads"),
        pytest.param(1, 1, 3, 2, "silu", True, None, id="one_token"),
        pytest.param(1, 1, 3, 4, "silu", True, None, id="one_token_of_four_taps"),
        pytest.param(3, 11, 5, 4, None, True, (0, 2, 9), id="pads_within_and_beyond_a_block"),
    ],
)
def test_outputs_and_gradients_match_float64(batch, length, width, taps, activation, continued, pads):
    tensors = {"x": draw(batch, length, width), "weight": draw(width, taps), "bias": draw(width)}
    if continued:
        tensors["state"] = draw(batch, taps - 1, width)
    constants = {"activation": activation, "pads": pads}
    want = gradients(causal_conv_ref, tensors, constants, torch.float64)
    got = gradients(causal_conv_triton.causal_conv, tensors, constants, torch.float32)
    for name, value in want.items():
        assert_close(got[name], value, REL, name)


@pytest.mark.parametrize("taps", [4, 3])
@pytest.mark.parametrize(
    "batch, length, continued, pads",
    [
        pytest.param(2, 19, True, (0, 3), id="several_blocks_and_pads"),
        pytest.param(2, 16, False, None, id="whole_blocks"),
        pytest.param(2, 17, True, (16, 17), id="pads_up_to_the_end"),
        pytest.param(1, 1, True, None, id="one_token"),
        pytest.param(2, 2, True, (0, 1), id="fewer_tokens_than_are_remembered"),
        pytest.param(1, 2, False, None, id="fewer_tokens_and_nothing_before"),
        pytest.param(1, 0, True, None, id="no_token"),
    ],
)
def test_without_gradients_outputs_and_last_inputs_match_float64(taps, batch, length, continued, pads):
    x, weight, bias = draw(batch, length, 6), draw(6, taps).bfloat16(), draw(6).bfloat16()
    state = draw(batch, taps - 1, 6) if continued else None
    if pads is not None:
        for row, pad in enumerate(pads):
            x[row, :pad] = float("nan")
    wide = None if state is None else state.double()
    want = causal_conv_ref(x.double(), weight.double(), bias.double(), pads=pads, state=wide)
    with torch.no_grad():
        y, last = causal_conv_triton.causal_conv(x, weight, bias, pads=pads, state=state)
    assert_close(y, want[0], REL, "y")
    assert torch.equal(last.double(), want[1]) and last.dtype == x.dtype and last.is_contiguous()


def test_a_slice_of_a_wider_tensor_is_read_in_place():
    wide, weight = draw(2, 7, 10), draw(5, 4)
    y, _ = causal_conv_triton.causal_conv(wide[..., 5:], weight)
    assert_close(y, causal_conv_ref(wide[..., 5:].double(), weight.double())[0], REL)


def test_a_step_continues_the_sequence():
    x, weight, bias, state = draw(3, 2, 9), draw(9, 4), draw(9), draw(3, 3, 9)
    wide = state.double()
    for row in x.unbind(1):
        want = causal_conv_update_ref(wide, row.double(), weight.double(), bias.double())
        got = causal_conv_triton.causal_conv_update(state, row, weight, bias)
        assert_close(got, want, REL, "y")
        assert_close(state, wide, REL, "state")
