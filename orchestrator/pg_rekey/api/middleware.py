"""Around every request: its id, a limit to its body, a log line, and an answer whatever happens."""

import re
import secrets
import time

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pg_rekey.api.refusals import BODY_LIMIT, internal, too_large
from pg_rekey.hints import Road
from pg_rekey.worker import log

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Requests:
    """The outermost layer of ours: nothing but cancellation passes it on the way to the server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        request = Request(scope)
        state = request.state
        given = request.headers.get("x-request-id", "")
        state.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        state.client = request.client.host if request.client else None
        state.token = state.sqlstate = status = None
        state.fields = ()
        state.road = Road.HTTP
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > BODY_LIMIT:
                raise HTTPException(413)
            return message

        async def answering(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = state.request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            if int(request.headers.get("content-length", 0)) > BODY_LIMIT:
                await too_large(request)(scope, receive, answering)
            else:
                await self._app(scope, limited, answering)
        except Exception as error:
            response = internal(request, error)
            if status is None:
                await response(scope, receive, answering)
        finally:
            log(
                "request",
                request_id=state.request_id,
                method=request.method,
                route=getattr(scope.get("route"), "path", None),
                status=status,
                milliseconds=round((time.monotonic() - begun) * 1000),
                client=state.client,
                token=state.token and state.token.name,
                sqlstate=state.sqlstate,
            )
