"""The check before going live: held-out samples must come out of the server token by token as the sweep had them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from itertools import zip_longest
from queue import SimpleQueue
from typing import Any

from statespan.errors import UserError
from statespan.models.generate import Decoding
from statespan.orchestration.engine import Failed, Request, ServingEngine
from statespan.orchestration.openai_api import CHECK_HEADER
from statespan.orchestration.served import ServedSample

CHECK_SECONDS = 600.0


class CheckFailed(Exception):
    """A server gave another token than the sweep did. It must not go live."""


def engine_ids(engine: ServingEngine, sample: ServedSample) -> tuple[int, ...]:
    """What the engine itself generates for a sample."""
    events: SimpleQueue[Any] = SimpleQueue()
    decoding = Decoding(max_new_tokens=sample.max_new_tokens, stop=sample.stop, eos_id=engine.tokenizer.eos_id)
    engine.submit([Request(prompt_ids=sample.prompt_ids, decoding=decoding)], [events.put])
    while True:
        event = events.get()
        if isinstance(event, Failed):
            raise event.error
        if getattr(event, "finish", None):
            ids: tuple[int, ...] = event.ids
            return ids


def compare(sample: ServedSample, got: tuple[int, ...], text: str | None = None) -> None:
    """Raises CheckFailed at the first difference."""
    if got != sample.ids:
        pairs = zip_longest(got, sample.ids)
        at = next(i for i, (served, swept) in enumerate(pairs) if served != swept)
        raise CheckFailed(
            f"held-out sample {sample.id} differs from the sweep's at token {at}: served {list(got[at : at + 5])}, "
            f"swept {list(sample.ids[at : at + 5])}; not going live. Serve it with the dtype, device and versions "
            "of the sweep, sweep again with these, or give --model, --method and --set to serve it unchecked"
        )
    if text is not None and text != sample.text:
        raise CheckFailed(f"held-out sample {sample.id}: tokens agree, text does not: {text!r}, swept {sample.text!r}")


def replay(url: str, samples: tuple[ServedSample, ...], api_key: str | None, check: str) -> None:
    """Repeat every held-out sample over HTTP; the first one streamed as well."""
    for i, sample in enumerate(samples):
        body = {
            "prompt": list(sample.prompt_ids),
            "max_tokens": sample.max_new_tokens,
            "temperature": 0,
            "stop": list(sample.stop) or None,
            "return_token_ids": True,
        }
        choice = json.loads(_post(url, body, api_key, check))["choices"][0]
        compare(sample, tuple(choice["token_ids"]), choice["text"])
        if i == 0:
            frames = _post(url, body | {"stream": True}, api_key, check).decode().split("\n\n")
            chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames if frame.startswith("data: {")]
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            compare(sample, tuple(chunks[-1]["choices"][0]["token_ids"]), text)


def _post(url: str, body: dict[str, Any], api_key: str | None, check: str) -> bytes:
    headers = {"Content-Type": "application/json", CHECK_HEADER: check}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=CHECK_SECONDS) as response:
            answer: bytes = response.read()
            return answer
    except urllib.error.HTTPError as error:
        raise CheckFailed(f"the check got HTTP {error.code}: {error.read().decode(errors='replace')[:300]}") from None
    except OSError as error:
        raise UserError(f"nothing answers at {url} ({error}); is the port taken by another program?") from None
