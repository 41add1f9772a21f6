"""Picking rows in Triton against torch's gather."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import take_triton
from statespan.kernels.take import take, take_ref
from tests.gpu import DEVICE, draw, poisoned_buffers

__all__ = ["poisoned_buffers"]


@pytest.mark.parametrize("batch, length, width, kept", [(2, 9, 37, 5), (1, 4, 8, 4), (3, 6, 1, 2), (1, 3, 5, 0)])
def test_kept_rows_are_copied_exactly(batch, length, width, kept, monkeypatch):
    monkeypatch.setattr(take_triton, "BLOCK", 16)
    rows = draw(batch, length, width)
    chosen = torch.stack([torch.randperm(length)[:kept].sort().values for _ in range(batch)]).to(DEVICE)
    chosen[..., :1] = -1
    assert torch.equal(take_triton.take(rows, chosen), take_ref(rows, chosen))


def test_a_slice_of_a_wider_tensor_is_read_in_place():
    rows, chosen = draw(2, 7, 20)[..., 5:12], torch.tensor([[0, 3, 6], [-1, -1, 2]], device=DEVICE)
    assert torch.equal(take_triton.take(rows, chosen), take_ref(rows, chosen))


@pytest.mark.parametrize("kept", [[[0, 3, 6]], [[-1, -1, 2]], [[]]], ids=["no_pads", "pads", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_sequence_on_a_cpu_is_taken_row_by_row_and_exactly(kept, dtype):
    rows = torch.randn(1, 7, 20, dtype=dtype)[..., 5:12]
    chosen = torch.tensor(kept, dtype=torch.int64)
    assert torch.equal(take(rows, chosen), take_ref(rows, chosen))


def test_rows_and_positions_of_different_batches_are_refused():
    with pytest.raises(ValueError, match=r"take needs rows \(batch, length, width\)"):
        take(draw(2, 3, 4), torch.zeros(1, 2, dtype=torch.int64))
