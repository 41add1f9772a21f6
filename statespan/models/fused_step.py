"""One token of each row through Mamba blocks by fused kernels. The plain form is each mixer's `step`.

On a GPU, for one or two rows, where what counts is to read the weights without a pause:

    Mamba-1    norm, in_proj, conv | x_proj | dt_proj, state, gate | out_proj, residual             four kernels
    Mamba-2    norm, in_proj, conv | state, gate | norm, out_proj, residual                         three kernels

For some dozens, with weights of two bytes, where the products keep tensor cores busy; the norm is the next block's.
Mamba-1's in_proj is the library's: with ours and the conv behind it a step of 64 rows took 1 to 3 % longer.

    Mamba-1    in_proj | conv, x_proj | its sums | dt_proj, state, gate | out_proj's parts | sums, residual, norm
    Mamba-2    in_proj, conv | state | gated norm | out_proj's parts | sums, residual, norm

Between and above the large products are the library's. So a row's result depends, to rounding, on how many rows there
are.

    Mamba-1    norm | in_proj | conv, x_proj | its sums | dt_proj, state, gate | out_proj, residual       six kernels
    Mamba-2    the plain form: norm | in_proj | conv | state | gated norm | out_proj, residual

On a CPU, in float32, the first two forms serve any number of rows, and a row's result hangs on none beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from statespan.kernels.dispatch import overridden
from statespan.kernels.selective_scan import selective_state_update
from statespan.kernels.selective_step import selective_step
from statespan.kernels.step_conv_linear import step_conv_linear
from statespan.kernels.step_linear import Conv, Norm, step_linear
from statespan.kernels.step_rows import ROWS as MANY_ROWS
from statespan.kernels.step_rows import linear_conv, linear_norm
from statespan.models.mixer import Mamba1Mixer, Mamba2Mixer, Mixer, MixerState, add_product
from statespan.models.norm import RMSNorm

if TYPE_CHECKING:
    from statespan.models.lm import MambaLM

ROWS = 2
"""On a GPU up to so many: each row reads the matrices anew, from the cache after the first."""
MORE_ROWS = 17
"""From so many on the products for some dozens of rows, up to MANY_ROWS. A step of mamba-2.8b, with an in_proj of this
kind too, took 6 % longer at 16 rows and 4 % less long at 32. Captured steps have a power of two of rows (`step_graph`):
a bound between two of them would make 20 rows captured, as 32, another sum than 20 rows that are not."""
NARROW = (torch.bfloat16, torch.float16)
"""Weights of these; float32 has no tensor cores that keep its digits."""


def _on_gpu(norm: object, hidden: Tensor) -> bool:
    chosen = overridden()
    on_gpu = hidden.is_cuda if chosen is None else chosen == "triton"
    return on_gpu and isinstance(norm, RMSNorm) and hidden.dtype != torch.float64 and not torch.is_grad_enabled()


def _on_cpu(norm: object, hidden: Tensor) -> bool:
    """Whether CPU kernels take these rows: float32 throughout, without gradients, behind an RMS norm."""
    own = overridden() == "numba" or (overridden() is None and not hidden.is_cuda)
    return (
        own
        and isinstance(norm, RMSNorm)
        and hidden.dtype == norm.weight.dtype == torch.float32
        and not (torch.is_grad_enabled())
    )


def allowed(norm: object, hidden: Tensor) -> bool:
    """Whether norm and product run in one: few rows on a GPU, any on a CPU, without gradients, behind an RMS norm."""
    return _on_cpu(norm, hidden) or (len(hidden) <= ROWS and _on_gpu(norm, hidden))


def applies(norm: object, mixer: Mixer, hidden: Tensor) -> bool:
    """Whether this block's step has a fused form; the others take their mixer's own kernels one by one."""
    own = allowed(norm, hidden) or (isinstance(mixer, Mamba1Mixer) and _on_gpu(norm, hidden))
    return own and mixer.config.mixer_norm_eps is None and getattr(mixer, "d_mlp", 0) == 0


def rows_apart(model: MambaLM) -> bool:
    """Whether a step gives each row what it gives it alone, bit for bit: every block has the CPU's fused form."""
    blocks, hidden = model.blocks(), model.embedding.weight
    if model.around is not None or hidden.is_cuda:
        return False
    with torch.no_grad():
        fused = all(applies(block.norm, block.mixer, hidden) for block in blocks)
        return fused and _on_cpu(model.norm_f, hidden)


def step(norm: RMSNorm, mixer: Mixer, hidden: Tensor, state: MixerState) -> Tensor:
    """(batch, d_model) residual stream, which may be written over -> the same after the block; the state in place"""
    if isinstance(mixer, Mamba1Mixer):
        few = len(hidden) <= ROWS or _on_cpu(norm, hidden)
        return (_mamba1 if few else _mamba1_rows)(norm, mixer, hidden, state)
    return _mamba2(norm, cast(Mamba2Mixer, mixer), hidden, state)


def _conv(mixer: Mixer, state: MixerState, first: int) -> Conv:
    return Conv(state.conv, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, first)


def _selective(mixer: Mamba1Mixer, state: MixerState, x: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """dt_proj and the state. It is at rest: since a token before wrote it, the embedding waited for all there was."""
    weight, bias = mixer.dt_proj.weight, mixer.dt_proj.bias
    if not x.is_cuda and overridden() != "triton":
        config = mixer.config
        row, B, C = low.split((config.dt_rank, config.d_state, config.d_state), dim=-1)
        dt = step_linear(row, weight)
        return selective_state_update(state.ssm, x, dt, mixer.A(), B, C, D=mixer.D, z=z, dt_bias=bias)
    return selective_step(state.ssm, x, low, z, weight, bias, mixer.A(), mixer.D, at_rest=True)


def in_rows(model: MambaLM, hidden: Tensor) -> bool:
    """Whether the whole step of these rows is `step_rows`."""
    block, config = model.blocks()[0], model.config
    fits = MORE_ROWS <= len(hidden) <= MANY_ROWS and model.dtype in NARROW and hidden.is_contiguous()
    plain = not config.bias and config.mixer_norm_eps is None and getattr(block.mixer, "d_mlp", 0) == 0
    return fits and plain and _on_gpu(block.norm, hidden)


def step_rows(model: MambaLM, states: list[MixerState], hidden: Tensor) -> Tensor:
    """(batch, d_model) residual stream, written over -> what the final norm makes of it behind all blocks; states in
    place"""
    blocks = model.blocks()
    norms = [cast(RMSNorm, norm) for norm in (*(block.norm for block in blocks), model.norm_f)]
    normed: Tensor = norms[0](hidden)
    for block, state, norm in zip(blocks, states, norms[1:], strict=True):
        y = _mix_rows(block.mixer, normed, state)
        normed = linear_norm(hidden, y, block.mixer.out_proj.weight, norm.weight, norm.eps)
    return normed


def _mix_rows(mixer: Mixer, normed: Tensor, state: MixerState) -> Tensor:
    """What out_proj reads, as `mix_step`."""
    if isinstance(mixer, Mamba1Mixer):
        return _mix_mamba1(mixer, normed, state)
    mixer = cast(Mamba2Mixer, mixer)
    config = mixer.config
    rows = linear_conv(normed, mixer.in_proj.weight, _conv(mixer, state, config.d_ssm))
    z, xBC, dt = rows.split((config.d_ssm, config.conv_width, config.channels), dim=-1)
    y = mixer.update(state, z, xBC, dt)
    return mixer.norm(y, z) if config.gated_norm else y


def _mamba1(norm: RMSNorm, mixer: Mamba1Mixer, hidden: Tensor, state: MixerState) -> Tensor:
    rows = step_linear(
        hidden, mixer.in_proj.weight, mixer.in_proj.bias, norm=Norm(norm.weight, norm.eps), conv=_conv(mixer, state, 0)
    )
    x, z = rows.chunk(2, dim=-1)
    low = step_linear(x, mixer.x_proj.weight)
    y = _selective(mixer, state, x, low, z)
    return step_linear(y, mixer.out_proj.weight, mixer.out_proj.bias, residual=hidden)


def _mamba1_rows(norm: RMSNorm, mixer: Mamba1Mixer, hidden: Tensor, state: MixerState) -> Tensor:
    add_product(hidden, _mix_mamba1(mixer, norm(hidden), state), mixer.out_proj)
    return hidden


def _mix_mamba1(mixer: Mamba1Mixer, normed: Tensor, state: MixerState) -> Tensor:
    x, z = mixer.in_proj(normed).chunk(2, dim=-1)
    x, low = step_conv_linear(state.conv, x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, mixer.x_proj.weight)
    return _selective(mixer, state, x, low, z)


def _mamba2(norm: RMSNorm, mixer: Mamba2Mixer, hidden: Tensor, state: MixerState) -> Tensor:
    config = mixer.config
    rows = step_linear(
        hidden, mixer.in_proj.weight, mixer.in_proj.bias, norm=Norm(norm.weight, norm.eps),
        conv=_conv(mixer, state, config.d_ssm),
    )  # fmt: skip
    z, xBC, dt = rows.split((config.d_ssm, config.conv_width, config.channels), dim=-1)
    splits = config.gated_norm and config.n_groups == 1 and not config.norm_before_gate
    y = mixer.update(state, z, xBC, dt, gate_now=splits)
    before = Norm(mixer.norm.weight, mixer.norm.eps) if splits else None
    if config.gated_norm and not splits:
        y = mixer.norm(y, z)
    return step_linear(y, mixer.out_proj.weight, mixer.out_proj.bias, norm=before, residual=hidden)


def logits(model: MambaLM, hidden: Tensor) -> Tensor:
    """(batch, d_model) residual stream after the last block -> (batch, vocab_size)"""
    norm = cast(RMSNorm, model.norm_f)
    return step_linear(hidden, model.lm_head.weight, norm=Norm(norm.weight, norm.eps))
