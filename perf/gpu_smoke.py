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

from statespan.kernels.selective_scan import selective_scan_ref
from statespan.kernels.selective_scan_triton import selective_scan

REL = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # float32 sums; bf16 rounds every output and gradient once
SHAPES = [(2, 1, 64, 16, 1), (1, 2047, 48, 16, 1), (2, 513, 96, 16, 2), (3, 100, 33, 8, 1)]
TRAINING = (16, 1024, 512, 16)


def draw(batch: int, length: int, d_inner: int, d_state: int, groups: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs of all kinds, the big ones in `dtype`."""
    new = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    rows = {name: new(batch, length, d_inner).to(dtype) for name in ("x", "dt", "z")}
    rows |= {name: new(batch, length, groups, d_state).to(dtype) for name in ("B", "C")}
    vectors = {"A": -new(d_inner, d_state).exp(), "D": new(d_inner), "dt_bias": new(d_inner) - 2}
    return rows | vectors | {"state": new(batch, d_inner, d_state)}


def gradients(scan: Any, inputs: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed random weighting of them."""
    leaves = {name: (v if dtype is None else v.to(dtype)).detach().requires_grad_() for name, v in inputs.items()}
    outputs = scan(**leaves)
    random = torch.Generator("cuda").manual_seed(0)
    sums = [(v * torch.randn(v.shape, generator=random, device="cuda").to(v.dtype)).sum() for v in outputs]
    (sums[0] + sums[1]).backward()
    return {"y": outputs[0], "state": outputs[1]} | {f"d{name}": v.grad for name, v in leaves.items()}


def deviations() -> dict[str, float]:
    """Largest error over the largest wanted value, in units of what is allowed; every case must stay below 1."""
    worst: dict[str, float] = {}
    for shape in SHAPES:
        for dtype, allowed in REL.items():
            inputs = draw(*shape, dtype)
            want = gradients(selective_scan_ref, inputs, torch.float64)
            got = gradients(selective_scan, inputs, None)
            for name, value in want.items():
                off = (got[name].double() - value).abs().max() / value.abs().max().clamp_min(1e-30)
                worst[f"{shape} {str(dtype)[6:]} {name}"] = (off / allowed).item()
    return worst


def poison() -> None:
    """torch.empty hands out NaN from here on, so that an element no kernel writes shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        out = empty(*size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    torch.empty = poisoned  # type: ignore[assignment]


def repeats_to_the_bit() -> bool:
    inputs = draw(4, 300, 96, 16, 1, torch.bfloat16)
    first, second = (gradients(selective_scan, inputs, None) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def milliseconds() -> dict[str, float]:
    """Forward alone, and forward with backward, at the training shape."""
    inputs = {k: v.requires_grad_() for k, v in draw(*TRAINING, 1, torch.bfloat16).items()}
    grad = torch.randn_like(inputs["x"])

    def step() -> None:
        torch.autograd.grad(selective_scan(**inputs)[0], list(inputs.values()), grad)

    forward = triton.testing.do_bench(lambda: selective_scan(**inputs), return_mode="median")
    return {"forward": forward, "forward_and_backward": triton.testing.do_bench(step, return_mode="median")}


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
        print(f"training shape {TRAINING}: {report['milliseconds']}")
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "gpu_smoke.json").write_text(json.dumps(report) + "\n")
    sys.exit(bool(red) or not same)


if __name__ == "__main__":
    main()
