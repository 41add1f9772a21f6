"""Launching a kernel again without working out again which binary runs.

`kernel[grid](...)` of triton.jit asks of each argument what it could be specialised on, spells the answer out as a key
and looks the binary up, at every call: 24 us for a kernel of fifteen arguments, 108 for one of fifty with tensor
descriptors, where handing over the binary's arguments takes 5 and 16 (Triton 3.6, one core of an EPYC). A `relaunched`
kernel remembers the binary itself. Its key is finer than Triton's: of a tensor the dtype and whether it begins at a
multiple of 16 bytes, of an integer its value, of a descriptor dtype and block, of other numbers and None the type, all
constants and options by name and type (True is 1 to a dictionary, not to a kernel), and the device, which holds the
binary. So it can only ask Triton more often than needed, never take a binary that Triton would not; only settings of
Triton itself, changed while the process runs, reach the kernels that are launched for the first time. The binary then
goes by Triton's own way for compiled kernels, `compiled[grid](...)`, to the stream that is current at the call. No
tensor is kept, and threads share a kernel as they share a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from statespan.kernels.triton_common import INTERPRETED

KEPT = 1024  # binaries by their arguments, of one kernel: every length of a prompt is another entry


class Relaunched:
    """A kernel of triton.jit: tensors, numbers and descriptors by place, constexprs and options by name."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._constants = [p.name for p in kernel.params if p.is_constexpr]
        self._arguments = len(kernel.params) - len(self._constants)
        self._known: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        key = (*kinds(arguments), *named, *named.values(), *map(type, named.values()), torch.cuda.current_device())
        known = self._known.get(key)
        if known is None:
            assert len(arguments) == self._arguments, "constexprs go by name, all else by place"
            compiled = self.kernel[grid](*arguments, **named)
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[key] = (compiled, [named[name] for name in self._constants])
        else:
            compiled, constants = known
            compiled[grid if len(grid) == 3 else (*grid, 1, 1)](*arguments, *constants)


def kinds(arguments: tuple[Any, ...]) -> list[Any]:
    """All that can decide how a kernel is compiled for them, and more."""
    return [
        (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, Tensor) else a if type(a) is int else _kind(a)
        for a in arguments
    ]


def _kind(argument: Any) -> Any:
    """The same of what is neither a tensor nor an integer."""
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    if argument is None or isinstance(argument, bool | float):
        return type(argument)
    raise TypeError(f"a kernel takes tensors, descriptors and Python's numbers; got a {type(argument).__name__}")


def relaunched(kernel: Any) -> Any:
    """`kernel`, launched the short way; what Triton's interpreter runs stays as it is."""
    return kernel if INTERPRETED else Relaunched(kernel)
