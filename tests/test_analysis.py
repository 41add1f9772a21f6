"""An analysis measures what it says, its suggestions stay inside the shipped spaces, and a study repeats them."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch

from statespan.analysis.auto import FILE, auto_spaces, record
from statespan.analysis.facts import THETAS, Analysis, summarize
from statespan.analysis.measure import Measured, measure
from statespan.analysis.run import analyse, known_analysis, places, save
from statespan.analysis.suggest import suggest, within
from statespan.cli import run
from statespan.errors import UserError
from statespan.methods.base import ModelFacts
from statespan.methods.calibration import calibrate
from statespan.methods.table import build_method
from statespan.models.checkpoint import load_model
from statespan.models.generate import target_score
from statespan.models.runner import Runner, Tokens
from statespan.orchestration.analysis_page import to_html
from statespan.orchestration.plan import make_plan
from statespan.orchestration.sweep import sweep
from statespan.search_spaces.loader import Range, available, load_space
from tests.cases import build_model, case
from tests.fake_engine import instant
from tests.method_conformance import prompts
from tests.methods import facts_for, stand_ins
from tests.studies import small_study
from tests.tiny import save_checkpoint, tiny_model

L = 64
EXACT = {"atol": 1e-9, "rtol": 1e-9}  # float64


def random_analysis(seed=0, layers=6, channels=24, kind="mamba1"):
    """Of a model that is not: survivals over 40 decades, distances up to L."""
    draw = torch.Generator().manual_seed(seed)
    shape = (2, layers, channels)
    survival = -torch.rand(shape, generator=draw, dtype=torch.float64).mul(9).sub(4).exp()
    distance = torch.rand(shape, generator=draw, dtype=torch.float64) ** 3 * L
    lengths = (L, 4 * L, 16 * L)
    far = distance.mean((0, 2)) * torch.tensor([[1.0], [2.0], [3.0]])
    steps = 1 + 0.6 * torch.rand((3, layers), generator=draw) - 0.3
    fresh = torch.full((3,), 4.0)
    loss = fresh + torch.rand(3, generator=draw).cumsum(0) * 0.2
    maps = {1: torch.eye(8)}
    facts = replace(facts_for(kind, n_layer=layers, channels=channels, train_length=L), digest="d" * 64)
    return summarize(Measured(lengths, survival, distance, far, steps, loss, fresh, maps), facts, "none", "none")


@pytest.fixture(params=["mamba1", "mamba2", "hf_zamba2"])
def model(request):
    return tiny_model(request.param) if request.param in ("mamba1", "mamba2") else build_model(
        case("forward", request.param))  # fmt: skip


class TestMeasure:
    def test_it_measures_what_calibration_records_and_what_a_shorter_text_would_show(self, model):
        vocabulary = model.config.vocab_size
        (ids,) = [[one % vocabulary for one in row] for row in prompts(4 * L)]
        found = measure(model, [ids], [L, 2 * L, 4 * L], mapped=[1])
        recorded = calibrate(Runner(model), [ids[:L]], shares=(0.0,), lengths=(2 * L,))
        torch.testing.assert_close(found.survival[0], recorded.tables[0.0, "max"].log_decay.double(), **EXACT)
        torch.testing.assert_close(found.distance[0], recorded.distance.double(), **EXACT)
        shorter = measure(model, [ids[: 2 * L]], [L, 2 * L])
        torch.testing.assert_close(found.far[:2], shorter.far, **EXACT)
        torch.testing.assert_close(found.steps[:2], shorter.steps, **EXACT)
        assert (found.steps[0] == 1).all() and set(found.maps) == {1}
        shares = found.maps[1]
        torch.testing.assert_close(shares.sum(1), torch.ones_like(shares[0]), **EXACT)
        assert (shares >= 0).all() and not shares.triu(1).any()

    def test_loss_is_the_likelihood_of_the_same_tokens_read_from_the_beginning_and_anew(self, model):
        (ids,) = [[one % model.config.vocab_size for one in row] for row in prompts(3 * L, seed=4)]
        found = measure(model, [ids], [L, 3 * L])
        target = torch.tensor(ids[-L // 2 :])
        for row, nats in ((ids, found.loss), (ids[-L:], found.fresh)):
            with torch.inference_mode():
                hidden = Runner(model).prefill(Tokens.pad([row]), tail=L // 2 + 1).hidden[0, :-1]
                wanted = -target_score(model, hidden, target).total / len(target)
            assert nats[-1].item() == pytest.approx(wanted, rel=1e-6)  # cross entropies are taken in float32
        assert found.loss[0] == pytest.approx(found.fresh[0])

    def test_layers_that_are_not_there_are_refused(self):
        with pytest.raises(UserError, match="--layers must lie in 0 … 2"):
            measure(tiny_model(), prompts(2 * L), [L, 2 * L], mapped=[3])


class TestFigures:
    def test_shares_fall_with_theta_and_lie_between_the_stored_ones(self):
        found = random_analysis()
        shares = [found.share_above(-k) for k in (0.1, 0.25, 1, 4, 7, 40, 92, 500)]
        assert shares == sorted(shares) and shares[0] == shares[1] and shares[-1] == shares[-2]
        assert found.share_above(-4.0) == pytest.approx((found.share_above(-3) + found.share_above(-5)) / 2)

    def test_it_holds_as_far_as_no_length_before_costs_two_percent(self):
        base = random_analysis()
        for loss, want in (((4.0, 4.0, 4.0), 16), ((4.0, 4.07, 4.2), 4), ((4.0, 4.2, 4.0), 1)):
            assert replace(base, loss=loss, fresh=(4.0, 4.0, 4.0)).holds == want

    def test_a_file_gives_back_what_was_saved_and_others_are_refused(self, tmp_path):
        found = random_analysis()
        save(found, tmp_path / "analysis.json")
        assert Analysis.read(tmp_path / "analysis.json") == found
        for text in ("{}", "no json", '{"format": 0}', '{"format": 1, "model": 3}'):
            (tmp_path / "other.json").write_text(text)
            with pytest.raises(UserError, match="is no analysis"):
                Analysis.read(tmp_path / "other.json")

    def test_the_page_is_one_file_without_scripts_or_requests(self):
        found = random_analysis()
        page = to_html(found, {"longmamba": suggest(found, space("longmamba"), [L, 16 * L])}, found.longest)
        assert "<script" not in page and not re.search(r'(?:src|href)="?http', page) and "nan" not in page.lower()
        assert page.count("<svg") >= 6 and "clamp" in page and len(page) < 1_000_000


def space(method, kind="mamba1", layers=6, longest=16 * L):
    names = {"n_layer": layers, "channels": 24, "d_model": 16, "train_length": L, "longest": longest,
             "mamba1": kind == "mamba1"}  # fmt: skip
    return load_space(method, names)


class TestSuggestions:
    @pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
    @pytest.mark.parametrize("method", available())
    def test_they_lie_in_the_shipped_space_and_every_draw_builds_the_method(self, method, kind):
        facts = facts_for(kind, n_layer=6, channels=24, train_length=L)
        artifacts = stand_ins(facts)
        for seed in range(5):
            found, shipped = random_analysis(seed, kind=kind), space(method, kind)
            suggested = suggest(found, shipped, [L, 4 * L, 16 * L])
            narrowed = load_space(method, shipped.facts, params=suggested.params)
            rng = random.Random(seed)
            for point in [*(draw(narrowed, rng) for _ in range(5)), *within(narrowed, suggested.enqueue)]:
                outside = [name for name, value in point.items()
                           if isinstance(old := shipped.params.get(name), Range) and value not in old]  # fmt: skip
                assert not outside, (seed, point)
                if not narrowed.broken(point) and point.keys() == draw(narrowed, rng).keys():
                    build_method(method, point, facts, artifacts)

    def test_every_entry_gives_its_reason_and_most_methods_get_some(self):
        found = [suggest(random_analysis(), space(method), [L, 16 * L]) for method in available()]
        assert sum(bool(one.params) for one in found) >= 5
        assert all(entry["why"] for one in found for entry in one.params.values())

    def test_without_prompts_beyond_the_training_length_nothing_is_narrowed(self):
        for method in available():
            assert suggest(random_analysis(), space(method), [L // 2, L]).params == {}

    def test_longmamba_looks_at_channels_at_the_edge_and_at_what_the_longest_prompt_allows(self):
        found = replace(random_analysis(), agreement=0.95, steps=((1.0,) * 6,) * 3)
        params = suggest(found, space("longmamba"), [4 * L, 16 * L]).params
        assert params["share"]["low"] == pytest.approx(found.share_above(-0.5), abs=0.01)
        assert params["share"]["high"] == pytest.approx(min(found.share_above(-20.0), 0.6), abs=0.01)
        assert params["clamp"]["choices"] == [0.05, 0.1, 0.2] and params["aggregate"]["choices"] == ["max"]
        assert params["selector"]["choices"] == ["dt_thre"] and params["min_ratio"]["choices"] == [1.0]
        near = suggest(found, space("longmamba"), [5 * L // 4 + 1, 2 * L]).params
        assert near["clamp"]["choices"] == [0.2] and near["min_ratio"]["choices"] == [1.0, 1.5]
        unsteady = replace(found, steps=((1.0,) * 6, (1.5,) * 6, (1.0,) * 6), agreement=None)
        kept = suggest(unsteady, space("longmamba"), [16 * L]).params
        assert not {"selector", "aggregate"} & kept.keys()

    def test_decimamba_drops_where_layers_look_back_and_keeps_what_is_read(self):
        found = replace(random_analysis(), distance=((90.0, 2.0, 40.0, 3.0, 30.0, 1.0),) * 3, loss=(4.0, 4.0, 5.0),
                        fresh=(4.0,) * 3)  # fmt: skip
        one = suggest(found, space("decimamba"), [16 * L])
        assert (one.params["first_layer"]["low"], one.params["first_layer"]["high"]) == (1, 5)
        assert (one.params["base_tokens"]["low"], one.params["base_tokens"]["high"]) == (L, 4 * L)
        assert one.params["layer_count"]["choices"] == [1, 2]
        first = [(point["first_layer"], point["base_tokens"], point["extra_tail"]) for point in one.enqueue]
        assert first == [(2, 2 * L, 64), (4, 2 * L, 64), (5, 4 * L, 64)]  # the last drops least

    def test_what_is_tried_first_spreads_over_the_parameter_that_matters_most(self):
        found = replace(random_analysis(), globals=tuple((0.0, 0.01, 0.02, 0.3, 0.2, 0.6) for _ in THETAS))
        shares = [point["share"] for point in suggest(found, space("longmamba"), [4 * L, 16 * L]).enqueue]
        assert shares == [float(f"{found.share_above(log_theta):.2g}") for log_theta in (-5, -8, -2)]
        scaled = suggest(found, space("mambaextend"), [4 * L, 16 * L])
        assert [(p["first"], p["middle"], p["last"]) for p in scaled.enqueue] == [(1.0, 0.5, 0.5), (1.0, 0.3, 0.3),
                                                                                   (1.0, 0.71, 0.71)]  # fmt: skip
        assert scaled.params["first"]["low"] > 0.9 and scaled.params["last"]["low"] == 0.3
        chunks = suggest(found, space("oprm"), [4 * L, 16 * L])
        assert [point["chunk_tokens"] for point in chunks.enqueue] == [L // 2, L, L // 4, 2 * L]

    def test_a_method_without_channels_to_act_on_is_suggested_no_scales(self):
        none = replace(random_analysis(), globals=tuple((0.0,) * 6 for _ in THETAS))
        assert suggest(none, space("mambaextend"), [16 * L]).enqueue == ()

    def test_upi_squeezes_as_much_as_the_loss_asks_for(self):
        found = replace(random_analysis(), loss=(4.0, 4.0, 5.0), fresh=(4.0,) * 3)
        for length, gamma in ((16 * L, 0.5), (64 * L, 0.67)):  # it reads four training lengths
            assert suggest(found, space("upi"), [length]).enqueue[0]["gamma"] == gamma


def draw(narrowed, rng):
    def one_of(name, one):
        if one.type == "choice":
            return rng.choice(one.choices)
        if one.type == "int":
            return rng.randint(int(one.low), int(one.high))
        return (
            math.exp(rng.uniform(math.log(one.low), math.log(one.high))) if one.log else rng.uniform(one.low, one.high)
        )

    return narrowed.draw(one_of)


class TestAuto:
    @pytest.fixture
    def study(self, tmp_path, monkeypatch):
        monkeypatch.setenv("STATESPAN_CACHE", str(tmp_path / "cache"))
        study = small_study(tmp_path, methods={"decimamba": {"space": "auto"}})
        facts = ModelFacts.of(load_model(str(tmp_path / "model")))
        found = replace(random_analysis(layers=3, channels=facts.channels), digest=facts.digest,
                        distance=((1.0, 40.0, 3.0),) * 3, loss=(4.0, 4.0, 5.0), fresh=(4.0,) * 3)  # fmt: skip
        save(found, places(facts)[-1])
        return study

    def test_a_study_searches_the_narrowed_space_and_begins_with_what_is_suggested(self, study):
        plan = make_plan(study)
        ranges = plan.spaces["decimamba"].params
        assert (ranges["first_layer"].low, ranges["first_layer"].high) == (1, 2)
        assert (ranges["base_tokens"].low, ranges["base_tokens"].high) == (64, 256)
        assert ranges["extra_tail"].choices == (0, 16, 64)
        origin, _, first = plan.points[0]
        assert origin == "suggested" and first["first_layer"] == 1

    def test_what_the_study_file_pins_stands(self, tmp_path, study):
        pinned = small_study(tmp_path, methods={"decimamba": {"space": "auto", "params": {"base_tokens": 99}}})
        assert make_plan(pinned).spaces["decimamba"].params["base_tokens"] == 99

    def test_a_study_that_goes_on_searches_what_it_began_with(self, study, tmp_path):
        before = make_plan(study)
        sweep(study, make_engine=instant)
        kept = json.loads((study.folder / FILE).read_text())
        assert kept == before.suggested
        for path in (tmp_path / "cache").rglob("analysis.json"):
            save(replace(Analysis.read(path), loss=(4.0, 5.0, 5.0)), path)
        again = make_plan(study)
        assert again.spaces["decimamba"].described() == before.spaces["decimamba"].described()
        assert again.points == before.points
        task = {"passkey": {"lengths": [256, 512], "depths": [0.5], "trials": 10}}
        longer = small_study(tmp_path, methods={"decimamba": {"space": "auto"}}, benchmarks=task)
        assert make_plan(longer).spaces["decimamba"].params["base_tokens"].high == 128
        (study.folder / FILE).write_text("{")
        with pytest.raises(UserError, match="is damaged"):
            make_plan(study)

    def test_suggestions_are_named_by_all_they_depend_on(self, tmp_path):
        found, shipped = random_analysis(), {"longmamba": space("longmamba")}
        facts = replace(facts_for(n_layer=6, channels=24, train_length=L), digest="d" * 64)
        made = auto_spaces(shipped, facts, [16 * L], tmp_path, lambda: found)
        (tmp_path / FILE).write_text(json.dumps(record(made, shipped, facts, [16 * L])))

        def asked():
            raise AssertionError("asked")

        assert auto_spaces(shipped, facts, [16 * L], tmp_path, asked) == made
        for other in ((shipped, replace(facts, digest="e" * 64), [16 * L]), (shipped, facts, [8 * L]),
                      ({"longmamba": space("longmamba", layers=5), "upi": space("upi")}, facts, [16 * L])):  # fmt: skip
            with pytest.raises(AssertionError, match="asked"):
                auto_spaces(*other, tmp_path, asked)
        with pytest.raises(UserError, match="train_length"):
            auto_spaces(shipped, replace(facts, train_length=None), [16 * L], tmp_path, asked)


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("STATESPAN_CACHE", str(tmp_path / "cache"))
        return save_checkpoint(tmp_path / "tiny", "mamba2")

    def test_it_prints_tables_writes_the_page_and_keeps_the_figures_for_studies(self, folder, tmp_path, capsys):
        out = tmp_path / "out"
        assert run(["analyze", str(folder), "--lengths", "64,256", "--layers", "0,2", "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        assert "distance" in shown and "decimamba" in shown and str(out) in shown.replace("\n", "")
        found = Analysis.read(out / "analysis.json")
        assert found.lengths == (64, 256) and list(found.maps) == ["0", "2"]
        assert "<svg" in (out / "analysis.html").read_text()
        assert known_analysis(ModelFacts.of(load_model(str(folder)))) == found

    def test_it_is_one_json_object_for_other_programs(self, folder, tmp_path, capsys):
        assert run(["analyze", str(folder), "--lengths", "128", "--out", str(tmp_path), "--texts", "1", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["lengths"] == [64, 128] and set(found["suggestions"]) == set(available())

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--lengths", "a,b"], "--lengths must be whole numbers"),
            (["--lengths", "32"], "--lengths must be at least the training length, 64"),
            (["--lengths", "99000000"], "need a longer text"),
            (["--layers", "7"], "--layers must lie in 0 … 2"),
            (["--text", "no-such"], "no-such"),
        ],
    )
    def test_wrong_options_are_one_line(self, folder, arguments, message, capsys):
        assert run(["analyze", str(folder), "--lengths", "128", *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())

    def test_an_unknown_training_length_is_asked_for(self, folder):
        with pytest.raises(UserError, match="give --train-length"):
            analyse(replace(load_model(str(folder)), train_length=None))
