"""The wire format of OpenAI's completions, as its clients and lm-eval's `local-completions` speak it.

What a base model cannot honour (`suffix`, penalties, `logit_bias`, `best_of` > n) is refused, never ignored. Three
fields are extensions: `return_token_ids` (as in vLLM) adds `token_ids` to each choice; `logprob_start_len` (as in
SGLang) says from which prompt position on echoed log-probabilities are wanted: tokens before it are read under the
method and get null, those from it on continue from the state it left; `ignore_eos` goes on past the end-of-text token.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from statespan.models.generate import UNFINISHED, Decoding
from statespan.models.tokenizer import Tokenizer
from statespan.orchestration.engine import Request
from statespan.orchestration.token_scores import TokenScore

Ids = list[Annotated[int, Field(strict=True)]]
MAX_PROMPTS = 128


class ApiError(Exception):
    """An answer that is no completion, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class CompletionBody(BaseModel):
    """The JSON body of POST /v1/completions. Defaults are OpenAI's."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str | None = None
    prompt: str | list[str] | Ids | list[Ids]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = 1.0
    n: Annotated[int, Field(ge=1)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    stop: str | list[str] | None = None
    seed: int | None = None
    user: str | None = None
    best_of: int | None = None
    suffix: str | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    return_token_ids: bool = False
    logprob_start_len: Annotated[int, Field(ge=1)] | None = None
    ignore_eos: bool = False

    def prompts(self) -> list[str] | list[Ids]:
        """One or several, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


def read_body(raw: bytes) -> CompletionBody:
    """Raises ApiError 400 naming the field."""
    try:
        body = CompletionBody.model_validate_json(raw)
    except ValidationError as invalid:
        raise _first_error(invalid) from None
    _refuse_unsupported(body)
    return body


def _first_error(invalid: ValidationError) -> ApiError:
    error = invalid.errors(include_url=False)[0]
    param = str(error["loc"][0]) if error["loc"] else None
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", param=param)
    if param == "prompt" and error["type"] != "missing":
        return ApiError(
            400, "prompt must be a string, a list of strings, or token ids (one list or several)", param=param
        )
    return ApiError(400, f"{param}: {error['msg']}" if param else f"the body is not JSON: {error['msg']}", param=param)


def _refuse_unsupported(body: CompletionBody) -> None:
    for name, value in (("suffix", body.suffix), ("logit_bias", body.logit_bias)):
        if value:
            raise ApiError(400, f"{name} is not supported", param=name)
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(body, name):
            raise ApiError(400, f"{name} must be 0; penalties are not supported", param=name)
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, f"best_of must equal n ({body.n or 1}); got {body.best_of}", param="best_of")
    if not 1 <= len(body.prompts()) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt must hold 1 to {MAX_PROMPTS} prompts; got {len(body.prompts())}", param="prompt")
    stops = stop_strings(body)
    if len(stops) > 16 or not all(stops):
        raise ApiError(400, "stop must be at most 16 strings, none of them empty", param="stop")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0 and echo is off: there is nothing to return", param="max_tokens")
    if body.logprob_start_len is not None and not (body.echo and body.logprobs is not None):
        raise ApiError(400, "logprob_start_len needs echo and logprobs", param="logprob_start_len")


def stop_strings(body: CompletionBody) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def engine_requests(body: CompletionBody, tokenizer: Tokenizer) -> list[Request]:
    """One a prompt, in order."""
    temperature = 1.0 if body.temperature is None else body.temperature
    decoding = Decoding(
        max_new_tokens=16 if body.max_tokens is None else body.max_tokens,
        stop=stop_strings(body),
        eos_id=None if body.ignore_eos else tokenizer.eos_id,
        temperature=temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=(random.getrandbits(62) if body.seed is None else body.seed) if temperature > 0 else 0,
    )
    start = (body.logprob_start_len or 1) if body.echo and body.logprobs is not None else None
    ids = [tuple(tokenizer.encode(one)) if isinstance(one, str) else tuple(one) for one in body.prompts()]
    return [
        Request(
            prompt_ids=prompt_ids, decoding=decoding, n=body.n or 1, logprobs=body.logprobs, score_prompt_from=start
        )
        for prompt_ids in ids
    ]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token as text, or its spelling in the vocabulary where it is no whole character or shows as nothing."""
    text = tokenizer.decode([token])
    return tokenizer.token(token) if not text or UNFINISHED in text else text


class LogprobsWriter:
    """OpenAI's legacy `logprobs` object for one choice, piece by piece; offsets count from the choice's first text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._length = 0
        """Characters written, up to the last whole one."""

        self._part: list[int] = []
        """Tokens since then: the bytes of a character that is not whole yet."""

    def write(self, scores: Sequence[TokenScore | int]) -> dict[str, Any]:
        """Scores in order; a bare id is a token whose log-probability was not computed."""
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score in scores:
            token = score if isinstance(score, int) else score.token
            text = token_text(self.tokenizer, token)
            out["tokens"].append(text)
            out["token_logprobs"].append(None if isinstance(score, int) else score.logprob)
            out["top_logprobs"].append(None if isinstance(score, int) else self._top(score, text))
            out["text_offset"].append(self._advance(token))
        return out

    def _advance(self, token: int) -> int:
        """Where a token's text begins; tokens of one character begin at the same place."""
        begins = self._length
        self._part.append(token)
        text = self.tokenizer.decode(self._part)
        if not text.endswith(UNFINISHED) or len(self._part) >= 4:  # UTF-8 has at most four bytes
            self._length, self._part = self._length + len(text), []
        return begins

    def _top(self, score: TokenScore, text: str) -> dict[str, float]:
        """The most likely tokens and the chosen one; of two that spell the same the likelier stays."""
        top: dict[str, float] = {}
        for token, logprob in score.top:
            top.setdefault(token_text(self.tokenizer, token), logprob)
        top.setdefault(text, score.logprob)
        return top
