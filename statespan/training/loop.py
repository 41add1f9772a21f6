"""The training loop: plain torch, bfloat16 autocast on a GPU, AdamW, cosine, row lengths that grow, resumable.

The schedule (learning rate and row length) is laid over the run's progress in [0, 1], which is steps done over steps
wanted or, with `minutes`, wall time used over wall time given. With `steps` a run is reproducible batch for batch;
with `minutes` the batches are the same but where the lengths change depends on the machine's speed.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statespan.models.lm import MambaLM
from statespan.training.presets import TrainConfig, new_model, plain
from statespan.training.probes import ProbeSet
from statespan.training.rows import Batch, BatchStream, loader

log = logging.getLogger(__name__)
_NO_DECAY = ("A_log", "D", "bias", "norm.weight", "norm_f.weight")
_LOG_EVERY = 50  # steps; reading a loss off the GPU makes it wait


class Pace:
    """How far the run is, shared with the workers that draw the rows."""

    def __init__(self, config: TrainConfig, seconds_before: float = 0.0) -> None:
        self.config, self._before = config, seconds_before
        self.start()
        self._progress = multiprocessing.get_context("spawn").Value("d", 0.0, lock=False)

    def start(self) -> None:
        """The clock begins here."""
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def at(self, step: int) -> float:
        """Progress before this step."""
        if self.config.minutes is None:
            return step / self.config.steps
        progress = self.seconds / (60 * self.config.minutes)
        self._progress.value = progress
        return progress

    def length_of(self, batch: int) -> int:
        """Tokens a row of this batch."""
        timed = self.config.minutes is not None
        return self.config.length_at(self._progress.value if timed else batch / self.config.steps)


@dataclass(slots=True)
class Curve:
    """What was measured, by step: losses in nats per token, rates, probes."""

    losses: list[dict[str, float]] = field(default_factory=list)
    probes: list[dict[str, float]] = field(default_factory=list)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and the embedding only."""
    named = dict(model.named_parameters())
    plain_names = [name for name in named if name.endswith(_NO_DECAY)]
    return [
        {"params": [named[name] for name in named if name not in plain_names], "weight_decay": weight_decay},
        {"params": [named[name] for name in plain_names], "weight_decay": 0.0},
    ]


def token_losses(model: MambaLM, batch: Batch) -> Tensor:
    """(n,) nats at the batch's places. Logits are made at those places only."""
    hidden = model(batch.ids).flatten(0, 1)[batch.places]
    return F.cross_entropy(model.logits(hidden).float(), batch.targets, reduction="none")


def summary(losses: Tensor, weights: Tensor) -> Tensor:
    """(3,) weighted loss, mean over running text, mean over answers, in nats per token; NaN for a mean of none."""
    answers = weights > 1
    text = weights == 1
    return torch.stack([(losses * weights).sum() / weights.sum(), _mean(losses, text), _mean(losses, answers)]).detach()


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


class Trainer:
    """One run's model, optimiser, data and measurements."""

    def __init__(self, config: TrainConfig, ids: Path, device: torch.device, workers: int, checkpoint: Path | None):
        self.config, self.ids, self.device, self.checkpoint = config, ids, device, checkpoint
        vocab_size = len(json.loads((ids / "tokenizer.json").read_text())["model"]["vocab"])
        self.model = new_model(config, vocab_size).to(device)
        fused = device.type == "cuda"
        groups = parameter_groups(self.model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)
        self.curve, self.step = Curve(), 0
        self.pace = Pace(config, self._restore())
        stream = BatchStream(
            ids, config.rows, config.seed, config.tokens_per_step, self.pace.length_of, first=self.step
        )
        self.batches = loader(stream, workers, pin=fused)
        self.probes = ProbeSet(
            ids,
            tuple(sorted({min(256, config.train_length), config.train_length})),
            (0, 1, 4),
            config.probe_samples,
            config.seed,
        )

    def run(self) -> Curve:
        """Train to the end of the schedule."""
        self.pace.start()
        next_probe = self._next_probe(self.pace.at(self.step))
        batches = self._on_device()
        while (progress := self.pace.at(self.step)) < 1.0:
            self._train_on(next(batches), progress)
            if progress >= next_probe:
                self._measure(progress)
                next_probe = self._next_probe(progress)
        self._measure(1.0)
        return self.curve

    def _next_probe(self, progress: float) -> float:
        return (int(progress * self.config.probes) + 1) / self.config.probes

    def _on_device(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch.to(self.device)

    def autocast(self) -> Any:
        """bfloat16 on a GPU; a CPU trains in float32."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def _train_on(self, batch: Batch, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.config.rate_at(progress)
        with self.autocast():
            losses = token_losses(self.model, batch)
        loss = (losses * batch.weights).sum() / batch.weights.sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step % _LOG_EVERY == 0:
            self._record(summary(losses, batch.weights), norm, batch.ids.shape[1], progress)

    def _record(self, losses: Tensor, norm: Tensor, length: int, progress: float) -> None:
        weighted, text, answers = losses.tolist()
        entry = {"step": self.step, "seconds": round(self.pace.seconds, 2), "progress": round(progress, 4)}
        entry |= {"length": length, "rate": self.config.learning_rate * self.config.rate_at(progress)}
        entry |= {"loss": weighted, "text": text, "answers": answers, "gradient": float(norm)}
        self.curve.losses.append(entry)
        if self.step % (20 * _LOG_EVERY) == 0:
            log.info("%s %s", self.config.name, json.dumps(entry))

    def _measure(self, progress: float) -> None:
        self.model.eval()
        with self.autocast():
            found = self.probes.measure(self.model, self.config.train_length, 2 * self.config.tokens_per_step)
        self.model.train()
        entry = {"step": self.step, "seconds": round(self.pace.seconds, 2), "progress": round(progress, 4)} | found
        self.curve.probes.append(entry)
        log.info("%s %s", self.config.name, json.dumps(entry))
        self._save()

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        whole = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.pace.seconds,
            "losses": self.curve.losses,
            "probes": self.curve.probes,
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        beside = self.checkpoint.with_suffix(".part")
        torch.save(whole, beside)
        beside.replace(self.checkpoint)

    def _restore(self) -> float:
        """Take up a checkpoint, if there is one; returns the seconds it had trained."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return 0.0
        whole = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(whole["model"])
        self.optimizer.load_state_dict(whole["optimizer"])
        self.step, self.curve = whole["step"], Curve(whole["losses"], whole["probes"])
        log.info("%s goes on at step %d", self.config.name, self.step)
        return float(whole["seconds"])


def train(
    config: TrainConfig,
    ids: Path,
    *,
    device: str = "cpu",
    workers: int = 0,
    checkpoint: Path | None = None,
) -> tuple[MambaLM, Curve]:
    """Train a model.

    Args:
        config: what and how.
        ids: folder written by `statespan.training.vocabulary`.
        device: "cpu" or "cuda".
        workers: processes that draw rows; 0 draws them in this one.
        checkpoint: file the run is saved to at every probe, and resumed from if it exists.

    Returns:
        The model, in float32, and what was measured.
    """
    trainer = Trainer(config, ids, torch.device(device), workers, checkpoint)
    curve = trainer.run()
    log.info("%s done: %d steps, %.0f s", config.name, trainer.step, trainer.pace.seconds)
    return trainer.model, curve


def report(config: TrainConfig, curve: Curve) -> dict[str, Any]:
    """training_curve.json: settings, environment and curves."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "settings": plain(config),
        "torch": torch.__version__,
        "device": name,
        "losses": curve.losses,
        "probes": curve.probes,
    }
