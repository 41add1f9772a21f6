"""What a method works out for each row of a batch, by the row's own prompt length, kept on the device that scans."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from statespan.models.hook import ScanInputs

BATCHES = 2  # whose values are kept


class RowValues:
    """`of_row` (layer, prompt length) -> (channels,). All layers are copied at once, for each copy stops a GPU."""

    def __init__(self, n_layer: int, of_row: Callable[[int, int], Tensor]) -> None:
        self.n_layer, self.of_row = n_layer, of_row
        self._kept: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def __call__(self, layer: int, inputs: ScanInputs) -> Tensor:
        """(batch, channels), float32 or wider"""
        wide = torch.promote_types(inputs.dt.dtype, torch.float32)
        lengths = inputs.span.prompt_lengths
        key = (lengths, inputs.dt.device, wide)
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= BATCHES:
                self._kept.pop(next(iter(self._kept)))
            with torch.inference_mode(False):  # a later pass may need gradients of what they multiply
                own = {length: [self.of_row(at, length) for at in range(self.n_layer)] for length in set(lengths)}
                layers = [torch.stack([own[length][at] for length in lengths]) for at in range(self.n_layer)]
                found = self._kept[key] = torch.stack(layers).to(inputs.dt.device, wide).unbind()
        return found[layer]
