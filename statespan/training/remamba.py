"""Train ReMamba's adapter on a frozen checkpoint, or its fair baseline: the same changes of the model, data and steps.

Query, Key, Value and Θ are trained in full, and so are the steps' own weights (dt_proj, or dt_bias in Mamba-2); in_proj
and out_proj get LoRA through peft. The loss is the mean cross-entropy of the answer, through both passes.

Source: arXiv:2408.15496, section 4.1; lblankl/ReMamba@cb127bc. Ours differs: gradients are exact; LoRA on out_proj is
live, for our mixer calls it as a module (there the kernel reads the raw weight and it stays zero); Θ and biases have no
weight decay, which would pull Θ back to 0; window and ratio follow from the seed and the batch's number; the baseline
trains on the same batches with the same parts and rates, for as many steps or, with `minutes`, for as long. Embedding
and head are tied and stay as they are.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader

from statespan.errors import UserError
from statespan.methods import artifacts
from statespan.methods.adapter import Adapter, Selection, to_tensors
from statespan.methods.base import ModelFacts
from statespan.methods.remamba import ReMamba
from statespan.methods.remamba_params import ReMambaParams
from statespan.models.checkpoint import Loaded
from statespan.models.lm import MambaLM
from statespan.models.runner import Runner, Tokens
from statespan.training.adapter_rows import WIDEST, AdapterBatch, AdapterStream, Compression
from statespan.training.selection_start import fit_selection

log = logging.getLogger(__name__)
FULL = ("dt_proj.weight", "dt_proj.bias", "dt_bias")
LORA = ("in_proj", "out_proj")
LOG_EVERY = 25  # steps
SAVE_EVERY = 500  # steps
OTHER_BATCHES = 1 << 20  # added to the seed
Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    baseline: bool = False
    """Train the model's own weights only, on uncompressed prompts."""

    steps: int = 2_000
    minutes: float | None = None
    """Lay the schedule over this much wall time instead of over `steps`."""

    tokens_per_step: int = 16_384
    learning_rate: float = 5e-4
    """The paper's 2e-5 is for 2.8 B parameters; small models want 1e-4 to 1e-3."""

    weight_decay: float = 0.1
    decay_all: bool = False
    """Decay Θ and biases too, as the authors do, which pulls Θ back to 0."""

    warmup: float = 0.03
    """Share of the run over which the rate rises; then a cosine to 0."""

    clip: float = 1.0
    rank: int = 32
    lora_alpha: int = 32
    lora: Literal["peft", "torch"] = "peft"
    """Who keeps the low-rank parts; torch is the same arithmetic for hosts without peft."""

    score_grad: str = "exact"
    start: Literal["slices", "fitted"] = "slices"
    """Of Query, Key and Value: the authors' slices of the model's matrices, or fitted first (selection_start.py)."""

    fit_steps: int = 400
    widest: float = WIDEST
    """A training window's largest share of its prompt; the authors' is 0.3."""

    detach_stage1: bool = False
    """No gradient through stage 1, which then costs a third."""

    seed: int = 0

    def rate_at(self, progress: float) -> float:
        """Share of the learning rate."""
        if progress < self.warmup:
            return progress / self.warmup
        done = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        return 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))


PUBLISHED: dict[str, Any] = {
    "steps": 3_977,  # of 128 sequences of up to 6,000 tokens: give tokens_per_step what the device holds
    "learning_rate": 2e-5,
    "warmup": 0.0,
    "lora_alpha": 8,
    "score_grad": "times_score",
    "decay_all": True,
}
"""The authors' recipe for 2.8 B parameters (section 4.1, table 4, scripts); rank, decay and clip are the same here."""


class LowRank(nn.Module):
    """W + scale B A, as a parametrisation of W: LoRA where peft is not at hand. B begins at zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: int) -> None:
        super().__init__()
        self.A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A)


def add_lora(model: MambaLM, config: AdapterConfig) -> None:
    """LoRA on in_proj and out_proj of every mixer, in place; nothing else of the model is trained but FULL."""
    model.requires_grad_(False)
    if config.lora == "torch":
        for module in [m for name, m in model.named_modules() if name.endswith(LORA)]:
            weight: Any = module.weight
            register_parametrization(module, "weight", LowRank(weight, config.rank, config.lora_alpha))
    else:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UserError("lora: peft needs `pip install 'peft>=0.15'`; lora: torch needs nothing") from error
        peft = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, target_modules=list(LORA), lora_dropout=0.0)
        inject_adapter_in_model(peft, model)
    for name, parameter in model.named_parameters():
        if name.endswith(FULL):
            parameter.requires_grad_(True)


def changes_of(model: MambaLM) -> dict[str, Tensor]:
    """What was trained of the model, named as in methods/adapter.py."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        wrapped: Any = module
        if isinstance(module, LowRank):
            A, B, name = wrapped.A, wrapped.B * wrapped.scale, name.removesuffix(".parametrizations.weight.0")
        elif hasattr(module, "lora_A"):
            A, B = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight * wrapped.scaling["default"]
        else:
            continue
        found |= {f"lora.{name}.weight.A": A.detach().float(), f"lora.{name}.weight.B": B.detach().float()}
    for name, parameter in model.named_parameters():
        if name.endswith(FULL):
            found[f"full.{name}"] = parameter.detach().float()
    return found


@dataclass(slots=True)
class Progress:
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


class AdapterTrainer:
    def __init__(
        self, loaded: Loaded, config: AdapterConfig, ids: Path, *, workers: int = 0, checkpoint: Path | None = None
    ) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.facts = ModelFacts.of(loaded)
        if self.facts.train_length is None:
            raise UserError(f"{loaded.name} does not say what length it was trained on; its config.json must")
        torch.manual_seed(config.seed)
        self.model = loaded.model.float()
        # before LoRA wraps what Selection takes its first weights from
        self.selection = None if config.baseline else Selection.like(self.model)
        add_lora(self.model, config)
        self.runner = Runner(self.model)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=config.learning_rate, betas=(0.9, 0.999))
        self.done = Progress()
        self.fitted: dict[str, float] = {}
        self._restore()
        self.ids, self.workers = ids, workers
        self.batches = self._drawn(config.seed, self.done.step)

    def _drawn(self, seed: int, first: int = 0) -> DataLoader[AdapterBatch]:
        """Batches from number `first` on."""
        assert self.facts.train_length is not None
        config, cuda = self.config, self.model.device.type == "cuda"
        stream = AdapterStream(self.ids, self.facts.train_length, config.tokens_per_step, seed, first, config.widest)
        ahead: dict[str, Any] = {"prefetch_factor": 4, "persistent_workers": True} if self.workers else {}
        return DataLoader(stream, batch_size=None, num_workers=self.workers, pin_memory=cuda, **ahead)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        own = () if self.selection is None else self.selection.named_parameters()
        return chain(own, ((name, p) for name, p in self.model.named_parameters() if p.requires_grad))

    def _groups(self) -> list[dict[str, Any]]:
        named = dict(self.trained())
        few = {name for name in named if name.startswith("theta") or name.endswith("bias")}
        plain = set() if self.config.decay_all else few
        return [
            {"params": [p for name, p in named.items() if name not in plain], "weight_decay": self.config.weight_decay},
            {"params": [p for name, p in named.items() if name in plain], "weight_decay": 0.0},
        ]

    def method(self, compression: Compression) -> ReMamba:
        """ReMamba as it stands, with a batch's window and ratio."""
        if self.selection is None:
            return ReMamba(ReMambaParams(selector="none", adapter=None), self.facts, None)
        assert self.facts.train_length is not None
        params = ReMambaParams(
            window=compression.window,
            ratio=compression.ratio,
            min_tail=round(0.75 * self.facts.train_length) if compression.window > 0.1 else 0,
            detach_stage1=self.config.detach_stage1,
            score_grad="times_score" if self.config.score_grad == "times_score" else "exact",
        )
        return ReMamba(params, self.facts, Adapter(self.selection, {}))

    def losses(self, batch: AdapterBatch) -> tuple[Tensor, Tensor]:
        """Mean nats of an answer token, and the share of answers whose every token was the most likely."""
        answer = batch.ids[:, batch.prompt_length :]
        rows, fed = batch.ids.shape[0], batch.ids.shape[1] - 1
        prompt = Tokens(batch.ids[:, :-1], (fed,) * rows)
        read = self.method(batch.compression).prefill(self.runner, prompt, tail=answer.shape[1])
        logits = self.model.logits(read.hidden).float()
        loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten())
        return loss, (logits.argmax(-1) == answer).all(-1).float().mean().detach()

    def autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.model.device.type == "cuda" else nullcontext()

    def run(self, report: Report | None = None) -> Progress:
        """Train to the end of the schedule. `report` hears of a step's loss and exactness now and then."""
        started, config = time.monotonic() - self.done.seconds, self.config
        if config.start == "fitted" and self.selection is not None and self.done.step == 0:
            own = self._drawn(config.seed + OTHER_BATCHES)  # the training's are the baseline's, too
            fitted = fit_selection(self.selection, self.runner, own, config.fit_steps)
            self.fitted = {"value": fitted[0], "cosine": fitted[1], "seconds": time.monotonic() - started}
            log.info("Query, Key and Value fitted: %s", self.fitted)
        for batch in self.batches:
            self.done.seconds = time.monotonic() - started
            timed = config.minutes is not None
            progress = self.done.seconds / (60 * config.minutes) if config.minutes else self.done.step / config.steps
            if progress >= 1.0:
                break
            loss, exact = self._train_on(batch.to(self.model.device), progress)
            if self.done.step % LOG_EVERY == 0 or (not timed and self.done.step == config.steps):
                entry = {"loss": float(loss), "exact": float(exact), "prompt_tokens": float(batch.prompt_length)}
                self.done.curve.append({"step": self.done.step, "seconds": round(self.done.seconds, 2), **entry})
                log.info(
                    "step %d: loss %.3f, exact %.2f at %d tokens", self.done.step, loss, exact, batch.prompt_length
                )
                if report is not None:
                    report(self.done.step, entry)
            if self.done.step % SAVE_EVERY == 0:
                self._save()
        self._save()
        return self.done

    def _train_on(self, batch: AdapterBatch, progress: float) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.config.rate_at(progress)
        with self.autocast():
            loss, exact = self.losses(batch)
        loss.backward()
        nn.utils.clip_grad_norm_([parameter for _, parameter in self.trained()], self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done.step += 1
        return loss.detach(), exact

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        whole = {
            "trained": {name: parameter.detach() for name, parameter in self.trained()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.done.step,
            "seconds": self.done.seconds,
            "curve": self.done.curve,
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(whole, beside := self.checkpoint.with_suffix(".part"))
        beside.replace(self.checkpoint)

    def _restore(self) -> None:
        """Take up a checkpoint, if there is one."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return
        whole = torch.load(self.checkpoint, map_location=self.model.device, weights_only=True)
        named = dict(self.trained())
        if whole["trained"].keys() != named.keys():
            raise UserError(f"{self.checkpoint} is of another run (other parts were trained); give another file")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(whole["trained"][name])
        self.optimizer.load_state_dict(whole["optimizer"])
        self.done = Progress(whole["step"], whole["seconds"], whole["curve"])
        log.info("goes on at step %d", self.done.step)

    def write(self, path: Path, *, half: bool = False) -> None:
        """The adapter, marked with the weights it is for, and beside it PATH.json: settings, device, loss curve.

        With `half` matrices are stored as float16, exact to 5e-4 of their values.
        """
        meta = {"steps": str(self.done.step), "seed": str(self.config.seed), "baseline": str(self.config.baseline)}
        tensors = to_tensors(self.selection, changes_of(self.model))
        if half:
            tensors = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
        artifacts.write(path, tensors, self.facts, meta)
        path.with_suffix(".json").write_text(json.dumps(self.record(), indent=1) + "\n")

    def record(self) -> dict[str, Any]:
        """What the adapter's card is written from."""
        cuda = self.model.device.type == "cuda"
        return {
            "settings": asdict(self.config),
            "trained": sum(parameter.numel() for _, parameter in self.trained()),
            "steps": self.done.step,
            "seconds": round(self.done.seconds, 1),
            "fitted": {name: round(value, 4) for name, value in self.fitted.items()},
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": str(torch.__version__),
            "curve": self.done.curve,
        }
