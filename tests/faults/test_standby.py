"""The primary is lost in the middle of a rotation, and a streaming standby takes its place."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import LiteralString

import pytest

import pg_rekey
from driving import on_versions, opened, read, refused, rotate, rotation, run, step
from estate import Estate, copy_data
from helpers import Connection, connect, unlock, value
from pg_rekey import local

KEK_FILE = "pg_rekey.kek"
GET: LiteralString = "select rekey.get_secret('s1')"


@pytest.fixture
def pair() -> Iterator[tuple[local.Server, local.Server]]:
    """A primary, and a server that is to be its standby."""
    with local.Server(durable=True) as primary, local.Server(durable=True) as standby:
        yield primary, standby


def follow(primary: local.Server, standby: local.Server) -> None:
    """Make a server a standby that has all that the primary has."""
    copy_data(primary, standby, "-R", "-X", "stream")
    standby.restart()
    catch_up(primary, standby)


def catch_up(primary: local.Server, standby: local.Server) -> None:
    """Wait until the standby has replayed what the primary has written so far."""
    with connect(primary.dsn()) as connection:
        here = value(connection, "select pg_current_wal_lsn()::text")
    with connect(standby.dsn()) as connection:
        connection.execute("set statement_timeout = '60 s'")
        while not value(connection, "select pg_last_wal_replay_lsn() >= %s::pg_lsn", here):
            connection.execute("select pg_sleep(0.01)")


def put_kek(server: local.Server, kek: bytes) -> None:
    """Put the KEK where the provider `file` looks for it."""
    server.write(f"data/{KEK_FILE}", kek.hex())


def reads(copy: Estate) -> None:
    """Assert that what the standby has opens there, with the KEK from a file or from the session."""
    with connect(copy.server.dsn(copy.name)) as reader:
        assert value(reader, "select pg_is_in_recovery()")
        with refused("RK001"):
            reader.execute(GET)
        put_kek(copy.server, copy.kek)
        look(reader, copy)
        (copy.server.data / KEK_FILE).unlink()
        with refused("RK001"):
            reader.execute(GET)
        pg_rekey.unlock(reader, copy.kek, "session")
        look(reader, copy)
        reader.execute("set log_statement = 'all'")
        with pytest.raises(pg_rekey.Locked, match="would log the KEK: log_statement is all"):
            pg_rekey.unlock(reader, copy.kek, "session")
        with refused("25006"):
            unlock(reader, copy.kek)
        with refused("25006"):
            reader.execute("select rekey.set_secret('s1', 'x')")
        with refused("25006"):
            reader.execute("select rekey.rotation_step()")


def look(reader: Connection, copy: Estate) -> None:
    """Read everything in each way."""
    assert read(reader) == copy.secrets
    assert value(reader, GET) == copy.secrets["s1"]
    assert {table: opened(reader, table) for table in copy.columns} == copy.columns


def promote(copy: Estate, primary: local.Server) -> None:
    """Lose the primary, and let the standby take its place."""
    primary.kill()
    with connect(copy.server.dsn()) as connection:
        assert value(connection, "select pg_promote(true, 60)")


def finish(copy: Estate, number: int, done: int) -> None:
    """Assert that what came over is whole, and that the rotation goes on from there."""
    with copy.connect() as connection:
        assert rotation(connection, number, "state", "rows_done") == ("running", done)
        copy.check(connection)
        run(connection)
        assert rotation(connection, number, "state", "rows_failed") == ("completed", 0)
        assert set(on_versions(connection)) == {2}
        copy.check(connection)
        rotate(connection)
        run(connection)
        copy.check(connection)


def test_an_asynchronous_standby_is_promoted(pair: tuple[local.Server, local.Server], kek: bytes) -> None:
    """What it had not received is lost with the primary; nothing of it is left half done."""
    primary, standby = pair
    estate = Estate.build(primary, "replicated", kek)
    follow(primary, standby)
    with estate.connect() as connection:
        connection.execute("select rekey.set_setting('kek_provider', 'file')")
        number = begin(connection)
        connection.execute("select rekey.set_secret('s1', 'changed')")
        estate.secrets["s1"] = "changed"
        done = rotation(connection, number, "rows_done")
        catch_up(primary, standby)
        copy = replace(estate, server=standby)
        reads(copy)
        with connect(standby.dsn()) as other:
            other.execute("alter system set primary_conninfo = ''")
            other.execute("select pg_reload_conf()")
            while value(other, "select count(*) from pg_stat_wal_receiver"):
                time.sleep(0.01)
        connection.execute("select rekey.set_secret('s2', 'lost')")
        assert step(connection)[0] == "batch"
        assert rotation(connection, number, "rows_done") > done
    promote(copy, primary)
    finish(copy, number, done)


def test_a_synchronous_standby_is_promoted(pair: tuple[local.Server, local.Server], kek: bytes) -> None:
    """It has all that was committed."""
    primary, standby = pair
    estate = Estate.build(primary, "replicated", kek)
    follow(primary, standby)
    with estate.connect() as connection:
        connection.execute("alter system set synchronous_standby_names = '*'")
        connection.execute("select pg_reload_conf()")
        while not value(connection, "select count(*) from pg_stat_replication where sync_state = 'sync'"):
            time.sleep(0.01)
        number = begin(connection)
        connection.execute("select rekey.set_secret('s1', 'changed')")
        done = rotation(connection, number, "rows_done")
    estate.secrets["s1"] = "changed"
    copy = replace(estate, server=standby)
    primary.kill()
    with connect(standby.dsn()) as other:
        assert value(other, "select pg_promote(true, 60)")
        other.execute("alter system reset synchronous_standby_names")
        other.execute("select pg_reload_conf()")
    finish(copy, number, done)


def begin(connection: Connection) -> int:
    """Begin a rotation, and leave it in the middle."""
    number = rotate(connection)
    while rotation(connection, number, "rows_done") == 0:
        step(connection)
    return number
