"""The server as it is deployed: Ray Serve replicas, the check that precedes going live, the command line."""

import asyncio
import json
import socket
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch

from statespan import cli
from statespan.errors import UserError
from statespan.methods.table import ModelFacts, build_method
from statespan.models.checkpoint import load_model
from statespan.models.generate import Decoding, generate
from statespan.models.runner import Runner
from statespan.orchestration.engine import Limits
from statespan.orchestration.openai_api import key_digest
from statespan.orchestration.served import (
    ServedConfig,
    ServedMethod,
    ServedModel,
    ServedNumerics,
    ServedSample,
    by_hand,
    find_config,
    load_config,
)
from tests.tiny import save_checkpoint

METHOD = ServedMethod(name="decimamba", params={"first_layer": 1, "base_tokens": 16, "beta": 0.5})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


def sample(folder, seed, tokens=10):
    """A prompt long enough for the method to act, with what the offline path makes of it."""
    loaded = load_model(str(folder))
    make = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(1, 257, (40 + 7 * seed,), generator=make).tolist())
    method = build_method(METHOD.name, METHOD.params, ModelFacts.of(loaded))
    decoding = Decoding(max_new_tokens=tokens, stop=("\n",), eos_id=loaded.tokenizer.eos_id)
    (row,) = generate(Runner(loaded.model), method, [ids], [decoding], loaded.tokenizer).rows
    return ServedSample(id=f"s{seed}", prompt_ids=ids, max_new_tokens=tokens, stop=("\n",), ids=row.ids, text=row.text)


@pytest.fixture(scope="module")
def config(folder):
    digest = load_model(str(folder)).digest
    return ServedConfig(
        study="tiny-study",
        model=ServedModel(ref=str(folder), digest=digest),
        method=METHOD,
        numerics=ServedNumerics(dtype="float32", device="cpu"),
        samples=(sample(folder, 0), sample(folder, 1)),
    )


def with_wrong_token(config, at=3):
    first = config.samples[0]
    ids = (*first.ids[:at], (first.ids[at] + 1) % 257, *first.ids[at + 1 :])
    return config.model_copy(update={"samples": (first.model_copy(update={"ids": ids}),)})


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def post(url, body, key=None):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


@pytest.fixture(scope="module")
def live(ray_cluster, config):
    """One deployment for the module."""
    from ray import serve

    from statespan.orchestration.serve import Deployment, deploy, withdraw

    how = Deployment(port=free_port(), api_key="s3cret-s3cret-s3cret", cpus=0.1, limits=Limits(max_prompt_tokens=500))
    deploy(config, how)
    yield how
    withdraw(how.app)
    serve.shutdown()


@pytest.mark.ray
def test_a_served_completion_is_the_offline_one_and_streams_to_the_same_text(live, config):
    for one in config.samples:
        body = {"prompt": list(one.prompt_ids), "max_tokens": 10, "temperature": 0, "stop": ["\n"]}
        whole = json.loads(post(live.url, body | {"return_token_ids": True}, live.api_key))
        assert whole["choices"][0]["text"] == one.text and tuple(whole["choices"][0]["token_ids"]) == one.ids
        frames = post(live.url, body | {"stream": True}, live.api_key).strip().split("\n\n")
        assert frames.pop() == "data: [DONE]"
        parts = [json.loads(frame.removeprefix("data: "))["choices"][0]["text"] for frame in frames]
        assert "".join(parts) == one.text


@pytest.mark.ray
def test_the_model_card_says_what_was_measured(live, config):
    request = urllib.request.Request(f"{live.url}/v1/models", headers={"Authorization": f"Bearer {live.api_key}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        (card,) = json.load(response)["data"]
    assert card["id"] == "tiny+decimamba" and card["max_model_len"] == 500
    assert card["statespan"]["checked_samples"] == 2 and card["statespan"]["params"] == METHOD.params


@pytest.mark.ray
def test_through_the_proxy_a_client_without_the_key_gets_401_and_a_long_prompt_400(live):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(live.url, {"prompt": "a"})
    assert refused.value.code == 401
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(live.url, {"prompt": [1] * 501}, live.api_key)
    assert refused.value.code == 400 and json.load(refused.value)["error"]["code"] == "context_length_exceeded"


@pytest.mark.ray
def test_hanging_up_on_the_proxy_frees_the_row(live):
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a", "max_tokens": 4_000, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {live.api_key}\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200 OK" in client.recv(100)
    request = urllib.request.Request(f"{live.url}/metrics", headers={"Authorization": f"Bearer {live.api_key}"})
    for _ in range(100):
        with urllib.request.urlopen(request, timeout=30) as response:
            if 'statespan_requests_total{outcome="cancelled"} 1' in response.read().decode():
                return
    pytest.fail("the row decodes on for nobody")


@pytest.mark.ray
@pytest.mark.slow
def test_one_wrong_token_keeps_a_server_from_going_live(ray_cluster, config, live):
    from ray import serve

    from statespan.orchestration.replay import CheckFailed
    from statespan.orchestration.serve import Deployment, deploy

    how = Deployment(app="wrong", route="/wrong", port=live.port, cpus=0.1)
    with pytest.raises(CheckFailed, match=r"sample s0 differs from the sweep's at token 3: served \[.*not going live"):
        deploy(with_wrong_token(config), how)
    assert "wrong" not in serve.status().applications


def alone(config):
    """One replica without Serve and without a gate."""
    from statespan.orchestration.serve import CompletionServer

    settings = {"limits": {}, "served_name": "x", "key_digest": None, "check_digest": key_digest("sesame")}
    return CompletionServer(config.model_dump_json(), settings | {"gate": None, "deployment_id": "1"})


def test_a_replica_that_was_started_later_is_checked_by_itself(config):
    from statespan.orchestration.replay import CheckFailed

    with pytest.raises(CheckFailed, match="differs"):
        alone(with_wrong_token(config))


class FakeGate:
    """The gate actor's calls, answered at once."""

    def __init__(self):
        self.opened = set()
        self.open = SimpleNamespace(remote=self.opened.add)
        self.is_open = SimpleNamespace(remote=self._is_open)

    async def _is_open(self, deployment_id):
        return deployment_id in self.opened


def test_replicas_that_missed_the_opening_open_later_and_tell_a_gate_that_forgot(config):
    server, gate = alone(config), FakeGate()
    server._gate, server._live = gate, False
    asyncio.run(server.check_health())
    assert not server.admits(None) and not server.admits("wrong") and server.admits("sesame")
    gate.opened.add("1")
    asyncio.run(server.check_health())
    assert server.admits(None)
    gate.opened.clear()
    asyncio.run(server.check_health())
    assert gate.opened == {"1"}
    server.engine.close()
    with pytest.raises(RuntimeError, match="decode thread has ended"):
        asyncio.run(server.check_health())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": {"digest": "0" * 64}}, "weights of .* sweep measured 000000000000"),
        ({"model": {"tokenizer_digest": "1" * 64}}, "tokenizer of .* sweep measured 111111111111"),
        ({"method": {"artifacts": {"calibration": "2" * 64}}}, "calibration of decimamba has sha256 missing"),
        ({"numerics": {"device": "cuda"}}, "runs on a GPU and this replica has none"),
    ],
)
def test_what_is_not_what_was_measured_is_refused(change, message, config):
    from statespan.orchestration.serve import load_engine

    if torch.cuda.is_available() and "GPU" in message:
        pytest.skip("there is a GPU")
    ((part, values),) = change.items()
    changed = config.model_copy(update={part: getattr(config, part).model_copy(update=values)})
    with pytest.raises(UserError, match=message):
        load_engine(changed, Limits())


@pytest.mark.parametrize("host, safe", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)])
def test_other_machines_are_served_only_with_a_key(host, safe):
    from statespan.orchestration.serve import Deployment

    assert Deployment(host=host, api_key="k").host == host
    if safe:
        Deployment(host=host)
    else:
        with pytest.raises(UserError, match="set STATESPAN_API_KEY to a secret"):
            Deployment(host=host)


def test_best_json_survives_a_round_trip_and_is_found_by_name_folder_or_path(config, tmp_path):
    home = tmp_path / "runs" / "tiny-study"
    home.mkdir(parents=True)
    config.save(home / "best.json")
    for target in ("tiny-study", str(home), str(home / "best.json")):
        assert load_config(find_config(target, tmp_path / "runs")) == config
    assert [path.name for path in home.iterdir()] == ["best.json"]


@pytest.mark.parametrize(
    "text, message",
    [("{", "is no best.json"), ('{"format": 2}', "format"), ('{"format": 1, "model": {"ref": "m"}}', "method")],
)
def test_a_broken_best_json_is_named(text, message, tmp_path):
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "best.json")


def test_parameters_given_by_hand_are_yaml():
    made = by_hand("mamba1-5m", "decimamba", ["beta=0.5", "first_layer=3"])
    assert made.method.params == {"beta": 0.5, "first_layer": 3} and made.served_name == "mamba1-5m+decimamba"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a study (its name, folder or best.json) or --model"),
        (["nothing"], "no study or best.json at 'nothing'"),
        (["x", "--model", "y"], "not both"),
        (["x", "--set", "a=1"], "go with --model"),
        (["--model", "mamba9"], "no checkpoint folder, hub id or shipped model named 'mamba9'"),
        (["--model", "mamba1-5m", "--method", "decimanba"], "did you mean 'decimamba'"),
        (["--model", "mamba1-5m", "--method", "decimamba", "--set", "beta=7"], "decimamba.beta"),
        (["--model", "mamba1-5m", "--host", "0.0.0.0"], "set STATESPAN_API_KEY"),
        (["--model", "mamba1-5m", "--detach"], "--detach needs --address"),
    ],
)
def test_a_wrong_command_ends_with_2_and_one_line_before_anything_starts(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("STATESPAN_API_KEY", raising=False)
    assert cli.run(["serve", *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_port_that_is_taken_is_named_before_anything_starts(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.run(["serve", "--model", "mamba1-5m", "--port", str(port)]) == 2
    assert f"port {port} on 127.0.0.1 is taken; choose another with --port" in capsys.readouterr().err
