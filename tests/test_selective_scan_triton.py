"""The Triton selective scan against the float64 reference: the ring of inference, the tiles that training runs on."""

import os
import re
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import selective_scan_triton
from statespan.kernels.selective_scan import selective_scan_ref
from statespan.kernels.selective_scan_ring_layout import Ring
from statespan.kernels.selective_scan_ring_triton import scan_in_ring
from statespan.kernels.selective_scan_tiles_triton import Tiling, scan_in_tiles
from statespan.kernels.warp_ring import hand_on_code, hand_on_operands, row_code
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


@pytest.mark.parametrize("programs, last", [(1, False), (1, True), (4, False)])
def test_the_handing_on_is_the_recurrence(programs, last):
    """Its PTX, run here: the numbers of its operands are what can be wrong, and no interpreter sees them."""
    tokens = 4
    code = hand_on_code(tokens, programs, 64, 96, last)
    h, early, decay, drive, slot = ([f"${first * tokens + t}" for t in range(tokens)] for first in range(5))
    source, target, awaited, sent, elsewhere, far = (f"${(5 + i) * tokens}" for i in range(6))
    a, b, carry = torch.rand(tokens).tolist(), torch.rand(tokens).tolist(), torch.rand(1).item()
    words = {"carry": carry} | dict(zip(decay + drive, a + b, strict=True))
    for out, *factors in re.findall(r"fma\.rn\.f32 (\S+), (\S+), (\S+), (\S+);", code):
        words[out] = words[factors[0]] * words[factors[1]] + words[factors[2]]
    for t in range(tokens):
        carry = a[t] * carry + b[t]
        assert words[h[t]] == pytest.approx(carry)
    # the slot read early is looked at first; it is read again, and the next state's early, at their places
    following = [] if last else [(early[0], f"{source} + 96")]
    assert re.findall(r"ld\.\S+ (\S+), \[(.*?)\];", code) == [("slot", f"{source} + 64"), *following]
    assert code.index(f"mov.b64 slot, {slot[0]};") < code.index("mov.b64 {carry, seen}, slot;")
    assert code.count("mov.b64 {carry, seen}, slot;") == code.count(f"setp.ne.b32 late, seen, {awaited};") == 2
    assert f"mov.b64 slot, {{{h[-1]}, {sent}}};" in code
    stores = re.findall(r"(@!?near )?st\.\S+ \[(.*?)\], slot;", code)
    ways = [("", target)] if programs == 1 else [("@near ", target), ("@!near ", far)]
    assert stores == [(way, f"{place} + 64") for way, place in ways]
    assert (f"setp.eq.b32 near, {elsewhere}, 0;" in code) == (programs > 1)
    assert code.index("@!late bra.uni there;") < code.index("again:") < code.index("there:") < code.index("fma")
    assert code.count("@late bra.uni again;") == 1 + last
    assert len(hand_on_operands(tokens, programs).split(",")) == (9 + 2 * (programs > 1)) * tokens


@pytest.mark.skipif(not ON_GPU, reason="a cluster is several programs at once")
@pytest.mark.parametrize("length", [1, 63, 64, 65, 700])
def test_the_programs_of_a_cluster_share_a_ring(length):
    ring = Ring(lanes=4, warps=2, programs=4)
    tensors = inputs(2, length, 19, 4)
    y, final = scan_in_ring(**tensors, pads=(0, length // 3), ring=ring)
    want, want_final = selective_scan_ref(**{n: v.double() for n, v in tensors.items()}, pads=(0, length // 3))
    assert_close(y, want, REL, "y")
    assert_close(final, want_final, REL, "state")


@pytest.mark.parametrize("tokens, lanes", [(8, 4), (8, 2), (8, 1), (4, 2), (16, 2)])
def test_a_lane_finds_its_tokens_of_copied_rows(tokens, lanes):
    """Where a row's 16 bytes are copied to, and where a lane looks for a token of its channel: the same."""
    channels = 32 // lanes
    row, own = 2 * channels, tokens // lanes
    places = {}
    for piece in range(tokens * row // 16):
        t, part = divmod(piece, row // 16)
        places |= {(t + t // own) * row + 16 * part + 2 * i: (t, 8 * part + i) for i in range(8)}
    offsets = [int(offset) - 96 for offset in re.findall(r"\+ (\d+)\];", row_code(False, own, 96, row))]
    for lane in range(lanes):
        for c in range(channels):
            found = [places[lane * (own + 1) * row + 2 * c + offset] for offset in offsets]
            assert found == [(lane * own + i, c) for i in range(own)]


COPIED = [
    *selective_scan_triton.FORMS,
    Ring(lanes=4, registers=80),
    Ring(lanes=2, registers=96),
    Ring(lanes=1, warps=2, registers=None),
    Ring(lanes=4, programs=4, warps=2, registers=96),
    Ring(tokens=4, lanes=2, registers=128),
]


@pytest.mark.skipif(not ON_GPU, reason="needs asynchronous copies")
@pytest.mark.parametrize("ring", COPIED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 8, 31, 65, 700])
def test_copied_rows_end_where_length_and_channels_do(ring, dtype, length):
    """40 channels a group: not all pieces of a ring's 16 bytes exist. Rows are slices of wider ones, NaN on pads."""
    tensors = inputs(2, length, 80, 16, groups=2)
    pads = (length // 3, 0)
    for name in ("x", "dt", "z"):
        wider = torch.full((2, length, 160), float("nan"), dtype=dtype, device=DEVICE)
        wider[..., 80:] = tensors[name].to(dtype)
        wider[0, : pads[0]] = float("nan")
        tensors[name] = wider[..., 80:]
    assert ring.copies(2, tensors["x"], tensors["dt"], tensors["z"])
    y, final = scan_in_ring(**tensors, pads=pads, ring=ring)
    plain = {name: v.double().nan_to_num(0.0) for name, v in tensors.items()}
    want, want_final = selective_scan_ref(**plain, pads=pads)
    assert_close(y, want, 4e-3 if dtype == torch.bfloat16 else 6e-4, "y")  # y is rounded to 16 bits once
    assert_close(final, want_final, REL, "state")


@pytest.mark.skipif(not ON_GPU, reason="needs asynchronous copies")
def test_rows_that_are_not_whole_pieces_are_loaded():
    rows = torch.zeros(1, 9, 48, dtype=torch.bfloat16, device=DEVICE)
    assert Ring(lanes=2).copies(1, rows) and not Ring(lanes=2).copies(1, rows.float())
    assert not Ring(lanes=2).copies(4, rows) and not Ring(lanes=2).copies(1, rows[..., 4:44])
