"""Token importance in Triton against the float64 reference."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import token_importance_triton
from statespan.kernels.token_importance import token_importance_ref
from tests.close import assert_close
from tests.gpu import draw, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 2e-6  # float32 sums of squares


@pytest.mark.parametrize("norm", ["l2", "l1", "max"])
@pytest.mark.parametrize("batch, length, width", [(2, 37, 97), (1, 1, 16), (1, 0, 5)])
def test_matches_the_reference(batch, length, width, norm, monkeypatch):
    monkeypatch.setattr(token_importance_triton, "BLOCK_D", 32)
    dt, bias = draw(batch, length, width) * 4 - 3, draw(width)
    got = token_importance_triton.token_importance(dt, bias, norm=norm)
    assert_close(got, token_importance_ref(dt.double(), bias.double(), norm=norm), REL)


def test_a_slice_of_a_projection_is_read_in_place():
    wide, bias = draw(2, 9, 40), draw(16)
    got = token_importance_triton.token_importance(wide[..., 24:], bias)
    assert_close(got, token_importance_ref(wide[..., 24:].double(), bias.double()), REL)
