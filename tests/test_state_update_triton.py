"""The Triton decode steps against the float64 reference, several tokens in a row."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import ssd
from statespan.kernels.dispatch import use_backend
from statespan.kernels.selective_scan import selective_state_update_ref
from statespan.kernels.ssd import ssd_state_update_ref
from statespan.kernels.state_update_triton import selective_state_update, ssd_state_update
from tests.close import assert_close
from tests.gpu import draw, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 1e-5  # float32 sums of at most 16 terms


def assert_steps_agree(update, reference, state, steps, constants):
    wide = state.double()
    for step in steps:
        got = update(state, **step, **constants)
        exact = {name: v.double() for name, v in (step | constants).items() if isinstance(v, torch.Tensor)}
        plain = {name: v for name, v in constants.items() if not isinstance(v, torch.Tensor)}
        assert_close(got, reference(wide, **exact, **plain), REL, "y")
        assert_close(state, wide, REL, "state")


@pytest.mark.parametrize("batch, d_inner, d_state, groups", [(1, 19, 16, None), (5, 70, 5, None), (2, 12, 4, 3)])
def test_selective_steps(batch, d_inner, d_state, groups):
    heads = () if groups is None else (groups,)
    steps = [
        {name: draw(batch, d_inner) for name in ("x", "dt", "z")}
        | {name: draw(batch, *heads, d_state) for name in ("B", "C")}
        for _ in range(3)
    ]
    constants = {"A": -draw(d_inner, d_state).exp(), "D": draw(d_inner), "dt_bias": draw(d_inner)}
    state = draw(batch, d_inner, d_state)
    assert_steps_agree(selective_state_update, selective_state_update_ref, state, steps, constants)


def test_a_bare_selective_step():
    steps = [{"x": draw(2, 9), "dt": draw(2, 9).abs(), "B": draw(2, 3), "C": draw(2, 3)}]
    constants = {"A": -draw(9, 3).exp(), "softplus": False}
    assert_steps_agree(selective_state_update, selective_state_update_ref, draw(2, 9, 3), steps, constants)


@pytest.mark.parametrize(
    "batch, heads, head_dim, d_state, groups, wide_D", [(1, 4, 6, 5, 2, True), (5, 3, 40, 8, 1, False)]
)
def test_ssd_steps(batch, heads, head_dim, d_state, groups, wide_D):
    steps = [
        {name: draw(batch, heads, head_dim) for name in ("x", "z")}
        | {"dt": draw(batch, heads)}
        | {name: draw(batch, groups, d_state) for name in ("B", "C")}
        for _ in range(3)
    ]
    constants = {"A": -draw(heads).exp(), "D": draw(heads, head_dim) if wide_D else draw(heads), "dt_bias": draw(heads)}
    state = draw(batch, heads, head_dim, d_state)
    assert_steps_agree(ssd_state_update, ssd_state_update_ref, state, steps, constants | {"dt_limit": (0.1, 1.5)})


def test_y_may_leave_unrounded():
    half = {name: draw(*shape).bfloat16() for name, shape in (("x", (2, 3, 4)), ("z", (2, 3, 4)), ("dt", (2, 3)))}
    half |= {"B": draw(2, 1, 8).bfloat16(), "C": draw(2, 1, 8).bfloat16()}
    A, state = -draw(3).exp(), draw(2, 3, 4, 8)
    exact = {name: v.double() for name, v in half.items()}
    want = ssd_state_update_ref(state.double(), **exact, A=A.double())
    for out_dtype, dtype, off in ((torch.float32, torch.float32, REL), (None, torch.bfloat16, 2**-8)):
        y = ssd_state_update(state.clone(), **half, A=A, out_dtype=out_dtype)
        assert y.dtype == dtype
        assert_close(y, want, off, "y")
        with use_backend("reference"):
            y = ssd.ssd_state_update(state.clone(), **half, A=A, out_dtype=out_dtype)
        assert y.dtype == dtype
        assert_close(y, want, off, "y of the definition")


def test_a_state_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        selective_state_update(draw(2, 3, 9).mT, draw(2, 9), draw(2, 9), draw(9, 3), draw(2, 3), draw(2, 3))
