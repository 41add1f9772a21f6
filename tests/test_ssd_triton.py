"""The Triton scan of Mamba-2 against the float64 reference, whole and in segments."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels.ssd import ssd_ref
from statespan.kernels.ssd_states_triton import Sweeps, fits
from statespan.kernels.ssd_triton import Chunking, _form, ssd
from tests.close import assert_close
from tests.gpu import DEVICE, draw, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 2e-5  # float32 products and sums over a few hundred terms
SMALL = Chunking(chunk=16, columns=16, segment=16)


def inputs(batch, length, heads, head_dim, d_state, groups=1, wide_D=False, extras=True):
    tensors = {"x": draw(batch, length, heads, head_dim), "dt": draw(batch, length, heads)}
    tensors |= {name: draw(batch, length, groups, d_state) for name in ("B", "C")}
    tensors["A"] = -draw(heads).exp()
    if extras:
        tensors |= {"z": draw(batch, length, heads, head_dim), "dt_bias": draw(heads)}
        tensors["D"] = draw(heads, head_dim) if wide_D else draw(heads)
        tensors |= {"state": draw(batch, heads, head_dim, d_state), "keep_above": torch.rand(batch, heads).to(DEVICE)}
        tensors["dt_scale"] = torch.rand(batch, heads).to(DEVICE) + 0.5
    return tensors


def assert_same(tensors, chunking=SMALL, **constants):
    y, final = ssd(**tensors, **constants, form=chunking)
    want, want_final = ssd_ref(**{name: v.double() for name, v in tensors.items()}, **constants)
    assert_close(y, want, REL, "y")
    assert_close(final, want_final, REL, "state")


@pytest.mark.parametrize(
    "case, constants",
    [
        pytest.param(
            dict(batch=2, length=50, heads=4, head_dim=6, d_state=5, groups=2, wide_D=True),
            dict(pads=(0, 19), dt_limit=(0.01, 2.0)),
            id="several_segments_groups_pads_limits",
        ),
        pytest.param(dict(batch=1, length=1, heads=3, head_dim=20, d_state=4), {}, id="one_token_two_blocks"),
        pytest.param(dict(batch=1, length=32, heads=2, head_dim=16, d_state=16), {}, id="exactly_two_chunks"),
        pytest.param(dict(batch=1, length=21, heads=2, head_dim=3, d_state=3, extras=False), {}, id="bare"),
        pytest.param(dict(batch=1, length=17, heads=1, head_dim=2, d_state=2), dict(pads=(17,)), id="nothing_but_pads"),
    ],
)
def test_matches_the_float64_reference(case, constants):
    assert_same(inputs(**case), **constants)


def test_segments_change_nothing_but_rounding():
    tensors = inputs(1, 90, 2, 5, 6)
    assert_same(tensors, Chunking(chunk=16, columns=16, segment=16))
    assert_same(tensors, Chunking(chunk=16, columns=16, segment=1024))


def test_what_stands_on_pads_is_never_read():
    tensors = inputs(1, 40, 2, 5, 6)
    for name in ("x", "dt", "z", "B", "C"):
        tensors[name][:, :20] = float("nan")
    y, final = ssd(**tensors, pads=(20,), form=SMALL)
    assert y[:, :20].abs().max() == 0 and torch.isfinite(y).all() and torch.isfinite(final).all()


def test_long_decays_neither_overflow_nor_make_nan():
    tensors = inputs(1, 40, 2, 5, 6, extras=False)
    tensors["dt"] = tensors["dt"] + 60
    assert_same(tensors)


def test_slices_of_one_projection_are_read_in_place():
    wide = draw(2, 20, 2 * 6 + 2 * 4 + 2)
    x, B, C, dt = wide.split((12, 4, 4, 2), dim=-1)
    tensors = {"x": x.unflatten(-1, (2, 6)), "B": B[:, :, None], "C": C[:, :, None], "dt": dt, "A": -draw(2).exp()}
    assert_same(tensors)


def test_gradients_come_from_the_chunked_form():
    tensors = {name: v.requires_grad_() for name, v in inputs(1, 9, 2, 3, 4).items() if name != "keep_above"}
    y, final = ssd(**tensors)
    (y.sum() + final.sum()).backward()
    assert all(torch.isfinite(v.grad).all() for v in tensors.values())


TWO_SWEEPS = Sweeps(interval=32, rows=16, segment=32, resident=1)


@pytest.mark.parametrize(
    "case, constants",
    [
        pytest.param(dict(batch=1, length=107, heads=4, head_dim=16, d_state=16, groups=2), {}, id="part_of_a_block"),
        pytest.param(
            dict(batch=2, length=64, heads=2, head_dim=16, d_state=32, wide_D=True),
            dict(dt_limit=(0.01, 2.0)),
            id="batch_of_whole_intervals",
        ),
        pytest.param(dict(batch=1, length=1, heads=1, head_dim=32, d_state=16, extras=False), {}, id="one_token_bare"),
    ],
)
def test_two_sweeps_match_the_float64_reference(case, constants):
    tensors = inputs(**case)
    assert fits(TWO_SWEEPS, *(tensors.get(name) for name in ("x", "B", "C", "z")))
    assert_same(tensors, TWO_SWEEPS, **constants)


def test_two_sweeps_of_bfloat16_keep_states_in_bfloat16():
    tensors = inputs(1, 70, 2, 16, 16)
    tensors |= {name: tensors[name].bfloat16() for name in ("x", "dt", "B", "C", "z")}
    y, final = ssd(**tensors, form=TWO_SWEEPS)
    want, want_final = ssd_ref(**{name: v.double() for name, v in tensors.items()})
    assert_close(y, want, 8e-3, "y")  # roundings of 2**-9: of S, E, and y, which the interpreter cuts off
    assert_close(final, want_final, REL, "state")


def test_long_decays_in_two_sweeps_neither_overflow_nor_make_nan():
    tensors = inputs(1, 70, 2, 16, 16, extras=False)
    tensors["dt"] = tensors["dt"] + 60
    assert_same(tensors, TWO_SWEEPS)


def test_what_blocks_cannot_move_is_walked():
    def form(length, head_dim=16, d_state=16, pads=None, batch=1, dtype=torch.bfloat16):
        x, B = draw(batch, length, 2, head_dim).to(dtype), draw(batch, length, 1, d_state).to(dtype)
        return type(_form(x, B, B, None, x, pads))

    assert form(200) is Sweeps
    assert form(200, pads=(0,)) is Sweeps
    assert {form(200, 24), form(200, d_state=5), form(200, pads=(3,)), form(200, batch=2), form(0)} == {Chunking}
    assert {form(200, 128, 128), form(200, dtype=torch.float32)} == {Chunking}  # more than shared memory holds
    x, B = draw(1, 20, 2 * 16 + 1).bfloat16()[..., 1:].unflatten(-1, (2, 16)), draw(1, 20, 1, 16).bfloat16()
    assert isinstance(_form(x, B, B, None, x, None), Chunking)  # no row begins at a multiple of 16 bytes
