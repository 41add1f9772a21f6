"""A study whose workers share GPUs: how many fit, is each held to its part, is every score what one process gets?

    python perf/gpu_sweep.py --folder runs/gpu_sweep     # on a machine with a CUDA device, about two minutes
    python perf/gpu_sweep.py --cpu                       # small and on a CPU: does the script still work?
    python perf/gpu_sweep.py --part compare --part pinned

study    `statespan sweep` of DeciMamba, 16 trials, named pass keys in 8,192 and 16,384 tokens, `per_gpu: auto`; what
         its processes took of each GPU by nvidia-smi, and each worker's most allocated bytes beside its enforced part
compare  the study's settings again, each on its samples, one after the other in this process, as many as the time
         allows: scores and tokens
pinned   a worker whose streams have little room on the GPU: its results, and what lies in pinned host memory
oom      a pool whose worker has a small part of the GPU and far too large batches: what it learns, and the results
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from statespan.config import Study
from statespan.study_file import check_study

MIB = 2**20
OOM_FRACTION = 0.012
"""Of the GPU: about 1 GiB of 80."""

COMPARE_SECONDS = 25.0
"""After which no further setting is evaluated by one process."""


def study_of(folder: Path, cpu: bool, **changes: Any) -> Study:
    raw: dict[str, Any] = {
        "study": "gpu-sweep",
        "model": "mamba1-5m",
        "benchmarks": {
            "named_keys": {
                "benchmark": "passkey",
                "keys": 2,
                "lengths": [512, 1024] if cpu else [8192, 16384],
                "depths": [0.2, 0.5, 0.8],
                "trials": 2 if cpu else 8,
            }
        },
        "methods": {"decimamba": {}},
        "search": {"trials": 4, "batch": 4} if cpu else {"trials": 16, "batch": 16},
        "selection": {"heldout": 0.3},
        "workers": {"per_gpu": "auto"},
        "numerics": {"device": "cpu" if cpu else "cuda"},
        "tracking": {"mlflow": "off"},
        "reuse": False,
        "output": str(folder),
    }
    return check_study(raw | changes)


def say(*words: object) -> None:
    print(*words, flush=True)


# ---- the study


class Watch(threading.Thread):
    """The most that each process was seen to hold of the GPUs, MiB, by nvidia-smi."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most: defaultdict[str, int] = defaultdict(int)
        self.together = 0
        self.over = threading.Event()

    def run(self) -> None:
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        while shutil.which("nvidia-smi") and not self.over.wait(0.3):
            lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
            now = {
                pid.strip(): int(mib) for pid, _, mib in (one.partition(",") for one in lines) if mib.strip().isdigit()
            }
            self.together = max(self.together, sum(now.values()))
            for pid, mib in now.items():
                self.most[pid] = max(self.most[pid], mib)


def ledger(study: Study) -> list[dict[str, Any]]:
    from statespan.orchestration.ledger import Ledger

    rows: list[dict[str, Any]] = Ledger(study.folder / "ledger").read().to_pylist()
    return rows


def run_study(folder: Path, cpu: bool) -> None:
    from statespan.study_file import saved_form

    study = study_of(folder, cpu)
    shutil.rmtree(study.folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(saved_form(study))
    watch, began = Watch(), time.perf_counter()
    watch.start()
    with (folder / "sweep.log").open("w") as log:
        command = [sys.executable, "-m", "statespan", "sweep", str(folder / "study.yaml"), "--plain"]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    seconds = time.perf_counter() - began
    watch.over.set()
    if code:
        say((folder / "sweep.log").read_text()[-3000:])
        raise SystemExit(f"the study failed with {code}")
    rows = ledger(study)
    computed = [row for row in rows if row["origin"] == "computed"]
    states = sorted({row["status"] for row in rows})
    say(f"study: {seconds:.1f} s, {len(rows)} results, {len(computed)} computed, status {states}")
    spent, spared = (sum(row[name] for row in rows) for name in ("layer_tokens", "layer_tokens_shared"))
    say(f"  layer-tokens {spent:,} computed, {spared:,} shared")
    by_worker: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in computed:
        by_worker[row["worker"]].append(row)
    first, last = (limit(row["finished_at"] for row in computed) for limit in (min, max))
    span = (last - first).total_seconds()
    say(f"  {len(by_worker)} workers did something, from the first result to the last {span:.1f} s")
    _parts(by_worker, cpu)
    held = sorted(watch.most.values())
    if held:
        say(f"  nvidia-smi: {len(held)} processes, {held[0]} to {held[-1]} MiB each, at most {watch.together} together")


def _parts(by_worker: Mapping[str, Sequence[Mapping[str, Any]]], cpu: bool) -> None:
    """Each worker's most allocated bytes beside what it may take."""
    part = float("nan")
    if not cpu:
        import torch

        from statespan.orchestration.gpu_share import equal_parts

        total = torch.cuda.get_device_properties(0).total_memory
        number = 1 + max(int(name.rpartition("-")[2]) for name in by_worker)
        per_gpu = -(-number // torch.cuda.device_count())
        part = equal_parts(per_gpu, total).memory_fraction * total / MIB
        say(
            f"  at least {per_gpu} workers a GPU of {total / MIB:.0f} MiB; with as many, torch may take {part:.0f} each"
        )
    for name, mine in sorted(by_worker.items()):
        most = max((row["peak_bytes"] or 0 for row in mine), default=0) / MIB
        seconds = sum(row["prefill_seconds"] + row["decode_seconds"] for row in mine)
        say(f"    {name:24} {len(mine):4} samples {seconds:7.2f} s of model, at most {most:8.1f} MiB"
            + (f", {most / part:.1%} of its part" if part == part else ""))  # fmt: skip


# ---- one process


def one_process(study: Study) -> tuple[Any, Any, list[Any], dict[str, Any]]:
    """The plan, the loaded model, the study's samples, and its trials' settings with vanilla first."""
    from statespan.models.checkpoint import load_model
    from statespan.orchestration.assemble import load_study_data
    from statespan.orchestration.plan import make_plan

    plan = make_plan(study)
    spec = plan.worker_spec()
    loaded = load_model(spec.model, dtype=spec.dtype, device=spec.device)
    samples = [plan.samples.sample(entry.row) for entry in plan.samples.entries]
    trials = {one.id: (one.method, dict(one.params)) for one in load_study_data(study.folder).trials}
    return plan, loaded, samples, trials


def agreeing(rows: Sequence[Mapping[str, Any]], found: Mapping[tuple[str, str], tuple[float, tuple[int, ...]]]) -> str:
    both = [
        (row, found[row["trial_id"], row["sample_id"]]) for row in rows if (row["trial_id"], row["sample_id"]) in found
    ]
    scores = sum(row["score"] == one[0] for row, one in both)
    tokens = [(tuple(row["ids"]), one[1]) for row, one in both if row["ids"]]
    same = sum(mine == other for mine, other in tokens)
    return f"{scores} of {len(both)} scores and {same} of {len(tokens)} rows' tokens are identical"


def compare(folder: Path, cpu: bool) -> None:
    from statespan.benchmarks.evaluate import evaluate
    from statespan.methods.base import ModelFacts
    from statespan.methods.table import build_method
    from statespan.models.runner import Runner

    study = study_of(folder, cpu)
    plan, loaded, samples, trials = one_process(study)
    rows, began = ledger(study), time.perf_counter()
    met: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        met[row["trial_id"]].add(row["sample_id"])
    found: dict[tuple[str, str], tuple[float, tuple[int, ...]]] = {}
    runner, facts, benchmark = Runner(loaded.model), ModelFacts.of(loaded), plan.tasks["named_keys"]
    for name, (method, params) in trials.items():
        if time.perf_counter() - began > COMPARE_SECONDS:
            break
        mine = [sample for sample in samples if sample.id in met[name]]
        for result in evaluate(runner, build_method(method, params, facts), benchmark, mine, loaded.tokenizer):
            found[name, result.sample_id] = (result.score, tuple(result.completion.ids))
    took = time.perf_counter() - began
    asked = len({name for name, _ in found})
    say(f"compare: {agreeing(rows, found)}; {asked} of {len(trials)} settings")
    say(f"  {len(found)} evaluations one after the other took {took:.1f} s")


def pinned(folder: Path, cpu: bool) -> None:
    from statespan.orchestration.items import Setting
    from statespan.orchestration.model_engine import ModelEngine

    study = study_of(folder, cpu, workers={"gpu_store_gib": 0.0625, "store_gib": 2.0})
    plan, _, samples, trials = one_process(study)
    engine = ModelEngine(plan.worker_spec())
    # two samples in turn, so that each trial's streams have left the GPU when the next trial wants them
    few = samples[-2:]
    settings = [Setting(method=method, params=params) for method, params in trials.values()]
    rows, found = ledger(study), {}
    for name, setting in zip(trials, settings, strict=True):
        for sample in few:
            (one,) = engine.evaluate(setting, "named_keys", [sample], alone=False)
            found[name, sample.id] = (one.score, one.ids)
    store = engine.runner.store
    assert store is not None
    say(f"pinned: {agreeing(rows, found)}")
    for name, rack in (("streams", store.streams), ("projections", store.projections)):
        where = ", ".join(f"{shelf.bytes / MIB:.0f} of {shelf.budget_bytes / MIB:.0f} MiB" for shelf in rack.shelves)
        say(f"  {name}: {where} (GPU first, then pinned host memory)" if not cpu else f"  {name}: {where}")
    work = engine.runner.work
    say(f"  layer-tokens {work.computed:,} computed, {work.shared:,} shared")


# ---- out of memory


def oom(folder: Path, cpu: bool) -> None:
    from statespan.config import Cluster
    from statespan.orchestration.cluster import RayBackend
    from statespan.orchestration.model_engine import load_engine
    from statespan.orchestration.packs import make_item
    from statespan.orchestration.plan import make_plan
    from statespan.orchestration.pool import Pool
    from statespan.orchestration.ray_session import join, leave

    numerics = {"device": "cpu" if cpu else "cuda", "deterministic": False, "batch_tokens": 1 << 22}
    workers = {"gpu_store_gib": 0.0, "store_gib": 0.0, "item_samples": 64}
    plan = make_plan(study_of(folder, cpu, study="squeezed", numerics=numerics, workers=workers))
    entries = [one for one in plan.samples.entries if one.length == max(one.length for one in plan.samples.entries)]
    join(Cluster())
    try:
        spec = plan.worker_spec(1.0 if cpu else OOM_FRACTION)
        backend = RayBackend(
            spec, plan.samples.table, load_engine, names=["squeezed"], cluster=Cluster(), cpus=0.5, gpus=float(not cpu)
        )
        pool = Pool(backend)
        items = [
            make_item(plan, plan.baseline, [(one, f"{turn}") for one in entries], -1, "search", f"oom-{turn}")
            for turn in range(2)
        ]
        for item, result in pool.run(items):
            done = sum(one.status == "done" for one in result.outcomes)
            took = round(result.seconds, 2)
            errors = sorted({one.error[:80] for one in result.outcomes if one.error})
            say(f"oom: {len(item.rows)} samples of {item.length} tokens in one batch: {done} done, {took} s")
            say(f"  ran out: {result.ran_out}; a batch now holds {result.batch:,} tokens, the pool tells others")
            say(f"  {pool.batch_tokens}; restarts {pool.restarts}; errors {errors}")
        pool.close()
    finally:
        leave()


PARTS: dict[str, Callable[[Path, bool], None]] = {"study": run_study, "compare": compare, "pinned": pinned, "oom": oom}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu_sweep"))
    parser.add_argument("--part", choices=PARTS, action="append", default=[])
    parser.add_argument("--cpu", action="store_true", help="small and on a CPU")
    given = parser.parse_args()
    for name in given.part or PARTS:
        # each in a process of its own: what one holds of a GPU is not the next one's
        if given.part == [name]:
            PARTS[name](given.folder, given.cpu)
            continue
        command = [
            sys.executable,
            __file__,
            "--folder",
            str(given.folder),
            "--part",
            name,
            *(["--cpu"] if given.cpu else []),
        ]
        began = time.perf_counter()
        code = subprocess.run(command).returncode
        say(f"{name}: exit {code} after {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
