"""docs/results.md's tables, of what methods_study.py recorded.

    python -m perf.methods_tables perf/methods_study.jsonl

Intervals and tests are statespan.stats', over documents; differences are paired on the same held-out samples.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from perf.methods_study import MULTIPLES, read
from statespan.stats import Clusters, cluster, mean_interval, sign_flip_p

Rows = dict[str, dict[str, Any]]
"""Records of one model and task by method."""


def tables(path: Path) -> None:
    records, spent = read(path, "scores"), read(path, "cost")
    for model in sorted({r["model"] for r in records}):
        for task in ("passkey", "perplexity"):
            own: Rows = {r["method"]: r for r in records if (r["model"], r["task"]) == (model, task)}
            print(f"\n### {model}, {task}\n")
            score_table(own, task)
            print("\nReMamba against, beyond the training length:\n")
            for other in ("baseline, same time", "baseline, same steps", "remamba, K = 0"):
                if other in own:
                    print(f"- {other}: {difference(own['remamba'], own[other], task)}")
            print("\nSettings found:\n")
            for label, record in own.items():
                if record["tried"] and "," not in label:
                    short = {k: round(v, 3) if isinstance(v, float) else v for k, v in record["params"].items()}
                    print(f"- {label} (best of {record['tried']}): `{json.dumps(short)}`")
        print(f"\n### {model}, time to read one prompt\n")
        cost_table([r for r in spent if r["model"] == model])


def score_table(own: Rows, task: str) -> None:
    lengths = sorted({row[0] for row in own["vanilla"]["rows"]})
    heads = ("method", *(f"{length:,}" for length in lengths), "against vanilla, beyond 1×")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for label, record in own.items():
        cells = [_cell(record, own["vanilla"], length, task) for length in lengths]
        gain = "" if label == "vanilla" else difference(record, own["vanilla"], task)
        print(f"| {' | '.join((label, *cells, gain))} |")


def _cell(record: dict[str, Any], vanilla: dict[str, Any], length: int, task: str) -> str:
    """The mean with its 95 % interval, marked where it differs from vanilla's by a sign-flip test at 5 %."""
    rows = [(document, score) for at, document, score in record["rows"] if at == length]
    found = mean_interval(cluster([score for _, score in rows], [document for document, _ in rows]),
                          bounds=(0, 1) if task == "passkey" else None)  # fmt: skip
    gain = _gain(record, vanilla, [length])
    mark = "" if record is vanilla or sign_flip_p(gain) > 0.05 else " ▲" if gain.mean > 0 else " ▼"
    if task == "passkey":
        return f"{100 * found.mean:.0f} ({100 * found.low:.0f}–{100 * found.high:.0f}){mark}"
    middle, low, high = (math.exp(-one) for one in (found.mean, found.high, found.low))
    return f"{middle:.1f} ({low:.1f}–{high:.1f}){mark}"


def _gain(record: dict[str, Any], other: dict[str, Any], lengths: Collection[int]) -> Clusters:
    """Paired differences on the same samples, by document."""
    pairs = [(ours, theirs) for ours, theirs in zip(record["rows"], other["rows"], strict=True) if ours[0] in lengths]
    assert all(ours[:2] == theirs[:2] for ours, theirs in pairs)
    return cluster([ours[2] - theirs[2] for ours, theirs in pairs], [ours[1] for ours, _ in pairs])


def difference(record: dict[str, Any], other: dict[str, Any], task: str) -> str:
    """The paired difference over all lengths beyond the training length, with its 95 % interval and p."""
    beyond = [multiple * record["train_length"] for multiple in MULTIPLES[1:]]
    gain = _gain(record, other, beyond)
    found, p = mean_interval(gain, bounds=(-1, 1) if task == "passkey" else None), sign_flip_p(gain)
    scale, digits, unit = (100, 1, "points") if task == "passkey" else (1, 3, "nats a token")
    mean, low, high = (f"{scale * one:+.{digits}f}" for one in (found.mean, found.low, found.high))
    return f"{mean} {unit} ({low} to {high}), {'p < 0.001' if p < 0.001 else f'p = {p:.3f}'}"


def cost_table(spent: list[dict[str, Any]]) -> None:
    lengths = sorted({r["length"] for r in spent})
    seconds = {(r["method"], r["length"]): r["seconds"] for r in spent}
    print(f"| method | {' | '.join(f'{length:,} tokens' for length in lengths)} |\n{'|---' * (len(lengths) + 1)}|")
    for label in dict.fromkeys(r["method"] for r in spent):
        cells = [
            f"{1e3 * seconds[label, at]:.1f} ms ({seconds[label, at] / seconds['vanilla', at]:.2f}×)" for at in lengths
        ]
        print(f"| {' | '.join((label, *cells))} |")


if __name__ == "__main__":
    tables(Path(sys.argv[1]))
