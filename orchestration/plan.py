"""A study with everything filled in that a driver must know: model, samples, spaces, keys. Nothing is written.

Making a plan finds every mistake of the user that can be found without running: unknown names, ranges, missing files, a
method that does not support the model, a benchmark without data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from statespan.analysis.auto import AUTO, auto_spaces, record
from statespan.analysis.run import analysis_of
from statespan.analysis.suggest import Suggestion, within
from statespan.benchmarks.base import Benchmark
from statespan.benchmarks.table import build_benchmark
from statespan.config import Study
from statespan.errors import UserError
from statespan.methods.base import ModelFacts
from statespan.methods.table import build_method, canonical_params, method_class
from statespan.models.hook import Method
from statespan.orchestration.items import BASELINE, Setting
from statespan.orchestration.keys import (
    MethodIdentity,
    ModelIdentity,
    NumericMode,
    benchmark_facts,
    digest,
    result_key,
    scope_digest,
)
from statespan.orchestration.samplers import check_sampler
from statespan.orchestration.samples import Entry, SampleSet, build_samples, saved_samples, sides
from statespan.orchestration.worker import WorkerSpec
from statespan.search_spaces.loader import Space, load_space, names_of, pinned

GIB = 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A setting under trial: what runs it, and what it is to a key."""

    trial_id: str
    setting: Setting
    identity: MethodIdentity


@dataclass
class Plan:
    study: Study
    folder: Path
    """Of the checkpoint."""

    model: ModelIdentity
    facts: ModelFacts
    numerics: NumericMode
    tasks: Mapping[str, Benchmark]
    settings: Mapping[str, Mapping[str, Any]]
    """Task -> its benchmark's settings as the study gives them."""

    samples: SampleSet
    samples_from: str
    """Names what the samples were made from."""

    spaces: Mapping[str, Space]
    points: tuple[tuple[str, str, Mapping[str, Any]], ...]
    """(origin, method, params) to try first."""

    suggested: Mapping[str, Any] | None = None
    """What the study's folder keeps of spaces that the analysis narrowed (`space: auto`)."""

    _methods: dict[str, Method] = field(default_factory=dict)
    _facts_of_task: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def scope(self) -> str:
        return scope_digest(self.model, self.numerics)

    @cached_property
    def baseline(self) -> Candidate:
        return Candidate(trial_id=BASELINE, setting=Setting(method="vanilla"), identity=self.identify("vanilla", {}))

    def identify(self, method: str, params: Mapping[str, Any]) -> MethodIdentity:
        """What a setting is to a key. Raises UserError where it cannot be built for this model."""
        built = self.method(method, params)
        return MethodIdentity(name=method, params=canonical_params(method, params), artifacts=dict(built.artifacts))

    def candidate(self, trial_id: str, method: str, params: Mapping[str, Any]) -> Candidate:
        identity = self.identify(method, params)
        setting = Setting(method=method, params=dict(params), artifacts=dict(identity.artifacts))
        return Candidate(trial_id=trial_id, setting=setting, identity=identity)

    def method(self, name: str, params: Mapping[str, Any]) -> Method:
        text = json.dumps([name, dict(params)], sort_keys=True, default=str)
        if text not in self._methods:
            while len(self._methods) >= 256:
                self._methods.pop(next(iter(self._methods)))
            self._methods[text] = build_method(name, params, self.facts)
        return self._methods[text]

    def first_changed(self, setting: Setting, entry: Entry) -> int | None:
        """The first layer in which a setting differs from vanilla on a sample; None where it never does."""
        method = self.method(setting.method, setting.params)
        lengths = {entry.prompt_tokens}
        if self.tasks[entry.task].scope == "window":
            lengths = {entry.prompt_tokens + tokens - 1 for tokens in entry.target_tokens}
        layers = [method.first_layer_changed(length) for length in lengths]
        return min((layer for layer in layers if layer is not None), default=None)

    def key(self, candidate: Candidate, entry: Entry) -> str:
        same = self.first_changed(candidate.setting, entry) is None
        identity = self.baseline.identity if same else candidate.identity
        return result_key(self.scope, identity, self.task_facts(entry.task), entry.digest)

    def task_facts(self, task: str) -> dict[str, Any]:
        if task not in self._facts_of_task:
            benchmark = self.tasks[task]
            self._facts_of_task[task] = benchmark_facts(benchmark, resolved_settings(benchmark))
        return self._facts_of_task[task]

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Task -> least and greatest possible score: a share in [0, 1], or a log-likelihood up to 0."""
        return {
            task: (-float("inf"), 0.0) if "nats" in benchmark.metric else (0.0, 1.0)
            for task, benchmark in self.tasks.items()
        }

    def objective(self) -> dict[str, Any]:
        """What two told values must have in common to be compared."""
        return {
            "scope": self.scope,
            "train_length": self.facts.train_length,
            "samples": self.samples.digest("search"),
            "tasks": {name: [self.task_facts(name), task.weight] for name, task in self.study.benchmarks.items()},
            "racing": self.study.racing.model_dump(mode="json"),
            "objectives": [one.metric for one in self.study.search.objectives],
            "seed": self.study.search.seed,
        }

    def worker_spec(self, memory_fraction: float = 1.0) -> WorkerSpec:
        workers, numerics = self.study.workers, self.study.numerics
        return WorkerSpec(
            model=str(self.folder.resolve()) if Path(self.study.model).is_dir() else self.study.model,
            revision=self.study.revision,
            digest=self.model.weights,
            train_length=self.study.train_length,
            dtype=self.numerics.dtype,
            device=self.numerics.device,
            deterministic=numerics.deterministic,
            batch_tokens=numerics.batch_tokens,
            tasks={name: (task.benchmark or name, task.settings) for name, task in self.study.benchmarks.items()},
            threads=workers.threads,
            store_bytes=int(workers.store_gib * GIB),
            gpu_store_bytes=int(workers.gpu_store_gib * GIB) if self.numerics.device == "cuda" else 0,
            memory_fraction=memory_fraction,
        )


def make_plan(study: Study, device: str | None = None) -> Plan:
    """Fill in everything. Raises UserError for the first thing that is wrong.

    Args:
        study: the checked study file.
        device: cpu or cuda, where it is known; else what `numerics.device` and this machine say.
    """
    from statespan.models.checkpoint import digest as digest_of
    from statespan.models.checkpoint import find, read_config
    from statespan.models.config import ModelConfig
    from statespan.models.tokenizer import Tokenizer

    search = study.search
    check_sampler(search.sampler, search.sampler_options, len(search.objectives))
    folder = find(study.model, study.revision)
    raw = read_config(folder)
    config = ModelConfig.read(raw)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    weights = digest_of(folder)
    facts = ModelFacts(
        kind=config.kind,
        n_layer=config.n_layer,
        channels=config.channels,
        d_model=config.d_model,
        train_length=study.train_length or raw.get("statespan", {}).get("train_length"),
        digest=weights,
        folder=folder,
    )
    tasks = {name: build_benchmark(task.benchmark or name, task.settings) for name, task in study.benchmarks.items()}
    samples, made_from = study_samples(study, tasks, tokenizer)
    spaces, suggestions, suggested = study_spaces(study, facts, [entry.length for entry in samples.entries])
    return Plan(
        study=study,
        folder=folder,
        model=ModelIdentity(weights=weights, tokenizer=tokenizer.digest, train_length=facts.train_length),
        facts=facts,
        numerics=numeric_mode(study, device),
        tasks=tasks,
        settings={name: task.settings for name, task in study.benchmarks.items()},
        samples=samples,
        samples_from=made_from,
        spaces=spaces,
        points=study_points(study, spaces, suggestions),
        suggested=suggested,
    )


def numeric_mode(study: Study, device: str | None) -> NumericMode:
    """auto is decided here, once, so that the key says what really runs."""
    import torch

    numerics = study.numerics
    kind = device or numerics.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and device is None and study.cluster.address == "local" and not torch.cuda.is_available():
        raise UserError("numerics.device is cuda and this machine has no CUDA device; use cpu, auto, or a cluster")
    dtype = numerics.dtype
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else "bfloat16"
    return NumericMode(
        dtype=dtype, device=kind, deterministic=numerics.deterministic, batch_tokens=numerics.batch_tokens
    )


def resolved_settings(benchmark: Benchmark) -> dict[str, Any]:
    """A benchmark's settings, defaults included, as JSON."""
    dump = getattr(benchmark, "model_dump", None)
    return dict(dump(mode="json")) if dump is not None else {}


def study_samples(study: Study, tasks: Mapping[str, Benchmark], tokenizer: Any) -> tuple[SampleSet, str]:
    """The samples, from the study's folder where they are already there, and a name for what they were made from."""
    made_from = digest(
        {
            "tokenizer": tokenizer.digest,
            "tasks": {
                name: [one.name, one.version, resolved_settings(one), dict(one.provenance())]
                for name, one in tasks.items()
            },
            "heldout": study.selection.heldout,
            "seed": study.search.seed,
        }
    )
    earlier = saved_samples(study.folder / "samples.parquet")
    if earlier is not None and earlier[1] == made_from:
        return earlier[0], made_from
    samples = build_samples(
        tasks,
        tokenizer,
        heldout=study.selection.heldout,
        seed=study.search.seed,
        assigned=sides(earlier[0]) if earlier is not None else None,
    )
    return samples, made_from


def study_spaces(
    study: Study, facts: ModelFacts, lengths: Sequence[int]
) -> tuple[dict[str, Space], dict[str, Suggestion], dict[str, Any] | None]:
    """Every method's space with the model's facts filled in; of `space: auto` also what the analysis suggests, and
    what the study's folder keeps of it."""
    names = names_of(facts, max(lengths))
    spaces, shipped = dict[str, Space](), dict[str, Space]()
    for method, choice in study.methods.items():
        if facts.kind not in method_class(method).supports:
            acts_on = " and ".join(sorted(method_class(method).supports))
            raise UserError(f"methods.{method} acts on {acts_on} layers; {study.model!r} has {facts.kind}")
        if choice.space == AUTO:
            shipped[method] = load_space(method, names)
        path = Path(choice.space) if choice.space not in (None, AUTO) else None
        spaces[method] = load_space(method, names, path=path, params=choice.params)
    if not shipped:
        return spaces, {}, None
    found = auto_spaces(shipped, facts, lengths, study.folder, lambda: analysis_of(facts, study.model, study.revision))
    for method, one in found.items():
        params = {**one.params, **study.methods[method].params}  # what the study file says itself stands
        spaces[method] = load_space(method, names, params=params)
    return spaces, found, record(found, shipped, facts, lengths)


def study_points(
    study: Study, spaces: Mapping[str, Space], suggestions: Mapping[str, Suggestion] = MappingProxyType({})
) -> tuple[tuple[str, str, Mapping[str, Any]], ...]:
    """What to try first: suggested settings, the methods' published ones in turn, then those of the study file."""
    suggested = [
        ("suggested", method, point)
        for method, one in suggestions.items()
        for point in within(spaces[method], one.enqueue)
    ]
    published = [
        ("published", method, point)
        for method, choice in study.methods.items()
        if choice.published
        for point in _possible(spaces[method], method in suggestions)
    ]
    enqueued = [
        ("enqueued", method, point)
        for method, choice in study.methods.items()
        for point in pinned(spaces[method], choice.enqueue)
    ]
    return (*suggested, *published, *enqueued)


def _possible(space: Space, narrowed: bool) -> Sequence[Mapping[str, Any]]:
    """The published settings; of a narrowed space those that lie in it."""
    return within(space, space.published) if narrowed else space.published
