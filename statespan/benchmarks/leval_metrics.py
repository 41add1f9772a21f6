"""L-Eval's rules for closed questions: what of an answer counts, and when it is right.

After OpenLMLab/LEval@cd34b05, Evaluation/auto_eval.py and em.py. Odd but kept: a letter anywhere counts, so "Because"
chooses B; a choice that cannot be read is A; a right but incomplete set of letters is worth a quarter; of a number
everything after the point is dropped, and a sign or a currency too. `blank_quarter` brings back a bug of ReMamba's
copy: an empty answer, a subset of any set, is worth a quarter of every choice question.
"""

from __future__ import annotations

import re
import string

LETTERS = "ABCD"
UNREADABLE = "<error>"
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FILLERS = ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed")


def chosen(answer: str, *, several: bool, blank_quarter: bool = False) -> str:
    """The letters an answer chooses; `several` where a question may have more than one right option (coursera)."""
    if not answer.strip() and not (blank_quarter and not answer):
        return "None"
    if answer in LETTERS:
        return answer
    if not several and (letter := re.search(f"[{LETTERS}]", answer)):
        return letter.group()
    leading = re.match(f"[{LETTERS}]*", answer)
    assert leading is not None
    found = leading.group()
    if len(found) > 1:
        return _sorted(found)
    rest = answer[len(found) :].split("Question")[0]
    found += "".join(re.findall(r"[A-Z](?=[\s.)])", rest))
    letters = _sorted(re.sub(f"[^{LETTERS}]", "", found))
    if letters:
        return letters
    anywhere = re.search(f"[{LETTERS}]+", rest)
    return anywhere.group() if anywhere else "A"


def _sorted(letters: str) -> str:
    return "".join(sorted(set(letters)))


def right_letters(gold: str) -> str:
    """The letters of a gold answer's first word: "(B) because" -> B."""
    return re.sub(f"[^{LETTERS}]", "", gold.split()[0]) or "A"


def number(answer: str) -> str:
    """Digits after "The answer is", else of the first paragraph's last word that has any; up to the decimal point."""
    stated = re.search(r"The answer is (\S+)", answer)
    if stated:
        word = stated.group(1)
    else:
        words = answer.split("\n\n")[0].split(" ")
        word = next((word for word in reversed(words) if any(char.isdigit() for char in word)), "")
    return "".join(char for char in word.split(".")[0] if char.isdigit())


def program_output(answer: str) -> str:
    """One line without commas, quotes, backslashes and ".0"."""
    answer = re.sub(r"\s+", " ", answer)
    for old, new in ((",", ""), ("'", ""), ("\\", ""), (".0", ""), ("] [", "]["), ("[ [", "[["), ("] ]", "]]")):
        answer = answer.replace(old, new)
    return answer


def stated_output(answer: str, gold: str) -> str:
    """The words that may be the output: after "the final output", else the last ones, three more than the gold's."""
    answer, words = program_output(answer), len(gold.split()) + 3
    for filler in _FILLERS:
        answer = answer.replace(filler, "")
    if "the final output" in answer:
        return " ".join(re.split(r"\s+", answer.split("the final output")[-1])[:words])
    return " ".join(re.split(r"\s+", answer)[-words:])


def judgement(answer: str) -> str:
    """true or false, whichever a word holds first."""
    for word in answer.lower().split():
        for verdict in ("true", "false"):
            if verdict in word:
                return verdict
    return UNREADABLE


def gold_judgements(gold: str) -> tuple[str, str]:
    """What holds in the document, and what holds in the world: "True [fact: False]"."""
    document, _, fact = gold.lower().partition("[fact:")
    return document.strip(), fact[:-1].strip()


def exact_match(prediction: str, gold: str) -> float:
    """Letters: equal 1, some of the right ones 0.25. Else equal numbers, or the gold text within the prediction."""
    wanted, got = _plain(gold), _plain(prediction)
    if set(wanted) <= set(LETTERS):
        return 1.0 if got == wanted else 0.25 if set(got) <= set(wanted) else 0.0
    try:
        return float(float(prediction) == float(gold))
    except ValueError:
        line = next((line for line in prediction.split("\n") if len(line) > 1), prediction)
        return float(gold.lower().replace(" ", "") in line.lower().replace(" ", ""))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.translate(_PUNCTUATION)).split())
