"""All GPU kernels: checked against float64, then timed beside their floor and, where it is built, mamba_ssm.

    python -m perf.gpu_kernels [operator ...] [--check] [--once VARIANT]

`--check` only checks; `--once` runs one variant at the first shape, for a profiler. With no operator named all run; the
table's best lines come last, everything goes to $OUT/gpu_kernels.json.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perf.bench import Bench, Inputs, Operator, warm_all
from statespan.kernels.selective_scan import selective_scan_ref
from statespan.kernels.selective_scan_rows_triton import Walking, scan_by_rows
from statespan.kernels.selective_scan_tiles_triton import Tiling, scan_in_tiles


def scan_inputs(
    batch: int, length: int, d_inner: int, *, d_state: int = 16, dtype: torch.dtype = torch.bfloat16, full: bool = False
) -> Inputs:
    """Random inputs with Mamba's own magnitudes: A in [-16, -0.5], step sizes about 0.1. `full` adds all the extras."""
    new = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    inputs = {name: new(batch, length, d_inner).to(dtype) for name in ("x", "dt", "z")}
    inputs |= {name: new(batch, length, d_state).to(dtype) for name in ("B", "C")}
    inputs |= {"A": -0.5 - 15.5 * torch.rand(d_inner, d_state, device="cuda"), "D": new(d_inner)}
    inputs |= {"dt_bias": new(d_inner) - 2}
    if full:
        inputs |= {"state": new(batch, d_inner, d_state), "keep_above": torch.rand(batch, d_inner, device="cuda") * 0.2}
        inputs |= {"dt_scale": torch.rand(batch, d_inner, device="cuda") + 0.5}
        inputs |= {"pads": tuple((7 * row) % (length + 1) for row in range(batch))}
    return inputs


def scan_cost(inputs: Inputs) -> dict[str, float]:
    elements = inputs["x"].numel()
    moved = sum(inputs[name].nbytes for name in ("x", "dt", "z", "B", "C")) + inputs["x"].nbytes
    return {"bytes": moved, "exponentials": elements * inputs["A"].shape[1]}


def first_two(kernel: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    return kernel(**inputs)[:2]  # type: ignore[no-any-return]


def tilings() -> dict[str, Any]:
    found = {}
    for tokens, segments, channels, warps, unroll in [
        (16, 16, 8, 4, 1), (16, 16, 8, 4, 2), (16, 16, 8, 4, 4), (16, 8, 16, 4, 1), (16, 8, 16, 4, 2), (8, 16, 8, 4, 2),
        (8, 8, 16, 4, 2), (16, 32, 4, 4, 2), (8, 32, 4, 4, 2), (16, 16, 4, 2, 2), (16, 16, 16, 8, 2),
    ]:  # fmt: skip
        tiling = Tiling(tokens, segments, channels, warps, unroll=unroll)
        name = f"tiles T{tokens} S{segments} C{channels} W{warps} U{unroll}"
        found[name] = partial(first_two, partial(scan_in_tiles, tiling=tiling))
    return found


def walkings() -> dict[str, Any]:
    found = {}
    for tokens, states, warps in [(32, 4, 4), (64, 4, 4), (32, 8, 4), (32, 4, 2), (32, 2, 4), (32, 8, 2)]:
        walking = Walking(tokens=tokens, states=states, warps=warps)
        found[f"rows T{tokens} S{states} W{warps}"] = partial(scan_by_rows, walking=walking)
    return found


def selective_scan() -> Operator:
    checks = {
        "everything": partial(scan_inputs, 3, 300, 112, full=True),
        "everything float32": partial(scan_inputs, 2, 517, 75, full=True, dtype=torch.float32),
        **{f"length {n}": partial(scan_inputs, 1, n, 48) for n in (1, 2047, 2048, 2049)},
        "length 65537": partial(scan_inputs, 1, 65_537, 24),
    }
    shapes = {
        "5120 x 8192 x 1": partial(scan_inputs, 1, 8192, 5120),
        "5120 x 8192 x 4": partial(scan_inputs, 4, 8192, 5120),
        "1536 x 8192 x 1": partial(scan_inputs, 1, 8192, 1536),
        "1536 x 4096 x 8": partial(scan_inputs, 8, 4096, 1536),
    }
    variants = tilings() | walkings()
    return Operator("selective_scan", selective_scan_ref, variants, checks, shapes, scan_cost, peers=_peer_scan())


def _peer_scan() -> dict[str, Any]:
    """mamba_ssm's forward where its extension can be loaded; channel-first, as it wants its tensors."""
    try:
        import selective_scan_cuda
    except ImportError:
        return {}
    prepared: dict[int, list[Tensor]] = {}

    def forward(**v: Any) -> tuple[Tensor, ...]:
        if id(v["x"]) not in prepared:
            prepared.clear()
            prepared[id(v["x"])] = [v[n].mT.contiguous() for n in ("x", "dt", "z", "B", "C")]
        x, dt, z, B, C = prepared[id(v["x"])]
        out: tuple[Tensor, ...] = selective_scan_cuda.fwd(
            x, dt, v["A"], B[:, None], C[:, None], v["D"], z, v["dt_bias"], True
        )
        return out

    return {"mamba_ssm": forward}


OPERATORS = {"selective_scan": selective_scan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operators", nargs="*", default=[], metavar="operator", help=", ".join(OPERATORS))
    parser.add_argument("--check", action="store_true", help="check, time nothing")
    parser.add_argument("--once", metavar="VARIANT", help="run this variant at the operator's first shape")
    asked = parser.parse_args()
    torch.manual_seed(0)
    if asked.once:
        operator = OPERATORS[asked.operators[0]]()
        inputs = next(iter(operator.shapes.values()))()
        for _ in range(3):
            operator.variants[asked.once](**inputs)
        torch.cuda.synchronize()
        return
    bench = Bench()
    if not asked.check:
        bench.measure_ceilings()
    names = asked.operators or list(OPERATORS)
    warm_all([OPERATORS[name] for name in names])
    for name in names:
        bench.run(OPERATORS[name](), time_it=not asked.check)
    bench.report("gpu_kernels")
    sys.exit(bool(bench.red))


if __name__ == "__main__":
    main()
