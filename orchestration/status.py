"""status.json: how far a study is, written by its driver once a second and read by `statespan status`."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from statespan.orchestration.files import read_json
from statespan.orchestration.lock import is_running

FILE = "status.json"


@dataclass(kw_only=True)
class Status:
    study: str
    phase: str = "starting"
    """starting, searching, proving on held-out samples, done, stopped, failed"""

    trials: int = 0
    """Trials that the study will have at most."""

    asked: int = 0
    states: dict[str, int] = field(default_factory=dict)
    rung: int = 0
    rungs: int = 0
    workers: int = 0
    workers_ready: int = 0
    restarts: int = 0
    waiting: int = 0
    """Work items not begun."""

    in_flight: int = 0
    computed: int = 0
    shared: int = 0
    cached: int = 0
    failed: int = 0
    layer_tokens: int = 0
    layer_tokens_shared: int = 0
    tokens_per_second: float | None = None
    tokens_left: int = 0
    """Prompt tokens of the items that are not done."""

    seconds_left: float | None = None
    """Until they are."""

    search_seconds_left: float | None = None
    """Until the search is over, if what is left costs what was done: less where trials are stopped."""

    baseline: float | None = None
    best: float | None = None
    best_id: str | None = None
    best_setting: str = ""
    best_low: float | None = None
    best_high: float | None = None
    began: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    message: str = ""

    @property
    def spared(self) -> float | None:
        """Share of layer-tokens that did not have to be computed, reused samples included; None before any."""
        total = self.layer_tokens + self.layer_tokens_shared
        return self.layer_tokens_shared / total if total else None

    def line(self) -> str:
        """One plain line."""
        parts = [self.phase]
        if self.trials:
            done = sum(count for state, count in self.states.items() if state != "running")
            parts.append(f"{done}/{self.trials} trials")
        if self.rungs and self.phase == "searching":
            parts.append(f"rung {self.rung + 1}/{self.rungs}")
        parts.append(f"{self.computed:,} samples computed, {self.shared + self.cached:,} reused")
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.seconds_left is not None and (self.waiting or self.in_flight):
            parts.append(f"{self.tokens_left:,} tokens, {self.seconds_left:,.0f} s left at this rung")
        if self.spared is not None:
            parts.append(f"{self.spared:.0%} of layer-tokens shared")
        if self.search_seconds_left is not None and self.phase == "searching":
            parts.append(f"about {duration(self.search_seconds_left)} of search left")
        if self.best is not None:
            interval = f" [{self.best_low:.3f}, {self.best_high:.3f}]" if self.best_low is not None else ""
            parts.append(f"best {self.best:.3f}{interval} {self.best_id} {self.best_setting}".rstrip())
        if self.baseline is not None:
            parts.append(f"vanilla {self.baseline:.3f}")
        return "; ".join([*parts, self.message] if self.message else parts)

    def as_json(self) -> dict[str, Any]:
        return {key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in asdict(self).items()}  # fmt: skip


def duration(seconds: float) -> str:
    """In words, to the minute where there are minutes."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def read_status(folder: Path) -> Status:
    """The last word of a study's driver; one whose driver is gone without a word is `stopped`."""
    raw = read_json(folder / FILE) or {"study": folder.name, "phase": "unknown"}
    known = {key: value for key, value in raw.items() if key in Status.__dataclass_fields__}
    status = Status(**known)
    if status.phase not in ("done", "stopped", "failed", "unknown") and not is_running(folder):
        status.phase = "stopped"
        status.message = "its driver is gone; the same sweep command goes on"
    return status
