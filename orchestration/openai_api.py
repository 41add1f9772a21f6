"""FastAPI app with OpenAI's /v1/models and /v1/completions on one engine, and /health and /metrics. Knows no Ray."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from statespan.errors import UserError
from statespan.orchestration import openai_schema as schema
from statespan.orchestration.decode_rows import Piece
from statespan.orchestration.engine import EngineFull, Event, Failed, PromptRead, ServingEngine, Ticket
from statespan.orchestration.openai_schema import ApiError, CompletionBody
from statespan.orchestration.token_scores import TokenScore

MAX_BODY_BYTES = 16 * 1024 * 1024
CHECK_HEADER = "x-statespan-check"


class Service(Protocol):
    """What the app needs of whoever runs the engine."""

    engine: ServingEngine
    name: str
    facts: dict[str, Any]
    """Shown with the model: method, parameters, digest."""

    created: int
    key_digest: str | None
    """sha256 of the API key; None asks for none."""

    def admits(self, check: str | None) -> bool:
        """False while the deploy check has not passed, except to the check itself."""
        ...


def key_digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(slots=True)
class Choice:
    """One choice of an answer as its pieces arrive."""

    index: int
    writer: schema.LogprobsWriter
    text: list[str] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    finish: str | None = None
    ids: tuple[int, ...] = ()


class Answer:
    """One request on its way: asks the engine, and turns its events into choices. Leaving cancels what still runs."""

    def __init__(self, engine: ServingEngine, body: CompletionBody, served_name: str) -> None:
        self.engine, self.body = engine, body
        self.requests = schema.engine_requests(body, engine.tokenizer)
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served_name}
        self.generated = 0
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._read: dict[int, PromptRead] = {}

    def submit(self) -> None:
        """Raises ApiError 400 or 429."""
        loop = asyncio.get_running_loop()

        def listener(prompt: int) -> Callable[[Event], None]:
            def tell(event: Event) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._events.put_nowait, (prompt, event))

            return tell

        try:
            self._tickets = self.engine.submit(self.requests, [listener(i) for i in range(len(self.requests))])
        except UserError as error:
            code = "context_length_exceeded" if "tokens; this server takes" in str(error) else None
            raise ApiError(400, str(error), param="prompt" if code else None, code=code) from None
        except EngineFull as full:
            headers = {"Retry-After": str(full.retry_after)}
            raise ApiError(429, str(full), kind="rate_limit_error", code="queue_full", headers=headers) from None

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, int, Piece]]:
        """(choice index of the answer, prompt, piece) until all choices have finished. Raises ApiError on failure."""
        n, left = self.requests[0].n, len(self.requests) * self.requests[0].n
        try:
            while left:
                prompt, event = await self._events.get()
                if isinstance(event, Failed):
                    raise _failure(event.error)
                if isinstance(event, PromptRead):
                    self._read[prompt] = event
                    continue
                left -= event.finish is not None
                self.generated += len(event.ids)
                yield prompt * n + event.choice, prompt, event
        finally:
            self.cancel()

    def write(self, choice: Choice, prompt: int, piece: Piece, first: bool) -> tuple[str, dict[str, Any] | None]:
        """The text and logprobs that a piece adds to its choice, the echoed prompt before the first one."""
        text = piece.text
        scores: list[TokenScore | int] = list(piece.scores)
        if first and self.body.echo:
            text = self._echo(prompt) + text
            ids, read = self.requests[prompt].prompt_ids, list(self._read[prompt].scores)
            scores = [*ids[: len(ids) - len(read)], *read, *scores]
        return text, choice.writer.write(scores) if self.body.logprobs is not None else None

    def _echo(self, prompt: int) -> str:
        given = self.body.prompts()[prompt]
        return given if isinstance(given, str) else self.engine.tokenizer.decode(given)

    def usage(self) -> dict[str, int]:
        read = sum(len(request.prompt_ids) for request in self.requests)
        return {"prompt_tokens": read, "completion_tokens": self.generated, "total_tokens": read + self.generated}

    def new_choice(self, index: int) -> Choice:
        return Choice(index, schema.LogprobsWriter(self.engine.tokenizer))

    async def whole(self) -> dict[str, Any]:
        choices: dict[int, Choice] = {}
        async for index, prompt, piece in self.pieces():
            first = index not in choices
            choice = choices.setdefault(index, self.new_choice(index))
            text, logprobs = self.write(choice, prompt, piece, first)
            choice.text.append(text)
            for key, values in (logprobs or {}).items():
                choice.logprobs.setdefault(key, []).extend(values)
            choice.finish, choice.ids = piece.finish, piece.ids
        shown = [self._shown(c, "".join(c.text), c.logprobs or None) for _, c in sorted(choices.items())]
        return {**self.head, "object": "text_completion", "choices": shown, "usage": self.usage()}

    def _shown(self, choice: Choice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        shown = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}
        return shown | {"token_ids": list(choice.ids)} if self.body.return_token_ids and choice.finish else shown

    async def frames(self) -> AsyncIterator[str]:
        """Server-sent events: a chunk a piece, usage where asked for, [DONE]. A failure ends them with its error."""
        options = self.body.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        choices: dict[int, Choice] = {}
        try:
            async for index, prompt, piece in self.pieces():
                first = index not in choices
                choice = choices.setdefault(index, self.new_choice(index))
                choice.finish, choice.ids = piece.finish, piece.ids
                shown = self._shown(choice, *self.write(choice, prompt, piece, first))
                yield _frame({**self.head, "object": "text_completion", "choices": [shown], **usage})
            if usage:
                yield _frame({**self.head, "object": "text_completion", "choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _frame(error.body)


def _frame(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _failure(error: BaseException) -> ApiError:
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ApiError(500, f"the completion failed: {reason}", kind="server_error")


async def _limited_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)


def authorize(service: Service, request: Request) -> None:
    """Raises ApiError 401 without the right key, 503 before the deploy check has passed."""
    if service.key_digest is not None:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key_digest(key.strip()), service.key_digest):
            message = "wrong or missing API key; send it as 'Authorization: Bearer KEY'"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)
    if not service.admits(request.headers.get(CHECK_HEADER)):
        message = "the server is repeating its held-out samples and is not live yet"
        raise ApiError(503, message, kind="server_error", code="not_live", headers={"Retry-After": "5"})


def model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "statespan",
        "max_model_len": service.engine.limits.max_prompt_tokens,
        "statespan": service.facts,
    }


def _known_model(service: Service, asked: str | None) -> None:
    if asked is not None and asked != service.name:
        message = f"no model named {asked!r} here; this server serves {service.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def build_app(service: Callable[[], Service]) -> FastAPI:
    """The app; `service` is asked at every request, for Serve builds the app before its replica."""
    app = FastAPI(title="statespan", docs_url=None, redoc_url=None)

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
        shaped = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(shaped.body, error.status_code)

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        mine = service()
        live = mine.admits(request.headers.get(CHECK_HEADER))
        return JSONResponse({"alive": mine.engine.alive, "live": live}, 200 if mine.engine.alive and live else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        authorize(service(), request)
        return PlainTextResponse(service().engine.meter.render(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        authorize(service(), request)
        return {"object": "list", "data": [model_card(service())]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        authorize(service(), request)
        _known_model(service(), name)
        return model_card(service())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        authorize(service(), request)
        body = schema.read_body(await _limited_body(request))
        _known_model(service(), body.model)
        answer = Answer(service().engine, body, service().name)
        answer.submit()
        if body.stream:
            return _Stream(answer)
        return JSONResponse(await _unless_gone(request, answer))

    return app


class _Stream(StreamingResponse):
    """Server-sent events; whoever stops listening stops the work."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.frames(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def _unless_gone(request: Request, answer: Answer) -> dict[str, Any]:
    """The whole answer, given up when the client hangs up."""
    work = asyncio.create_task(answer.whole())
    try:
        while not work.done():
            await asyncio.wait({work}, timeout=0.5)
            if not work.done() and await request.is_disconnected():
                raise ApiError(499, "the client hung up", code="cancelled")
        return work.result()
    finally:
        work.cancel()
        answer.cancel()
