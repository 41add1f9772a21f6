"""What the Triton kernels' tests share: seeded inputs, gradients of a fixed weighting, NaN in every fresh buffer.

With no GPU the kernels run in Triton's interpreter. Each test module sets TRITON_INTERPRET before it imports a kernel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty hands out NaN, so that an element a kernel leaves unwritten fails its test; and draws are seeded."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        out = empty(*size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    torch.manual_seed(0)
    yield


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE)


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: dict[str, Tensor], constants: dict[str, Any],
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """Both outputs, and every input's gradient of a random weighting of them that is the same at each call."""
    leaves = {name: value.detach().to(dtype).clone().requires_grad_() for name, value in tensors.items()}
    y, state = function(**leaves, **constants)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(v.shape, generator=random).to(DEVICE, dtype) for v in (y, state)]
    ((y * weights[0]).sum() + (state * weights[1]).sum()).backward()
    found = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y, "state": state} | found
