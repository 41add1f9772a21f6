"""The clerk: keeps the mirrors (Optuna's database, MLflow) up with the study, from a thread of its own.

Mirrors may be slow, locked or down; the study does not wait for them. A mirror that fails is tried again after a while,
and once more at the end; what it misses then is filled by the next run of the same command, or by `statespan repair`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from statespan.orchestration.journal import Asked, Told

logger = logging.getLogger(__name__)
AGAIN_SECONDS = 60.0
"""Time between two tries of a mirror that failed."""

PAUSE_SECONDS = 1.0
"""Least time between two updates of a mirror."""


@dataclass
class Clerk:
    """A watcher of the conductor that calls every mirror's `sync` after something has changed."""

    mirrors: dict[str, Callable[[], None]]
    failed: dict[str, str] = field(default_factory=dict)
    """Mirror -> why its last try failed."""

    _dirty: threading.Event = field(default_factory=threading.Event)
    _over: threading.Event = field(default_factory=threading.Event)
    _tried: dict[str, float] = field(default_factory=dict)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="clerk", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._over.is_set():
            self._dirty.wait()
            self._dirty.clear()
            if not self._over.is_set():
                self._sync_all(patient=True)
                self._over.wait(PAUSE_SECONDS)

    def _sync_all(self, patient: bool) -> None:
        for name, sync in self.mirrors.items():
            if patient and name in self.failed and time.monotonic() - self._tried[name] < AGAIN_SECONDS:
                continue
            self._tried[name] = time.monotonic()
            try:
                sync()
                self.failed.pop(name, None)
            except Exception as error:  # a mirror never stops a study
                if name not in self.failed:
                    logger.warning("%s cannot be kept up for now (%s); the study goes on", name, _first(error))
                self.failed[name] = _first(error)

    def close(self) -> None:
        """Bring every mirror up to date, as far as it lets itself."""
        self._over.set()
        self._dirty.set()
        if self._thread is not None:
            self._thread.join()
        self._sync_all(patient=False)
        for name, why in self.failed.items():
            logger.warning("%s is behind (%s); the same command, or `statespan repair`, fills it", name, why)

    # ---- watcher

    def rung_done(self, asked: Asked | None, rung: Mapping[str, Any]) -> None:
        return None

    def trial_done(self, asked: Asked, told: Told) -> None:
        self._dirty.set()

    def progress(self) -> None:
        return None


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
