"""Training rows: equal-length token rows of plain text or of retrieval tasks, drawn from a seed and a batch number.

A task row holds one episode that fills it, or several shorter ones parted by <|endoftext|>; what is left is plain text.
The same seed and batch number give the same batch, whichever worker process draws it and however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from statespan.training.tasks import GIVEN, TASKS, TEXT, Desk, Episode
from statespan.training.text_pool import TextPool
from statespan.training.vocabulary import Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    task_share: float = 0.7
    """Share of the rows that hold retrieval tasks."""

    whole_share: float = 0.5
    """Share of the task rows that begin with an episode as long as the row; half of these are filled up with others."""

    answer_weight: float = 10.0
    """Weight of an answer token's loss; a token of running text has 1."""

    source_weights: tuple[tuple[str, float], ...] = (("kjv", 0.7), ("web", 0.7))
    """Factors on how often a source is read; 1 where it is not named. The two bibles say the same. Nothing should be
    raised: novels at 4 times their share are learnt by heart within 7,000 steps (docs/training.md)."""


@dataclass(slots=True)
class Batch:
    """Rows and where their loss lies.

    ids: (batch, length) int64, what the model reads
    places: (n,) int64, positions in the flattened batch whose next token carries loss
    targets: (n,) int64, those tokens
    weights: (n,) float32
    """

    number: int
    ids: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor

    def pin_memory(self) -> Batch:
        return Batch(self.number, *(tensor.pin_memory() for tensor in self._tensors()))

    def to(self, device: torch.device) -> Batch:
        return Batch(self.number, *(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.ids, self.places, self.targets, self.weights


class RowMaker:
    """Draws rows of tasks and text."""

    def __init__(self, desk: Desk, settings: RowSettings) -> None:
        self.desk, self.settings = desk, settings
        self._names = list(TASKS)

    def row(self, rng: Random, tokens: int) -> Episode:
        """Exactly so many tokens."""
        episode = Episode()
        if rng.random() < self.settings.task_share:
            whole = rng.random() < self.settings.whole_share and self._add_task(rng, episode, tokens)
            if not whole or rng.random() < 0.5:
                while tokens - len(episode.ids) > 48 and self._add_task(rng, episode, self._room(rng, tokens, episode)):
                    pass
        if (left := tokens - len(episode.ids)) > 0:
            episode.add(self.desk.pool.window(rng, left), TEXT)
        return Episode(episode.ids[:tokens], episode.weights[:tokens])

    def _room(self, rng: Random, tokens: int, episode: Episode) -> int:
        return min(rng.randint(48, max(tokens * 2 // 3, 49)), tokens - len(episode.ids))

    def _add_task(self, rng: Random, row: Episode, room: int) -> bool:
        """Append one episode of at most `room` tokens and its end; False where none was found to fit."""
        usable = [name for name in self._names if TASKS[name][2] <= room]
        shares = [TASKS[name][1] for name in usable]
        for name in rng.choices(usable, shares, k=4) if usable else ():
            episode = TASKS[name][0](rng, room - 1, self.desk)
            if episode is not None:
                row.ids += [*episode.ids, self.desk.encode.end]
                row.weights += [*episode.weights, TEXT]
                return True
        return False

    def batch(self, seed: int, number: int, tokens: int, length: int) -> Batch:
        """The batch of that number: `tokens // length` rows."""
        rng = Random(f"{seed} {number}")
        rows = [self.row(rng, length + 1) for _ in range(tokens // length)]
        ids = torch.from_numpy(np.array([row.ids for row in rows], dtype=np.int64))
        weights = torch.from_numpy(np.array([row.weights for row in rows], dtype=np.float32))[:, 1:].flatten()
        places = (weights != GIVEN).nonzero()[:, 0]
        targets = ids[:, 1:].flatten()
        return Batch(number, ids[:, :-1].contiguous(), places, targets[places], weights[places])


class BatchStream(IterableDataset[Batch]):
    """Batches by number from `first` on, dealt to the workers in turn; `length_of(number)` gives their rows' length."""

    def __init__(
        self, ids: Path, settings: RowSettings, seed: int, tokens: int, length_of: Any, first: int = 0
    ) -> None:
        self.ids, self.settings, self.seed = ids, settings, seed
        self.tokens, self.length_of, self.first = tokens, length_of, first

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        maker, number = make_rows(self.ids, self.settings), self.first + start
        while True:
            yield maker.batch(self.seed, number, self.tokens, self.length_of(number))
            number += step


def make_rows(ids: Path, settings: RowSettings) -> RowMaker:
    """A row maker on a folder written by `statespan.training.vocabulary`."""
    encoder = Encoder(ids / "tokenizer.json")
    pool = TextPool.load(ids / "train", encoder, dict(settings.source_weights))
    return RowMaker(Desk(encoder, pool, settings.answer_weight), settings)


def loader(stream: BatchStream, workers: int, pin: bool) -> DataLoader[Batch]:
    """Batches in the order of their numbers, drawn ahead by worker processes."""
    ahead = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    return DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=pin, **ahead)  # type: ignore[arg-type]
