"""A study against the same trials run one process a trial: is it ten times faster, and to the digit the same?

    python perf/sweep_vs_naive.py study            # the study, then the same command again
    python perf/sweep_vs_naive.py naive            # the trials it asked; or some: --trials vanilla t0000 t0001
    python perf/sweep_vs_naive.py compare          # with what there is: says so where trials are missing
    python perf/sweep_vs_naive.py sharing          # layer-tokens with racing off, for DeciMamba and for ReMamba
    python perf/sweep_vs_naive.py overhead         # a trial's, with an engine that computes nothing
    python perf/sweep_vs_naive.py --quick          # all of it, small: does it still work?
    python perf/sweep_vs_naive.py study --samples 100 --settings 48     # a larger study, in a folder of its own

The study is DeciMamba's own search space, 16 trials, named pass keys in 8,192 tokens, on the shipped Mamba-1. `study`
is all of `statespan sweep`, from the start of its process to its end: Ray, 16 trials raced over the search samples, the
proof on held-out samples, report and MLflow. `naive` starts one process for vanilla and for each of the 16 settings, as
many at a time as there are cores, one thread each; every process builds the samples, loads the model and evaluates all
of them, for that is what a plain script does. Per-sample scores must be identical wherever the study has one. The
ratio on the search samples alone, naive's time for the others left out, is printed too. CPU seconds stand beside wall
seconds: they say the same on a machine that others use, too.

`--samples` and `--settings` make the study larger, as real ones are: more samples let racing tell trials apart, and
more trials share what vanilla costs. Of its naive processes a few are enough: with `compare` the others count as their
mean, and it says so.

`sharing` runs every trial on every search sample (racing off), so that what is spared is spared by sharing:
layer-tokens computed against those that the same trials cost apart. ReMamba's adapter is random: what is shared does
not depend on its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from statespan.config import Study
from statespan.study_file import check_study

GOALS = {"ratio": 10.0, "decimamba": 5.0, "remamba": 2.0, "overhead": 0.6, "again": 2.0}


DEPTHS = [0.1, 0.3, 0.5, 0.7, 0.9]


class Size(NamedTuple):
    """How large the study is."""

    tokens: int = 8192
    samples: int = 40
    settings: int = 16

    @property
    def folder(self) -> str:
        return f"{self.tokens}_tokens_{self.samples}_samples_{self.settings}_settings"


QUICK = Size(2048, 20, 4)


def study_of(folder: Path, size: Size, **changes: Any) -> Study:
    """What a user would write."""
    raw: dict[str, Any] = {
        "study": "decimamba",
        "model": "mamba1-5m",
        "benchmarks": {
            "named_keys": {
                "benchmark": "passkey",
                "keys": 2,
                "lengths": [size.tokens],
                "depths": DEPTHS,
                "trials": size.samples // len(DEPTHS),
            }
        },
        "methods": {"decimamba": {}},
        "search": {"trials": size.settings, "batch": min(size.settings, 16)},
        "selection": {"heldout": 0.3},
        "output": str(folder),
    }
    return check_study(raw | changes)


# ---- the study


class Spent(NamedTuple):
    wall: float
    cpu: float
    """Seconds of the process and of all that descend from it."""


def timed(command: Sequence[str], log: Path) -> Spent:
    """Run a command to its end; its output goes to a file."""
    started = time.perf_counter()
    ticks: dict[int, int] = {}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            ticks |= family_ticks(process.pid)
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed; see {log}")
    return Spent(time.perf_counter() - started, sum(ticks.values()) / os.sysconf("SC_CLK_TCK"))


def family_ticks(root: int) -> dict[int, int]:
    """CPU ticks so far of a process and of its living descendants, by process."""
    parent, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        number = int(path.parent.name)
        parent[number], ticks[number] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {root}
    while grown := {one for one, above in parent.items() if above in family} - family:
        family |= grown
    return {one: ticks[one] for one in family & ticks.keys()}


def run_study(folder: Path, size: Size) -> None:
    """The study and its repetition, each as a process of its own; where the time went, from the ledger."""
    from statespan.study_file import saved_form

    study = study_of(folder, size)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    file.write_text(saved_form(study))
    command = [sys.executable, "-m", "statespan", "sweep", str(file), "--json"]
    first, again = (timed(command, folder / f"{name}.log") for name in ("first", "again"))
    rows = ledger(study)
    computed = [row for row in rows if row["origin"] == "computed"]
    found = {
        "seconds": first.wall,
        "cpu_seconds": first.cpu,
        "again_process": again.wall,
        "again_engine": engine_seconds(study),
        "samples": len({row["sample_id"] for row in rows}),
        "trial_samples": len(computed),
        "model_seconds": sum(
            row["prefill_seconds"] + row["decode_seconds"] for row in rows if row["origin"] == "computed"
        ),
        "layer_tokens": sum(row["layer_tokens"] or 0 for row in rows),
        "layer_tokens_shared": sum(row["layer_tokens_shared"] or 0 for row in rows),
    }
    (folder / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def engine_seconds(study: Study) -> float:
    """The same command once more without what it costs to start Python and import: the second of two."""
    from statespan.orchestration.sweep import sweep

    sweep(study)
    started = time.perf_counter()
    sweep(study)
    return time.perf_counter() - started


def ledger(study: Study) -> list[dict[str, Any]]:
    from statespan.orchestration.ledger import Ledger

    rows: list[dict[str, Any]] = Ledger(study.folder / "ledger").read().to_pylist()
    return rows


def settings(study: Study) -> dict[str, dict[str, Any]]:
    """Trial -> its parameters as asked; vanilla first."""
    from statespan.orchestration.assemble import load_study_data

    return {one.id: {"method": one.method, "params": dict(one.params)} for one in load_study_data(study.folder).trials}


# ---- one process a trial


def run_naive(folder: Path, size: Size, names: Sequence[str]) -> None:
    """Some of the trials, as many at a time as there are cores. Each leaves its scores and seconds."""
    study = study_of(folder, size)
    trials = settings(study)
    task = study.benchmarks["named_keys"]
    (folder / "naive").mkdir(exist_ok=True)

    def one(name: str) -> None:
        asked = {"model": study.model, "benchmark": task.benchmark, "settings": task.settings, **trials[name]}
        asked["out"] = str(folder / "naive" / f"{name}.json")
        command = [sys.executable, __file__, "alone", "--asked", json.dumps(asked)]
        spent = timed(command, folder / "naive" / f"{name}.log")
        (folder / "naive" / f"{name}.seconds").write_text(json.dumps(spent))
        print(f"{name} alone: {spent.wall:.1f} s, {spent.cpu:.1f} s of CPU", flush=True)

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(one, names or trials))


def cores() -> int:
    return len(os.sched_getaffinity(0))


def alone(asked: Mapping[str, Any]) -> None:
    """One trial as a script of its own would run it."""
    import numba
    import torch

    from statespan.benchmarks.evaluate import evaluate
    from statespan.benchmarks.table import build_benchmark
    from statespan.methods.base import ModelFacts
    from statespan.methods.table import build_method
    from statespan.models.checkpoint import load_model
    from statespan.models.runner import Runner

    torch.set_num_threads(1)
    numba.set_num_threads(1)
    loaded = load_model(asked["model"])
    benchmark = build_benchmark(asked["benchmark"], asked["settings"])
    method = build_method(asked["method"], asked["params"], ModelFacts.of(loaded))
    results = evaluate(
        Runner(loaded.model), method, benchmark, list(benchmark.samples(loaded.tokenizer)), loaded.tokenizer
    )
    rows = {
        one.sample_id: [one.score, list(one.completion.ids), one.layer_tokens, one.prefill_seconds + one.decode_seconds]
        for one in results
    }
    Path(asked["out"]).write_text(json.dumps(rows))


def compare(folder: Path, size: Size) -> None:
    """Every score of the study against the naive one's, then the ratio and where the time went."""
    study = study_of(folder, size)
    trials, found = settings(study), json.loads((folder / "study.json").read_text())
    naive = {path.stem: json.loads(path.read_text()) for path in (folder / "naive").glob("*.json")}
    rows = ledger(study)
    checked = [row for row in rows if row["trial_id"] in naive]
    for row in checked:
        score, ids, _, _ = naive[row["trial_id"]][row["sample_id"]]
        assert score == row["score"], f"{row['trial_id']} {row['sample_id']}: {row['score']}, alone {score}"
        assert not row["ids"] or ids == row["ids"], f"{row['trial_id']} {row['sample_id']}: other tokens"
    print(f"{len(checked)} scores and their tokens are identical to those of {len(naive)} processes")
    alone = {name: Spent(*json.loads((folder / "naive" / f"{name}.seconds").read_text())) for name in naive}
    wall, cpu = (whole([one[i] for one in alone.values()], alone, trials) for i in range(2))
    wall /= cores()  # as many at a time
    inside = {row["sample_id"] for row in rows if row["split"] == "search"}
    model = {name: sum(values[3] for values in one.values()) for name, one in naive.items()}
    outside = {name: sum(v[3] for sample, v in one.items() if sample not in inside) for name, one in naive.items()}
    on_search = wall - whole(list(outside.values()), outside, trials) / cores()
    evaluated = sum(row["split"] == "search" and row["trial_id"] != "vanilla" for row in rows)
    print(f"               {'wall s':>8} {'CPU s':>8} {'model s':>8}   (model: all processes together)")
    print(f"a process each {wall:8.1f} {cpu:8.1f} {whole(list(model.values()), model, trials):8.1f}")
    print(f"the study      {found['seconds']:8.1f} {found['cpu_seconds']:8.1f} {found['model_seconds']:8.1f}")
    if len(naive) < len(trials):
        print(f"(a process each: {len(naive)} of {len(trials)} measured, the others at the mean of those but vanilla)")
    print(
        f"ratio {wall / found['seconds']:.1f} (goal {GOALS['ratio']:.0f}), by CPU seconds "
        f"{cpu / found['cpu_seconds']:.1f}, on the search samples alone {on_search / found['seconds']:.1f}"
    )
    print(
        f"racing evaluated {evaluated / (len(inside) * (len(trials) - 1)):.0%} of the trials' search samples; the "
        f"repeat took {found['again_engine']:.1f} s of engine time (goal {GOALS['again']:.0f}), "
        f"{found['again_process']:.1f} s as a process"
    )


def whole(measured: Sequence[float], names: Mapping[str, Any], trials: Mapping[str, Any]) -> float:
    """The sum over all trials: trials that were not measured count as the mean of those that were."""
    of = dict(zip(names, measured, strict=True))
    others = [value for name, value in of.items() if name != "vanilla"]
    return of["vanilla"] + sum(others) / len(others) * (len(trials) - 1)


# ---- sharing alone


def sharing(folder: Path, size: Size) -> None:
    for method in ("decimamba", "remamba"):
        spent, apart, vanilla = layer_tokens(folder, size, method)
        print(
            f"{method}: {spent:,} layer-tokens computed, {apart:,} apart: {apart / spent:.1f} times fewer; the trials "
            f"beside vanilla's own {vanilla:,}: {(apart - vanilla) / (spent - vanilla):.1f} (goal {GOALS[method]:.0f})",
            flush=True,
        )


def layer_tokens(folder: Path, size: Size, method: str) -> tuple[int, int, int]:
    """(computed, what the same trials cost apart, what vanilla costs), on a few samples, every trial on each."""
    from statespan.orchestration.sweep import sweep

    model = with_random_adapter(folder / "model") if method == "remamba" else "mamba1-5m"
    task = {"benchmark": "passkey", "keys": 2, "lengths": [size.tokens], "depths": [0.5]}
    study = study_of(
        folder,
        size,
        study=f"sharing-{method}",
        model=str(model),
        benchmarks={"named_keys": task | {"trials": 8}},
        methods={method: {}},
        racing={"scheduler": "none", "rungs": [1.0]},
        selection={"heldout": 0.5},
        workers={"backend": "inline", "threads": cores()},
        tracking={"mlflow": "off"},
        reuse=False,
    )
    sweep(study)
    rows = [row for row in ledger(study) if row["split"] == "search"]
    computed = sum(row["layer_tokens"] for row in rows)
    apart = {row["trial_id"]: 0 for row in rows}
    for row in rows:
        apart[row["trial_id"]] += row["layer_tokens"] + row["layer_tokens_shared"]
    return computed, sum(apart.values()), apart["vanilla"]


def with_random_adapter(folder: Path) -> Path:
    """The shipped Mamba-1 with a ReMamba adapter that no training made."""
    import torch

    from statespan.methods import artifacts
    from statespan.methods.adapter import Selection, to_tensors
    from statespan.methods.base import ModelFacts
    from statespan.models.checkpoint import load_model

    shipped = load_model("mamba1-5m")
    shutil.copytree(shipped.folder, folder, dirs_exist_ok=True)
    facts = ModelFacts.of(load_model(str(folder)))
    torch.manual_seed(0)
    adapter = to_tensors(Selection(facts.d_model, facts.n_layer, facts.channels), {})
    artifacts.write(folder / "artifacts" / "remamba.safetensors", adapter, facts, {})
    return folder


# ---- overhead


class Instant:
    """An engine that computes nothing: what is left of a study is overhead."""

    rows_apart = False

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def evaluate(self, setting: Any, task: str, samples: Sequence[Any], alone: bool) -> list[Any]:
        from statespan.orchestration.items import SampleOutcome

        text = json.dumps([setting.method, dict(setting.params)], sort_keys=True)
        scores = [float(zlib.crc32(f"{text} {one.id}".encode()) % 7 > 2) for one in samples]
        return [SampleOutcome(row=-1, key="", status="done", score=score, layer_tokens=1) for score in scores]

    def free(self) -> None:
        return None


def overhead(folder: Path, size: Size) -> None:
    """Wall time of a trial in a study of instant trials, by how much longer one with more of them takes."""
    from statespan.config import Cluster
    from statespan.orchestration.ray_session import join, leave
    from statespan.orchestration.sweep import sweep

    join(Cluster())
    seconds: list[float] = []
    few, many = (4, 8) if size == QUICK else (8, 32)
    for trials in (few, few, many):  # the first one imports
        study = study_of(
            folder, QUICK, study=f"instant-{len(seconds)}", search={"trials": trials, "batch": 4}, reuse=False
        )
        started = time.perf_counter()
        sweep(study, make_engine=Instant)
        seconds.append(time.perf_counter() - started)
    leave()
    each = (seconds[2] - seconds[1]) / (many - few)
    print(
        f"{few} instant trials {seconds[1]:.1f} s, {many} {seconds[2]:.1f} s: {each:.2f} s a trial "
        f"(goal {GOALS['overhead']})"
    )


# ---- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("study", "naive", "compare", "sharing", "overhead", "alone", "all")
    parser.add_argument("part", choices=parts, nargs="?", default="all")
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep_vs_naive"), help="where all of it is kept")
    parser.add_argument("--quick", action="store_true", help="2,048 tokens, 4 trials, few samples")
    parser.add_argument("--samples", type=int, default=Size().samples, help="of the task, a multiple of 5")
    parser.add_argument("--settings", type=int, default=Size().settings, help="that the study tries beside vanilla")
    parser.add_argument("--trials", nargs="+", default=[], help="naive: only these; vanilla must be there to compare")
    parser.add_argument("--asked", help=argparse.SUPPRESS)
    given = parser.parse_args()
    size = QUICK if given.quick else Size(samples=given.samples, settings=given.settings)
    if size.samples % len(DEPTHS) or size.samples < 4 * len(DEPTHS):
        parser.error(f"--samples must be a multiple of {len(DEPTHS)}, the depths, and at least 20; got {size.samples}")
    folder = given.folder / ("quick" if given.quick else "" if size == Size() else size.folder)
    if given.part == "alone":
        alone(json.loads(given.asked))
        return
    if given.part in ("study", "all"):
        shutil.rmtree(folder, ignore_errors=True)
        run_study(folder, size)
    if given.part in ("naive", "all"):
        run_naive(folder, size, given.trials)
    if given.part in ("compare", "all"):
        compare(folder, size)
    if given.part in ("sharing", "all"):
        sharing(folder, size)
    if given.part in ("overhead", "all"):
        overhead(folder, size)


if __name__ == "__main__":
    main()
