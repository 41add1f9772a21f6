"""A float32 linear map in bfloat16 pieces against float64."""

import pytest
import torch

from statespan.kernels.wide_linear import in_pieces, pieces, wide_linear, wide_linear_ref
from tests.close import assert_close
from tests.gpu import DEVICE

REL = 2e-6  # float32 sums of a hundred terms; the third piece of either operand alone is worth 2**-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_pieces_match_float64(dtype, biased):
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=random).to(DEVICE) for size in ((37, 96), (50, 96), (50,)))
    x, bias = x.to(dtype), bias if biased else None
    want = wide_linear_ref(x.double(), weight.double(), None if bias is None else bias.double())
    assert_close(in_pieces(x, weight, bias), want, REL)
    assert_close(wide_linear(x, weight, bias), want, REL)


def test_three_pieces_are_the_float32_they_came_from():
    v = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-10, 10).repeat(50)
    assert torch.equal(sum(piece.double() for piece in pieces(v)), v.double())


def test_a_gradient_is_torchs_own():
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    wide_linear(x, weight).sum().backward()
    assert_close(weight.grad, x.sum(0).expand(2, -1), 1e-12)


def test_shapes_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="width"):
        wide_linear(torch.zeros(2, 3), torch.zeros(4, 5))
