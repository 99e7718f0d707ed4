"""What the server needs of HTTP: errors, a gate, event streams, and to see when a client goes away."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")
RETRY_AFTER_S = 1
CLIENT_GONE = 499
"""The status of an answer that nobody reads any more: nginx's, for logs."""


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        says: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(says)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.retry else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


class ClientGoneError(Exception):
    """The client closed the connection."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; it is cancelled, and ClientGoneError raised, when the client goes away.

    The request's body must have been read.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: each of `events` as JSON, then [DONE]."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Any], close: Callable[[], object]) -> None:
        """`close` is called at the end, also where the client went away before the first event."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send))
        except (ClientGoneError, OSError):
            pass
        finally:
            self.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self.events:
            data = f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class Gate:
    """What every request passes first: under /v1 it needs the key, and its body has a limit."""

    def __init__(self, app: ASGIApp, *, api_key: str, most: Callable[[str], int]) -> None:
        """`most`: bytes of a body, by path."""
        self.app, self.key, self.most = app, api_key.encode(), most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = dict(scope["headers"]), scope["path"]
        most, read = self.most(path), 0
        too_large = ApiError(413, f"the body has more than {most:,} bytes", code="too_large")
        length = headers.get(b"content-length", b"")
        refusal = None
        if self.key and path.startswith("/v1/") and not self._has_key(headers.get(b"authorization", b"")):
            refusal = ApiError(
                401, "give the server's API key: Authorization: Bearer KEY", code="invalid_api_key"
            )
        elif length.isdigit() and (len(length) > 18 or int(length) > most):
            refusal = too_large
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, str(too_large))
            return message

        await self.app(scope, counted, send)

    def _has_key(self, given: bytes) -> bool:
        kind, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self.key) and kind.lower() == b"bearer"
