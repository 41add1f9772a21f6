"""Token importance: the CPU kernel against the definition."""

import pytest
import torch

from statespan.errors import UserError
from statespan.kernels.token_importance import token_importance, token_importance_ref
from tests.close import assert_close
from tests.gpu import poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 2e-6  # float32 sums over the channels


@pytest.mark.parametrize("norm", ["l2", "l1", "max"])
@pytest.mark.parametrize("batch, length, channels", [(1, 1, 1), (2, 65, 97), (3, 64, 16), (2, 0, 5)])
def test_matches_the_definition(batch: int, length: int, channels: int, norm: str) -> None:
    dt, bias = torch.randn(batch, length, channels) * 4 - 3, torch.randn(channels)
    want = token_importance_ref(dt.double(), bias.double(), norm=norm)
    assert_close(token_importance(dt, bias, norm=norm), want, REL)
    assert_close(token_importance(dt.double(), bias.double(), norm=norm), want, 1e-12)


def test_small_steps_keep_their_digits() -> None:
    dt, bias = torch.full((1, 1, 4), -25.0), torch.zeros(4)  # softplus is 1.4e-11: 1 + e^x would lose all of it
    assert_close(token_importance(dt, bias), token_importance_ref(dt.double(), bias.double()), REL)


def test_slices_are_read_in_place() -> None:
    joined, bias = torch.randn(2, 9, 40), torch.randn(16)
    for dt in (joined[..., 24:], joined[..., 24:].mT.contiguous().mT):
        assert_close(token_importance(dt, bias), token_importance_ref(dt.double(), bias.double()), REL)


def test_a_wrong_argument_is_named() -> None:
    with pytest.raises(UserError, match="no norm of the step sizes named 'l3'"):
        token_importance(torch.zeros(1, 2, 3), torch.zeros(3), norm="l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \[1, 2, 3\] and \[4\]"):
        token_importance(torch.zeros(1, 2, 3), torch.zeros(4))
