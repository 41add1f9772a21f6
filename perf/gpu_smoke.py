"""Are the training kernels right on this GPU, and how long do they take? `python -m perf.gpu_smoke` from the root.

Gradients are held against the float64 reference at odd shapes with NaN in every fresh buffer; the time of forward and
backward at the training shape is printed only if all of them agree. One line of JSON goes to $OUT/gpu_smoke.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from statespan.kernels.causal_conv import causal_conv_ref
from statespan.kernels.causal_conv_triton import causal_conv
from statespan.kernels.selective_scan import selective_scan_ref
from statespan.kernels.selective_scan_grad_triton import selective_scan

REL = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # float32 sums; bf16 rounds every output and gradient once
SCANS = [(2, 1, 64, 16, 1), (1, 2047, 48, 16, 1), (2, 513, 96, 16, 2), (3, 100, 33, 8, 1)]
CONVS = [(2, 1, 64, 4), (1, 2047, 200, 4), (3, 66, 33, 3)]
TRAINING = (16, 1024, 512, 16)


def scan_inputs(
    batch: int, length: int, d_inner: int, d_state: int, groups: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random inputs of all kinds, the big ones in `dtype`."""
    new = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    rows = {name: new(batch, length, d_inner).to(dtype) for name in ("x", "dt", "z")}
    rows |= {name: new(batch, length, groups, d_state).to(dtype) for name in ("B", "C")}
    vectors = {"A": -new(d_inner, d_state).exp(), "D": new(d_inner), "dt_bias": new(d_inner) - 2}
    return rows | vectors | {"state": new(batch, d_inner, d_state)}


def conv_inputs(batch: int, length: int, width: int, taps: int, dtype: torch.dtype) -> dict[str, Tensor]:
    new = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    rows = {"x": new(batch, length, width).to(dtype), "state": new(batch, taps - 1, width).to(dtype)}
    return rows | {"weight": new(width, taps), "bias": new(width)}


def gradients(function: Any, inputs: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed random weighting of them."""
    leaves = {name: (v if dtype is None else v.to(dtype)).detach().requires_grad_() for name, v in inputs.items()}
    outputs = function(**leaves)
    random = torch.Generator("cuda").manual_seed(0)
    sums = [(v * torch.randn(v.shape, generator=random, device="cuda").to(v.dtype)).sum() for v in outputs]
    (sums[0] + sums[1]).backward()
    return {"y": outputs[0], "state": outputs[1]} | {f"d{name}": v.grad for name, v in leaves.items()}


def deviations() -> dict[str, float]:
    """Largest error over the largest wanted value, in units of what is allowed; every case must stay below 1."""
    worst: dict[str, float] = {}
    cases = [(selective_scan, selective_scan_ref, scan_inputs, shape) for shape in SCANS]
    cases += [(causal_conv, causal_conv_ref, conv_inputs, shape) for shape in CONVS]
    for function, reference, inputs_of, shape in cases:
        for dtype, allowed in REL.items():
            inputs = inputs_of(*shape, dtype)
            want, got = gradients(reference, inputs, torch.float64), gradients(function, inputs, None)
            for name, value in want.items():
                off = (got[name].double() - value).abs().max() / value.abs().max().clamp_min(1e-30)
                worst[f"{function.__name__} {shape} {str(dtype)[6:]} {name}"] = (off / allowed).item()
    return worst


def poison() -> None:
    """torch.empty hands out NaN from here on, so that an element no kernel writes shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        out = empty(*size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    torch.empty = poisoned  # type: ignore[assignment]


def repeats_to_the_bit() -> bool:
    inputs = scan_inputs(4, 300, 96, 16, 1, torch.bfloat16)
    first, second = (gradients(selective_scan, inputs, None) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def milliseconds() -> dict[str, float]:
    """Forward, and forward with backward, at the training shape; for the convolution torch's own beside ours."""
    batch, length, width, _ = TRAINING
    scanned = {k: v.requires_grad_() for k, v in scan_inputs(*TRAINING, 1, torch.bfloat16).items()}
    convolved = {k: v.requires_grad_() for k, v in conv_inputs(batch, length, width, 4, torch.bfloat16).items()}
    grad = torch.randn_like(scanned["x"])

    def torch_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, None]:
        rows = torch.cat([state, x], dim=1).mT
        y = torch.conv1d(rows, weight[:, None].to(x.dtype), bias.to(x.dtype), groups=width)
        return torch.nn.functional.silu(y.mT), None

    found = {}
    for name, function, inputs in [
        ("scan", selective_scan, scanned), ("conv", causal_conv, convolved), ("torch conv", torch_conv, convolved),
    ]:  # fmt: skip

        def both(function: Any = function, inputs: dict[str, Tensor] = inputs) -> None:
            torch.autograd.grad(function(**inputs)[0], list(inputs.values()), grad)

        forward = lambda function=function, inputs=inputs: function(**inputs)  # noqa: E731
        found[f"{name} forward"] = triton.testing.do_bench(forward, return_mode="median")
        found[f"{name} forward and backward"] = triton.testing.do_bench(both, return_mode="median")
    return found


def main() -> None:
    device = torch.cuda.get_device_name()
    empty = torch.empty
    poison()
    worst = deviations()
    same = repeats_to_the_bit()
    torch.empty = empty  # type: ignore[assignment]
    red = {name: value for name, value in worst.items() if not value < 1}
    print(f"{device}: {len(worst) - len(red)} of {len(worst)} comparisons within tolerance; repeats to the bit: {same}")
    for name, value in red.items():
        print(f"  RED {name}: {value:.2f} of what is allowed")
    report: dict[str, Any] = {"device": device, "red": red, "repeats": same}
    if not red and same:
        report["milliseconds"] = milliseconds()
        for name, value in report["milliseconds"].items():
            print(f"  {name:<30} {value:7.3f} ms at {TRAINING}")
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "gpu_smoke.json").write_text(json.dumps(report) + "\n")
    sys.exit(bool(red) or not same)


if __name__ == "__main__":
    main()
