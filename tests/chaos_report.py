"""`make chaos`: twenty seeded kills a kind of process, and faults that last; the table goes to docs/reliability.md.

    python -m tests.chaos_report [--points 20] [--seed 20261122] [--only driver …] [--write docs/reliability.md]
    python -m tests.chaos_report --only driver --part 2/4 --write docs/reliability.md

Kills come in chains of five on one study; all studies run on one Ray that stands. Every study must come out as the
undisturbed one, or the exit code is 1 and the table says what differs. The table is written after every chain, so what
was done stays whenever the rest is stopped. A long run can be given in parts: part 1 begins a victim's row anew, the
others add to it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import math
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import ray

from statespan.config import Cluster, Study
from statespan.orchestration import mirror, tracking
from statespan.orchestration.databases import make_whole
from statespan.orchestration.files import DiskFull
from statespan.orchestration.ledger import Ledger
from statespan.orchestration.ray_session import cpu_cores, join, leave
from statespan.orchestration.sweep import sweep
from tests.chaos import (
    Arena,
    Blow,
    Disturbance,
    Undisturbed,
    Victim,
    blows,
    different,
    served,
    undisturbed,
    where,
    whole,
)
from tests.fake_engine import instant
from tests.studies import small_study

CHAIN = 5
VICTIMS: tuple[Victim, ...] = ("driver", "worker", "trial", "mlflow", "sigterm", "sigint")
ASKED = 2
"""Times a study is asked to stop."""

NAMES = {
    "driver": "SIGKILL of the driver",
    "worker": "SIGKILL of a worker",
    "trial": "SIGKILL of a Tune trial's process",
    "mlflow": "SIGKILL of the MLflow server, started again at once",
    "sigterm": "SIGTERM to the driver",
    "sigint": "Ctrl-C: SIGINT to the driver and its whole process group",
}
FAULTS = (
    "disk full for a whole run (a small tmpfs, made larger afterwards)",
    "a ledger file cut short",
    "the SQLite files of Optuna and MLflow locked for a whole run",
    "MLflow down for a whole run",
)
BEGIN, END = "<!-- results of make chaos -->", "<!-- end of results -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    times: int
    studies: int
    runs: int
    seconds: float
    differences: tuple[str, ...] = ()

    def line(self) -> str:
        verdict = "identical" if not self.differences else "DIFFERENT: " + ", ".join(self.differences)
        today = datetime.datetime.now(datetime.UTC).date()
        seconds = "–" if math.isnan(self.seconds) else f"{self.seconds:.0f}"
        counts = f"{self.times} | {self.studies} | {self.runs} | {seconds}"
        return f"| {self.what} | {counts} | {verdict} | {today} |"

    @classmethod
    def read(cls, line: str) -> Row:
        """The row of a line of the table."""
        what, times, studies, runs, seconds, verdict, _ = (cell.strip() for cell in line.strip("| ").split("|"))
        wrong = tuple(verdict.removeprefix("DIFFERENT: ").split(", ")) if verdict != "identical" else ()
        took = math.nan if seconds == "–" else float(seconds)
        return cls(what, int(times), int(studies), int(runs), took, wrong)

    def after(self, earlier: Row) -> Row:
        """Both together."""
        return Row(
            self.what,
            earlier.times + self.times,
            earlier.studies + self.studies,
            earlier.runs + self.runs,
            earlier.seconds + self.seconds,
            (*earlier.differences, *self.differences),
        )


@dataclass(frozen=True, slots=True)
class Part:
    """One of several parts in which a victim's chains are given, counted from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        number, _, of = text.partition("/")
        part = cls(int(number), int(of or 1))
        if not 1 <= part.number <= part.of:
            raise ValueError(text)
        return part


def kills(
    arena: Arena, usual: Undisturbed, victim: Victim, points: int, seed: int, folder: Path, part: Part
) -> Iterator[Row]:
    """Chains of blows until all of this part are dealt; after each chain, what it has come to."""
    began = time.monotonic()
    todo = blows(victim, ASKED if victim in ("sigterm", "sigint") else points, seed)
    chains = max(1, len(todo) // CHAIN)
    waiting = [todo[place::chains] for place in range(chains)][part.number - 1 :: part.of]
    wrong, dealt, runs, studies = [], 0, 0, 0
    while waiting:
        try:
            done, left, found = chain(arena, usual, waiting.pop(0), folder / f"{victim}-{part.number}-{studies}")
        except AssertionError as error:
            say(f"{victim}: {error}")
            wrong, studies = [*wrong, "a run failed"], studies + 1
        else:
            for blow, when in done.dealt:
                say(f"{victim} {blow.share:.2f}: {when}")
            say(f"{victim}: {len(left)} left, {done.runs} runs, {', '.join(found) or 'identical'}")
            wrong += found
            studies, dealt, runs = studies + 1, dealt + len(done.dealt), runs + done.runs
            waiting += [left if done.dealt else [blow.sooner() for blow in left]] if left else []
        yield Row(NAMES[victim], dealt, studies, runs, time.monotonic() - began, tuple(wrong))


def all_kills(victims: Sequence[Victim], points: int, seed: int, folder: Path, part: Part) -> Iterator[Row]:
    """Kills of every victim, beside one standing Ray."""
    join(Cluster())
    try:
        arena = Arena(folder, ray.get_runtime_context().gcs_address)
        usual = undisturbed(arena, folder / "usual")
        for victim in victims:
            yield from kills(arena, usual, victim, points, seed, folder, part)
    finally:
        leave()


def chain(
    arena: Arena, usual: Undisturbed, todo: list[Blow], folder: Path
) -> tuple[Disturbance, list[Blow], list[str]]:
    """Several blows on one study: how it went, the blows that found no occasion, and what came out different."""
    if todo[0].victim != "mlflow":
        done = Disturbance(arena, arena.study(folder, "auto"), usual)
        return done, done.deal(todo), compared(done, usual)
    with served(arena, folder / "server") as server:
        done = Disturbance(arena, arena.study(folder, server.uri), usual, server)
        left = done.deal(todo)
        server.wait()  # the last blow's server may not have started before the study was done
        done.deal([])  # what MLflow missed is filled by the same command
        return done, left, compared(done, usual)


def compared(done: Disturbance, usual: Undisturbed) -> list[str]:
    """What came out different; where, is printed."""
    found = whole(done.study)
    for line in itertools.islice(where(found, usual.whole), 10):
        say(f"  {line}")
    return different(found, usual.whole)


# ---- faults that last


def faults(model: Path, folder: Path, seed: int) -> Iterator[Row]:
    """Disk, databases and server out of order for a whole run, then in order."""
    rng = Random(seed)
    calm = at(model, folder / "calm")
    run(calm)
    usual = whole(calm)
    disturbed: list[tuple[int, Callable[[Path], Study | None]]] = [
        (5, lambda place: full_disk(model, place, rng)),
        (5, lambda place: torn_ledger(model, place, rng)),
        (1, lambda place: locked(model, place)),
        (1, lambda place: mlflow_down(model, place)),
    ]
    for what, (times, disturb) in zip(FAULTS, disturbed, strict=True):
        yield lasting(what, [folder / f"fault-{FAULTS.index(what)}-{i}" for i in range(times)], usual, disturb)


def lasting(what: str, places: Sequence[Path], usual: dict[str, Any], disturb: Callable[[Path], Study | None]) -> Row:
    """One fault, a study each; each has run by the same command again."""
    began, wrong, done = time.monotonic(), [], 0
    for place in places:
        study = disturb(place)
        if study is not None:
            wrong += different(whole(study), usual)
            done += 1
    say(f"{what}: {done}, {', '.join(wrong) or 'identical'}")
    return Row(what, done, done, 2 * done, time.monotonic() - began, tuple(wrong))


def at(model: Path, output: Path, mlflow: str = "auto") -> Study:
    return small_study(model, tracking={"mlflow": mlflow}).model_copy(update={"output": output})


def run(study: Study) -> None:
    sweep(study, make_engine=instant)


def full_disk(model: Path, output: Path, rng: Random) -> Study | None:
    """None where this user may not mount."""
    output.mkdir(parents=True)
    size = rng.randrange(64, 700)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(output)], capture_output=True
    ).returncode:
        return None
    study = at(model, output)
    try:
        with contextlib.suppress(DiskFull):
            run(study)
        subprocess.run(["mount", "-o", "remount,size=64m", str(output)], check=True)
        run(study)
        shutil.copytree(output, output.with_name(f"{output.name}-kept"))
    finally:
        subprocess.run(["umount", "-l", str(output)], check=True)
    return at(model, output.with_name(f"{output.name}-kept"))


def torn_ledger(model: Path, output: Path, rng: Random) -> Study:
    study = at(model, output)
    run(study)
    path = rng.choice(Ledger(study.folder / "ledger").files())
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    run(study)
    return study


def locked(model: Path, output: Path) -> Study:
    """Somebody else writes to both databases all the time."""
    study = at(model, output)
    make_whole(f"sqlite:///{output / 'mlflow.db'}", tracking.make_tables)
    make_whole(f"sqlite:///{study.folder / 'optuna.db'}", mirror.make_tables)
    with contextlib.ExitStack() as held:
        for path in (output / "mlflow.db", study.folder / "optuna.db"):
            other = held.enter_context(contextlib.closing(sqlite3.connect(path)))
            other.execute("BEGIN EXCLUSIVE")
        run(study)
    run(study)
    return study


def mlflow_down(model: Path, output: Path) -> Study:
    """Nobody listens at the first run; the note of where MLflow is says so, and the second has a database."""
    run(at(model, output, "http://127.0.0.1:9"))
    run(at(model, output))
    return at(model, output)


# ---- the whole


def say(line: str) -> None:
    print(line, flush=True)


def table(rows: Sequence[str], seed: int) -> str:
    return "\n".join(
        [
            BEGIN,
            f"`make chaos`, seed {seed}, {cpu_cores()} CPU cores ({cpu_name()}), Python {platform.python_version()}:",
            "",
            "| what happened | times | studies | runs | seconds | the study afterwards | date |",
            "| --- | ---: | ---: | ---: | ---: | --- | --- |",
            *rows,
            END,
        ]
    )


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def rows_of(page: str) -> dict[str, Row]:
    """The rows between the two marks, by what happened."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    return {row.what: row for row in map(Row.read, [one for one in lines if one.startswith("| ")][2:])}


def write(path: Path, rows: Sequence[Row], seed: int) -> None:
    """Replace these rows in the table between the two marks; the others stay as they are."""
    before, _, rest = path.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    kept = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| ")}
    kept |= {row.what: row.line() for row in rows}
    names = [*NAMES.values(), *FAULTS]
    path.write_text(before + table([kept[name] for name in names if name in kept], seed) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20, help="kills of each kind of process")
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--only", nargs="+", choices=[*VICTIMS, "faults"], default=[*VICTIMS, "faults"])
    parser.add_argument("--part", type=Part.parse, default=Part(), help="such as 2/4: the second quarter of the kills")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    rows: dict[str, Row] = {}
    page = "" if options.write is None else options.write.read_text()
    earlier = rows_of(page) if options.part.number > 1 else {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        small_study(folder)
        victims = [one for one in VICTIMS if one in options.only]
        parts = [all_kills(victims, options.points, options.seed, folder, options.part)] if victims else []
        parts += [faults(folder, folder, options.seed)] if "faults" in options.only else []
        for row in itertools.chain(*parts):
            rows[row.what] = row.after(earlier[row.what]) if row.what in earlier else row
            if options.write is not None:  # at once: whoever stops the rest keeps it
                write(options.write, list(rows.values()), options.seed)
    say(table([row.line() for row in rows.values()], options.seed))
    sys.exit(any(row.differences for row in rows.values()))


if __name__ == "__main__":
    main()
