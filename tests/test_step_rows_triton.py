"""A decode step's products for some dozens of rows, in Triton against the float64 definition."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import step_rows_triton
from statespan.kernels.dispatch import use_backend
from statespan.kernels.step_linear import Conv
from statespan.kernels.step_rows import linear_conv, linear_conv_ref, linear_norm, linear_norm_ref
from tests.close import assert_close
from tests.gpu import DEVICE, draw, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 3e-6  # float32 sums of some dozens of products
GPU_ROWS = [pytest.param(rows, marks=pytest.mark.skipif(DEVICE == "cpu", reason="large")) for rows in (3, 17, 64)]


def wide(*parts):
    return [None if v is None else v.double() for v in parts]


@pytest.fixture
def small(monkeypatch):
    """Tiles that the interpreter has several of."""
    for name, value in {"OUTS": 16, "DEPTH": 16, "PARTS": 2}.items():
        monkeypatch.setattr(step_rows_triton, name, value)


@pytest.mark.parametrize("rows, width, outs", [(3, 80, 37), (17, 41, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_product_stream_and_norm(rows, width, outs, dtype, small):
    stream, x = draw(rows, outs).to(dtype), draw(rows, 2 * width)[:, width:]
    weight, scale = draw(outs, width), draw(outs)
    exact = stream.double()
    with use_backend("triton"):
        y = linear_norm(stream, x, weight, scale, 1e-5)
    want = linear_norm_ref(exact, *wide(x, weight, scale), 1e-5)
    kept = 1e-3 if dtype == torch.float16 else REL  # the stream keeps 11 bits
    assert stream.dtype == dtype and y.dtype == scale.dtype
    assert_close(stream, exact, kept, "stream")
    assert_close(y, want, kept, "norm")


@pytest.mark.parametrize(
    "rows, width, outs, channels, first, taps, biased",
    [
        pytest.param(3, 32, 75, 37, 0, 4, True, id="no_power_of_two"),
        pytest.param(17, 23, 64, 24, 40, 2, False, id="amidst"),
        pytest.param(2, 16, 40, 18, 9, 1, True, id="of_one_tap"),
    ],
)
def test_product_and_conv(rows, width, outs, channels, first, taps, biased, small):
    weight, conv = draw(outs, width), draw(channels, taps)
    bias = draw(channels) if biased else None
    state = draw(rows, taps - 1, channels)
    exact = state.double()
    for _ in range(3):
        x = draw(rows, width)
        with use_backend("triton"):
            y = linear_conv(x, weight, Conv(state, conv, bias, first))
        x, w, c, b = wide(x, weight, conv, bias)
        assert_close(y, linear_conv_ref(x, w, Conv(exact, c, b, first)), REL, "y")
        assert_close(state, exact, REL, "state")


@pytest.mark.parametrize("rows", GPU_ROWS)
def test_at_a_models_widths(rows):
    """In bfloat16, whose rounding is 2**-9 of a value; of the largest here it is less."""
    half = torch.bfloat16
    x, weight, scale = draw(rows, 2560).to(half), (draw(10240, 2560) / 50).to(half), draw(2560).to(half)
    conv, bias = draw(5120, 4).to(half), draw(5120).to(half)
    state = draw(rows, 3, 5120).to(half)
    exact = state.double()
    y = linear_conv(x, weight, Conv(state, conv, bias))
    dx, w, c, b = wide(x, weight, conv, bias)
    assert_close(y, linear_conv_ref(dx, w, Conv(exact, c, b)), 2**-8, "y")
    assert_close(state, exact, 2**-8, "state")
    out, stream = (draw(2560, 5120) / 70).to(half), draw(rows, 2560)
    exact = stream.double()
    u = y[:, :5120]
    normed = linear_norm(stream, u, out, scale, 1e-5)
    want = linear_norm_ref(exact, *wide(u, out, scale), 1e-5)
    assert_close(stream, exact, 1e-5, "stream")
    assert_close(normed, want, 2**-8, "norm")


def test_rows_that_are_too_many_and_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at most 64 rows; got 65"):
        linear_norm(draw(65, 4), draw(65, 8), draw(4, 8), draw(4), 1e-5)
    with pytest.raises(ValueError, match=r"stream \(batch, out\) = \(2, 4\); got \(2, 5\)"):
        linear_norm(draw(2, 5), draw(2, 8), draw(4, 8), draw(4), 1e-5)
    conv = Conv(draw(2, 3, 6), draw(6, 4), None, 3)
    with pytest.raises(ValueError, match="within its 8 columns; got 6 from 3"):
        linear_conv(draw(2, 8), draw(8, 8), conv)
    with pytest.raises(ValueError, match="contiguous conv state"):
        linear_conv(draw(2, 8), draw(12, 8), conv._replace(state=draw(2, 6, 3).mT))
