import math
from pathlib import Path
from typing import ClassVar

import pytest

from statespan.benchmarks.base import Completion, Sample
from statespan.benchmarks.table import build_benchmark
from statespan.errors import UserError
from tests.benchmark_conformance import BYTES, BenchmarkConformance, likelihood, samples_of

SMALL = {"books": "persuasion", "lengths": [256, 512], "windows": 3}


class PerplexityConformance(BenchmarkConformance):
    NAME = "perplexity"
    SEEDED = False
    SLACK = 0
    BEST = 0.0
    """Minus nats per token of a target that was certain."""

    WORST = -5.0

    def perfect(self, sample: Sample) -> Completion:
        return Completion(likelihoods=(likelihood(0.0, 100),))

    def empty(self, sample: Sample) -> Completion:
        return Completion(likelihoods=(likelihood(-500.0, 100),))

    def reserved(self, sample: Sample) -> int:
        return len(sample.target_ids[0])


class TestClean(PerplexityConformance):
    SETTINGS = SMALL
    WIDER: ClassVar = {"lengths": [256, 300, 512], "windows": 7}


class TestAsPublished(PerplexityConformance):
    SETTINGS = SMALL | {"variant": "as_published", "books": "novels"}
    WIDER: ClassVar = {"lengths": [256, 512, 700]}


def book(folder: Path, tokens: int) -> str:
    path = folder / "book.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(tokens)))
    return str(path)


def test_clean_scores_the_same_tokens_at_every_length() -> None:
    by_length: dict[int, set[tuple[int, ...]]] = {}
    for sample in samples_of("perplexity", SMALL):
        by_length.setdefault(sample.length, set()).add(sample.target_ids[0])
    assert by_length[256] == by_length[512] and len(by_length[256]) == 3


def test_a_window_is_the_text_before_its_target() -> None:
    text = tuple(BYTES.encode(build_text()))
    for sample in samples_of("perplexity", SMALL):
        window = sample.prompt_ids + sample.target_ids[0]
        end = int(sample.document.split("@")[1])
        assert window == text[end - sample.length : end]


def build_text() -> str:
    from statespan.benchmarks.data import load_text

    return load_text("persuasion")


@pytest.mark.parametrize(
    "tokens, windows",
    [
        pytest.param(256, 0, id="as_long_as_the_window"),
        pytest.param(257, 1, id="one_more"),
        pytest.param(256 + 99, 10, id="steps_of_ten"),
        pytest.param(256 + 1000, 10, id="divides_by_ten"),
        pytest.param(256 + 1005, 11, id="the_usual_eleven"),
    ],
)
def test_published_windows_per_book(tmp_path: Path, tokens: int, windows: int) -> None:
    asked = {"variant": "as_published", "books": book(tmp_path, tokens), "lengths": [256]}
    if not windows:
        with pytest.raises(UserError, match=r"no book in .* is longer than 256 tokens"):
            list(build_benchmark("perplexity", asked).samples(BYTES))
        return
    assert len(list(build_benchmark("perplexity", asked).samples(BYTES))) == windows


def test_published_windows_let_methods_see_the_scored_tokens() -> None:
    assert build_benchmark("perplexity", {"variant": "as_published"}).scope == "window"
    assert build_benchmark("perplexity", {}).scope == "prefix"


def test_fixed_books_drop_books_too_short_for_the_longest_window(tmp_path: Path) -> None:
    for name, tokens in (("short", 600), ("long", 3000)):
        (tmp_path / f"{name}.txt").write_text("x" * tokens)
    asked = {"variant": "as_published", "books": str(tmp_path), "lengths": [256, 1000]}
    shrinking = build_benchmark("perplexity", asked).samples(BYTES)
    fixed = build_benchmark("perplexity", asked | {"fixed_books": True}).samples(BYTES)
    assert {(s.meta["book"], s.length) for s in shrinking} == {("short", 256), ("long", 256), ("long", 1000)}
    assert {(s.meta["book"], s.length) for s in fixed} == {("long", 256), ("long", 1000)}


def test_clean_targets_that_no_long_window_reaches_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    asked = {"books": book(tmp_path, 1500), "lengths": [256, 1000], "windows": 7}
    fixed = list(build_benchmark("perplexity", asked).samples(BYTES))
    free = list(build_benchmark("perplexity", asked | {"fixed_books": False}).samples(BYTES))
    assert {s.document for s in fixed if s.length == 256} == {s.document for s in fixed if s.length == 1000}
    assert len([s for s in free if s.length == 256]) > len([s for s in fixed if s.length == 256]) > 0
    assert set(map(repr, fixed)) < set(map(repr, free))


def test_summary_gives_perplexity_per_token_and_word_and_bits_per_byte() -> None:
    benchmark = build_benchmark("perplexity", SMALL)
    samples = samples_of("perplexity", SMALL)
    summary = benchmark.summary(samples, [-2.0] * len(samples))
    rows = [sample for sample in samples if sample.length == 256]
    words = sum(sample.meta["words"] for sample in rows)
    assert summary["perplexity@256"] == pytest.approx(math.e**2)
    assert summary["bits_per_byte@256"] == pytest.approx(2 / math.log(2))  # a byte is a token here
    assert summary["word_perplexity@256"] == pytest.approx(math.exp(2 * 100 * len(rows) / words))
    assert summary["windows@256"] == len(rows) and summary["books@256"] == 1


def test_a_book_of_the_users_is_named_with_its_hash(tmp_path: Path) -> None:
    found = build_benchmark("perplexity", {"books": book(tmp_path, 500)}).provenance()["books"]
    assert found[0]["file"].endswith("book.txt") and len(found[0]["sha256"]) == 64


def test_an_empty_or_undecodable_book_is_refused(tmp_path: Path) -> None:
    for content, complaint in ((b" \n", "is empty"), (b"caf\xe9", r"not UTF-8 \(byte 3\)")):
        (tmp_path / "book.txt").write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            list(build_benchmark("perplexity", {"books": str(tmp_path / "book.txt")}).samples(BYTES))


def test_lengths_no_longer_than_the_target_are_refused() -> None:
    with pytest.raises(UserError, match=r"lengths must be longer than scored_tokens \(100\)"):
        build_benchmark("perplexity", {"lengths": [100]})
