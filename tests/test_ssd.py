"""The scan of Mamba-2: the definition against published numbers, chunked form and kernels against the definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statespan.kernels.dispatch import use_backend
from statespan.kernels.ssd import ssd, ssd_chunked, ssd_ref, ssd_state_update, ssd_state_update_ref
from tests.close import assert_close, parity_case, parity_names
from tests.gpu import poisoned_buffers

__all__ = ["poisoned_buffers"]
CASES = [pytest.param(name, id=name) for name in parity_names("scan", "m2_")]
EXACT = 1e-9  # float64 throughout, sums in another order
REL = 2e-6  # float32 against float64: a few roundings a step, and decays forget them
few = settings(max_examples=25, deadline=None)
Scan = Callable[..., tuple[Tensor, Tensor]]


def ssd_numba(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with use_backend("numba"):
        return ssd(*args, **kwargs)


REFERENCE, CHUNKED = pytest.param(ssd_ref, id="reference"), pytest.param(ssd_chunked, id="chunked")
NUMBA = pytest.param(ssd_numba, id="numba")


def published(case: dict[str, Any], tensors: dict[str, Tensor], length: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of one stored case."""
    v = {k.removeprefix(f"L{length}."): t.to(dtype) for k, t in tensors.items() if k.startswith(f"L{length}.")}
    has = case["has"]
    options = {"softplus": has["softplus"], "dt_limit": has["dt_limit"], "state": v.get("initial_state")}
    optional = {name: v.get(name) for name in ("z", "D", "dt_bias")}
    return {name: v[name] for name in ("x", "dt", "A", "B", "C")} | optional | options


def draw(
    batch: int, length: int, heads: int, head_dim: int, d_state: int = 16, groups: int = 1, seed: int = 0, **extra: Any
) -> dict[str, Any]:
    """Inputs as a model has them: a gate, a skip, small steps, decays from slow to fast."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    rows = {"x": normal(batch, length, heads, head_dim), "z": normal(batch, length, heads, head_dim)}
    maps = {name: normal(batch, length, groups, d_state) for name in ("B", "C")}
    per_head = {"A": -torch.rand(heads, generator=random) * 8, "D": normal(heads), "dt_bias": normal(heads) - 3}
    return {**rows, **maps, **per_head, "dt": normal(batch, length, heads), **extra}


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def assert_matches(scan: Scan, inputs: dict[str, Any]) -> None:
    """A form in float64 and float32 against the definition in float64."""
    want_y, want_state = ssd_ref(**widened(inputs))
    for given_inputs, rel in ((widened(inputs), EXACT), (inputs, REL)):
        y, state = scan(**given_inputs)
        assert y.dtype == given_inputs["x"].dtype
        assert_close(y, want_y, rel, f"y in {y.dtype}")
        assert_close(state, want_state, rel, f"state in {y.dtype}")


@pytest.mark.parametrize("scan", [REFERENCE, CHUNKED, NUMBA])
@pytest.mark.parametrize("name", CASES)
def test_published_numbers(name: str, scan: Scan) -> None:
    case, tensors = parity_case("scan", name)
    loose = case["tolerance"]["suggested_float32_rtol_of_max"]  # far above what the source's own float32 run is off by
    for length in case["lengths"]:
        for dtype, rel in ((torch.float64, EXACT), (torch.float32, loose)):
            y, final = scan(**published(case, tensors, length, dtype))
            assert_close(y, tensors[f"L{length}.out"], rel, f"y at {length}")
            assert_close(final, tensors[f"L{length}.final_state"], rel, f"state at {length}")


@pytest.mark.parametrize("scan", [REFERENCE, CHUNKED])
def test_published_gradients(scan: Scan) -> None:
    case, tensors = parity_case("scan", "m2_gradients")
    (length,) = case["lengths"]
    inputs = published(case, tensors, length, torch.float64)
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor)}
    y, final = scan(**inputs)
    grad = {k: tensors[f"L{length}.{k}"].double() for k in ("grad_out", "grad_final_state")}
    ((y * grad["grad_out"]).sum() + (final * grad["grad_final_state"]).sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert_close(leaf.grad, tensors[f"L{length}.grad.{name}"], EXACT, name)


@pytest.mark.parametrize("scan", [CHUNKED, NUMBA])
@pytest.mark.parametrize(
    "batch, length, heads, head_dim, d_state, groups",
    [
        pytest.param(1, 1, 1, 1, 1, 1, id="one_of_each"),
        pytest.param(2, 63, 3, 5, 7, 1, id="no_power_of_two"),
        pytest.param(1, 257, 2, 64, 64, 1, id="as_in_models"),
        pytest.param(2, 65, 6, 70, 16, 3, id="groups_and_two_blocks"),
        pytest.param(1, 64, 2, 8, 128, 2, id="wide_state"),
        pytest.param(2, 0, 2, 4, 16, 1, id="no_token"),
    ],
)
def test_shapes(scan: Scan, batch: int, length: int, heads: int, head_dim: int, d_state: int, groups: int) -> None:
    assert_matches(scan, draw(batch, length, heads, head_dim, d_state, groups))


@pytest.mark.parametrize("scan", [CHUNKED, NUMBA])
def test_every_option_at_once(scan: Scan) -> None:
    inputs = draw(3, 80, 4, 10, groups=2, pads=(0, 80, 13), state=torch.randn(3, 4, 10, 16), dt_limit=(0.02, 0.5))
    inputs |= {"keep_above": torch.rand(3, 4) * 0.1, "dt_scale": torch.rand(3, 4) * 2, "D": torch.randn(4, 10)}
    assert_matches(scan, inputs)


@pytest.mark.parametrize("scan", [CHUNKED, NUMBA])
def test_no_option_at_all(scan: Scan) -> None:
    inputs = draw(2, 20, 4, 10, z=None, D=None, dt_bias=None, softplus=False)
    assert_matches(scan, inputs | {"dt": inputs["dt"].abs() * 0.1})


@pytest.mark.parametrize("scan", [CHUNKED, NUMBA])
def test_slices_of_one_projection_are_read_in_place(scan: Scan) -> None:
    inputs, joined = draw(2, 30, 4, 6), torch.randn(2, 30, 24 + 2 * 16)
    x, B, C = joined.split((24, 16, 16), dim=-1)
    assert_matches(scan, inputs | {"x": x.unflatten(-1, (4, 6)), "B": B[:, :, None], "C": C[:, :, None]})


@pytest.mark.parametrize("scan", [CHUNKED, NUMBA])
def test_a_large_step_forgets_and_stays_finite(scan: Scan) -> None:
    inputs = draw(1, 100, 2, 8)
    inputs["dt"][:, ::7] = 1e4
    assert_matches(scan, inputs)


@pytest.mark.parametrize("scan", [CHUNKED, NUMBA])
def test_what_lies_on_pads_is_not_read(scan: Scan) -> None:
    inputs = draw(2, 12, 2, 8, pads=(5, 0))
    for name in ("x", "dt", "z", "B", "C"):
        inputs[name][0, :5] = float("nan")
    y, state = scan(**inputs)
    want_y, want_state = ssd_ref(**inputs)
    assert (y[0, :5] == 0).all()
    assert_close(y, want_y, REL)
    assert_close(state, want_state, REL)


def test_the_chunked_form_has_the_definitions_gradients_where_decays_underflow() -> None:
    inputs = draw(2, 150, 4, 6, groups=2, pads=(0, 9), state=torch.randn(2, 4, 6, 16))
    inputs["dt"][:, ::31] = 300.0
    inputs |= {"keep_above": torch.full((2, 4), 0.02), "dt_scale": torch.rand(2, 4) + 0.5}
    found = []
    for scan in (ssd_ref, ssd_chunked):
        leaves = {k: v.detach().requires_grad_() for k, v in widened(inputs).items() if isinstance(v, Tensor)}
        y, final = scan(**inputs | leaves)
        (y.square().sum() + final.square().sum()).backward()
        found.append({k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        assert_close(found[1][name], want, EXACT, name)


def test_under_autocast_only_products_lose_precision() -> None:
    inputs = draw(1, 200, 2, 8)
    want, want_state = ssd_ref(**widened(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ssd_chunked(**inputs)
    assert (y.dtype, state.dtype) == (torch.float32, torch.float32)
    assert_close(y, want, 2**-6)  # a few roundings to bfloat16; decays kept in it would be off by far more
    assert_close(state, want_state, 2**-6)


@few
@given(length=st.integers(2, 150), cut=st.floats(0, 1), head_dim=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_scan_in_chunks_is_the_scan_bit_for_bit(length: int, cut: float, head_dim: int, seed: int) -> None:
    inputs, at = draw(2, length, 2, head_dim, seed=seed), round(cut * length)
    rows = ("x", "dt", "z", "B", "C")
    y, final = ssd(**inputs)
    first, state = ssd(**inputs | {name: inputs[name][:, :at] for name in rows})
    second, last = ssd(**inputs | {name: inputs[name][:, at:] for name in rows}, state=state)
    assert torch.equal(torch.cat([first, second], 1), y)
    assert torch.equal(last, final)


@few
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_padded_row_is_the_row_alone_bit_for_bit(lengths: list[int], seed: int) -> None:
    padded = max(lengths)
    inputs = draw(len(lengths), padded, 2, 10, seed=seed)
    y, final = ssd(**inputs, pads=tuple(padded - own for own in lengths))
    for row, own in enumerate(lengths):
        alone = {name: inputs[name][row : row + 1, padded - own :] for name in ("x", "dt", "z", "B", "C")}
        y_alone, final_alone = ssd(**inputs | alone)
        assert torch.equal(y[row : row + 1, padded - own :], y_alone)
        assert torch.equal(final[row : row + 1], final_alone)


@few
@given(threshold=st.floats(0.01, 0.3), seed=st.integers(0, 99))
def test_a_threshold_leaves_the_state_as_if_the_tokens_were_not_there(threshold: float, seed: int) -> None:
    inputs = draw(1, 50, 1, 6, seed=seed)
    _, filtered = ssd(**inputs, keep_above=torch.full((1, 1), threshold))
    kept = torch.nn.functional.softplus(inputs["dt"] + inputs["dt_bias"])[0, :, 0] > threshold
    chosen = {name: inputs[name][:, kept] for name in ("x", "dt", "z", "B", "C")}
    _, shorter = ssd(**inputs | chosen)
    assert torch.equal(filtered, shorter)


@pytest.mark.parametrize(
    "options", [{}, {"D": None, "z": None, "dt_bias": None, "softplus": False}], ids=["all", "none"]
)
def test_steps_continue_a_scan(options: dict[str, Any]) -> None:
    inputs = draw(3, 6, 4, 10, groups=2, **options)
    inputs["dt"] = inputs["dt"].abs() * 0.1
    shared = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    shared |= {"softplus": options.get("softplus", True), "dt_limit": (0.0, 0.4)}
    state, wide_state = torch.randn(3, 4, 10, 16), torch.zeros(3, 4, 10, 16, dtype=torch.float64)
    wide_state.copy_(state)
    for t in range(6):
        token = {name: None if inputs[name] is None else inputs[name][:, t] for name in ("x", "dt", "z", "B", "C")}
        y = ssd_state_update(state, **token, **shared)
        want = ssd_state_update_ref(wide_state, **widened(token), **widened(shared))
        assert_close(y, want, REL, f"y of step {t}")
        assert_close(state, wide_state, REL, f"state after step {t}")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"dt": torch.zeros(2, 8, 3)}, r"needs dt \(..., heads\) = \(2, 8, 4\); got \(2, 8, 3\)"),
        ({"B": torch.zeros(2, 8, 3, 16)}, "groups dividing heads"),
        ({"C": torch.zeros(2, 8, 1, 15)}, "needs C"),
        ({"D": torch.zeros(4, 5)}, "needs D"),
        ({"state": torch.zeros(2, 4, 6, 15)}, "needs state"),
        ({"dt_scale": torch.zeros(2)}, "needs dt_scale"),
        ({"pads": (1, 9)}, "one count of leading pads"),
    ],
)
def test_a_wrong_shape_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ssd(**draw(2, 8, 4, 6) | change)
