"""Every method on models of odd shapes, prompt and answer, against an independent transcription (numpy_lm.py)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from statespan.methods.base import ModelFacts
from statespan.methods.calibration import calibrate
from statespan.methods.table import build_method
from statespan.models import checkpoint
from statespan.models.config import ModelConfig
from statespan.models.lm import MambaLM
from statespan.models.runner import Runner, Tokens
from tests.method_conformance import prompts
from tests.methods import random_adapter
from tests.numpy_lm import NumpyLM, last_row, longmamba_statistics, softplus

L = 24  # the training length
CLOSE = {"atol": 1e-9, "rtol": 0}
MODELS = {
    # steps of low rank three, a conv of three taps, a head of its own, a vocabulary padded from 253 to 256
    "mamba1_untied": {"d_model": 12, "n_layer": 3, "vocab_size": 253, "tie_embeddings": False,
                      "pad_vocab_size_multiple": 16,
                      "ssm_cfg": {"layer": "Mamba1", "d_state": 5, "d_conv": 3, "dt_rank": 3}},
    "falcon_mamba": {"model_type": "falcon_mamba", "hidden_size": 12, "num_hidden_layers": 3, "vocab_size": 257,
                     "state_size": 6, "time_step_rank": 2, "use_bias": True, "mixer_rms_eps": 1e-4},
    # six heads in three groups, a third of the channels past the scan, steps that the model clamps itself
    "mamba2_groups": {"d_model": 18, "n_layer": 3, "vocab_size": 257, "ssm_cfg": {
        "layer": "Mamba2", "d_state": 5, "headdim": 4, "ngroups": 3, "d_ssm": 24, "dt_limit": [0.4, 4.0]}},
    "mamba2_gated_inside": {"d_model": 12, "n_layer": 3, "vocab_size": 257, "tie_embeddings": False, "ssm_cfg": {
        "layer": "Mamba2", "d_state": 7, "headdim": 8, "rmsnorm": False, "D_has_hdim": True, "bias": True}},
    "mamba2_norm_first": {"d_model": 16, "n_layer": 3, "vocab_size": 257, "ssm_cfg": {
        "layer": "Mamba2", "d_state": 6, "headdim": 8, "ngroups": 2, "norm_before_gate": True}},
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def runner(request):
    torch.manual_seed(len(request.param))
    model = MambaLM(ModelConfig.read(MODELS[request.param]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return Runner(checkpoint.cast(model, torch.float64).eval().requires_grad_(False))


def facts_of(runner):
    c = runner.model.config
    return ModelFacts(kind=c.kind, n_layer=c.n_layer, channels=c.channels, d_model=c.d_model, train_length=L)


def agrees(runner, name, params, rows_of, rule_of, artifacts=None, lengths=(70, 41), answer=(3, 1, 4, 1, 5)):
    """A padded batch, then the answer token by token, against the transcription of each row.

    rows_of: (numpy model, prompt ids) -> embeddings of what is read in place of the prompt
    rule_of: prompt length, and of what is read in its place -> the rule of the layers
    """
    numpy_lm, prompt = NumpyLM(runner.model), prompts(*lengths, seed=3)
    method = build_method(name, params, facts_of(runner), artifacts or {})
    with torch.inference_mode():
        read = method.prefill(runner, Tokens.pad(prompt))
        ours = [runner.model.logits(read.hidden[:, -1])]
        ours += [runner.step(read.cache, torch.tensor([token] * len(prompt))) for token in answer]
    vanilla = Runner(runner.model).prefill(Tokens.pad(prompt)).hidden
    assert (read.hidden[0] - vanilla[0]).abs().max() > 1e-6, "the method must do something"
    for row, ids in enumerate(prompt):
        embedded = rows_of(numpy_lm, ids)
        whole = np.concatenate((embedded, numpy_lm.embed(answer)))
        want = numpy_lm.logits(numpy_lm.read(whole, rule_of(len(ids), len(embedded)))[-len(answer) - 1 :])
        torch.testing.assert_close(torch.stack([one[row] for one in ours]), torch.from_numpy(want), **CLOSE)


def embedded(numpy_lm, ids):
    return numpy_lm.embed(ids)


def scaled(factor):
    """(layer number, prompt length) -> (channels,) or a number that the prompt's steps are multiplied by"""

    def rule_of(length, _):
        def rule(layer):
            steps = layer.steps.copy()
            steps[:length] = steps[:length] * factor(layer.number, length)
            return steps, None

        return rule

    return rule_of


def recorded(runner, sequences):
    """Of each sequence, each layer as the model reads it."""
    found = []
    for ids in sequences:
        layers = []
        numpy_lm = NumpyLM(runner.model)
        numpy_lm.read(numpy_lm.embed(ids), lambda layer, layers=layers: (layers.append(layer), (layer.steps, None))[1])
        found.append(layers)
    return found


@pytest.mark.parametrize("norm", ["l2", "l1", "max"])
def test_decimamba_in_two_layers(runner, norm):
    params = {"layers": [2, 0], "base_tokens": 30, "beta": 0.6, "min_tokens": 5, "extra_tail": 3, "norm": norm}
    order = {"l2": 2, "l1": 1, "max": np.inf}[norm]

    def rule_of(length, _):
        alive = [length]

        def rule(layer):
            if layer.number == 1:
                return layer.steps, None
            tail = 1 + 3
            prefix = alive[0] - tail
            budget = int(max(min(prefix, 30 * 0.6 ** [2, 0].index(layer.number)), 5))
            scores = np.linalg.norm(layer.steps[:prefix], order, axis=1)
            chosen = np.sort(np.argsort(-scores)[:budget])
            alive[0] = budget + tail
            return layer.steps, np.concatenate((chosen, np.arange(prefix, len(layer.steps))))

        return rule

    agrees(runner, "decimamba", params, embedded, rule_of)


@pytest.mark.parametrize("share, how", [(0.0, "max"), (0.2, "mean")])
def test_longmamba_from_calibration_on(runner, share, how):
    sequences = prompts(L, L, L, seed=5)
    calibration = calibrate(runner, sequences, shares=(share,), exact=True)
    layers = recorded(runner, sequences)
    channels = runner.model.config.channels
    merge = max if how == "max" else lambda parts: sum(parts) / len(parts)

    def statistics(number, channel, length):
        parts = [
            longmamba_statistics(one[number].steps[:, channel], one[number].A[channel], share, length) for one in layers
        ]
        return merge([math.exp(part[0]) for part in parts]), merge([part[2] for part in parts])

    products = [statistics(number, channel, L)[0] for number in range(3) for channel in range(channels)]
    middle = len(products) // 2
    theta = math.sqrt(
        math.prod(sorted(products)[middle : middle + 2])
    )  # between two, for ">" must not hang on rounding

    def rule_of(length, _):
        def rule(layer):
            steps = layer.steps.copy()
            for channel in range(channels):
                product, threshold = statistics(layer.number, channel, length)
                if product > theta:
                    own = steps[:length, channel]
                    own[own <= 1.1 * threshold] = 0.0
            return steps, None

        return rule

    params = {"theta": theta, "clamp": share, "aggregate": how, "factor": 1.1, "lengths": "exact"}
    agrees(runner, "longmamba", params, embedded, rule_of, {"calibration": calibration})


def test_upi_from_the_attention_matrix_on(runner):
    sequences = prompts(L, L, seed=6)
    calibration = calibrate(runner, sequences, shares=(0.0,), lengths=(80,))
    distances = []
    for layers in recorded(runner, sequences):
        rows = [last_row(layer) for layer in layers]
        distances.append([(row * np.arange(L - 1, -1, -1)).sum(1) / row.sum(1) for row in rows])
    distance = np.mean(distances, axis=0)  # (layers, channels)
    torch.testing.assert_close(calibration.distance, torch.from_numpy(distance), **CLOSE)
    count = round(0.3 * distance.size)
    far = distance >= np.sort(distance.ravel())[-count]
    factor = scaled(lambda number, length: np.where(far[number], (L / length) ** 0.7, 1.0))
    agrees(runner, "upi", {"share": 0.3, "gamma": 0.7}, embedded, factor, {"calibration": calibration})


@pytest.mark.parametrize("per_doubling", [False, True])
def test_mambaextend_with_a_knot_a_layer(runner, per_doubling):
    params = {"first": 0.9, "middle": 0.4, "last": 1.2, "per_doubling": per_doubling}
    factor = scaled(lambda number, length: (0.9, 0.4, 1.2)[number] ** (math.log2(length / L) if per_doubling else 1))
    agrees(runner, "mambaextend", params, embedded, factor)


@pytest.mark.parametrize("mix, order, rule", [
    ("adapt", "text", "official"), ("adapt", "text", "scaled_bias"), ("adapt", "text", "multiply"),
    ("adapt", "reversed", "official"), ("multiplicative_softmax", "score", "official"),
    ("multiplicative_raw", "text", "official"), ("insert_only", "text", "official"),
])  # fmt: skip
def test_remamba_through_both_passes(runner, mix, order, rule):
    adapter = random_adapter(facts_of(runner))
    start, share, ratio = 0.3, 0.4, 0.3
    made = {}

    def network(name, states):
        first, _, second = getattr(adapter.selection, name)
        hidden = F.silu(torch.from_numpy(states) @ first.weight.T + first.bias)
        return (hidden @ second.weight.T + second.bias).numpy()

    def rows_of(numpy_lm, ids):
        P, text = len(ids), numpy_lm.embed(ids)
        begin, size = int(P * start), max(1, math.ceil(P * share))
        kept = math.ceil(size * ratio)
        hidden = numpy_lm.read(text)
        query, keys = network("query", hidden[-1]), network("key", hidden[begin : begin + size])
        scores = keys @ query / np.linalg.norm(keys, axis=1) / np.linalg.norm(query)
        chosen = np.sort(np.argsort(-scores)[:kept])
        if order == "reversed":
            chosen = chosen[::-1]
        elif order == "score":
            chosen = chosen[np.argsort(-scores[chosen])]
        vectors, own = network("value", hidden[begin + chosen]), scores[chosen]
        if mix == "multiplicative_softmax":
            vectors = vectors * (np.exp(own) / np.exp(own).sum())[:, None]
        elif mix == "multiplicative_raw":
            vectors = vectors * own[:, None]
        made[P] = begin, np.maximum(own, 0.0)
        return np.concatenate((text[:begin], vectors, text[begin + size :]))

    def rule_of(length, _):
        begin, alpha = made[length]

        def changed(layer):
            if mix != "adapt":
                return layer.steps, None
            there, weight = slice(begin, begin + len(alpha)), alpha[:, None]
            theta, raw = adapter.selection.theta[layer.number].numpy(), layer.raw[there]
            new = {
                "official": softplus(weight * raw + theta + layer.bias),
                "scaled_bias": softplus(weight * (raw + layer.bias) + theta),
                "multiply": weight * softplus(raw + layer.bias),
            }[rule]
            limit, steps = runner.model.config.dt_limit, layer.steps.copy()
            steps[there] = new if limit is None else new.clip(*limit)
            return steps, None

        return changed

    params = {"start": start, "window": share, "ratio": ratio, "mix": mix, "order": order, "delta_rule": rule}
    agrees(runner, "remamba", params, rows_of, rule_of, {"adapter": adapter})


def test_oprm_takes_the_surest_chunk(runner):
    params = {"chunk_tokens": 20, "question_tokens": 6, "head_tokens": 4, "overlap": 0.5}

    def rows_of(numpy_lm, ids):
        end = len(ids) - 6
        starts = [*range(4, end - 20, 10), end - 20]
        parts = [numpy_lm.embed(ids[:4] + ids[at : at + 20] + ids[-6:]) for at in starts]
        entropies = []
        for part in parts:
            logits = numpy_lm.logits(numpy_lm.read(part)[-1])
            logs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            entropies.append(-(np.exp(logs) * logs).sum())
        return parts[int(np.argmin(entropies))]

    agrees(runner, "oprm", params, rows_of, lambda *_: lambda layer: (layer.steps, None))


def test_the_transcription_is_the_model(runner):
    numpy_lm, (ids,) = NumpyLM(runner.model), prompts(50, seed=7)
    with torch.inference_mode():
        ours = runner.model.logits(runner.prefill(Tokens.pad([ids]), tail=50).hidden)[0]
    torch.testing.assert_close(ours, torch.from_numpy(numpy_lm.logits(numpy_lm.read(numpy_lm.embed(ids)))), **CLOSE)
