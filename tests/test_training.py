"""The corpus readers, the training rows, the loop and what it writes, on a small corpus and tiny models."""

from __future__ import annotations

import io
import json
import lzma
import math
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statespan.benchmarks import needles
from statespan.benchmarks.data import TEXTS, load_text, xz_bits_per_byte
from statespan.errors import UserError
from statespan.models.checkpoint import SHIPPED, load_model
from statespan.training import finish, probes, vocabulary
from statespan.training.__main__ import _factors
from statespan.training.card import card, command
from statespan.training.corpus import DOCUMENT_END, clean, find_package, without_repeats
from statespan.training.loop import Trainer, parameter_groups, train
from statespan.training.packages import r_objects, read_package, sword_blocks
from statespan.training.presets import PRESETS, TrainConfig, new_model, plain, preset
from statespan.training.rows import BatchStream, RowMaker, RowSettings, loader, make_rows
from statespan.training.tasks import TASKS, Desk
from statespan.training.text_pool import TextPool
from statespan.training.vocabulary import Encoder, encode_documents

TINY = {"d_model": 32, "n_layer": 2, "d_state": 8, "head_dim": 16, "tokens_per_step": 512, "probes": 1}
STAGES = ((64, 0.5), (256, 1.0))


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus: a piece of one novel to train on, pieces of the others held out."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "train").mkdir()
    (root / "train" / "book.txt").write_text(DOCUMENT_END.join((load_text("persuasion")[:90_000], "The end. Of all.")))
    vocabulary.fit(root, root / "tokenizer.json", vocab_size=704, task_lines=300)
    (root / "heldout").mkdir()
    np.save(root / "train" / "book.npy", encode_documents(root / "train" / "book.txt", root / "tokenizer.json"))
    for name in ("moby_dick", "persuasion", "emma", "mansfield_park"):
        (root / f"{name}.txt").write_text(load_text(name)[:6_000])
        np.save(root / "heldout" / f"{name}.npy", encode_documents(root / f"{name}.txt", root / "tokenizer.json"))
    return root


@pytest.fixture(scope="module")
def maker(ids: Path) -> RowMaker:
    return make_rows(ids, RowSettings())


def tiny(kind: str, **changes: object) -> TrainConfig:
    base = next(config for config in PRESETS.values() if config.kind == kind)
    return replace(base, **TINY | {"probe_samples": 1, "stages": STAGES} | changes)  # type: ignore[arg-type]


# --- packages and cleaning


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def test_a_debian_package_is_read_without_dpkg(tmp_path: Path) -> None:
    data = lzma.compress(_tar({"./usr/share/a.txt": b"text"}))
    members = [(b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", data)]
    raw = b"!<arch>\n" + b"".join(
        name.ljust(48) + str(len(body)).encode().ljust(10) + b"`\n" + body + b"\n" * (len(body) % 2)
        for name, body in members
    )
    (tmp_path / "a_1.deb").write_bytes(raw)
    assert read_package(tmp_path / "a_1.deb") == {"usr/share/a.txt": b"text"}
    (tmp_path / "b_1.deb").write_bytes(b"no archive")
    with pytest.raises(UserError, match="not a Debian package"):
        read_package(tmp_path / "b_1.deb")


def test_an_r_data_base_gives_its_strings_object_by_object() -> None:
    def record(strings: list[bytes], flags: int) -> bytes:
        body = b"X\n" + struct.pack(">iii", 3, 0, 0) + struct.pack(">ii", flags, len(strings))
        body += b"".join(struct.pack(">ii", 0x40009, len(s)) + s for s in strings)
        return struct.pack(">I", len(body)) + zlib.compress(body)

    rdb = record([b"EMMA", b"", b"Chapter"], 0x10) + record([b"one"], 0x210)
    assert list(r_objects(rdb)) == [["EMMA", "", "Chapter"], ["one"]]


def test_sword_blocks_come_old_testament_first() -> None:
    def module(text: str) -> tuple[bytes, bytes]:
        packed = zlib.compress(text.encode())
        return struct.pack("<III", 0, len(packed), len(text)), packed

    files = {}
    for testament in ("nt", "ot"):
        index, packed = module(testament)
        files |= {f"m/{testament}.bzs": index, f"m/{testament}.bzz": packed}
    assert list(sword_blocks(files)) == ["ot", "nt"]


def test_cleaning_joins_wrapped_lines_and_makes_punctuation_ascii() -> None:
    assert clean("“It’s\r\nhere” —  so…\n \n\nNext") == '"It\'s here" -- so...\n\nNext'


def test_long_paragraphs_are_kept_once_and_short_ones_always() -> None:
    long, short = "word " * 40, "Chapter"
    assert without_repeats([f"{short}\n\n{long}", f"{short}\n\n{long}"], set()) == [f"{short}\n\n{long}", short]


def test_a_missing_package_says_where_help_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no jargon-text package in .*docs/training.md"):
        find_package(tmp_path, "jargon-text")


def test_the_shipped_novels_are_whole_and_clean() -> None:
    assert TEXTS == ("emma", "mansfield_park", "moby_dick", "persuasion")
    for name in TEXTS:
        assert len(load_text(name)) > 400_000
        assert "Gutenberg" not in load_text(name)
    with pytest.raises(UserError, match="no text named 'ema'; did you mean 'emma'"):
        load_text("ema")


# --- tokens, tasks and rows


@given(text=st.text(st.sampled_from("ab Z.,'\"?!-:(\n0179"), max_size=60))
def test_the_encoder_equals_the_tokenizer_on_ascii(text: str, ids: Path) -> None:
    encoder = Encoder(ids / "tokenizer.json")
    assert encoder(text) == encoder._tokenizer.encode(text, add_special_tokens=False).ids


def test_every_digit_is_a_token_of_its_own(ids: Path) -> None:
    encoder = Encoder(ids / "tokenizer.json")
    assert [encoder.spellings[token] for token in encoder(" 4071")] == [" ", "4", "0", "7", "1"]


@pytest.mark.parametrize("name", TASKS)
@given(seed=st.integers(0, 10_000), room=st.integers(32, 600))
def test_a_task_fits_its_room_and_reads_as_its_text_would(name: str, seed: int, room: int, maker: RowMaker) -> None:
    task, _, least = TASKS[name]
    episode = task(Random(seed), max(room, least), maker.desk)
    if episode is None:
        return
    assert len(episode.ids) == len(episode.weights) <= max(room, least)
    assert any(weight > 1 for weight in episode.weights)
    encoder = maker.desk.encode
    if name != "copying":  # its second copy may begin in the middle of a word
        assert encoder._tokenizer.encode(encoder.decode(episode.ids), add_special_tokens=False).ids == episode.ids


@given(seed=st.integers(0, 10_000))
def test_a_named_keys_answer_stands_beside_its_key(seed: int, maker: RowMaker) -> None:
    episode = TASKS["named_keys"][0](Random(seed), 400, maker.desk)
    if episode is None:  # eight codes of 36 characters do not fit
        return
    text = maker.desk.encode.decode(episode.ids)
    context, _, asked = text.partition("\n\nQuestion: ")
    for block in asked.removesuffix("\n").split("Question: "):
        question, answer = block.rstrip("\n").split("\nAnswer:")
        key = question.removesuffix("?").split(" for ")[1]
        assert f"for {key} is: {answer.split()[-1]}." in context


@given(number=st.integers(0, 500), length=st.sampled_from((64, 128, 256)))
def test_rows_have_their_length_and_targets_are_the_next_tokens(number: int, length: int, maker: RowMaker) -> None:
    batch = maker.batch(0, number, 512, length)
    assert batch.ids.shape == (512 // length, length)
    row, column = batch.places // length, batch.places % length
    inner = column < length - 1  # the last position's target lies beyond what the model reads
    assert torch.equal(batch.targets[inner], batch.ids[row[inner], column[inner] + 1])
    assert (batch.weights > 0).all()


def test_batches_do_not_depend_on_the_workers(ids: Path) -> None:
    def first(workers: int) -> list[torch.Tensor]:
        stream = BatchStream(ids, RowSettings(), seed=3, tokens=256, length_of=lambda number: 128)
        batches = iter(loader(stream, workers, pin=False))
        return [next(batches).ids for _ in range(4)]

    for alone, dealt in zip(first(0), first(2), strict=True):
        assert torch.equal(alone, dealt)


@given(seed=st.integers(0, 1000), tokens=st.integers(30, 400))
def test_a_passage_is_cut_between_sentences(seed: int, tokens: int, maker: RowMaker) -> None:
    passage = maker.desk.pool.passage(Random(seed), tokens)
    spellings = maker.desk.encode.spellings
    assert len(passage.ids) <= tokens
    for cut in passage.cuts:
        assert spellings[passage.ids[cut]].startswith(" ")
        assert spellings[passage.ids[cut - 1]].rstrip("\"')]")[-1:] in (".", "!", "?", "")


# --- model, schedule and loop


def test_the_schedule_warms_up_and_falls_to_its_floor() -> None:
    config = preset("mamba1-5m")
    assert config.rate_at(0.0) == 0.0
    assert config.rate_at(config.warmup) == pytest.approx(1.0)
    assert config.rate_at(1.0) == pytest.approx(config.final_rate)
    assert [config.length_at(progress) for progress in (0.0, 0.05, 0.15, 0.3, 0.5, 1.0)] == [
        64,
        128,
        256,
        512,
        1024,
        1024,
    ]


def test_a_step_that_rows_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="must be a multiple of every row length"):
        replace(preset("mamba1-5m"), tokens_per_step=1000)
    with pytest.raises(UserError, match="no training preset named 'mamba1'; did you mean 'mamba1-5m'"):
        preset("mamba1")


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_first_step_sizes_lie_between_a_thousandth_and_a_tenth(kind: str) -> None:
    model = new_model(tiny(kind), 128)
    for name, parameter in model.named_parameters():
        if name.endswith(("dt_bias", "dt_proj.bias")):
            steps = torch.nn.functional.softplus(parameter)
            assert steps.min() > 0.99e-3 and steps.max() < 0.101


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_decay_falls_on_matrices_only(kind: str) -> None:
    decayed, spared = parameter_groups(new_model(tiny(kind), 128), 0.1)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 or parameter.shape[-1] == 8 for parameter in spared["params"])


@pytest.mark.parametrize("name", ["mamba1-5m", "mamba2-5m"])
def test_a_shipped_model_has_three_to_six_million_parameters(name: str) -> None:
    assert 3e6 < sum(parameter.numel() for parameter in new_model(preset(name), 4096).parameters()) < 6e6


def test_training_lowers_the_loss_and_writes_a_checkpoint_that_loads(ids: Path, tmp_path: Path) -> None:
    config = tiny("mamba2", n_layer=1, steps=50, learning_rate=2e-2, rows=RowSettings(task_share=0.0))
    model, curve = train(config, ids)
    assert curve.losses[-1]["loss"] < 0.9 * math.log(704)
    assert set(curve.probes[-1]) >= {"passkey 256", "4 named keys 256", "bits_per_byte persuasion"}
    finish.write(model, config, curve, ids, tmp_path / "made")
    loaded = load_model(str(tmp_path / "made"))
    assert loaded.train_length == 256
    assert loaded.tokenizer.eos_id == 0
    for name, parameter in loaded.model.named_parameters():
        trained = dict(model.named_parameters())[name]
        wide = name.endswith(("A_log", "D", "dt_bias"))
        assert torch.equal(parameter, trained if wide else trained.bfloat16().float()), name
    found = finish.measure(tmp_path / "made", ids, "cpu", lengths=(256,), tokens_at_once=4096, most=2)
    assert (
        json.loads((tmp_path / "made" / "training_curve.json").read_text())["final"]["retrieval"] == found["retrieval"]
    )


def test_a_card_says_what_was_measured_and_how_to_ask_for_it_again() -> None:
    for folder in sorted(SHIPPED.glob("*/training_curve.json")):
        record = json.loads(folder.read_text())
        text = card(record)
        assert text == (folder.parent / "README.md").read_text(), "write it with python -m statespan.training card"
        assert f"{100 * record['final']['retrieval']['4 named keys 1024']:.1f} %" in text
        assert f"run {folder.parent.name} --ids IDS" in text
    fast = replace(preset("mamba1-5m"), seed=3, rows=RowSettings(source_weights=(("sotu", 2.0),)))
    assert command(plain(fast)).endswith("--device cuda --seed 3 --source-weight sotu=2")


def test_a_source_weight_names_a_source_and_a_factor(ids: Path) -> None:
    assert dict(_factors(["book=2"], ids))["book"] == 2.0
    with pytest.raises(UserError, match="no source of text named 'bok'; did you mean 'book'"):
        _factors(["bok=2"], ids)
    with pytest.raises(UserError, match=r"takes NAME=FACTOR, such as sotu=0\.5; got 'book=much'"):
        _factors(["book=much"], ids)


@pytest.mark.parametrize("name", ["mamba1-5m", "mamba2-5m"])
def test_the_shipped_models_meet_their_bars(name: str) -> None:
    final = json.loads((SHIPPED / name / "training_curve.json").read_text())["final"]
    assert all(final["retrieval"][f"passkey {length}"] >= 0.99 for length in (256, 512, 1024))
    assert final["retrieval"]["4 named keys 1024"] >= 0.8
    assert min(final["retrieval"][f"1 named key {length}"] for length in (4096, 8192, 16384, 32768)) < 0.5
    assert all(bits < xz_bits_per_byte(novel) for novel, bits in final["bits_per_byte"].items())


@pytest.mark.parametrize("name", ["mamba1-5m", "mamba2-5m"])
def test_a_shipped_model_finds_held_out_passkeys(name: str) -> None:
    loaded = load_model(name)
    desk = Desk(Encoder(loaded.folder / "tokenizer.json"), _moby_dick(loaded.folder), 1.0)
    samples = [probes.make_probe(Random(seed), probes.PASSKEY, 256, desk) for seed in range(6)]
    assert probes.exact(loaded.model, samples, tokens_at_once=1024) == 1.0


def _moby_dick(folder: Path) -> TextPool:
    encoder = Encoder(folder / "tokenizer.json")
    ids = encoder._tokenizer.encode(load_text("moby_dick")[:60_000], add_special_tokens=False).ids
    return TextPool({"moby_dick": np.array(ids, dtype=np.uint16)}, encoder, {})


def test_a_resumed_run_equals_an_uninterrupted_one(ids: Path, tmp_path: Path) -> None:
    config = tiny("mamba2", steps=6)
    whole, _ = train(config, ids)
    half = Trainer(config, ids, torch.device("cpu"), 0, tmp_path / "run.pt")
    batches = half._on_device()
    for _ in range(3):
        half._train_on(next(batches), half.pace.at(half.step))
    half._save()
    resumed, _ = train(config, ids, checkpoint=tmp_path / "run.pt")
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# --- probes


@pytest.mark.parametrize("window", [64, 100])
def test_bits_per_byte_of_a_model_that_knows_nothing_is_the_vocabularys(window: int, ids: Path) -> None:
    model = new_model(tiny("mamba2"), 704)
    torch.nn.init.zeros_(model.embedding.weight)
    text, _ = probes.novel(ids, "emma")
    bits = probes.bits_per_byte(model, text, 6_000, window, tokens_at_once=512)
    # every token but the first is scored once; logits are all zero
    assert bits == pytest.approx((len(text) - 1) * math.log2(704) / 6_000, rel=1e-6)


@given(seed=st.integers(0, 1000), keys=st.sampled_from((0, 1, 4)), length=st.integers(220, 600))
def test_a_probe_ends_with_its_answer_and_fits(seed: int, keys: int, length: int, ids: Path) -> None:
    desk = _desk(ids)
    probe = probes.make_probe(Random(seed), keys, length, desk)
    text = desk.encode.decode(probe.ids)
    answer = desk.encode.decode(probe.ids[-probe.answer :]).strip()
    assert len(probe.ids) - probe.answer <= length
    assert text.count(answer) >= 2
    assert text.count("The special magic number for") == (keys + 1 if keys else 0)
    asked = needles.PASSKEY_CUE if keys == 0 else "is:"
    assert text.removesuffix(f" {answer}").endswith(asked)


_DESKS: dict[Path, probes.Desk] = {}


def _desk(ids: Path) -> probes.Desk:
    return _DESKS.setdefault(ids, probes.probe_desk(ids))
