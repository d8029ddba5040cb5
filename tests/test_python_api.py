"""The Python API, over connections, pools and the environment, waiting and as coroutines."""

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool

import pg_rekey
from cli_fixtures import environment
from helpers import Connection, value
from pg_rekey import kek as keks
from pg_rekey.client import Client, Secrets
from pg_rekey.client_async import AsyncClient, AsyncSecrets

__all__ = ["environment"]

TENANT = UUID("11111111-2222-3333-4444-555555555555")
# A wrong KEK.
OTHER = bytes(32)


class Waiting:
    """An AsyncClient that is called as a Client is: each call runs a loop until it has ended."""

    def __init__(self, source: str, kek: bytes) -> None:
        self._source, self._kek = source, kek
        self.secrets = self._of(lambda client: client.secrets)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of(lambda client: client), name)

    def _of(self, part: Callable[[AsyncClient], Any]) -> Any:
        outer = self

        class Part:
            def __getattr__(self, name: str) -> Callable[..., Any]:
                def call(*given: Any, **options: Any) -> Any:
                    async def run() -> Any:
                        async with pg_rekey.connect_async(outer._source, kek=outer._kek) as client:
                            return await getattr(part(client), name)(*given, **options)

                    return asyncio.run(run())

                return call

        return Part()


@pytest.fixture(params=["sync", "async"])
def rekey(request: pytest.FixtureRequest, ready: Connection, db: str, kek: bytes) -> Iterator[Client]:
    if request.param == "async":
        yield Waiting(db, kek)  # type: ignore[misc]
        return
    with pg_rekey.connect(db, kek=kek) as client:
        yield client


def test_secrets(rekey: Client) -> None:
    rekey.secrets.set("STRIPE_KEY", "sk_live_51H8x2", description="of the shop")
    rekey.secrets.set("a", "of a tenant", tenant=TENANT)
    rekey.secrets.set_all({"b": "2", "c": "3"})
    assert rekey.secrets.get("STRIPE_KEY") == "sk_live_51H8x2"
    assert rekey.secrets.get("a", tenant=TENANT) == "of a tenant"
    assert rekey.secrets.get_all(["b", "c", "none"]) == {"b": "2", "c": "3"}
    assert len(rekey.secrets.get_all()) == 3
    first, *others = rekey.secrets.list()
    assert (first.name, first.keyring, first.key_version) == ("STRIPE_KEY", "default", 1)
    assert (first.description, [one.name for one in others]) == ("of the shop", ["b", "c"])
    assert rekey.secrets.delete("b")
    assert not rekey.secrets.delete("b")
    with pytest.raises(pg_rekey.NotFound) as raised:
        rekey.secrets.get("b")
    assert raised.value.code == "RK007"
    assert raised.value.hint == "See secrets.list() for the names that there are."


def test_plain_values_are_no_parameters_and_leave_nothing(ready: Connection) -> None:
    """Several calls in one transaction: each copies them into a table of its own, and drops it."""
    asked: list[Any] = []

    class Asking(psycopg.Cursor[Any]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
            asked.extend([query, params])
            return super().execute(query, params, **options)

    ready.cursor_factory = Asking
    with ready.transaction(), pg_rekey.connect(ready) as client:
        client.secrets.set("a", "canary one")
        client.secrets.set_all({"b": "canary two"})
        sealed = [client.encrypt("canary three"), client.encrypt(b"canary four")]
        assert value(ready, "select count(*) from pg_class where relname ~ '^pg_rekey_'") == 0
        assert [client.decrypt(one) for one in sealed] == [b"canary three", b"canary four"]
    assert "canary" not in repr(asked)
    assert len(asked) > 10


def test_values(rekey: Client) -> None:
    sealed = rekey.encrypt("a value", context=["accounts", "7", None])
    assert isinstance(sealed, bytes)
    assert rekey.decrypt(sealed, context=["accounts", "7", None]) == b"a value"
    assert rekey.decrypt(rekey.encrypt(b"\x00\xff")) == b"\x00\xff"
    with pytest.raises(pg_rekey.Unreadable) as raised:
        rekey.decrypt(sealed, context=["accounts", "8", None])
    assert raised.value.code == "RK003"


def test_the_text_form(rekey: Client, ready: Connection) -> None:
    assert rekey.decrypt(str(value(ready, "select rekey.encrypt_text('a value')"))) == b"a value"


def test_rotation(rekey: Client, ready: Connection) -> None:
    rekey.secrets.set_all({f"s{n}": "value" for n in range(300)})
    [rotation] = rekey.rotate("default", reason="quarterly")
    assert (rotation.state, rotation.to_version, rotation.reason) == ("queued", 2, "quarterly")
    assert [one.id for one in rekey.status().rotations] == [rotation.id]
    with pytest.raises(pg_rekey.UnderWay) as raised:
        rekey.rotate("default")
    assert "supersede=True" in (raised.value.hint or "")
    [rotation] = rekey.rotate("default", supersede=True, wait=True)
    assert (rotation.state, rotation.rows_done, rotation.rows_total) == ("completed", 300, 300)
    assert {one.key_version for one in rekey.secrets.list()} == {3}
    with pytest.raises(pg_rekey.NotFound) as raised_too:
        rekey.rotate("defualt")
    assert "status().keyrings" in (raised_too.value.hint or "")


def test_a_rotation_that_leaves_rows(rekey: Client, ready: Connection) -> None:
    rekey.secrets.set_all({"a": "1", "b": "2"})
    ready.execute(
        "update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)"
        " where name = 'a'"
    )
    [rotation] = rekey.rotate(wait=True)
    assert (rotation.state, rotation.rows_failed) == ("completed_with_failures", 1)
    assert [one.id for one in rekey.status().rotations] == [rotation.id]


def test_status(rekey: Client, ready: Connection) -> None:
    ready.execute("select rekey.set_schedule('default', '90 days')")
    status = rekey.status()
    assert status.version == value(ready, "select rekey.version()")
    [keyring] = status.keyrings
    assert (keyring.keyring, keyring.version, keyring.overdue) == ("default", 1, False)
    assert keyring.rotate_every == timedelta(days=90)
    assert status.rotations == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_wrong_kek(asynchronous: bool, ready: Connection, db: str) -> None:
    client: Any = Waiting(db, OTHER) if asynchronous else None
    with pg_rekey.connect(db, kek=OTHER) as waiting, pytest.raises(pg_rekey.Locked) as raised:
        (client or waiting).secrets.get_all()
    assert raised.value.code == "RK002"


def test_without_a_kek(ready: Connection, db: str, environment: None) -> None:
    with pg_rekey.connect(db) as client, pytest.raises(pg_rekey.Locked) as raised:
        client.secrets.set("a", "value")
    assert raised.value.code == "RK001"
    assert "Give connect() the KEK" in (raised.value.hint or "")


def test_what_the_environment_gives(
    ready: Connection, db: str, kek: bytes, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_DSN", db)
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    with pg_rekey.connect() as client:
        client.secrets.set("a", "value")

    async def read() -> str:
        async with pg_rekey.connect_async() as rekey:
            return await rekey.secrets.get("a")

    assert asyncio.run(read()) == "value"
    monkeypatch.setenv("PG_REKEY_KEK", "not a key")
    keks.forget()
    with pg_rekey.connect() as client, pytest.raises(pg_rekey.Locked, match="hexadecimal"):
        client.secrets.get("a")


def test_a_connection_of_ones_own(ready: Connection, db: str, kek: bytes) -> None:
    """Its transaction decides, and it stays open; nothing of its settings changes."""
    with psycopg.connect(db) as connection:
        connection.execute("set search_path = pg_temp, public")
        connection.commit()
        with pg_rekey.connect(connection, kek=kek) as client:
            client.secrets.set("kept", "1")
            assert value(ready, "select count(*) from rekey.secrets") == 1
            connection.execute("select 1")
            client.secrets.set("undone", "2")
            with pytest.raises(pg_rekey.Error, match="takes many transactions"):
                client.rotate(wait=True)
            connection.rollback()
            assert list(client.secrets.get_all()) == ["kept"]
            assert client.rotate(wait=True)[0].state == "completed"
        assert not connection.closed
        assert connection.execute("show search_path").fetchall() == [("pg_temp, public",)]
        assert connection.execute("show statement_timeout").fetchall() == [("0",)]


def test_an_asynchronous_connection_of_ones_own(ready: Connection, db: str, kek: bytes) -> None:
    async def use() -> None:
        async with await psycopg.AsyncConnection.connect(db) as connection:
            async with pg_rekey.connect_async(connection, kek=kek) as client:
                await client.secrets.set("a", "1")
                await connection.execute("select 1")
                with pytest.raises(pg_rekey.Error, match="takes many transactions"):
                    await client.rotate(wait=True)
                await connection.rollback()
                assert (await client.rotate(wait=True))[0].state == "completed"
            assert not connection.closed

    asyncio.run(use())


def test_pools_of_ones_own(ready: Connection, db: str, kek: bytes) -> None:
    with ConnectionPool(db, min_size=1, open=True) as pool, pg_rekey.connect(pool, kek=kek) as client:
        client.secrets.set("a", "1")
        client.rotate(wait=True)
        assert not pool.closed

    async def use() -> str:
        async with (
            AsyncConnectionPool(db, min_size=1, open=False) as pool,
            pg_rekey.connect_async(pool, kek=kek) as client,
        ):
            return await client.secrets.get("a")

    assert asyncio.run(use()) == "1"


def test_other_errors_are_psycopgs(ready: Connection, db: str, kek: bytes) -> None:
    with pg_rekey.connect(db, kek=kek) as client, pytest.raises(psycopg.errors.InvalidParameterValue):
        client.secrets.set("", "value")


def test_on_a_read_only_server(ready: Connection, db: str, kek: bytes) -> None:
    with pg_rekey.connect(db, kek=kek) as client:
        client.secrets.set("a", "1")
    read_only = psycopg.conninfo.make_conninfo(db, options="-c default_transaction_read_only=on")
    with pg_rekey.connect(read_only, kek=kek) as client:
        assert client.secrets.get("a") == "1"
    assert Waiting(read_only, kek).secrets.get("a") == "1"


NOWHERE = "host=127.0.0.1 port=1 user=nobody dbname=none connect_timeout=1"
WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda client: client.rotate(7), "keyring is a str, not int"),
    (lambda client: client.rotate(b"default"), "keyring is a str, not bytes"),
    (lambda client: client.rotate(reason=7), "reason is a str, not int"),
    (lambda client: client.rotate(supersede="yes"), "supersede is True or False, not str"),
    (lambda client: client.rotate(supersede=None), "supersede is True or False, not None"),
    (lambda client: client.rotate(wait=1), "wait is True or False, not int"),
    (lambda client: client.encrypt(None), "value is bytes or a str, not None"),
    (lambda client: client.encrypt(7), "value is bytes or a str, not int"),
    (lambda client: client.encrypt("x", keyring=None), "keyring is a str, not None"),
    (lambda client: client.encrypt("x", context=["x", 7]), "each part of context is a str, not int"),
    (lambda client: client.encrypt("x", context="x"), "context is a list of str or None, not str"),
    (lambda client: client.encrypt("x", context=None), "context is a list of str or None, not None"),
    (lambda client: client.encrypt("x", context={"a", "b"}), "context is a list of str or None, not set"),
    (lambda client: client.decrypt(None), "sealed is bytes or a str, not None"),
    (lambda client: client.decrypt(b"x", context=[TENANT]), "each part of context is a str, not UUID"),
    (lambda client: client.decrypt_many(b"x"), "sealed is a list of sealed values, not bytes"),
    (lambda client: client.decrypt_many([None]), "each of sealed is bytes or a str, not None"),
    (lambda client: client.decrypt_many([b"x"], contexts=[7]), "each of contexts is a list of str or None"),
    (lambda client: client.decrypt_many([b"x"], contexts=["x"]), "each of contexts is a list of str or None"),
    (lambda client: client.decrypt_many([b"x"], contexts="x"), "contexts is a list of contexts, not str"),
    (lambda client: client.decrypt_many([b"x"], contexts=[["x", 7]]), "each part of each of contexts is"),
    (lambda client: client.secrets.get(7), "name is a str, not int"),
    (lambda client: client.secrets.get(None), "name is a str, not None"),
    (lambda client: client.secrets.get("a", tenant=str(TENANT)), "tenant is a uuid.UUID, not str"),
    (lambda client: client.secrets.get_all("a"), "names is a list of str, not str"),
    (lambda client: client.secrets.get_all(["a", 7]), "each of names is a str, not int"),
    (lambda client: client.secrets.get_all(tenant=None), "tenant is a uuid.UUID, not None"),
    (lambda client: client.secrets.set("a", None), "value is a str, not None"),
    (lambda client: client.secrets.set("a", b"canary"), "value is a str, not bytes"),
    (lambda client: client.secrets.set(["a"], "canary"), "name is a str, not list"),
    (lambda client: client.secrets.set("a", "canary", description=7), "description is a str, not int"),
    (lambda client: client.secrets.set("a", "canary", keyring=7), "keyring is a str, not int"),
    (lambda client: client.secrets.set_all([("a", "canary")]), "values is a dict of names and values"),
    (lambda client: client.secrets.set_all({"a": 7}), "each value in values is a str, not int"),
    (lambda client: client.secrets.set_all({7: "canary"}), "each name in values is a str, not int"),
    (lambda client: client.secrets.delete(None), "name is a str, not None"),
    (lambda client: client.secrets.delete("a", tenant=7), "tenant is a uuid.UUID, not int"),
    (lambda client: client.secrets.list(tenant=""), "tenant is a uuid.UUID, not str"),
    (lambda client: client.secrets.set("a", "canary\0"), "value: text in PostgreSQL cannot hold a NUL"),
    (lambda client: client.secrets.get("a\0"), "name: text in PostgreSQL cannot hold a NUL"),
    (lambda client: client.encrypt("x", context=["\0"]), "each part of context: text in PostgreSQL cannot"),
    (lambda client: client.encrypt("canary\ud800"), "value has characters that UTF-8 has not"),
    (lambda client: client.secrets.set("a", "canary\ud800"), "value has characters that UTF-8 has not"),
    (lambda client: client.decrypt_many([b"x"], contexts=[["a"], ["b"]]), "one for each value: 1, not 2"),
    (lambda client: client.decrypt_many([b"x", b"y"], contexts=[["a"], ["b", "c"]]), "have as many parts"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_wrong_arguments_are_told_before_anything_is_sent(
    call: Callable[[Any], Any], message: str, asynchronous: bool
) -> None:
    """There is nothing to send it to. No error quotes a value."""

    async def coroutine() -> Any:
        return await call(pg_rekey.connect_async(NOWHERE))

    with pytest.raises((TypeError, ValueError)) as raised:
        asyncio.run(coroutine()) if asynchronous else call(pg_rekey.connect(NOWHERE))
    assert message in str(raised.value)
    said: BaseException | None = raised.value
    while said:
        assert "canary" not in repr(said)
        said = said.__cause__


@pytest.mark.parametrize("connect", [pg_rekey.connect, pg_rekey.connect_async])
def test_a_source_or_a_kek_that_is_none(connect: Any, environment: None) -> None:
    with pytest.raises(TypeError, match="connection or pool of psycopg, or a str, not int"):
        connect(7)
    with pytest.raises(TypeError, match="kek is 32 bytes, or a str, not list"):
        connect(NOWHERE, kek=[1])
    with pytest.raises(pg_rekey.Locked, match="32 bytes"):
        connect(NOWHERE, kek=b"short")
    with pytest.raises(pg_rekey.Error, match="the connection string starts with mysql://") as raised:
        connect("mysql://u:canary@h/d")
    assert "postgresql://" in (raised.value.hint or "")
    assert "canary" not in repr(raised.value.__cause__)


def test_clients_take_each_its_own_kind_of_connection(ready: Connection) -> None:
    with pytest.raises(TypeError, match="an asynchronous connection or pool of psycopg, or a str"):
        pg_rekey.connect_async(ready)  # type: ignore[arg-type]
    asynchronous = AsyncConnectionPool("", open=False)
    with pytest.raises(TypeError, match="a connection or pool of psycopg, or a str, not AsyncConnectionPool"):
        pg_rekey.connect(asynchronous)  # type: ignore[arg-type]


def test_a_pool_that_is_not_open() -> None:
    with pytest.raises(pg_rekey.Unreachable, match="not open yet") as raised:
        pg_rekey.connect(NOWHERE).status()
    assert (
        raised.value.hint == "Use the client in a `with` statement, and a pool of your own once it is open."
    )

    async def use() -> None:
        await pg_rekey.connect_async(NOWHERE).status()

    with pytest.raises(pg_rekey.Unreachable, match="not open yet"):
        asyncio.run(use())
    with pg_rekey.connect(NOWHERE) as client:
        pass
    with pytest.raises(pg_rekey.Unreachable, match="closed"):
        client.status()


def test_a_server_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pg_rekey.db.POOL_TIMEOUT", 0.3)
    with pg_rekey.connect(NOWHERE) as client, pytest.raises(pg_rekey.Unreachable) as raised:
        client.status()
    assert "The logger psycopg.pool says what it answers." in (raised.value.hint or "")
    assert [one for one in caplog.records if one.name == "psycopg.pool" and one.levelno == logging.WARNING]

    async def use() -> None:
        async with pg_rekey.connect_async(NOWHERE) as rekey:
            await rekey.status()

    with pytest.raises(pg_rekey.Unreachable):
        asyncio.run(use())


def test_a_connection_that_was_lost(ready: Connection, db: str) -> None:
    with psycopg.connect(db) as connection, pg_rekey.connect(connection) as client:
        client.status()
        ready.execute("select pg_terminate_backend(%s, 10000)", [connection.info.backend_pid])
        with pytest.raises(pg_rekey.Unreachable) as raised:
            client.status()
        assert raised.value.hint == "What was under way may have been committed: status() shows rotations."
        with pytest.raises(pg_rekey.Unreachable, match="lost"):
            client.status()


def test_a_database_without_pg_rekey(make_database: Callable[..., str]) -> None:
    with pg_rekey.connect(make_database()) as client, pytest.raises(pg_rekey.Error) as raised:
        client.secrets.list()
    assert "`pg-rekey init`" in (raised.value.hint or "")


@pytest.mark.parametrize(("waiting", "coroutines"), [(Client, AsyncClient), (Secrets, AsyncSecrets)])
def test_both_have_the_same_calls(waiting: type, coroutines: type) -> None:
    def calls(of: type) -> dict[str, str]:
        found = inspect.getmembers(of, inspect.isfunction)
        return {name: str(inspect.signature(call)) for name, call in found if not name.startswith("_")}

    assert calls(waiting) == calls(coroutines)
    for of in (waiting, coroutines):
        assert all(inspect.getdoc(getattr(of, name)) for name in calls(of))
