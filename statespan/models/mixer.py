"""The Mamba-1 (S6) and Mamba-2 (SSD) mixers, each cut in two at the hook: `project`, then `scan`.

Symbols follow the papers (arXiv:2312.00752, Algorithm 2; arXiv:2405.21060, section 7) and the released checkpoints'
parameter names. Every tensor at a function's boundary is (batch, length, width).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from statespan.kernels.causal_conv import causal_conv, causal_conv_update
from statespan.kernels.dispatch import wide
from statespan.kernels.selective_scan import selective_scan, selective_state_update
from statespan.kernels.ssd import ssd, ssd_state_update
from statespan.kernels.ssd_window import Window, laid_out, ssd_window_step
from statespan.models.config import ModelConfig
from statespan.models.hook import ScanInputs, Span
from statespan.models.norm import GatedRMSNorm, rms_norm


@dataclass(slots=True)
class MixerState:
    """What one layer carries from token to token. Updated in place while decoding.

    conv: (batch, d_conv - 1, conv_width), the last inputs of the conv, oldest first
    ssm: (batch, d_inner, d_state) for Mamba-1, (batch, heads, head_dim, d_state) for Mamba-2; float32 or wider
    window: in a captured step of Mamba-2, the tokens since ssm was written, which then has head_dim dense in memory;
    copies have the tokens in ssm, and that contiguous
    """

    conv: Tensor
    ssm: Tensor
    window: Window | None = None

    def rows(self, index: Tensor) -> MixerState:
        ssm = self.ssm[index]
        return MixerState(self.conv[index], ssm if self.window is None else self.window.rows(index).settled(ssm))

    def clone(self) -> MixerState:
        return MixerState(self.conv.clone(), self.ssm.clone() if self.window is None else self.window.settled(self.ssm))

    @property
    def bytes(self) -> int:
        return self.conv.nbytes + self.ssm.nbytes + (0 if self.window is None else self.window.bytes)

    @staticmethod
    def join(states: list[MixerState]) -> MixerState:
        return MixerState(torch.cat([s.conv for s in states]), torch.cat([s.ssm for s in states]))


class Mixer(nn.Module):
    """What the two mixers share: the conv, the decay rates and the state."""

    A_log: nn.Parameter
    D: nn.Parameter
    conv1d: nn.Conv1d
    out_proj: nn.Linear

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._rates: tuple[tuple[object, ...], Tensor, Tensor] | None = None
        width = config.conv_width
        self.conv1d = nn.Conv1d(width, width, config.d_conv, groups=width, bias=config.conv_bias)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=config.bias)

    def A(self) -> Tensor:
        """Decay rates, negative, in float32 or wider. Without gradients they are worked out once for these A_log."""
        if torch.is_grad_enabled() and self.A_log.requires_grad:
            return _rates(self.A_log)
        source = self.A_log.detach()
        version = 0 if source.is_inference() else source._version
        of = (source.data_ptr(), version, source.dtype, source.device)
        # the source is kept, so that no other tensor can come to lie at its address
        if self._rates is None or self._rates[0] != of or source.is_meta:
            with torch.inference_mode(False), torch.no_grad():  # a later pass may need gradients of what reads it
                self._rates = (of, source, _rates(source))
        return self._rates[2]

    def _conv(self, x: Tensor, span: Span, state: Tensor | None) -> tuple[Tensor, Tensor]:
        pads = span.pads(x.shape[1])
        return causal_conv(
            x,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            pads=pads if any(pads) else None,
            state=state,
        )

    def _conv_step(self, x: Tensor, state: Tensor) -> Tensor:
        return causal_conv_update(state, x, self.conv1d.weight[:, 0], self.conv1d.bias)

    def project(self, hidden: Tensor, span: Span, conv_state: Tensor | None) -> tuple[ScanInputs, Tensor]:
        """(batch, length, d_model) -> what the scan reads, and the conv's state after the chunk"""
        raise NotImplementedError

    def mix(self, inputs: ScanInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the scan reads -> what out_proj reads (batch, length, d_inner), and the scan's state after the chunk"""
        raise NotImplementedError

    def scan(self, inputs: ScanInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the scan reads -> (batch, length, d_model), and the scan's state after the chunk"""
        y, state = self.mix(inputs, state)
        return self.out_proj(y), state

    def scan_onto(self, stream: Tensor, inputs: ScanInputs, state: Tensor | None) -> Tensor:
        """`scan`, its output added to the residual stream where it stands. Gives the scan's state after the chunk."""
        y, state = self.mix(inputs, state)
        add_product(stream, y, self.out_proj)
        return state

    def step(self, hidden: Tensor, state: MixerState) -> Tensor:
        """One token: (batch, d_model) -> (batch, d_model); the state is updated in place"""
        out: Tensor = self.out_proj(self.mix_step(hidden, state))
        return out

    def mix_step(self, hidden: Tensor, state: MixerState) -> Tensor:
        """One token: (batch, d_model) -> what out_proj reads (batch, d_inner); the state is updated in place"""
        raise NotImplementedError

    def open_window(self, state: MixerState, length: int, count: Tensor) -> bool:
        """Give this state an empty window, if the mixer's steps can do with one; `count` as `Window` has it."""
        return False


def add_product(stream: Tensor, rows: Tensor, linear: nn.Linear) -> None:
    """stream += linear(rows), in place; on a GPU the product's own last step adds to a float32 stream, unrounded."""
    narrow = rows.dtype in (torch.bfloat16, torch.float16) and stream.dtype == torch.float32
    if stream.is_cuda and narrow and linear.bias is None and stream.is_contiguous():
        flat = stream.view(-1, stream.shape[-1])
        torch.addmm(flat, rows.flatten(0, -2), linear.weight.T, out_dtype=torch.float32, out=flat)
    else:
        stream.add_(linear(rows))


def _rates(A_log: Tensor) -> Tensor:
    return -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()


def _pads(inputs: ScanInputs) -> tuple[int, ...] | None:
    pads = inputs.span.pads(inputs.length)
    return pads if any(pads) else None


class Mamba1Mixer(Mixer):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d_inner, d_state, dt_rank = config.d_inner, config.d_state, config.dt_rank
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=config.bias)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Conv output -> dt before bias, B, C"""
        config = self.config
        low, B, C = self.x_proj(x).split((config.dt_rank, config.d_state, config.d_state), dim=-1)
        if config.mixer_norm_eps is not None:
            low, B, C = (rms_norm(part, None, config.mixer_norm_eps).to(x.dtype) for part in (low, B, C))
        return low @ self.dt_proj.weight.T, B, C

    def project(self, hidden: Tensor, span: Span, conv_state: Tensor | None) -> tuple[ScanInputs, Tensor]:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)  # (batch, length, d_inner) each
        x, conv_state = self._conv(x, span, conv_state)
        dt, B, C = self._split(x)
        bias = self.dt_proj.bias
        return ScanInputs(x=x, z=z, dt=dt, B=B, C=C, dt_bias=bias, A=self.A(), span=span), conv_state

    def mix(self, inputs: ScanInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state = selective_scan(
            inputs.x,
            inputs.dt,
            inputs.A,
            inputs.B,
            inputs.C,
            D=self.D,
            z=inputs.z,
            dt_bias=inputs.dt_bias,
            keep_above=inputs.keep_above,
            dt_scale=inputs.dt_scale,
            pads=_pads(inputs),
            state=state,
        )
        return y, state

    def mix_step(self, hidden: Tensor, state: MixerState) -> Tensor:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = self._conv_step(x, state.conv)
        dt, B, C = self._split(x)
        return selective_state_update(state.ssm, x, dt, self.A(), B, C, D=self.D, z=z, dt_bias=self.dt_proj.bias)


class Mamba2Mixer(Mixer):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        heads = config.channels
        self.d_mlp = config.d_inner - config.d_ssm
        self.in_proj = nn.Linear(
            config.d_model, 2 * self.d_mlp + config.d_ssm + config.conv_width + heads, bias=config.bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.arange(1.0, heads + 1).log())
        self.D = nn.Parameter(torch.ones(config.d_ssm if config.D_has_head_dim else heads))
        if config.gated_norm:
            eps = config.norm_eps if config.gated_norm_eps is None else config.gated_norm_eps
            self.norm = GatedRMSNorm(config.d_ssm, eps, config.n_groups, config.norm_before_gate)

    def _split(self, hidden: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """in_proj's rows are [z0, x0, z, xBC, dt] -> gated MLP branch or None, z, xBC, dt"""
        config, d_mlp = self.config, self.d_mlp
        z0, x0, z, xBC, dt = self.in_proj(hidden).split(
            (d_mlp, d_mlp, config.d_ssm, config.conv_width, config.channels), dim=-1
        )
        return (nn.functional.silu(z0) * x0 if d_mlp else None), z, xBC, dt

    def _parts(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = self.config.n_groups * self.config.d_state
        x, B, C = xBC.split((self.config.d_ssm, groups, groups), dim=-1)
        return x, B, C

    def _heads(self, rows: Tensor) -> Tensor:
        heads: Tensor = rows.unflatten(-1, (self.config.channels, self.config.head_dim))
        return heads

    def _D(self) -> Tensor:
        return self._heads(self.D) if self.config.D_has_head_dim else self.D

    def _finish(self, y: Tensor, z: Tensor, bypass: Tensor | None) -> Tensor:
        y = self.norm(y, z) if self.config.gated_norm else y
        return y if bypass is None else torch.cat((bypass, y), dim=-1)

    def project(self, hidden: Tensor, span: Span, conv_state: Tensor | None) -> tuple[ScanInputs, Tensor]:
        bypass, z, xBC, dt = self._split(hidden)
        xBC, conv_state = self._conv(xBC, span, conv_state)
        x, B, C = self._parts(xBC)
        inputs = ScanInputs(
            x=x,
            z=z,
            dt=dt,
            B=B,
            C=C,
            dt_bias=self.dt_bias,
            A=self.A(),
            span=span,
            dt_limit=self.config.dt_limit,
            n_groups=self.config.n_groups,
            bypass=bypass,
        )
        return inputs, conv_state

    def mix(self, inputs: ScanInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
        groups = (self.config.n_groups, self.config.d_state)
        y, state = ssd(
            self._heads(inputs.x),
            inputs.dt,
            inputs.A,
            inputs.B.unflatten(-1, groups),
            inputs.C.unflatten(-1, groups),
            D=self._D(),
            z=None if self.config.gated_norm else self._heads(inputs.z),
            dt_bias=inputs.dt_bias,
            dt_limit=inputs.dt_limit,
            keep_above=inputs.keep_above,
            dt_scale=inputs.dt_scale,
            pads=_pads(inputs),
            state=state,
        )
        return self._finish(y.flatten(-2), inputs.z, inputs.bypass), state

    def mix_step(self, hidden: Tensor, state: MixerState) -> Tensor:
        bypass, z, xBC, dt = self._split(hidden)
        y = self.update(state, z, self._conv_step(xBC, state.conv), dt)
        return self._finish(y, z, bypass)

    def update(self, state: MixerState, z: Tensor, xBC: Tensor, dt: Tensor, gate_now: bool = False) -> Tensor:
        """One token's conv output through the state, in place -> (batch, d_ssm), gated unless the gated norm follows.

        With `gate_now` gated in any case, and in float32 or wider: what is left of that norm is a plain one.
        """
        x, B, C = self._parts(xBC)
        groups = (self.config.n_groups, self.config.d_state)
        rows = (self._heads(x), dt, self.A(), B.unflatten(-1, groups), C.unflatten(-1, groups))
        gate = self._heads(z) if gate_now or not self.config.gated_norm else None
        D, bias, limit, kind = self._D(), self.dt_bias, self.config.dt_limit, wide(x) if gate_now else None
        if state.window is None:
            # at rest: since a token before wrote the state, the embedding waited for all there was
            y = ssd_state_update(
                state.ssm, *rows, D=D, z=gate, dt_bias=bias, dt_limit=limit, out_dtype=kind, at_rest=True
            )
        else:
            y = ssd_window_step(
                state.ssm, state.window, *rows, D=D, z=gate, dt_bias=bias, dt_limit=limit, out_dtype=kind
            )
        return y.flatten(-2)

    def open_window(self, state: MixerState, length: int, count: Tensor) -> bool:
        state.ssm = laid_out(state.ssm)
        state.window = Window.beside(state.ssm, length, self.config.n_groups, state.conv.dtype, count)
        return True


MIXERS: dict[str, type[Mixer]] = {"mamba1": Mamba1Mixer, "mamba2": Mamba2Mixer}
