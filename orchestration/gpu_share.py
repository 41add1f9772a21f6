"""How many workers share a GPU: as many as fit, by what one of them was measured to take. Each is held to its part.

The first worker runs the longest samples under vanilla, which no method here exceeds by more than HEADROOM, and tells
the most memory torch held. A worker that needs more than its part runs out of memory, halves its batch and remembers it
(pool.py); the others do not notice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from statespan.orchestration.items import WorkItem
from statespan.orchestration.packs import make_item
from statespan.orchestration.plan import GIB, Plan
from statespan.orchestration.pool import Pool

CONTEXT_BYTES = int(0.7 * GIB)
"""What a CUDA context and its libraries take beside torch's own memory."""

HEADROOM = 1.25
USED = 0.95
"""Share of a GPU's memory that is given to workers."""

MOST = 4
"""Workers a GPU: contexts take turns, so more only wait for each other; sixteen were no faster than one."""


@dataclass(frozen=True, slots=True)
class Share:
    """A worker's part of a GPU."""

    per_gpu: int
    memory_fraction: float
    """Of all memory, for torch: the contexts' part is taken off."""


def equal_parts(per_gpu: int, total_bytes: int | None = None) -> Share:
    """Parts for a number of workers; where the GPU's size is not known the contexts' part cannot be taken off."""
    contexts = CONTEXT_BYTES / total_bytes if total_bytes and per_gpu > 1 else 0.0
    return Share(per_gpu, max(USED / per_gpu - contexts, 0.01))


def fitting(peak_bytes: int, store_bytes: int, total_bytes: int) -> Share:
    """As many workers as fit, at least one.

    Args:
        peak_bytes: the most torch held while one worker ran the longest samples.
        store_bytes: what the worker may come to keep on the GPU beside that.
        total_bytes: the GPU's memory.
    """
    need = HEADROOM * peak_bytes + store_bytes + CONTEXT_BYTES
    return equal_parts(min(max(int(USED * total_bytes / need), 1), MOST), total_bytes)


def measure(plan: Plan, pool: Pool, total_bytes: Callable[[], int]) -> Share:
    """Run the probe on a pool of one worker that has the GPU to itself."""
    outcomes = [one for _, result in pool.run([probe(plan)]) for one in result.outcomes]
    peaks = [one.peak_bytes for one in outcomes if one.status == "done" and one.peak_bytes is not None]
    if not peaks:
        return equal_parts(1)
    return fitting(max(peaks), plan.worker_spec().gpu_store_bytes, total_bytes())


def probe(plan: Plan) -> WorkItem:
    """The longest samples of one task, as many as run together."""
    entries = sorted(plan.samples.of_split("search"), key=lambda entry: (-entry.prompt_tokens, entry.row))
    longest = [entry for entry in entries if entry.task == entries[0].task]
    numerics = plan.numerics
    together = 1 if numerics.deterministic else max(1, numerics.batch_tokens // longest[0].prompt_tokens)
    return make_item(plan, plan.baseline, [(one, "probe") for one in longest[:together]], -1, "search", "probe")
