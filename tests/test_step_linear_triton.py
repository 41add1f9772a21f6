"""The decode step's products in Triton against the float64 definition, conv state included, several tokens in a row."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels.step_linear import Conv, Norm, step_linear, step_linear_ref
from statespan.kernels.step_linear_triton import Narrow, form_of, run
from tests.close import assert_close
from tests.gpu import draw, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 2e-6  # float32 sums of a few dozen products
FORMS = [Narrow(4, 16, 1), Narrow(2, 64, 1)]
ids = [repr(form) for form in FORMS]


def doubled(part):
    return None if part is None else type(part)(*(v.double() if isinstance(v, torch.Tensor) else v for v in part))


@pytest.mark.parametrize(
    "form, norm, rows",
    [(FORMS[0], False, 3), (FORMS[0], True, 1), (FORMS[1], True, 3)],
)
def test_a_product_with_all_around_it(form, norm, rows):
    width, outs, conv_width = 37, 29, 11
    weight, bias = draw(outs, width), draw(outs)
    before = Norm(draw(width), 1e-5) if norm else None
    conv = Conv(draw(rows, 3, conv_width), draw(conv_width, 4), draw(conv_width), first=7)
    exact = doubled(conv)
    for _ in range(2):
        x, residual = draw(rows, width), draw(rows, outs)
        got = run(form, x, weight, bias, before, conv, residual)
        want = step_linear_ref(
            x.double(), weight.double(), bias.double(), norm=doubled(before), conv=exact, residual=residual.double()
        )
        assert_close(got, want, REL, "y")
        assert_close(conv.state, exact.state, REL, "conv state")


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_a_bare_product_of_rows_that_lie_apart(form):
    both, weight = draw(2, 96), draw(10, 48)
    x = both[:, 48:]
    assert_close(run(form, x, weight), x.double() @ weight.double().T, REL)


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_a_wide_residual_stays_wide_and_a_plain_product_takes_the_weights_dtype(form):
    x, weight, residual = draw(2, 32).bfloat16(), draw(16, 32).bfloat16(), draw(2, 16)
    assert run(form, x, weight, residual=residual).dtype == torch.float32
    assert run(form, x, weight).dtype == torch.bfloat16


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="weight"):
        step_linear(draw(2, 8), draw(4, 9))
    with pytest.raises(ValueError, match="within its 4 columns"):
        step_linear(draw(1, 8), draw(4, 8), conv=Conv(draw(1, 3, 3), draw(3, 4), None, first=2))


def test_what_is_asked_alone_names_the_form():
    assert form_of(192, normed=False).outs == 1 and form_of(10_240, normed=False).outs == 2
    assert form_of(192, normed=True) == form_of(2560, normed=True) == Narrow(4, 512, 4)
    assert form_of(5280, normed=True) == Narrow(8, 512, 4)
    assert form_of(10_240, normed=True) == form_of(10_560, normed=True) == Narrow(16, 256, 4)
    assert form_of(10_561, normed=True) == form_of(50_288, normed=True) == Narrow(8, 512, 4)
