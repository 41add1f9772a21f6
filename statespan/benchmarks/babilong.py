"""BABILong-like: facts about people, rooms and things, spread in order through a book, and a question about them.

The idea and the scoring are BABILong's (arXiv:2406.10149, booydar/babilong@7a6efee); the worlds are generated here
and the wording is ours, so neither bAbI's data nor PG-19 is needed, and scores are not comparable with published ones.

qa1: one fact decides: where is a person now? qa2: two: where is a thing now, that somebody carries? qa3: three:
where was the thing before it came to where it is now?

Scoring as published: of the answer's first sentence, in lower case, the places it names that the question does not must
be exactly the right one.

One sample of qa1, haystack cut short:
    ... Call me Ishmael. Mary went to the kitchen. Some years ago ... Mary went to the garden. ...

    Question: Where is Mary?
    Answer: Mary is in the                                                                           -> garden
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from statespan.benchmarks import needles as wording
from statespan.benchmarks.base import Completion, Sample, Tokenizer
from statespan.benchmarks.books import read_books, read_haystack
from statespan.benchmarks.haystack import Haystack
from statespan.benchmarks.hiding import Needle, context
from statespan.benchmarks.puzzle import Puzzle, size_to_fit
from statespan.benchmarks.settings import Lengths, Settings

PEOPLE = ("Mary", "John", "Emily", "Peter", "Sarah", "Henry")
PLACES = ("kitchen", "garden", "office", "bedroom", "hallway", "bathroom")
THINGS = ("apple", "football", "lamp", "book")
MOVES = ("{who} went to the {where}.", "{who} moved to the {where}.", "{who} walked to the {where}.")
INTRO = "Facts about people and places are hidden in the text below. Remember the latest."


@dataclass(frozen=True, slots=True)
class Story:
    facts: tuple[str, ...]
    question: str
    cue: str
    answer: str


class BabiLong(Settings):
    """Reasoning over facts scattered in a book; the score is 1 where the right place, and no other, is named."""

    name: ClassVar[str] = "babilong"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"
    group_by: ClassVar[tuple[str, ...]] = ("task", "length")

    tasks: tuple[Literal["qa1", "qa2", "qa3"], ...] = ("qa1", "qa2", "qa3")
    """How many facts decide: one, two or three."""

    lengths: Lengths = (1_024, 2_048, 4_096)
    """Prompt lengths in tokens."""

    trials: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Samples for each task and length."""

    facts: Annotated[int, Field(ge=4, le=200)] = 8
    """Facts in a story; qa2 and qa3 may need a few more to have a question."""

    haystack: str = "moby_dick"
    """The book: a text as in `perplexity.books`."""

    data_root: str | None = None
    """The folder with your data sets (docs/data.md); the environment variable STATESPAN_DATA where not given."""

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        book = read_haystack(self.haystack, self.data_root)
        for task in self.tasks:
            for length in self.lengths:
                for trial in range(self.trials):
                    yield self._sample(tokenizer, book, task, length, trial)

    def _sample(self, tokenizer: Tokenizer, book: Haystack, task: str, length: int, trial: int) -> Sample:
        rng, segment = self.rng(task, length, trial), self.segment(trial, task, length)
        story = tell(task, rng, self.facts)
        depths = sorted(rng.random() for _ in story.facts)
        needles = [Needle(fact, depth) for fact, depth in zip(story.facts, depths, strict=True)]
        first = book.start_in(segment, rng)
        puzzle = Puzzle(
            render=lambda words: wording.prompt(INTRO, context(book, first, words, needles), story.question, story.cue),
            answers=(story.answer,),
        )
        prompt = size_to_fit(puzzle, tokenizer, length, f"babilong.{task} at length {length}")
        return Sample(
            id=f"babilong-{task}-s{self.seed}-{book.name}-f{self.facts}-{length}-{trial}",
            prompt_ids=prompt.ids,
            kind="generate",
            document=f"{book.name}#{segment}",
            length=length,
            targets=puzzle.answers,
            max_new_tokens=16,
            stop=("\n",),
            meta={"task": task, "question": story.question, "facts": len(story.facts)},
        )

    def score(self, completion: Completion, sample: Sample) -> float:
        said = re.split(r"[.\n]", completion.text.strip().lower())[0]
        asked = sample.meta["question"].lower()
        named = {place for place in PLACES if re.search(rf"\b{place}\b", said) and place not in asked}
        return float(named == set(sample.targets))

    def provenance(self) -> Mapping[str, Any]:
        return {"haystack": [book.provenance() for book in read_books(self.haystack, self.data_root)]}


def tell(task: str, rng: Random, facts: int) -> Story:
    """A story whose last facts leave a question that the task asks for."""
    world = _World(rng)
    while len(world.facts) < facts or not world.askable(task):
        world.happen(things=task != "qa1")
    return world.ask(task)


class _World:
    """Who is where, who carries what, and where each thing has been."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.facts: list[str] = []
        self.at: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.been: dict[str, list[str]] = {}

    def happen(self, *, things: bool) -> None:
        free = [thing for thing in THINGS if thing not in self.holder]
        if things and self.at and free and self.rng.random() < 0.35:
            self._take(self.rng.choice(free))
        else:
            self._move(self.rng.choice(PEOPLE))

    def _move(self, who: str) -> None:
        where = self.rng.choice([place for place in PLACES if place != self.at.get(who)])
        self.at[who] = where
        self.facts.append(self.rng.choice(MOVES).format(who=who, where=where))
        for thing, holder in self.holder.items():
            if holder == who:
                self.been[thing].append(where)

    def _take(self, thing: str) -> None:
        who = self.rng.choice(sorted(self.at))
        self.holder[thing] = who
        self.been[thing] = [self.at[who]]
        self.facts.append(f"{who} took the {thing} there.")

    def askable(self, task: str) -> list[str]:
        """People (qa1), carried things (qa2), things that came from somewhere to where they never were before (qa3)."""
        if task == "qa1":
            return sorted(self.at)
        if task == "qa2":
            return sorted(self.been)
        return sorted(thing for thing, been in self.been.items() if len(been) > 1 and been[-1] not in been[:-1])

    def ask(self, task: str) -> Story:
        what = self.rng.choice(self.askable(task))
        if task == "qa1":
            question, cue, answer = f"Where is {what}?", f"{what} is in the", self.at[what]
        elif task == "qa2":
            question, cue, answer = f"Where is the {what}?", f"The {what} is in the", self.been[what][-1]
        else:
            *_, before, now = self.been[what]
            question, cue = f"Where was the {what} before the {now}?", f"Before the {now} the {what} was in the"
            answer = before
        return Story(tuple(self.facts), question, cue, answer)
