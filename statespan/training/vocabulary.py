"""The shipped tokenizer, and the corpus as token ids.

    python -m statespan.training.vocabulary CORPUS OUTDIR [--vocab-size 4096]

trains a byte-level BPE on the corpus and on the words of the retrieval tasks, and writes OUTDIR/tokenizer.json,
OUTDIR/SOURCE.npy (uint16 ids, documents ended by <|endoftext|>) and the held-out texts in the same form.

Text is first split as GPT-4's pattern does it (cl100k_base of tiktoken 0.9), with two changes: each digit stands alone,
so that a number is a sequence of ten known tokens, and punctuation never joins a newline, so that tasks can be put
together from pieces. `Encoder` is that split for ASCII in the standard library with a cache, which makes building
training rows some twenty times faster than the tokenizer itself; a test holds the two to the same ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np

from statespan.benchmarks import needles
from statespan.errors import UserError
from statespan.training.corpus import HELD_OUT, read_documents

END_OF_TEXT = "<|endoftext|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_ASCII_SPLIT = re.compile(
    r"'(?:[sdmt]|ll|ve|re)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]| ?[^\sa-zA-Z0-9]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES_PER_SOURCE = 4_000_000  # of each source the vocabulary is fitted to, so that no single one shapes it
_TASK_LINES = 60_000
_CACHED_PIECES = 50_000


class Encoder:
    """Token ids of ASCII text, from a cache of its pieces."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._pieces: dict[str, list[int]] = {}
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        end = self._tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise UserError(f"{path} has no {END_OF_TEXT} token; fit one with python -m statespan.training.vocabulary")
        self.end: int = end
        self.spellings = [
            self._tokenizer.decode([token], skip_special_tokens=False) for token in range(self.vocab_size)
        ]

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _ASCII_SPLIT.findall(text):
            ids += self._pieces.get(piece) or self._encode(piece)
        return ids

    def _encode(self, piece: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(piece, add_special_tokens=False).ids
        if len(self._pieces) < _CACHED_PIECES:
            self._pieces[piece] = ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text


def fit(corpus: Path, path: Path, vocab_size: int, task_lines: int = _TASK_LINES) -> None:
    """Train the tokenizer on a corpus folder and so many lines of task wording, and save it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_fitting_text(corpus, task_lines), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def _fitting_text(corpus: Path, task_lines: int) -> Iterator[str]:
    for path in sorted((corpus / "train").glob("*.txt")):
        taken = 0
        for document in read_documents(path):
            yield document[: max(_BYTES_PER_SOURCE - taken, 0)]
            taken += len(document)
    rng = Random(0)
    templates = [text for name, text in vars(needles).items() if name.isupper() and isinstance(text, str)]
    for _ in range(task_lines):
        keys = " ".join(needles.draw_keys(rng, 4))
        line = rng.choice(templates).replace("{kind}", rng.choice(("number", "word", "code")))
        yield f"{keys}\n\nQuestion: {line}\nAnswer: {line}\n{line}"


def encode_documents(path: Path, encoder: Path) -> np.ndarray:
    """(tokens,) uint16: the documents of one file of the corpus, each ended by <|endoftext|>."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(encoder))
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    encoded = tokenizer.encode_batch(read_documents(path), add_special_tokens=False)
    return np.concatenate([np.array(document.ids + end, dtype=np.uint16) for document in encoded])


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Fit the tokenizer to a corpus and encode the corpus with it.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=4096)
    arguments = parser.parse_args()
    tokenizer = arguments.out / "tokenizer.json"
    fit(arguments.corpus, tokenizer, arguments.vocab_size)
    for path in sorted(arguments.corpus.glob("*/*.txt")):
        folder = "heldout" if path.stem in HELD_OUT else "train"
        (arguments.out / folder).mkdir(parents=True, exist_ok=True)
        ids = encode_documents(path, tokenizer)
        np.save(arguments.out / folder / f"{path.stem}.npy", ids)
        print(f"{len(ids):>10,} tokens, {path.stat().st_size / len(ids):.2f} bytes each  {folder}/{path.stem}")


if __name__ == "__main__":
    main()
