"""L-Eval's closed-ended tasks: many questions on one long document, each with one right answer (arXiv:2307.11088).

Rows come from leval/ below data_root. Answers are read and matched as published (leval_metrics.py); the wording around
document and question is ours. Two protocols:

`official` (OpenLMLab/LEval@cd34b05): a document longer than max_length tokens loses words at its end (code: at its
beginning), 250 more at each try; 512 new tokens; seven tasks.
`remamba` (lblankl/ReMamba@cb127bc): the task's instruction stands before and after the document, the whole prompt
loses its middle beyond 5,500 tokens, 500 new tokens; six tasks, topic_retrieval_longchat left out.

Both ask sci_fi's questions twice, with the document and, about the real world, without it. These are two samples
here, so that the mean over samples is the published mean of the two accuracies. Its flaw as published,
`blank_quarter`, is off unless asked for (leval_metrics.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from statespan.benchmarks import leval_metrics as rules
from statespan.benchmarks.base import Completion, Sample, Tokenizer
from statespan.benchmarks.catalog import locate
from statespan.benchmarks.records import Row, provenance, read_rows
from statespan.benchmarks.settings import Length, Settings
from statespan.benchmarks.truncate import truncated_at_one_end, truncated_in_the_middle

Task = Literal["coursera", "quality", "tpo", "gsm100", "codeU", "sci_fi", "topic_retrieval_longchat"]
SIX: tuple[Task, ...] = ("coursera", "quality", "tpo", "gsm100", "codeU", "sci_fi")

IN_THE_DOCUMENT = "based on the world described in the document."
"""How sci_fi's questions end; asked without the document they end in IN_THE_WORLD."""
IN_THE_WORLD = "based on what is known about the real world."

_LETTER = "Answer the question about the document with the letter of the one right option, such as A."
INSTRUCTIONS: dict[Task, str] = {
    "coursera": "Answer the question about the document with the letters of all right options, such as A or BD.",
    "quality": _LETTER,
    "tpo": _LETTER,
    "gsm100": 'Solve the last problem as the ones before it are solved, and end with "The answer is" and the number.',
    "codeU": "Read the program and say what the last call puts out.",
    "sci_fi": 'Say whether the statement is "True" or "False" in the story, whatever holds in the real world.',
    "topic_retrieval_longchat": "Each topic of this conversation is announced. Name the topic asked for.",
}


class LEvalRow(Row):
    input: Annotated[str, Field(min_length=1)]
    instructions: Annotated[list[str], Field(min_length=1)]
    outputs: Annotated[list[Annotated[str, Field(pattern=r"\S")]], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_output_a_question(self) -> LEvalRow:
        if len(self.instructions) != len(self.outputs):
            raise ValueError(f"has {len(self.instructions)} instructions and {len(self.outputs)} outputs")
        return self


Judgement = Annotated[str, Field(pattern=r"(?i)^\s*(true|false).*\[fact:.*(true|false)")]
"""True [fact: False]"""


class SciFiRow(LEvalRow):
    outputs: Annotated[list[Judgement], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Question:
    document: int
    number: int
    text: str
    gold: str


class LEval(Settings):
    """L-Eval's closed tasks from your copy of the data; the score is exact match, 0.25 for part of a choice."""

    name: ClassVar[str] = "leval"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "exact match"
    group_by: ClassVar[tuple[str, ...]] = ("task",)

    tasks: tuple[Task, ...] = SIX
    """Which tasks; the published ReMamba figures are the mean of these six."""

    protocol: Literal["official", "remamba"] = "official"
    """Truncation, new tokens and where the instruction stands: see the head of leval.py."""

    max_length: Length | None = None
    """Tokens of the document (`official`, 3,488 where not given) or of the whole prompt (`remamba`, 5,500)."""

    documents: Annotated[int, Field(ge=1)] | None = None
    """The first so many documents of each task; all of them where not given."""

    blank_quarter: bool = False
    """Give an empty answer a quarter of every choice question, as ReMamba's copy of the scorer does."""

    data_root: str | None = None
    """The folder with your data sets (docs/data.md); the environment variable STATESPAN_DATA where not given."""

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        for task in self.tasks:
            for number, row in enumerate(self._rows(task)[: self.documents]):
                document = self._document(task, row.input, tokenizer)
                for asked, (text, gold) in enumerate(zip(row.instructions, row.outputs, strict=True)):
                    yield from self._asked(task, document, Question(number, asked, text, gold), tokenizer)

    def _rows(self, task: Task) -> Sequence[LEvalRow]:
        (path,) = locate("leval", self.data_root, part=task)
        return read_rows(path, SciFiRow if task == "sci_fi" else LEvalRow)

    def _document(self, task: Task, text: str, tokenizer: Tokenizer) -> str:
        if self.protocol == "remamba":
            return text
        return truncated_at_one_end(text, self.max_length or 3_488, tokenizer, keep_end=task == "codeU")

    def _asked(self, task: Task, document: str, question: Question, tokenizer: Tokenizer) -> Iterator[Sample]:
        if task != "sci_fi":
            yield self._sample(task, question, question.gold, self._prompt(task, document, question.text), tokenizer)
            return
        in_document, in_world = rules.gold_judgements(question.gold)
        yield self._sample(task, question, in_document, self._prompt(task, document, question.text), tokenizer)
        text = question.text.replace(IN_THE_DOCUMENT, IN_THE_WORLD) + "\nAnswer:"
        yield self._sample(task, question, in_world, text, tokenizer, part="fact")

    def _prompt(self, task: Task, document: str, question: str) -> str:
        instruction = INSTRUCTIONS[task]
        again = f"\n{instruction}" if self.protocol == "remamba" else ""
        return f"{instruction}\n\n{document}\n{again}\nQuestion: {question}\nAnswer:"

    def _sample(
        self, task: Task, question: Question, gold: str, prompt: str, tokenizer: Tokenizer, part: str = "document"
    ) -> Sample:
        limit = (self.max_length or 5_500) if self.protocol == "remamba" else None
        ids = truncated_in_the_middle(prompt, limit, tokenizer)
        return Sample(
            id=f"leval-{self.protocol}-{self.max_length}-{task}-{question.document}-{question.number}-{part}",
            prompt_ids=tuple(ids),
            kind="generate",
            document=f"{task}-{question.document}",
            length=1 << (len(ids) - 1).bit_length(),
            targets=(gold,),
            max_new_tokens=500 if self.protocol == "remamba" else 512,
            meta={"task": task, "part": part},
        )

    def score(self, completion: Completion, sample: Sample) -> float:
        answer, gold = completion.text, sample.targets[0]
        match sample.meta["task"]:
            case "coursera" | "quality" | "tpo" as task:
                several = task == "coursera"
                got = rules.chosen(answer, several=several, blank_quarter=self.blank_quarter)
                return rules.exact_match(got, rules.right_letters(gold))
            case "gsm100":
                return rules.exact_match(rules.number(answer), rules.number(gold))
            case "codeU":
                return rules.exact_match(rules.stated_output(answer, gold), rules.program_output(gold))
            case "sci_fi":
                return rules.exact_match(rules.judgement(answer), gold)
        return rules.exact_match(answer, gold)

    def summary(self, samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
        """Percent a task, and their unweighted mean."""
        by_task: dict[str, list[float]] = {}
        for sample, score in zip(samples, scores, strict=True):
            by_task.setdefault(sample.meta["task"], []).append(score)
        figures = {task: 100 * self.aggregate(found) for task, found in by_task.items()}
        return figures | {"headline": self.aggregate(list(figures.values()))}

    def provenance(self) -> Mapping[str, Any]:
        out: dict[str, Any] = {"prompts": "own"}
        for task in self.tasks:
            (path,) = locate("leval", self.data_root, part=task)
            rows = self._rows(task)
            out[task] = provenance(path) | {"rows": len(rows), "questions": sum(len(row.outputs) for row in rows)}
        return out
