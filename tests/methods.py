"""Facts and artifacts for building any method in a test, without a checkpoint."""

import torch

from statespan.methods.adapter import Adapter, Selection
from statespan.methods.base import ModelFacts
from statespan.methods.calibration import MULTIPLES, SHARES, Calibration
from statespan.methods.step_statistics import StepStatistics, log_rates, step_statistics


def facts_for(kind="mamba1", *, n_layer=3, channels=None, d_model=16, train_length=64):
    channels = channels or (2 * d_model if kind == "mamba1" else d_model // 4)
    return ModelFacts(kind=kind, n_layer=n_layer, channels=channels, d_model=d_model, train_length=train_length)


def random_calibration(facts, seed=0, recorded=64):
    """Of log-normal steps that no model made."""
    random = torch.Generator().manual_seed(seed)
    L = facts.train_length
    lengths = tuple(round(L * multiple) for multiple in MULTIPLES)
    shape = (facts.n_layer, facts.channels)
    steps = torch.randn(facts.n_layer * facts.channels, recorded, generator=random).exp() / L
    ordered = steps.sort(dim=-1, descending=True).values
    rates = log_rates(ordered, -torch.rand(len(steps), generator=random).exp())
    tables = {}
    for share in SHARES:
        found = step_statistics(ordered, rates, share, lengths)
        table = StepStatistics(*(getattr(found, name).unflatten(0, shape) for name in StepStatistics.__slots__))
        tables |= {(share, "max"): table, (share, "mean"): table}
    return Calibration(L, lengths, tables, distance=torch.rand(shape, generator=random) * L)


def stand_ins(facts):
    return {"calibration": random_calibration(facts), "adapter": random_adapter(facts)}


def random_adapter(facts, seed=0, dtype=torch.float64):
    """Query, Key, Value and Θ that no training made."""
    torch.manual_seed(seed)
    selection = Selection(facts.d_model, facts.n_layer, facts.channels)
    for parameter in selection.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return Adapter(selection.to(dtype).requires_grad_(False), {}, "random")
