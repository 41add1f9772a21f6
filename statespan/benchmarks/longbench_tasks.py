"""LongBench's 21 data sets: tokens to generate, metric, and our own wording of each prompt.

Data sets, metrics and tokens are those of THUDM/LongBench@2e00731 (config/, metrics.py). The wording is ours, and
scores with it are not comparable with published ones; the official prompts are read from longbench/config/ below
data_root (dataset2prompt.json, dataset2maxlen.json), where those files come with the benchmark's own repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from statespan.benchmarks import metrics

Metric = Literal[
    "qa_f1", "qa_f1_zh", "rouge", "rouge_zh", "classification", "count", "retrieval", "retrieval_zh", "code_similarity"
]


@dataclass(frozen=True, slots=True)
class Task:
    new_tokens: int
    metric: Metric
    prompt: str
    """With {context} and {input}."""

    extended: bool = False
    """In LongBench-E too."""

    first_line: bool = False
    """Only the first line of an answer counts."""


_PASSAGES = (
    "Use the passages to answer the question; give the answer alone.\n\nPassages:\n{context}\n\n"
    "Use the passages above to answer the question; give the answer alone.\n\nQuestion: {input}\nAnswer:"
)
_PASSAGES_ZH = (
    "请根据下面的文章回答问题,只写答案。\n\n文章:\n{context}\n\n"
    "请根据上面的文章回答问题,只写答案。\n问题:{input}\n答案:"
)
_NEXT_LINE = "Continue this program by one line.\n{context}{input}The next line:\n"

TASKS: dict[str, Task] = {
    "narrativeqa": Task(
        128,
        "qa_f1",
        "Read the story and answer the question about it in a short phrase, without explaining.\n\nStory: {context}\n\n"
        "Answer the question about the story above in a short phrase.\n\nQuestion: {input}\n\nAnswer:",
    ),
    "qasper": Task(
        128,
        "qa_f1",
        'Read the article and answer the question in a short phrase. Write "unanswerable" where the article does not '
        'say it, and "yes" or "no" where that answers the question.\n\nArticle: {context}\n\n'
        'Answer in a short phrase, with "yes" or "no", or with "unanswerable".\n\nQuestion: {input}\n\nAnswer:',
        extended=True,
    ),
    "multifieldqa_en": Task(
        64,
        "qa_f1",
        "Read the text and answer briefly.\n\n{context}\n\nAnswer the question about the text above, in few words.\n\n"
        "Question: {input}\nAnswer:",
        extended=True,
    ),
    "multifieldqa_zh": Task(
        64,
        "qa_f1_zh",
        "阅读下面的文字,简短地回答问题。\n\n{context}\n\n请根据上面的文字简短地回答。\n\n问题:{input}\n回答:",
    ),
    "hotpotqa": Task(32, "qa_f1", _PASSAGES, extended=True),
    "2wikimqa": Task(32, "qa_f1", _PASSAGES, extended=True),
    "musique": Task(32, "qa_f1", _PASSAGES),
    "dureader": Task(128, "rouge_zh", _PASSAGES_ZH),
    "gov_report": Task(
        512,
        "rouge",
        "Here is a government report. Summarize it on one page.\n\nReport:\n{context}\n\n"
        "Summarize the report on one page.\n\nSummary:",
        extended=True,
    ),
    "qmsum": Task(
        512,
        "rouge",
        "Here is the transcript of a meeting and a request about it. Answer in a few sentences.\n\n"
        "Transcript:\n{context}\n\nAnswer the request in a few sentences.\n\nRequest: {input}\nAnswer:",
    ),
    "multi_news": Task(
        512,
        "rouge",
        "Here are several news articles. Summarize them on one page.\n\nNews:\n{context}\n\n"
        "Summarize all the news on one page.\n\nSummary:",
        extended=True,
    ),
    "vcsum": Task(512, "rouge_zh", "下面是一份会议记录,请为它写一段总结。\n\n会议记录:\n{context}\n\n会议总结:"),
    "trec": Task(
        64,
        "classification",
        "Say of which type the last question is. Here are examples.\n\n{context}\n{input}",
        extended=True,
        first_line=True,
    ),
    "triviaqa": Task(
        32,
        "qa_f1",
        "Answer the last question from its passage; give the answer alone. Here are examples.\n\n{context}\n\n{input}",
        extended=True,
        first_line=True,
    ),
    "samsum": Task(
        128,
        "rouge",
        "Summarize the last dialogue in a few short sentences. Here are examples.\n\n{context}\n\n{input}",
        extended=True,
        first_line=True,
    ),
    "lsht": Task(
        64, "classification", "判断最后一条新闻属于哪个类别。下面是一些例子。\n\n{context}\n{input}", first_line=True
    ),
    "passage_count": Task(
        32,
        "count",
        "Some of the paragraphs below are repeated. Count how many different ones there are.\n\n{context}\n\n"
        "Write only the number of different paragraphs.\n\nThe number of different paragraphs is: ",
        extended=True,
    ),
    "passage_retrieval_en": Task(
        32,
        "retrieval",
        "Below are 30 numbered paragraphs and a summary of one of them. Which one is it?\n\n{context}\n\n"
        'Summary: {input}\n\nAnswer with its name, such as "Paragraph 1".\n\nThe answer is: ',
        extended=True,
    ),
    "passage_retrieval_zh": Task(
        32,
        "retrieval_zh",
        "下面是若干编号的段落,以及其中一段的摘要。请找出摘要属于哪一段。\n\n{context}\n\n摘要:{input}\n\n"
        '请写出段落的编号,例如"段落1"。\n\n答案是:',
    ),
    "lcc": Task(64, "code_similarity", _NEXT_LINE.replace("{input}", ""), extended=True),
    "repobench-p": Task(64, "code_similarity", _NEXT_LINE, extended=True),
}


def score(task: Task, prediction: str, answers: Sequence[str], classes: Sequence[str], options: ScoreOptions) -> float:
    """The best score over the answers."""
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max(_score_one(task.metric, prediction, answer, classes, options) for answer in answers)


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    clean_classes: bool = False
    matcher: Literal["difflib", "levenshtein"] = "difflib"
    recursion_limit: int | None = None


def _score_one(metric: Metric, prediction: str, answer: str, classes: Sequence[str], options: ScoreOptions) -> float:
    match metric:
        case "qa_f1":
            return metrics.qa_f1(prediction, answer)
        case "qa_f1_zh":
            return metrics.qa_f1_zh(prediction, answer)
        case "rouge":
            return metrics.rouge_l(prediction, answer, recursion_limit=options.recursion_limit)
        case "rouge_zh":
            return metrics.rouge_l_zh(prediction, answer)
        case "classification":
            return metrics.classification(prediction, answer, classes, clean=options.clean_classes)
        case "count":
            return metrics.number_share(prediction, answer)
        case "retrieval":
            return metrics.retrieval(prediction, answer)
        case "retrieval_zh":
            return metrics.retrieval(prediction, answer, label="段落")
        case "code_similarity":
            return metrics.code_similarity(prediction, answer, matcher=options.matcher)
