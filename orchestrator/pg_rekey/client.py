"""The Python API: what an application calls, over psycopg's connections and pools."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar
from uuid import UUID

import psycopg
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from pg_rekey import arguments, calls, db, exceptions
from pg_rekey.calls import NIL, Call
from pg_rekey.results import Rotation, Secret, Status

T = TypeVar("T")
Source = str | psycopg.Connection[Any] | ConnectionPool[Any] | None


class Run(Protocol):
    """Runs a call in a transaction."""

    def __call__(self, call: Call[T], /) -> T:
        """Return what it returns."""


def connect(source: Source = None, *, kek: bytes | str | None = None) -> "Client":
    """Return a client, to be used in a `with` statement.

    source: a psycopg connection or pool, which stays open afterwards; a connection string, for a pool of the
    client's own of at most 4 connections; None: the database that PG_REKEY_DSN or DATABASE_URL names.

    kek: the key-encryption key, 32 bytes, or 64 hexadecimal characters or base64; None: that of PG_REKEY_KEK,
    PG_REKEY_KEK_FILE or PG_REKEY_KEK_COMMAND, or, where none of them is set, the one that the server finds.

    Each call is a transaction of its own; on a connection that is in one, a part of that.
    """
    return Client(source, kek)


def unlock(
    connection: psycopg.Connection[Any],
    kek: bytes | str | None = None,
    scope: db.Scope = "transaction",
    new_kek: bytes | str | None = None,
) -> str:
    """Let the transaction or session of a connection use the KEK, and return the KEK's fingerprint.

    kek: as connect() takes it; None: that of the environment, PG_REKEY_KEK, PG_REKEY_KEK_FILE or
    PG_REKEY_KEK_COMMAND, and the next one from PG_REKEY_NEW_KEK and so on, of which the one that the database
    has as active is used. A command runs once in a process, and again where the database refuses what it
    printed. No log shows the KEK.

    scope: "transaction" lasts to the end of the transaction, which is begun if there is none; "session" to
    the end of the connection, and does not belong behind a transaction pooler.

    Locked: there is no KEK (RK001), or it is a wrong one (RK002).
    """
    with exceptions.translated():
        return db.unlock(connection, kek, scope, new_kek)


class Secrets:
    """The secrets of a database. tenant: the nil UUID by default."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def get(self, name: str, *, tenant: UUID = NIL) -> str:
        """Return the value of a secret. NotFound: RK007; Unreadable: RK003; Locked: RK001, RK002."""
        return self._run(calls.get(name, tenant))

    def get_all(self, names: Sequence[str] | None = None, *, tenant: UUID = NIL) -> dict[str, str]:
        """Return the values of many secrets by name, in one call; None: all. What is missing is left out."""
        return self._run(calls.get_all(names, tenant))

    def set(
        self,
        name: str,
        value: str,
        *,
        tenant: UUID = NIL,
        keyring: str = "default",
        description: str | None = None,
    ) -> None:
        """Store a secret, new or in place of the value before: at most 32 MiB of UTF-8. No log shows it."""
        self._run(calls.store_one(name, value, tenant, keyring, description))

    def set_all(self, values: Mapping[str, str], *, tenant: UUID = NIL, keyring: str = "default") -> None:
        """Store many secrets, in one transaction."""
        self._run(calls.store(values, tenant, keyring, None))

    def delete(self, name: str, *, tenant: UUID = NIL) -> bool:
        """Delete a secret, for good; return whether there was one."""
        return self._run(calls.delete(name, tenant))

    def list(self, *, tenant: UUID = NIL) -> list[Secret]:
        """Return what there is to know of all secrets but their values, by name."""
        return self._run(calls.list_secrets(tenant))


class Client:
    """What connect() returns. Threads may share it where its source is a pool or a connection string."""

    def __init__(self, source: Source, kek: bytes | str | None) -> None:
        with exceptions.translated():
            self._own = db.pool(source) if source is None or isinstance(source, str) else None
            self._kek = None if kek is None else db.kek_bytes(kek)
        given = self._own or source
        if not isinstance(given, psycopg.Connection | ConnectionPool):
            raise arguments.wrong("source", "a connection or pool of psycopg, or a str", source)
        self._source: psycopg.Connection[Any] | ConnectionPool[Any] = given
        self.secrets = Secrets(self._run)

    def __enter__(self) -> Self:
        if self._own:
            self._own.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._own:
            self._own.close()

    def rotate(
        self,
        keyring: str | None = None,
        *,
        wait: bool = False,
        supersede: bool = False,
        reason: str | None = None,
    ) -> list[Rotation]:
        """Make a new key version, active at once, and queue the re-encryption of all rows.

        keyring: None rotates every one; those under way are returned as they are. wait: re-encrypt here, in
        many transactions, and return when every row was verified, or the rotation failed, or was paused; a
        connection must not be in a transaction then. supersede: take over the rows of a rotation under way.
        reason: for the audit log.

        Locked: no KEK (RK001), or a wrong one (RK002); UnderWay: RK004; InUse: RK005; NotFound: RK007.
        """
        if arguments.flag("wait", wait) and isinstance(self._source, psycopg.Connection):
            exceptions.refuse_transaction(self._source)
        begun = self._run(calls.rotate(keyring, reason, supersede))
        return self._finish([rotation.id for rotation in begun]) if wait else begun

    def status(self) -> Status:
        """Return how keyrings stand, and the rotations that are under way or left failures."""
        return Status(
            self._run(calls.version()),
            self._run(calls.keyrings()),
            self._run(calls.under_way()),
        )

    def encrypt(
        self, value: bytes | str, *, keyring: str = "default", context: Sequence[str | None] = ()
    ) -> bytes:
        """Return a value sealed with the active version of a keyring.

        value: at most 32 MiB; of a str, its UTF-8. No log shows it. context:
        what it belongs to, such as its table, column and row: it opens with the same context only.

        Locked: RK001, RK002; NotFound: RK007; WrongState: the keyring is retired (RK006).
        """
        return self._run(calls.encrypt(value, keyring, context))

    def decrypt(self, sealed: bytes | str, *, context: Sequence[str | None] = ()) -> bytes:
        """Return what was sealed, from its bytes, or its text form (rk1:...).

        Locked: RK001, RK002; Unreadable: it is damaged, or sealed with another context (RK003).
        """
        return self._run(calls.decrypt(sealed, context))

    def decrypt_many(
        self, sealed: Sequence[bytes | str], *, contexts: Sequence[Sequence[str | None]] = ()
    ) -> list[bytes]:
        """Return what was sealed, of many values in one call, in their order.

        contexts: one for each value, all with as many parts; left out: none has one.

        Locked: RK001, RK002; Unreadable: one of them is damaged, or sealed with another context (RK003);
        WrongState: the key of one of them may not be used (RK006).
        """
        return self._run(calls.decrypt_many(sealed, contexts))

    def _finish(self, ids: list[int]) -> list[Rotation]:
        whole = False
        while calls.unfinished(rotations := self._run(calls.rotations(ids))):
            step = self._run(calls.step(whole))
            whole = step.is_whole()
            if step.wait:
                time.sleep(step.wait.total_seconds())
        return rotations

    def _run(self, call: Call[T]) -> T:
        with exceptions.translated(), self._connection() as connection, connection.transaction():
            if self._kek is not None or db.in_environment():
                db.unlock(connection, self._kek)
            if call.before:
                connection.execute(call.before)
            rows: calls.Rows = []
            for batch in call.batches:
                if call.table:
                    db.copy_rows(connection, call.table, batch)
                with connection.cursor(row_factory=dict_row) as cursor:
                    rows += cursor.execute(call.statement, call.parameters).fetchall()
                if call.table:
                    connection.execute(call.table.drop)
            return call.result(rows)

    def _connection(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        if isinstance(self._source, ConnectionPool):
            return self._source.connection()
        return nullcontext(self._source)
