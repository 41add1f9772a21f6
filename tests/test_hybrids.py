"""Bamba and Zamba2: transformers' numbers, caches of attention, padding, and what methods do to a hybrid."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from statespan.cli import run
from statespan.errors import UserError
from statespan.methods.calibration import calibrate
from statespan.methods.table import build_method
from statespan.models.attention import KeyValues, Places, rotated
from statespan.models.checkpoint import load_model
from statespan.models.config import ModelConfig
from statespan.models.hook import VANILLA
from statespan.models.runner import Cache, Runner, Tokens
from tests.cases import build_model, case
from tests.method_conformance import facts_of
from tests.tiny import byte_tokenizer

EXACT = {"atol": 1e-9, "rtol": 0}  # float64; attention over other chunks sums in another order
HYBRIDS = {"hf_bamba": 45, "hf_zamba2": 43}
LONG = 160  # tokens of the tests' own prompts


@cache
def model(name, dtype=torch.float64):
    return build_model(case("forward", name), dtype)


@pytest.fixture(params=HYBRIDS)
def runner(request):
    with torch.inference_mode():
        yield Runner(model(request.param), chunk=64)


def rows(*lengths, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (length,), generator=random).tolist() for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chunk", [None, 16, 1])
@pytest.mark.parametrize("name, length", HYBRIDS.items())
def test_logits_and_greedy_tokens_are_transformers(name, length, chunk, dtype):
    recorded = case("forward", name)
    atol = recorded.facts["tolerance"]["suggested_float32_atol"]  # the source ran in float32 throughout
    runner, ids = Runner(model(name, dtype), chunk=chunk), recorded[f"L{length}.input_ids"]
    with torch.inference_mode():
        read = runner.prefill(Tokens(ids, (length,) * len(ids)), tail=length)
        logits = [runner.model.logits(read.hidden)]
        torch.testing.assert_close(logits[0], recorded[f"L{length}.logits"].to(dtype), atol=atol, rtol=0)
        logits[0] = logits[0][:, -1]
        decoded = recorded[f"L{length}.decode_ids"]
        logits += [runner.step(read.cache, decoded[:, i]) for i in range(decoded.shape[1] - 1)]
    ours = torch.stack(logits, dim=1)
    # of one pass over prompt and answer: transformers' own Zamba2 steps leave out the clamp of the step size
    torch.testing.assert_close(ours, recorded[f"L{length}.teacher_forced_logits"].to(dtype), atol=atol, rtol=0)
    assert torch.equal(ours.argmax(-1), decoded)


def other_configs():
    """What the recorded cases lack: several shared blocks, their attention adapters, biases, attention first."""
    zamba = case("forward", "hf_zamba2").facts["config"] | {"num_hidden_layers": 6, "num_mem_blocks": 2}
    zamba |= {"layers_block_type": ["linear_attention", *["hybrid"] * 4, "linear_attention"]}
    bamba = case("forward", "hf_bamba").facts["config"] | {"num_hidden_layers": 5}
    return {
        "zamba2, two blocks, attention adapters": zamba | {"use_shared_attention_adapter": True},
        "zamba2, no positions, biases": zamba | {"use_mem_rope": False, "add_bias_linear": True},
        "bamba, attention at both ends": bamba | {"attn_layer_indices": [0, 1, 4], "attention_bias": True},
        "bamba, two groups, biases": bamba | {"attn_layer_indices": [2], "mamba_n_groups": 2, "mlp_bias": True},
    }


@pytest.mark.parametrize("name", other_configs())
def test_random_models_of_other_shapes_agree_with_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is a development dependency")
    raw = json.loads(json.dumps(other_configs()[name]).replace('"inf"', "1e30"))
    cls = {"zamba2": "Zamba2", "bamba": "Bamba"}[raw["model_type"]]
    raw.pop("hybrid_layer_ids", None)
    config = getattr(transformers, f"{cls}Config")(**{k: v for k, v in raw.items() if k != "model_type"})
    torch.manual_seed(3)
    theirs = getattr(transformers, f"{cls}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    ours = Runner(load_model(str(tmp_path)).model)
    ids = torch.tensor(rows(70, 70))
    with torch.inference_mode():
        got = ours.model.logits(ours.prefill(Tokens(ids, (70, 70)), tail=70).hidden)
        want = theirs(ids).logits
    # float32 against float32, logits up to about 20
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_padded_row_equals_the_row_alone(runner):
    prompts = rows(LONG, 33, 1, 97)
    together = runner.prefill(Tokens.pad(prompts))
    for i, row in enumerate(prompts):
        alone = runner.prefill(Tokens.pad([row]))
        torch.testing.assert_close(together.hidden[i : i + 1], alone.hidden, **EXACT)
        mine, token = together.cache.rows([i]), torch.tensor([5])
        torch.testing.assert_close(runner.step(mine, token), runner.step(alone.cache, token), **EXACT)


def test_decoding_and_extending_equal_reading_it_all_at_once(runner):
    ids = torch.tensor(rows(LONG))
    whole = runner.prefill(Tokens(ids, (LONG,)), tail=20)
    part = runner.prefill(Tokens(ids[:, :-20], (LONG - 20,)))
    forked = part.cache.clone()
    torch.testing.assert_close(runner.extend(part.cache, ids[:, -20:]), whole.hidden, **EXACT)
    stepped = torch.stack([runner.step(forked, ids[:, i]) for i in range(LONG - 20, LONG)], dim=1)
    torch.testing.assert_close(stepped, runner.model.logits(whole.hidden), **EXACT)


def test_joined_rows_go_on_as_they_would_alone(runner):
    prompts = rows(LONG, 40, 71)
    alone = [runner.prefill(Tokens.pad([row])).cache for row in prompts]
    joined = Cache.join([one.clone() for one in alone])
    for tokens in ([1, 2, 3], [4, 5, 6]):
        together = runner.step(joined, torch.tensor(tokens))
        for i, own in enumerate(alone):
            torch.testing.assert_close(together[i], runner.step(own, torch.tensor(tokens[i : i + 1]))[0], **EXACT)
    assert joined.bytes > sum(one.bytes for one in alone) / 2 > 0


def test_the_training_pass_is_the_inference_pass_and_reaches_every_weight(runner):
    ids = torch.tensor(rows(50, 50))
    want = runner.prefill(Tokens(ids, (50, 50)), tail=50).hidden
    with torch.inference_mode(False), torch.enable_grad():
        trained = build_model(case("forward", "hf_zamba2" if runner.model.around.uses else "hf_bamba"))
        trained.requires_grad_(True)
        hidden = trained(ids.clone())
        torch.testing.assert_close(hidden.detach(), want, **EXACT)
        trained.logits(hidden).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters())


def test_positions_turn_products_by_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(at, to):
        a, b = (rotated(x, torch.tensor([[p]]), 1e4, 4) for x, p in ((q, at), (k, to)))
        return (a * b).sum()

    torch.testing.assert_close(product(7, 3), product(1007, 1003), **EXACT)
    assert (product(7, 3) - product(7, 4)).abs() > 1e-6


def test_a_cache_grows_without_losing_what_it_holds():
    config = ModelConfig.read(case("forward", "hf_bamba").facts["config"]).attention
    torch.manual_seed(0)
    held, parts = KeyValues.empty(1, config, torch.zeros(1)), torch.randn(700, 1, config.kv_heads, 1, config.head_dim)
    with torch.no_grad():
        for at, part in enumerate(parts):
            keys, values = held.append(part, -part, Places(torch.tensor([[at]]), (0,)))
    assert torch.equal(keys, torch.cat(list(parts), dim=2)) and torch.equal(values, -keys)
    assert held.position.item() == 700


class TestMethods:
    """Methods act on Mamba layers; attention sees what is left, at the positions it had."""

    def test_dropped_tokens_are_gone_for_later_attention_and_kept_by_earlier(self, runner):
        layer = 2 if runner.model.around.uses else 1  # one attention lies before, one behind
        method = build_method("decimamba", {"layers": [layer], "base_tokens": 40}, facts_of(runner))
        prompts = rows(LONG, 90)
        for chunk in (64, 256):
            walked = Runner(runner.model, chunk=chunk)
            read, vanilla = (walked.prefill(Tokens.pad(prompts), one) for one in (method, VANILLA))
            for ours, theirs in zip(read.cache.states[:layer], vanilla.cache.states[:layer], strict=True):
                assert torch.equal(ours.ssm, theirs.ssm)
            assert [one.length for one in read.cache.attention] == [LONG, 41]
            assert [one.position.tolist() for one in read.cache.attention] == [[LONG, 90]] * 2
            for i, row in enumerate(prompts):
                alone = walked.prefill(Tokens.pad([row]), method)
                torch.testing.assert_close(read.hidden[i : i + 1], alone.hidden, **EXACT)

    def test_attention_behind_a_drop_reads_the_survivors_at_their_own_positions(self):
        """Reading only the survivors, told where they stood, is the same."""
        runner = Runner(model("hf_bamba"))
        facts, (row,) = facts_of(runner), rows(LONG)
        method = build_method("decimamba", {"layers": [1], "base_tokens": 40}, facts)
        with torch.inference_mode():
            read = runner.prefill(Tokens.pad([row]), method)
            keys = read.cache.attention[1].keys[0, :, :41]
            kept = read.positions[0]
            assert len(kept) == 41 and kept[-1] == LONG - 1 and (kept.diff() > 0).all() and kept.diff().max() > 1
            # the same stream, entered again at other positions, makes other keys
            stream = runner.run(runner.stream(Tokens.pad([row])), method, 0, 1)
            moved = runner.run(runner.stream(Tokens.pad([row])), method, 0, 1)
            moved.positions = moved.positions + (moved.positions > 50)
            again = runner.run(stream, method, 1, 2)
            shifted = runner.run(moved, method, 1, 2)
        torch.testing.assert_close(again.cache.attention[1].keys[0, :, :41], keys, **EXACT)
        late = shifted.positions[0] > 51
        assert not torch.allclose(shifted.cache.attention[1].keys[0, :, :41][:, late], keys[:, late])

    @pytest.mark.parametrize("name", ["longmamba", "upi", "mambaextend"])
    def test_methods_of_steps_change_mamba_layers_only(self, name, runner):
        facts, (row,) = facts_of(runner), rows(LONG)
        calibration = calibrate(Runner(runner.model), rows(64, 64, seed=9), shares=(0.05,), lengths=(LONG,))
        params = {"longmamba": {"share": 0.3, "lengths": "table"}, "upi": {"share": 0.3},
                  "mambaextend": {"first": 0.5}}[name]  # fmt: skip
        artifacts = {} if name == "mambaextend" else {"calibration": calibration}
        method = build_method(name, params, facts, artifacts)
        read, vanilla = runner.prefill(Tokens.pad([row]), method), runner.prefill(Tokens.pad([row]))
        assert not torch.allclose(read.hidden, vanilla.hidden)
        first = method.first_layer_changed(LONG)
        assert first is not None and read.cache.attention[0].length == LONG
        for a, b in zip(read.cache.states[:first], vanilla.cache.states[:first], strict=True):
            assert torch.equal(a.ssm, b.ssm)
        short = Tokens.pad(rows(64))
        assert torch.equal(runner.prefill(short, method).hidden, runner.prefill(short).hidden)

    def test_a_window_of_nothing_is_the_prompt_without_it_at_its_old_positions(self, runner):
        method = build_method(
            "remamba", {"start": 0.0, "window": 0.25, "ratio": 0.0, "adapter": None}, facts_of(runner)
        )
        (row,) = rows(LONG)
        read = method.prefill(runner, Tokens.pad([row]))
        assert read.positions[0].tolist() == list(range(LONG // 4, LONG))
        # rotary positions tell distances only, so where the text begins does not matter
        alone = runner.prefill(Tokens.pad([row[LONG // 4 :]]))
        torch.testing.assert_close(read.hidden, alone.hidden, **EXACT)

    def test_a_chunk_that_answers_is_read_as_if_it_were_the_prompt(self, runner):
        method = build_method("oprm", {"chunk_tokens": 40, "question_tokens": 12}, facts_of(runner))
        prompts = rows(LONG, 100)
        read = method.prefill(runner, Tokens.pad(prompts))
        logits = runner.step(read.cache, torch.tensor([1, 2]))
        for i, row in enumerate(prompts):
            places = read.positions[i][read.positions[i] >= 0].tolist()
            alone = runner.prefill(Tokens.pad([[row[at] for at in places]]))
            torch.testing.assert_close(read.hidden[i : i + 1], alone.hidden, **EXACT)
            torch.testing.assert_close(logits[i], runner.step(alone.cache, torch.tensor([i + 1]))[0], **EXACT)


def save_hybrid(folder: Path, name: str, **changes) -> Path:
    """A checkpoint folder in transformers' layout, with a byte tokenizer."""
    recorded = case("forward", name)
    torch.manual_seed(1)
    weights = {k[2:]: v.clone() for k, v in recorded.tensors.items() if k.startswith("w.")}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in weights:
            weights[key] = torch.randn(257, weights[key].shape[1]) * 0.1
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    raw = recorded.facts["config"] | {"vocab_size": 257, "statespan": {"train_length": 64}} | changes
    (folder / "config.json").write_text(json.dumps(raw))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize(
    "method", [(), ("--method", "decimamba", "--param", "layers=[1]", "--param", "base_tokens=64")]
)
def test_eval_of_a_hybrid_checkpoint_prints_its_score(name, method, tmp_path, capsys):
    folder = save_hybrid(tmp_path / "tiny", name)
    code = run(["eval", str(folder), "perplexity", "--set", "lengths=[128]", "--limit", "1", "--json", *method])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0 and rows[0]["length"] == 128 and rows[0]["score"] < 0


def test_a_hybrid_that_cannot_be_run_is_refused_in_one_line(tmp_path):
    raw = case("forward", "hf_bamba").facts["config"]
    with pytest.raises(UserError, match="rotary positions of type 'yarn'"):
        ModelConfig.read(raw | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}})
    with pytest.raises(UserError, match="without Mamba layers"):
        ModelConfig.read(raw | {"attn_layer_indices": [0, 1, 2, 3]})
    with pytest.raises(UserError, match="activation 'relu'"):
        ModelConfig.read(raw | {"hidden_act": "relu"})
    zamba = {k: v for k, v in case("forward", "hf_zamba2").facts["config"].items() if k != "layers_block_type"}
    with pytest.raises(UserError, match="lacks layers_block_type"):
        ModelConfig.read(zamba)
    folder = save_hybrid(tmp_path / "tiny", "hf_bamba", attn_layer_indices=[1])
    with pytest.raises(UserError, match="weights lack layers"):
        load_model(str(folder))
