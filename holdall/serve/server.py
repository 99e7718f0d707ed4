"""What the endpoints do: from a request to the engine's, and from its pieces to an answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from holdall.contract import is_reserved
from holdall.contract.config import Config
from holdall.engine import request as engine_request
from holdall.engine.request import NOT_FINITE, QueueFullError, Sampling
from holdall.language_model import LanguageModel
from holdall.serve.answers import ChatForm, CompletionForm, Form, Json, Totals, Words
from holdall.serve.chat import ChatTemplate, TemplateError, is_text
from holdall.serve.http import ApiError, EventStream, until_gone
from holdall.serve.loop import EngineFailedError, EngineLike, EngineLoop, StoppedError, Stream
from holdall.serve.metrics import Metrics
from holdall.serve.schemas import Asked, ChatRequest, CompletionRequest
from holdall.serve.sessions import Sessions
from holdall.settings import PositiveInt

DRAWN = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Fields that requests and Sampling have in common."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Config):
    """What a server allows."""

    name: str = "holdall"
    """The model's name in requests and answers."""
    api_key: str = ""
    """What requests under /v1 must bear; "" for no key."""
    prompt_tokens: PositiveInt = 1 << 20
    """The most tokens of a prompt."""
    max_tokens: PositiveInt = 1 << 20
    """The most tokens that a request may ask for."""
    chat_tokens: PositiveInt = 512
    """The most tokens of a chat's answer where a request does not say how many."""
    texts: PositiveInt = 512
    """The most texts of a request: prompts times n."""
    body: PositiveInt = 32 << 20
    """The most bytes of a request."""
    session_body: PositiveInt = 4 << 30
    """The most bytes of a session that is uploaded."""
    sessions: str | None = None
    """The folder of named sessions; None keeps them in memory only."""
    session_memory: PositiveInt = 1 << 30
    """The most bytes of named sessions in memory; more are read from their files, or refused without any."""


class Server:
    """What the endpoints share."""

    def __init__(
        self, engine: EngineLike, model: LanguageModel, config: ServerConfig, folder: Path | None
    ) -> None:
        max_context = getattr(getattr(engine, "config", None), "max_context", None)
        self.model, self.config, self.tokenizer = model, config, model.tokenizer
        self.words = Words(model.tokenizer)
        self.end_word = model.tokenizer.decode([model.tokenizer.end])
        self.template = ChatTemplate.of_folder(folder, model.tokenizer)
        self.metrics = Metrics(config.name, lambda: self.loop.stats)
        self.loop = EngineLoop(engine, watch=self.metrics.watch, stepped=self.metrics.stepped)
        sessions = None if config.sessions is None else Path(config.sessions)
        self.sessions = Sessions(model, sessions, config.session_memory)
        self.described: Json = {
            "id": config.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "holdall",
            "max_model_len": config.prompt_tokens,
            "holdall": facts(engine, model, max_context),
        }

    def stop(self) -> None:
        """Cancel what runs, and write what sessions there are."""
        self.loop.stop()
        self.sessions.close()

    # ------------------------------------------------------------------------------------------- requests

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.config.name:
            says = f"there is no model {name[:100]!r}; this server has {self.config.name!r}"
            raise ApiError(404, says, param="model", code="model_not_found")

    def sampling(self, asked: Asked, max_tokens: int, name: str, logprobs: int | None) -> Sampling:
        """What a request says of how tokens are drawn; `name` is that of its field for max_tokens."""
        if max_tokens > self.config.max_tokens:
            raise ApiError(
                400, f"{name} is {max_tokens}, and the most is {self.config.max_tokens}", param=name
            )
        vocab = self.tokenizer.vocab
        bias = tuple((int(key), value) for key, value in (asked.logit_bias or {}).items())
        for param, tokens in (
            ("logit_bias", [token for token, _ in bias]),
            ("stop_token_ids", asked.stop_token_ids or ()),
        ):
            for token in tokens:
                if token >= vocab:
                    raise ApiError(
                        400, f"{param}: {token} is no token: they are 0 to {vocab - 1}", param=param
                    )
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        given = {
            name: getattr(asked, name)
            for name in DRAWN
            if getattr(asked, name) is not None
        }  # fmt: skip
        return Sampling(
            max_tokens=max_tokens,
            top_k=max(0, asked.top_k or 0),
            logit_bias=bias,
            seed=None if asked.seed is None else asked.seed % (1 << 63),
            stop=tuple(text for text in stop if text),
            stop_tokens=tuple(asked.stop_token_ids or ()),
            ignore_end=bool(asked.ignore_eos),
            logprobs=logprobs,
            **given,
        )

    def encoded(self, text: str, *, begins: bool) -> list[int]:
        """The tokens of a text, the prompt; behind the token that begins a document if it begins one.

        Then the end-of-document token's name at its beginning is that token, as lm-eval sends it, and there
        is no other.
        """
        if not is_text(text):
            raise ApiError(400, "prompt has half of a surrogate pair, which is no character", param="prompt")
        ids = self.tokenizer.encode_batch([text.removeprefix(self.end_word) if begins else text])[0].tolist()
        return [self.tokenizer.begin, *ids] if begins else ids

    def check_prompt(self, ids: Sequence[int], param: str) -> None:
        most, vocab = self.config.prompt_tokens, self.model.config.vocab
        if len(ids) > most:
            raise ApiError(400, f"{param} has {len(ids):,} tokens, and the most is {most:,}", param=param)
        if max(ids, default=0) >= vocab:
            says = f"{param} has token {max(ids)}, and the model's vocabulary is 0 to {vocab - 1}"
            raise ApiError(400, says, param=param)

    async def session(
        self, asked: Asked
    ) -> tuple[engine_request.Session | None, Callable[..., object] | None]:
        """The session that a request goes on with, and what is to be called when it ends."""
        if (name := asked.session) is None:
            return None, None
        if (asked.n or 1) > 1:
            raise ApiError(400, "n: a session goes on with one text", param="n")
        goes_on, end = self.sessions.begin(name), partial(self.sessions.end, name)
        if not goes_on:
            return None, end
        try:
            return await asyncio.wrap_future(self.loop.call(lambda: self.sessions.get(name))), end
        except BaseException:
            end(None)
            raise

    async def answer(
        self, http: Request, asked: Asked, form: Form, requests: Sequence[engine_request.Request], end: Any
    ) -> Response:
        """Have the engine do requests, and give what comes of them."""
        try:
            stream = await self.loop.submit(requests, end)
        except QueueFullError as error:
            self.metrics.refused.inc()
            raise ApiError(503, f"the server is full: {error}", code="queue_full", retry=True) from error
        except ValueError as error:
            raise ApiError(400, str(error), param=field_of(str(error))) from error
        about = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
        about |= {"model": self.config.name}
        if asked.stream:
            usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            return EventStream(_events(stream, form, about, usage), lambda: self.loop.close(stream))
        try:
            return await until_gone(http.receive, _whole(stream, form, about))
        finally:
            self.loop.close(stream)

    async def complete(self, http: Request, asked: CompletionRequest) -> Response:
        """POST /v1/completions."""
        self.check_model(asked.model)
        n, max_tokens = asked.n or 1, 16 if asked.max_tokens is None else asked.max_tokens
        sampling = self.sampling(asked, max_tokens, "max_tokens", asked.logprobs)
        prompts = as_list(asked.prompt)
        if not prompts:
            raise ApiError(400, "prompt is an empty list", param="prompt")
        if len(prompts) * n > self.config.texts:
            says = (
                f"{len(prompts)} prompts times n = {n}, and a request has at most {self.config.texts} texts"
            )
            raise ApiError(400, says, param="prompt" if len(prompts) > 1 else "n")
        if asked.session is not None and len(prompts) > 1:
            raise ApiError(400, "prompt: a session goes on with one prompt", param="prompt")
        session, end = await self.session(asked)
        try:
            echo, requests, shown = bool(asked.echo), list[engine_request.Request](), []
            for prompt in prompts:
                added = False
                if isinstance(prompt, str):
                    begins = session is None
                    added = begins and not prompt.startswith(self.end_word)
                    text, ids = prompt, await asyncio.to_thread(self.encoded, prompt, begins=begins)
                else:
                    self.check_prompt(prompt, "prompt")
                    inside = [token for token in prompt if token < self.tokenizer.vocab]
                    text, ids = self.tokenizer.decode(inside) if echo else "", prompt
                self.check_prompt(ids, "prompt")
                requests.append(
                    engine_request.Request(
                        prompt=tuple(ids),
                        sampling=sampling,
                        n=n,
                        session=session,
                        keep=end is not None,
                        prompt_logprobs=asked.logprobs if echo else None,
                    )
                )
                shown.append((text, ids, added))
        except BaseException:
            if end is not None:
                end(None)
            raise
        form = CompletionForm(self.words, shown, n=n, echo=echo, logprobs=asked.logprobs is not None)
        return await self.answer(http, asked, form, requests, end)

    async def chat(self, http: Request, asked: ChatRequest) -> Response:
        """POST /v1/chat/completions."""
        self.check_model(asked.model)
        name = "max_completion_tokens" if asked.max_completion_tokens is not None else "max_tokens"
        most = getattr(asked, name)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        default = min(self.config.chat_tokens, self.config.max_tokens)
        sampling = self.sampling(asked, default if most is None else most, name, logprobs)
        sampling = replace(sampling, stop=(*sampling.stop, *self.template.stops))
        session, end = await self.session(asked)
        try:
            begins, template = session is None, self.template
            ids = await asyncio.to_thread(template.tokens, asked.messages, begins=begins)
            self.check_prompt(ids, "messages")
            history = await asyncio.to_thread(template.tokens, asked.messages, begins=begins, answer=False)
            # the next turn begins with these messages, whatever the template does to the answer
            marks = (len(history),) if history and ids[: len(history)] == history else ()
            request = engine_request.Request(
                prompt=tuple(ids), sampling=sampling, n=asked.n or 1, session=session, keep=end is not None,
                marks=marks,
            )  # fmt: skip
        except BaseException as error:
            if end is not None:
                end(None)
            if isinstance(error, TemplateError):
                raise ApiError(400, str(error), param="messages") from error
            raise
        form = ChatForm(self.words, logprobs=bool(asked.logprobs))
        return await self.answer(http, asked, form, [request], end)


# ------------------------------------------------------------------------------------------------- answers


async def _whole(stream: Stream, form: Form, about: Json) -> Response:
    """All texts in one answer."""
    choices, totals = dict[int, Json](), Totals()
    try:
        async for request, piece in stream:
            check_finish(piece.finish)
            totals.add(request, piece)
            key = request * stream.requests[request].n + piece.index
            choice = form.choice(request, piece, first=key not in choices, chunk=False)
            if key in choices:
                form.joined(choices[key], choice)
            else:
                choices[key] = choice
    except (EngineFailedError, StoppedError) as error:
        raise as_api_error(error) from error
    listed = [choices[key] for key in sorted(choices)]
    return JSONResponse({**about, "object": form.kind, "choices": listed, "usage": totals.usage()})


async def _events(stream: Stream, form: Form, about: Json, with_usage: bool) -> AsyncIterator[Json]:
    """The chunks of all texts as they come; an error is the last."""
    seen, totals = set[tuple[int, int]](), Totals()
    about = {**about, "object": form.chunk_kind}
    none: Json = {"usage": None} if with_usage else {}
    try:
        async for request, piece in stream:
            check_finish(piece.finish)
            totals.add(request, piece)
            first = (request, piece.index) not in seen
            seen.add((request, piece.index))
            choice = form.choice(request, piece, first=first, chunk=True)
            if form.says_something(choice):
                yield {**about, "choices": [choice], **none}
    except (EngineFailedError, StoppedError, ApiError) as error:
        yield as_api_error(error).body
        return
    if with_usage:
        yield {**about, "choices": [], "usage": totals.usage()}


def check_finish(finish: engine_request.Finish) -> None:
    """Raise what ended a text, if it is neither its end nor a limit."""
    if finish == "cancelled":  # not by this client, who would not listen any more
        raise StoppedError("the server is shutting down")
    if finish == "error":
        raise ApiError(500, NOT_FINITE, code="not_finite")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error of the loop."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StoppedError):
        return ApiError(503, str(error), code="shutting_down", retry=True)
    return ApiError(500, str(error), code="engine_failed")


# ------------------------------------------------------------------------------------------------- small


def as_list(prompt: str | list[Any]) -> list[str | list[int]]:
    """Prompts, each a text or ids, of any form of the field."""
    if isinstance(prompt, str):
        return [prompt]
    return [list(prompt)] if prompt and isinstance(prompt[0], int) else list(prompt)


def field_of(says: str) -> str | None:
    """The request's field that an error of the engine names first."""
    word = says.partition(" ")[0].strip(":").rpartition(".")[2]
    return {"stop_tokens": "stop_token_ids"}.get(word, word) if word in NAMED else None


NAMED = {"prompt", "n", "logit_bias", "stop_tokens", "session", "max_tokens", "temperature", "seed"}


def facts(engine: EngineLike, model: LanguageModel, max_context: int | None) -> Json:
    """What /v1/models says of the model beside OpenAI's words."""
    net, config = model.model, model.config
    states = net.init_states(1, device=torch.device("meta"), capacity=1)[: len(net.mixers)]
    floats = [tensor for state in states for tensor in state if tensor.is_floating_point()]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in floats}
    grows = any(map(is_reserved, states))  # of mixers: learned positions need room, and no bytes
    limits = [limit for limit in (config.positions, max_context) if limit]
    return {
        "parameters": net.parameter_count(),
        "layers": len(config.layers),
        "width": config.width,
        "state_bytes": engine.stats().row_bytes,
        "state_dtype": "+".join(sorted(dtypes)),
        "recurrent": not grows,
        "grows": grows,
        "context": min(limits, default=None),
    }
