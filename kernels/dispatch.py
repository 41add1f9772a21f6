"""Which implementation of an operator runs, and the checks that all operators share.

An operator `op` is `kernels/op.py`: formula, reference in torch, public function. Its fast forms are the modules
`op_numba.py` (CPU) and `op_triton.py` (CUDA) and hold functions of the same names and signatures; they are imported
when first needed, so importing an operator needs neither a compiler nor a GPU. The device chooses: a CUDA tensor goes
to Triton, and a missing Triton kernel is an error, never a slow path taken in silence; a CPU tensor goes to numba, or
to differentiable torch where a gradient is asked for. `use_backend` overrides the choice for tests and cross-checks:
with "mamba_ssm" the scans and their steps are that package's, where it is installed, and all else is the device's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from statespan.errors import UserError, unknown

Backend = Literal["reference", "numba", "triton", "mamba_ssm"]
PEER_OPS = frozenset({"selective_scan", "selective_state_update", "ssd", "ssd_state_update"})
"""What mamba_ssm has kernels of."""

_override: ContextVar[Backend | None] = ContextVar("statespan_kernel_backend", default=None)


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Within the block every operator of this thread or task runs on the named backend."""
    if name not in get_args(Backend):
        raise unknown("kernel backend", name, get_args(Backend))
    if name == "mamba_ssm":
        peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def overridden() -> Backend | None:
    """The backend `use_backend` asks for here, None where the device shall choose."""
    return _override.get()


def backend_for(op: str, first: Tensor, *others: Tensor | None) -> Backend:
    """The backend for these tensors, which must share one device; "reference" where a gradient is asked for on CPU."""
    on_gpu, may_need_grad = first.is_cuda, torch.is_grad_enabled()
    needs_grad = may_need_grad and first.requires_grad
    for tensor in others:
        if tensor is not None:
            needs_grad = needs_grad or (may_need_grad and tensor.requires_grad)
            if tensor.is_cuda != on_gpu or (on_gpu and tensor.device != first.device):
                raise ValueError(f"{op} needs all tensors on one device; got {first.device} and {tensor.device}")
    own: Backend = "triton" if on_gpu else "reference" if needs_grad else "numba"
    chosen = _override.get() or own
    if chosen == "mamba_ssm" and op not in PEER_OPS:
        chosen = own
    if chosen == "numba" and needs_grad:
        raise ValueError(f"{op}: the numba kernels have no gradients; leave the backend free or use 'reference'")
    return chosen


@cache
def kernel(op: str, function: str, backend: Backend) -> Callable[..., Any]:
    """`function` of `kernels/<op>_<backend>.py`; an error that says so where it is missing."""
    name = f"statespan.kernels.{op}_{backend}"
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{function} has no {backend} kernel here ({error}); install what {name} needs, or choose another backend "
            f"with statespan.kernels.dispatch.use_backend"
        ) from error
    return found


def peer(module: str, function: str) -> Callable[..., Any]:
    """A function of mamba_ssm; a UserError where that is not installed."""
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"backend mamba_ssm needs the package mamba_ssm, which cannot be used here ({error}); install it on a "
            "machine with CUDA, or leave the backend free"
        ) from error
    return found


def expect(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], words: str) -> None:
    """Raise unless an optional tensor has this shape. `words` names its axes."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{op} needs {name} {words} = {shape}; got {tuple(tensor.shape)}")


def expect_pads(op: str, pads: tuple[int, ...] | None, batch: int, length: int) -> None:
    """Raise unless there is one count a row, each within the length."""
    if pads is not None and (len(pads) != batch or any(not 0 <= pad <= length for pad in pads)):
        raise ValueError(f"{op} needs one count of leading pads in [0, {length}] for each of {batch} rows; got {pads}")


def expect_in_place(op: str, state: Tensor, x: Tensor) -> None:
    """Raise unless a kernel may write into this state: contiguous, in the dtype states are held in (or, where the
    kernel rounds it back, on a GPU, in a narrower one)."""
    if (state.dtype != wide(x) and not state.is_cuda) or not state.is_contiguous():
        raise ValueError(f"{op} updates its state in place and needs it contiguous in {wide(x)}; got {state.dtype} "
                         f"with strides {state.stride()}")  # fmt: skip


def wide(x: Tensor) -> torch.dtype:
    """The dtype sums and states are held in: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def on_device(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(rows,) int32, made once and never written: to copy it there would stop the host until a GPU has done all that
    it was given."""
    return _on_device(counts, device, torch.cuda.current_stream(device) if device.type == "cuda" else None)


@lru_cache(maxsize=256)
def _on_device(counts: tuple[int, ...], device: torch.device, stream: torch.cuda.Stream | None) -> Tensor:
    """`stream`: the one that reads it, for memory that is let go is given away in its order alone."""
    with torch.inference_mode(False):  # a later pass may need gradients of what reads it
        return torch.tensor(counts, dtype=torch.int32, device=device)


def pad_mask(pads: tuple[int, ...] | None, length: int, device: torch.device) -> Tensor | None:
    """(batch, length) bool, True on the leading pads; None where no row has any."""
    if pads is None or not any(pads):
        return None
    return torch.arange(length, device=device) < on_device(pads, device)[:, None]


def clear(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros on the pads of (batch, length, ...), whatever lies there."""
    return rows if mask is None else rows.masked_fill(mask.reshape(*mask.shape, *([1] * (rows.ndim - 2))), 0.0)
