"""Which of Tune's schedulers a study may name, and what they do with the rungs a trial reports."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from statespan.errors import UserError
from statespan.orchestration.trainable import OWN, SCHEDULERS, check_scheduler, make_scheduler


@dataclass(eq=False)
class Trial:
    """What Tune's schedulers read of a trial."""

    trial_id: str
    config: dict = field(default_factory=dict)
    status: str = "RUNNING"


def decisions(scheduler, qualities):
    """What a scheduler says at each trial's first rung, in turn."""
    said, controller = [], SimpleNamespace(get_live_trials=list)
    for number, quality in enumerate(qualities):
        trial = Trial(f"t{number}")
        scheduler.on_trial_add(controller, trial)
        result = {"quality": quality, "climbed": 1, "training_iteration": 1, "time_total_s": 1.0}
        said.append(scheduler.on_trial_result(controller, trial, result))
    return said


@pytest.mark.parametrize("name", [*SCHEDULERS])
def test_a_scheduler_of_tunes_own_stops_what_falls_behind_at_a_rung(name):
    scheduler = make_scheduler(name, {}, rungs=6)
    assert type(scheduler).__name__ == SCHEDULERS[name]
    said = decisions(scheduler, [0.9, 0.8, 0.85, 0.7, 0.1])
    assert said[0] == "CONTINUE" and said[-1] == "STOP"


@pytest.mark.parametrize("name", OWN)
def test_with_our_own_tune_stops_what_it_is_told_to(name):
    scheduler = make_scheduler(name, {}, rungs=6)
    assert scheduler.on_trial_result(None, None, {"decision": "stop"}) == "STOP"
    assert scheduler.on_trial_result(None, None, {"decision": "keep"}) == "CONTINUE"


@pytest.mark.parametrize(
    "name, options, objectives, message",
    [
        ("PopulationBasedTraining", {}, 1, "no racing.scheduler named 'PopulationBasedTraining'"),
        ("HyperBandScheduler", {}, 1, "did you mean"),
        ("asha", {}, 2, "has one objective only"),
        ("racing", {"grace_period": 1}, 1, "takes no scheduler_options"),
    ],
)
def test_a_scheduler_that_cannot_work_is_refused(name, options, objectives, message):
    with pytest.raises(UserError, match=message):
        check_scheduler(name, options, objectives)


def test_an_option_that_the_scheduler_does_not_know_is_refused_by_name():
    with pytest.raises(UserError, match="scheduler_options do not suit asha"):
        make_scheduler("asha", {"graze_period": 2}, rungs=3)
