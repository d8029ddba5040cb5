"""The Python API as coroutines: what client.py has, over psycopg's asynchronous connections and pools."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar
from uuid import UUID

import psycopg
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from pg_rekey import arguments, calls, db, exceptions
from pg_rekey.calls import NIL, Call
from pg_rekey.results import Rotation, Secret, Status

T = TypeVar("T")
AsyncSource = str | psycopg.AsyncConnection[Any] | AsyncConnectionPool[Any] | None


class AsyncRun(Protocol):
    """Runs a call in a transaction."""

    async def __call__(self, call: Call[T], /) -> T:
        """Return what it returns."""


def connect_async(source: AsyncSource = None, *, kek: bytes | str | None = None) -> "AsyncClient":
    """Return a client whose calls are coroutines, to be used in an `async with` statement. As connect()."""
    return AsyncClient(source, kek)


class AsyncSecrets:
    """As Secrets, with coroutines."""

    def __init__(self, run: AsyncRun) -> None:
        self._run = run

    async def get(self, name: str, *, tenant: UUID = NIL) -> str:
        """As Secrets.get()."""
        return await self._run(calls.get(name, tenant))

    async def get_all(self, names: Sequence[str] | None = None, *, tenant: UUID = NIL) -> dict[str, str]:
        """As Secrets.get_all()."""
        return await self._run(calls.get_all(names, tenant))

    async def set(
        self,
        name: str,
        value: str,
        *,
        tenant: UUID = NIL,
        keyring: str = "default",
        description: str | None = None,
    ) -> None:
        """As Secrets.set()."""
        await self._run(calls.store_one(name, value, tenant, keyring, description))

    async def set_all(
        self, values: Mapping[str, str], *, tenant: UUID = NIL, keyring: str = "default"
    ) -> None:
        """As Secrets.set_all()."""
        await self._run(calls.store(values, tenant, keyring, None))

    async def delete(self, name: str, *, tenant: UUID = NIL) -> bool:
        """As Secrets.delete()."""
        return await self._run(calls.delete(name, tenant))

    async def list(self, *, tenant: UUID = NIL) -> list[Secret]:
        """As Secrets.list()."""
        return await self._run(calls.list_secrets(tenant))


class AsyncClient:
    """What connect_async() returns. As Client, with coroutines; tasks may share one that has a pool."""

    def __init__(self, source: AsyncSource, kek: bytes | str | None) -> None:
        with exceptions.translated():
            self._own = db.pool_async(source) if source is None or isinstance(source, str) else None
            self._kek = None if kek is None else db.kek_bytes(kek)
        given = self._own or source
        if not isinstance(given, psycopg.AsyncConnection | AsyncConnectionPool):
            raise arguments.wrong("source", "an asynchronous connection or pool of psycopg, or a str", source)
        self._source: psycopg.AsyncConnection[Any] | AsyncConnectionPool[Any] = given
        self.secrets = AsyncSecrets(self._run)

    async def __aenter__(self) -> Self:
        if self._own:
            await self._own.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._own:
            await self._own.close()

    async def rotate(
        self,
        keyring: str | None = None,
        *,
        wait: bool = False,
        supersede: bool = False,
        reason: str | None = None,
    ) -> list[Rotation]:
        """As Client.rotate()."""
        if arguments.flag("wait", wait) and isinstance(self._source, psycopg.AsyncConnection):
            exceptions.refuse_transaction(self._source)
        begun = await self._run(calls.rotate(keyring, reason, supersede))
        return await self._finish([rotation.id for rotation in begun]) if wait else begun

    async def status(self) -> Status:
        """As Client.status()."""
        return Status(
            await self._run(calls.version()),
            await self._run(calls.keyrings()),
            await self._run(calls.under_way()),
        )

    async def encrypt(
        self, value: bytes | str, *, keyring: str = "default", context: Sequence[str | None] = ()
    ) -> bytes:
        """As Client.encrypt()."""
        return await self._run(calls.encrypt(value, keyring, context))

    async def decrypt(self, sealed: bytes | str, *, context: Sequence[str | None] = ()) -> bytes:
        """As Client.decrypt()."""
        return await self._run(calls.decrypt(sealed, context))

    async def decrypt_many(
        self, sealed: Sequence[bytes | str], *, contexts: Sequence[Sequence[str | None]] = ()
    ) -> list[bytes]:
        """As Client.decrypt_many()."""
        return await self._run(calls.decrypt_many(sealed, contexts))

    async def _finish(self, ids: list[int]) -> list[Rotation]:
        whole = False
        while calls.unfinished(rotations := await self._run(calls.rotations(ids))):
            step = await self._run(calls.step(whole))
            whole = step.is_whole()
            if step.wait:
                await asyncio.sleep(step.wait.total_seconds())
        return rotations

    async def _run(self, call: Call[T]) -> T:
        with exceptions.translated():
            async with self._connection() as connection, connection.transaction():
                if self._kek is not None or db.in_environment():
                    await db.unlock_async(connection, self._kek)
                if call.before:
                    await connection.execute(call.before)
                rows: calls.Rows = []
                for batch in call.batches:
                    if call.table:
                        await db.copy_rows_async(connection, call.table, batch)
                    async with connection.cursor(row_factory=dict_row) as cursor:
                        await cursor.execute(call.statement, call.parameters)
                        rows += await cursor.fetchall()
                    if call.table:
                        await connection.execute(call.table.drop)
                return call.result(rows)

    def _connection(self) -> AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]:
        if isinstance(self._source, AsyncConnectionPool):
            return self._source.connection()
        return nullcontext(self._source)
