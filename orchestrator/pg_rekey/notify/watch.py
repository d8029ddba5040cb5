"""What `pg-rekey serve` does about messages: a worker that died cannot report itself."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from pg_rekey import db
from pg_rekey.api.database import OWN_ROLE, STATEMENT_TIMEOUT, Pools
from pg_rekey.errors import Problem
from pg_rekey.notify.deliver import Courier
from pg_rekey.worker import log

# Between two looks.
SECONDS = 15.0


def watch(pools: Pools, stop: threading.Event) -> None:
    """Have messages made of what happened, and deliver them, until told to stop."""
    courier = Courier(log)

    @contextmanager
    def begin(unlocked: bool) -> Iterator[db.Connection]:
        with pools.of(OWN_ROLE).connection() as connection:
            connection.execute(db.query("api transaction"), [STATEMENT_TIMEOUT, "", OWN_ROLE])
            if unlocked and db.in_environment():
                db.unlock(connection)
            yield connection

    said = None
    while True:
        try:
            with begin(False) as connection:
                found = connection.execute(db.query("watch")).fetchone()
            if found and found["next"]:
                courier.deliver(begin, stop)
            said = None
        except (psycopg.Error, Problem) as error:
            # While the database is gone, say so once.
            if (now := type(error).__name__) != said:
                log("watch", problem=now)
            said = now
        if stop.wait(SECONDS):
            return
