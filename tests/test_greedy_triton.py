"""The device's greedy choice against torch's in float64."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels.dispatch import use_backend
from statespan.kernels.greedy import greedy, greedy_ref
from statespan.kernels.greedy_triton import BLOCK
from tests.gpu import DEVICE, draw, poisoned_buffers

__all__ = ["poisoned_buffers"]


def found(logits):
    with use_backend("triton"):
        return greedy(logits)


@pytest.mark.parametrize("rows, width", [(1, 1), (3, BLOCK + 1), (2, 3 * BLOCK - 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_and_logprob_are_those_of_float64(rows, width, dtype):
    logits = (8 * draw(rows, width)).to(dtype)
    got, want = found(logits), greedy_ref(logits.double())
    # of equals, which bfloat16 has many of, the first
    first = (logits == logits.amax(-1, keepdim=True)).double().argmax(-1)
    assert torch.equal(got[0], first.double())
    torch.testing.assert_close(got[1], want[1], atol=2e-6, rtol=2e-6)  # float32 sums


def test_the_row_beside_changes_no_bit_and_rows_may_lie_apart():
    wide = draw(3, 2, BLOCK + 7)
    logits = wide[:, 1]
    assert torch.equal(found(logits)[:, 1], found(logits[1:2].contiguous())[:, 0])


def test_tokens_that_are_ruled_out_are_no_nan_and_a_nan_shows():
    logits = torch.full((2, 2 * BLOCK), -torch.inf, device=DEVICE)
    logits[:, BLOCK + 3] = 4.0
    logits[1, 5] = torch.nan
    got = found(logits)
    assert got[:, 0].tolist() == [BLOCK + 3, 0.0] and got[1, 1].isnan()


def test_no_logits_are_refused():
    with pytest.raises(ValueError, match=r"\(rows, vocab_size\); got \[0\]"):
        greedy(torch.zeros(0))
