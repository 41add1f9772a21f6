"""Passkey retrieval: keys hidden in running text, one of them asked for at the end.

After arXiv:2305.16300; the published variant is DeciMamba's (assafbk/DeciMamba@6290e95, finetune_ssm.py). Ours
differs: several trials a cell, so that a cell is more than a coin flip; every sample fitted to its own token budget,
instructions included; a natural cue; keys of 5 digits always; and `keys` > 1 hides that many *named* keys of which
one is asked for.

One sample, filler cut short:

    A pass key is hidden in the text below. Find it and remember it.

    Call me Ishmael. ... The pass key is 71432. Remember it: the pass key is 71432. ... upon the face of the deep.

    Question: What is the pass key?
    Answer: The pass key is                                                              -> 71432
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from statespan.benchmarks import needles as wording
from statespan.benchmarks.base import Completion, Sample, Tokenizer
from statespan.benchmarks.books import read_books, read_haystack
from statespan.benchmarks.haystack import Haystack
from statespan.benchmarks.hiding import Needle, context
from statespan.benchmarks.passkey_published import Cell, published_prompts
from statespan.benchmarks.puzzle import Puzzle, Sized, size_to_fit
from statespan.benchmarks.settings import Lengths, Settings, Share


class Passkey(Settings):
    """A length by depth grid of hidden keys; the score is 1 where the model names the right one."""

    name: ClassVar[str] = "passkey"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"
    group_by: ClassVar[tuple[str, ...]] = ("length", "depth")

    variant: Literal["clean", "as_published"] = "clean"
    """`as_published` has DeciMamba's flaws; see docs/benchmarks.md for their names."""

    lengths: Lengths = (1_024, 2_048, 4_096, 8_192)
    """Prompt lengths in tokens. `clean`: of the whole prompt; `as_published`: of the context alone."""

    depths: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the asked key lies: 0 at the context's start, 1 at its end."""

    trials: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Samples a cell. 10 give about +-0.3 at 95 %, 50 give +-0.14."""

    keys: Annotated[int, Field(ge=1, le=256)] = 1
    """1: one pass key without a name. More: so many named keys, the asked one at its depth, the others anywhere."""

    kind: wording.Kind = "number"
    """What a named key stands for; with one key it is always a 5-digit number."""

    haystack: str = "moby_dick"
    """`noise`: one line repeated; otherwise a text as in `perplexity.books` (`wikitext` is the published one)."""

    data_root: str | None = None
    """The folder with your data sets (docs/data.md); the environment variable STATESPAN_DATA where not given."""

    strip_cue: bool = False
    """`as_published` ends in "Answer: "; base models without fine-tuning need that space dropped to answer at all."""

    @model_validator(mode="after")
    def _published_knows_one_key(self) -> Passkey:
        if self.variant == "as_published" and self.keys != 1:
            raise ValueError("keys must be 1 where variant is as_published")
        return self

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        hay = self._haystack()
        if self.variant == "as_published":
            yield from self._published(hay, tokenizer)
            return
        for length in self.lengths:
            for depth in self.depths:
                for trial in range(self.trials):
                    yield self._sample(hay, tokenizer, length, depth, trial)

    def _haystack(self) -> Haystack:
        if self.haystack == "noise":
            return Haystack("noise", "\n".join([wording.NOISE] * 100))
        return read_haystack(self.haystack, self.data_root)

    def _sample(self, hay: Haystack, tokenizer: Tokenizer, length: int, depth: float, trial: int) -> Sample:
        segment = self.segment(trial, length, depth)
        first = hay.start_in(segment, self.rng("start", length, depth, trial))
        puzzle = self._puzzle(hay, first, depth, self.rng("keys", length, depth, trial))
        prompt = size_to_fit(puzzle, tokenizer, length, f"passkey with {self.keys} keys")
        # a short haystack is the same for every sample: each is its own cluster
        document = f"{hay.name}#{segment}" if len(hay) > 10_000 else f"{hay.name}-{length}-{depth}-{trial}"
        return self._made(prompt, Cell(length, depth, trial), document, puzzle.answers[0])

    def _made(self, prompt: Sized, cell: Cell, document: str, answer: str) -> Sample:
        hay, seed, keys, kind = Path(self.haystack).stem, self.seed, self.keys, self.kind
        published = self.variant == "as_published"
        return Sample(
            id=f"passkey-{self.variant}-{hay}-s{seed}-{keys}{kind}-{cell.length}-{cell.depth}-{cell.trial}",
            prompt_ids=prompt.ids,
            kind="generate",
            document=document,
            length=cell.length,
            targets=(answer,),
            max_new_tokens=10 if published else 64 if kind == "code" else 16,
            stop=() if published else ("\n",),
            depth=cell.depth,
            meta={"keys": keys, "needle_tokens": [list(span) for span in prompt.hidden]},
        )

    def _puzzle(self, hay: Haystack, first: int, depth: float, rng: Random) -> Puzzle:
        """The asked key is the first needle."""
        if self.keys == 1:
            intro, question, cue = wording.PASSKEY_INTRO, wording.PASSKEY_QUESTION, wording.PASSKEY_CUE
            answer = wording.draw_passkey(rng)
            needles = [Needle(wording.PASSKEY_NEEDLE.format(value=answer), depth)]
        else:
            intro = wording.NAMED_INTRO.format(kind=self.kind)
            names = wording.draw_keys(rng, self.keys)
            question, cue = wording.named_question(self.kind, names[:1], 1)
            values = [wording.draw_value(rng, self.kind) for _ in names]
            answer, depths = values[0], [depth, *(rng.random() for _ in names[1:])]
            texts = [
                wording.NAMED_NEEDLE.format(kind=self.kind, key=k, value=v) for k, v in zip(names, values, strict=True)
            ]
            needles = [Needle(text, place) for text, place in zip(texts, depths, strict=True)]
        return Puzzle(
            render=lambda words: wording.prompt(intro, context(hay, first, words, needles), question, cue),
            answers=(answer,),
            hidden=tuple(needle.text for needle in needles),
        )

    def _published(self, hay: Haystack, tokenizer: Tokenizer) -> Iterator[Sample]:
        cells = [
            Cell(length, depth, trial)
            for trial in range(self.trials)
            for length in self.lengths
            for depth in self.depths
        ]
        rngs = [self.rng("published", *cell) for cell in cells]
        for cell, made in zip(cells, published_prompts(tokenizer, hay, cells, rngs, self.strip_cue), strict=True):
            yield self._made(made.prompt, cell, made.document, made.answer)

    def score(self, completion: Completion, sample: Sample) -> float:
        answer = sample.targets[0]
        if self.variant == "as_published":
            return float(answer in completion.text.split(" "))
        if answer.isdigit():
            first = re.search(r"\d+", completion.text)
            return float(first is not None and first.group() == answer)
        words = completion.text.split()
        return float(bool(words) and words[0].rstrip(".,") == answer)

    def provenance(self) -> Mapping[str, Any]:
        if self.haystack == "noise":
            return {}
        return {"haystack": [book.provenance() for book in read_books(self.haystack, self.data_root)]}
