"""The transactions of the API."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from fastapi import Request

from pg_rekey import db
from pg_rekey.api.tokens import DATABASE_ROLES, Token
from pg_rekey.worker import log

# What pg_stat_activity shows of the server; `pg-rekey doctor` looks for it.
APPLICATION = "pg-rekey serve"
STATEMENT_TIMEOUT = "5s"
# What reads every row takes long for good reason; its answer is to leave within protocol.ANSWER_SECONDS.
LONG_TIMEOUT = "50s"
# The database role of what a token of no role does, and of what the API itself has to do.
OWN_ROLE = "rekey_admin"


@contextmanager
def transaction(
    request: Request, *, role: str | None = None, timeout: str | None = None
) -> Iterator[db.Connection]:
    """Lend a connection for one transaction, in which the audit log knows whose token it is.

    role: of the database, instead of the one that belongs to the token. timeout: of a statement, instead of
    STATEMENT_TIMEOUT.
    """
    token: Token | None = request.state.token
    pool: db.Pool = request.app.state.pool
    with pool.connection() as connection:
        claims = json.dumps({"sub": token.name}) if token else ""
        begun = [
            timeout or STATEMENT_TIMEOUT,
            claims,
            role or (DATABASE_ROLES[token.role] if token else "none"),
        ]
        connection.execute(db.query("api transaction"), begun)
        yield connection


def warn_of_superuser(pool: db.Pool, stop: threading.Event) -> None:
    """Log a warning where the login of the server is a superuser, as soon as the database is there."""
    while not stop.is_set():
        try:
            with pool.connection() as connection:
                # What the server tells each client, of the login: no role is set yet.
                if connection.info.parameter_status("is_superuser") == "on":
                    log(
                        "superuser",
                        login=connection.info.user,
                        warning="the login of this server is a superuser: make it one of its own, "
                        "`create role rekey_api login in role rekey_admin`",
                    )
            return
        except psycopg.OperationalError:
            stop.wait(1.0)
