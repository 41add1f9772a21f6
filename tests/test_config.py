"""The study file: what is accepted, and the one line that says what is wrong."""

import json
import os

import pytest
import yaml

from statespan.config import Study
from statespan.errors import UserError
from statespan.study_file import check_study, from_environment, load_study, parse_override, saved_form

SMALL = {"study": "a", "model": "mamba1-5m", "benchmarks": {"passkey": None}, "methods": ["decimamba"]}


def test_a_small_study_has_every_default():
    study = check_study(SMALL)
    assert study.search.trials == 16 and study.racing.rungs[-1] == 1.0
    assert study.folder.as_posix() == "runs/a"
    assert study.benchmarks["passkey"].settings == {}


def test_settings_of_a_benchmark_pass_through_to_it():
    study = check_study(SMALL | {"benchmarks": {"keys": {"benchmark": "passkey", "weight": 2, "lengths": [256]}}})
    task = study.benchmarks["keys"]
    assert (task.benchmark, task.weight, task.settings) == ("passkey", 2, {"lengths": [256]})


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"modle": "x"}, "no setting named 'modle'; did you mean 'model'?", id="unknown_key"),
        pytest.param(
            {"search": {"trails": 3}}, "no setting in search named 'trails'; did you mean 'trials'?", id="nested_key"
        ),
        pytest.param(
            {"methods": {"decimamba": {"spaces": "x"}}},
            "no setting in methods.decimamba named 'spaces'; did you mean 'space'?",
            id="key_below_a_name",
        ),
        pytest.param(
            {"search": {"trials": -1}}, "search.trials: input should be greater than or equal to 0; got -1", id="range"
        ),
        pytest.param(
            {"racing": {"rungs": [0.5, 0.2, 1]}}, r"rungs must increase and end with 1.0; got \[0.5, 0.2", id="rungs"
        ),
        pytest.param({"methods": ["vanilla"]}, "vanilla, which is always evaluated", id="vanilla"),
        pytest.param({"study": "a/b"}, "study: string should match pattern", id="name_is_a_folder"),
        pytest.param(
            {"search": {"objectives": ["quality", "speed"]}}, "search.objectives.1.metric: input should be", id="metric"
        ),
        pytest.param(
            {"search": {"objectives": ["quality", "quality"]}}, "each objective may stand once", id="objective_twice"
        ),
    ],
)
def test_says_in_one_line_what_is_wrong(change, message):
    with pytest.raises(UserError, match=message) as caught:
        check_study(SMALL | change, "study.yaml")
    assert str(caught.value).startswith("study.yaml: ") and "\n" not in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="model is missing"):
        check_study({key: value for key, value in SMALL.items() if key != "model"})


@pytest.mark.parametrize(
    "text, message", [("a: [1,", "is not YAML"), ("- 1", "must hold settings"), (None, "no study")]
)
def test_a_file_that_is_no_study_is_refused(text, message, tmp_path):
    path = tmp_path / "s.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_study(path)


def test_overrides_win_merge_replace_and_delete(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(SMALL | {"search": {"trials": 8, "seed": 3}, "racing": {"rungs": [0.5, 1.0]}}))
    study = load_study(path, ["search.trials=2", "racing.rungs=[0.2, 1.0]", "search.seed=null", "methods.longmamba={}"])
    assert (study.search.trials, study.search.seed, study.racing.rungs) == (2, 0, (0.2, 1.0))
    assert sorted(study.methods) == ["decimamba", "longmamba"]


@pytest.mark.parametrize("text", ["trials", "=3", "a..b=1"])
def test_an_override_without_key_or_value_is_refused(text):
    with pytest.raises(UserError, match=r"must look like search\.trials=8"):
        parse_override(text)


def test_a_secret_stays_a_name_in_what_is_saved(monkeypatch):
    monkeypatch.setenv("PASSWORD", "hush")
    url = "postgresql://me:${PASSWORD}@db/optuna"
    study = check_study(SMALL | {"search": {"storage": url}})
    assert "hush" not in saved_form(study) and "${PASSWORD}" in saved_form(study)
    assert from_environment(url) == "postgresql://me:hush@db/optuna"


def test_a_missing_environment_variable_is_named():
    os.environ.pop("STATESPAN_NO_SUCH", None)
    with pytest.raises(UserError, match="STATESPAN_NO_SUCH is not set"):
        from_environment("${STATESPAN_NO_SUCH}")


def test_the_saved_form_is_the_study_again():

    study = check_study(SMALL | {"search": {"objectives": ["quality", {"metric": "seconds", "tolerance": 0.05}]}})
    assert check_study(yaml.safe_load(saved_form(study))) == study


def test_the_schema_knows_every_section_and_explains_it():
    import jsonschema

    found = Study.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(found)
    jsonschema.validate(SMALL | {"benchmarks": {"passkey": {}}, "methods": {"decimamba": {}}}, found)
    assert "Optuna" in json.dumps(found["$defs"]["Search"]["properties"]["storage"])


@pytest.mark.parametrize("written, meant", [("off", "off"), ("'off'", "off"), ("auto", "auto")])
def test_tracking_is_turned_off_with_or_without_quotes(written, meant):
    assert check_study(SMALL | {"tracking": yaml.safe_load(f"mlflow: {written}")}).tracking.mlflow == meant
