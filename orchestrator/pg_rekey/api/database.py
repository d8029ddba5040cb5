"""The transactions of the API."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from pg_rekey import db

STATEMENT_TIMEOUT = "5s"


@contextmanager
def transaction(request: Request) -> Iterator[db.Connection]:
    """Lend a connection for one transaction, in which the audit log knows whose token it is."""
    token = request.state.token
    pool: db.Pool = request.app.state.pool
    with pool.connection() as connection:
        claims = json.dumps({"sub": token}) if token else ""
        connection.execute(db.query("api transaction"), [STATEMENT_TIMEOUT, claims])
        yield connection
