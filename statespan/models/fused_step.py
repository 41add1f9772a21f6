"""One token of few rows through a Mamba block by fused kernels. The plain form is each mixer's `step`. On a GPU:

    Mamba-1    norm, in_proj, conv | x_proj | dt_proj, state, gate | out_proj, residual             four kernels
    Mamba-2    norm, in_proj, conv | state | gated norm, out_proj, residual                         three kernels

For one or two rows, where what counts is to read the weights without a pause. With more rows the large products are
the library's, faster there than ours. So a row's result depends, to rounding, on how many rows there are.

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
from statespan.models.mixer import Mamba1Mixer, Mamba2Mixer, Mixer, MixerState, add_product
from statespan.models.norm import RMSNorm

if TYPE_CHECKING:
    from statespan.models.lm import MambaLM

ROWS = 2
"""On a GPU up to so many: each row reads the matrices anew, from the cache after the first."""


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


def _mamba1(norm: RMSNorm, mixer: Mamba1Mixer, hidden: Tensor, state: MixerState) -> Tensor:
    rows = step_linear(
        hidden, mixer.in_proj.weight, mixer.in_proj.bias, norm=Norm(norm.weight, norm.eps), conv=_conv(mixer, state, 0)
    )
    x, z = rows.chunk(2, dim=-1)
    low = step_linear(x, mixer.x_proj.weight)
    y = _selective(mixer, state, x, low, z)
    return step_linear(y, mixer.out_proj.weight, mixer.out_proj.bias, residual=hidden)


def _mamba1_rows(norm: RMSNorm, mixer: Mamba1Mixer, hidden: Tensor, state: MixerState) -> Tensor:
    x, z = mixer.in_proj(norm(hidden)).chunk(2, dim=-1)
    x, low = step_conv_linear(state.conv, x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, mixer.x_proj.weight)
    y = _selective(mixer, state, x, low, z)
    add_product(hidden, y, mixer.out_proj)
    return hidden


def _mamba2(norm: RMSNorm, mixer: Mamba2Mixer, hidden: Tensor, state: MixerState) -> Tensor:
    config = mixer.config
    rows = step_linear(
        hidden, mixer.in_proj.weight, mixer.in_proj.bias, norm=Norm(norm.weight, norm.eps),
        conv=_conv(mixer, state, config.d_ssm),
    )  # fmt: skip
    z, xBC, dt = rows.split((config.d_ssm, config.conv_width, config.channels), dim=-1)
    y = mixer.update(state, z, xBC, dt)
    before = None
    if config.gated_norm and config.n_groups == 1 and not config.norm_before_gate:
        before = Norm(mixer.norm.weight, mixer.norm.eps, gate=z)
    elif config.gated_norm:
        y = mixer.norm(y, z)
    return step_linear(y, mixer.out_proj.weight, mixer.out_proj.bias, norm=before, residual=hidden)


def logits(model: MambaLM, hidden: Tensor) -> Tensor:
    """(batch, d_model) residual stream after the last block -> (batch, vocab_size)"""
    norm = cast(RMSNorm, model.norm_f)
    return step_linear(hidden, model.lm_head.weight, norm=Norm(norm.weight, norm.eps))
