"""Decoding through a window of tokens: the reference against the plain step in float64, the kernel against both."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported

from statespan.kernels.dispatch import use_backend
from statespan.kernels.ssd import ssd_state_update_ref
from statespan.kernels.ssd_window import Window, laid_out, ssd_window_step
from tests.close import assert_close
from tests.gpu import DEVICE, draw, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = {torch.float64: 1e-12, torch.float32: 1e-5}  # sums of a few dozen terms


def token(batch, heads, head_dim, groups, d_state):
    return {
        "x": draw(batch, heads, head_dim), "z": draw(batch, heads, head_dim), "dt": draw(batch, heads),
        "B": draw(batch, groups, d_state), "C": draw(batch, groups, d_state),
    }  # fmt: skip


def cast(parts, dtype):
    return {name: v.to(dtype) if isinstance(v, torch.Tensor) else v for name, v in parts.items()}


def empty(state, length, groups, dtype=None):
    count = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    return Window.beside(state, length, groups, dtype or state.dtype, count)


@pytest.mark.parametrize("backend, dtype", [("reference", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize(
    "length, batch, heads, head_dim, groups, d_state, wide_D, limited, programs, walked",
    [
        pytest.param(3, 2, 4, 6, 2, 5, True, True, 1, 4, id="no_power_of_two"),
        pytest.param(4, 5, 3, 12, 1, 8, False, False, 1, 2, id="a_program_a_head"),
        pytest.param(3, 1, 6, 8, 1, 8, True, False, 3, 4, id="two_heads_a_program"),
        pytest.param(1, 1, 1, 9, 1, 3, False, True, 1, 4, id="one_of_each"),
    ],
)
def test_steps_through_windows_are_the_plain_steps(
    backend, dtype, length, batch, heads, head_dim, groups, d_state, wide_D, limited, programs, walked, monkeypatch
):
    if backend == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr("statespan.kernels.ssd_window_triton.TILE", 64)  # some heads take two programs
        monkeypatch.setattr("statespan.kernels.ssd_window_triton.PROGRAMS", programs)
        monkeypatch.setattr("statespan.kernels.ssd_window_triton.WALKED", walked)
    constants = {
        "A": -draw(heads).exp(), "D": draw(heads, head_dim) if wide_D else draw(heads), "dt_bias": draw(heads),
        "dt_limit": (0.1, 1.5) if limited else None,
    }  # fmt: skip
    exact = draw(batch, heads, head_dim, d_state).double()
    state, written = laid_out(exact.to(dtype)), 0
    window = empty(state, length, groups)
    for part in (window.x, window.B, window.steps, window.logs):
        part.fill_(float("nan"))  # what no token has written is not read
    for _ in range(2 * length + 1):
        given, before = token(batch, heads, head_dim, groups, d_state), state.clone()
        with use_backend(backend):
            got = ssd_window_step(state, window, **cast(given | constants, dtype))
        assert_close(got, ssd_state_update_ref(exact, **cast(given | constants, torch.float64)), REL[dtype], "y")
        written += not torch.equal(state, before)
        window.count.add_(1)
        assert_close(window.settled(state), exact, REL[dtype], "state")
    assert written == (2 * length + 1) // length  # and no more often


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_y_may_leave_unrounded(backend):
    state, A = laid_out(draw(2, 3, 4, 8)), -draw(3).exp()
    half = cast(token(2, 3, 4, 1, 8), torch.bfloat16)
    want = ssd_state_update_ref(state.double(), A=A.double(), **cast(half, torch.float64))
    for out_dtype, dtype, off in ((torch.float32, torch.float32, 1e-5), (None, torch.bfloat16, 2**-8)):
        with use_backend(backend):
            window = empty(state, 4, 1, torch.bfloat16)
            y = ssd_window_step(state, window, A=A, **half, out_dtype=out_dtype)
        assert y.dtype == dtype
        assert_close(y, want, off, "y")


def test_a_narrow_state_is_rounded_once_a_window():
    """float32 sums between; the state itself keeps 8 bits, and so does each y of it at most."""
    heads, head_dim, d_state, length = 2, 4, 4, 4
    A = -draw(heads).exp()
    exact = draw(3, heads, head_dim, d_state).bfloat16().double()
    state = laid_out(exact.bfloat16())
    window = empty(state, length, 1, torch.float32)
    for turn in range(length):
        given = {name: v for name, v in token(3, heads, head_dim, 1, d_state).items() if name != "z"}
        with use_backend("triton"):
            got = ssd_window_step(state, window, A=A, **given)
        want = ssd_state_update_ref(exact, A=A.double(), **cast(given, torch.float64))
        assert_close(got, want, REL[torch.float32], f"y {turn}")
        window.count.add_(1)
    assert state.dtype == torch.bfloat16
    assert_close(state, exact, 2**-8, "state")


@pytest.mark.skipif(DEVICE == "cpu", reason="large")
@pytest.mark.parametrize("batch", [4, 17, 64])
@pytest.mark.parametrize("kind, y_off, state_off", [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2**-8, 2**-7)])
def test_at_a_models_sizes_at_every_place_of_two_windows(batch, kind, y_off, state_off):
    """bfloat16 keeps 8 bits of each y, and of a state each time it is written."""
    heads, head_dim, d_state, length = 80, 64, 128, 8
    constants = {"A": -draw(heads).exp(), "D": draw(heads), "dt_bias": draw(heads)}
    state = laid_out(draw(batch, heads, head_dim, d_state).to(kind))
    exact, window = state.double(), empty(state, length, 1, kind)
    for _ in range(2 * length + 3):
        given = {name: v for name, v in cast(token(batch, heads, head_dim, 1, d_state), kind).items() if name != "z"}
        got = ssd_window_step(state, window, **given, **constants)
        assert_close(got, ssd_state_update_ref(exact, **cast(given | constants, torch.float64)), y_off, "y")
        window.count.add_(1)
        assert_close(window.settled(state), exact, state_off, "state")


@pytest.mark.parametrize(
    "programs, per_group, heads", [(64 * 80, 80, 20), (264, 80, 1), (320, 80, 2), (10**6, 6, 6), (1000, 7, 7)]
)
def test_a_program_has_the_fewest_heads_of_one_group_that_fit_the_chip(programs, per_group, heads):
    pytest.importorskip("triton")
    from statespan.kernels.ssd_window_triton import heads_each

    assert heads_each(programs, per_group) == heads


def test_rows_of_a_window_are_copies():
    state = laid_out(draw(3, 2, 4, 4))
    window = empty(state, 4, 1)
    for _ in range(2):
        with use_backend("reference"):
            ssd_window_step(state, window, A=-draw(2).exp(), **token(3, 2, 4, 1, 4))
        window.count.add_(1)
    index = torch.tensor([2, 0], device=DEVICE)
    some, whole = window.rows(index).settled(state[index]), window.settled(state)
    assert torch.equal(some, whole[index]) and some.is_contiguous() and whole.is_contiguous()
    window.count.add_(1)
    assert int(window.rows(index).count) == 3 and torch.equal(some, whole[index])


def test_shapes_that_do_not_fit_are_refused():
    state = laid_out(draw(2, 3, 4, 5))
    given = token(2, 3, 4, 1, 5)
    with pytest.raises(ValueError, match=r"window\.x .* = \(2, 4, 3, 4\); got \(1, 4, 3, 4\)"):
        ssd_window_step(state, empty(state[:1], 4, 1), A=-draw(3).exp(), **given)
    with pytest.raises(ValueError, match="laid_out"):
        ssd_window_step(draw(2, 3, 4, 5), empty(state, 4, 1), A=-draw(3).exp(), **given)
