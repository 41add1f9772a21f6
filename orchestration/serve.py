"""The winner behind HTTP: one Ray Serve deployment whose replicas each hold a `ServingEngine`.

Going live takes two proofs. Every replica repeats the held-out samples of best.json through its engine before it takes
a request, so one that is restarted or scaled up later is checked too. Then the deployer repeats them over HTTP, past a
closed gate, and opens it only if every token is the sweep's. HTTP is bound to loopback unless there is an API key:
Ray's own token does not cover what Serve serves.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import ray
import torch
from fastapi import FastAPI
from ray import serve

from statespan.errors import UserError
from statespan.methods.table import ModelFacts, build_method
from statespan.models.checkpoint import load_model
from statespan.orchestration.addresses import is_loopback
from statespan.orchestration.engine import Limits, ServingEngine
from statespan.orchestration.openai_api import build_app, key_digest
from statespan.orchestration.replay import CheckFailed, compare, engine_ids, replay
from statespan.orchestration.served import ServedConfig

NAMESPACE = "statespan"
# Serve kills a proxy that is not up in 5 s and then fails; a busy machine needs longer to start a process
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """How a configuration is served."""

    app: str = "statespan"
    """Name of the Serve application; deploying the same name again replaces it."""

    served_name: str | None = None
    """What clients ask for as `model`; default: model+method."""

    host: str = "127.0.0.1"
    port: int = 8000
    route: str = "/"
    """Path before /v1, where several applications share the cluster's one port."""

    api_key: str | None = None
    replicas: int = 1
    max_replicas: int | None = None
    """More than `replicas` scales with the number of requests."""

    cpus: float = 1.0
    gpus: float | None = None
    """Of each replica. None: one where the model runs on a GPU."""

    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.api_key and not is_loopback(self.host):
            raise UserError(
                f"host {self.host} can be reached from other machines, and there is no API key; "
                "set STATESPAN_API_KEY to a secret, or bind 127.0.0.1"
            )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise UserError(f"max replicas must be at least replicas ({self.replicas}); got {self.max_replicas}")

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{self.route.rstrip('/')}"


def load_engine(config: ServedConfig, limits: Limits) -> ServingEngine:
    """The engine of a configuration.

    Raises:
        UserError: weights, tokenizer or artifacts are not those the sweep measured, or there is no such device.
    """
    numerics, device = config.numerics, config.numerics.device or "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("the configuration runs on a GPU and this replica has none; give it one with --gpus 1")
    torch.set_num_threads(numerics.threads)
    loaded = load_model(config.model.ref, dtype=numerics.dtype, device=device, revision=config.model.revision)
    _same("weights of " + config.model.ref, config.model.digest, loaded.digest)
    _same("tokenizer of " + config.model.ref, config.model.tokenizer_digest, loaded.tokenizer.digest)
    facts = ModelFacts.of(loaded, config.model.train_length)
    method = build_method(config.method.name, config.method.params, facts)
    has: dict[str, str] = getattr(method, "artifacts", {})
    for name, digest in config.method.artifacts.items():
        _same(f"{name} of {config.method.name}", digest, has.get(name, "missing"))
    return ServingEngine(loaded.model, loaded.tokenizer, method, limits, numerics.deterministic)


def _same(what: str, wanted: str | None, found: str) -> None:
    if wanted is not None and wanted != found:
        raise UserError(
            f"the {what} has sha256 {found[:12]} here, the sweep measured {wanted[:12]}; "
            "put the measured files back, or sweep again"
        )


class Gate:
    """An actor that remembers which deployments have passed their check, for replicas that start later."""

    def __init__(self) -> None:
        self._live: set[str] = set()

    def open(self, deployment_id: str) -> None:
        self._live = {deployment_id}

    def is_open(self, deployment_id: str) -> bool:
        return deployment_id in self._live


def gate_for(app: str) -> Any:
    """The gate of an application; made where there is none."""
    options = {"name": f"statespan-gate-{app}", "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0}
    return ray.remote(Gate).options(get_if_exists=True, max_restarts=-1, **options).remote()


class CompletionServer:
    """One replica: an engine, and the facts that its HTTP app shows."""

    def __init__(self, config: str, settings: dict[str, Any]) -> None:
        """config: a ServedConfig as JSON; settings: plain values, see `deploy`."""
        served = ServedConfig.model_validate_json(config)
        self.engine = load_engine(served, Limits(**settings["limits"]))
        for sample in served.samples:
            compare(sample, engine_ids(self.engine, sample))
        self.name, self.created = settings["served_name"], int(time.time())
        self.key_digest: str | None = settings["key_digest"]
        self._check_digest: str = settings["check_digest"]
        self._gate, self._id = settings["gate"], settings["deployment_id"]
        self._live = self._gate is None or ray.get(self._gate.is_open.remote(self._id))
        self.facts = {
            "method": served.method.name,
            "params": served.method.params,
            "study": served.study,
            "model_digest": served.model.digest,
            "deterministic": served.numerics.deterministic,
            "checked_samples": len(served.samples),
        }

    def admits(self, check: str | None) -> bool:
        if self._live:
            return True
        return check is not None and secrets.compare_digest(key_digest(check), self._check_digest)

    def go_live(self) -> bool:
        """Called on every replica once the check over HTTP has passed."""
        self._live = True
        return True

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine has ended. A gate that was restarted learns anew who is live."""
        if not self.engine.alive:
            raise RuntimeError("the decode thread has ended")
        if self._gate is not None and self._live:
            self._gate.open.remote(self._id)
        elif self._gate is not None:
            self._live = await self._gate.is_open.remote(self._id)

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()


def application(config: ServedConfig, how: Deployment, settings: dict[str, Any]) -> serve.Application:
    """The Serve application of a configuration."""
    scaling: dict[str, Any] = {"num_replicas": how.replicas}
    if how.max_replicas is not None and how.max_replicas > how.replicas:
        target = max(how.limits.max_rows // 2, 1)
        bounds = {"min_replicas": how.replicas, "max_replicas": how.max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": target}}
    # the engine's own queue answers 429; Serve's must not fill before it
    room = how.limits.max_rows + how.limits.max_waiting + 16
    deployment = serve.deployment(
        name="completions",
        ray_actor_options={"num_cpus": how.cpus, "num_gpus": _gpus(config, how)},
        max_ongoing_requests=room,
        max_constructor_retry_count=1,
        health_check_period_s=10,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=30,
        **scaling,
    )(serve.ingress(_replica_app)(CompletionServer))
    app: serve.Application = deployment.bind(config.model_dump_json(), settings)
    return app


def placed(config: ServedConfig, cluster_gpus: float) -> ServedConfig:
    """The configuration with its device decided: a GPU where the cluster has one and nothing else was said."""
    if config.numerics.device is not None:
        return config
    device = "cuda" if cluster_gpus > 0 else "cpu"
    return config.model_copy(update={"numerics": config.numerics.model_copy(update={"device": device})})


def _gpus(config: ServedConfig, how: Deployment) -> float:
    if how.gpus is not None:
        return how.gpus
    return 1.0 if config.numerics.device == "cuda" else 0.0


def _replica_app() -> FastAPI:
    """Serve calls this inside a replica, after its CompletionServer was made."""
    return build_app(lambda: cast("CompletionServer", serve.get_replica_context().servable_object))


def deploy(config: ServedConfig, how: Deployment) -> Any:
    """Deploy, check over HTTP, open the gate. Returns the application's handle.

    Ray must be connected. On failure nothing is left deployed.

    Raises:
        UserError: what is deployed is not what was measured, or the port is taken.
        CheckFailed: a token differs.
    """
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    config = placed(config, resources.get("GPU", 0.0))
    deployment_id, check = secrets.token_hex(8), secrets.token_urlsafe(24)
    settings = {
        "limits": asdict(how.limits),
        "served_name": how.served_name or config.served_name,
        "key_digest": key_digest(how.api_key) if how.api_key else None,
        "check_digest": key_digest(check),
        "deployment_id": deployment_id,
        "gate": gate_for(how.app),
    }
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": how.host, "port": how.port},
        controller_options={"runtime_env": {"env_vars": PATIENCE}},
    )
    try:
        handle = _run(application(config, how, settings), how)
        replay(how.url, config.samples, how.api_key, check)
        ray.get(settings["gate"].open.remote(deployment_id))
        if not all(handle.broadcast("go_live").results(timeout_s=60)):
            raise AssertionError("a replica did not open")
    except BaseException:
        withdraw(how.app)
        raise
    return handle


def _run(app: serve.Application, how: Deployment) -> Any:
    """serve.run with what a replica refused as our own error, in one line."""
    try:
        return serve.run(app, name=how.app, route_prefix=how.route)
    except RuntimeError:
        status = serve.status().applications.get(how.app)
        told = "\n".join(one.message for one in status.deployments.values()) if status else ""
        for kind in (UserError, CheckFailed):
            _, mark, rest = told.partition(f"{kind.__module__}.{kind.__name__}: ")
            if mark:
                raise kind(rest.splitlines()[0]) from None
        raise


def withdraw(app: str) -> None:
    """Take an application and its gate away."""
    serve.delete(app)
    ray.kill(gate_for(app))
