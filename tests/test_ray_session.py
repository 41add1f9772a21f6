"""A stay in a Ray cluster: begun early where it is certainly needed, from a thread that lives until it is left."""

import os
import threading

import pytest

from statespan.errors import UserError
from statespan.orchestration import assemble, cluster, ray_session
from statespan.orchestration.ray_session import Session, worker_environment
from tests.studies import small_study


@pytest.fixture
def study(tmp_path):
    return small_study(tmp_path, workers={"backend": "ray", "threads": 3}, cluster={"env": {"HF_HOME": "/models"}})


@pytest.fixture
def stay(monkeypatch):
    """What was called by which thread."""
    calls = []

    def join(cluster, environment):
        calls.append(("join", threading.current_thread(), dict(environment)))
        return True

    monkeypatch.setattr(ray_session, "join", join)
    monkeypatch.setattr(ray_session, "leave", lambda: calls.append(("leave", threading.current_thread(), {})))
    monkeypatch.setattr(cluster, "prepare_actors", lambda study: ["actor"])
    return calls


def test_the_thread_that_starts_ray_lives_until_it_is_left(study, stay):
    session = Session(study)
    session.begin()
    session.wait()
    session.begin()  # once only
    ((_, thread, environment),) = stay
    assert thread.is_alive() and thread is not threading.current_thread(), "the kernel would end Ray with the thread"
    assert environment["OMP_NUM_THREADS"] == "3" and environment["HF_HOME"] == "/models"
    assert session.has_environment and session.actors == ["actor"]
    session.leave()
    session.leave()
    assert [(name, by) for name, by, _ in stay] == [("join", thread), ("leave", thread)] and not thread.is_alive()


def test_a_cluster_that_somebody_else_started_is_not_left(study, stay, monkeypatch):
    monkeypatch.setattr(ray_session, "join", lambda cluster, environment: False)
    session = Session(study)
    session.wait()
    session.leave()
    assert stay == [] and not session.has_environment and session.actors == []


def test_what_went_wrong_is_told_to_whoever_waits(study, stay, monkeypatch):
    def join(cluster, environment):
        raise UserError("Ray did not start")

    monkeypatch.setattr(ray_session, "join", join)
    session = Session(study)
    with pytest.raises(UserError, match="did not start"):
        session.wait()
    session.leave()
    assert stay == []


def test_ray_is_begun_early_for_a_study_that_is_not_done_and_needs_it(study, stay, tmp_path):
    inline = Session(small_study(tmp_path))
    inline.begin_early()
    inline.leave()
    assert stay == []
    early = Session(study)
    early.begin_early()
    early.leave()
    assert [name for name, _, _ in stay] == ["join", "leave"]
    assert ray_session.CHOICE == assemble.CHOICE
    study.folder.mkdir(parents=True)
    (study.folder / assemble.CHOICE).write_text("{}")
    done = Session(study)
    done.begin_early()
    done.leave()
    assert len(stay) == 2


def test_an_environment_is_lent_to_ray_and_taken_back(monkeypatch, study):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    values = worker_environment(study.cluster, 3)
    with ray_session._environment(values):
        assert os.environ["OMP_NUM_THREADS"] == os.environ["NUMBA_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "7" and "NUMBA_NUM_THREADS" not in os.environ


def test_needless_processes_are_left_out_of_what_ray_starts():
    parameter = pytest.importorskip("ray._private.parameter")
    whole = parameter.RayParams
    with ray_session._lean():
        lean = parameter.RayParams()
        assert lean.no_monitor is True and lean.include_log_monitor is False
    assert parameter.RayParams is whole and not whole().no_monitor
