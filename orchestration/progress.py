"""The live view: refreshed in place on a terminal, plain lines elsewhere, and status.json for other shells."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from statespan.config import Study
from statespan.orchestration.assemble import setting_line
from statespan.orchestration.conductor import Conductor
from statespan.orchestration.files import write_json
from statespan.orchestration.journal import Asked, Told
from statespan.orchestration.status import FILE, Status, duration

Form = Literal["live", "lines", "json", "quiet"]
SHOWN = 8
"""Trials in the table."""


class Progress:
    """A watcher of the conductor. Everything it shows is in `status`."""

    def __init__(self, study: Study, console: Console, form: Form) -> None:
        self.study, self.console, self.form = study, console, form
        self.status = Status(study=study.study, trials=study.search.trials, rungs=len(study.racing.rungs))
        self.rows: dict[str, tuple[Asked, Mapping[str, Any]]] = {}
        self._conductor: Conductor | None = None
        self._live: Live | None = None
        self._lock = threading.Lock()
        self._written = 0.0
        self._said = 0.0
        self._first: tuple[float, int, float] | None = None
        """When the first item was done; the prompt tokens counted, and the share of the search done, by then."""

        self._climbed: dict[str, float] = {}
        """Trial -> share of its search samples that it has met, all of them where it was stopped."""

    # ---- life

    def follow(self, conductor: Conductor, workers: bool) -> None:
        """Read this conductor's counters from now on."""
        self._conductor = conductor
        if workers and self.form == "live" and self._live is None:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
            self._live.start()

    def phase(self, name: str, message: str = "") -> None:
        self.status.phase, self.status.message = name, message
        self._say(f"{self.study.study}: {name}" + (f" ({message})" if message else ""))
        self._write(now=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._write(now=True)

    # ---- what it hears

    def rung_done(self, asked: Asked | None, rung: Mapping[str, Any]) -> None:
        with self._lock:
            self.status.rung = rung["rung"]
            if asked is None:
                self.status.baseline = rung["score"]
            else:
                self.rows[asked.id] = (asked, rung)
                self._climbed[asked.id] = self.study.racing.rungs[rung["rung"]] if rung["decision"] == "keep" else 1.0
                self.status.asked = max(self.status.asked, asked.number + 1)
        if asked is not None:
            verdict = f" ({rung['reason']})" if rung["decision"] == "stop" and rung["reason"] else ""
            self._say(
                f"{asked.id} rung {rung['rung'] + 1}/{self.status.rungs}: {rung['score']:.3f} on {rung['samples']} "
                f"samples, {rung['decision']}{verdict}; {setting_line(asked.method, asked.params)}"
            )
        self._event("rung", {"trial": asked.id if asked else "vanilla", **rung})
        self.progress()

    def trial_done(self, asked: Asked, told: Told) -> None:
        with self._lock:
            self.status.states[told.state] = self.status.states.get(told.state, 0) + 1
            self._climbed[asked.id] = 1.0
            score = told.rungs[-1]["score"] if told.rungs else float("nan")
            if told.state == "complete" and (self.status.best is None or score > self.status.best):
                self.status.best, self.status.best_id = score, asked.id
                self.status.best_setting = setting_line(asked.method, asked.params)
                self._interval(asked.id)
        self._event("trial", {"trial": asked.id, "state": told.state, "values": told.values, "message": told.message})

    def progress(self) -> None:
        self._read()
        self._write()
        if self.form == "lines" and time.monotonic() - self._said > 15:
            self._say(self.status.line())

    # ---- reading

    def _interval(self, trial_id: str) -> None:
        if self._conductor is not None:
            interval = self._conductor.standings.interval(trial_id)
            self.status.best_low, self.status.best_high = interval

    def _read(self) -> None:
        if self._conductor is None:
            return
        counters, pool, status = self._conductor.results.counters, self._conductor.results.pool, self.status
        for name in ("computed", "shared", "cached", "failed", "layer_tokens", "layer_tokens_shared"):
            setattr(status, name, getattr(counters, name))
        status.workers = len(pool.slots)
        status.workers_ready = sum(slot.ready for slot in pool.slots.values())
        status.restarts, status.waiting, status.in_flight = pool.restarts, pool.waiting, pool.in_flight
        status.tokens_left, status.seconds_left = pool.tokens_left, pool.seconds_left()
        with self._lock:
            done = sum(self._climbed.values()) / max(self.study.search.trials, 1)
        if counters.prompt_tokens and self._first is None:
            self._first = (time.monotonic(), counters.prompt_tokens, done)
        if self._first is not None and (seconds := time.monotonic() - self._first[0]) > 2:
            status.tokens_per_second = (counters.prompt_tokens - self._first[1]) / seconds
            gained = done - self._first[2]
            status.search_seconds_left = seconds * max(1.0 - done, 0.0) / gained if gained > 0 else None
        status.updated = time.time()

    def _write(self, now: bool = False) -> None:
        if not now and time.monotonic() - self._written < 1.0:
            return
        self._written = time.monotonic()
        try:
            write_json(self.study.folder / FILE, self.status.as_json())
        except OSError:
            return  # a full disk is told by the ledger, whose writes count

    # ---- showing

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        if self.form == "lines":
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _event(self, kind: str, value: Mapping[str, Any]) -> None:
        if self.form == "json":
            self.console.print(json.dumps({"event": kind, **value}), highlight=False, soft_wrap=True, markup=False)

    def _render(self) -> Group:
        with self._lock:
            rows = sorted(self.rows.values(), key=lambda row: (row[1]["rung"], row[1]["score"]), reverse=True)
            table = Table(box=None, pad_edge=False, header_style="bold")
            for name in ("trial", "rung", "samples", "quality", "", "setting"):
                table.add_column(name, justify="right" if name in ("rung", "samples", "quality") else "left")
            for asked, rung in rows[:SHOWN]:
                table.add_row(*_cells(asked, rung, self.status.rungs))
            return Group(self._headline(), table, Text(self._footline(), style="dim"))

    def _headline(self) -> Text:
        status = self.status
        done = sum(status.states.values())
        text = Text(f"{status.study}: {status.phase}  {done}/{status.trials} trials", style="bold")
        if status.best is not None:
            interval = "" if status.best_low is None else f" [{status.best_low:.3f}, {status.best_high:.3f}]"
            text.append(f"   best {status.best:.3f}{interval} ({status.best_id})", style="green")
        if status.baseline is not None:
            text.append(f"   vanilla {status.baseline:.3f}", style="default")
        return text

    def _footline(self) -> str:
        status = self.status
        parts = [f"{status.workers_ready}/{status.workers} workers"]
        if status.restarts:
            parts.append(f"{status.restarts} restarts")
        parts.append(f"{status.waiting + status.in_flight} items to do")
        if status.seconds_left is not None:
            parts.append(f"{status.tokens_left:,} tokens, {status.seconds_left:,.0f} s left at this rung")
        if status.tokens_per_second:
            parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
        parts.append(f"{status.computed:,} samples computed, {status.shared + status.cached:,} reused")
        if status.spared is not None:
            parts.append(f"{status.spared:.0%} of layer-tokens shared")
        if status.search_seconds_left is not None and status.phase == "searching":
            parts.append(f"about {duration(status.search_seconds_left)} of search left")
        return " · ".join(parts)


def _cells(asked: Asked, rung: Mapping[str, Any], rungs: int) -> tuple[str, ...]:
    mark = {"keep": "", "stop": "stopped", "finish": "done"}[rung["decision"]]
    return (
        asked.id,
        f"{rung['rung'] + 1}/{rungs}",
        str(rung["samples"]),
        f"{rung['score']:.3f}",
        mark,
        setting_line(asked.method, asked.params),
    )
