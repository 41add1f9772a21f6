"""Haystacks are cut between sentences, and the largest size that fits is found with few counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan.benchmarks.fit import most_that_fits
from statespan.benchmarks.haystack import Haystack
from statespan.benchmarks.hiding import Needle, context
from statespan.benchmarks.table import BENCHMARKS, build_benchmark
from statespan.errors import UserError


@given(
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=300),
    limit=st.integers(0, 4_000),
    guess=st.floats(-10, 400),
)
def test_the_most_that_fits_is_found(steps: list[int], limit: int, guess: float) -> None:
    sizes = [sum(steps[: n + 1]) for n in range(len(steps))]
    expected = max((n for n, size in enumerate(sizes) if size <= limit), default=-1)
    assert most_that_fits(sizes.__getitem__, limit, len(sizes) - 1, guess) == expected


@given(limit=st.integers(100, 100_000), near=st.integers(1, 20))
def test_a_search_may_end_near_the_limit(limit: int, near: int) -> None:
    found = most_that_fits(lambda n: 3 * n + 7, limit, 100_000, guess=limit / 4, near=near)
    assert limit - max(near, 3) < 3 * found + 7 <= limit


def test_a_text_of_like_words_is_fitted_with_few_counts() -> None:
    counts = list[int]()

    def size(words: int) -> int:
        counts.append(words)
        return 60 + words * 4 // 3 + words % 3  # nearly straight, as real text is

    assert size(most_that_fits(size, 65_536, 65_536, guess=50_000)) <= 65_536
    assert len(counts) <= 8


TEXT = 'First one. Second one, longer!\n\nA heading\n\n"Third?" she said. Fourth'


@pytest.fixture
def hay() -> Haystack:
    return Haystack("text", TEXT)


def test_sentences_end_at_marks_and_at_blank_lines(hay: Haystack) -> None:
    assert hay.sentences() == ["First one.", "Second one, longer!", "A heading", '"Third?"', "she said.", "Fourth"]


def test_a_passage_keeps_its_white_space_and_goes_round_as_a_new_paragraph(hay: Haystack) -> None:
    assert hay.passage(2, 5) == "Second one, longer!\n\nA heading"
    assert hay.passage(10, 3) == "Fourth\n\nFirst one."
    assert len(hay.passage(0, 3 * len(hay)).split()) == 3 * len(hay)


@given(first=st.integers(0, 30), words=st.integers(0, 60), depth=st.floats(0, 1))
def test_a_cut_is_within_the_passage_and_between_sentences(first: int, words: int, depth: float) -> None:
    hay = Haystack("text", TEXT)
    cut = hay.cut(hay.sentence_start(first), words, depth)
    assert 0 <= cut <= words
    start = (hay.sentence_start(first) + cut) % len(hay)
    assert cut == words or start == hay.sentence_start(start)


@pytest.mark.parametrize("depth, cut", [(0.0, 0), (0.1, 0), (0.2, 2), (0.3, 5), (0.9, 11), (1.0, 12)])
def test_the_nearest_sentence_break_is_taken(hay: Haystack, depth: float, cut: int) -> None:
    assert hay.cut(0, 12, depth) == cut  # breaks: 0, 2, 5, 7, 8, 10, 11 and the end


@settings(max_examples=50)
@given(words=st.integers(1, 40), depths=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_needles_stand_whole_in_the_text_and_the_text_stands_whole_around_them(words: int, depths: list[float]) -> None:
    hay = Haystack("text", TEXT)
    needles = [Needle(f"Needle number {n}.", depth) for n, depth in enumerate(depths)]
    text = context(hay, 0, words, needles)
    assert all(text.count(needle.text) == 1 for needle in needles)
    for needle in needles:
        text = text.replace(needle.text, "")
    assert text.split() == hay.passage(0, words).split()


def test_a_needle_before_all_text_is_a_paragraph_and_others_follow_a_space(hay: Haystack) -> None:
    needles = [Needle("N0.", 0.0), Needle("N1.", 0.4), Needle("N2.", 1.0)]
    assert context(hay, 0, 5, needles) == "N0.\n\nFirst one. N1. Second one, longer! N2."


def test_every_benchmark_says_what_it_is_and_what_its_settings_are() -> None:
    assert len(BENCHMARKS) == 9
    for name, cls in BENCHMARKS.items():
        assert cls.name == name and cls.version >= 1 and cls.metric and cls.__doc__
        for field, info in cls.model_fields.items():
            assert info.description, f"{name}.{field} has no docstring"
        cls.model_json_schema()


@pytest.mark.parametrize(
    "name, asked, message",
    [
        ("paskey", {}, "no benchmark named 'paskey'; did you mean 'passkey'"),
        ("passkey", {"lenghts": [512]}, "no setting of benchmark passkey named 'lenghts'; did you mean 'lengths'"),
        ("passkey", {"lengths": [3]}, r"passkey\.lengths\.0: input should be greater than or equal to 16; got 3"),
        ("ruler", {"lengths": []}, r"ruler\.lengths: tuple should have at least 1 item.*; got \[\]"),
        ("passkey", {"trials": "many"}, r"passkey\.trials: input should be a valid integer.*; got 'many'"),
        ("passkey", {"depths": [1.5]}, r"passkey\.depths\.0: input should be less than or equal to 1; got 1.5"),
        ("ruler", {"tasks": ["niah"]}, r"ruler\.tasks\.0: input should be 'niah_single_1', .*; got 'niah'"),
        ("ruler", {"tasks": ["vt", "vt"]}, "ruler: tasks must name at least one task, and each once"),
        ("perplexity", {"seed": -1}, r"perplexity\.seed: input should be greater than or equal to 0; got -1"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(name: str, asked: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        build_benchmark(name, asked)
    assert "\n" not in str(refused.value)
