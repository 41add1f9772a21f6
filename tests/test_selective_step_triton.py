"""Mamba-1's fused decode step in Triton against the float64 definition, several tokens in a row."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels.dispatch import use_backend
from statespan.kernels.selective_step import selective_step, selective_step_ref
from tests.close import assert_close
from tests.gpu import draw, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 1e-5  # float32 sums of at most 37 terms


@pytest.mark.parametrize(
    "batch, d_inner, d_state, rank", [(1, 70, 16, 5), (2, 33, 5, 21), (5, 20, 8, 16), (18, 33, 5, 37)]
)
def test_steps(batch, d_inner, d_state, rank):
    weight, dt_bias, A, D = draw(d_inner, rank) * 0.3, draw(d_inner), -draw(d_inner, d_state).exp(), draw(d_inner)
    state = draw(batch, d_inner, d_state)
    exact = state.double()
    for turn in range(3):
        both, row = draw(batch, 2 * d_inner), draw(batch, rank + 2 * d_state)
        x, z = both.chunk(2, dim=-1)
        with use_backend("triton"):
            got = selective_step(state, x, row, z, weight, dt_bias, A, D, at_rest=turn > 0)
        want = selective_step_ref(exact, *(v.double() for v in (x, row, z, weight, dt_bias, A, D)))
        assert_close(got, want, REL, "y")
        assert_close(state, exact, REL, "state")


def test_a_state_of_two_bytes_is_rounded_on_its_way_back():
    state = draw(2, 8, 4).bfloat16()
    exact = state.double()
    tensors = draw(2, 8), draw(2, 12), draw(2, 8), draw(8, 4), draw(8), -draw(8, 4).exp(), draw(8)
    with use_backend("triton"):
        selective_step(state, *tensors)
    selective_step_ref(exact, *(v.double() for v in tensors))
    torch.testing.assert_close(state.double(), exact, rtol=2**-7, atol=0)  # the interpreter cuts off, a GPU rounds


def test_a_state_that_is_not_contiguous_is_refused():
    rows = draw(2, 8), draw(2, 12), draw(2, 8), draw(8, 4), draw(8), -draw(8, 4).exp(), draw(8)
    with pytest.raises(ValueError, match="contiguous"):
        selective_step(draw(2, 4, 8).mT, *rows)
