"""The selective scan on CUDA: what `kernels/selective_scan.py` defines, in the form that is fastest for the shape.

With gradients, the tiles of `selective_scan_grad_triton`. Without, `selective_scan_ring_triton`, laid on the threads as
a short trial on this device finds fastest for these rows x channels; see `kernels/tuning.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statespan.kernels import selective_scan_grad_triton
from statespan.kernels.selective_scan_ring_layout import Ring
from statespan.kernels.selective_scan_ring_triton import scan_in_ring
from statespan.kernels.state_update_triton import selective_state_update
from statespan.kernels.triton_common import INTERPRETED
from statespan.kernels.tuning import fastest

__all__ = ["selective_scan", "selective_state_update"]

FORMS: tuple[Ring, ...] = (
    (Ring(),)
    if INTERPRETED
    else (
        Ring(lanes=2, programs=2, registers=96),
        Ring(lanes=2, warps=8, registers=96),
        Ring(lanes=1, programs=2, registers=128),
        Ring(tokens=16, lanes=2, programs=2, registers=168),
    )
)
"""For rows that are copied"""
PLAIN: tuple[Ring, ...] = (
    (Ring(),)
    if INTERPRETED
    else (Ring(lanes=4, registers=96), Ring(lanes=2, registers=128), Ring(lanes=4, warps=8, registers=96))
)
"""For those that are not: float32 ones, and 16-bit ones that are not whole pieces of 16 bytes"""
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
    return scan_in_ring(x, dt, A, B, C, **extras, ring=_form(x, dt, z, A, B))


def _form(x: Tensor, dt: Tensor, z: Tensor | None, A: Tensor, B: Tensor) -> Ring:
    """By channels, states, dtype and the batch up to the next power of two; more than 8 rows are like 8."""
    batch = min(1 << (x.shape[0] - 1).bit_length(), 8)
    rows = (v for v in (x, dt, z) if v is not None)
    copied = FORMS[0].copies(1 if B.ndim == 3 else B.shape[2], *rows)
    forms = FORMS if copied else PLAIN
    trial: list[Tensor] = []

    def run(form: Ring) -> None:
        if not trial:
            new: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
            trial.extend(torch.randn(batch, TRIAL_TOKENS, A.shape[0], **new) for _ in range(3))
            trial.extend(torch.randn(batch, TRIAL_TOKENS, A.shape[1], **new) for _ in range(2))
        x_like, dt_like, z_like, B_like, C_like = trial
        scan_in_ring(x_like, dt_like, A, B_like, C_like, D=A[:, 0], z=z_like, dt_bias=A[:, 0], ring=form)

    return fastest("selective_scan", (batch, *A.shape, str(x.dtype)[6:], copied), forms, run)
