"""A point-in-time restore to before the destruction of a key: key and rows are there again and fit."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import LiteralString

import pytest

from driving import rotate, rotation, run, states, step
from estate import Estate, configure, copy_data
from helpers import connect, value
from pg_rekey import local


@pytest.fixture
def servers() -> Iterator[tuple[local.Server, local.Server]]:
    """A server, and one where its backups are restored."""
    with local.Server(durable=True) as first, local.Server(durable=True) as second:
        yield first, second


def test_back_to_before_a_destruction(servers: tuple[local.Server, local.Server], kek: bytes) -> None:
    """The key is there again, with the rows of that time; the anchor finds that the log is older."""
    server, second = servers
    archive = server.directory / "archive"
    archive.mkdir()
    owner = server.data.stat()
    os.chown(archive, owner.st_uid, owner.st_gid)
    configure(server, archive_mode="on", archive_command=f"cp %p {archive}/%f")
    server.restart()
    estate = Estate.build(server, "restored", kek)
    then = replace(estate, server=second, secrets=dict(estate.secrets))
    copy_data(server, second)
    with estate.connect() as connection:
        number = rotate(connection)
        while rotation(connection, number, "rows_done") == 0:
            step(connection)
        before = value(connection, "select rekey.audit_checkpoint()::text")
        done = rotation(connection, number, "rows_done")
        value(connection, "select pg_create_restore_point('before')")
        connection.execute("select rekey.set_secret('s1', 'changed'), rekey.set_secret('new', 'new')")
        connection.execute("call rekey.tick()")
        connection.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
        connection.execute("call rekey.tick()")
        assert states(connection) == {1: "destroyed", 2: "active"}
        after = value(connection, "select rekey.audit_checkpoint()::text")
        written = value(connection, "select pg_walfile_name(pg_switch_wal())")
        while not (archive / written).exists():
            time.sleep(0.05)
    server.kill()
    configure(
        second,
        archive_mode="off",
        restore_command=f"cp {archive}/%f %p",
        recovery_target_name="before",
        recovery_target_action="promote",
    )
    second.write("data/recovery.signal", "")
    second.restart()
    with connect(second.dsn()) as connection:
        connection.execute("set statement_timeout = '60 s'")
        while value(connection, "select pg_is_in_recovery()"):
            connection.execute("select pg_sleep(0.05)")
    with then.connect() as connection:
        assert states(connection) == {1: "decrypt_only", 2: "active"}
        assert rotation(connection, number, "state", "rows_done") == ("running", done)
        then.check(connection)
        verify: LiteralString = "select valid, reason from rekey.verify_audit_log(%s)"
        assert connection.execute(verify, [before]).fetchone() == (True, None)
        assert connection.execute(verify, [after]).fetchone() == (False, "the log ends before the anchor")
        run(connection)
        assert rotation(connection, number, "state", "rows_failed") == ("completed", 0)
        then.check(connection)
        # The log has grown past the anchor, and is another one.
        for _ in range(2):
            rotate(connection)
            run(connection)
        assert connection.execute(verify, [before]).fetchone() == (True, None)
        assert connection.execute(verify, [after]).fetchone() == (
            False,
            "the log is not the one that was anchored",
        )
        then.check(connection)
