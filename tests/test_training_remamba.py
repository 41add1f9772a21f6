"""Training ReMamba's adapter and its fair baseline, on a small corpus and tiny models."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from statespan.benchmarks.data import load_text
from statespan.errors import UserError
from statespan.methods.base import ModelFacts
from statespan.methods.table import build_method
from statespan.models import checkpoint
from statespan.models.runner import Runner, Tokens
from statespan.training import vocabulary
from statespan.training.adapter_card import write_adapter_card
from statespan.training.adapter_rows import AdapterRows, AdapterStream, Compression
from statespan.training.corpus import DOCUMENT_END
from statespan.training.remamba import PUBLISHED, AdapterConfig, AdapterTrainer, changes_of
from statespan.training.rows import RowSettings, make_rows
from statespan.training.selection_start import fit_selection, mentions
from statespan.training.vocabulary import encode_documents
from tests.method_conformance import prompts
from tests.tiny import CONFIGS, tiny_model

TRAIN_LENGTH = 128
TINY = AdapterConfig(steps=4, tokens_per_step=256, rank=4, lora_alpha=4, warmup=0.0)


@pytest.fixture(scope="module")
def ids(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    (root / "train").mkdir()
    (root / "train" / "book.txt").write_text(DOCUMENT_END.join((load_text("persuasion")[:60_000], "The end. Of all.")))
    vocabulary.fit(root, root / "tokenizer.json", vocab_size=704, task_lines=300)
    np.save(root / "train" / "book.npy", encode_documents(root / "train" / "book.txt", root / "tokenizer.json"))
    return root


@pytest.fixture
def folder(request, tmp_path, ids) -> Path:
    """A tiny checkpoint whose vocabulary is the corpus's."""
    kind = getattr(request, "param", "mamba1")
    raw = CONFIGS[kind] | {"vocab_size": 704, "statespan": {"train_length": TRAIN_LENGTH}}
    model = tiny_model(kind, dtype=torch.float32)
    wide = torch.nn.Embedding(704, 16)
    torch.nn.init.normal_(wide.weight, std=0.3)
    model.embedding = wide
    model.lm_head.weight = wide.weight
    checkpoint.save(model, raw, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((ids / "tokenizer.json").read_bytes())
    return tmp_path / "model"


def trainer(folder, ids, **changes) -> AdapterTrainer:
    where = {key: changes.pop(key) for key in ("checkpoint",) if key in changes}
    return AdapterTrainer(checkpoint.load_model(str(folder)), replace(TINY, **changes), ids, **where)


def test_batches_hold_whole_prompts_of_one_length_and_follow_from_their_number(ids):
    rows = AdapterRows(make_rows(ids, RowSettings()), TRAIN_LENGTH, 512, seed=3)
    lengths = set()
    for number in range(12):
        one, again = rows.batch(number), rows.batch(number)
        assert torch.equal(one.ids, again.ids) and one.compression == again.compression
        assert one.ids.shape[0] == max(512 // one.prompt_length, 1)
        assert 3 <= one.ids.shape[1] - one.prompt_length <= 48
        lengths.add(one.prompt_length)
    assert len(lengths) >= 3 and max(lengths) <= 3 * TRAIN_LENGTH
    first = next(iter(AdapterStream(ids, TRAIN_LENGTH, 512, 3, first=5)))
    assert torch.equal(first.ids, rows.batch(5).ids)


def test_windows_and_ratios_are_drawn_as_published():
    drawn = [Compression.draw(Random(i), 3_000, 1_000) for i in range(200)]
    assert all(0.1 <= one.window <= 0.3 and 0.05 <= one.ratio <= 0.2 for one in drawn)
    assert max(one.window for one in drawn) > 0.28
    assert all(Compression.draw(Random(i), 800, 1_000).window == 0.1 for i in range(20))


@pytest.mark.parametrize("lora", ["peft", "torch"])
@pytest.mark.parametrize("folder", ["mamba1", "mamba2"], indirect=True)
def test_one_step_reaches_every_trained_part_and_no_frozen_one(folder, ids, lora):
    one = trainer(folder, ids, lora=lora)
    frozen = {name: p.detach().clone() for name, p in one.model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in one.trained()}
    assert all(word in " ".join(before) for word in ("query", "key", "value", "theta", "dt_"))
    one.run()
    for name, parameter in one.trained():
        assert not torch.equal(parameter, before[name]), name
    for name, parameter in one.model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name
    assert {name.split(".")[-1] for name in frozen} >= {"A_log", "D"}


@pytest.mark.parametrize("folder", ["mamba1", "mamba2"], indirect=True)
def test_the_written_adapter_runs_as_it_was_trained(folder, ids, tmp_path):
    one = trainer(folder, ids)
    one.run()
    one.write(path := tmp_path / "adapter.safetensors")
    loaded = checkpoint.load_model(str(folder))
    params = {"window": 0.3, "ratio": 0.2, "adapter": str(path)}
    method = build_method("remamba", params, ModelFacts.of(loaded))
    prompt = Tokens.pad(prompts(150, 120))
    with torch.inference_mode():
        merged = method.prefill(Runner(loaded.model), prompt).hidden
        live = one.method(Compression(0.3, 0.2))
        live.params = method.params
        trained = live.prefill(one.runner, prompt).hidden
    # merging rounds W + B A once more in float32
    torch.testing.assert_close(merged, trained, atol=2e-5, rtol=1e-5)


def test_peft_and_torch_keep_the_same_arithmetic(folder, ids):
    found = {}
    for lora in ("peft", "torch"):
        one = trainer(folder, ids, lora=lora)
        for name, tensor in changes_of(one.model).items():
            found.setdefault(name, []).append(tensor)
        low = [p for name, p in one.trained() if "lora_B" in name or name.endswith(".B")]
        with torch.no_grad():
            for parameter in low:
                parameter.fill_(0.01)
            for name, parameter in one.trained():
                if "lora_A" in name or name.endswith(".A"):
                    parameter.fill_(0.02)
            ids_of = torch.tensor(prompts(40))
            found.setdefault("hidden", []).append(one.model(ids_of))
    # float32: one adds W x and B A x, the other multiplies by W + B A
    torch.testing.assert_close(*found.pop("hidden"), atol=2e-5, rtol=0)
    assert all(len(both) == 2 and both[0].shape == both[1].shape for both in found.values())


def test_the_baseline_trains_the_same_weights_of_the_model_on_the_same_batches(folder, ids, tmp_path):
    method, baseline = trainer(folder, ids), trainer(folder, ids, baseline=True)
    assert baseline.selection is None
    own = {name for name, _ in method.trained() if not name.startswith(("query", "key", "value", "theta"))}
    assert own == {name for name, _ in baseline.trained()}
    for one, other in zip(method.batches, baseline.batches, strict=False):
        assert torch.equal(one.ids, other.ids)
        if one.number == 3:
            break
    baseline.run()
    baseline.write(path := tmp_path / "baseline.safetensors")
    loaded = checkpoint.load_model(str(folder))
    facts, prompt = ModelFacts.of(loaded), Tokens.pad(prompts(90))
    plain = build_method("remamba", {"selector": "none", "adapter": str(path)}, facts)
    with torch.inference_mode():
        ours = plain.prefill(Runner(loaded.model), prompt).hidden
        trained = baseline.runner.prefill(prompt).hidden
    torch.testing.assert_close(ours, trained, atol=2e-5, rtol=1e-5)


def test_matrices_are_stored_in_half_the_bytes_where_asked_and_the_record_lies_beside(folder, ids, tmp_path):
    one = trainer(folder, ids)
    one.run()
    one.write(whole := tmp_path / "whole.safetensors")
    one.write(small := tmp_path / "small.safetensors", half=True)
    assert small.stat().st_size < 0.65 * whole.stat().st_size
    loaded = checkpoint.load_model(str(folder))
    hidden = []
    for path in (whole, small):
        method = build_method("remamba", {"ratio": 0.2, "adapter": str(path)}, ModelFacts.of(loaded))
        assert method.adapter.selection.query[0].weight.dtype == torch.float32
        with torch.inference_mode():
            hidden.append(method.prefill(Runner(loaded.model), Tokens.pad(prompts(150))).hidden)
    # float16 rounds each weight by 5e-4 of its value
    torch.testing.assert_close(hidden[1], hidden[0], atol=2e-2, rtol=0)
    record = json.loads(small.with_suffix(".json").read_text())
    assert record["steps"] == 4 and record["settings"]["baseline"] is False and record["curve"][-1]["step"] == 4


def test_the_card_says_what_the_records_hold(tmp_path):
    (artifacts := tmp_path / "toy" / "artifacts").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no adapter's \.json"):
        write_adapter_card(artifacts)
    record = {"settings": asdict(replace(TINY, minutes=2.5)), "trained": 1_234, "steps": 10, "seconds": 150.0,
              "device": "cpu", "torch": "2", "curve": [{"step": i, "loss": 1 / i, "exact": i / 10}
              for i in range(1, 11)]}  # fmt: skip
    (artifacts / "remamba.json").write_text(json.dumps(record))
    write_adapter_card(artifacts)
    card = (artifacts / "README.md").read_text()
    assert "| `remamba` | 10 | 150 | 1,234 | cpu, torch 2 |" in card and "--minutes 2.5 --half" in card
    assert "| `remamba` | 0.750, 15% |" in card and "0.106, 95% |" in card


@pytest.mark.parametrize("model", ["mamba1-5m", "mamba2-5m"])
def test_the_shipped_adapters_fit_the_shipped_models(model):
    facts = ModelFacts.of(checkpoint.load_model(model))
    assert build_method("remamba", {"ratio": 0.05}, facts).adapter.selection is not None
    baseline = build_method("remamba", {"selector": "none", "adapter": "remamba-baseline"}, facts)
    assert baseline.adapter.selection is None and baseline.first_layer_changed(10) == 0


def test_the_published_recipe_decays_theta_too(folder, ids):
    for changes, decayed in (({}, False), (PUBLISHED, True)):
        one = trainer(folder, ids, **changes)
        theta = one.selection.theta[0]
        (decay,) = (g["weight_decay"] for g in one.optimizer.param_groups if any(p is theta for p in g["params"]))
        assert (decay > 0) == decayed
    assert one.config.rate_at(0.0) == 1.0 and one.config.score_grad == "times_score"


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(folder, ids, tmp_path, monkeypatch):
    whole = trainer(folder, ids)
    whole.run()
    monkeypatch.setattr("statespan.training.remamba.SAVE_EVERY", 1)
    file = tmp_path / "run.pt"
    half = trainer(folder, ids, checkpoint=file)
    steps = iter(range(2))
    train_on = half._train_on

    def stop_after_two(*args):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return train_on(*args)

    monkeypatch.setattr(half, "_train_on", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        half.run()
    again = trainer(folder, ids, checkpoint=file)
    assert again.done.step == 2
    again.run()
    for (name, one), (_, other) in zip(whole.trained(), again.trained(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, msg=name)
    with pytest.raises(UserError, match="is of another run"):
        trainer(folder, ids, checkpoint=file, baseline=True)


def test_training_lowers_the_loss_of_what_it_sees_again(folder, ids):
    one = trainer(folder, ids, steps=30, learning_rate=5e-3)
    batch = next(iter(one.batches))
    with torch.no_grad():
        before = one.losses(batch)[0].item()
    for _ in range(30):
        loss, _ = one._train_on(batch, 0.0)
    assert loss.item() < before - 0.3


def test_a_prompt_mentions_the_answer_where_three_tokens_are_the_same():
    prompt = torch.arange(100, 160)[None].repeat(2, 1)
    answer = torch.tensor([[7, 130, 131, 132, 8], [130, 131, 9, 132, 133]])
    found = mentions(prompt, answer)
    # from 16 tokens before the three to two behind them
    assert found[0].nonzero()[:, 0].tolist() == list(range(14, 35)) and not found[1].any()
    assert mentions(prompt, torch.tensor([[130, 131]] * 2)).sum(1).tolist() == [20, 20]
    assert mentions(prompt, torch.tensor([[100, 101, 102]] * 2))[0].nonzero()[:, 0].tolist() == list(range(5))


@pytest.mark.parametrize("folder", ["mamba1", "mamba2"], indirect=True)
def test_a_fitted_start_tells_tokens_and_mentions_apart_and_leaves_the_model_alone(folder, ids):
    one = trainer(folder, ids, start="fitted", fit_steps=3)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    batches = [batch for _, batch in zip(range(60), one.batches, strict=False)]
    first = fit_selection(one.selection, one.runner, batches[:2], 2)
    last = fit_selection(one.selection, one.runner, batches, 60)
    assert last[0] < 0.8 * first[0] and last[1] < first[1]
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert all(theta.abs().sum() == 0 for theta in one.selection.theta)


def test_a_fitted_start_trains_on_the_baselines_batches_and_is_told_in_the_record(folder, ids):
    one, baseline = trainer(folder, ids, start="fitted", fit_steps=2), trainer(folder, ids, baseline=True)
    seen = []
    train_on = one._train_on
    one._train_on = lambda batch, progress: seen.append(batch.ids) or train_on(batch, progress)
    one.run()
    assert all(torch.equal(ours, theirs.ids) for ours, theirs in zip(seen, baseline.batches, strict=False))
    assert len(seen) == 4 and set(one.record()["fitted"]) == {"value", "cosine", "seconds"}


def test_windows_can_be_drawn_wider_than_published():
    drawn = [Compression.draw(Random(i), 3_000, 1_000, 0.5).window for i in range(200)]
    assert min(drawn) >= 0.1 and 0.45 < max(drawn) <= 0.5
