"""All GPU kernels: checked against float64, then timed beside their floor and, where it is built, mamba_ssm.

    python -m perf.gpu_kernels [operator ...] [--check] [--once VARIANT] [--peer FOLDER]

`--check` only checks; `--once` runs one variant at the first shape, for a profiler; `--peer` names mamba_ssm's folder
(perf/gpu_peer.py), without which the table says so and gives what was recorded. With no operator named all run; the
table's best lines come last, everything goes to $OUT/gpu_kernels.json.
"""

from __future__ import annotations

import argparse
import sys

import torch

from perf.bench import Bench, warm_all
from perf.gpu_operators import OPERATORS
from perf.gpu_peer import use


def once(name: str, variant: str) -> None:
    operator = OPERATORS[name]()
    inputs = next(iter(operator.shapes.values()))()
    for _ in range(3):
        operator.variants[variant](**inputs)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operators", nargs="*", default=[], metavar="operator", help=", ".join(OPERATORS))
    parser.add_argument("--check", action="store_true", help="check, time nothing")
    parser.add_argument("--once", metavar="VARIANT", help="run this variant at the operator's first shape")
    parser.add_argument("--peer", metavar="FOLDER", help="of mamba_ssm, to time beside ours")
    asked = parser.parse_args()
    use(asked.peer)
    print("inputs drawn from seed", torch.seed(), flush=True)
    names = asked.operators or list(OPERATORS)
    if asked.once:
        once(names[0], asked.once)
        return
    bench = Bench()
    if not asked.check:
        bench.measure_ceilings()
    warm_all([OPERATORS[name] for name in names])
    for name in names:
        bench.run(OPERATORS[name](), time_it=not asked.check)
    bench.report("gpu_kernels")
    sys.exit(bool(bench.red))


if __name__ == "__main__":
    main()
