"""Counters, gauges and histograms in the text form that Prometheus reads. Safe to use from any thread."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
KINDS = {"counter": "counter", "gauge": "gauge", "histogram": "histogram"}


class Meter:
    """Every metric is declared with its help line; a name that was not declared is a mistake of ours."""

    def __init__(self, declared: Mapping[str, tuple[str, str]]) -> None:
        """declared: name -> (counter | gauge | histogram, help)."""
        assert all(kind in KINDS for kind, _ in declared.values())
        self._declared = dict(declared)
        self._values: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._buckets: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        with self._lock:
            self._values[self._key(name, "counter", labels)] += amount

    def set(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._values[self._key(name, "gauge", labels)] = value

    def observe(self, name: str, seconds: float) -> None:
        assert self._declared[name][0] == "histogram", name
        with self._lock:
            counts = self._buckets.setdefault(name, [0] * (len(SECONDS) + 1))
            counts[next((i for i, bound in enumerate(SECONDS) if seconds <= bound), len(SECONDS))] += 1
            self._values[name + "_sum", ""] += seconds

    def value(self, name: str, **labels: str) -> float:
        with self._lock:
            return self._values[name, _labels(labels)]

    def _key(self, name: str, kind: str, labels: Mapping[str, str]) -> tuple[str, str]:
        assert self._declared[name][0] == kind, f"{name} is no {kind}"
        return name, _labels(labels)

    def render(self) -> str:
        with self._lock:
            lines: list[str] = []
            for name, (kind, meaning) in self._declared.items():
                lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
                lines += self._histogram(name) if kind == "histogram" else self._plain(name)
            return "\n".join(lines) + "\n"

    def _plain(self, name: str) -> list[str]:
        found = [(labels, value) for (own, labels), value in self._values.items() if own == name] or [("", 0.0)]
        return [f"{name}{labels} {value:g}" for labels, value in sorted(found)]

    def _histogram(self, name: str) -> list[str]:
        counts, total, lines = self._buckets.get(name, [0] * (len(SECONDS) + 1)), 0, []
        for bound, count in zip((*map(str, SECONDS), "+Inf"), counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._values[name + '_sum', '']:g}", f"{name}_count {total}"]


def _labels(labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{{{inner}}}" if inner else ""
