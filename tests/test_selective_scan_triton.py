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
from statespan.kernels.warp_ring import hand_on_code, hand_on_operands
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


@pytest.mark.parametrize("channels, programs, last", [(1, 1, False), (2, 1, True), (2, 4, False)])
def test_the_handing_on_is_the_recurrence_of_each_channel(channels, programs, last):
    """Its PTX, run here: the numbers of its operands are what can be wrong, and no interpreter sees them."""
    tokens = 4
    code = hand_on_code(tokens, channels, programs, 64, last)
    decay, drive, carry = torch.rand(channels, tokens), torch.rand(channels, tokens), torch.rand(channels)
    words = {f"${channels * tokens + i}": v.item() for i, v in enumerate(torch.cat([decay, drive]).flatten())}
    words |= {f"carry{c}": carry[c].item() for c in range(channels)}
    for out, a, b, c in re.findall(r"fma\.rn\.f32 (\S+), (\S+), (\S+), (\S+);", code):
        words[out] = words[a] * words[b] + words[c]
    h = carry
    for t in range(tokens):
        h = decay[:, t] * h + drive[:, t]
        assert [words[f"${c * tokens + t}"] for c in range(channels)] == pytest.approx(h.tolist())
    source, target, awaited, sent, elsewhere, far = (f"${(3 * channels + i) * tokens}" for i in range(6))
    slots = [f"slot{c}" for c in range(channels)]
    assert re.findall(r"ld\.\S+ \{(.*?)\}, \[(.*?)\];", code) == [(", ".join(slots), f"{source} + 64")]
    assert re.findall(r"mov\.b64 \{(\S+), (\S+)\}, (\S+);", code) == [
        (f"carry{c}", f"seen{c}", slots[c]) for c in range(channels)
    ]
    assert re.findall(r"setp\.ne\S* late, (\S+), (\S+?),? ?(?:late)?;", code) == [
        (f"seen{c}", awaited) for c in range(channels)
    ]
    packed = re.findall(r"mov\.b64 (slot\d), \{(\S+), (\S+)\};", code)
    assert packed == [(slots[c], f"${c * tokens + tokens - 1}", sent) for c in range(channels)]
    stores = re.findall(r"(@!?near )?st\.\S+ \[(.*?)\], \{(.*?)\};", code)
    ways = [("", target)] if programs == 1 else [("@near ", target), ("@!near ", far)]
    assert stores == [(way, f"{place} + 64", ", ".join(slots)) for way, place in ways]
    assert (f"setp.eq.b32 near, {elsewhere}, 0;" in code) == (programs > 1)
    assert code.count("@late bra again;") == 1 + last
    places = 4 + 2 * (programs > 1)
    assert len(hand_on_operands(tokens, channels, programs).split(",")) == (3 * channels + places) * tokens


@pytest.mark.skipif(not ON_GPU, reason="a cluster is several programs at once")
@pytest.mark.parametrize("length", [1, 63, 64, 65, 700])
def test_the_programs_of_a_cluster_share_a_ring(length):
    ring = Ring(lanes=4, warps=2, programs=4)
    tensors = inputs(2, length, 19, 4)
    y, final = scan_in_ring(**tensors, pads=(0, length // 3), ring=ring)
    want, want_final = selective_scan_ref(**{n: v.double() for n, v in tensors.items()}, pads=(0, length // 3))
    assert_close(y, want, REL, "y")
    assert_close(final, want_final, REL, "state")
