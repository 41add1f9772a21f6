"""The Triton selective scan against the float64 reference: the ring of inference, the tiles that training runs on."""

import os
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels.selective_scan import selective_scan_ref
from statespan.kernels.selective_scan_ring_triton import Ring, scan_in_ring
from statespan.kernels.selective_scan_tiles_triton import Tiling, scan_in_tiles
from tests.close import assert_close
from tests.gpu import DEVICE, draw, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 2e-5  # float32 sums over a few hundred terms
ON_GPU = DEVICE == "cuda"

FORMS = {
    "tiles": partial(scan_in_tiles, tiling=Tiling() if ON_GPU else Tiling(tokens=4, segments=2, channels=4, warps=1)),
    "ring": partial(scan_in_ring, ring=Ring() if ON_GPU else Ring(tokens=4)),
}


def inputs(batch, length, d_inner, d_state, groups=None, extras=True):
    heads = () if groups is None else (groups,)
    tensors = {name: draw(batch, length, d_inner) for name in ("x", "dt")}
    tensors |= {name: draw(batch, length, *heads, d_state) for name in ("B", "C")}
    tensors["A"] = -draw(d_inner, d_state).exp()
    if extras:
        tensors |= {"z": draw(batch, length, d_inner), "D": draw(d_inner), "dt_bias": draw(d_inner)}
        tensors |= {"state": draw(batch, d_inner, d_state), "keep_above": torch.rand(batch, d_inner).to(DEVICE) * 0.5}
        tensors["dt_scale"] = torch.rand(batch, d_inner).to(DEVICE) + 0.5
    return tensors


def assert_same(form, tensors, pads=None):
    y, final, *_ = FORMS[form](**tensors, pads=pads)
    want, want_final = selective_scan_ref(**{name: v.double() for name, v in tensors.items()}, pads=pads)
    assert_close(y, want, REL, "y")
    assert_close(final, want_final, REL, "state")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case, pads",
    [
        pytest.param(dict(batch=2, length=19, d_inner=6, d_state=4), (0, 9), id="several_tiles_and_pads"),
        pytest.param(dict(batch=1, length=1, d_inner=3, d_state=4), None, id="one_token"),
        pytest.param(dict(batch=1, length=8, d_inner=4, d_state=2), None, id="exactly_one_tile"),
        pytest.param(dict(batch=1, length=9, d_inner=10, d_state=2, groups=2), (9,), id="groups_and_nothing_but_pads"),
        pytest.param(dict(batch=1, length=7, d_inner=5, d_state=4, extras=False), None, id="bare"),
    ],
)
def test_matches_the_float64_reference(form, case, pads):
    assert_same(form, inputs(**case), pads)


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_on_pads_is_never_read(form):
    tensors = inputs(1, 9, 4, 2)
    for name in ("x", "dt", "z", "B", "C"):
        tensors[name][:, :4] = float("nan")
    y, final, *_ = FORMS[form](**tensors, pads=(4,))
    assert y[:, :4].abs().max() == 0 and torch.isfinite(y).all() and torch.isfinite(final).all()


@pytest.mark.parametrize("form", FORMS)
def test_slices_of_wider_tensors_are_read_in_place(form):
    tensors = inputs(2, 9, 8, 2)
    for name in ("x", "z"):
        tensors[name] = draw(2, 9, 16)[..., 8:]
    both = draw(2, 9, 5)
    tensors |= {"B": both[..., 1:3], "C": both[..., 3:]}
    assert_same(form, tensors)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_at_its_threshold_leaves_the_state_as_it_is(form):
    tensors = inputs(1, 5, 4, 2, extras=False) | {"state": draw(1, 4, 2), "keep_above": torch.full((1, 4), 99.0)}
    tensors["keep_above"] = tensors["keep_above"].to(DEVICE)
    _, final, *_ = FORMS[form](**tensors)
    assert torch.equal(final, tensors["state"])


def test_tiles_leave_the_state_before_each_of_them():
    tensors = inputs(1, 19, 4, 2)
    tile = FORMS["tiles"].keywords["tiling"].tile
    _, _, starts = FORMS["tiles"](**tensors, save=True)
    for number in range(starts.shape[1]):
        upto = {n: v[:, : number * tile] if n in ("x", "dt", "z", "B", "C") else v for n, v in tensors.items()}
        _, want = selective_scan_ref(**{n: v.double() for n, v in upto.items()})
        assert_close(starts[:, number].mT, want, REL, f"before tile {number}")
