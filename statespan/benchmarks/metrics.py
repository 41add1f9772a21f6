"""The published scorers, as pure functions of text: LongBench, RULER, L-Eval.

Sources: THUDM/LongBench@2e00731 (metrics.py, eval.py), NVIDIA/RULER@c3f5e3b (scripts/eval). Ours differ in nothing
that shows in a number, and say where a published score is not what its name promises:

`rouge_l` is the PyPI package rouge 1.0.1: sentence-level union LCS over *distinct* words, F with 1e-8 added, so that
a text has 0.999999995 with itself. That package recurses once a step through the LCS table and dies past Python's
limit, which LongBench scores 0; ours is iterative, and `recursion_limit` brings the zero back.
`classification` removes from a list it is walking over, and so keeps some labels it means to drop; `clean=True`
drops all.
`code_similarity` is fuzzywuzzy's ratio, whose back end is difflib or, where the C extension is there, Levenshtein (2
to 4 points more); the published numbers come from difflib.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal

import numpy as np

from statespan.errors import UserError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CN_PUNCTUATION = str.maketrans(
    "",
    "",
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚"
    + "〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.",
)


def normalized_words(text: str) -> list[str]:
    """Lower case, no ASCII punctuation, no articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, counted with their multiplicity."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * same / (len(prediction) + len(answer)) if same else 0.0


def qa_f1(prediction: str, answer: str) -> float:
    return token_f1(normalized_words(prediction), normalized_words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    return token_f1(*(_normalized_zh(segmented_zh(text)) for text in (prediction, answer)))


def _normalized_zh(words: list[str]) -> list[str]:
    cleaned = ("".join(word.lower().translate(_CN_PUNCTUATION).split()) for word in words)
    return [word for word in cleaned if word]


def require_jieba(what: str) -> None:
    """Refuses before anything is computed what could not be scored."""
    try:
        import jieba  # noqa: F401
    except ImportError:
        raise UserError(f"{what}: Chinese answers are scored on jieba's words: pip install 'statespan[zh]'") from None


def segmented_zh(text: str) -> list[str]:
    """Chinese text in words, by jieba, as LongBench does it."""
    require_jieba("longbench")
    import jieba

    jieba.setLogLevel("WARNING")  # it announces its dictionary on stderr
    return [str(word) for word in jieba.cut(text, cut_all=False)]


def rouge_l(prediction: str, answer: str, *, recursion_limit: int | None = None) -> float:
    """ROUGE-L F of the package rouge 1.0.1; 0 where that package raises."""
    hypotheses, references = _sentences(prediction), _sentences(answer)
    if not hypotheses or not references:
        return 0.0
    words = {word: number for number, word in enumerate({w for s in (*hypotheses, *references) for w in s})}
    encoded = [np.array([words[word] for word in sentence]) for sentence in hypotheses]
    shared: set[int] = set()
    for reference in references:
        found, steps = _union_lcs(np.array([words[word] for word in reference]), encoded)
        if recursion_limit is not None and steps > recursion_limit:
            return 0.0
        shared |= found
    recall = len(shared) / len({word for sentence in references for word in sentence})
    precision = len(shared) / len({word for sentence in hypotheses for word in sentence})
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def rouge_l_zh(prediction: str, answer: str) -> float:
    return rouge_l(" ".join(segmented_zh(prediction)), " ".join(segmented_zh(answer)))


def _sentences(text: str) -> list[list[str]]:
    """Sentences end at full stops and nowhere else; an all-blank one is one empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _union_lcs(reference: np.ndarray, hypotheses: list[np.ndarray]) -> tuple[set[int], int]:
    """The words of the reference that lie on its longest common subsequence with some hypothesis sentence, and the most
    steps any walk through a table took.

    All hypotheses share one table, side by side. Each has its own high base, so that the running maximum over a row,
    which is what LCS needs within a sentence, never leaks from one sentence into the next.
    """
    joined = np.concatenate([np.concatenate([[-1], sentence]) for sentence in hypotheses])  # -1: column 0 of each
    starts = np.cumsum([0] + [len(sentence) + 1 for sentence in hypotheses])
    base = np.repeat(np.arange(len(hypotheses)), np.diff(starts)) * (len(reference) + 1)
    table = np.empty((len(reference) + 1, len(joined)), dtype=np.int64)
    table[0] = base
    for i, word in enumerate(reference):
        above, row = table[i], table[i + 1]
        row[0] = above[0]
        np.maximum(above[1:], np.where(joined[1:] == word, above[:-1] + 1, 0), out=row[1:])
        np.maximum.accumulate(row, out=row)
    found: set[int] = set()
    most_steps = 0
    rows, reference_words = table.tolist(), reference.tolist()
    for start, sentence in zip(starts.tolist(), hypotheses, strict=False):
        words, steps = _walk_back(rows, start, reference_words, sentence.tolist())
        found |= words
        most_steps = max(most_steps, steps)
    return found, most_steps


def _walk_back(table: list[list[int]], start: int, reference: list[int], sentence: list[int]) -> tuple[set[int], int]:
    """One longest common subsequence with the sentence whose table begins at column `start`; on a tie the package steps
    back in the hypothesis, which decides the words."""
    found: set[int] = set()
    i, j, steps = len(reference), len(sentence), 0
    nothing = table[0][start]
    while i and j:
        if table[i][start + j] == nothing:
            return found, steps + j  # nothing in common is left: ties all the way
        steps += 1
        if reference[i - 1] == sentence[j - 1]:
            found.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][start + j] > table[i][start + j - 1]:
            i -= 1
        else:
            j -= 1
    return found, steps


def classification(prediction: str, answer: str, classes: Sequence[str], *, clean: bool = False) -> float:
    """One over the number of class names found in the prediction, if the right one is among them."""
    found = [name for name in classes if name in prediction]
    if clean:
        found = [name for name in found if name == answer or name not in answer]
    else:
        for name in found:  # the published loop, which skips the label after each one it removes
            if name in answer and name != answer:
                found.remove(name)
    return 1.0 / len(found) if answer in found else 0.0


def number_share(prediction: str, answer: str) -> float:
    """Of all numbers in the prediction, the share that is the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, *, label: str = "Paragraph ") -> float:
    """`number_share` for the number in an answer such as "Paragraph 12"."""
    named = re.search(re.escape(label) + r"(\d+)", answer)
    assert named, f"not a paragraph's name: {answer!r}"
    return number_share(prediction, named.group(1))


def code_similarity(prediction: str, answer: str, *, matcher: Literal["difflib", "levenshtein"] = "difflib") -> float:
    """Similarity, in whole percent, of the first line without a backtick, # or //."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")
    if not line or not answer:
        return 0.0
    if matcher == "difflib":
        ratio = SequenceMatcher(None, line, answer).ratio()
    else:  # the C extension's ratio: edits are insertions and deletions
        ratio = 2 * _lcs_length(line, answer) / (len(line) + len(answer))
    return round(100 * ratio) / 100


def _lcs_length(first: str, second: str) -> int:
    columns = np.array([ord(char) for char in second])
    row = np.zeros(len(second) + 1, dtype=np.int64)
    for char in first:
        matched = np.where(columns == ord(char), row[:-1] + 1, 0)
        row = np.maximum.accumulate(np.maximum(row, np.concatenate([[0], matched])))
    return int(row[-1])


def ruler_cleaned(prediction: str) -> str:
    """Stripped, with control characters turned to newlines, and stripped again."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def ruler_all(prediction: str, references: Sequence[str]) -> float:
    """The share of references that occur in the prediction, in any case, even inside a longer word."""
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def ruler_part(prediction: str, references: Sequence[str]) -> float:
    """1 where any reference occurs."""
    text = prediction.lower()
    return float(any(reference.lower() in text for reference in references))
