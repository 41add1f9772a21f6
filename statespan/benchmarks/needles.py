"""The wording of the retrieval tasks, shared by the benchmarks and by the training rows of the shipped models.

A task is an intro, a context in which needles stand as whole sentences, a question, and a cue that begins the answer;
`prompt` lays them out. The tasks are those of RULER (NVIDIA/RULER@c3f5e3b) and of DeciMamba's passkey retrieval
(DeciMamba@6290e95); sentences and word lists are our own, so scores are not comparable with published ones.

Models are taught to answer with the values alone, or, where several keys are asked for, with `key: value` pairs, and to
end the answer with a newline.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

from statespan.benchmarks.data import load_words

Kind = Literal["number", "word", "code"]
"""What a named key stands for: 7 digits, an adjective-noun pair, or a 128-bit code in hexadecimal."""

PASSKEY_INTRO = "A pass key is hidden in the text below. Find it and remember it."
PASSKEY_NEEDLE = "The pass key is {value}. Remember it: the pass key is {value}."
PASSKEY_QUESTION = "What is the pass key?"
PASSKEY_CUE = "The pass key is"

NAMED_INTRO = "Some special magic {kind}s are hidden in the text below. Remember them."
NAMED_NEEDLE = "The special magic {kind} for {key} is: {value}."
NAMED_QUESTION = "What is the special magic {kind} for {key}?"
NAMED_CUE = "The special magic {kind} for {key} is:"
SEVERAL_QUESTION = "What are the special magic {kind}s for {key}?"
SEVERAL_CUE = "The special magic {kind}s for {key} are:"

TRACKING_INTRO = "The text below sets variables. Follow the assignments."
TRACKING_VALUE = "VAR {name} = {value}."
TRACKING_COPY = "VAR {name} = VAR {source}."
TRACKING_QUESTION = "Which variables hold the value {value}?"
TRACKING_CUE = "The variables that hold {value} are:"

COMMON_INTRO = "Below is a numbered list of words. Some of them come up more often than the others."
COMMON_QUESTION = "Which {count} words are the most common in the list?"
COMMON_CUE = "The most common words are:"

FREQUENT_INTRO = "Below is a text of coded words. Count how often each comes up; leave out the dots."
FREQUENT_QUESTION = "Which {count} coded words are the most frequent?"
FREQUENT_CUE = "The most frequent words are:"

NOISE = "The lamp is lit. The road is long. The rain has stopped. A dog sleeps by the door. Nobody is in a hurry."
"""One line of the repeated filler, RULER's "noise" haystack."""

ADJECTIVES, NOUNS = load_words("adjectives"), load_words("nouns")


def draw_key(rng: Random) -> str:
    """An adjective-noun pair; there are 38,400."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_keys(rng: Random, count: int) -> list[str]:
    """Different ones."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[draw_key(rng)] = None
    return list(keys)


def draw_value(rng: Random, kind: Kind) -> str:
    if kind == "word":
        return draw_key(rng)
    if kind == "number":
        return str(rng.randrange(1_000_000, 10_000_000))
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], "4" + digits[13:16], digits[16:20], digits[20:]))


def draw_passkey(rng: Random) -> str:
    """5 digits."""
    return str(rng.randrange(10_000, 100_000))


def draw_variable(rng: Random, letters: int = 5) -> str:
    """Capitals."""
    return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=letters))


def listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c"""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def named_question(kind: Kind, keys: Sequence[str], values: int) -> tuple[str, str]:
    """Question and cue that ask for the values of these keys, `values` in all."""
    question, cue = (NAMED_QUESTION, NAMED_CUE) if values == 1 else (SEVERAL_QUESTION, SEVERAL_CUE)
    fields = {"kind": kind, "key": listed(keys)}
    return question.format(**fields), cue.format(**fields)


def prompt(intro: str, context: str, question: str, cue: str) -> str:
    """The whole prompt. An answer follows it after one space; leave `cue` empty to let the model begin by itself."""
    return f"{intro}\n\n{context}\n\nQuestion: {question}\nAnswer: {cue}".rstrip(" ")
