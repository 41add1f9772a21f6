"""One token through Mamba-1's step projection and state, from x_proj's row to the gated output.

    [low, B, C] = row;   dt = low Wᵀ;   then `selective_state_update` of x, dt, B, C with D, gate, bias and softplus

Source: as `kernels/selective_scan.py`. Ours differs: the projection to the step sizes (dt_rank wide) is read beside the
state it drives, so that dt never leaves registers. Bytes: the state once in and once out, W once a token.
"""

from __future__ import annotations

from torch import Tensor

from statespan.kernels.dispatch import expect, kernel, overridden, wide
from statespan.kernels.selective_scan import selective_state_update_ref


def selective_step_ref(
    state: Tensor, x: Tensor, row: Tensor, z: Tensor, weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> Tensor:
    """The definition, in torch. Tests call it in float64."""
    rank, d_state = weight.shape[1], A.shape[1]
    low, B, C = row.split((rank, d_state, d_state), dim=-1)
    dt = low.to(wide(x)) @ weight.to(wide(x)).T
    return selective_state_update_ref(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias)


def selective_step(
    state: Tensor, x: Tensor, row: Tensor, z: Tensor, weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, *,
    at_rest: bool = False,
) -> Tensor:  # fmt: skip
    """One token of decoding.

    Args:
        state: (batch, d_inner, d_state), contiguous, updated in place.
        x, z: (batch, d_inner), after the conv and before the gate's SiLU.
        row: (batch, dt_rank + 2 * d_state), what x_proj gives.
        weight: (d_inner, dt_rank), dt_proj's; dt_bias: (d_inner,).
        A: (d_inner, d_state), negative; D: (d_inner,).
        at_rest: nothing that the device may still be at writes the state, so it can be fetched before the kernel before
            this one has ended. So it is within a model, where a token begins with a kernel that waits for all.

    Returns:
        (batch, d_inner) like x, gated.
    """
    (batch, d_inner), (rank, d_state) = x.shape, (weight.shape[1], A.shape[1])
    expect("selective_step", "state", state, (batch, d_inner, d_state), "(batch, d_inner, d_state)")
    expect("selective_step", "row", row, (batch, rank + 2 * d_state), "(batch, dt_rank + 2 * d_state)")
    expect("selective_step", "z", z, (batch, d_inner), "like x")
    expect("selective_step", "weight", weight, (d_inner, rank), "(d_inner, dt_rank)")
    if not state.is_contiguous():
        raise ValueError("selective_step needs a contiguous state, for it is updated in place")
    if overridden() == "triton" or (overridden() is None and x.is_cuda):
        fused = kernel("selective_step", "selective_step", "triton")
        y: Tensor = fused(state, x, row, z, weight, dt_bias, A, D, at_rest=at_rest)
        return y
    return selective_step_ref(state, x, row, z, weight, dt_bias, A, D)
