"""The process: checks its configuration, listens, serves, and ends cleanly."""

import ipaddress
import logging
import signal
import socket
import threading

import click
import uvicorn

from pg_rekey import db, release
from pg_rekey.api.app import create_app
from pg_rekey.api.database import Pools, warn_of_logins
from pg_rekey.api.logs import JsonHandler
from pg_rekey.api.protocol import KEEP_ALIVE_SECONDS, REQUESTS, Protocol, connections
from pg_rekey.api.tokens import Tokens
from pg_rekey.errors import Problem
from pg_rekey.notify.watch import watch
from pg_rekey.worker import log

SHUTDOWN_SECONDS = 10
QUEUE = 1024


def run(host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then end the requests in hand."""
    tokens = Tokens.from_environment()
    if db.in_environment():
        # A KEK that cannot be one is found now, not by the first rotation.
        db.from_environment()
    pools = Pools.from_environment()
    with _listen(host, port) as listener:
        _warn_if_reachable(listener.getsockname()[0])
        _serve(listener, pools, tokens)


def _serve(listener: socket.socket, pools: Pools, tokens: Tokens) -> None:
    logging.basicConfig(handlers=[JsonHandler()], level=logging.WARNING, force=True)
    server = _Server(_config(pools, tokens))

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own, and raises the signal again when it has ended: that is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    stop_looking = threading.Event()
    with pools:
        for look in (warn_of_logins, watch):
            threading.Thread(target=look, args=[pools, stop_looking], daemon=True).start()
        host, port = listener.getsockname()[:2]
        log("listening", host=host, port=port, version=release.version())
        server.run(sockets=[listener])
        stop_looking.set()
    log("stopped")


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            # Longer than what is accepted at once: who finds the queue full tries again after a second only.
            listener.listen(QUEUE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Streams would go on until their time is over.
        self.config.app.state.feed.close()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def _config(pools: Pools, tokens: Tokens) -> uvicorn.Config:
    Protocol.places = connections()
    return uvicorn.Config(
        create_app(pools, tokens),
        http=Protocol,
        limit_concurrency=REQUESTS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        # asyncio accepts as many at once, and a few times as many are open beside the places.
        backlog=max(1, Protocol.places // 8),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        # X-Forwarded-For is what anybody writes.
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise Problem(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    # asyncio does so only for sockets that it made itself; without it each answer takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _warn_if_reachable(address: str) -> None:
    if not ipaddress.ip_address(address).is_loopback:
        click.echo(
            f"{address} is no loopback address, and this is plain HTTP: put TLS in front of it.", err=True
        )
