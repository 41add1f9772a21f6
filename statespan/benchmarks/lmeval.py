"""Any lm-evaluation-harness task on our engine, under any method: an `LM` that EleutherAI's harness can drive.

The harness is the optional extra `lmeval`; its stock Mamba wrapper cuts prompts at 2,048 tokens, feeds left padding
into the state and runs on past stop strings. Here prompts are never cut, rows are exact in any batch, and generation
stops. A method acts on the context only: what is scored is never compressed. A rolling likelihood, whose whole text
is scored, reads text and target in one pass (`scope="window"`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statespan.benchmarks.short_context import split_tokens
from statespan.errors import UserError
from statespan.models.generate import Decoding, generate, score
from statespan.models.hook import Method
from statespan.models.runner import Runner
from statespan.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM


def run_tasks(
    runner: Runner,
    method: Method,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Mapping[str, Any]:
    """The harness's results of these tasks. With `include_path` only the task files in that folder are known, and
    nothing is fetched that they do not name; without it all of the harness's own are, which takes it some 20 seconds
    to read.
    """
    _imported()
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path), include_defaults=False) if include_path else TaskManager()
    missing = sorted(set(tasks) - set(manager.all_tasks))
    if missing:
        raise UserError(f"lm-evaluation-harness knows no task named {missing[0]!r}")
    results: Mapping[str, Any] | None = lm_eval.simple_evaluate(
        model=adapter(runner, method, tokenizer),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert results is not None, "the harness gives no results on ranks other than 0"
    return results


def _imported() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed: pip install 'statespan[lmeval]'") from None


def adapter(runner: Runner, method: Method, tokenizer: Tokenizer) -> LM:
    """Our engine as the harness's `LM`."""
    _imported()
    from lm_eval.api.model import LM

    class StatespanLM(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
            """Contexts that several requests share are read once."""
            split = [split_tokens(request.args[0], request.args[1], tokenizer) for request in requests]
            by_context: dict[tuple[int, ...], list[int]] = {}
            for number, (context_ids, _) in enumerate(split):
                by_context.setdefault(tuple(context_ids), []).append(number)
            out: dict[int, tuple[float, bool]] = {}
            for context, numbers in by_context.items():
                found = score(runner, method, context, [split[number][1] for number in numbers]).rows
                out |= {number: (row.total, row.greedy) for number, row in zip(numbers, found, strict=True)}
            return [out[number] for number in range(len(requests))]

        def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            ids = tokenizer.encode(text)
            start = [tokenizer.eos_id] if tokenizer.eos_id is not None else [ids.pop(0)]
            return score(runner, method, start, [ids], scope="window").rows[0].total if ids else 0.0

        def generate_until(self, requests: list[Instance]) -> list[str]:
            return [self._generated(*request.args) for request in requests]

        def _generated(self, context: str, settings: Mapping[str, Any]) -> str:
            decoding = Decoding(
                max_new_tokens=int(settings.get("max_gen_toks", 256)),
                stop=_stops(settings.get("until")),
                eos_id=tokenizer.eos_id,
                temperature=float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0,
            )
            return generate(runner, method, [tokenizer.encode(context)], [decoding], tokenizer).rows[0].text

    return StatespanLM()


def _stops(until: str | Sequence[str] | None) -> tuple[str, ...]:
    return (until,) if isinstance(until, str) else tuple(stop for stop in until or () if stop)
