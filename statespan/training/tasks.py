"""Retrieval tasks as token ids with a loss weight a token, in the wording of `statespan.benchmarks.needles`.

Each task is a function (rng, room, desk) -> Episode of at most `room` tokens, or None where the room does not do.
What makes associative recall emerge in a small model is signal: several keys stand in one text and several questions
are asked about it, one after another, each answer weighted; keys and values are fresh draws, not to be learnt by heart.
Needles, questions and filler carry no loss (they are noise, or given at evaluation); the haystack's real text carries
the loss of a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from statespan.benchmarks import needles
from statespan.training.text_pool import TextPool
from statespan.training.vocabulary import Encoder

TEXT, GIVEN = 1.0, 0.0
KINDS: tuple[needles.Kind, ...] = ("number", "word", "code")
_PEOPLE = ["Mary", "John", "Emily", "Peter", "Sarah", "Henry", "Alice", "George", "Martha", "Edward", "Laura", "Philip"]
_PLACES = [
    "kitchen",
    "garden",
    "office",
    "bedroom",
    "hallway",
    "bathroom",
    "library",
    "cellar",
    "stable",
    "market",
    "chapel",
]
_MOVES = ("went to the", "moved to the", "walked to the", "is in the", "ran to the")
_BARE_ANSWER = 0.2  # share of questions whose answer begins without a cue
_LIST_SHARE = 0.4  # of the answer's weight: what an answer repeats from its question, and its end


@dataclass(slots=True)
class Episode:
    """Token ids, each with the weight of its loss."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, ids: Sequence[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)


@dataclass(frozen=True, slots=True)
class Desk:
    """What every task draws on."""

    encode: Encoder
    pool: TextPool
    answer_weight: float


@dataclass(slots=True)
class Question:
    """The prompt's end and the answer, in (text, is the answer proper) pieces."""

    text: str
    cue: str
    answer: list[tuple[str, bool]]
    needs_cue: bool = False
    """The answer makes no sense without its cue."""


Task = Callable[[Random, int, Desk], Episode | None]


def _asked(rng: Random, questions: Sequence[Question], desk: Desk) -> Episode:
    """All questions, one after another, each with its weighted answer and a newline."""
    episode = Episode()
    for number, question in enumerate(questions):
        bare = rng.random() < _BARE_ANSWER and not question.needs_cue
        lead = "\n\n" if number == 0 else ""
        episode.add(desk.encode(f"{lead}Question: {question.text}\nAnswer:{'' if bare else ' ' + question.cue}"), GIVEN)
        for piece, wanted in question.answer:
            episode.add(desk.encode(piece), desk.answer_weight * (1.0 if wanted else _LIST_SHARE))
        episode.add(desk.encode("\n"), desk.answer_weight * _LIST_SHARE)
    return episode


def _plain(answer: str) -> list[tuple[str, bool]]:
    return [(f" {answer}", True)]


def _hidden(rng: Random, hidden: Sequence[str], room: int, desk: Desk) -> Episode | None:
    """Needles in a haystack of at most `room` tokens: real text, repeated filler lines, or lines of their own."""
    style = rng.random()
    if style < 0.7 and room >= 48:
        return hide_in_text(rng, hidden, room, desk)
    if style < 0.85:
        return _in_lines(rng, hidden, [needles.NOISE] * 64, room, desk)
    return _in_lines(rng, hidden, [], room, desk)


def hide_in_text(rng: Random, hidden: Sequence[str], room: int, desk: Desk) -> Episode | None:
    """Needles between the sentences of a passage, each at a depth of its own; None where the room does not do."""
    written = [desk.encode(f" {needle}") for needle in hidden]
    passage = desk.pool.passage(rng, room - sum(map(len, written)) - len(hidden))
    places = [0, *passage.cuts, len(passage.ids)]
    episode, at = Episode(), 0
    for depth, needle, ids in sorted(zip((rng.random() for _ in hidden), hidden, written, strict=True)):
        place = places[min(int(depth * len(places)), len(places) - 1)]
        episode.add(passage.ids[at:place], TEXT)
        # before all text a needle is a paragraph of its own, so that no seam differs from running text
        episode.add(ids if place else desk.encode(f"{needle}\n\n"), GIVEN)
        at = place
    episode.add(passage.ids[at:], TEXT)
    return episode if len(episode.ids) <= room else None


def _in_lines(rng: Random, hidden: Sequence[str], filler: Sequence[str], room: int, desk: Desk) -> Episode | None:
    lines, free = list(hidden), room - sum(len(desk.encode(f"{needle}\n")) for needle in hidden)
    for line in filler:
        free -= len(desk.encode(f"{line}\n"))
        if free < 0:
            break
        lines.append(line)
    if free < 0 and len(lines) == len(hidden):
        return None
    order = list(range(len(lines)))
    rng.shuffle(order)
    episode = Episode()
    episode.add(desk.encode("\n".join(lines[i] for i in order)), GIVEN)
    return episode


def _whole(rng: Random, intro: str, hidden: Sequence[str], asked: Episode, room: int, desk: Desk) -> Episode | None:
    opening = desk.encode(f"{intro}\n\n") if rng.random() < 0.8 else []
    context = _hidden(rng, hidden, room - len(opening) - len(asked.ids), desk)
    if context is None:
        return None
    episode = Episode()
    episode.add(opening, GIVEN)
    for part in (context, asked):
        episode.ids += part.ids
        episode.weights += part.weights
    return episode


def passkey(rng: Random, room: int, desk: Desk) -> Episode | None:
    """One number in a haystack."""
    value = needles.draw_passkey(rng)
    asked = _asked(rng, [Question(needles.PASSKEY_QUESTION, needles.PASSKEY_CUE, _plain(value))], desk)
    return _whole(rng, needles.PASSKEY_INTRO, [needles.PASSKEY_NEEDLE.format(value=value)], asked, room, desk)


def _kind(rng: Random) -> needles.Kind:
    return rng.choices(KINDS, (0.82, 0.15, 0.03))[0]


def _named(kind: needles.Kind, key: str, value: str) -> str:
    return needles.NAMED_NEEDLE.format(kind=kind, key=key, value=value)


def _one_of(kind: needles.Kind, key: str, value: str) -> Question:
    return Question(*needles.named_question(kind, [key], 1), _plain(value))


def named_keys(rng: Random, room: int, desk: Desk) -> Episode | None:
    """1 to 8 named values in a haystack; some of them are asked for, one by one."""
    kind, count = _kind(rng), min(rng.choice((1, 2, 3, 4, 4, 4, 6, 8)), max(room // 60, 1))
    pairs = [(key, needles.draw_value(rng, kind)) for key in needles.draw_keys(rng, count)]
    questions = [_one_of(kind, key, value) for key, value in rng.sample(pairs, rng.randint(1, min(count, 6)))]
    hidden = [_named(kind, key, value) for key, value in pairs]
    asked = _asked(rng, questions, desk)
    return _whole(rng, needles.NAMED_INTRO.format(kind=kind), hidden, asked, room, desk)


def many_keys(rng: Random, room: int, desk: Desk) -> Episode | None:
    """Nothing but named values; several are asked for. RULER's haystack of needles."""
    kind = KINDS[0] if rng.random() < 0.8 else KINDS[1]
    size = len(desk.encode(_named(kind, "calm-lamp", "1234567" if kind == "number" else "calm-lamp"))) + 1
    asked_for = max(min(room // (4 * size), 6), 1)
    count = (room - 16 - asked_for * (2 * size + 10)) // size
    if count < 2:
        return None
    count = rng.randint(2, min(count, 40))
    pairs = [(key, needles.draw_value(rng, kind)) for key in needles.draw_keys(rng, count)]
    picked = rng.sample(pairs, min(asked_for, count))
    asked = _asked(rng, [_one_of(kind, key, value) for key, value in picked], desk)
    context = _in_lines(rng, [_named(kind, key, value) for key, value in pairs], [], room - len(asked.ids), desk)
    if context is None:
        return None
    return Episode(context.ids + asked.ids, context.weights + asked.weights)


def several_keys(rng: Random, room: int, desk: Desk) -> Episode | None:
    """One question for the values of several keys, answered as `key: value` pairs."""
    count = rng.randint(2, 4)
    pairs = [(key, needles.draw_value(rng, "number")) for key in needles.draw_keys(rng, count)]
    wanted = rng.sample(pairs, rng.randint(2, count))
    answer: list[tuple[str, bool]] = []
    for number, (key, value) in enumerate(wanted):
        answer += [(f"{',' if number else ''} {key}:", False), (f" {value}", True)]
    question = Question(*needles.named_question("number", [key for key, _ in wanted], len(wanted)), answer)
    hidden = [_named("number", key, value) for key, value in pairs]
    return _whole(rng, needles.NAMED_INTRO.format(kind="number"), hidden, _asked(rng, [question], desk), room, desk)


def several_values(rng: Random, room: int, desk: Desk) -> Episode | None:
    """One key with several values, answered in the text's order."""
    key, values = needles.draw_key(rng), [needles.draw_value(rng, "number") for _ in range(rng.randint(2, 4))]
    opening = desk.encode(needles.NAMED_INTRO.format(kind="number") + "\n\n")
    text, cue = needles.named_question("number", [key], len(values))
    asked = _asked(rng, [Question(text, cue, _plain(", ".join(values)))], desk)
    context = _hidden(
        rng, [_named("number", key, value) for value in values], room - len(opening) - len(asked.ids), desk
    )
    if context is None:
        return None
    # the haystack shuffles its needles: read the order off the text and ask again
    spoken = desk.encode.decode(context.ids)
    ordered = sorted(values, key=spoken.index)
    asked = _asked(rng, [Question(text, cue, _plain(", ".join(ordered)))], desk)
    episode = Episode(opening + context.ids + asked.ids, [GIVEN] * len(opening) + context.weights + asked.weights)
    return episode if len(episode.ids) <= room else None


def lookup(rng: Random, room: int, desk: Desk) -> Episode | None:
    """Lines of `key: value`, then some of the keys again: the densest form of recall, and the first to be learnt."""
    numbers, digits = rng.random() < 0.7, rng.randint(2, 6)
    pair_keys = rng.random() < 0.5

    def value() -> str:
        return str(rng.randrange(10 ** (digits - 1), 10**digits)) if numbers else rng.choice(needles.NOUNS)

    size = (digits + 1 if numbers else 2) + (4 if pair_keys else 3)
    count = min(room // (2 * size), 48)
    if count < 2:
        return None
    count = rng.randint(2, count)
    keys = needles.draw_keys(rng, count) if pair_keys else rng.sample(needles.NOUNS, count)
    pairs = [(key, value()) for key in keys]
    episode = Episode()
    episode.add(desk.encode("\n".join(f"{key}: {found}" for key, found in pairs) + "\n\n"), GIVEN)
    for key, found in rng.sample(pairs, count):
        line = desk.encode(f"{key}:"), desk.encode(f" {found}"), desk.encode("\n")
        if len(episode.ids) + sum(map(len, line)) > room:
            break
        episode.add(line[0], GIVEN)
        episode.add(line[1], desk.answer_weight)
        episode.add(line[2], GIVEN)
    return episode if len(episode.ids) <= room and any(episode.weights) else None


def copying(rng: Random, room: int, desk: Desk) -> Episode | None:
    """A passage, or a row of words, twice: the second time it can be known."""
    tokens = min(rng.randint(8, 80), (room - 2) // 2)
    if rng.random() < 0.5:
        ids = desk.pool.passage(rng, tokens).ids
    else:
        ids = desk.encode(" ".join(rng.choices(needles.NOUNS + needles.ADJECTIVES, k=tokens)))[:tokens]
    episode = Episode()
    episode.add(ids, GIVEN)
    episode.add(desk.encode("\n\n"), GIVEN)
    episode.add(ids[:2], GIVEN)
    episode.add(ids[2:], desk.answer_weight * 0.2)
    return episode


def tracking(rng: Random, room: int, desk: Desk) -> Episode | None:
    """A value handed on from variable to variable; which of them hold it?"""
    hops = rng.randint(0, 4)
    names = [needles.draw_variable(rng) for _ in range(hops + 1)]
    value = needles.draw_passkey(rng)
    lines = [needles.TRACKING_VALUE.format(name=names[0], value=value)]
    lines += [needles.TRACKING_COPY.format(name=b, source=a) for a, b in pairwise(names)]
    question = Question(
        needles.TRACKING_QUESTION.format(value=value),
        needles.TRACKING_CUE.format(value=value),
        _plain(", ".join(names)),
    )
    asked, opening = _asked(rng, [question], desk), desk.encode(needles.TRACKING_INTRO + "\n\n")
    room_left = room - len(opening) - len(asked.ids)
    context = _ordered_lines(rng, lines, room_left, desk)
    if context is None:
        return None
    return Episode(opening + context + asked.ids, [GIVEN] * (len(opening) + len(context)) + asked.weights)


def _ordered_lines(rng: Random, lines: Sequence[str], room: int, desk: Desk) -> list[int] | None:
    """The lines in their order, among as much repeated filler as fits (or less)."""
    noise = len(desk.encode(f"{needles.NOISE}\n"))
    free = room - sum(len(desk.encode(f"{line}\n")) for line in lines)
    if free < 0:
        return None
    filler = rng.randint(0, free // noise)
    places = sorted(rng.randint(0, filler) for _ in lines)
    mixed = [needles.NOISE] * filler
    for place, line in reversed(list(zip(places, lines, strict=True))):
        mixed.insert(place, line)
    return desk.encode("\n".join(mixed))


def common_words(rng: Random, room: int, desk: Desk) -> Episode | None:
    """Which words come up most often in a numbered list?"""
    count, often = rng.randint(1, 5), rng.randint(4, 8)
    words = rng.sample(needles.NOUNS, len(needles.NOUNS))
    common, others = words[:count], words[count:]
    fits = (room - 64) // 6 - count * often  # a numbered word takes six tokens at most
    if fits < 2:
        return None
    listed = common * often + others[: min(rng.randint(2, fits), len(others))]
    rng.shuffle(listed)
    ordered = sorted(common, key=listed.index)
    text = needles.COMMON_QUESTION.format(count=count)
    asked = _asked(rng, [Question(text, needles.COMMON_CUE, _plain(", ".join(ordered)))], desk)
    episode = Episode()
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    episode.add(desk.encode(f"{needles.COMMON_INTRO}\n\n{numbered}"), GIVEN)
    episode.ids += asked.ids
    episode.weights += [weight * _LIST_SHARE for weight in asked.weights]
    return episode if len(episode.ids) <= room else None


def documents(rng: Random, room: int, desk: Desk) -> Episode | None:
    """Numbered documents of one sentence each; which of them begins so?"""
    passage = desk.pool.passage(rng, int(room * 0.7))
    spans = [(a, b) for a, b in pairwise(passage.cuts) if 12 <= b - a <= 80]
    if len(spans) < 2:
        return None
    spans = spans[: rng.randint(2, min(len(spans), 8))]
    numbers = rng.sample(range(10, 100), len(spans))
    episode = Episode()
    for number, (start, stop) in zip(numbers, spans, strict=True):
        episode.add(desk.encode(f"{chr(10) if episode.ids else ''}Document {number}:"), GIVEN)
        episode.add(passage.ids[start:stop], TEXT)
    for asked, which in enumerate(rng.sample(range(len(spans)), min(len(spans), 3))):
        start = spans[which][0]
        episode.add(desk.encode(("" if asked else "\n\n") + "Question: Which document begins with:"), GIVEN)
        episode.add(passage.ids[start : start + 8], GIVEN)
        episode.add(desk.encode("\nAnswer: Document"), GIVEN)
        episode.add(desk.encode(f" {numbers[which]}"), desk.answer_weight)
        episode.add(desk.encode("\n"), desk.answer_weight * _LIST_SHARE)
    return episode if len(episode.ids) <= room else None


def whereabouts(rng: Random, room: int, desk: Desk) -> Episode | None:
    """People move between rooms, hidden in a text; where is each of them now?"""
    people = rng.sample(_PEOPLE, rng.randint(1, 4))
    moves = [(rng.choice(people), rng.choice(_PLACES)) for _ in range(rng.randint(2, 8))]
    lines = [f"{person} {rng.choice(_MOVES)} {place}." for person, place in moves]
    last = dict(moves)
    questions = [
        Question(f"Where is {person}?", f"{person} is in the", _plain(place), needs_cue=True)
        for person, place in rng.sample(sorted(last.items()), len(last))
    ]
    asked = _asked(rng, questions, desk)
    context = _ordered_lines(rng, lines, room - len(asked.ids), desk)
    if context is None:
        return None
    return Episode(context + asked.ids, [GIVEN] * len(context) + asked.weights)


TASKS: dict[str, tuple[Task, float, int]] = {
    # name: the task, its share, the fewest tokens it is tried in
    "passkey": (passkey, 0.14, 72),
    "named_keys": (named_keys, 0.34, 72),
    "many_keys": (many_keys, 0.14, 128),
    "several_keys": (several_keys, 0.07, 160),
    "several_values": (several_values, 0.04, 160),
    "lookup": (lookup, 0.12, 32),
    "copying": (copying, 0.04, 32),
    "tracking": (tracking, 0.04, 128),
    "common_words": (common_words, 0.02, 192),
    "documents": (documents, 0.03, 128),
    "whereabouts": (whereabouts, 0.02, 96),
}
