"""What the GPU benchmarks share: correct before fast, medians, and a table with floor and peer beside each figure.

An `Operator` has a float64 reference, variants that claim to compute it, inputs to check them on and inputs to time
them on. `Bench.run` checks first, every fresh buffer filled with NaN; where one variant is wrong it times none.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Inputs = dict[str, Any]
Kernel = Callable[..., tuple[Tensor, ...]]

REL = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Allowed ‖out - ref‖ / ‖ref‖ by the output's dtype: float32 sums of some hundred terms; one rounding elsewhere."""


@dataclass(frozen=True)
class Operator:
    name: str
    reference: Kernel
    variants: dict[str, Kernel]
    checks: dict[str, Callable[[], Inputs]]
    shapes: dict[str, Callable[[], Inputs]]
    cost: Callable[[Inputs], dict[str, float]]
    """bytes moved at least, and of what else the chip has a rate for: "exponentials", "flops" """
    peers: dict[str, Kernel] = field(default_factory=dict)
    rel: dict[torch.dtype, float] = field(default_factory=lambda: REL)
    recorded: dict[str, float] = field(default_factory=dict)
    """Milliseconds mamba_ssm took at a shape when it was measured before, for where it does not run."""


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty hands out NaN, so that an element no kernel writes shows."""
    empty = torch.empty

    def filled(*size: Any, **options: Any) -> Tensor:
        out = empty(*size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    torch.empty = filled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty  # type: ignore[assignment]


def doubled(inputs: Inputs) -> Inputs:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def deviation(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖; infinity where got holds a NaN."""
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


@triton.jit
def _exponentials(out_ptr, turns, BLOCK: tl.constexpr):
    v = tl.arange(0, BLOCK).to(tl.float32) * 1e-3
    for _ in range(turns):
        v = tl.exp2(v) - 1.0
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), v)


@dataclass
class Bench:
    """Collects figures; `report` prints them last and writes them to $OUT."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    red: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)

    def measure_ceilings(self) -> None:
        """Bytes, exponentials and bf16 FLOP a second that this chip reaches."""
        one = torch.empty(2**30, dtype=torch.uint8, device="cuda").fill_(1)
        other = torch.empty_like(one)
        self.rates["bytes"] = 2 * one.nbytes / milliseconds(lambda: other.copy_(one)) * 1e3
        out = torch.empty(132 * 16 * 1024, device="cuda")
        turns = 4096
        spent = milliseconds(lambda: _exponentials[(132 * 16,)](out, turns, BLOCK=1024, num_warps=4))
        self.rates["exponentials"] = out.numel() * turns / spent * 1e3
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.rates["flops"] = 2 * 8192**3 / milliseconds(lambda: a @ a) * 1e3
        print({name: f"{rate:.3g}/s" for name, rate in self.rates.items()}, flush=True)

    def run(self, operator: Operator, *, time_it: bool = True) -> None:
        started = time.monotonic()
        green = self._green(operator)
        print(f"{operator.name}: {len(green)} of {len(operator.variants)} variants right", flush=True)
        if len(green) < len(operator.variants):
            return  # no speed of an operator that is red
        for label, make in operator.shapes.items() if time_it else ():
            inputs = make()
            peers = {name: self._time(kernel, inputs) for name, kernel in operator.peers.items()}
            floor, what = self._floor(operator.cost(inputs))
            for name in green:
                spent = self._time(operator.variants[name], inputs)
                self.rows.append(
                    {"operator": operator.name, "shape": label, "variant": name, "ms": spent, "floor_ms": floor,
                     "floor": what, "peers_ms": peers, "recorded_ms": operator.recorded.get(label)}
                )  # fmt: skip
                print(_line(self.rows[-1]), flush=True)
            del inputs
            torch.cuda.empty_cache()
        print(f"{operator.name}: {time.monotonic() - started:.0f} s", flush=True)

    def _green(self, operator: Operator) -> list[str]:
        wrong: dict[str, str] = {}
        for label, make in operator.checks.items():
            inputs = make()
            want = operator.reference(**doubled(inputs))
            for name, kernel in operator.variants.items():
                if name in wrong:
                    continue
                try:
                    with poisoned():
                        got, again = kernel(**inputs), kernel(**inputs)
                    torch.cuda.synchronize()
                except Exception as error:  # a variant that does not compile must not end the run
                    wrong[name] = f"{label}: {type(error).__name__} {str(error)[:200]}"
                    continue
                for index, (a, b) in enumerate(zip(got, want, strict=True)):
                    off = deviation(a, b)
                    if not off <= operator.rel[a.dtype]:
                        wrong[name] = f"{label}: output {index} off by {off:.1e}, allowed {operator.rel[a.dtype]:.0e}"
                    elif not torch.equal(a, again[index]):
                        wrong[name] = f"{label}: output {index} is not the same twice"
        for name, why in wrong.items():
            self.red.append(f"{operator.name} {name}: {why}")
            print(f"  RED {self.red[-1]}", flush=True)
        return [name for name in operator.variants if name not in wrong]

    def _time(self, kernel: Kernel, inputs: Inputs) -> float:
        try:
            return milliseconds(lambda: kernel(**inputs))
        except Exception as error:
            print(f"  not timed: {type(error).__name__} {str(error)[:200]}", flush=True)
            return float("nan")

    def _floor(self, cost: dict[str, float]) -> tuple[float, str]:
        times = {what: amount / self.rates[what] * 1e3 for what, amount in cost.items()}
        what = max(times, key=lambda name: times[name])
        return times[what], what

    def report(self, name: str) -> None:
        best: dict[tuple[str, str], dict[str, Any]] = {}
        for row in self.rows:
            key = (row["operator"], row["shape"])
            if row["ms"] == row["ms"] and (key not in best or row["ms"] < best[key]["ms"]):
                best[key] = row
        print(
            f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; best of each:"
        )
        for row in best.values():
            print(_line(row))
        for line in self.red:
            print("RED", line)
        if "OUT" in os.environ:
            found = {"device": torch.cuda.get_device_name(), "rates": self.rates, "rows": self.rows, "red": self.red}
            (Path(os.environ["OUT"]) / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def warm(make_operator: Callable[[], Operator], variant: str) -> None:
    """Compile a variant into Triton's cache on disk; run in a process of its own, beside others."""
    operator = make_operator()
    for make in operator.checks.values():
        try:
            operator.variants[variant](**make())
        except Exception:  # told by the check that follows
            return


def warm_all(make_operators: list[Callable[[], Operator]], processes: int = 12) -> None:
    """Compiling is most of a short run's time, and one process compiles one kernel at a time."""
    started = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [(make, name) for make in make_operators for name in make().variants]
        list(pool.map(warm, *zip(*jobs, strict=True)))
    print(f"{len(jobs)} variants compiled: {time.monotonic() - started:.0f} s", flush=True)


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of one call, the L2 cache emptied before each."""
    return float(triton.testing.do_bench(call, warmup=10, rep=60, return_mode="median"))


def _line(row: dict[str, Any]) -> str:
    peers = "".join(f"  {ms / row['ms']:.2f}x {name} ({ms:.4f})" for name, ms in row["peers_ms"].items())
    if not peers and row["recorded_ms"]:
        peers = f"  peer not run; {row['recorded_ms'] / row['ms']:.2f}x what it was recorded at"
    return (
        f"{row['operator']:<20} {row['shape']:<22} {row['variant']:<34} {row['ms']:8.4f} ms"
        f"  floor {row['floor_ms']:.4f} ({row['floor']}) {row['ms'] / row['floor_ms']:.2f}x{peers}"
    )
