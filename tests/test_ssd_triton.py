"""The Triton scan of Mamba-2 against the float64 reference, whole and in segments."""

import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels.ssd import ssd_ref
from statespan.kernels.ssd_triton import Chunking, moves_blocks, ssd
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


def assert_same(tensors, chunking=SMALL, rel=REL, **constants):
    y, final = ssd(**tensors, **constants, chunking=chunking)
    want, want_final = ssd_ref(**{name: v.double() for name, v in tensors.items()}, **constants)
    assert_close(y, want, rel, "y")
    assert_close(final, want_final, rel, "state")


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
    y, final = ssd(**tensors, pads=(20,), chunking=SMALL)
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


MOVED_REL = REL if DEVICE == "cpu" else 1e-2  # on a GPU operands of products have 8 bits

BY_BLOCKS = [
    pytest.param(
        dict(batch=1, length=107, heads=4, head_dim=32, d_state=16, groups=2),
        {},
        id="part_of_a_chunk_and_two_blocks",
    ),
    pytest.param(
        dict(batch=2, length=64, heads=2, head_dim=16, d_state=32, wide_D=True),
        dict(dt_limit=(0.01, 2.0)),
        id="batch_of_whole_chunks",
    ),
    pytest.param(dict(batch=1, length=1, heads=1, head_dim=16, d_state=16, extras=False), {}, id="one_token_bare"),
]


def movable(tensors):
    """What a GPU moves in blocks has 16 bits; the interpreter's products want float32."""
    narrow = () if DEVICE == "cpu" else ("x", "B", "C", "z")
    return {name: v.to(torch.bfloat16) if name in narrow else v for name, v in tensors.items()}


@pytest.mark.parametrize("case, constants", BY_BLOCKS)
def test_whole_blocks_match_the_float64_reference(case, constants):
    tensors = movable(inputs(**case))
    assert moves_blocks(SMALL, 16, *(tensors[name] for name in ("x", "B", "C", "z") if name in tensors))
    assert_same(tensors, rel=MOVED_REL, **constants)


def test_blocks_and_single_rows_are_the_same_to_the_bit():
    tensors = movable(inputs(1, 90, 2, 16, 16))
    moved, walked = (ssd(**tensors, chunking=replace(SMALL, blocks=blocks)) for blocks in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(moved, walked, strict=True))


def test_what_blocks_cannot_move_is_read_row_by_row():
    def moves(length, head_dim=16, d_state=16, batch=1, chunking=SMALL):
        x, B = draw(batch, length, 2, head_dim), draw(batch, length, 1, d_state)
        return moves_blocks(chunking, 16, *movable({"x": x, "B": B}).values())

    assert moves(200) and moves(64, batch=2)
    assert not any((moves(200, 24), moves(200, d_state=24), moves(200, batch=2), moves(0)))
    assert not moves(200, chunking=replace(SMALL, blocks=False))
    wide = movable({"x": draw(1, 20, 2 * 16 + 1), "B": draw(1, 20, 1, 16)})
    assert not moves_blocks(
        SMALL, 16, wide["x"][..., 1:].unflatten(-1, (2, 16)), wide["B"]
    )  # no row begins at a multiple of 16 bytes
