"""The selective scan on CUDA: `selective_scan` and `selective_state_update` as `kernels/selective_scan.py` defines them."""

from __future__ import annotations

from torch import Tensor

from statespan.kernels.selective_scan_grad_triton import SelectiveScan


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
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    y, final = SelectiveScan.apply(  # type: ignore[no-untyped-call]
        x, dt, A, B, C, D, z, dt_bias, state, softplus, keep_above, dt_scale, pads
    )
    return y, final
