"""What the search asked and was told, one pair of JSON files a batch: enough to go on as if nothing had happened.

`search/<version>/asked-0003.json` is written before a trial of the batch begins, `told-0003.json` when all of them are
done. Everything a sampler keeps (its attributes of trials and of the study) is in them, so Optuna's database is a
mirror and can be made again. A study whose space or samples change begins a new version, to which the old settings are
carried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from statespan.orchestration.files import read_json, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A trial: a setting that the search wants to know about."""

    number: int
    id: str
    method: str
    params: Mapping[str, Any]
    """As drawn."""

    canonical: Mapping[str, Any]
    artifacts: Mapping[str, str] = field(default_factory=dict)
    origin: str = "sampled"
    """sampled, published, enqueued, kept (carried over from before the study was widened) or grid."""

    draw: int = 0
    """Number of the draw, which is Optuna's number of the trial. Draws that were no trial leave gaps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What became of a trial."""

    number: int
    state: str
    """complete, pruned, failed or oom"""

    values: tuple[float, ...] = ()
    """Of the objectives; empty unless complete."""

    rungs: tuple[Mapping[str, Any], ...] = ()
    """One a rung: rung, samples, score, values, decision, reason, p, incumbent_id."""

    message: str = ""
    wall_seconds: float = float("nan")


class Journal:
    """The batches of one version of a study."""

    def __init__(self, folder: Path, version: str) -> None:
        self.root, self.version = folder, version
        self.folder = folder / version

    def asked(self, batch: int) -> dict[str, Any] | None:
        return self._read(f"asked-{batch:04d}")

    def told(self, batch: int) -> dict[str, Any] | None:
        return self._read(f"told-{batch:04d}")

    def _read(self, name: str) -> dict[str, Any] | None:
        value = read_json(self.folder / f"{name}.json")
        return value if isinstance(value, dict) else None

    def write_asked(self, batch: int, value: Mapping[str, Any]) -> None:
        write_json(self.folder / f"asked-{batch:04d}.json", dict(value))

    def write_told(self, batch: int, value: Mapping[str, Any]) -> None:
        write_json(self.folder / f"told-{batch:04d}.json", dict(value))

    def batches(self) -> int:
        """Batches asked, counted up to the first gap."""
        count = 0
        while self.asked(count) is not None:
            count += 1
        return count

    def trials(self) -> list[tuple[Asked, Told | None]]:
        """Every trial in order of asking."""
        out: list[tuple[Asked, Told | None]] = []
        for batch in range(self.batches()):
            told = {one["number"]: told_from(one) for one in (self.told(batch) or {}).get("trials", ())}
            for one in (self.asked(batch) or {})["draws"]:
                if one["trial"] is not None:
                    asked = asked_from(one["trial"])
                    out.append((asked, told.get(asked.number)))
        return out

    def earlier(self) -> list[Asked]:
        """The trials of the version before this one, or of the one that was before it when it began."""
        begun = self.asked(0)
        if begun is not None:
            return [asked_from(one) for one in begun.get("earlier", ())]
        others = [path for path in self.root.glob("*/asked-0000.json") if path.parent.name != self.version]
        if not others:
            return []
        latest = max(others, key=lambda path: path.stat().st_mtime_ns)
        return [asked for asked, _ in Journal(self.root, latest.parent.name).trials()]


def asked_from(raw: Mapping[str, Any]) -> Asked:
    return Asked(**raw)


def told_from(raw: Mapping[str, Any]) -> Told:
    return Told(**{**raw, "values": tuple(raw["values"]), "rungs": tuple(raw["rungs"])})


def states(trials: Sequence[tuple[Asked, Told | None]]) -> dict[str, int]:
    """Trials by state, `running` for those not told."""
    out: dict[str, int] = {}
    for _, told in trials:
        state = told.state if told else "running"
        out[state] = out.get(state, 0) + 1
    return out
