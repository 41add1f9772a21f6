"""A study: what to evaluate, what to search, how to choose, where to run.

examples/quickstart.yaml is the commented form; `statespan ls schema` prints the JSON Schema. `study_file.py` reads one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Metric = Literal["quality", "seconds", "peak_bytes", "layer_tokens"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Numerics(Frozen):
    """How numbers are computed. All of it is part of every result's key."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Of the matrices; scores, states and decay rates stay float32. auto: float32 on a CPU, bfloat16 on a GPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where the cluster has one. cuda fails where there is none: nothing falls back silently."""

    deterministic: bool = True
    """Each sample is read alone, and decoded alone unless the model's steps keep rows apart to the bit, so that its
    result does not depend on its neighbours. False batches short prompts together, which is faster on a GPU and equal
    to rounding."""

    batch_tokens: Annotated[int, Field(ge=1)] = 65_536
    """Prompt tokens in one batch, at most, where deterministic is off."""


class Task(Frozen):
    """One benchmark with its settings. Every key that is not listed here is a setting of the benchmark."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    benchmark: Name | None = None
    """The benchmark's name where the task's own name is another one, so that one benchmark can be asked twice."""

    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Share in the study's quality, relative to the other tasks."""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class MethodChoice(Frozen):
    """One method of the study and what of it is searched."""

    space: str | None = None
    """A YAML file with the search space; by default the one in search_spaces/ of the method's name. auto: that one,
    narrowed by what `statespan analyze` measures of the model (docs/analyze.md)."""

    params: dict[str, Any] = {}
    """Replaces entries of the space: a mapping is a range ({type: int, low: 1, high: 6}), anything else pins the
    parameter to that value."""

    published: bool = True
    """Try the settings of the method's paper first."""

    enqueue: tuple[dict[str, Any], ...] = ()
    """Further settings to try first. What a setting leaves out is drawn by the sampler."""


class Objective(Frozen):
    metric: Metric = "quality"
    """quality: weighted mean of the tasks' scores, each task the mean of its lengths. seconds: prefill and decode of a
    sample measured alone. peak_bytes: most GPU memory. layer_tokens: tokens through layers a sample costs when nothing
    is shared, which unlike seconds is the same in every run."""

    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Relative difference of a cost below which two trials count as equal in it: 0.05 for 5 %."""

    @model_validator(mode="after")
    def _cost_tolerance(self) -> Objective:
        if self.metric == "quality" and self.tolerance:
            raise ValueError("the tolerance of quality is racing.tolerance")
        return self

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        return "maximize" if self.metric == "quality" else "minimize"


class Search(Frozen):
    trials: Annotated[int, Field(ge=0)] = 16
    """Settings to try, vanilla not counted. May be raised later: the study goes on where it stopped."""

    sampler: str = "tpe"
    """tpe, random, gp, cmaes, nsgaii, nsgaiii, qmc, bruteforce, or grid (every point of a space without ranges or
    with `grid: n` on them)."""

    sampler_options: dict[str, Any] = {}
    """Arguments of Optuna's sampler class, such as {n_startup_trials: 8}."""

    batch: Annotated[int, Field(ge=1, le=1_000)] = 4
    """Trials drawn together and run together. They share samples and layers; the sampler learns from them when all of
    them are done, so a study does not depend on which finishes first."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds the sampler, the split, the rungs and the statistics."""

    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = (Objective(),)
    """More than one gives a Pareto front. The winner is the best in the first."""

    storage: str | None = None
    """SQLAlchemy URL of the Optuna study, such as postgresql://user:${PASSWORD}@host/db. Default: SQLite in the study's
    folder. A study there can be watched with optuna-dashboard."""

    @field_validator("objectives", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return [{"metric": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value

    @field_validator("objectives")
    @classmethod
    def _each_once(cls, value: tuple[Objective, ...]) -> tuple[Objective, ...]:
        metrics = [objective.metric for objective in value]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"each objective may stand once; got {metrics}")
        return value


class Racing(Frozen):
    """How early a trial may be stopped. It climbs rungs: at each it meets more of the search samples."""

    rungs: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.12, 0.18, 0.27, 0.4, 0.6, 1.0)
    """Share of the search samples seen by the end of each rung; the last must be 1."""

    later: dict[int, Annotated[int, Field(ge=0)]] = {}
    """Length -> the first rung at which samples of that length are met; by default all are met from the first on."""

    scheduler: str = "racing"
    """racing: stop a trial when a paired test, corrected for repeated looks, says it is worse than the best so far.
    Rungs of too few documents for that are no looks: trials meet them together with the next one.
    none: every trial sees every sample. asha, median: Ray Tune's own."""

    scheduler_options: dict[str, Any] = {}
    """Arguments of Ray Tune's scheduler class."""

    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Chance that the truly best trial is ever stopped by one that is no better."""

    tolerance: Annotated[float, Field(ge=0.0)] = 0.0
    """Above 0, a trial is also stopped once it is shown to gain less quality than this on the best so far."""

    @field_validator("rungs")
    @classmethod
    def _climb(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)) or value[-1] != 1.0:
            raise ValueError(f"rungs must increase and end with 1.0; got {list(value)}")
        return value


class Selection(Frozen):
    """How the winner is chosen, and proved on samples that the search has not seen."""

    heldout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of documents kept from the search. No document is on both sides."""

    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Level of the final tests, corrected for the number of trials."""

    margin: Annotated[float, Field(ge=0.0)] = 0.02
    """Quality a winner may lose at lengths the model was trained on."""

    serve_samples: Annotated[int, Field(ge=1)] = 8
    """Held-out samples exported with their tokens; a server must repeat them before it goes live."""


class Workers(Frozen):
    """The pool: processes that hold one model each and evaluate every trial on their share of the samples."""

    backend: Literal["ray", "inline"] = "ray"
    """inline evaluates in this process, without Ray: for small studies and for debugging."""

    count: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """auto: one for each GPU (times per_gpu), or one for each CPU core where there is no GPU."""

    per_gpu: Literal["auto"] | Annotated[int, Field(ge=1, le=16)] = 1
    """Workers that share one GPU; each may use its part of the memory and no more. auto measures one worker on
    the longest samples and takes as many as fit, four at most."""

    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of each worker."""

    store_gib: Annotated[float, Field(ge=0.0)] = 1.0
    """Memory in GiB of each worker for hidden streams that trials share; 0 shares nothing."""

    gpu_store_gib: Annotated[float, Field(ge=0.0)] = 2.0
    """GPU memory in GiB of each worker for the streams used last; the others wait in pinned host memory (store_gib)."""

    item_samples: Annotated[int, Field(ge=1)] = 16
    """Samples in one work item, at most. A crash loses one item of each worker."""

    item_timeout_seconds: Annotated[float, Field(gt=0.0)] = 1_800.0
    """A work item that takes longer is given up, its worker restarted, and the item tried once more."""


class Cluster(Frozen):
    address: str = "local"
    """local starts Ray on this machine for this study; auto joins the cluster this machine belongs to."""

    namespace: str = "statespan"
    """Ray namespace of the workers."""

    detached: bool = False
    """Keep the workers, model loaded, when the study ends or its driver dies. They are found again by name."""

    env: dict[str, str] = {}
    """Environment variables of the workers."""


class Tracking(Frozen):
    mlflow: str = "auto"
    """auto: SQLite and a folder beside the studies. off, or a tracking URI such as http://mlflow.example:5000."""

    experiment: str | None = None
    """Name of the MLflow experiment; by default the study's."""

    register_as: str | None = None
    """Name of the registered model whose alias `champion` the winner gets; by default statespan-<study>."""

    @field_validator("mlflow", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value


class Study(Frozen):
    study: Name
    """Name: the folder below `output`, the Optuna study, the MLflow experiment."""

    model: str
    """A shipped name (`statespan ls models`), a folder with config.json, tokenizer.json and weights, or a hub id."""

    revision: str | None = None
    """Of a hub id."""

    train_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens the checkpoint was trained on; by default what its config.json says."""

    benchmarks: Annotated[dict[Name, Task], Field(min_length=1)]
    """Task name -> its benchmark's settings (`statespan ls benchmarks`)."""

    methods: Annotated[dict[Name, MethodChoice], Field(min_length=1)]
    """Method name -> what to search of it (`statespan ls methods`). Vanilla is always evaluated."""

    numerics: Numerics = Numerics()
    search: Search = Search()
    racing: Racing = Racing()
    selection: Selection = Selection()
    workers: Workers = Workers()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()
    reuse: bool = True
    """Take results from other studies below `output` where the key is the same."""

    output: Path = Path("runs")
    """Folder of all studies."""

    @field_validator("benchmarks", "methods", mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        """`decimamba:` with nothing after it is YAML's null and means all defaults. A list of names does, too."""
        if isinstance(value, list):
            value = dict.fromkeys(value)
        return {key: {} if one is None else one for key, one in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _vanilla_is_no_choice(self) -> Study:
        if "vanilla" in self.methods:
            raise ValueError("methods holds vanilla, which is always evaluated and has nothing to search; leave it out")
        return self

    @property
    def folder(self) -> Path:
        return self.output / self.study
