"""What workers take from their machines: CPU and memory, measured where the work is done, told to MLflow as it tells
its own system metrics (`system/NODE/…`, so that its page of system metrics shows them).

A worker measures each item; the driver sums up until MLflow is told next. None of it is a result: points that MLflow
missed while it was down are gone.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Vitals:
    """Of one worker while it did one item."""

    cpu_seconds: float
    rss_bytes: int
    gpu_bytes: int | None = None
    """What torch holds of the GPU; None without one."""


def vitals(cpu_seconds: float) -> Vitals:
    """This process now, after an item that took so many CPU seconds."""
    torch: Any = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    return Vitals(cpu_seconds, _rss_bytes(), torch.cuda.memory_reserved() if on_gpu else None)


def _rss_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(slots=True)
class Taken:
    """What one worker took since MLflow was told last."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    rss_bytes: int = 0
    gpu_bytes: int | None = None


@dataclass
class Gauges:
    """Filled by the study's thread, emptied by the clerk's."""

    _taken: defaultdict[str, Taken] = field(default_factory=lambda: defaultdict(Taken))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, worker: str, seconds: float, found: Vitals) -> None:
        with self._lock:
            one = self._taken[worker]
            one.seconds += seconds
            one.cpu_seconds += found.cpu_seconds
            one.rss_bytes = max(one.rss_bytes, found.rss_bytes)
            if found.gpu_bytes is not None:
                one.gpu_bytes = max(one.gpu_bytes or 0, found.gpu_bytes)

    def take(self) -> list[tuple[str, float, int]]:
        """(metric, value, milliseconds since the epoch) of everything noted since the last call."""
        with self._lock:
            taken, self._taken = self._taken, defaultdict(Taken)
        now = int(time.time() * 1000)
        return [(name, value, now) for worker, one in sorted(taken.items()) for name, value in _metrics(worker, one)]


def _metrics(worker: str, one: Taken) -> Iterator[tuple[str, float]]:
    if one.seconds > 0:
        yield f"system/{worker}/cpu_utilization_percentage", 100 * one.cpu_seconds / one.seconds
    yield f"system/{worker}/memory_usage_megabytes", one.rss_bytes / MIB
    if one.gpu_bytes is not None:
        yield f"system/{worker}/gpu_memory_usage_megabytes", one.gpu_bytes / MIB
