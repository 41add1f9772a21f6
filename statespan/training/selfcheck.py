"""Whether a machine trains these models right and how fast: gradients against the CPU's reference, and step times."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from statespan.training.loop import token_losses
from statespan.training.presets import TrainConfig, new_model
from statespan.training.rows import Batch, make_rows

_TOLERANCE = 2e-3  # relative, of the norm over all gradients; both sides compute in float32


def compare_gradients(config: TrainConfig, device: str) -> dict[str, float]:
    """Relative differences of loss and gradients of two layers on a small batch; raises where they are too large."""
    small = replace(config, n_layer=2)
    torch.manual_seed(1)
    ids = torch.randint(0, 512, (3, 193))
    batch = Batch(0, ids[:, :-1], torch.arange(3 * 192), ids[:, 1:].flatten(), torch.ones(3 * 192))
    results: list[tuple[float, dict[str, torch.Tensor]]] = []
    for place in ("cpu", device):
        model = new_model(small, 512).to(place)
        loss = token_losses(model, batch.to(torch.device(place))).mean()
        loss.backward()
        gradients = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
        results.append((float(loss), gradients))
    (want_loss, want), (got_loss, got) = results
    assert want.keys() == got.keys(), f"no gradient on {device} for {sorted(want.keys() - got.keys())}"
    errors = {name: float((got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-30)) for name in want}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] < _TOLERANCE:
        raise RuntimeError(f"gradients on {device} differ from the reference: {worst} by {errors[worst]:.2e}; {errors}")
    return {"loss": abs(got_loss - want_loss) / want_loss, worst: errors[worst]}


def time_steps(config: TrainConfig, ids: Path, device: str, steps: int) -> dict[int, float]:
    """Milliseconds a step at each row length, data drawn beforehand."""
    maker, place = make_rows(ids, config.rows), torch.device(device)
    model = new_model(config, maker.desk.encode.vocab_size).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=place.type == "cuda")
    times = {}
    for length, _ in config.stages:
        batch = maker.batch(0, 0, config.tokens_per_step, length).to(place)
        for step in range(steps + 3):
            if step == 3:
                _wait(place)
                started = time.perf_counter()
            with torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
                losses = token_losses(model, batch)
            ((losses * batch.weights).sum() / batch.weights.sum()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait(place)
        times[length] = round(1e3 * (time.perf_counter() - started) / steps, 2)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
