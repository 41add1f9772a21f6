"""The mamba_ssm backend with that package's functions stood in for by ours, told in its own layouts."""

import sys
from types import ModuleType

import pytest
import torch

from statespan.errors import UserError
from statespan.kernels.causal_conv import causal_conv
from statespan.kernels.dispatch import use_backend
from statespan.kernels.selective_scan import (
    selective_scan,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)
from statespan.kernels.ssd import ssd, ssd_ref, ssd_state_update, ssd_state_update_ref
from tests.close import assert_close

REL = 1e-5  # float32


def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    """Channel-first, as in mamba_ssm.ops.selective_scan_interface."""
    assert return_last_state and all(v.is_contiguous() for v in (u, delta, B, C, z))
    y, last = selective_scan_ref(
        u.mT, delta.mT, A, B.mT, C.mT, D=D, z=z.mT, dt_bias=delta_bias, softplus=delta_softplus
    )
    return y.mT, last


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states
):
    assert return_final_states and chunk_size > 0
    return ssd_ref(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, softplus=dt_softplus, dt_limit=dt_limit,
                   state=initial_states)  # fmt: skip


def update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """Either scan's step: heads are told by a fourth axis, one decay a head by strides of 0."""
    if state.ndim == 3:
        return selective_state_update_ref(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, softplus=dt_softplus)
    assert A.shape == state.shape[1:] and A.stride()[1:] == (0, 0) and dt.stride(-1) == 0 and dt.shape == x.shape
    bias = None if dt_bias is None else dt_bias[:, 0]
    return ssd_state_update_ref(state, x, dt[..., 0], A[:, 0, 0], B, C, D=D, z=z, dt_bias=bias, softplus=dt_softplus)


@pytest.fixture
def installed(monkeypatch):
    for place, function in (
        ("selective_scan_interface", selective_scan_fn),
        ("triton.ssd_combined", mamba_chunk_scan_combined),
        ("triton.selective_state_update", update),
    ):
        module = ModuleType(f"mamba_ssm.ops.{place}")
        setattr(module, "selective_state_update" if function is update else function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for parent in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))


def drawn(shapes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def of_scan(batch=2, length=9, d_inner=6, d_state=4):
    rows = dict.fromkeys(("x", "dt", "z"), (batch, length, d_inner))
    found = drawn(rows | dict.fromkeys(("B", "C"), (batch, length, d_state)) | {"A": (d_inner, d_state)})
    return found | drawn({"D": (d_inner,), "dt_bias": (d_inner,)}, 1) | {"A": -found["A"].exp()}


def of_ssd(batch=2, length=9, heads=3, head_dim=4, d_state=5, groups=1):
    rows = dict.fromkeys(("x", "z"), (batch, length, heads, head_dim)) | {"dt": (batch, length, heads)}
    found = drawn(rows | dict.fromkeys(("B", "C"), (batch, length, groups, d_state)) | {"A": (heads,)})
    return found | drawn({"D": (heads,), "dt_bias": (heads,)}, 1) | {"A": -found["A"].exp()}


@pytest.mark.parametrize("pads", [None, (0, 3)])
@pytest.mark.parametrize("filtered", [False, True])
def test_scans_in_its_layouts_are_ours(installed, pads, filtered):
    for scan, reference, inputs, channels in ((selective_scan, selective_scan_ref, of_scan(), 6),
                                              (ssd, ssd_ref, of_ssd(), 3)):  # fmt: skip
        extra = {"pads": pads, "keep_above": torch.full((2, channels), 0.6) if filtered else None}
        with use_backend("mamba_ssm"):
            got = scan(**inputs, **extra)
        for ours, theirs in zip(got, reference(**inputs, **extra), strict=True):
            assert_close(ours, theirs, REL)


@pytest.mark.parametrize("limit", [None, (0.1, 0.9)])
def test_steps_in_its_layouts_are_ours(installed, limit):
    cases = (
        (selective_state_update, selective_state_update_ref, of_scan(length=1), (2, 6, 4), {}),
        (ssd_state_update, ssd_state_update_ref, of_ssd(length=1), (2, 3, 4, 5), {"dt_limit": limit}),
    )
    for step, reference, inputs, shape, extra in cases:
        rows = {name: inputs.pop(name)[:, 0] for name in ("x", "dt", "z", "B", "C")}
        states = [torch.ones(shape), torch.ones(shape)]
        with use_backend("mamba_ssm"):
            got = step(states[0], **rows, **inputs, **extra)
        assert_close(got, reference(states[1], **rows, **inputs, **extra), REL)
        assert_close(states[0], states[1], REL)


def test_a_scan_cannot_begin_from_a_state(installed):
    with use_backend("mamba_ssm"), pytest.raises(UserError, match="in one chunk"):
        selective_scan(**of_scan(), state=torch.zeros(2, 6, 4))


def test_operators_that_mamba_ssm_lacks_stay_the_devices_own(installed):
    x, weight = torch.randn(1, 5, 3), torch.randn(3, 4)
    want = causal_conv(x, weight)
    with use_backend("mamba_ssm"):
        assert all(torch.equal(a, b) for a, b in zip(causal_conv(x, weight), want, strict=True))


def test_where_it_is_not_installed_that_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(UserError, match="needs the package mamba_ssm"), use_backend("mamba_ssm"):
        pass
