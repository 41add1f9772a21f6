"""A choice between forms of a kernel is made once for a device and shape class, and kept on disk."""

import json

import pytest
import torch

pytest.importorskip("triton")

from statespan.kernels import tuning


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A device whose clock is the candidate itself; counts how often it was read."""
    reads = []

    def clock(call):
        reads.append(call())
        return reads[-1]

    monkeypatch.setenv("STATESPAN_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_milliseconds", clock)
    forget(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "toy")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return reads


def forget(monkeypatch):
    """As in a process that has just begun."""
    monkeypatch.setattr(tuning, "_settled", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_loaded", set())


def pick(shape=(1, 2), candidates=(3.0, 1.0, 2.0)):
    return tuning.fastest("op", shape, candidates, lambda candidate: candidate)


def test_the_fastest_is_found_once_and_remembered(timed):
    assert [pick(), pick()] == [1.0, 1.0] and len(timed) == 3
    assert pick(shape=(1, 3)) == 1.0 and len(timed) == 6


def test_another_process_reads_the_choice_from_disk(timed, monkeypatch, tmp_path):
    pick()
    forget(monkeypatch)
    assert pick() == 1.0 and len(timed) == 3
    assert len(json.loads((tmp_path / "tuned.json").read_text())) == 1


def test_a_remembered_candidate_that_is_gone_is_searched_again(timed, monkeypatch):
    pick()
    forget(monkeypatch)
    assert pick(candidates=(3.0, 2.0)) == 2.0


def test_a_choice_once_made_is_found_without_a_name_or_a_file(timed, monkeypatch):
    pick()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: pytest.fail("asked for the device's name"))
    monkeypatch.setenv("STATESPAN_CACHE", "/nowhere")
    assert pick() == 1.0 and len(timed) == 3


def test_another_device_of_the_process_makes_its_own_choice(timed, monkeypatch):
    pick()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert pick() == 1.0 and len(timed) == 6


def test_a_choice_that_a_capture_forbade_is_made_after_it(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick() == 3.0 and not timed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert pick() == 1.0


def test_deterministic_runs_take_the_first(timed):
    torch.use_deterministic_algorithms(True)
    try:
        assert pick() == 3.0 and not timed
    finally:
        torch.use_deterministic_algorithms(False)
