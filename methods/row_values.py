"""What a method works out for each row of a batch, by the row's own prompt length, kept on the device that scans."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from statespan.models.hook import ScanInputs


class RowValues:
    """`of_row` (layer, prompt length) -> (channels,). To copy it for every chunk would stop a GPU each time."""

    def __init__(self, n_layer: int, of_row: Callable[[int, int], Tensor]) -> None:
        self.of_row, self.most = of_row, 2 * n_layer  # the layers of two batches
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, layer: int, inputs: ScanInputs) -> Tensor:
        """(batch, channels), float32 or wider"""
        wide = torch.promote_types(inputs.dt.dtype, torch.float32)
        key = (layer, inputs.span.prompt_lengths, inputs.dt.device, wide)
        if key not in self._kept:
            if len(self._kept) >= self.most:
                self._kept.pop(next(iter(self._kept)))
            with torch.inference_mode(False):  # a later pass may need gradients of what they multiply
                rows = [self.of_row(layer, length) for length in inputs.span.prompt_lengths]
                self._kept[key] = torch.stack(rows).to(inputs.dt.device, wide)
        return self._kept[key]
