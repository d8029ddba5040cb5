"""What a client may take of the server: places, time and bytes, before anybody knows who he is.

One connection is a place. When all are taken, a newcomer gets the place of a connection that waits for its
client, so that idle ones shut nobody out.
"""

import asyncio
import logging
import resource
import secrets
from collections import Counter
from http import HTTPStatus
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from pg_rekey.api.models import Error

# Where fewer files may be open than twice as many, it is half of those.
CONNECTIONS = 512
# Requests in hand, with those whose clients are gone. uvicorn answers 503 to more.
REQUESTS = 2048
# Request line and headers; also what may be sent ahead of an answer.
HEADER_BYTES = 16 * 1024
# From the connection, or the end of the last answer, to the end of the headers.
HEADER_SECONDS = 10.0
# From there to the end of the body.
BODY_SECONDS = 10.0
# From there until the answer has left.
ANSWER_SECONDS = 60.0
# Until the first byte of the next request.
KEEP_ALIVE_SECONDS = 5

_logger = logging.getLogger(__name__)


def connections() -> int:
    """Return how many connections there may be, after raising the number of open files where it is too low.

    The other half is for the database, and for what is accepted or closed at this very moment.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS
    if _is_less(soft, wanted):
        soft = hard if _is_less(hard, wanted) else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft // 2 if _is_less(soft, wanted) else CONNECTIONS


def _is_less(limit: int, number: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < number


class Protocol(H11Protocol):
    """uvicorn's, with limits."""

    places = CONNECTIONS

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _Messages(h11.SERVER, HEADER_BYTES)
        self._phase: tuple[object, object] | None = None
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Find a place for a new connection, or refuse it."""
        super().connection_made(transport)
        self._enter_phase()
        if len(self.connections) > self.places and not self._take_a_place():
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "busy", "too many requests are in hand")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Handle what has come, and let the time run for what is to come next."""
        super().handle_events()
        self._enter_phase()
        # uvicorn reads on after each answer, and keeps all that was sent meanwhile.
        busy = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        if busy and not self.transport.is_closing() and len(self.conn.trailing_data[0]) > HEADER_BYTES:
            self._refuse(HTTPStatus.BAD_REQUEST, "bad_request", "too much was sent ahead of the answers")

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, "bad_request", "this is no proper HTTP request")

    def shutdown(self) -> None:
        """End the connection, after the request in hand."""
        if self.transport.is_closing():
            self.transport.abort()
        elif self.conn.their_state is h11.SEND_BODY:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "busy", "the server stops")
        else:
            super().shutdown()

    def _enter_phase(self) -> None:
        phase = (self.cycle, self.conn.their_state)
        if phase == self._phase:
            return
        self._phase = phase
        self._since = self.loop.time()
        if self.conn.their_state is h11.SEND_BODY:
            self._give(BODY_SECONDS)
        elif self.conn.their_state is h11.IDLE and not self.transport.get_write_buffer_size():
            self._give(HEADER_SECONDS)
        else:
            self._give(ANSWER_SECONDS)

    def _give(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._expire)

    def _waits(self) -> bool:
        """Tell whether it waits for its client: to send, or to read."""
        return (
            self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
            or self.transport.is_closing()
            or self.transport.get_write_buffer_size() > 0
        )

    def _take_a_place(self) -> bool:
        """Close the connection that has waited longest, of the address that has most of those."""
        waiting = [
            one for one in self.connections if one is not self and isinstance(one, Protocol) and one._waits()
        ]
        if not waiting:
            return False
        crowd = Counter(one._address() for one in waiting)
        victim = max(waiting, key=lambda one: (crowd[one._address()], -one._since))
        _logger.warning("all places are taken: closing the connection that has waited longest")
        self.connections.discard(victim)
        victim.transport.abort()
        return True

    def _address(self) -> str | None:
        return self.client[0] if self.client else None

    def _expire(self) -> None:
        _logger.warning("a client took too long: closing the connection")
        if self._waits() and not self.transport.is_closing():
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "timeout", "the request took too long to come")
        else:
            self.transport.abort()

    def _refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        """Answer if that can still be, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = Error(code=code, message=message, hint=None, request_id=secrets.token_hex(16))
            body = error.model_dump_json().encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            # Whoever works on it hears that nobody is there any more.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self._give(HEADER_SECONDS)


class _Messages(h11.Connection):
    """HTTP without what two readers could understand in two ways, and without long headers."""

    def next_event(self) -> Any:
        """Return the next event of the client."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("the length of the body is ambiguous")
            size = len(event.target) + sum(len(name) + len(text) for name, text in event.headers)
            if size > HEADER_BYTES:
                raise h11.RemoteProtocolError("the headers are too long")
        return event
