"""Replay races on complete score matrices: is the best kept, what does it cost, how often is an equal dropped?

    python perf/racing_replay.py                     # synthetic families, about 12 minutes on one core
    python perf/racing_replay.py --matrix scores.parquet --replays 50

A matrix is a Parquet file of per-sample scores: columns trial_id, sample_id, document, length and score, every trial on
every sample. Each replay draws its documents anew, with replacement, and its trials in a new order.

Prints, a family and a number of trials that climb together: `best kept` (share of truly best trials that were not
stopped; goal >= 95 %), `cost` (samples evaluated, of all trials on all samples; goal <= 35 % where trials differ),
`false drops` (share of trials stopped in favour of one that is truly no better; nominal 5 %), `regret` (true quality of
the best minus that of the trial with the best score at the end); and the same for the race without its correction,
which is what a plain paired test would do. In `all equal` there is nothing to find: every drop is false, and an honest
race costs nearly everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from statespan.orchestration import racing
from statespan.orchestration.racing import Race, Standing

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Scores of every trial on every sample, and each trial's true quality."""

    scores: Array
    truth: Array
    documents: NDArray[np.int64]
    strata: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Outcome:
    best_kept: float
    """Share of the truly best trials that were not stopped: 0 or 1 unless several are equal."""

    cost: float
    false_drops: float
    """Share of all trials that were stopped in favour of one that is truly no better."""

    regret: float


def answers(truth: Array, rng: np.random.Generator, *, documents: int = 160, together: float = 0.5) -> Matrix:
    """Right or wrong answers to two questions a document at two lengths. A share of a trial's luck is the question's
    and the document's own, the same for every trial, so most differences are ties."""
    samples = 2 * documents
    document = np.repeat(np.arange(documents), 2)
    difficulty = np.where(rng.random(samples) < 0.5, rng.random(documents)[document], rng.random(samples))
    luck = np.where(rng.random((len(truth), samples)) < together, difficulty, rng.random((len(truth), samples)))
    return Matrix((luck < truth[:, None]).astype(float), truth, document, document % 2)


def one_good(rng: np.random.Generator) -> Matrix:
    return answers(np.concatenate([[0.8], rng.uniform(0.1, 0.6, size=39)]), rng)


def spread(rng: np.random.Generator) -> Matrix:
    """What a search looks like: from useless to good, several near the top."""
    return answers(np.sort(0.85 * rng.beta(2, 2, size=40))[::-1].copy(), rng)


def close_second(rng: np.random.Generator) -> Matrix:
    return answers(np.concatenate([[0.80, 0.78], rng.uniform(0.1, 0.6, size=38)]), rng)


def heavy_ties(rng: np.random.Generator) -> Matrix:
    """Nine of ten answers are the same for all trials."""
    return answers(np.concatenate([[0.95], rng.uniform(0.3, 0.85, size=39)]), rng, together=0.9)


def real_valued(rng: np.random.Generator) -> Matrix:
    """F1-like scores in [0, 1]."""
    truth = np.concatenate([[0.6], rng.uniform(0.1, 0.5, size=39)])
    document = np.arange(160)
    shared = rng.normal(0, 1.0, size=160)
    logits = np.log(truth / (1 - truth))[:, None] + shared + rng.normal(0, 1.0, size=(40, 160))
    return Matrix(1 / (1 + np.exp(-logits)), truth, document, document % 2)


def half_bad(rng: np.random.Generator) -> Matrix:
    """Ten equal winners among thirty that leave early: the hardest case for forgetting those who left."""
    return answers(np.concatenate([np.full(10, 0.6), np.full(30, 0.35)]), rng)


def all_equal(rng: np.random.Generator) -> Matrix:
    return answers(np.full(40, 0.5), rng)


def all_equal_real(rng: np.random.Generator) -> Matrix:
    scores = rng.normal(size=160) + rng.normal(size=(40, 160))
    return Matrix(scores, np.zeros(40), np.arange(160), np.arange(160) % 2)


Draw = Callable[[np.random.Generator], Matrix]
FAMILIES: dict[str, Draw] = {
    "one good, many bad": one_good,
    "wide spread": spread,
    "close second": close_second,
    "heavy ties": heavy_ties,
    "real-valued": real_valued,
    "ten equal, thirty bad": half_bad,
    "all equal, right/wrong": all_equal,
    "all equal, real-valued": all_equal_real,
}


def redraw(matrix: Matrix, rng: np.random.Generator) -> Matrix:
    """The same trials on documents drawn with replacement."""
    codes = np.unique(matrix.documents)
    drawn = rng.choice(codes, size=len(codes))
    rows = [np.flatnonzero(matrix.documents == code) for code in drawn]
    index = np.concatenate(rows)
    document = np.repeat(np.arange(len(drawn)), [len(row) for row in rows])
    return Matrix(matrix.scores[:, index], matrix.truth, document, matrix.strata[index])


def replay(matrix: Matrix, race: Race, together: int, rng: np.random.Generator) -> Outcome:
    """One race: `together` trials climb rung by rung at a time, after those before them have ended."""
    trials = len(matrix.truth)
    arrival = rng.permutation(trials)
    rung_of = np.full(trials, -1)
    alive = np.ones(trials, dtype=bool)
    false_drops = 0
    for start in range(0, trials, together):
        for rung in range(race.last_rung + 1):
            climbing = [trial for trial in arrival[start : start + together] if alive[trial]]
            rung_of[climbing] = rung
            standings = {
                trial: Standing(str(trial), matrix.scores[trial], race.rungs <= rung_of[trial])
                for trial in np.flatnonzero(alive & (rung_of >= rung))
            }
            rivals, stopped = racing.choose_incumbents(race, list(standings.values()), rung), int((~alive).sum())
            for trial in climbing:
                decision = racing.decide(race, standings[trial], rivals, rung, stopped)
                if decision.action == "stop" and decision.incumbent_id is not None:
                    alive[trial] = False
                    false_drops += int(matrix.truth[int(decision.incumbent_id)] <= matrix.truth[trial])
    best = matrix.truth.max()
    cost = sum(int((race.rungs <= rung).sum()) for rung in rung_of) / matrix.scores.size
    finalists = np.flatnonzero(alive)
    chosen = finalists[matrix.scores[finalists].mean(axis=1).argmax()]
    kept = float(alive[matrix.truth == best].mean())
    return Outcome(kept, cost, false_drops / trials, float(best - matrix.truth[chosen]))


class Uncorrected(Race):
    """Level alpha at every look, whatever the number of trials: what a plain paired test would do."""

    def corrected(self, p: float, stopped: int = 0) -> float:
        return p


def race_of(matrix: Matrix, rng: np.random.Generator, rules: type[Race], shares: Sequence[float]) -> Race:
    rungs = racing.assign_rungs(matrix.documents, matrix.strata, shares, seed=int(rng.integers(2**31)))
    return rules(documents=matrix.documents, strata=matrix.strata, rungs=rungs, trials=len(matrix.truth))


def summary(draw: Draw, replays: int, together: int, correct: bool, seed: int, shares: Sequence[float]) -> str:
    outcomes = []
    for number in range(replays):
        rng = np.random.default_rng((seed, number))
        matrix = draw(rng)
        race = race_of(matrix, rng, Race if correct else Uncorrected, shares)
        outcomes.append(replay(matrix, race, together, rng))
    kept, cost, false, regret = (
        float(np.mean([getattr(outcome, name) for outcome in outcomes]))
        for name in ("best_kept", "cost", "false_drops", "regret")
    )
    return f"{kept:9.1%} {cost:7.1%} {false:11.2%} {regret:8.4f}"


def from_parquet(path: str) -> Matrix:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["trial_id", "sample_id", "document", "length", "score"]).to_pandas()
    wide = table.pivot(index="trial_id", columns="sample_id", values="score")
    if wide.isna().any().any():
        raise SystemExit(f"{path}: every trial must have a score on every sample; {int(wide.isna().sum().sum())} lack")
    facts = table.drop_duplicates("sample_id").set_index("sample_id").loc[wide.columns]
    scores = wide.to_numpy()
    document = np.unique(facts["document"], return_inverse=True)[1]
    strata = np.unique(facts["length"], return_inverse=True)[1]
    return Matrix(scores, scores.mean(axis=1), document, strata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", help="Parquet file of per-sample scores; without it, the synthetic families")
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--together", type=int, nargs="+", default=[16, 40], help="trials that climb together")
    parser.add_argument("--rungs", type=float, nargs="+", default=racing.SHARES, help="share met by the end of each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    families = {name: FAMILIES[name] for name in arguments.family}
    if arguments.matrix:
        matrix = from_parquet(arguments.matrix)
        families = {arguments.matrix: lambda rng: redraw(matrix, rng)}
    print(f"{'family':22s} together corrected best kept    cost false drops   regret")
    for name, draw in families.items():
        for together in arguments.together:
            for correct in (True, False):
                line = summary(draw, arguments.replays, together, correct, arguments.seed, arguments.rungs)
                print(f"{name:22s} {together:8d} {'yes' if correct else 'no':9s} {line}", flush=True)


if __name__ == "__main__":
    main()
