"""Prompts with answers for training an adapter: retrieval tasks and running text, at up to three training lengths.

All rows of a batch have one prompt length and one answer length; a prompt that its task leaves short begins with text.
The same seed and batch number give the same batch, whichever worker draws it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from statespan.training.rows import RowMaker, RowSettings, make_rows
from statespan.training.tasks import TASKS, TEXT

LENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
"""Prompt lengths as multiples of the training length, drawn alike."""

TEXT_SHARE = 0.2  # of the batches: running text, whose next tokens are the answer
TEXT_ANSWER = 48  # tokens
SHORTEST_ANSWER, LONGEST_ANSWER = 3, 12  # tokens
WIDEST = 0.3  # share of a long prompt that a window takes at most; published


@dataclass(frozen=True, slots=True)
class Compression:
    """How a batch's prompts are compressed: the paper's draws for training (arXiv:2408.15496, section 4.1)."""

    window: float
    ratio: float

    @classmethod
    def draw(cls, rng: Random, prompt_length: int, train_length: int, widest: float = WIDEST) -> Compression:
        """p ~ U(0.1, widest) for prompts above 0.8 training lengths, else 0.1; ρ ~ U(0.05, 0.2)."""
        window = rng.uniform(0.1, widest) if prompt_length > 0.8 * train_length else 0.1
        return cls(window, rng.uniform(0.05, 0.2))


@dataclass(slots=True)
class AdapterBatch:
    """ids: (batch, prompt_length + answer) int64"""

    number: int
    ids: Tensor
    prompt_length: int
    compression: Compression

    def pin_memory(self) -> AdapterBatch:
        return AdapterBatch(self.number, self.ids.pin_memory(), self.prompt_length, self.compression)

    def to(self, device: torch.device) -> AdapterBatch:
        return AdapterBatch(self.number, self.ids.to(device, non_blocking=True), self.prompt_length, self.compression)


class AdapterRows:
    def __init__(
        self, maker: RowMaker, train_length: int, tokens_per_step: int, seed: int, widest: float = WIDEST
    ) -> None:
        self.maker, self.train_length, self.tokens_per_step, self.seed = maker, train_length, tokens_per_step, seed
        self.widest = widest

    def batch(self, number: int) -> AdapterBatch:
        rng = Random(f"adapter {self.seed} {number}")
        prompt_length = round(rng.choice(LENGTHS) * self.train_length)
        rows = max(self.tokens_per_step // prompt_length, 1)
        if rng.random() < TEXT_SHARE:
            drawn = [self.maker.desk.pool.window(rng, prompt_length + TEXT_ANSWER) for _ in range(rows)]
            ids = np.array(drawn, dtype=np.int64)
        else:
            pairs = [self._task(rng, prompt_length) for _ in range(rows)]
            answer = min(len(answer) for _, answer in pairs)
            ids = np.array([prompt + answered[:answer] for prompt, answered in pairs], dtype=np.int64)
        compression = Compression.draw(rng, prompt_length, self.train_length, self.widest)
        return AdapterBatch(number, torch.from_numpy(ids), prompt_length, compression)

    def _task(self, rng: Random, prompt_length: int) -> tuple[list[int], list[int]]:
        """A prompt of exactly that length, and the answer to its last question."""
        names, shares = list(TASKS), [share for _, share, _ in TASKS.values()]
        while True:
            episode = TASKS[rng.choices(names, shares)[0]][0](rng, prompt_length, self.maker.desk)
            if episode is None:
                continue
            asked = len(episode.ids)
            while asked and episode.weights[asked - 1] > TEXT:
                asked -= 1
            answer = episode.ids[asked:]
            if SHORTEST_ANSWER <= len(answer) <= LONGEST_ANSWER and asked <= prompt_length:
                before = self.maker.desk.pool.window(rng, prompt_length - asked) if asked < prompt_length else []
                return [*before, *episode.ids[:asked]], list(answer)


class AdapterStream(IterableDataset[AdapterBatch]):
    """Batches by number from `first` on, dealt to the workers in turn."""

    def __init__(
        self,
        ids: Path,
        train_length: int,
        tokens_per_step: int,
        seed: int,
        first: int = 0,
        widest: float = WIDEST,
    ) -> None:
        self.ids, self.first = ids, first
        self.settings = (train_length, tokens_per_step, seed, widest)

    def __iter__(self) -> Iterator[AdapterBatch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows, number = AdapterRows(make_rows(self.ids, RowSettings()), *self.settings), self.first + start
        while True:
            yield rows.batch(number)
            number += step
