"""Does the engine stay linear? Studies of 250 to 2,000 trials on 500 search samples, by a model that takes no time.

    python perf/engine_load.py                        # 250, 500, 1000 and 2000 trials, about half an hour of CPU
    python perf/engine_load.py --trials 100 200       # a look
    python perf/engine_load.py --browser chromium     # the report's time to open, too

Each study runs in a process of its own. Racing is off, so every trial meets every sample, and every result is a row of
the ledger. Prints a block a size: CPU milliseconds a trial, and of it the CPU seconds of the ledger, of Optuna (asking
and telling), of its database and of MLflow (both from a thread beside the study), of choosing and proving, and of the
report; then each figure a trial over that of the smallest size, which is 1 where the engine is linear. CPU seconds, so
that a machine with other work on it shows the same; `wall` is the clock's. `again` is the same command once more. The
sampler is `random`: what TPE takes grows with the trials by its nature (`--sampler tpe` shows it under `search`).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = (250, 500, 1000, 2000)
TWO_LAYERS = "  layer_count: 2\n  beta: {type: float, low: 0.5, high: 1.0, why: so that no draw repeats another}\n"
"""In one layer beta has no effect, and of 2,000 trials most would be another's twin."""

SPENT: defaultdict[str, float] = defaultdict(float)


def timed(owner: Any, name: str, part: str) -> None:
    """Add the CPU seconds of a function to its part."""
    original: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return original(*args, **kwargs)
        finally:
            SPENT[part] += time.thread_time() - began

    setattr(owner, name, measured)


def one_study(trials: int, samples: int, sampler: str, folder: Path) -> dict[str, float]:
    """Run a study and say what it took."""
    import mlflow.pyfunc

    from statespan.orchestration import report, sweep
    from statespan.orchestration.ledger import Ledger
    from statespan.orchestration.mirror import Mirror
    from statespan.orchestration.searcher import Search
    from statespan.orchestration.tracking import Tracker
    from tests.fake_engine import instant
    from tests.studies import SPACE, small_study

    timed(Ledger, "append", "ledger")
    timed(Search, "next_batch", "search")
    timed(Search, "tell", "search")
    timed(Mirror, "sync", "optuna")
    timed(Tracker, "sync", "mlflow")
    timed(Tracker, "conclude", "mlflow at the end")
    timed(sweep, "finish", "choice and proof")
    timed(sweep, "write_report", "report")
    assert mlflow is not None and report is not None  # imported before the clock starts
    space = folder / "wide.yaml"
    wide_space = SPACE.replace("n_layer - 1", "n_layer - 2").replace("published:", TWO_LAYERS + "published:")
    space.write_text(wide_space)
    study = small_study(
        folder,
        benchmarks={"passkey": {"lengths": [256, 400], "depths": [0.0, 0.5], "trials": samples // 2}},
        methods={"decimamba": {"space": str(space)}},
        search={"trials": trials, "batch": 8, "sampler": sampler},
        racing={"scheduler": "none"},
        workers={"item_samples": 64},
        tracking={"mlflow": "auto"},
    )
    began, cpu = time.perf_counter(), time.process_time()
    sweep.sweep(study, make_engine=instant)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    spent, began = dict(SPENT), time.process_time()
    sweep.sweep(study, make_engine=instant)
    again = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    page = (study.folder / "report.html").stat().st_size / 2**20
    return {"cpu": cpu, **spent, "wall": wall, "again": again, "peak MiB": peak, "report MiB": page}


def open_seconds(page: Path, browser: str) -> float:
    """Seconds in which a headless browser starts, opens the page, lays it out and draws it."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += [f"--screenshot={profile}/page.png", "--window-size=1280,2000", page.resolve().as_uri()]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return time.perf_counter() - began


def measure(trials: int, samples: int, sampler: str, browser: str | None, keep: Path | None) -> dict[str, float]:
    """One size in a process of its own."""
    folder = Path(tempfile.mkdtemp())
    try:
        command = [sys.executable, __file__, "--one", str(trials), str(samples), sampler, str(folder)]
        found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        if browser is not None:
            found["open"] = open_seconds(folder / "runs" / "small" / "report.html", browser)
        if keep is not None:
            shutil.copytree(folder / "runs" / "small", keep / f"{trials}", dirs_exist_ok=True)
        return found
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--samples", type=int, default=500, help="search samples a trial meets")
    parser.add_argument("--sampler", default="random", help="TPE looks at every earlier trial at each draw")
    parser.add_argument("--browser", help="a Chromium, to time how the report opens")
    parser.add_argument("--keep", type=Path, help="folder to which the studies are copied")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        trials, samples, sampler, folder = options.one
        print(json.dumps(one_study(int(trials), int(samples), sampler, Path(folder))))
        return
    first: dict[str, float] = {}
    for trials in options.trials:
        found = measure(trials, options.samples, options.sampler, options.browser, options.keep)
        each = {name: value / trials for name, value in found.items()}
        first = first or each
        print(f"{trials} trials: {1000 * each['cpu']:.0f} CPU ms a trial, {each['cpu'] / first['cpu']:.2f} of linear")
        for name, value in found.items():
            ratio = "" if "MiB" in name else f"  {each[name] / first[name]:.2f} of linear"
            print(f"  {name:<18}{value:>10.2f}{ratio}", flush=True)


if __name__ == "__main__":
    main()
