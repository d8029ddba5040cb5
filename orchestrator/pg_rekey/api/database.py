"""The transactions of the API."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

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
# The database role of what the API itself has to do, and of what a token has it do that is more than its own.
OWN_ROLE = "rekey_admin"
# Where the connection strings are of those who may less than an administrator.
READ_DSN, OPERATE_DSN = "PG_REKEY_READ_DSN", "PG_REKEY_OPERATE_DSN"


class Pools:
    """Connections for what each role of the database does, by a login of its own where one is configured.

    Whoever takes over a session, by whatever fault of this server, gets no further than its login.
    """

    def __init__(
        self, admin: db.Pool, *, read: db.Pool | None = None, operate: db.Pool | None = None
    ) -> None:
        self._pools = {OWN_ROLE: admin, "rekey_operator": operate or admin, "rekey_auditor": read or admin}

    @classmethod
    def from_environment(cls) -> Self:
        """Return the pools that the environment configures, not opened yet."""
        read, operate = (
            db.pool(found, APPLICATION) if (found := db.dsn(variable)) else None
            for variable in (READ_DSN, OPERATE_DSN)
        )
        return cls(db.pool(application=APPLICATION), read=read, operate=operate)

    def __enter__(self) -> Self:
        for pool in {*self._pools.values()}:
            pool.open()
        return self

    def __exit__(self, *_: object) -> None:
        for pool in {*self._pools.values()}:
            pool.close()

    def of(self, role: str) -> db.Pool:
        """Return the connections of a database role; whoever has none gets those that may least."""
        return self._pools.get(role, self._pools["rekey_auditor"])

    def logins(self) -> dict[str, db.Pool]:
        """Return the pools that are not the administrator's, by the role that they are for."""
        return {role: pool for role, pool in self._pools.items() if pool is not self._pools[OWN_ROLE]}


@contextmanager
def transaction(
    request: Request, *, role: str | None = None, timeout: str | None = None
) -> Iterator[db.Connection]:
    """Lend a connection for one transaction, in which the audit log knows whose token it is.

    role: of the database, instead of the one that belongs to the token. timeout: of a statement, instead of
    STATEMENT_TIMEOUT.
    """
    token: Token | None = request.state.token
    pools: Pools = request.app.state.pools
    role = role or (DATABASE_ROLES[token.role] if token else "none")
    with pools.of(role).connection() as connection:
        claims = json.dumps({"sub": token.name}) if token else ""
        connection.execute(db.query("api transaction"), [timeout or STATEMENT_TIMEOUT, claims, role])
        yield connection


def warn_of_logins(pools: Pools, stop: threading.Event) -> None:
    """Log a warning where a login may more than it needs, as soon as the database is there."""
    wanted = {OWN_ROLE: pools.of(OWN_ROLE), **pools.logins()}
    while wanted and not stop.is_set():
        for role, pool in list(wanted.items()):
            try:
                with pool.connection() as connection:
                    _warn(connection, role)
                del wanted[role]
            except psycopg.OperationalError:
                stop.wait(1.0)


def _warn(connection: db.Connection, role: str) -> None:
    login = connection.info.user
    # What the server tells each client, of the login: no role is set yet.
    if connection.info.parameter_status("is_superuser") == "on":
        log(
            "superuser",
            login=login,
            warning="a login of this server is a superuser: make it one of its own, "
            f"`create role {LOGINS[role]} login in role {role}`",
        )
        return
    more = connection.execute(db.query("more than"), [role]).fetchall()
    if role != OWN_ROLE and more:
        log(
            "login",
            login=login,
            warning=f"this login is for what {role} may, and a member of {more[0]['role']} too: "
            f"make it one of its own, `create role {LOGINS[role]} login in role {role}`",
        )


LOGINS = {
    "rekey_admin": "rekey_api",
    "rekey_operator": "rekey_api_operate",
    "rekey_auditor": "rekey_api_read",
}
