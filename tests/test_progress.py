"""What a study shows of itself while it runs: lines, a live table, and status.json for another shell."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from statespan.orchestration import progress as module
from statespan.orchestration.journal import Asked, Told
from statespan.orchestration.lock import study_lock
from statespan.orchestration.pool import NoBackend, Pool
from statespan.orchestration.progress import Progress
from statespan.orchestration.results import Counters
from statespan.orchestration.status import duration, read_status
from tests.studies import small_study


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def asked(number):
    params = {"first_layer": 1, "base_tokens": 64}
    return Asked(number=number, id=f"t{number:04d}", method="decimamba", params=params, canonical=params,
                 artifacts={}, origin="sampled", draw=number)  # fmt: skip


def rung(place, score, decision="keep", reason=""):
    return {"rung": place, "samples": 10 * (place + 1), "score": score, "values": [score], "decision": decision,
            "reason": reason, "p": None, "incumbent_id": None}  # fmt: skip


def followed(study, form, out):
    """A progress that reads counters of a conductor that is not there."""
    shown = Progress(study, Console(file=out, width=160, force_terminal=form == "live"), form)
    results = SimpleNamespace(counters=Counters(), pool=Pool(NoBackend()))
    shown.follow(SimpleNamespace(results=results, standings=SimpleNamespace(interval=lambda trial: (0.5, 0.9))), False)
    return shown, results.counters


def a_run(shown, counters, clock):
    """Vanilla and two trials, of four: one is stopped at the first rung, the other finishes."""
    shown.phase("searching")
    counters.computed, counters.prompt_tokens, counters.layer_tokens, counters.layer_tokens_shared = 10, 1_000, 300, 700
    shown.progress()
    clock[0] += 10
    counters.prompt_tokens = 3_000
    shown.rung_done(None, rung(0, 0.25))
    shown.rung_done(asked(0), rung(0, 0.75))
    shown.rung_done(asked(1), rung(0, 0.1, "stop", "worse than t0000 by 0.65"))
    shown.trial_done(asked(1), Told(number=1, state="pruned", rungs=(rung(0, 0.1, "stop"),)))
    shown.rung_done(asked(0), rung(2, 0.75, "finish"))
    shown.trial_done(asked(0), Told(number=0, state="complete", values=(0.75,), rungs=(rung(2, 0.75, "finish"),)))
    clock[0] += 10
    shown.progress()


def test_another_shell_reads_how_far_it_is_how_fast_and_how_long_still(tmp_path, clock):
    study = small_study(tmp_path, search={"trials": 4}, racing={"rungs": [0.25, 0.5, 1.0]})
    shown, counters = followed(study, "quiet", io.StringIO())
    a_run(shown, counters, clock)
    with study_lock(study.folder):
        status = read_status(study.folder)
        line = status.line()
    assert status.search_seconds_left == pytest.approx(20)  # two of four trials took the 20 seconds
    for part in ("searching; 2/4 trials", "100 tokens/s", "70% of layer-tokens shared", "about 20 s of search left",
                 "best 0.750 [0.500, 0.900] t0000", "vanilla 0.250"):  # fmt: skip
        assert part in line
    assert read_status(study.folder).phase == "stopped", "its driver is gone"


def test_where_there_is_no_terminal_every_rung_is_one_plain_line(tmp_path, clock):
    out = io.StringIO()
    study = small_study(tmp_path, search={"trials": 4}, racing={"rungs": [0.25, 0.5, 1.0]})
    a_run(*followed(study, "lines", out), clock)
    lines = out.getvalue().splitlines()
    assert lines[0] == "small: searching" and "\x1b" not in out.getvalue()
    assert "t0001 rung 1/3: 0.100 on 10 samples, stop (worse than t0000 by 0.65); decimamba" in lines[2]


def test_the_live_view_has_trials_rungs_the_best_and_what_is_shared(tmp_path, clock):
    out = io.StringIO()
    study = small_study(tmp_path, search={"trials": 4}, racing={"rungs": [0.25, 0.5, 1.0]})
    shown, counters = followed(study, "live", out)
    a_run(shown, counters, clock)
    shown.console.print(shown._render())
    text = out.getvalue()
    for part in ("2/4 trials", "best 0.750", "(t0000)", "stopped", "3/3", "100 tokens/s", "70% of layer-tokens shared"):
        assert part in text, part


def test_durations_are_said_in_words():
    assert [duration(one) for one in (8.4, 100, 3_000, 9_000)] == ["8 s", "2 min", "50 min", "2.5 h"]
