"""Delivers the messages that wait: each is claimed, sent, and noted, the sending outside of any transaction.

A claim is a lease. Whoever is killed after it leaves a message that is sent again once its pause is over: at
least once, with the same id.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from pg_rekey import db
from pg_rekey.errors import Problem
from pg_rekey.notify import email, webhook
from pg_rekey.notify.addresses import Undelivered

# Seconds after which nothing more is begun: the next time, endpoints that were added meanwhile are known too.
ROUND = 60.0

# Begins a transaction, with the KEK or without it.
Begin = Callable[[bool], AbstractContextManager[db.Connection]]


def beginning(connection: db.Connection) -> Begin:
    """Return what begins transactions of a connection in autocommit mode, with the KEK of the environment."""

    @contextmanager
    def begin(unlocked: bool) -> Iterator[db.Connection]:
        with connection.transaction():
            if unlocked and db.in_environment():
                db.unlock(connection)
            yield connection

    return begin


@dataclass(frozen=True)
class Endpoint:
    """An endpoint whose address was opened."""

    id: int
    name: str
    kind: str
    allow_private: bool
    secret: str
    address: str

    def send(self, message_id: str, body: str) -> None:
        """Send a message; Undelivered says what went wrong."""
        if self.kind == "email":
            email.send(self.address, message_id, body, allow_private=self.allow_private)
        else:
            webhook.post(self.address, self.secret, message_id, body, allow_private=self.allow_private)


class Courier:
    """Delivers, and keeps the addresses that it opened: that the KEK is missing can be told too.

    tell: is told what became of each message.
    """

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._endpoints: dict[int, Endpoint] = {}

    def deliver(self, begin: Begin, stop: threading.Event, only: str | None = None) -> bool:
        """Deliver what is due, to every endpoint or to the one of this name; tell whether one is known."""
        self._open(begin)
        ids = [one.id for one in self._endpoints.values() if only in (None, one.name)]
        until = time.monotonic() + ROUND
        while not stop.is_set() and time.monotonic() < until and (message := _claim(begin, ids)) is not None:
            endpoint = self._endpoints[message["endpoint_id"]]
            error = None
            try:
                endpoint.send(f"msg_{message['message_id']}", message["body"])
            except (Undelivered, Problem) as problem:
                error = str(problem)
            except Exception as problem:  # whatever is wrong with one message, the others go on
                error = f"it cannot be sent: {type(problem).__name__}"
            with begin(False) as connection:
                connection.execute("select rekey._note_delivery(%s, %s)", [message["id"], error])
            said = {"endpoint": endpoint.name, "message": message["event"], "attempt": message["attempts"]}
            self._tell("undelivered" if error else "delivered", **said, error=error)
        return bool(ids)

    def _open(self, begin: Begin) -> None:
        try:
            with begin(True) as connection:
                rows = connection.execute(db.query("open endpoints")).fetchall()
        except Problem:
            return  # the KEK cannot be had here
        except psycopg.Error as error:
            if error.sqlstate not in ("RK001", "RK002"):
                raise
            return
        self._endpoints = {}
        for row in rows:
            secret, _, address = row.pop("opened").partition(" ")
            self._endpoints[row["id"]] = Endpoint(**row, secret=secret, address=address)


def _claim(begin: Begin, endpoints: list[int]) -> dict[str, Any] | None:
    with begin(False) as connection:
        return connection.execute("select * from rekey._claim_message(%s)", [endpoints]).fetchone()
