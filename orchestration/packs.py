"""Samples and candidates into work items, cut and ordered so that trials share hidden streams. Pure: no pool, no clock.

A pack is some samples of one task and length whose streams fit a worker's store together. The items of a pack are the
candidates that have these samples to do, the one that diverges first first, so that each layer's stream is there when
the next one needs it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from statespan.orchestration.items import WorkItem
from statespan.orchestration.keys import digest
from statespan.orchestration.plan import GIB, Candidate, Plan
from statespan.orchestration.samples import Entry, Split

Todo = Sequence[tuple[Entry, str]]
"""Samples with the keys of their results."""

STREAMS = 2
"""Streams of a sample that are kept at once, or so: where the last and where the next setting diverge."""

PROJECTED = 7
"""Width of what a layer projects, in widths of the stream: x, z and dt of Mamba-1 are twice as wide, B and C narrow."""


def make_items(
    plan: Plan,
    candidates: Sequence[Candidate],
    todo: Mapping[str, Todo],
    rung: int,
    split: Split,
    workers: int = 1,
) -> Iterator[WorkItem]:
    """Items pack by pack.

    Args:
        todo: trial -> what it has to do.
        workers: how many there are to do it.
    """
    pack_of = _packs(plan, (entry for mine in todo.values() for entry, _ in mine), workers)
    ordered = sorted(candidates, key=lambda one: _divergence(plan, one, todo[one.trial_id]))
    packs: dict[str, list[WorkItem]] = defaultdict(list)
    reached: dict[str, int] = defaultdict(int)  # the layer at which the pack's last candidate left vanilla's stream
    for candidate in ordered:
        chunks: dict[str, list[tuple[Entry, str]]] = defaultdict(list)
        for entry, key in todo[candidate.trial_id]:
            chunks[pack_of[entry.row]].append((entry, key))
        for pack, chunk in chunks.items():
            item = make_item(plan, candidate, chunk, rung, split, pack, shared_layers=reached[pack])
            packs[pack].append(item)
            reached[pack] = min(_divergence(plan, candidate, chunk), plan.facts.n_layer - 1)
    for items in packs.values():
        yield from items


def make_item(
    plan: Plan,
    candidate: Candidate,
    chunk: Todo,
    rung: int,
    split: Split,
    pack: str,
    *,
    shared_layers: int = 0,
    alone: bool = False,
) -> WorkItem:
    return WorkItem(
        id=digest([candidate.trial_id, alone, [key for _, key in chunk], [entry.row for entry, _ in chunk]])[:24],
        trial_id=candidate.trial_id,
        setting=candidate.setting,
        task=chunk[0][0].task,
        rung=rung,
        split=split,
        rows=tuple(entry.row for entry, _ in chunk),
        keys=tuple(key for _, key in chunk),
        length=max(entry.prompt_tokens for entry, _ in chunk),
        tokens=sum(entry.prompt_tokens for entry, _ in chunk),
        layers=plan.facts.n_layer - shared_layers,
        shared_layers=shared_layers,
        pack=pack,
        alone=alone,
    )


def _packs(plan: Plan, entries: Iterable[Entry], count: int) -> dict[int, str]:
    """Row of a sample -> its pack; at least `count` packs of each task and length, where there are samples enough."""
    cells: dict[tuple[str, int], list[Entry]] = defaultdict(list)
    for entry in sorted(set(entries), key=lambda one: one.row):
        cells[entry.task, entry.length].append(entry)
    workers = plan.study.workers
    out: dict[int, str] = {}
    for (task, length), members in cells.items():
        stream = max(1, *(entry.prompt_tokens for entry in members)) * plan.facts.d_model * 4
        half = workers.store_gib * GIB / 2  # for streams, and for projections
        fits = int(half / (max(STREAMS, PROJECTED) * stream)) if workers.store_gib else workers.item_samples
        size = max(1, min(workers.item_samples, fits, -(-len(members) // count)))
        for start in range(0, len(members), size):
            name = f"{task}/{length}/{members[start].id}"
            out |= {entry.row: name for entry in members[start : start + size]}
    return out


def _divergence(plan: Plan, candidate: Candidate, mine: Todo) -> int:
    """The layer up to which a candidate is vanilla on these samples; the number of layers where it is throughout."""
    layers = [plan.first_changed(candidate.setting, entry) for entry, _ in mine[:1]]
    return next((layer for layer in layers if layer is not None), plan.facts.n_layer)
