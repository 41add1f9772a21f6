"""UPI, MambaExtend and OPRM: the kit, what each does to steps or prompts, and what each refuses."""

from functools import cache
from typing import ClassVar

import pytest
import torch

from statespan.errors import UserError
from statespan.kernels.selective_scan import step_sizes
from statespan.methods.calibration import calibrate
from statespan.methods.mambaextend import MambaExtend, MambaExtendParams
from statespan.methods.oprm import OPRM, OPRMParams
from statespan.methods.table import build_method
from statespan.models.hook import VANILLA
from statespan.models.runner import Runner, Tokens
from tests.method_conformance import EXACT, TRAIN_LENGTH, MethodConformance, TinyModels, facts_of, prompts
from tests.methods import facts_for, stand_ins
from tests.tiny import tiny_model


@cache
def calibrated(kind):
    return calibrate(
        Runner(tiny_model(kind)), prompts(TRAIN_LENGTH, TRAIN_LENGTH, seed=9), shares=(0.05,), lengths=(80,)
    )


class TestUPI(MethodConformance):
    NAME = "upi"
    PARAMS: ClassVar = {"share": 0.3}
    IDLE_AT = TRAIN_LENGTH

    def artifacts(self, runner):
        return {"calibration": calibrated(runner.model.config.kind)}


class TestMambaExtend(MethodConformance):
    NAME = "mambaextend"
    PARAMS: ClassVar = {"scales": [1.0, 0.5, 0.8], "per_doubling": True}
    IDLE_AT = TRAIN_LENGTH


class TestOPRM(MethodConformance):
    NAME = "oprm"
    # so short that even the tiny Mamba-2, which forgets within 50 tokens, sees the difference
    PARAMS: ClassVar = {"chunk_tokens": 16, "question_tokens": 4, "head_tokens": 3, "overlap": 0.25}
    IDLE_AT = 23


def layer_steps(runner, method, length, layer):
    stream = runner.run(runner.stream(Tokens.pad(prompts(length))), VANILLA, 0, layer)
    block = runner.model.layers[layer]
    inputs, _ = block.mixer.project(block.norm(stream.hidden), stream.span, None)
    changed = method.before_scan(layer, inputs)
    return inputs.step_sizes()[0], step_sizes(changed.dt, changed.dt_bias, True, None, None, changed.dt_scale)[0]


class TestSteps(TinyModels):
    def test_upi_scales_the_far_channels_and_no_other(self, runner):
        calibration = calibrated(runner.model.config.kind)
        method = build_method("upi", {"share": 0.25}, facts_of(runner), {"calibration": calibration})
        assert method.far.sum() == round(0.25 * method.far.numel())
        assert calibration.distance[method.far].min() >= calibration.distance[~method.far].max()
        for layer in range(3):
            before, after = layer_steps(runner, method, 160, layer)
            far = method.far[layer]
            torch.testing.assert_close(after[:, far], before[:, far] * (64 / 160), **EXACT)
            assert torch.equal(after[:, ~far], before[:, ~far])

    def test_mambaextend_scales_each_layer_by_its_own(self, runner):
        for per_doubling, want in ((False, 0.5), (True, 0.5**2)):
            params = {"scales": [1.0, 0.5, 0.8], "per_doubling": per_doubling}
            method = build_method("mambaextend", params, facts_of(runner))
            before, after = layer_steps(runner, method, 4 * TRAIN_LENGTH, 1)
            torch.testing.assert_close(after, before * want, **EXACT)
            assert method.first_layer_changed(4 * TRAIN_LENGTH) == 1

    def test_oprm_answers_from_the_surest_chunk_as_if_it_were_the_prompt(self, runner):
        (row,) = prompts(150)
        method = build_method("oprm", {"chunk_tokens": 40, "question_tokens": 12, "head_tokens": 5}, facts_of(runner))
        read = method.prefill(runner, Tokens.pad([row]))
        alone, entropies = [], []
        for a, b in method.chunks(150):
            one = runner.prefill(Tokens.pad([row[:5] + row[a:b] + row[-12:]]))
            logs = runner.model.logits(one.hidden[0, -1]).log_softmax(-1)
            entropies.append(-(logs.exp() * logs).sum().item())
            alone.append(one)
        best = entropies.index(min(entropies))
        torch.testing.assert_close(read.hidden, alone[best].hidden, **EXACT)
        a, b = method.chunks(150)[best]
        assert read.positions[0].tolist() == [*range(5), *range(a, b), *range(138, 150)]

        logits = runner.model.logits(read.hidden[0, -1])
        method = build_method(
            "oprm",
            {"chunk_tokens": 40, "question_tokens": 12, "head_tokens": 5, "refusals": [int(logits.argmax())]},
            facts_of(runner),
        )
        others = [
            i for i, one in enumerate(alone) if runner.model.logits(one.hidden[0, -1]).argmax() != logits.argmax()
        ]
        want = min(others or range(len(alone)), key=entropies.__getitem__)
        torch.testing.assert_close(method.prefill(runner, Tokens.pad([row])).hidden, alone[want].hidden, **EXACT)

    def test_oprm_reads_an_answer_on_from_the_chosen_chunk(self, runner):
        (row,), answer = prompts(150), [1, 2, 3, 4]
        method = build_method("oprm", {"chunk_tokens": 40, "question_tokens": 12}, facts_of(runner))
        read = method.prefill(runner, Tokens.pad([row]))
        whole = method.prefill(runner, Tokens.pad([row + answer]), tail=5)
        steps = torch.cat((read.hidden, runner.extend(read.cache, torch.tensor([answer]))), dim=1)
        torch.testing.assert_close(whole.hidden, steps, **EXACT)


def test_chunks_cover_the_context_and_are_all_as_long():
    for overlap in (0.0, 0.25, 0.9):
        params = OPRMParams(chunk_tokens=40, question_tokens=12, head_tokens=5, overlap=overlap)
        method = OPRM(params, facts_for())
        for length in (58, 97, 98, 150, 1_000):
            ranges = method.chunks(length)
            assert set(range(5, length - 12)) == {at for a, b in ranges for at in range(a, b)}
            assert {b - a for a, b in ranges} == {40} and len(set(ranges)) == len(ranges)
        assert method.chunks(57) == [(5, 45)]


def test_knots_are_interpolated_geometrically_over_any_depth():
    scales = MambaExtendParams(first=1.0, middle=0.25, last=0.5).of_layers(5)
    assert scales == pytest.approx([1.0, 0.5, 0.25, 0.125**0.5, 0.5])
    assert MambaExtendParams(first=0.7).of_layers(3) == pytest.approx([0.7] * 3)
    assert MambaExtendParams(first=0.9, last=0.4).of_layers(1) == pytest.approx([0.9])


@pytest.mark.parametrize(
    "name, params, says",
    [
        ("upi", {"share": 0.0}, "upi.share: input should be greater than 0; got 0.0"),
        ("mambaextend", {}, "mambaextend: give either scales, one a layer, or first with middle and last"),
        ("mambaextend", {"scales": [1.0]}, "mambaextend.scales must hold one scale for each of 3 layers; got 1"),
        ("mambaextend", {"scales": [1.0, -1.0, 1.0]}, "mambaextend: scales must be above 0; got [1.0, -1.0, 1.0]"),
        ("oprm", {"question_tokens": 60},
         "oprm.chunk_tokens must leave at least 16 beside 60 tokens of head and question; got 4"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(name, params, says):
    with pytest.raises(UserError) as refused:
        build_method(name, params, facts_for(), stand_ins(facts_for()))
    assert str(refused.value) == says


def test_a_calibration_without_distances_is_refused():
    from dataclasses import replace

    old = replace(stand_ins(facts_for())["calibration"], distance=None)
    with pytest.raises(UserError, match="holds no mean distances; `statespan calibrate MODEL` makes one that does"):
        build_method("upi", {}, facts_for(), {"calibration": old})


def test_mambaextend_is_built_without_artifacts():
    assert MambaExtend(MambaExtendParams(first=0.5), facts_for()).artifacts == {}
