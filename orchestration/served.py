"""best.json: everything that serving the winner needs, exported by a sweep and read by the server.

It names the model by the digest of its weights, the method with its canonical parameters, the digests of its artifacts,
the numeric path, and held-out samples with the tokens the sweep generated for them. A server repeats those samples
before it goes live, so the file also is the proof that what is served is what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from statespan.config import Frozen
from statespan.errors import UserError

FILE = "best.json"


class ServedModel(Frozen):
    ref: str
    """A shipped name, a folder or a hub id: what `load_model` takes."""

    revision: str | None = None
    digest: str | None = None
    """sha256 of weights and config.json; None takes whatever lies there. A server refuses another digest."""

    tokenizer_digest: str | None = None
    train_length: int | None = None
    """Tokens it was trained on, where the study said so; None takes what config.json says."""


class ServedMethod(Frozen):
    name: str
    params: dict[str, Any] = Field(default_factory=dict)
    """Canonical, with the path of an artifact that does not lie beside the checkpoint."""

    artifacts: dict[str, str] = Field(default_factory=dict)
    """Artifact (calibration table, adapter) -> sha256. A server refuses another digest."""


class ServedNumerics(Frozen):
    dtype: str | None = None
    """None: float32 on a CPU, bfloat16 on a GPU."""

    device: Literal["cpu", "cuda"] | None = None
    """None: a GPU where the cluster has one."""

    deterministic: bool = True
    """Each row is decoded alone, so that its tokens do not depend on its neighbours. False decodes all rows in one
    batch: faster, equal to rounding."""

    threads: Annotated[int, Field(ge=1)] = 1


class ServedSample(Frozen):
    """A held-out prompt and what the sweep generated for it, greedily."""

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: Annotated[int, Field(ge=1)]
    stop: tuple[str, ...] = ()
    ids: tuple[int, ...]
    """All tokens chosen, end-of-text left out; those of a stop string are among them."""

    text: str


class ServedConfig(Frozen):
    format: Literal[1] = 1
    study: str | None = None
    """The study it won; None for a configuration given by hand."""

    model: ServedModel
    method: ServedMethod
    numerics: ServedNumerics = ServedNumerics()
    samples: tuple[ServedSample, ...] = ()

    @property
    def served_name(self) -> str:
        """What clients ask for as `model`."""
        name = Path(self.model.ref).name
        return name if self.method.name == "vanilla" else f"{name}+{self.method.name}"

    def save(self, path: Path) -> None:
        """Written beside its final name and renamed, so that no reader sees half of it."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")
        part.replace(path)


def find_config(target: str, output: Path = Path("runs")) -> Path:
    """`best.json` from a path to it, a study's folder, or a study's name below `output`."""
    path = Path(target)
    for candidate in (path, path / FILE, output / target / FILE):
        if candidate.is_file() and candidate.suffix == ".json":
            return candidate
    if path.is_dir() or (output / target).is_dir():
        raise UserError(f"study {target!r} has no {FILE} yet; let `statespan sweep` finish first")
    known = sorted(found.parent.name for found in output.glob(f"*/{FILE}")) if output.is_dir() else []
    raise UserError(f"no study or {FILE} at {target!r}; finished studies in {output}: {', '.join(known) or 'none'}")


def load_config(path: Path) -> ServedConfig:
    """Raises UserError naming the first thing that is wrong."""
    try:
        return ServedConfig.model_validate_json(path.read_bytes())
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        place = ".".join(str(part) for part in error["loc"])
        reason = f"{place}: {error['msg']}" if place else error["msg"]
        raise UserError(f"{path} is no {FILE} of this version ({reason}); run the sweep again to export it") from None


def by_hand(model: str, method: str, params: Sequence[str], revision: str | None = None) -> ServedConfig:
    """A configuration from `--model M --method X --set k=v`; values are YAML."""
    from statespan.study_file import parse_override

    chosen: dict[str, Any] = {}
    for param in params:
        chosen |= parse_override(param)
    return ServedConfig(
        model=ServedModel(ref=model, revision=revision), method=ServedMethod(name=method, params=chosen)
    )
