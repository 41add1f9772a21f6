"""Which of several forms of a kernel is fastest on this device, found once and remembered on disk.

A choice is keyed by device, Triton version and shape class, never by the context length: a longer prompt must not stop
a trial to tune again. The file is `tuned.json` in $STATESPAN_CACHE, by default ~/.cache/statespan; deleting it is safe.
Where choices must not depend on the machine's mood (torch.use_deterministic_algorithms, Triton's interpreter), or no
trial can be made (a CUDA graph is being captured), the first candidate is taken, so it should be a good one.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from statespan.kernels.triton_common import INTERPRETED

T = TypeVar("T")
_settled: dict[tuple[Any, ...], Any] = {}
"""What this process has chosen or read, by what was asked: a name to look up costs more than a kernel's launch."""

_chosen: dict[str, str] = {}
_loaded: set[Path] = set()


def fastest(op: str, shape: tuple[Any, ...], candidates: Sequence[T], run: Callable[[T], Any]) -> T:
    """The candidate whose `run` takes least time; `run` is called only the first time a shape class is met.

    `run` should work on inputs of its own, of a fixed and generous length. A candidate that raises is not taken. One
    shape has one list of candidates.
    """
    if INTERPRETED or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    asked = (op, shape, torch.cuda.current_device())
    if asked not in _settled:
        found = _choice(op, shape, candidates, run)
        if found is None:
            return candidates[0]
        _settled[asked] = found
    settled: T = _settled[asked]
    return settled


def _choice(op: str, shape: tuple[Any, ...], candidates: Sequence[T], run: Callable[[T], Any]) -> T | None:
    """The one on disk, or else by a trial; None where no trial can be made."""
    key = f"{torch.cuda.get_device_name()} | triton {triton.__version__} | {op} {shape}"
    names = {repr(candidate): candidate for candidate in candidates}
    _load()
    if _chosen.get(key) not in names:
        if torch.cuda.is_current_stream_capturing():
            return None
        times = {name: _milliseconds(partial(run, candidate)) for name, candidate in names.items()}
        _chosen[key] = min(times, key=lambda name: times[name])
        _save()
    return names[_chosen[key]]


def _milliseconds(call: Callable[[], Any], rounds: int = 7) -> float:
    """Median of a few calls after two that compile and warm; infinity for one that fails."""
    try:
        for _ in range(2):
            call()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for begin, end in marks:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
    except (RuntimeError, triton.TritonError):
        return float("inf")
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in marks)


def _path() -> Path:
    folder = os.environ.get("STATESPAN_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "statespan") / "tuned.json"


def _load() -> None:
    if _path() not in _loaded:
        _loaded.add(_path())
        if _path().is_file():
            _chosen.update(json.loads(_path().read_text()))


def _save() -> None:
    """Written beside and renamed, so that a reader never sees half of it; what others added meanwhile is kept."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    others = json.loads(path.read_text()) if path.is_file() else {}
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(others | _chosen, indent=1, sort_keys=True) + "\n")
    draft.replace(path)
