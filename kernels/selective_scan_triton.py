"""The selective scan on CUDA: what `kernels/selective_scan.py` defines, in the form that is fastest for the shape.

With gradients, the tiles of `selective_scan_grad_triton`. Without, tiles of time or a walk over all tokens, whichever a
short trial on this device finds faster for these rows x channels; see `kernels/tuning.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statespan.kernels import selective_scan_grad_triton
from statespan.kernels.selective_scan_rows_triton import Walking, scan_by_rows
from statespan.kernels.selective_scan_tiles_triton import Tiling, scan_in_tiles
from statespan.kernels.state_update_triton import selective_state_update
from statespan.kernels.tuning import fastest

__all__ = ["selective_scan", "selective_state_update"]

FORMS: tuple[Tiling | Walking, ...] = (
    Tiling(tokens=16, segments=16, channels=8, warps=4, unroll=2),
    Tiling(tokens=16, segments=16, channels=8, warps=4, unroll=1),
    Tiling(tokens=16, segments=8, channels=16, warps=4, unroll=1, registers=None),
    Tiling(tokens=16, segments=32, channels=4, warps=4, unroll=2),
    Walking(tokens=32, states=4, warps=4),
    Walking(tokens=32, states=8, warps=4),
)
TRIAL_TOKENS = 4096


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    keep_above: Tensor | None = None,
    dt_scale: Tensor | None = None,
    pads: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, dt, z (batch, length, d_inner) -> y like x, the last state (batch, d_inner, d_state) in float32."""
    extras: dict[str, Any] = {
        "D": D, "z": z, "dt_bias": dt_bias, "softplus": softplus, "keep_above": keep_above, "dt_scale": dt_scale,
        "pads": pads, "state": state,
    }  # fmt: skip
    tensors = (x, dt, A, B, C, *(v for v in extras.values() if isinstance(v, Tensor)))
    if torch.is_grad_enabled() and any(v.requires_grad for v in tensors):
        return selective_scan_grad_triton.selective_scan(x, dt, A, B, C, **extras)
    return _scan(_form(x, A), x, dt, A, B, C, **extras)


def _scan(form: Tiling | Walking, *tensors: Tensor, **extras: Any) -> tuple[Tensor, Tensor]:
    if isinstance(form, Walking):
        return scan_by_rows(*tensors, walking=form, **extras)
    return scan_in_tiles(*tensors, tiling=form, **extras)[:2]


def _form(x: Tensor, A: Tensor) -> Tiling | Walking:
    """By channels, states, dtype and the batch up to the next power of two; more than 8 rows are like 8."""
    batch = min(1 << (x.shape[0] - 1).bit_length(), 8)
    trial: list[Tensor] = []

    def run(form: Tiling | Walking) -> None:
        if not trial:
            new: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
            trial.extend(torch.randn(batch, TRIAL_TOKENS, A.shape[0], **new) for _ in range(3))
            trial.extend(torch.randn(batch, TRIAL_TOKENS, A.shape[1], **new) for _ in range(2))
        rows, dt, z, B, C = trial
        _scan(form, rows, dt, A, B, C, D=A[:, 0], z=z, dt_bias=A[:, 0])

    return fastest("selective_scan", (batch, *A.shape, str(x.dtype)[6:]), FORMS, run)
