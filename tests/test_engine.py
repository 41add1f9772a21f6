import queue
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan.errors import UserError
from statespan.models.generate import Decoding, generate, score
from statespan.models.hook import VANILLA, Method
from statespan.models.runner import Runner
from statespan.models.tokenizer import Tokenizer
from statespan.orchestration.decode_rows import JoinedDeck, TextStream
from statespan.orchestration.engine import EngineFull, Failed, Limits, PromptRead, Request, ServingEngine
from statespan.orchestration.meter import Meter
from tests.tiny import byte_tokenizer, tiny_model

KINDS = ["mamba1", "mamba2"]
MODELS = {kind: tiny_model(kind, dtype=torch.float32) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return Tokenizer(path)


@pytest.fixture
def engine_of(tokenizer):
    engines = []

    def make(kind="mamba1", method=VANILLA, deterministic=True, **limits):
        engines.append(ServingEngine(MODELS[kind], tokenizer, method, Limits(**limits), deterministic))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def prompt(length, seed=0):
    return tuple(torch.randint(1, 257, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def request(length=12, seed=0, tokens=8, **more):
    chosen = {key: more.pop(key) for key in ("stop", "temperature", "top_p") if key in more}
    decoding = Decoding(max_new_tokens=tokens, **chosen)
    return Request(prompt_ids=prompt(length, seed), decoding=decoding, **more)


class Heard:
    """Collects a request's events and waits for its end."""

    def __init__(self, n=1):
        self.events, self.left = queue.Queue(), n

    def __call__(self, event):
        self.events.put(event)

    def all(self):
        got = []
        while self.left:
            got.append(self.events.get(timeout=60))
            self.left -= isinstance(got[-1], Failed) or getattr(got[-1], "finish", None) is not None
        return got


def complete(engine, *requests):
    heard = [Heard(one.n) for one in requests]
    engine.submit(requests, heard)
    return [one.all() for one in heard]


def ids_of(events):
    return [event.ids for event in events if getattr(event, "finish", None)]


def alone(kind, one, tokenizer, method=VANILLA):
    (row,) = generate(Runner(MODELS[kind]), method, [one.prompt_ids], [one.decoding], tokenizer).rows
    return row


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_rows_are_bit_for_bit_the_offline_ones_whatever_their_neighbours(kind, engine_of, tokenizer):
    requests = [request(5 + 9 * i, i, 3 + 4 * i, logprobs=0) for i in range(5)]
    for one, events in zip(requests, complete(engine_of(kind, max_rows=3), *requests), strict=True):
        offline = alone(kind, one, tokenizer)
        scores = [score for event in events[1:] for score in event.scores]
        assert ids_of(events) == [offline.ids] and "".join(e.text for e in events[1:]) == offline.text
        assert [score.logprob for score in scores] == list(offline.logprobs)  # equal, not close


@pytest.mark.parametrize("kind", KINDS)
def test_joined_rows_come_and_go_and_agree_with_the_offline_ones_to_rounding(kind, engine_of, tokenizer):
    requests = [request(5 + 9 * i, i, 3 + 4 * i, logprobs=0) for i in range(5)]
    engine = engine_of(kind, deterministic=False, max_rows=3)
    for one, events in zip(requests, complete(engine, *requests), strict=True):
        offline = alone(kind, one, tokenizer)
        logprobs = [score.logprob for event in events[1:] for score in event.scores]
        # sums of a few hundred float32 products in another order
        assert ids_of(events) == [offline.ids] and logprobs == pytest.approx(offline.logprobs, abs=1e-4)
    assert isinstance(engine._deck, JoinedDeck) and engine._deck.steps is None
    steps = engine.meter.value("statespan_decode_steps_total")
    assert steps < engine.meter.value("statespan_generated_tokens_total") - 5  # rows shared steps


def test_a_late_request_joins_rows_that_are_decoding_already(engine_of):
    engine, first_heard = engine_of(), threading.Event()
    slow, quick = Heard(), Heard()

    def tell(event):
        slow(event)
        first_heard.set()

    engine.submit([request(tokens=400)], [tell])
    first_heard.wait(30)
    engine.submit([request(tokens=2, seed=1)], [quick])
    quick.all()
    assert slow.left and len(slow.events.queue) < 400
    slow.all()


def test_choices_share_one_prefill_and_differ_by_their_seeds(engine_of, tokenizer):
    engine = engine_of()
    (events,) = complete(engine, request(temperature=1.0, n=3))
    again = alone("mamba1", request(temperature=1.0), tokenizer)
    by_choice = {event.choice: event.ids for event in events[1:] if event.finish}
    assert by_choice[0] == again.ids and len(set(by_choice.values())) == 3
    assert engine.meter.value("statespan_prompt_tokens_total") == 12


def test_a_full_queue_refuses_all_of_a_request_and_says_when_to_come_back(engine_of):
    gate = threading.Event()

    class Slow(Method):
        def prefill(self, runner, prompt, tail=1):
            gate.wait(30)
            return super().prefill(runner, prompt, tail)

    engine, heard = engine_of(method=Slow(), max_waiting=2), [Heard() for _ in range(3)]
    engine.submit([request(tokens=1)], heard[:1])
    while engine.meter.value("statespan_waiting"):
        threading.Event().wait(0.01)
    engine.submit([request(tokens=1)], heard[1:2])
    with pytest.raises(EngineFull) as full:
        engine.submit([request(), request()], [Heard(), Heard()])
    assert 1 <= full.value.retry_after <= 60
    engine.submit([request(tokens=1)], heard[2:])
    gate.set()
    assert [len(one.all()) for one in heard] == [2, 2, 2]
    assert engine.meter.value("statespan_requests_total", outcome="refused") == 2


def test_a_cancelled_request_leaves_its_rows_to_others(engine_of):
    engine, gone = engine_of(max_rows=1), Heard()
    (ticket,) = engine.submit([request(tokens=4_000)], [gone])
    assert isinstance(gone.events.get(timeout=30), PromptRead)
    ticket.cancel()
    assert len(ids_of(complete(engine, request(seed=1))[0])) == 1
    assert engine.meter.value("statespan_requests_total", outcome="cancelled") == 1
    assert engine.meter.value("statespan_generated_tokens_total") < 4_000


@pytest.mark.parametrize(
    "bad, message",
    [
        (Request(prompt_ids=(), decoding=Decoding(max_new_tokens=1)), "the prompt is empty"),
        (request(50), "the prompt has 50 tokens; this server takes at most 40"),
        (request(tokens=200), "max_tokens is 200; this server gives at most 100"),
        (request(n=9), "n is 9; this server decodes at most 4 completions at once"),
        (
            Request(prompt_ids=(3, 999), decoding=Decoding(max_new_tokens=1)),
            "token id 999 is not in the vocabulary",
        ),
    ],
)
def test_what_can_never_be_served_is_refused_by_name(bad, message, engine_of):
    engine = engine_of(max_prompt_tokens=40, max_new_tokens=100, max_rows=4)
    with pytest.raises(UserError, match=message):
        engine.submit([request(), bad], [Heard(), Heard()])
    assert engine.meter.value("statespan_requests_total", outcome="done") == 0


def test_a_request_that_fails_takes_no_other_with_it(engine_of):
    class Picky(Method):
        def prefill(self, runner, prompt, tail=1):
            if prompt.lengths == (13,):
                raise RuntimeError("out of luck")
            return super().prefill(runner, prompt, tail)

    good, bad = complete(engine_of(method=Picky()), request(12), request(13))
    assert len(ids_of(good)) == 1 and str(bad[-1].error) == "out of luck"


class Forgetful(Method):
    """Halves the second layer's steps, so that a prompt's continuation differs from vanilla's."""

    def first_layer_changed(self, length):
        return 1

    def before_scan(self, layer, inputs, seen=None):
        from dataclasses import replace

        scale = torch.full(inputs.dt.shape[::2], 0.5)
        return replace(inputs, dt_scale=scale) if layer == 1 else inputs


@pytest.mark.parametrize("start, scope", [(1, "window"), (7, "prefix")])
def test_echoed_log_probabilities_are_those_of_score(start, scope, engine_of):
    method, ids = Forgetful(), prompt(20)
    one = Request(prompt_ids=ids, decoding=Decoding(max_new_tokens=1), logprobs=2, score_prompt_from=start)
    (events,) = complete(engine_of(method=method), one)
    expected = score(Runner(MODELS["mamba1"]), method, ids[:start], [ids[start:]], scope).rows[0].total
    assert [s.token for s in events[0].scores] == list(ids[start:])
    assert sum(s.logprob for s in events[0].scores) == pytest.approx(expected, abs=1e-4)
    assert all(len(s.top) == 2 and s.top[0][1] >= max(s.logprob, s.top[1][1]) for s in events[0].scores)


def test_asking_for_log_probabilities_changes_no_token(engine_of):
    engine = engine_of(method=Forgetful())
    plain, scored = complete(engine, request(), request(logprobs=5, score_prompt_from=1))
    assert ids_of(plain) == ids_of(scored)


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab\ufffd", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_streamed_pieces_join_to_the_final_text_and_never_show_a_stop_string(text, stop):
    stream, sent = TextStream(stop), ""
    for upto in range(len(text) + 1):
        part = text[:upto]
        cuts = [at for one in stop if (at := part.find(one)) >= 0]
        final = bool(cuts) or upto == len(text)
        whole = part[: min(cuts)] if cuts else part
        # a decoder shows U+FFFD for a character that is not whole yet, and may replace it later
        sent += stream.take(whole, final)
        assert not any(one in sent for one in stop) and whole.startswith(sent)
        if final:
            break
    assert sent == whole


def test_a_character_of_several_tokens_is_streamed_whole():
    stream = TextStream(["€!"])
    assert [stream.take(part, False) for part in ("a", "a\ufffd", "a€", "a€b")] == ["a", "", "", "€b"]


def test_metrics_read_as_prometheus_text():
    meter = Meter({"jobs_total": ("counter", "Jobs."), "took_seconds": ("histogram", "Time.")})
    meter.add("jobs_total", 2, outcome="done")
    meter.observe("took_seconds", 0.3)
    meter.observe("took_seconds", 999.0)
    lines = meter.render().splitlines()
    assert 'jobs_total{outcome="done"} 2' in lines and "# TYPE took_seconds histogram" in lines
    assert 'took_seconds_bucket{le="0.25"} 0' in lines and 'took_seconds_bucket{le="0.5"} 1' in lines
    assert 'took_seconds_bucket{le="+Inf"} 2' in lines and "took_seconds_count 2" in lines


def test_a_closed_engine_tells_those_who_wait(engine_of):
    engine, heard = engine_of(), Heard()
    engine.submit([request(tokens=4_000)], [heard])
    engine.close()
    assert isinstance(heard.all()[-1], Failed)
    with pytest.raises(RuntimeError, match="stopped"):
        engine.submit([request()], [Heard()])
