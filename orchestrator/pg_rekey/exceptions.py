"""What the Python API raises where the database refuses; other errors are psycopg's, as they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import pq

from pg_rekey.errors import ENDED, LOCKED, Problem, explain, is_missing
from pg_rekey.hints import Road


class Error(Exception):
    """pg_rekey refuses. code: the SQLSTATE; hint: what to do about it, or None."""

    def __init__(self, message: str, code: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint
        if hint:
            self.add_note(hint)


class Locked(Error):
    """There is no KEK (RK001), or it is not the active one (RK002)."""


class Unreadable(Error):
    """A value does not open: it is damaged, or sealed with another context (RK003)."""


class UnderWay(Error):
    """A rotation of the keyring is under way (RK004)."""


class InUse(Error):
    """It is in use, or a column is blocked (RK005)."""


class WrongState(Error):
    """The state of a key, keyring or rotation does not allow it (RK006)."""


class NotFound(Error):
    """There is no such keyring, rotation or secret (RK007)."""


class Denied(Error):
    """The role of the connection may not, or the tenant is another one (42501)."""


class Unreachable(Error):
    """There is no connection to the database, or not any more; or none of the pool is open, or free."""


_BY_CODE: dict[str, type[Error]] = {
    "RK001": Locked,
    "RK002": Locked,
    "RK003": Unreadable,
    "RK004": UnderWay,
    "RK005": InUse,
    "RK006": WrongState,
    "RK007": NotFound,
    "42501": Denied,
}


@contextmanager
def translated() -> Iterator[None]:
    """Raise what the database refuses as this module's exceptions."""
    try:
        yield
    except psycopg.Error as error:
        kind = _kind(error)
        if kind is None:
            raise
        message, hint = explain(error, Road.PYTHON)
        raise kind(message, error.sqlstate, hint) from error
    except Problem as problem:
        wanted = Locked if problem.exit_code == LOCKED else Error
        raise wanted(problem.message, problem.code, problem.hint) from problem


def _kind(error: psycopg.Error) -> type[Error] | None:
    if isinstance(error, psycopg.OperationalError) and error.sqlstate in (None, *ENDED):
        return Unreachable
    return Error if is_missing(error) else _BY_CODE.get(error.sqlstate or "")


def refuse_transaction(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Refuse what takes many transactions on a connection that is in one."""
    if connection.info.transaction_status != pq.TransactionStatus.IDLE:
        raise Error(
            "waiting for a rotation takes many transactions, and this connection is in one",
            hint="Commit first, give connect() a pool, or leave `wait` out.",
        )
