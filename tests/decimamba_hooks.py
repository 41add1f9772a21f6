"""DeciMamba on one layer or under observation, for its tests."""

import torch

from statespan.methods.base import ModelFacts
from statespan.methods.decimamba import DeciMamba
from statespan.methods.decimamba_params import DeciMambaParams
from statespan.models.hook import ScanInputs, Span


def decimamba(layers, base, *, n_layer=16, kind="mamba1", **params):
    given = DeciMambaParams.build({"layers": layers, "base_tokens": base, **params})
    return DeciMamba(given, ModelFacts(kind=kind, n_layer=n_layer, channels=1, d_model=1))


def layer_inputs(dt, bias, tail):
    """What the hook sees of one layer of one row, the scan's other inputs left empty."""
    length, channels = dt.shape
    none = dt.new_zeros(1, length, 0)
    span = Span(length=length, lengths=(length,), prompt_lengths=(length,), tail=tail)
    return ScanInputs(x=none, z=none, dt=dt[None], B=none, C=none, dt_bias=bias, A=dt.new_zeros(channels), span=span)


def selected(method, layer, inputs):
    seen = method.survey(layer, inputs) if method.looks_ahead(layer, inputs.span) else None
    kept = method.before_scan(layer, inputs, seen).kept
    return torch.arange(inputs.length) if kept is None else kept[0]


def watched(method):
    """The method, and a list that fills with (layer, scores, kept) wherever it drops something."""
    log, rule = [], method.before_scan

    def before_scan(layer, inputs, seen=None):
        changed = rule(layer, inputs, seen)
        if changed.kept is not None:
            log.append((layer, seen[0, :, 0], changed.kept[0] + inputs.span.start))
        return changed

    method.before_scan = before_scan
    return log
