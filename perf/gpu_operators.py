"""What is measured: for each GPU kernel its reference, variants, inputs to check and to time, cost, and peer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.bench import Inputs, Kernel, Operator
from statespan.kernels import (
    causal_conv_triton,
    rms_norm,
    rms_norm_triton,
    selective_scan_triton,
    ssd_triton,
    state_update_triton,
)
from statespan.kernels.causal_conv import causal_conv_ref
from statespan.kernels.selective_scan import selective_scan_ref, selective_state_update_ref
from statespan.kernels.selective_scan_grad_triton import selective_scan as scan_with_gradients
from statespan.kernels.selective_scan_ring_layout import Ring
from statespan.kernels.selective_scan_ring_triton import scan_in_ring
from statespan.kernels.ssd import ssd_chunked, ssd_state_update_ref
from statespan.kernels.ssd_triton import Chunking
from statespan.kernels.token_importance import token_importance_ref
from statespan.kernels.token_importance_triton import token_importance

BF16 = torch.bfloat16


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def uniform(*shape: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(*shape, device="cuda")


def first(count: int, kernel: Kernel) -> Kernel:
    """The kernel's first `count` outputs."""
    return lambda **inputs: kernel(**inputs)[:count]


def one(kernel: Callable[..., Tensor]) -> Kernel:
    """A kernel of one output, as a kernel of several."""
    return lambda **inputs: (kernel(**inputs),)


# the selective scan of Mamba-1


def between_steps(dt: Tensor, dt_bias: Tensor) -> Tensor:
    """Thresholds (batch, channels) for `keep_above`, each in the widest gap between the middle half of its channel's
    steps: a step within rounding of its threshold is kept in one precision and dropped in another."""
    steps = F.softplus(dt.double() + dt_bias.double()).sort(dim=1).values
    length = steps.shape[1]
    if length < 4:
        return (steps[:, 0] / 2).float()
    middle = steps[:, length // 4 : length - length // 4]
    below = middle.diff(dim=1).argmax(dim=1, keepdim=True)
    return ((middle.gather(1, below) + middle.gather(1, below + 1)) / 2)[:, 0].float()


def scan_inputs(
    batch: int, length: int, d_inner: int, *, d_state: int = 16, dtype: torch.dtype = BF16, full: bool = False
) -> Inputs:
    """Random inputs with Mamba's own magnitudes: A in [-16, -0.5], step sizes about 0.1. `full` adds all the extras."""
    inputs: Inputs = {name: new(batch, length, d_inner, dtype=dtype) for name in ("x", "dt", "z")}
    inputs |= {name: new(batch, length, d_state, dtype=dtype) for name in ("B", "C")}
    inputs |= {"A": uniform(d_inner, d_state, low=-16, high=-0.5), "D": new(d_inner), "dt_bias": new(d_inner) - 2}
    if full:
        inputs |= {"state": new(batch, d_inner, d_state)}
        inputs |= {"keep_above": between_steps(inputs["dt"], inputs["dt_bias"])}
        inputs |= {"dt_scale": uniform(batch, d_inner, low=0.5, high=1.5)}
        inputs |= {"pads": tuple((7 * row) % (length + 1) for row in range(batch))}
    return inputs


def with_state(batch: int, length: int, d_inner: int) -> Inputs:
    """One token with no state before it would leave A without a gradient to compare."""
    return scan_inputs(batch, length, d_inner) | {"state": new(batch, d_inner, 16)}


def filtered(**shape: int) -> Inputs:
    """With LongMamba's threshold, for the cost of the filter."""
    inputs = scan_inputs(**shape)
    return inputs | {"keep_above": uniform(shape["batch"], shape["d_inner"], low=0, high=0.2)}


def scan_cost(inputs: Inputs) -> dict[str, float]:
    moved = sum(inputs[name].nbytes for name in ("x", "dt", "z", "B", "C")) + inputs["x"].nbytes
    return {"bytes": moved, "exponentials": inputs["x"].numel() * inputs["A"].shape[1]}


def rings() -> dict[str, Kernel]:
    return {name_of(ring): partial(scan_in_ring, ring=ring) for ring in selective_scan_triton.FORMS}


def name_of(ring: Ring) -> str:
    """As in T8 L2 W2x4 R200: tokens, lanes, warps x programs, registers"""
    return f"T{ring.tokens} L{ring.lanes} W{ring.warps}x{ring.programs} R{ring.registers}"


def far_apart(make: Callable[..., Inputs], name: str, row: int, **shape: Any) -> Inputs:
    """Inputs of which one tensor's rows lie so far apart that its offsets pass 2**31."""
    inputs = make(**shape)
    close = inputs[name]
    wide = torch.empty(*close.shape[:2], row, dtype=close.dtype, device="cuda")
    spread = wide[..., : close[0, 0].numel()].unflatten(-1, close.shape[2:])
    spread.copy_(close)
    assert spread.stride(1) * close.shape[1] > 2**31
    return inputs | {name: spread}


def selective_scan() -> Operator:
    checks: dict[str, Callable[[], Inputs]] = {
        "everything": partial(scan_inputs, 3, 300, 112, full=True),
        "everything float16": partial(scan_inputs, 3, 300, 112, full=True, dtype=torch.float16),
        "everything float32": partial(scan_inputs, 2, 517, 75, full=True, dtype=torch.float32),
        **{f"length {n}": partial(scan_inputs, 1, n, 48) for n in (1, 2047, 2048, 2049)},
        "length 65537, offsets past 2**31": partial(
            far_apart, scan_inputs, "x", 40_960, batch=1, length=65_537, d_inner=32
        ),
    }
    shapes: dict[str, Callable[[], Inputs]] = {
        f"{d_inner} x {length} x {batch}": partial(scan_inputs, batch, length, d_inner)
        for d_inner, length, batch in [(5120, 8192, 1), (5120, 8192, 4), (1536, 8192, 1), (1536, 4096, 8)]
    }
    shapes["5120 x 8192 x 1 filter"] = partial(filtered, batch=1, length=8192, d_inner=5120)
    variants = rings()
    recorded = {"5120 x 8192 x 1": 0.93, "5120 x 8192 x 4": 3.38, "1536 x 8192 x 1": 0.28, "1536 x 4096 x 8": 0.89}
    return Operator(
        "selective_scan", selective_scan_ref, variants, checks, shapes, scan_cost, _peer_scan(), recorded=recorded
    )


def _channels_first(inputs: Inputs, kept: dict[int, list[Tensor]]) -> list[Tensor]:
    """x, dt, z, B, C as mamba_ssm wants them, made once for each set of inputs."""
    key = id(inputs["x"])
    if key not in kept:
        kept.clear()
        # x itself is kept too, so that its id stays its own
        kept[key] = [*(inputs[name].mT.contiguous() for name in ("x", "dt", "z", "B", "C")), inputs["x"]]
    return kept[key][:5]


def _peer_scan() -> dict[str, Kernel]:
    """mamba_ssm's forward, where its extension can be loaded."""
    try:
        import selective_scan_cuda
    except ImportError:
        return {}
    kept: dict[int, list[Tensor]] = {}

    def forward(**v: Any) -> tuple[Tensor, ...]:
        x, dt, z, B, C = _channels_first(v, kept)
        out: tuple[Tensor, ...] = selective_scan_cuda.fwd(
            x, dt, v["A"], B[:, None], C[:, None], v["D"], z, v["dt_bias"], True
        )
        return out

    return {"mamba_ssm": forward}


# its gradient


def backward_of(scan: Kernel) -> Kernel:
    """All gradients for a fixed random dL/dy. The graph is kept, so that repeated calls are the backward alone."""
    kept: dict[int, tuple[Tensor, list[Tensor], Tensor, Tensor]] = {}

    def gradients(**inputs: Any) -> tuple[Tensor, ...]:
        key = id(inputs["x"])
        if key not in kept:
            kept.clear()
            leaves = {k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
            y = scan(**leaves)[0]
            random = torch.Generator("cuda").manual_seed(0)
            # the same numbers for the reference, whatever its dtype
            weight = torch.randn(y.shape, generator=random, device="cuda").to(BF16).to(y.dtype)
            # x itself is kept too, so that its id stays its own
            kept[key] = y, [v for v in leaves.values() if isinstance(v, Tensor)], weight, inputs["x"]
        y, wanted, weight, _ = kept[key]
        return torch.autograd.grad(y, wanted, weight, retain_graph=True)

    return gradients


def _peer_backward() -> dict[str, Kernel]:
    try:
        import selective_scan_cuda
    except ImportError:
        return {}
    kept: dict[int, list[Tensor]] = {}
    saved: dict[int, list[Tensor]] = {}

    def backward(**v: Any) -> tuple[Tensor, ...]:
        x, dt, z, B, C = _channels_first(v, kept)
        operands = (x, dt, v["A"], B[:, None], C[:, None], v["D"], z, v["dt_bias"])
        if id(x) not in saved:
            saved.clear()
            saved[id(x)] = [*selective_scan_cuda.fwd(*operands, True), torch.randn_like(x)]
        out, states, _, dout = saved[id(x)]
        grads: tuple[Tensor, ...] = selective_scan_cuda.bwd(*operands, dout, states, out, None, True, False)
        return grads

    return {"mamba_ssm": backward}


def selective_scan_backward() -> Operator:
    def cost(inputs: Inputs) -> dict[str, float]:
        elements = inputs["x"].numel()
        return {"bytes": 7 * inputs["x"].nbytes, "exponentials": elements * inputs["A"].shape[1]}

    checks: dict[str, Callable[[], Inputs]] = {
        f"length {n}": partial(with_state, batch, n, d_inner)
        for batch, n, d_inner in [(1, 1, 48), (2, 257, 48), (1, 2049, 32)]
    }
    shapes: dict[str, Callable[[], Inputs]] = {
        "5120 x 8192 x 1": partial(scan_inputs, 1, 8192, 5120),
        "512 x 1024 x 16": partial(scan_inputs, 16, 1024, 512),
    }
    rel = {torch.float32: 1e-2, BF16: 1e-2}  # y and dL/dy are bf16, and gradients of B and C sum over all channels
    variants: dict[str, Kernel] = {"associative": backward_of(scan_with_gradients)}
    return Operator(
        "selective_scan bwd", backward_of(selective_scan_ref), variants, checks, shapes, cost, _peer_backward(), rel
    )


# the scan of Mamba-2


def ssd_inputs(
    batch: int, length: int, heads: int = 80, head_dim: int = 64, d_state: int = 128, *, full: bool = False,
    padded: bool = True, dtype: torch.dtype = BF16,
) -> Inputs:  # fmt: skip
    inputs: Inputs = {
        "x": new(batch, length, heads, head_dim, dtype=dtype),
        "dt": new(batch, length, heads, dtype=dtype),
    }
    inputs |= {name: new(batch, length, 1, d_state, dtype=dtype) for name in ("B", "C")}
    inputs |= {"A": uniform(heads, low=-16, high=-1), "D": new(heads), "dt_bias": new(heads) - 4}
    if full:
        inputs |= {"z": new(batch, length, heads, head_dim, dtype=dtype), "state": new(batch, heads, head_dim, d_state)}
        inputs |= {"keep_above": between_steps(inputs["dt"], inputs["dt_bias"]), "dt_limit": (0.001, 1.0)}
        inputs |= {"dt_scale": uniform(batch, heads, low=0.5, high=1.5)}
    if full and padded:
        inputs |= {"pads": tuple(9 * row for row in range(batch))}
    return inputs


def ssd_cost(inputs: Inputs) -> dict[str, float]:
    """Products of chunks of 64, the causal half counted; x, y, B, C and dt once."""
    (batch, length, heads, head_dim), d_state = inputs["x"].shape, inputs["B"].shape[-1]
    flops = (
        2 * batch * length * heads * (2 * head_dim * d_state + 64 * head_dim / 2) + 2 * batch * length * 64 * d_state
    )
    moved = 2 * inputs["x"].nbytes + sum(inputs[name].nbytes for name in ("B", "C", "dt"))
    return {"bytes": moved, "flops": flops}


def ssd() -> Operator:
    checks: dict[str, Callable[[], Inputs]] = {
        "everything": partial(ssd_inputs, 2, 301, 4, 64, 128, full=True),
        "odd sizes": partial(ssd_inputs, 1, 200, 3, 40, 48, full=True),
        "everything float32": partial(ssd_inputs, 2, 130, 2, 64, 64, full=True, dtype=torch.float32),
        "whole intervals of a batch": partial(ssd_inputs, 3, 384, 4, full=True, padded=False),
        "all but pads": partial(ssd_inputs, 1, 1000, 4, full=True, padded=False),
        **{f"length {n}": partial(ssd_inputs, 1, n, 2) for n in (1, 2047, 2048, 2049)},
        "length 262145, offsets past 2**31": partial(
            far_apart, ssd_inputs, "x", 8_448, batch=1, length=262_145, heads=2
        ),
    }
    shapes: dict[str, Callable[[], Inputs]] = {
        f"80 x 64, {length} x {batch}": partial(ssd_inputs, batch, length)
        for length, batch in [(8192, 1), (32_768, 1), (8192, 4), (131_072, 1)]
    }
    variants: dict[str, Kernel] = {}
    for name, chunking in {
        "blocks": Chunking(), "row by row": Chunking(blocks=False), "blocks, 3 stages": Chunking(stages=3),
        "blocks, 1 stage": Chunking(stages=1), "blocks, 1 stage, 168": Chunking(stages=1, registers=168, resident=396),
        "blocks, 3 segments": Chunking(segment=4096), "blocks, 128 tokens": Chunking(chunk=128, warps=8, resident=132),
        "blocks, half heads": Chunking(columns=32, resident=396),
    }.items():  # fmt: skip
        variants[name] = partial(ssd_triton.ssd, chunking=chunking)
    rel = {torch.float32: 6e-3, BF16: 6e-3}  # bf16 operands; float32 inputs are held to 1e-4 by tests
    recorded = dict(zip(shapes, (0.79, 1.61, 1.62, 7.41), strict=True))
    return Operator("ssd", ssd_chunked, variants, checks, shapes, ssd_cost, _peer_ssd(), rel, recorded)


def _peer_ssd() -> dict[str, Kernel]:
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return {}

    def forward(**v: Any) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = mamba_chunk_scan_combined(
            v["x"], v["dt"], v["A"], v["B"], v["C"], 256, D=v["D"], dt_bias=v["dt_bias"], dt_softplus=True,
            return_final_states=True,
        )  # fmt: skip
        return out

    return {"mamba_ssm": forward}


# around the scans


def causal_conv() -> Operator:
    def inputs(batch: int, length: int, width: int, full: bool = False) -> Inputs:
        found: Inputs = {"x": new(batch, length, 2 * width, dtype=BF16)[..., :width], "weight": new(width, 4) / 2}
        found["bias"] = new(width)
        return found | ({"state": new(batch, 3, width, dtype=BF16), "pads": (5,) * batch} if full else {})

    checks = {f"length {n}": partial(inputs, 2, n, 112, full=n > 5) for n in (1, 2, 517)}
    shapes = {"5120 x 8192 x 1": partial(inputs, 1, 8192, 5120), "5120 x 8192 x 4": partial(inputs, 4, 8192, 5120)}
    variants: dict[str, Kernel] = {
        f"{tokens} tokens x {width}, {warps} warps": partial(conv_in, tokens, width, warps)
        for tokens, width, warps in [
            (64, 256, 2),
            (64, 256, 1),
            (32, 256, 2),
            (128, 256, 2),
            (64, 512, 2),
            (64, 128, 1),
        ]
    }
    return Operator(
        "causal_conv", causal_conv_ref, variants, checks, shapes, lambda v: {"bytes": 2 * v["x"].numel() * 2}
    )


def conv_in(tokens: int, width: int, warps: int, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The convolution by programs of this size"""
    causal_conv_triton.WALK_T, causal_conv_triton.WALK_W, causal_conv_triton.WALK_WARPS = tokens, width, warps
    return causal_conv_triton.causal_conv(**inputs)


def state_update() -> Operator:
    def inputs(batch: int, d_inner: int) -> Inputs:
        found: Inputs = {name: new(batch, d_inner, dtype=BF16) for name in ("x", "dt", "z")}
        found |= {name: new(batch, 16, dtype=BF16) for name in ("B", "C")}
        found |= {"A": uniform(d_inner, 16, low=-16, high=-0.5), "D": new(d_inner), "dt_bias": new(d_inner) - 2}
        return found | {"state": new(batch, d_inner, 16)}

    shapes = {f"5120 x {batch}": partial(inputs, batch, 5120) for batch in (1, 64)}
    return Operator(
        "state update", on_copy(selective_state_update_ref),
        {"triton": on_copy(state_update_triton.selective_state_update)}, {"odd": partial(inputs, 3, 112)}, shapes,
        lambda v: {"bytes": 4 * v["state"].nbytes},
    )  # fmt: skip


def ssd_state_update() -> Operator:
    def inputs(batch: int, heads: int, head_dim: int = 64, d_state: int = 128) -> Inputs:
        found: Inputs = {"x": new(batch, heads, head_dim, dtype=BF16), "dt": new(batch, heads, dtype=BF16)}
        found |= {name: new(batch, 1, d_state, dtype=BF16) for name in ("B", "C")}
        found |= {"A": uniform(heads, low=-16, high=-1), "D": new(heads), "dt_bias": new(heads) - 4}
        return found | {"state": new(batch, heads, head_dim, d_state)}

    shapes = {f"80 x 64 x {batch}": partial(inputs, batch, 80) for batch in (1, 64)}
    return Operator(
        "ssd state update", on_copy(ssd_state_update_ref), {"triton": on_copy(state_update_triton.ssd_state_update)},
        {"odd": partial(inputs, 3, 5, 40, 48)}, shapes, lambda v: {"bytes": 4 * v["state"].nbytes},
    )  # fmt: skip


def on_copy(update: Callable[..., Tensor]) -> Kernel:
    """A step that works on a copy of the state (twice its bytes) and returns it too."""

    def stepped(**inputs: Any) -> tuple[Tensor, Tensor]:
        state = inputs.pop("state").clone()
        return update(state, **inputs), state

    return stepped


def norms() -> Operator:
    def inputs(batch: int, length: int, width: int) -> Inputs:
        return {
            "rows": new(batch, length, width, dtype=BF16), "weight": new(width, dtype=BF16), "eps": 1e-5,
            "residual": new(batch, length, width, dtype=BF16),
        }  # fmt: skip

    shapes = {"2560 x 8192": partial(inputs, 1, 8192, 2560)}
    return Operator(
        "residual + norm", rms_norm.rms_norm_ref, {"triton": rms_norm_triton.rms_norm},
        {"odd": partial(inputs, 2, 37, 72)}, shapes, lambda v: {"bytes": 4 * v["rows"].nbytes},
    )  # fmt: skip


def gated_norm() -> Operator:
    def inputs(batch: int, length: int, width: int) -> Inputs:
        both = new(batch, length, 2 * width, dtype=BF16)
        return {"y": both[..., :width], "z": both[..., width:], "weight": new(width, dtype=BF16), "eps": 1e-5}

    return Operator(
        "gated norm", one(rms_norm.gated_rms_norm_ref), {"triton": one(rms_norm_triton.gated_rms_norm)},
        {"odd": partial(inputs, 2, 37, 72)}, {"5120 x 8192": partial(inputs, 1, 8192, 5120)},
        lambda v: {"bytes": 3 * v["y"].numel() * 2},
    )  # fmt: skip


def importance() -> Operator:
    def inputs(batch: int, length: int, width: int) -> Inputs:
        return {"dt": new(batch, length, width, dtype=BF16), "dt_bias": new(width)}

    return Operator(
        "token importance", one(token_importance_ref), {"triton": one(token_importance)},
        {"odd": partial(inputs, 2, 37, 97)}, {"5120 x 8192": partial(inputs, 1, 8192, 5120)},
        lambda v: {"bytes": v["dt"].nbytes, "exponentials": v["dt"].numel()},
    )  # fmt: skip


OPERATORS: dict[str, Callable[[], Operator]] = {
    "selective_scan": selective_scan,
    "selective_scan_backward": selective_scan_backward,
    "ssd": ssd,
    "causal_conv": causal_conv,
    "state_update": state_update,
    "ssd_state_update": ssd_state_update,
    "norms": norms,
    "gated_norm": gated_norm,
    "importance": importance,
}
