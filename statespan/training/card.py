"""The model card of a checkpoint folder, written from its training_curve.json: what is said there was measured.

python -m statespan.training card FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from statespan.benchmarks.data import xz_bits_per_byte
from statespan.errors import UserError
from statespan.training.corpus import HELD_OUT, SOURCES
from statespan.training.presets import PRESETS, TrainConfig, plain
from statespan.training.probes import label

_KEYS = (0, 1, 4, 8)
_NAMES = {"mamba1": "Mamba-1", "mamba2": "Mamba-2"}


def write_card(folder: Path) -> None:
    """FOLDER/README.md."""
    path = folder / "training_curve.json"
    if not path.is_file():
        raise UserError(f"no training_curve.json in {folder}; a card is written from what training measured")
    (folder / "README.md").write_text(card(json.loads(path.read_text())))


def card(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    parts = (
        _opening(settings),
        _retrieval(record["final"]["retrieval"], record["final"]["samples"], settings["stages"][-1][0]),
        _language(record["final"]["bits_per_byte"]),
        _training(record, settings),
        _curve(record["probes"]),
        _data(settings),
    )
    return "\n".join(parts)


def _opening(settings: Mapping[str, Any]) -> str:
    kind = _NAMES[settings["kind"]]
    state = f"state {settings['d_state']}"
    heads = f", heads of {settings['head_dim']}" if settings["kind"] == "mamba2" else ""
    shape = f"{settings['n_layer']} layers of width {settings['d_model']}, {state}{heads}"
    return f"""# {settings["name"]}

A small {kind} language model, trained by statespan to find needles in text of at most {settings["stages"][-1][0]:,}
tokens: a subject for methods that make it read further. It knows no facts and follows no instructions.

{shape}; byte-level BPE with single digits; tied embeddings. Matrices are stored in bfloat16, to which
training rounded them in every product; decay rates, skips and step biases in float32.
Weights: Apache-2.0, like statespan. Text: public domain (below).
"""


def _retrieval(retrieval: Mapping[str, float], samples: Mapping[str, int], trained: int) -> str:
    rows = []
    for length in sorted(map(int, samples)):
        cells = (f"{100 * retrieval[label(keys, length)]:.1f} %" for keys in _KEYS)
        mark = "" if length <= trained else " (past training)"
        rows.append((f"{length:,}{mark}", *cells, str(samples[str(length)])))
    heads = ("prompt tokens", "passkey", "1 named key", "4 named keys", "8 named keys", "samples a cell")
    return f"""## Retrieval

Share of samples answered exactly by the plain model (no method), needles at uniform depth in *Moby-Dick*, which it
has not seen. Every token of the answer must be the most likely one.

{_table(heads, rows)}
"""


def _language(bits: Mapping[str, float]) -> str:
    rows = [(name, f"{value:.3f}", f"{xz_bits_per_byte(name):.3f}") for name, value in bits.items()]
    return f"""## Language

Bits per byte on whole held-out novels, windows of 1,024 tokens of which the second half is scored.

{_table(("novel", "bits per byte", "`xz -9`"), rows)}
"""


def _training(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    rows, rate = settings["rows"], f"{settings['learning_rate']:g}"
    steps, each = record["probes"][-1]["step"], settings["tokens_per_step"]
    seconds = record["probes"][-1]["seconds"]
    facts = (
        ("command", f"`{command(settings)}`"),
        ("device", f"{record['device']}, torch {record['torch']}"),
        ("steps", f"{steps:,} of {each:,} tokens ({steps * each / 1e6:.0f} M tokens) in {seconds:.0f} s"),
        ("row lengths", ", ".join(f"{length} to {share:.0%}" for length, share in settings["stages"]) + " of the run"),
        ("rows", f"{rows['task_share']:.0%} hold tasks; an answer token's loss weighs {rows['answer_weight']:g}"),
        ("optimiser", f"AdamW at {rate}, warm-up and cosine, weight decay {settings['weight_decay']:g}, bfloat16"),
        ("seed", str(settings["seed"])),
    )
    return f"""## Training

{_table(("what", "how"), facts)}

Where the command says `--minutes` the schedule was laid over wall time, so another machine takes other steps.
"""


def command(settings: Mapping[str, Any]) -> str:
    """The command line that asks for these settings."""
    words = [f"python -m statespan.training run {settings['name']} --ids IDS --out OUT --device cuda"]
    preset = plain(PRESETS.get(settings["name"], TrainConfig(name=settings["name"], kind=settings["kind"])))
    for key, option in (("minutes", "minutes"), ("steps", "steps"), ("seed", "seed"), ("d_model", "d-model")):
        wanted = settings[key] is not None and not (key == "steps" and settings["minutes"] is not None)
        if wanted and settings[key] != preset[key]:
            words.append(f"--{option} {settings[key]}")
    usual = dict(map(tuple, preset["rows"]["source_weights"]))
    factors = dict(map(tuple, settings["rows"]["source_weights"]))
    words += [f"--source-weight {name}={factor:g}" for name, factor in factors.items() if usual.get(name) != factor]
    return " ".join(words)


def _curve(probes: Iterable[Mapping[str, float]]) -> str:
    names = ("passkey 1024", "4 named keys 1024", "bits_per_byte persuasion")
    rows = [
        (f"{probe['step']:,}", f"{probe['seconds']:.0f}", *(f"{probe[name]:.3f}" for name in names if name in probe))
        for probe in probes
    ]
    heads = ("step", "seconds", "passkey at 1,024", "4 named keys at 1,024", "bits per byte, *Persuasion*")
    return f"""## Curve

Measured along the way on 64 samples a task; `training_curve.json` holds these and the losses, every 50 steps.

{_table(heads, rows)}
"""


def _data(settings: Mapping[str, Any]) -> str:
    rows = [(source.package, source.licence) for source in SOURCES]
    factors = {name: factor for name, factor in map(tuple, settings["rows"]["source_weights"]) if factor != 1}
    weighted = ", ".join(f"{name} × {factor:g}" for name, factor in factors.items())
    return f"""## Data

39 MB of English from these packages, cleaned by `python -m statespan.training.corpus` (docs/training.md). Held out
wholly: {", ".join(HELD_OUT)}.
How often a source was read, beside its size: {weighted or "all alike"}.

{_table(("package", "text"), rows)}
"""


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
