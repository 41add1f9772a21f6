"""The hidden attention matrix is the scan, and its last row's mean distance is what it says."""

import pytest
import torch

from statespan.models.checkpoint import cast
from statespan.models.config import ModelConfig
from statespan.models.hidden_attention import attention_map, last_row, mean_distance
from statespan.models.hook import VANILLA
from statespan.models.lm import MambaLM
from statespan.models.runner import Runner, Tokens
from tests.method_conformance import prompts
from tests.tiny import tiny_model


def grouped():
    """Mamba-2 with four heads in two groups of B and C."""
    torch.manual_seed(0)
    ssm = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2}
    model = MambaLM(ModelConfig.read({"d_model": 16, "n_layer": 2, "vocab_size": 257, "ssm_cfg": ssm}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    return cast(model, torch.float64).eval().requires_grad_(False)


@pytest.fixture(params=["mamba1", "mamba2", "mamba2 in groups"])
def inputs(request):
    runner = Runner(grouped() if "groups" in request.param else tiny_model(request.param))
    with torch.inference_mode():
        stream = runner.run(runner.stream(Tokens.pad(prompts(40))), VANILLA, 0, 1)
        block = runner.model.layers[1]
        yield block.mixer.project(block.norm(stream.hidden), stream.span, None)[0]


def signed(inputs, channel):
    """The map without absolute values, by the recurrence token by token."""
    steps, length = inputs.step_sizes()[0, :, channel], inputs.length
    group = channel * inputs.n_groups // inputs.A.shape[0]
    B, C = (part[0].unflatten(-1, (inputs.n_groups, -1))[:, group] for part in (inputs.B, inputs.C))
    rates = inputs.A[channel].expand(B.shape[-1])
    out = torch.zeros(length, length, dtype=steps.dtype)
    for j in range(length):
        h = steps[j] * B[j]
        for i in range(j, length):
            h = h if i == j else (steps[i] * rates).exp() * h
            out[i, j] = (C[i] * h).sum()
    return out


def test_the_map_is_the_recurrence_and_its_last_row_the_cheap_form(inputs):
    for channel in (0, inputs.dt.shape[-1] - 1):
        want = signed(inputs, channel).abs()
        torch.testing.assert_close(attention_map(inputs, channel), want, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(last_row(inputs)[:, channel], want[-1], atol=1e-12, rtol=1e-9)


def test_the_map_times_the_input_is_the_scan(inputs):
    from statespan.kernels.selective_scan import selective_scan
    from statespan.kernels.ssd import ssd

    if inputs.A.ndim == 2:
        y, _ = selective_scan(inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, dt_bias=inputs.dt_bias)
        ours = signed(inputs, 3) @ inputs.x[0, :, 3]
        torch.testing.assert_close(ours, y[0, :, 3], atol=1e-12, rtol=1e-9)
    else:
        x = inputs.x.unflatten(-1, (4, -1))
        B, C = (part.unflatten(-1, (inputs.n_groups, -1)) for part in (inputs.B, inputs.C))
        y, _ = ssd(x, inputs.dt, inputs.A, B, C, dt_bias=inputs.dt_bias)
        torch.testing.assert_close(signed(inputs, 3) @ x[0, :, 3], y[0, :, 3], atol=1e-12, rtol=1e-9)


def test_mean_distances_lie_between_none_and_the_whole_text(inputs):
    found = mean_distance(last_row(inputs))
    assert (found >= 0).all() and (found <= inputs.length - 1).all()
    even = torch.ones(101, 3, dtype=torch.float64)
    assert mean_distance(even).tolist() == [50.0] * 3
