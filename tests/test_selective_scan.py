"""The selective scan of Mamba-1: the definition against published numbers, the CPU kernels against the definition."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statespan.kernels.dispatch import use_backend
from statespan.kernels.selective_scan import (
    selective_scan,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)
from tests.close import assert_close, parity_case, parity_names
from tests.gpu import poisoned_buffers

__all__ = ["poisoned_buffers"]
CASES = [pytest.param(name, id=name) for name in parity_names("scan", "m1_")]
EXACT = 1e-9  # float64 throughout, sums in another order
REL = 2e-6  # float32 against float64: a few roundings a step, and decays forget them
few = settings(max_examples=25, deadline=None)


def published(case: dict[str, Any], tensors: dict[str, Tensor], length: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of one stored case, channel-last."""
    v = {k.removeprefix(f"L{length}."): t.to(dtype) for k, t in tensors.items() if k.startswith(f"L{length}.")}
    rows = {"x": v["u"].mT, "dt": v["delta"].mT, "B": v["B"].movedim(-1, 1), "C": v["C"].movedim(-1, 1)}
    optional = {"D": v.get("D"), "z": v["z"].mT if "z" in v else None, "dt_bias": v.get("delta_bias")}
    return {**rows, **optional, "A": v["A"], "softplus": case["has"]["softplus"], "state": v.get("initial_state")}


def draw(
    batch: int, length: int, d_inner: int, d_state: int = 16, groups: int = 0, seed: int = 0, **extra: Any
) -> dict[str, Any]:
    """Inputs as a model has them: a gate, a skip, small steps, decays from slow to fast."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    rows = {name: normal(batch, length, d_inner) for name in ("x", "dt", "z")}
    row_shape = (batch, length, groups, d_state) if groups else (batch, length, d_state)
    maps = {"A": -torch.rand(d_inner, d_state, generator=random) * d_state, "B": normal(*row_shape)}
    return {**rows, **maps, "C": normal(*row_shape), "D": normal(d_inner), "dt_bias": normal(d_inner) - 3, **extra}


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def assert_matches(inputs: dict[str, Any]) -> None:
    """The kernel in float64 and float32 against the definition in float64."""
    want_y, want_state = selective_scan_ref(**widened(inputs))
    for given_inputs, rel in ((widened(inputs), EXACT), (inputs, REL)):
        y, state = selective_scan(**given_inputs)
        assert y.dtype == given_inputs["x"].dtype
        assert_close(y, want_y, rel, f"y in {y.dtype}")
        assert_close(state, want_state, rel, f"state in {y.dtype}")


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("name", CASES)
def test_published_numbers(name: str, backend: Any) -> None:
    case, tensors = parity_case("scan", name)
    loose = case["tolerance"]["suggested_float32_rtol_of_max"]  # ten times what the source's own float32 run is off by
    for length in case["lengths"]:
        for dtype, rel in ((torch.float64, EXACT), (torch.float32, loose)):
            with use_backend(backend):
                y, final = selective_scan(**published(case, tensors, length, dtype))
            assert_close(y.mT, tensors[f"L{length}.out"], rel, f"y at {length}")
            assert_close(final, tensors[f"L{length}.last_state"], rel, f"state at {length}")


def test_published_gradients() -> None:
    case, tensors = parity_case("scan", "m1_gradients")
    (length,) = case["lengths"]
    inputs = published(case, tensors, length, torch.float64)
    names = {"x": "u", "dt": "delta", "dt_bias": "delta_bias"}
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor)}
    y, final = selective_scan(**inputs)
    grad = {k: tensors[f"L{length}.{k}"].double() for k in ("grad_out", "grad_last_state")}
    ((y.mT * grad["grad_out"]).sum() + (final * grad["grad_last_state"]).sum()).backward()
    for name, leaf in leaves.items():
        want = tensors[f"L{length}.grad.{names.get(name, name)}"]
        assert leaf.grad is not None
        got = leaf.grad if name in ("A", "D", "dt_bias") else leaf.grad.mT
        assert_close(got, want, EXACT, name)


@pytest.mark.parametrize(
    "batch, length, d_inner, d_state, groups",
    [
        pytest.param(1, 1, 1, 1, 0, id="one_of_each"),
        pytest.param(2, 63, 65, 5, 0, id="no_power_of_two"),
        pytest.param(1, 257, 128, 16, 0, id="whole_blocks"),
        pytest.param(2, 9, 150, 16, 2, id="groups_that_share_no_block"),
        pytest.param(2, 7, 6, 8, 3, id="groups_of_two_channels"),
        pytest.param(1, 65, 70, 64, 1, id="wide_state"),
        pytest.param(2, 0, 5, 16, 0, id="no_token"),
    ],
)
def test_shapes(batch: int, length: int, d_inner: int, d_state: int, groups: int) -> None:
    assert_matches(draw(batch, length, d_inner, d_state, groups))


def test_every_option_at_once() -> None:
    inputs = draw(3, 40, 70, pads=(0, 40, 13), state=torch.randn(3, 70, 16))
    assert_matches(inputs | {"keep_above": torch.rand(3, 70) * 0.1, "dt_scale": torch.rand(3, 70) * 2})


def test_no_option_at_all() -> None:
    inputs = draw(2, 20, 70, z=None, D=None, dt_bias=None, softplus=False)
    assert_matches(inputs | {"dt": inputs["dt"].abs() * 0.1})


def test_slices_of_wider_tensors_are_read_in_place() -> None:
    wide, maps = draw(2, 30, 200), torch.randn(2, 30, 50)
    halves = {name: wide[name][..., 100:] for name in ("x", "dt", "z")} | {"B": maps[..., 2:18], "C": maps[..., 30:46]}
    shared = {"A": wide["A"][100:], "D": wide["D"][100:], "dt_bias": wide["dt_bias"][100:]}
    assert_matches(halves | shared)
    assert_matches({k: v.mT.contiguous().mT if v.ndim == 3 else v for k, v in (halves | shared).items()})


def test_a_large_step_forgets_and_stays_finite() -> None:
    inputs = draw(1, 30, 8)
    inputs["dt"][:, ::7] = 1e4
    assert_matches(inputs)


def test_growth_past_float32_stays_large_and_positive() -> None:
    inputs = draw(1, 1, 3, z=None, D=None, dt_bias=None, softplus=False, state=torch.ones(1, 3, 16))
    _, state = selective_scan(**inputs | {"dt": torch.full((1, 1, 3), -1e3), "x": torch.zeros(1, 1, 3)})
    assert (state > 1e38).any()  # 2^127, where the definition has infinity
    assert (state >= 1).all()


def test_a_state_given_is_left_alone() -> None:
    state = torch.randn(1, 8, 16)
    before = state.clone()
    selective_scan(**draw(1, 5, 8, state=state))
    assert torch.equal(state, before)


def test_what_lies_on_pads_is_not_read() -> None:
    inputs = draw(2, 12, 8, pads=(5, 0))
    for name in ("x", "dt", "z", "B", "C"):
        inputs[name][0, :5] = float("nan")
    y, state = selective_scan(**inputs)
    want_y, want_state = selective_scan_ref(**inputs)
    assert (y[0, :5] == 0).all()
    assert_close(y, want_y, REL)
    assert_close(state, want_state, REL)


@few
@given(length=st.integers(2, 150), cut=st.floats(0, 1), d_inner=st.integers(1, 140), seed=st.integers(0, 99))
def test_a_scan_in_chunks_is_the_scan_bit_for_bit(length: int, cut: float, d_inner: int, seed: int) -> None:
    inputs, at = draw(2, length, d_inner, seed=seed), round(cut * length)
    rows = ("x", "dt", "z", "B", "C")
    y, final = selective_scan(**inputs)
    first, state = selective_scan(**inputs | {name: inputs[name][:, :at] for name in rows})
    second, last = selective_scan(**inputs | {name: inputs[name][:, at:] for name in rows}, state=state)
    assert torch.equal(torch.cat([first, second], 1), y)
    assert torch.equal(last, final)


@few
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_padded_row_is_the_row_alone_bit_for_bit(lengths: list[int], seed: int) -> None:
    padded = max(lengths)
    inputs = draw(len(lengths), padded, 70, seed=seed)
    y, final = selective_scan(**inputs, pads=tuple(padded - own for own in lengths))
    for row, own in enumerate(lengths):
        alone = {name: inputs[name][row : row + 1, padded - own :] for name in ("x", "dt", "z", "B", "C")}
        y_alone, final_alone = selective_scan(**inputs | alone)
        assert torch.equal(y[row : row + 1, padded - own :], y_alone)
        assert torch.equal(final[row : row + 1], final_alone)


@few
@given(threshold=st.floats(0.01, 0.3), seed=st.integers(0, 99))
def test_a_threshold_leaves_the_state_as_if_the_tokens_were_not_there(threshold: float, seed: int) -> None:
    inputs = draw(1, 50, 1, seed=seed)
    _, filtered = selective_scan(**inputs, keep_above=torch.full((1, 1), threshold))
    kept = torch.nn.functional.softplus(inputs["dt"] + inputs["dt_bias"])[0, :, 0] > threshold
    chosen = {name: inputs[name][:, kept] for name in ("x", "dt", "z", "B", "C")}
    _, shorter = selective_scan(**inputs | chosen)
    assert torch.equal(filtered, shorter)


def test_a_negative_threshold_keeps_every_step() -> None:
    inputs = draw(2, 30, 70)
    y, _ = selective_scan(**inputs, keep_above=torch.full((2, 70), -1.0))
    assert torch.equal(y, selective_scan(**inputs)[0])


def test_threads_change_nothing() -> None:
    inputs, threads = draw(2, 200, 300), torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(selective_scan(**inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize(
    "options", [{}, {"D": None, "z": None, "dt_bias": None, "softplus": False}], ids=["all", "none"]
)
def test_steps_continue_a_scan(groups: int, options: dict[str, Any]) -> None:
    inputs = draw(3, 6, 70, groups=groups, **options)
    inputs["dt"] = inputs["dt"].abs() * 0.1
    maps = {name: inputs[name] for name in ("A", "D", "dt_bias")} | {"softplus": options.get("softplus", True)}
    state, wide_state = torch.randn(3, 70, 16), torch.zeros(3, 70, 16, dtype=torch.float64)
    wide_state.copy_(state)
    for t in range(6):
        token = {name: None if inputs[name] is None else inputs[name][:, t] for name in ("x", "dt", "z", "B", "C")}
        y = selective_state_update(state, **token, **maps)
        want = selective_state_update_ref(wide_state, **widened(token), **widened(maps))
        assert_close(y, want, REL, f"y of step {t}")
        assert_close(state, wide_state, REL, f"state after step {t}")


def test_lower_precision_comes_back_as_it_went_in() -> None:
    inputs = {k: v.bfloat16() for k, v in draw(1, 20, 30).items()}
    y, state = selective_scan(**inputs)
    want, want_state = selective_scan_ref(**widened(inputs))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close(y, want, 2**-8)  # one rounding to bfloat16
    assert_close(state, want_state, REL)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"dt": torch.zeros(2, 8, 5)}, r"needs dt like x = \(2, 8, 6\); got \(2, 8, 5\)"),
        ({"A": torch.zeros(5, 16)}, r"A \(d_inner, d_state\); got \[2, 8, 6\] and \[5, 16\]"),
        ({"B": torch.zeros(2, 8, 4, 16)}, "groups dividing 6"),
        ({"C": torch.zeros(2, 8, 15)}, "needs C"),
        ({"state": torch.zeros(2, 6, 15)}, "needs state"),
        ({"keep_above": torch.zeros(6)}, "needs keep_above"),
        ({"pads": (1,)}, "one count of leading pads"),
        ({"pads": (1, 9)}, r"in \[0, 8\]"),
    ],
)
def test_a_wrong_shape_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        selective_scan(**draw(2, 8, 6) | change)


def test_a_step_needs_a_state_it_can_write_into() -> None:
    token = {k: v[:, 0] if v.ndim == 3 else v for k, v in draw(2, 1, 6).items()}
    with pytest.raises(ValueError, match="in place"):
        selective_state_update(torch.zeros(2, 6, 16, dtype=torch.bfloat16), **token)
    with pytest.raises(ValueError, match="in place"):
        selective_state_update(torch.zeros(2, 16, 6).mT, **token)
