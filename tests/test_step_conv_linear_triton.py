"""The decode step's conv and x_proj in one, in Triton against the float64 definition, several tokens in a row."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import step_conv_linear_triton
from statespan.kernels.dispatch import use_backend
from statespan.kernels.step_conv_linear import step_conv_linear, step_conv_linear_ref
from tests.close import assert_close
from tests.gpu import draw, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 2e-6  # float32 sums of a few dozen products


@pytest.mark.parametrize("rows, width, outs, taps, biased", [(3, 37, 21, 4, True), (18, 48, 5, 2, False)])
def test_steps(rows, width, outs, taps, biased, monkeypatch):
    monkeypatch.setattr(step_conv_linear_triton, "DEPTH", 16)  # several parts to add
    conv, weight, bias = draw(width, taps), draw(outs, width), draw(width) if biased else None
    state = draw(rows, taps - 1, width)
    exact = state.double()
    for _ in range(3):
        both = draw(rows, 2 * width)
        x = both[:, width:]
        with use_backend("triton"):
            u, y = step_conv_linear(state, x, conv, bias, weight)
        wide = (v if v is None else v.double() for v in (x, conv, bias, weight))
        want_u, want_y = step_conv_linear_ref(exact, *wide)
        assert_close(u, want_u, REL, "u")
        assert_close(y, want_y, REL, "y")
        assert_close(state, exact, 0.0, "state")


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"weight \(out, width\) = \(5, 8\); got \(5, 7\)"):
        step_conv_linear(draw(2, 3, 8), draw(2, 8), draw(8, 4), None, draw(5, 7))
    with pytest.raises(ValueError, match="contiguous"):
        step_conv_linear(draw(2, 8, 3).mT, draw(2, 8), draw(8, 4), None, draw(5, 8))
