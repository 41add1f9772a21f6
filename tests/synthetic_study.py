"""A made-up study that looks like a real one: a passkey sweep in which one method wins back long contexts.

Each trial has a true accuracy by length; the samples are drawn from it, so that what the verdict should say is known.
"""

import math

import numpy as np
import pyarrow as pa

from statespan.orchestration.study_data import (
    SAMPLE_COLUMNS,
    BenchmarkFacts,
    Importance,
    RungResult,
    StudyData,
    TrialData,
)

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRAINED = 1024
RUNGS = (0.25, 0.5, 1.0)
VANILLA = (1.0, 0.99, 0.95, 0.62, 0.28, 0.08)
LAYERS = {"longmamba": 1.0, "decimamba": 0.55, "remamba": 1.9, "vanilla": 1.0}


def accuracy(quality, length, depth):
    """`quality` 0 is vanilla, 1 keeps full accuracy; early facts are forgotten first."""
    base = np.interp(np.log2(length), np.log2(LENGTHS), VANILLA)
    lost = (1 - base) * (1.3 - 0.6 * depth)
    return np.clip(1 - lost * (1 - quality), 0.0, 1.0)


def draw_params(rng, method):
    if method == "longmamba":
        return {
            "scale": round(float(rng.uniform(0.5, 4.0)), 3),
            "channel_threshold": float(f"{rng.uniform(0.01, 0.5):.3g}"),
        }
    if method == "decimamba":
        params = {"base_tokens": int(2 ** rng.uniform(10, 13)), "decay": round(float(rng.uniform(0.25, 1.0)), 2)}
        return params | {"first_layer": int(rng.integers(1, 7)), "importance": str(rng.choice(["l2", "l1", "max"]))}
    return {"ratio": round(float(rng.uniform(0.004, 0.05)), 4), "p": round(float(rng.uniform(0.05, 0.4)), 2)}


def quality_of(method, params):
    """What the search has to find: a peak for each method."""
    if method == "longmamba":
        return 0.85 - 0.5 * abs(math.log2(params["scale"]) - 1.0) - 0.5 * params["channel_threshold"]
    if method == "decimamba":
        return 0.6 - 0.3 * abs(math.log2(params["base_tokens"]) - 11) - 0.5 * (0.8 - params["decay"]) ** 2
    return 0.1 - 4 * abs(params["ratio"] - 0.01)


def make_study(*, trials=24, per_cell=4, lift=1.0, seed=0, failing=True, lengths=LENGTHS):
    """A study of `trials` besides vanilla.

    Args:
        per_cell: samples a (length, depth) and split.
        lift: 1 for methods that help, 0 for methods that all equal vanilla.
        failing: one trial runs out of memory and a few samples time out.
    """
    rng = np.random.default_rng(seed)
    asked = [TrialData(id="vanilla", number=-1, method="vanilla", params={}, state="complete")]
    for number in range(trials):
        method = ("longmamba", "decimamba", "remamba")[int(rng.integers(3)) if number > 2 else number]
        params = draw_params(rng, method)
        asked.append(TrialData(id=f"t{number:04d}", number=number, method=method, params=params, state="complete"))
    grid = [(length, depth) for length in lengths for depth in DEPTHS for _ in range(per_cell)]
    luck = {split: rng.random(len(grid)) for split in ("search", "heldout")}
    rung_of = np.tile(
        np.searchsorted(np.array(RUNGS) * per_cell, np.arange(per_cell), side="right"), len(grid) // per_cell
    )
    columns, done = [], []
    for trial in asked:
        quality = lift * quality_of(trial.method, trial.params) if trial.params else 0.0
        last = 2 if quality > -0.05 or trial.id == "vanilla" else 1 if quality > -0.4 else 0
        oom = failing and trial.method == "remamba" and trial.number % 5 == 2
        scores = answers(rng, grid, luck["search"], quality)
        met = rung_of <= last
        columns.append(rows(rng, trial, grid, scores, met, rung_of, "search", oom))
        done.append(finish(trial, scores, rung_of, 0 if oom else last, oom))
    best = sorted((t for t in done[1:] if t.state == "complete"), key=lambda t: -t.rungs[-1].score)[:2]
    for trial in [done[0], *best]:
        scores = answers(
            rng, grid, luck["heldout"], lift * quality_of(trial.method, trial.params) if trial.params else 0.0
        )
        columns.append(rows(rng, trial, grid, scores, np.ones(len(grid), bool), rung_of * 0 - 1, "heldout", False))
    if failing:
        break_some(columns[-1], 2)
    table = pa.concat_tables([pa.table(one, schema=SAMPLE_COLUMNS) for one in columns])
    return StudyData(
        name="passkey-sweep",
        settings={"model": "statespan/mamba1-4m", "search": {"trials": trials, "sampler": "tpe"}, "seed": seed},
        model={"name": "mamba1-4m", "parameters": 4_213_504, "digest": "sha256:3f9a…", "layers": 8},
        train_length=TRAINED,
        benchmarks=[BenchmarkFacts(name="passkey", metric="accuracy", version=2, low=0.0, high=1.0)],
        trials=done,
        samples=table,
        baseline_id="vanilla",
        winner_id=best[0].id if best else None,
        runner_up_id=best[1].id if len(best) > 1 else None,
        provenance={
            "commit": "0a1b2c3d",
            "command": "statespan sweep study.yaml",
            "python": "3.11.7",
            "host": "laptop",
        },
        importance=[
            Importance(
                method="decimamba", evaluator="fANOVA", shares={"base_tokens": 0.71, "decay": 0.2, "first_layer": 0.09}
            ),
            Importance(method="longmamba", evaluator="fANOVA", shares={"scale": 0.83, "channel_threshold": 0.17}),
        ],
        serve_command="statespan serve runs/passkey-sweep",
        links={"MLflow": "sqlite:///runs/mlflow.db", "ledger": "runs/passkey-sweep/ledger"},
        seed=seed,
    )


def answers(rng, grid, luck, quality):
    lengths, depths = np.array([g[0] for g in grid]), np.array([g[1] for g in grid])
    own = np.where(rng.random(len(grid)) < 0.6, luck, rng.random(len(grid)))  # hard questions are hard for all
    return (own < accuracy(quality, lengths, depths)).astype(float)


def rows(rng, trial, grid, scores, met, rung_of, split, oom):
    index = np.flatnonzero(met)
    lengths = np.array([g[0] for g in grid])[index]
    known = split == "search" and trial.number % 7 == 3
    same = trial.method == "longmamba"
    shared = (lengths <= TRAINED) & same
    failed = oom & (lengths >= 8192)
    seconds = lengths * 2.1e-4 * LAYERS[trial.method] * rng.uniform(0.95, 1.05, len(index))
    share = np.where(shared, 0.0, 0.4 if trial.method == "decimamba" else 1.0)
    return {
        "trial_id": [trial.id] * len(index),
        "method": [trial.method] * len(index),
        "benchmark": ["passkey"] * len(index),
        "sample_id": [f"{split}-{k}" for k in index],
        "document": [f"{split}-book-{k // 2}" for k in index],
        "split": [split] * len(index),
        "rung": rung_of[index].astype(np.int32),
        "length": lengths.astype(np.int32),
        "depth": np.array([g[1] for g in grid], dtype=np.float32)[index],
        "score": np.where(failed, np.nan, scores[index]),
        "tokens_prompt": lengths - 7,
        "tokens_new": np.full(len(index), 6),
        "prefill_seconds": seconds,
        "decode_seconds": np.full(len(index), 0.03),
        "peak_bytes": (40e6 + lengths * 3000 * LAYERS[trial.method]).astype(np.int64),
        "status": np.where(failed, "oom", "done").tolist(),
        "cached": np.full(len(index), known),
        "shared": shared | (share < 1),
        "computed_share": np.where(known, 0.0, share).astype(np.float32),
        "text": [f"{70000 + 13 * int(k)}" if scores[k] else "I don't <know>" for k in index],
    }


def break_some(columns, count):
    columns["score"][:count] = np.nan
    columns["status"][:count] = ["timeout"] * count


def finish(trial, scores, rung_of, last, oom):
    rungs = []
    for rung in range(last + 1):
        met = rung_of <= rung
        stop = rung == last < 2 and not oom
        decision = "stop" if stop else "finish" if rung == 2 else "keep"
        reason = "worse than t0000 by 0.31 on 60 samples of 30 documents" if stop else "not shown to be worse"
        rungs.append(
            RungResult(
                rung=rung,
                samples=int(met.sum()),
                score=float(scores[met].mean()),
                decision=decision,
                reason=reason,
                p=0.004 if stop else 0.6,
            )
        )
    state = "oom" if oom else "complete" if last == 2 else "pruned"
    message = "out of memory at 8,192 tokens" if oom else rungs[-1].reason if state == "pruned" else ""
    return TrialData(
        id=trial.id,
        number=trial.number,
        method=trial.method,
        params=trial.params,
        state=state,
        rungs=rungs,
        message=message,
        published=trial.number in (0, 1),
        wall_seconds=4.2,
    )
