"""Does a GPU compute what a CPU does? `python -m perf.gpu_model_check` from the root, on a machine with a GPU.

For each shipped model: logits of a prompt of several chunks in float32 against the CPU's plain torch in float64, then
more decode steps than a window has, fused and captured, against the same; in bfloat16, captured steps against eager
ones, alone and with rows that leave: to the bit where states are written at each token, to rounding through windows.
Through windows, with states of either width, captured steps are held to the bit against the same steps not captured.
One line a check; exit 1 if any failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from statespan.kernels.dispatch import use_backend
from statespan.models.checkpoint import load_model, shipped
from statespan.models.runner import Cache, Runner, Tokens
from statespan.models.step_graph import WINDOW, EagerSteps, GraphPool, GraphSteps

LENGTHS = (300, 133, 212)
CHUNK = 128
FLOAT32 = 2e-4  # of the logits' norm: sums of a few hundred terms in another order, eight layers deep

failed = False


def told(what: str, off: float, allowed: float) -> None:
    global failed
    failed = failed or not off <= allowed
    print(f"{'ok ' if off <= allowed else 'RED'} {what}: off by {off:.1e}, allowed {allowed:.0e}", flush=True)


def deviation(got: Tensor, want: Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm())


def rows(vocabulary: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=random).tolist() for length in LENGTHS]


def prefilled(runner: Runner, count: int) -> Cache:
    """States of so many rows: a few longer texts, the others of three tokens."""
    texts = [row[:200] for row in rows(runner.model.config.vocab_size)] + [[5, 6, 7 + row] for row in range(count)]
    return runner.prefill(Tokens.pad(texts[:count], "cuda")).cache


def against_the_cpu(name: str) -> None:
    exact = Runner(load_model(name, dtype="float64").model, chunk=CHUNK)
    ours = Runner(load_model(name, dtype="float32", device="cuda").model, chunk=CHUNK)
    texts = rows(exact.model.config.vocab_size)
    with use_backend("reference"):
        want = exact.prefill(Tokens.pad(texts), tail=8)
    got = ours.prefill(Tokens.pad(texts, "cuda"), tail=8)
    told(f"{name} prefill", deviation(ours.model.logits(got.hidden), exact.model.logits(want.hidden)), FLOAT32)
    captured = GraphSteps(ours.graphs, got.cache)
    tokens, cache = [1, 2, 3], want.cache
    for turn in range(WINDOW + 4):
        if turn == 2:  # one row goes on, through the fused kernels, from the midst of a window
            captured.keep([1])
            cache, tokens = cache.rows([1]), tokens[1:2]
        with use_backend("reference"):
            logits = exact.step(cache, torch.tensor(tokens))
        stepped = captured.step(tokens)
        told(f"{name} step {turn}", deviation(stepped.logits, logits), FLOAT32)
        tokens = logits.argmax(-1).tolist()
        if stepped.best is None or [token for token, _ in stepped.best] != tokens:
            told(f"{name} step {turn}, tokens", 1.0, 0.0)


def captured_is_eager(name: str) -> None:
    runner = Runner(load_model(name, dtype="bfloat16", device="cuda").model)
    for count in (1, 2, 4, 20):
        cache = prefilled(runner, count)
        eager, plain = EagerSteps(runner, cache.clone()), GraphSteps(GraphPool(runner.step), cache)
        windowed = GraphSteps(runner.graphs, cache)
        exact, near = 0.0, 0.0
        for turn in range(WINDOW + 2):
            if turn == 2 and count == 4:
                for one in (eager, plain, windowed):
                    one.keep([3, 1])
                count = 2
            fed = [10 * turn + row for row in range(count)]
            theirs = eager.step(fed).logits.clone()
            exact = max(exact, float((plain.step(fed).logits.double() - theirs.double()).abs().max()))
            near = max(near, deviation(windowed.step(fed).logits, theirs))
        told(f"{name} bfloat16, {count} rows captured and eager", exact, 0.0)
        told(f"{name} bfloat16, {count} rows captured with windows and eager", near, 2e-2)  # bfloat16 keeps 8 bits
        plain.close()
        windowed.close()


def not_captured(work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
    """What `cuda_capture` gives, by doing the work anew each time."""
    results = work()

    def replay() -> None:
        for fixed, new in zip(results, work(), strict=True):
            fixed.copy_(new)

    return replay, results


def windows_are_captured(name: str) -> None:
    """Every place in a window, rows that leave in the midst of one, and row counts on both sides of each limit."""
    runner = Runner(load_model(name, dtype="bfloat16", device="cuda").model)
    for count in (3, 17, 64, 65):
        cache = prefilled(runner, count)
        for dtype in (None, torch.bfloat16):
            pools = [GraphPool(runner.step, state_dtype=dtype, model=runner.model),
                     GraphPool(runner.step, not_captured, dtype, runner.model)]  # fmt: skip
            ours, theirs = (GraphSteps(pool, cache) for pool in pools)
            off, held = 0.0, list(range(count))
            for turn in range(2 * WINDOW + 3):
                if turn == WINDOW + 3:
                    held = held[1::2]
                    for one in (ours, theirs):
                        one.keep(list(range(count))[1::2])
                fed = [10 * turn + row for row in held]
                logits = [one.step(fed).logits.double().clone() for one in (ours, theirs)]
                off = max(off, float((logits[0] - logits[1]).abs().max()))
            for one, other in zip(ours.cache().states, theirs.cache().states, strict=True):
                off = max(off, float((one.ssm.double() - other.ssm.double()).abs().max()))
                off = max(off, float((one.conv.double() - other.conv.double()).abs().max()))
            told(f"{name} {count} rows, {dtype or torch.float32} states, captured and not", off, 0.0)
            ours.close()
            theirs.close()


def fused_is_plain(name: str) -> None:
    runner = Runner(load_model(name, dtype="bfloat16", device="cuda").model)
    for count in (2, 3, 23, 24, 64, 65):
        cache = prefilled(runner, count)
        other = cache.clone()
        ids = torch.arange(count, device=runner.model.device)
        fused = runner.step(cache, ids)
        hidden = runner.model.embed(ids)
        for block, state in zip(runner.model.blocks(), other.states, strict=True):
            hidden = hidden + block.mixer.step(block.norm(hidden), state)
        plain = runner.model.logits(runner.model.norm_f(hidden))
        told(f"{name} bfloat16, {count} rows, fused and plain step", deviation(fused, plain), 2e-2)


@torch.inference_mode()
def main() -> None:
    for name in shipped():
        for check in (captured_is_eager, windows_are_captured, fused_is_plain, against_the_cpu):
            try:
                check(name)
            except Exception as error:  # the others are worth knowing, too
                print(f"{name} {check.__name__}: {type(error).__name__} {str(error)[:300]}")
                told(f"{name} {check.__name__}", 1.0, 0.0)
    sys.exit(failed)


if __name__ == "__main__":
    main()
