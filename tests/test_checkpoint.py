import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from statespan.errors import UserError
from statespan.models.checkpoint import digest, load_model
from statespan.models.config import ModelConfig
from tests.cases import case
from tests.tiny import save_checkpoint


@pytest.fixture
def folder(tmp_path):
    return save_checkpoint(tmp_path / "model")


def test_loads_what_was_saved(folder):
    loaded = load_model(str(folder))
    assert loaded.train_length == 64 and loaded.tokenizer.decode(loaded.tokenizer.encode("héllo")) == "héllo"
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(loaded.model.layers[1].mixer.A_log, stored["backbone.layers.1.mixer.A_log"])
    assert loaded.model.lm_head.weight is loaded.model.embedding.weight


def test_half_precision_keeps_decay_rates_in_float32(folder):
    mixer = load_model(str(folder), dtype="bfloat16").model.layers[0].mixer
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_proj.bias.dtype} == {torch.float32}


def test_a_bin_file_of_plain_tensors_loads(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_model(str(folder)).model.config.n_layer == 3


def test_a_pickle_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": print}))
    with pytest.raises(UserError, match=r"pytorch_model\.bin .*"):
        load_model(str(folder))


def test_the_digest_follows_the_weights(folder):
    before = digest(folder)
    weights = load_file(folder / "model.safetensors")
    weights["backbone.norm_f.weight"][0] += 1e-6
    save_file(weights, folder / "model.safetensors")
    assert digest(folder) != before


@pytest.mark.parametrize("name", ["ss_m1_untied_d8", "hf_mamba_untied_bias", "hf_falcon_mamba"])
def test_both_layouts_load_from_disk(name, tmp_path, folder):
    recorded = case("forward", name)
    (tmp_path / "config.json").write_text(json.dumps(recorded.facts["config"]))
    weights = {k[2:]: v for k, v in recorded.tensors.items() if k.startswith("w.")}
    save_file(weights, tmp_path / "model.safetensors")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert load_model(str(tmp_path)).config == ModelConfig.read(recorded.facts["config"])


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_shape(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"d_model": 32}))


def more_layers(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"n_layer": 5}))


def another_model(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (cut_short, "cut short: copy it again"),
        (other_shape, r"embedding.weight is \(264, 16\), config.json makes it \(264, 32\)|is \(257, 16\)"),
        (more_layers, "weights lack layers.3"),
        (another_model, "describes a 'llama' model"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer at"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is not a tokenizers file"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights in"),
    ],
)
def test_a_broken_folder_is_one_clear_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(UserError, match="no checkpoint folder, hub id or shipped model named 'nowhere'"):
        load_model("nowhere")


def test_a_hub_id_without_a_network_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not be had from the hub"):
        load_model("someone/never-published")
