"""docs/results.md shows what was recorded, and nothing that was not."""

import random
from pathlib import Path

from perf.methods_study import drawn, read
from perf.methods_tables import tables
from statespan.search_spaces.loader import Range

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "perf" / "methods_study.jsonl"


def test_the_pages_tables_are_those_of_the_record(capsys):
    tables(RECORD)
    page = (ROOT / "docs" / "results.md").read_text()
    assert page.endswith(capsys.readouterr().out)


def test_every_method_was_scored_on_the_same_held_out_samples():
    rows = {}
    for record in read(RECORD, "scores"):
        same = rows.setdefault((record["model"], record["task"]), [row[:2] for row in record["rows"]])
        assert [row[:2] for row in record["rows"]] == same, record["method"]
    assert len(rows) == 4 and all(len(same) >= 100 for same in rows.values())


def test_draws_lie_in_their_ranges():
    source = random.Random(0)
    for one in (
        Range(type="int", low=3, high=9),
        Range(type="int", low=3, high=900, log=True),
        Range(type="float", low=0.1, high=0.2),
        Range(type="float", low=1e-4, high=10.0, log=True),
        Range(type="choice", choices=(1, "a")),
    ):
        assert all(drawn(source, one) in one for _ in range(200))
