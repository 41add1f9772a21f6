from typing import ClassVar

import pytest

from statespan.benchmarks.base import Completion, Sample
from statespan.benchmarks.table import build_benchmark
from statespan.errors import UserError
from tests.benchmark_conformance import BYTES, BenchmarkConformance, samples_of

SMALL = {"data_root": "fixtures", "documents": [3], "queries": 5}


class TestClean(BenchmarkConformance):
    NAME = "document_retrieval"
    SETTINGS = SMALL
    WIDER: ClassVar = {"documents": [3, 6], "queries": 8}
    SLACK = None


class TestAsPublished(BenchmarkConformance):
    NAME = "document_retrieval"
    SETTINGS = SMALL | {"variant": "as_published"}
    WIDER: ClassVar = {"documents": [3, 6], "queries": 8}
    SLACK = None

    def perfect(self, sample: Sample) -> Completion:
        return Completion(text=sample.targets[0] + "|> and more")


def paragraphs(sample: Sample) -> dict[str, str]:
    """Number -> paragraph."""
    parts = BYTES.decode(sample.prompt_ids).split(" <|Document ")[1:]
    found = [part.split("|> ", 1) for part in parts if "|> " in part]
    return {number: text.split(" <|")[0] for number, text in found}


def test_the_query_stands_before_every_document() -> None:
    for sample in samples_of("document_retrieval", SMALL):
        text = BYTES.decode(sample.prompt_ids)
        assert text.count("<|Query|>") == 4 and len(paragraphs(sample)) == 4
        assert text.endswith("<|Answer|> <|Document")
        assert sample.targets[0] in paragraphs(sample)


def test_clean_documents_are_all_different_and_published_ones_may_repeat() -> None:
    clean = samples_of("document_retrieval", SMALL | {"documents": [8], "queries": 13})
    published = samples_of("document_retrieval", SMALL | {"documents": [8], "queries": 13, "variant": "as_published"})
    assert all(len(set(paragraphs(sample).values())) == 9 for sample in clean)
    assert any(len(set(paragraphs(sample).values())) < 9 for sample in published)


@pytest.mark.parametrize(
    "text, clean, published",
    [
        pytest.param("517|>", 1, 1, id="right"),
        pytest.param(" 517", 1, 0, id="with_a_space"),
        pytest.param("517|> The clock", 1, 1, id="goes_on"),
        pytest.param("51|>", 0, 0, id="other_number"),
        pytest.param("5170", 0, 0, id="longer_number"),
    ],
)
def test_scores(text: str, clean: int, published: int) -> None:
    sample = Sample(id="x", prompt_ids=(1,), kind="generate", document="d", length=1, targets=("517",))
    for variant, expected in (("clean", clean), ("as_published", published)):
        benchmark = build_benchmark("document_retrieval", {"variant": variant})
        assert benchmark.score(Completion(text=text), sample) == expected


def test_more_documents_or_queries_than_there_are_is_refused() -> None:
    for more, message in (({"documents": [9]}, "the data hold 8 others"), ({"queries": 14}, "the data hold 13")):
        with pytest.raises(UserError, match=message):
            list(build_benchmark("document_retrieval", SMALL | more).samples(BYTES))
