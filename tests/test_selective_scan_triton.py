"""The Triton selective scan against the float64 reference: the ring of inference, the tiles that training runs on."""

import os
import re
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

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


def test_two_channels_of_16_bits_share_a_word():
    tensors = {n: v.bfloat16() if n in ("x", "dt", "z") else v for n, v in inputs(1, 9, 6, 2).items()}
    pairs = Ring(each=2, registers=None) if ON_GPU else Ring(tokens=4, each=2)
    y, final = scan_in_ring(**tensors, ring=pairs)
    want, want_final = selective_scan_ref(**{name: v.double() for name, v in tensors.items()})
    assert_close(y, want, 4e-3, "y")  # y is rounded to bfloat16 once
    assert_close(final, want_final, REL, "state")


@pytest.mark.parametrize("width, groups", [(5, 1), (6, 2)])
def test_pairs_of_channels_need_an_even_number_of_them_in_a_group(width, groups):
    rows, even = torch.zeros(1, 9, width, dtype=torch.bfloat16), torch.zeros(1, 9, 4, dtype=torch.bfloat16)
    assert Ring(each=1).fits(groups, rows) and not Ring(each=2).fits(groups, rows)
    assert Ring(each=2).fits(1, even) and not Ring(each=2).fits(1, even.float())


@pytest.mark.parametrize(
    "channels, programs, last, ahead",
    [(1, 1, False, True), (2, 1, True, True), (2, 4, False, True), (1, 2, True, False)],
)
def test_the_handing_on_is_the_recurrence_of_each_channel(channels, programs, last, ahead):
    """Its PTX, run here: the numbers of its operands are what can be wrong, and no interpreter sees them."""
    tokens = 4
    code = hand_on_code(tokens, channels, programs, 64, 96, last, ahead)
    h, early, decay, drive, slot = (
        [[f"${(first * channels + c) * tokens + t}" for t in range(tokens)] for c in range(channels)]
        for first in range(5)
    )
    source, target, awaited, sent, elsewhere, far = (f"${(5 * channels + i) * tokens}" for i in range(6))
    each = range(channels)
    a, b, carry = torch.rand(channels, tokens), torch.rand(channels, tokens), torch.rand(channels)
    words = {f"carry{c}": carry[c].item() for c in each}
    words |= {names[c][t]: v[c, t].item() for names, v in ((decay, a), (drive, b)) for c in each for t in range(tokens)}
    for out, *factors in re.findall(r"fma\.rn\.f32 (\S+), (\S+), (\S+), (\S+);", code):
        words[out] = words[factors[0]] * words[factors[1]] + words[factors[2]]
    state = carry
    for t in range(tokens):
        state = a[:, t] * state + b[:, t]
        assert [words[h[c][t]] for c in each] == pytest.approx(state.tolist())
    # the slot read early is looked at first; it is read again, and the next state's early, at their places
    slots = ", ".join(f"slot{c}" for c in each)
    again = [(slots, f"{source} + 64")]
    following = [(", ".join(early[c][0] for c in each), f"{source} + 96")] if ahead and not last else []
    assert re.findall(r"ld\.\S+ \{(.*?)\}, \[(.*?)\];", code) == again + following
    assert re.findall(r"mov\.b64 (slot\d), (\$\d+);", code) == [(f"slot{c}", slot[c][0]) for c in each if ahead]
    assert re.findall(r"mov\.b64 \{(\S+), (\S+)\}, (\S+);", code) == (1 + ahead) * [
        (f"carry{c}", f"seen{c}", f"slot{c}") for c in each
    ]
    assert re.findall(r"setp\.ne\S* late, (\S+), (\S+?),? ?(?:late)?;", code) == (1 + ahead) * [
        (f"seen{c}", awaited) for c in each
    ]
    packed = re.findall(r"mov\.b64 (slot\d), \{(\S+), (\S+)\};", code)
    assert packed == [(f"slot{c}", h[c][-1], sent) for c in each]
    stores = re.findall(r"(@!?near )?st\.\S+ \[(.*?)\], \{(.*?)\};", code)
    ways = [("", target)] if programs == 1 else [("@near ", target), ("@!near ", far)]
    assert stores == [(way, f"{place} + 64", slots) for way, place in ways]
    assert (f"setp.eq.b32 near, {elsewhere}, 0;" in code) == (programs > 1)
    assert ("@!late bra.uni there;" in code[: code.index("again:")]) == ahead
    assert code.index("again:") < code.index("there:") < code.index("fma")
    assert code.count("@late bra.uni again;") == 1 + last
    places = 4 + 2 * (programs > 1)
    assert len(hand_on_operands(tokens, channels, programs).split(",")) == (5 * channels + places) * tokens


@pytest.mark.skipif(not ON_GPU, reason="a cluster is several programs at once")
@pytest.mark.parametrize("length", [1, 63, 64, 65, 700])
def test_the_programs_of_a_cluster_share_a_ring(length):
    ring = Ring(lanes=4, warps=2, programs=4)
    tensors = inputs(2, length, 19, 4)
    y, final = scan_in_ring(**tensors, pads=(0, length // 3), ring=ring)
    want, want_final = selective_scan_ref(**{n: v.double() for n, v in tensors.items()}, pads=(0, length // 3))
    assert_close(y, want, REL, "y")
    assert_close(final, want_final, REL, "state")


@pytest.mark.parametrize("tokens, lanes, each", [(8, 4, 1), (8, 2, 1), (8, 4, 2), (4, 2, 2)])
def test_a_lane_finds_its_tokens_of_copied_rows(tokens, lanes, each):
    """Where a row's 16 bytes are copied to, and where a lane looks for a token of its channel: the same."""
    channels = 32 // lanes
    row, own = 2 * channels * each, tokens // lanes
    places = {}
    for piece in range(tokens * row // 16):
        t, part = divmod(piece, row // 16)
        places |= {(t + t // own) * row + 16 * part + 2 * i: (t, 8 * part + i) for i in range(8)}
    code = row_code(False, own, 96, row, 16 * each)
    offsets = [int(offset) - 96 for offset in re.findall(r"\+ (\d+)\];", code)]
    for lane in range(lanes):
        for c in range(channels):
            first = lane * (own + 1) * row + c * 2 * each
            found = [places[first + offset] for offset in offsets]
            assert found == [(lane * own + i, c * each) for i in range(own)]


COPIED = [
    Ring(lanes=4, registers=80),
    Ring(lanes=2, registers=96),
    Ring(lanes=2, registers=96, ahead=False),
    Ring(lanes=2, warps=8, registers=128),
    Ring(lanes=1, warps=2, registers=None),
    Ring(lanes=4, each=2, registers=128),
    Ring(lanes=2, each=2, registers=168),
    Ring(lanes=2, programs=2, registers=96, ahead=False),
    Ring(lanes=4, each=2, programs=4, warps=2, registers=128),
    Ring(tokens=16, lanes=2, registers=168),
    Ring(tokens=4, lanes=2, each=2, registers=128),
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
    assert not Ring(lanes=2, copied=False).copies(1, rows)
