"""The HTTP server: OpenAI's completions and chat, vLLM's endpoints beside them, and sessions.

    app = create_app(engine, model, ServerConfig(name="based-mini"))

A text prompt is read as the beginning of a document, so that the end-of-document token stands before it, as
in `LanguageModel.generate`; token ids are read as they are. Neither is so with a `session` that has read
something: then the prompt goes on where it stopped.

When a client goes away its texts are cancelled, streaming or not. Errors are OpenAI's objects, and `param`
names the field. 503 with Retry-After says that the queue is full; 409, that a session is in use.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

import holdall
from holdall.language_model import LanguageModel
from holdall.serve.answers import Json
from holdall.serve.http import CLIENT_GONE, ApiError, ClientGoneError, Gate
from holdall.serve.loop import EngineFailedError, EngineLike, StoppedError
from holdall.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    TokenizeRequest,
    first_error,
)
from holdall.serve.server import Server, ServerConfig, as_api_error
from holdall.serve.sessions import SessionError, check_name

PAGE = Path(__file__).with_name("page.html")
SESSIONS = "/v1/sessions"
Name = Annotated[str, InPath(description="the name of a session")]
NOT_OURS = "the server failed at this request; its log says why"
log = logging.getLogger("holdall.serve")


def create_app(
    engine: EngineLike,
    model: LanguageModel,
    config: ServerConfig | None = None,
    *,
    folder: Path | None = None,
) -> FastAPI:
    """The server of an engine and its model; it runs the engine from startup to shutdown.

    `folder` is the model's, which may have a chat template. `app.state.server` is the `Server`.

    Raises TemplateError if that is none, and OSError if the folder of sessions cannot be made.
    """
    server = Server(engine, model, config or ServerConfig(), folder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.loop.start()
        yield
        await asyncio.to_thread(server.stop)

    app = FastAPI(
        title="Holdall", version=holdall.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.server = server
    app.add_middleware(
        Gate, api_key=server.config.api_key, most=lambda path: _most_bytes(server.config, path)
    )
    _handle_errors(app)
    app.include_router(_routes(server))
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


class HttpServer(uvicorn.Server):
    """Serves an app of `create_app` until SIGINT or SIGTERM: `run(sockets=[listener])`.

    Then it takes no more connections, and requests have `grace_s` seconds to end. What runs after that is
    cancelled, and its client told so. Then sessions are written.
    """

    TELLING_S = 5
    """What there is to tell clients, before connections are cut."""

    def __init__(self, app: FastAPI, *, grace_s: int) -> None:
        cut_s = grace_s + self.TELLING_S
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=cut_s))
        self.server: Server = app.state.server
        self.grace_s = grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self.grace_s, self.server.loop.end)
        await super().shutdown(sockets)


def _most_bytes(config: ServerConfig, path: str) -> int:
    return config.session_body if path.startswith(f"{SESSIONS}/") else config.body


# ------------------------------------------------------------------------------------------------ endpoints


def _routes(server: Server) -> APIRouter:
    """All endpoints; each says which errors it may give."""
    api = APIRouter()
    v1, full = _errors(400, 401), _errors(404, 409, 413, 415, 500, 503)

    @api.post("/v1/completions", responses=v1 | full | STREAMED, response_model=None)
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        return await server.complete(http, asked)

    @api.post("/v1/chat/completions", responses=v1 | full | STREAMED, response_model=None)
    async def chat_completions(asked: ChatRequest, http: Request) -> Response:
        return await server.chat(http, asked)

    @api.get("/v1/models", responses=v1)
    async def models() -> Json:
        return {"object": "list", "data": [server.described]}

    @api.get("/v1/models/{name:path}", responses=v1 | _errors(404))
    async def one_model(name: str) -> Json:
        server.check_model(name)
        return server.described

    @api.get(SESSIONS, responses=v1)
    async def list_sessions() -> Json:
        return {"object": "list", "data": [listed._asdict() for listed in server.sessions.list()]}

    some = v1 | _errors(404, 409, 413, 500, 503)

    @api.get(
        SESSIONS + "/{name}",
        responses=some | {200: {"content": {BINARY: {}}}},
        response_class=Response,
    )
    async def get_session(name: Name) -> Response:
        file = await asyncio.to_thread(server.sessions.file, name)
        saved_as = f'attachment; filename="{name}.safetensors"'
        return Response(file, media_type=BINARY, headers={"Content-Disposition": saved_as})

    @api.put(SESSIONS + "/{name}", responses=some, openapi_extra=FILE)
    async def put_session(name: Name, http: Request) -> Json:
        check_name(name)
        with tempfile.TemporaryDirectory(prefix="holdall-") as folder:
            path = Path(folder) / "session.safetensors"
            with path.open("wb") as file:
                async for part in http.stream():
                    await asyncio.to_thread(file.write, part)
            session = await asyncio.wrap_future(server.loop.call(lambda: server.sessions.load(path)))
        server.sessions.put(name, session)
        return {"name": name, "tokens": session.past.count, "bytes": session.nbytes}

    @api.delete(SESSIONS + "/{name}", responses=some)
    async def delete_session(name: Name) -> Json:
        server.sessions.delete(name)
        return {"name": name, "deleted": True}

    @api.post("/tokenize", responses=_errors(400) | full)
    async def tokenize(asked: TokenizeRequest) -> Json:
        server.check_model(asked.model)
        begins = asked.add_special_tokens is not False
        if asked.prompt == server.end_word and not begins:
            ids = [server.tokenizer.end]  # how lm-eval asks for its id; in a text it would be text
        else:
            ids = await asyncio.to_thread(server.encoded, asked.prompt, begins=begins)
        return {"tokens": ids, "count": len(ids), "max_model_len": server.config.prompt_tokens}

    @api.post("/detokenize", responses=_errors(400) | full)
    async def detokenize(asked: DetokenizeRequest) -> Json:
        server.check_model(asked.model)
        most = server.tokenizer.vocab
        for token in asked.tokens:
            if token >= most:
                raise ApiError(400, f"tokens: {token} is no token: they are 0 to {most - 1}", param="tokens")
        return {"prompt": await asyncio.to_thread(server.tokenizer.decode, asked.tokens)}

    @api.get("/tokenizer_info")
    async def tokenizer_info() -> Json:
        return {
            "tokenizer_class": server.tokenizer.name,
            "vocab_size": server.tokenizer.vocab,
            "eos_token": server.end_word,
            "bos_token": server.end_word,
            "chat_template": server.template.source,
        }

    @api.get("/health", responses=_errors(503))
    async def health() -> Json:
        if not server.loop.alive:
            says = server.loop.failure or "the engine does not run"
            raise ApiError(503, says, code="engine_failed" if server.loop.failure else "shutting_down")
        return {"status": "ok"}

    @api.get("/version")
    async def version() -> Json:
        return {"version": holdall.__version__}

    @api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(
            server.metrics.page(), headers={"Content-Type": "text/plain; version=1.0.0; charset=utf-8"}
        )

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        if not PAGE.exists():
            return JSONResponse({"name": "holdall", "version": holdall.__version__, "api": "/openapi.json"})
        return FileResponse(PAGE, media_type="text/html")

    return api


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an endpoint says of the errors that it may give."""
    return {status: {"model": ErrorBody} for status in statuses}


BINARY = "application/octet-stream"
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
FILE = {
    "requestBody": {"required": True, "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}}}
}


# ------------------------------------------------------------------------------------------------ errors


def _handle_errors(app: FastAPI) -> None:
    """Every error as OpenAI's object."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(SessionError)
    async def no_session(_: Request, error: SessionError) -> Response:
        return ApiError(error.status, str(error), param="session", code=error.code).response()

    @app.exception_handler(EngineFailedError)
    @app.exception_handler(StoppedError)
    async def no_engine(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    @app.exception_handler(ClientGoneError)
    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if http.method == "POST" and not (kind == "application/json" or kind.endswith("+json")):
            return ApiError(415, "send JSON, with the header Content-Type: application/json").response()
        param, says = first_error(error.errors())
        return ApiError(400, says, param=param).response()

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return ApiError(500, NOT_OURS, code="bug").response()


def _schema(app: FastAPI) -> Json:
    """FastAPI's description of the endpoints, without the 422 that it never gives here."""
    if not app.openapi_schema:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in schema["paths"].values():
            for method in path.values():
                method["responses"].pop("422", None)
        app.openapi_schema = schema
    return app.openapi_schema
