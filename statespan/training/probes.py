"""What is measured while and after training: retrieval at many lengths, and bits per byte on held-out novels.

A retrieval sample counts as right when every token of its answer is the most likely one given those before it, which is
when greedy decoding gives the answer; one forward pass tells, without decoding. Haystack and novels are held out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from statespan.benchmarks import needles
from statespan.benchmarks.data import load_text
from statespan.errors import UserError
from statespan.models.lm import MambaLM
from statespan.training.tasks import Desk, hide_in_text
from statespan.training.text_pool import TextPool
from statespan.training.vocabulary import Encoder

PASSKEY = 0
"""The number of named keys that stands for the passkey task."""


@dataclass(frozen=True, slots=True)
class Probe:
    ids: list[int]
    answer: int
    """Tokens at the end of `ids` that are the answer."""


def probe_desk(ids: Path, haystack: str = "moby_dick") -> Desk:
    encoder = Encoder(ids / "tokenizer.json")
    return Desk(encoder, TextPool({haystack: np.load(ids / "heldout" / f"{haystack}.npy")}, encoder, {}), 1.0)


def make_probe(rng: Random, keys: int, length: int, desk: Desk) -> Probe:
    """A prompt of at most `length` tokens with its answer: the passkey, or one of `keys` named numbers."""
    if keys == PASSKEY:
        value = needles.draw_passkey(rng)
        intro, question, cue = needles.PASSKEY_INTRO, needles.PASSKEY_QUESTION, needles.PASSKEY_CUE
        hidden = [needles.PASSKEY_NEEDLE.format(value=value)]
    else:
        pairs = [(key, needles.draw_value(rng, "number")) for key in needles.draw_keys(rng, keys)]
        key, value = rng.choice(pairs)
        intro = needles.NAMED_INTRO.format(kind="number")
        question, cue = needles.named_question("number", [key], 1)
        hidden = [needles.NAMED_NEEDLE.format(kind="number", key=k, value=v) for k, v in pairs]
    opening, answer = desk.encode(f"{intro}\n\n"), desk.encode(f" {value}")
    closing = desk.encode(f"\n\nQuestion: {question}\nAnswer: {cue}")
    context = hide_in_text(rng, hidden, length - len(opening) - len(closing), desk)
    if context is None:
        raise UserError(f"{keys} named keys do not fit into a prompt of {length} tokens")
    return Probe(opening + context.ids + closing + answer, len(answer))


def _hidden(model: MambaLM, ids: Tensor) -> Tensor:
    """The model's hidden states by the kernels that trained it: those with gradients on a GPU."""
    with torch.set_grad_enabled(model.device.type == "cuda"):
        hidden: Tensor = model(ids)
        return hidden.detach()


@torch.no_grad()
def exact(model: MambaLM, probes: list[Probe], tokens_at_once: int) -> float:
    """Share of the probes answered exactly."""
    right = 0
    rows = max(tokens_at_once // max(len(probe.ids) for probe in probes), 1)
    for start in range(0, len(probes), rows):
        right += int(_right(model, probes[start : start + rows]))
    return right / len(probes)


def _right(model: MambaLM, probes: list[Probe]) -> Tensor:
    longest = max(len(probe.ids) for probe in probes)
    # padded on the right, where a causal model's answers do not see it
    ids = torch.tensor([probe.ids + [0] * (longest - len(probe.ids)) for probe in probes], device=model.device)
    hidden = _hidden(model, ids)
    right = torch.zeros((), dtype=torch.int64, device=ids.device)
    for row, probe in enumerate(probes):
        first, last = len(probe.ids) - probe.answer, len(probe.ids)
        chosen = model.logits(hidden[row, first - 1 : last - 1]).argmax(-1)
        right += (chosen == ids[row, first:last]).all()
    return right


@torch.no_grad()
def bits_per_byte(model: MambaLM, ids: np.ndarray, text_bytes: float, window: int, tokens_at_once: int) -> float:
    """Of a whole text: windows that overlap by half, the second half of each scored (all of the first window)."""
    stride = window // 2
    starts = range(0, max(len(ids) - stride - 1, 1), stride)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    rows = max(tokens_at_once // window, 1)
    for at in range(0, len(starts), rows):
        total += _nats(model, ids, list(starts[at : at + rows]), window)
    return float(total) / math.log(2) / text_bytes


def _nats(model: MambaLM, ids: np.ndarray, starts: list[int], window: int) -> Tensor:
    rows = np.zeros((len(starts), window + 1), dtype=np.int64)
    scored = np.zeros((len(starts), window), dtype=bool)
    for row, start in enumerate(starts):
        part = ids[start : start + window + 1]
        rows[row, : len(part)] = part
        scored[row, 0 if start == 0 else window // 2 : len(part) - 1] = True
    batch, mask = (torch.from_numpy(array).to(model.device) for array in (rows, scored))
    hidden = _hidden(model, batch[:, :-1])[mask]
    targets, total = batch[:, 1:][mask], torch.zeros((), dtype=torch.float64, device=model.device)
    for part, wanted in zip(hidden.split(4096), targets.split(4096), strict=True):
        total += F.cross_entropy(model.logits(part).float(), wanted, reduction="none").double().sum()
    return total


def novel(ids: Path, name: str) -> tuple[np.ndarray, int]:
    """A held-out text's token ids and its size in bytes."""
    return np.load(ids / "heldout" / f"{name}.npy"), len(load_text(name).encode())


class ProbeSet:
    """The samples measured along the way, drawn once."""

    def __init__(self, ids: Path, lengths: tuple[int, ...], keys: tuple[int, ...], samples: int, seed: int) -> None:
        desk, rng = probe_desk(ids), Random(f"probes {seed}")
        self.probes = {
            (count, length): [make_probe(rng, count, length, desk) for _ in range(samples)]
            for count in keys
            for length in lengths
        }
        self.novel, size = novel(ids, "persuasion")
        # a part of it does, in proportion to the samples
        part = min(samples / 64, 1.0)
        self.novel, self.novel_bytes = self.novel[: int(part * len(self.novel))], part * size

    def measure(self, model: MambaLM, window: int, tokens_at_once: int) -> dict[str, float]:
        measured = {label(*place): exact(model, probes, tokens_at_once) for place, probes in self.probes.items()}
        bits = bits_per_byte(model, self.novel, self.novel_bytes, window, tokens_at_once)
        return measured | {"bits_per_byte persuasion": bits}


def label(keys: int, length: int) -> str:
    task = "passkey" if keys == PASSKEY else f"{keys} named keys" if keys > 1 else "1 named key"
    return f"{task} {length}"
