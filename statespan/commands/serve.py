"""`statespan serve STUDY`: the winner, or any model and method, behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from statespan.orchestration.serve import Deployment
    from statespan.orchestration.served import ServedConfig


def serve(
    study: Annotated[
        str | None, typer.Argument(help="A finished study's name or folder, or its best.json. Or give --model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A shipped name, a checkpoint folder or a hub id.")] = None,
    method: Annotated[str, typer.Option(help="With --model: one of `statespan ls methods`.")] = "vanilla",
    params: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="With --model: a method parameter; repeatable."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="With --model: of a hub id.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of all studies.")] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="STATESPAN_API_KEY", help="What clients must send. The variable does not show in `ps`."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients ask for as `model`; default model+method.")] = None,
    address: Annotated[str, typer.Option(help="local starts Ray here; auto or host:port joins a cluster.")] = "local",
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Scale up to this many with the number of requests.")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0.0, help="CPUs Ray reserves for each replica.")] = 1.0,
    gpus: Annotated[
        float | None,
        typer.Option(min=0.0, help="GPUs of each replica; default 1 where it runs on a GPU; 0.5 puts two on one."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Completions a replica decodes at once.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Prompts that wait; more are answered 429.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are answered 400.")] = 131_072,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens a request may ask for.")] = 4_096,
    batched: Annotated[
        bool,
        typer.Option("--batched", help="Decode all rows in one batch: faster; equal to rounding, not bit for bit."),
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="With a cluster: leave it running there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when live.")] = False,
) -> None:
    """Serve completions over HTTP. A study's winner first repeats its held-out samples and goes live only if every
    token is the one that was measured.

    Example: statespan serve quickstart --port 8000
    """
    from statespan.errors import UserError
    from statespan.orchestration.addresses import port_is_free
    from statespan.orchestration.engine import Limits

    config = _config(study, model, method, params or [], revision, output)
    if batched:
        config = config.model_copy(update={"numerics": config.numerics.model_copy(update={"deterministic": False})})
    if detach and address == "local":
        raise UserError("--detach needs --address of a cluster: a local Ray ends with this command")
    from statespan.orchestration.serve import Deployment

    how = Deployment(
        served_name=name,
        host=host,
        port=port,
        api_key=api_key,
        replicas=replicas,
        max_replicas=max_replicas,
        cpus=cpus,
        gpus=gpus,
        limits=Limits(
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            max_rows=rows,
            max_waiting=queue,
        ),
    )
    if address == "local" and not port_is_free(host, port):
        raise UserError(f"port {port} on {host} is taken; choose another with --port")
    _run(config, how, address, detach, as_json)


def _config(
    study: str | None, model: str | None, method: str, params: list[str], revision: str | None, output: Path
) -> ServedConfig:
    from statespan.errors import UserError
    from statespan.methods.table import canonical_params
    from statespan.models.checkpoint import find
    from statespan.orchestration.served import by_hand, find_config, load_config

    if (study is None) == (model is None):
        raise UserError("give a study (its name, folder or best.json) or --model; not both")
    if study is not None:
        if params or method != "vanilla" or revision:
            raise UserError("--method, --set and --revision go with --model; a study's best.json says these itself")
        return load_config(find_config(study, output))
    assert model is not None
    config = by_hand(model, method, params, revision)
    canonical_params(method, config.method.params)
    find(model, revision)
    return config


def _run(config: ServedConfig, how: Deployment, address: str, detach: bool, as_json: bool) -> None:
    from statespan.config import Cluster
    from statespan.orchestration.ray_session import join, leave
    from statespan.orchestration.replay import CheckFailed
    from statespan.orchestration.serve import deploy, withdraw

    typer.echo(f"starting {config.served_name} …", err=True)
    join(Cluster(address=address))
    try:
        deploy(config, how)
        _announce(config, how, as_json)
        if not detach:
            _wait_for_signal()
            typer.echo("\nstopping: requests that run are finished first", err=True)
            withdraw(how.app)
    except CheckFailed as error:
        typer.echo(f"statespan: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        leave()


def _announce(config: ServedConfig, how: Deployment, as_json: bool) -> None:
    facts: dict[str, Any] = {
        "url": how.url,
        "model": how.served_name or config.served_name,
        "method": config.method.name,
        "params": config.method.params,
        "checked_samples": len(config.samples),
        "api_key": how.api_key is not None,
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    checked = f"{len(config.samples)} held-out samples repeated token by token"
    typer.echo(f"live at {how.url}/v1 as {facts['model']!r} ({checked if config.samples else 'nothing to check'})")
    key = " -H 'Authorization: Bearer '$STATESPAN_API_KEY" if how.api_key else ""
    body = json.dumps({"model": facts["model"], "prompt": "Once", "max_tokens": 20, "temperature": 0})
    typer.echo(f"  curl {how.url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'")


def _wait_for_signal() -> None:
    """Until Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(1.0):
        pass
