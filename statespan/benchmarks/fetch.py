"""Bring a data set to its place below data_root, for those who have a network: pinned, checked, and never by halves.

Everything lands in a folder of its own first, is read there as its benchmark would read it, and is moved into place
only then. SOURCE.json beside it says where it came from, with every file's sha256 and row count. Benchmarks themselves
never touch a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from statespan.benchmarks.catalog import DATA_SETS, ENVIRONMENT, FIXTURES, data_folder
from statespan.benchmarks.data_check import SOURCE, Checked, check
from statespan.benchmarks.offline import HUB_SWITCHES
from statespan.benchmarks.records import provenance
from statespan.errors import UserError, unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSplit:
    """One split of a data set on the hub, kept as parquet (HotpotQA: as its official JSON)."""

    repo: str
    revision: str
    split: str
    target: str
    config: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubZip:
    """An archive on the hub; members that end in .jsonl are unpacked into the folder `target`."""

    repo: str
    revision: str
    file: str
    target: str
    sha256: str
    """Empty: not checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GitFiles:
    """Files of a folder in a GitHub repository at a commit."""

    repo: str
    revision: str
    folder: str
    files: tuple[str, ...]
    target: str


Source = HubSplit | HubZip | GitFiles

_ARC = {"repo": "allenai/ai2_arc", "revision": "210d026faf9955653af8916fad021475a3f00453", "split": "test"}
_LEVAL = ("coursera", "quality", "tpo", "gsm100", "codeU", "sci_fi", "topic_retrieval_longchat")

SOURCES: dict[str, tuple[Source, ...]] = {
    "pg19": (
        HubSplit(
            repo="emozilla/pg19-test",
            revision="c5e39bf32e33f9111323aa68d7d9000d22722035",
            split="test",
            target="pg19/test.parquet",
        ),
    ),
    "wikitext": (
        HubSplit(
            repo="Salesforce/wikitext",
            revision="b08601e04326c79dfdd32d625aee71d232d685c3",
            config="wikitext-2-raw-v1",
            split="test",
            target="wikitext/wikitext-2-raw-v1/test.parquet",
        ),
    ),
    "hellaswag": (
        HubSplit(
            repo="Rowan/hellaswag",
            revision="218ec52e09a7e7462a5400043bb9a69a41d06b76",
            split="validation",
            target="hellaswag/validation.parquet",
        ),
    ),
    "piqa": (
        HubSplit(
            repo="baber/piqa",
            revision="142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
            split="validation",
            target="piqa/validation.parquet",
        ),
    ),
    "arc_easy": (HubSplit(**_ARC, config="ARC-Easy", target="arc_easy/test.parquet"),),
    "arc_challenge": (HubSplit(**_ARC, config="ARC-Challenge", target="arc_challenge/test.parquet"),),
    "winogrande": (
        HubSplit(
            repo="allenai/winogrande",
            revision="01e74176c63542e6b0bcb004dcdea22d94fb67b5",
            config="winogrande_xl",
            split="validation",
            target="winogrande/validation.parquet",
        ),
    ),
    "openbookqa": (
        HubSplit(
            repo="allenai/openbookqa",
            revision="388097ea7776314e93a529163e0fea805b8a6454",
            config="main",
            split="test",
            target="openbookqa/test.parquet",
        ),
    ),
    "longbench": (
        HubZip(
            repo="zai-org/LongBench",
            revision="5e628be450b7e67fb7ae6e201bd6d8f7056f7672",
            file="data.zip",
            sha256="cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64",
            target="longbench/data",
        ),
        GitFiles(
            repo="THUDM/LongBench",
            revision="2e00731f8d0bff23dc4325161044d0ed8af94c1e",
            folder="LongBench/config",
            files=("dataset2prompt.json", "dataset2maxlen.json"),
            target="longbench/config",
        ),
    ),
    "leval": (
        GitFiles(
            repo="OpenLMLab/LEval",
            revision="cd34b050269148aed75acbbe4a599873ad0f37e9",
            folder="LEval-data/Closed-ended-tasks",
            files=tuple(f"{task}.jsonl" for task in _LEVAL),
            target="leval",
        ),
    ),
    "squad": (
        HubSplit(
            repo="rajpurkar/squad_v2",
            revision="3ffb306f725f7d2ce8394bc1873b24868140c412",
            split="validation",
            target="squad/validation.parquet",
        ),
    ),
    "hotpotqa": (
        HubSplit(
            repo="hotpotqa/hotpot_qa",
            revision="1908d6afbbead072334abe2965f91bd2709910ab",
            config="distractor",
            split="validation",
            target="hotpotqa/hotpot_dev_distractor_v1.json",
        ),
    ),
}


class Network(Protocol):
    """What fetching needs of the outside; tests bring their own."""

    def split(self, source: HubSplit) -> Any:
        """A `datasets.Dataset`: iterable, with `to_parquet`."""

    def hub_file(self, repo: str, revision: str, file: str) -> Path: ...

    def git_file(self, repo: str, revision: str, path: str) -> bytes: ...


class Online:
    """The hub through `datasets` and `huggingface_hub`, GitHub's raw files through the standard library."""

    def split(self, source: HubSplit) -> Any:
        from datasets import load_dataset

        return load_dataset(source.repo, source.config, split=source.split, revision=source.revision)

    def hub_file(self, repo: str, revision: str, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))

    def git_file(self, repo: str, revision: str, path: str) -> bytes:
        from urllib.request import urlopen

        with urlopen(f"https://raw.githubusercontent.com/{repo}/{revision}/{path}", timeout=60) as answer:
            content: bytes = answer.read()
            return content


def fetch(
    name: str,
    data_root: str | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    network: Network | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Checked:
    """Bring one data set to its place. `revision` overrides the first source's pinned one; `say` hears each step."""
    if name not in SOURCES:
        raise unknown("data set", name, SOURCES)
    folder = data_folder(data_root)
    if folder is None:
        raise UserError(f"{name} needs a folder to go to: give --data-root or set {ENVIRONMENT} (docs/data.md)")
    if folder == FIXTURES:
        raise UserError("data_root 'fixtures' is the folder of sample rows that ships; give one of your own")
    if offline or any(os.environ.get(switch, "") not in ("", "0") for switch in HUB_SWITCHES):
        raise UserError(f"offline: {name} is not fetched; copy {DATA_SETS[name].files[0]} to {folder} (docs/data.md)")
    staging = _staging(folder)
    try:
        sources = _pinned(SOURCES[name], revision)
        for source in sources:
            say(f"{name}: fetching {source.repo} at {source.revision[:12]}")
            _bring(source, staging, network or Online())
        say(f"{name}: checking every row")
        found = _refuse_unreadable(name, staging)
        files = _move(name, staging, folder, sources, found)
        return replace(found, files=files)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder))
    except OSError as error:
        raise UserError(f"data_root {str(folder)!r} cannot be written: {error.strerror}") from None


def _pinned(sources: Sequence[Source], revision: str | None) -> list[Source]:
    if revision is None:
        return list(sources)
    first = sources[0]
    if isinstance(first, HubZip):
        return [replace(first, revision=revision, sha256=""), *sources[1:]]
    return [replace(first, revision=revision), *sources[1:]]


def _bring(source: Source, staging: Path, network: Network) -> None:
    target = staging / source.target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if isinstance(source, HubSplit):
            rows = network.split(source)
            if target.suffix == ".json":
                target.write_text(json.dumps([_official_hotpot(row) for row in rows], ensure_ascii=False))
            else:
                rows.to_parquet(str(target))
        elif isinstance(source, HubZip):
            _unpack(source, network.hub_file(source.repo, source.revision, source.file), target)
        else:
            target.mkdir(exist_ok=True)
            for file in source.files:
                content = network.git_file(source.repo, source.revision, f"{source.folder}/{file}")
                (target / file).write_bytes(content)
    except UserError:
        raise
    except Exception as error:  # the hub's clients raise dozens of kinds; each means: not fetched
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source.repo} at {source.revision[:12]} could not be fetched: {reason}") from error


def _unpack(source: HubZip, archive: Path, target: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if source.sha256 and found != source.sha256:
        raise UserError(f"{source.repo}/{source.file} has sha256 {found[:12]}...; {source.sha256[:12]}... is expected")
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as members:
        for member in members.namelist():
            if member.endswith(".jsonl"):
                (target / Path(member).name).write_bytes(members.read(member))


def _official_hotpot(row: Mapping[str, Any]) -> dict[str, Any]:
    """The hub's columns as the official file has them."""
    context = row["context"]
    pairs = [[title, list(sentences)] for title, sentences in zip(context["title"], context["sentences"], strict=True)]
    return {"_id": row["id"], "question": row["question"], "answer": row["answer"], "context": pairs}


def _refuse_unreadable(name: str, staging: Path) -> Checked:
    (found,) = check([name], str(staging))
    if found.status != "ok":
        raise UserError(f"{name} was fetched and cannot be used, nothing is kept: {found.problem}")
    return found


def _move(
    name: str, staging: Path, folder: Path, sources: Iterable[Source], found: Checked
) -> tuple[dict[str, Any], ...]:
    """Each file appears whole or not at all. SOURCE.json, which says what all of them are, comes last."""
    rows = {file["sha256"]: {"rows": file["rows"]} for file in found.files if "rows" in file}
    moved = []
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        place = folder / path.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
        known = provenance(place) | {"file": place.relative_to(folder).as_posix()}
        moved.append(known | rows.get(known["sha256"], {}))
    note = staging / SOURCE
    told = {"name": name, "sources": [asdict(source) for source in sources], "files": moved}
    note.write_text(json.dumps(told, indent=1) + "\n")
    note.replace(folder / name / SOURCE)
    return tuple(moved)
