"""OpenAI's wire format over real HTTP on a tiny model, without Ray."""

import json
import math
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
import uvicorn

from statespan.models.generate import Decoding, generate, score
from statespan.models.hook import VANILLA, Method
from statespan.models.runner import Runner
from statespan.models.tokenizer import Tokenizer
from statespan.orchestration.engine import Limits, ServingEngine
from statespan.orchestration.openai_api import build_app, key_digest
from tests.tiny import byte_tokenizer, tiny_model

MODEL = tiny_model(dtype=torch.float32)
TEXT = "The harbour lay still. "


class Slow(Method):
    """Vanilla that takes its time, so that a test can hang up meanwhile."""

    def prefill(self, runner, prompt, tail=1):
        time.sleep(0.05)
        return super().prefill(runner, prompt, tail)


class Stub:
    name, facts, created, key_digest = "tiny", {"method": "vanilla"}, 1, None

    def __init__(self, engine, key=None, live=True):
        self.engine, self.live = engine, live
        self.key_digest = key and key_digest(key)

    def admits(self, check):
        return self.live or check == "open sesame"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return Tokenizer(path)


@contextmanager
def running(service):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(lambda: service), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        service.engine.close()


@pytest.fixture(scope="module")
def url(tokenizer):
    limits = Limits(max_prompt_tokens=200, max_new_tokens=5_000, max_rows=4, max_waiting=8)
    with running(Stub(ServingEngine(MODEL, tokenizer, Slow(), limits))) as url:
        yield url


def call(url, path, body=None, **headers):
    """(status, parsed JSON or text, headers)"""
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, raw, got = response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        status, raw, got = error.code, error.read().decode(), error.headers
    return status, json.loads(raw) if raw.startswith("{") else raw, got


def complete(url, **body):
    status, answer, _ = call(url, "/v1/completions", {"prompt": TEXT, "temperature": 0} | body)
    assert status == 200, answer
    return answer


def stream(url, **body):
    status, raw, headers = call(url, "/v1/completions", {"prompt": TEXT, "temperature": 0, "stream": True} | body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    frames = raw.strip().split("\n\n")
    assert all(frame.startswith("data: ") for frame in frames) and frames[-1] == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


def offline(tokenizer, tokens=16, text=TEXT, **chosen):
    decoding = Decoding(max_new_tokens=tokens, eos_id=tokenizer.eos_id, **chosen)
    return generate(Runner(MODEL), VANILLA, [tokenizer.encode(text)], [decoding], tokenizer).rows[0]


def test_a_completion_has_openais_shape_and_the_offline_tokens(url, tokenizer):
    answer, row = complete(url, model="tiny", return_token_ids=True), offline(tokenizer)
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-") and answer["model"] == "tiny"
    expected = {"index": 0, "text": row.text, "logprobs": None, "finish_reason": row.finish, "token_ids": list(row.ids)}
    assert answer["choices"] == [expected]
    read = len(tokenizer.encode(TEXT))
    assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": 16, "total_tokens": read + 16}


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_chunks_join_to_the_whole_answer(n, url):
    body = {"temperature": 0.8, "seed": 5, "n": n, "logprobs": 2, "echo": True, "max_tokens": 12, "stop": ["a", "b!"]}
    whole = complete(url, **body)["choices"]
    chunks = stream(url, **body)
    for choice in whole:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        assert [chunk["finish_reason"] for chunk in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for key, values in choice["logprobs"].items():
            assert [one for chunk in mine for one in chunk["logprobs"][key]] == values


def test_usage_comes_last_when_a_stream_asks_for_it(url):
    chunks = stream(url, max_tokens=5, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 5


def test_prompts_may_be_text_or_tokens_one_or_several(url, tokenizer):
    ids, other = tokenizer.encode(TEXT), tokenizer.encode("Other")
    single, alone = complete(url, max_tokens=6)["choices"][0], complete(url, prompt="Other", max_tokens=6)["choices"][0]
    assert complete(url, prompt=ids, max_tokens=6)["choices"] == [single]
    for prompts in ([TEXT, "Other"], [ids, other]):
        choices = complete(url, prompt=prompts, max_tokens=6)["choices"]
        assert [c["index"] for c in choices] == [0, 1]
        assert [c["text"] for c in choices] == [single["text"], alone["text"]]


def test_text_ends_before_the_stop_string_and_so_do_its_log_probabilities(url, tokenizer):
    free = offline(tokenizer, 16).text
    stop = free[5:7]
    (choice,) = complete(url, stop=stop, logprobs=0)["choices"]
    assert choice["text"] == free[: free.find(stop)] and choice["finish_reason"] == "stop"
    assert all(offset < len(choice["text"]) for offset in choice["logprobs"]["text_offset"])
    assert "".join(c["choices"][0]["text"] for c in stream(url, stop=stop)) == choice["text"]


def test_the_same_seed_draws_the_same_text_and_no_seed_another(url):
    body = {"temperature": 1.0, "max_tokens": 20}
    seeded = [complete(url, seed=3, **body)["choices"][0]["text"] for _ in range(2)]
    assert seeded[0] == seeded[1] != complete(url, **body)["choices"][0]["text"]


def test_echoed_log_probabilities_let_a_harness_score_a_continuation(url, tokenizer):
    """What lm-eval's local-completions sends for a log-likelihood, and how it reads the answer."""
    context, continuation = tokenizer.encode(TEXT), tokenizer.encode("gulls")
    body = {"prompt": [[*context, *continuation]], "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1234}
    got = complete(url, **body)["choices"][0]["logprobs"]
    assert got["token_logprobs"][0] is None and got["top_logprobs"][0] is None
    parts = got["token_logprobs"][len(context) : -1]
    greedy = all(p == max(top.values()) for p, top in zip(parts, got["top_logprobs"][len(context) : -1], strict=True))
    expected = score(Runner(MODEL), VANILLA, context, [continuation]).rows[0]
    assert len(parts) == expected.tokens and greedy == expected.greedy
    assert math.isclose(sum(parts), expected.total, abs_tol=1e-4)  # float32 sums in another order
    text = complete(url, **body)["choices"][0]["text"]
    assert text.startswith(TEXT + "gulls")
    offsets = got["text_offset"]
    assert offsets[: len(context) + 2] == list(range(len(context) + 2))  # a byte a token


def test_a_scored_prefix_gets_nulls_and_max_tokens_0_only_echoes(url, tokenizer):
    ids = tokenizer.encode(TEXT)
    body = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0, "logprob_start_len": 10}
    (choice,) = complete(url, **body)["choices"]
    logprobs = choice["logprobs"]["token_logprobs"]
    assert choice["text"] == TEXT and choice["finish_reason"] == "length"
    assert logprobs[:10] == [None] * 10 and all(one < 0 for one in logprobs[10:]) and len(logprobs) == len(ids)


def test_models_are_listed_with_what_they_are(url):
    _, listed, _ = call(url, "/v1/models")
    assert listed["object"] == "list" and listed["data"][0]["id"] == "tiny"
    assert listed["data"][0]["statespan"] == {"method": "vanilla"}
    assert call(url, "/v1/models/tiny")[1] == listed["data"][0]
    status, answer, _ = call(url, "/v1/models/other")
    assert status == 404 and answer["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "body, status, param, message",
    [
        ({"prompt": "x" * 201}, 400, "prompt", "the prompt has 201 tokens; this server takes at most 200"),
        ({"prompt": ""}, 400, None, "the prompt is empty"),
        ({"prompt": {"a": 1}}, 400, "prompt", "prompt must be a string"),
        ({"prompt": [1, "a"]}, 400, "prompt", "prompt must be a string"),
        ({"prompt": [1, 9999]}, 400, None, "token id 9999 is not in the vocabulary"),
        ({}, 400, "prompt", "prompt: Field required"),
        ({"prompt": "a", "temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"prompt": "a", "max_tokens": 9_999}, 400, None, "max_tokens is 9999; this server gives at most 5000"),
        ({"prompt": "a", "n": 5}, 400, None, "n is 5"),
        ({"prompt": "a", "best_of": 3}, 400, "best_of", "best_of must equal n"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix", "suffix is not supported"),
        ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty", "must be 0"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
        ({"prompt": "a", "stop": [""]}, 400, "stop", "none of them empty"),
        ({"prompt": "a", "max_token": 5}, 400, "max_token", "unknown field 'max_token'"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "there is nothing to return"),
        ({"prompt": "a", "model": "gpt"}, 404, "model", "this server serves 'tiny'"),
        (b"{", 400, None, "the body is not JSON"),
    ],
)
def test_a_bad_request_gets_openais_error_naming_the_field(body, status, param, message, url):
    got, answer, _ = call(url, "/v1/completions", body)
    assert got == status and set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    assert message in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param


def test_an_unknown_path_or_verb_gets_the_same_shape(url):
    assert call(url, "/v1/nothing")[:2][0] == 404 and "error" in call(url, "/v1/nothing")[1]
    assert call(url, "/v1/completions")[0] == 405


def test_a_body_that_is_too_large_is_not_read_to_its_end(url):
    assert call(url, "/v1/completions", b'{"prompt": "' + b"x" * 17_000_000 + b'"}')[0] == 413


def test_a_full_queue_answers_429_with_retry_after(url):
    status, answer, headers = call(url, "/v1/completions", {"prompt": ["a"] * 9})
    assert status == 429 and int(headers["Retry-After"]) >= 1
    assert answer["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("streamed", [False, True])
def test_hanging_up_stops_the_work(streamed, tokenizer):
    limits = Limits(max_new_tokens=100_000, max_rows=1)
    service = Stub(ServingEngine(MODEL, tokenizer, VANILLA, limits))
    with running(service) as url:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": TEXT, "max_tokens": 100_000, "stream": streamed, "ignore_eos": True}).encode()
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            while not service.engine.meter.value("statespan_rows"):
                time.sleep(0.01)
        assert complete(url, max_tokens=2)["usage"]["completion_tokens"] == 2  # the only row is free again
        assert service.engine.meter.value("statespan_requests_total", outcome="cancelled") == 1


def test_without_the_key_nothing_but_health_answers(tokenizer):
    with running(Stub(ServingEngine(MODEL, tokenizer, VANILLA), key="s3cret")) as url:
        for path in ("/v1/models", "/v1/models/tiny", "/metrics"):
            assert call(url, path)[0] == 401
        for given in ("Bearer wrong", "s3cret", "Basic s3cret", "Bearer "):
            status, answer, headers = call(url, "/v1/completions", {"prompt": "a"}, Authorization=given)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key" and headers["WWW-Authenticate"]
        assert call(url, "/v1/models", Authorization="Bearer s3cret")[0] == 200
        assert call(url, "/health")[0] == 200


def test_until_the_deploy_check_has_passed_only_the_check_gets_in(tokenizer):
    service = Stub(ServingEngine(MODEL, tokenizer, VANILLA), live=False)
    with running(service) as url:
        status, answer, headers = call(url, "/v1/completions", {"prompt": "a"})
        assert status == 503 and answer["error"]["code"] == "not_live" and headers["Retry-After"]
        assert call(url, "/health")[0] == 503
        assert call(url, "/v1/completions", {"prompt": "a"}, **{"X-Statespan-Check": "open sesame"})[0] == 200
        service.live = True
        assert call(url, "/health")[0] == 200


def test_a_failure_in_the_middle_of_a_stream_ends_it_with_an_error_and_no_done(tokenizer):
    class Breaks(Method):
        def prefill(self, runner, prompt, tail=1):
            raise RuntimeError("the device fell off")

    with running(Stub(ServingEngine(MODEL, tokenizer, Breaks()))) as url:
        _, raw, _ = call(url, "/v1/completions", {"prompt": "a", "stream": True})
        assert "the device fell off" in raw and "[DONE]" not in raw
        assert call(url, "/v1/completions", {"prompt": "a"})[0] == 500


def test_metrics_count_what_was_served(url):
    complete(url, max_tokens=3)
    status, text, _ = call(url, "/metrics")
    assert status == 200 and 'statespan_requests_total{outcome="done"}' in text
    assert "# TYPE statespan_first_token_seconds histogram" in text
