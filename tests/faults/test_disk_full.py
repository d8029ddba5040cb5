"""The disk is full in the middle of a rotation: it says so, loses nothing, and goes on with more space."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest

from driving import refused, rotate, rotation, run, step, step_until
from estate import Estate
from helpers import Connection, value
from pg_rekey import local

MB = 1024 * 1024
# Ends with this process, in whatever way: the file system is unmounted then, once its server is gone.
UNMOUNT = 'cat; until umount "$0"; do sleep 0.1; done; rmdir "$0"'


class Disk:
    """A small file system in memory, whose size can be changed."""

    def __init__(self) -> None:
        """Mount it, or skip the test."""
        self.path = Path(tempfile.mkdtemp(prefix="pgrk-disk-", dir="/tmp"))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={512 * MB}", "pg_rekey_test", str(self.path)]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            self.path.rmdir()
            pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", UNMOUNT, self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def leave(self, free: int) -> None:
        """Make it so small, or so large, that this is free."""
        found = os.statvfs(self.path)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        subprocess.run(["mount", "-o", f"remount,size={used + free}", self.path], check=True)

    def unmount(self) -> None:
        """Unmount it."""
        assert self._guard.stdin
        self._guard.stdin.close()
        assert self._guard.wait(60) == 0


@pytest.fixture
def disk() -> Iterator[Disk]:
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root mounts a file system")
    disk = Disk()
    yield disk
    disk.unmount()


@pytest.fixture
def server(disk: Disk) -> Iterator[local.Server]:
    # No checkpoint comes by itself and makes or frees files.
    with local.Server(durable=True, settings={"max_wal_size": "4GB", "checkpoint_timeout": "1h"}) as server:
        yield server


def move(server: local.Server, name: str, disk: Disk) -> None:
    """Move a directory of the server to the disk."""
    server.kill()
    shutil.copytree(server.data / name, disk.path / name)
    owner = server.data.stat()
    for path in [disk.path / name, *(disk.path / name).rglob("*")]:
        os.chown(path, owner.st_uid, owner.st_gid)
    shutil.rmtree(server.data / name)
    (server.data / name).symlink_to(disk.path / name)
    server.restart()


def begin(connection: Connection) -> int:
    """Begin a rotation, and leave it in the middle."""
    number = rotate(connection)
    while rotation(connection, number, "rows_done") == 0:
        step(connection)
    return number


def test_no_space_for_data(server: local.Server, disk: Disk, kek: bytes) -> None:
    estate = Estate.build(server, "full", kek, rows=1000)
    move(server, "base", disk)
    with estate.connect() as connection:
        number = begin(connection)
        done = rotation(connection, number, "rows_done")
        # The first entry of its kind takes a page of its index.
        connection.execute("select rekey._audit('access.denied')")
        disk.leave(0)

        # There is space for what happened: it is noted.
        assert step_until(connection, "error")[-1] == "error"
        state, last_error = rotation(connection, number, "state", "last_error")
        assert state == "running"
        assert "No space left on device" in last_error
        query: LiteralString = (
            "select details ->> 'sqlstate' from rekey.audit_log where event = 'rotation.error'"
        )
        assert value(connection, query) == "53100"
        estate.check(connection)

        # There is none any more, not even for an entry of the audit log: whoever works is told.
        with refused("53100"):
            for n in range(1000):
                connection.execute("select rekey.set_setting('max_attempts', %s)", [str(100 + n)])
        time.sleep(1)  # the pause after the first error
        with refused("53100"):
            step_until(connection, "completed")
        with refused("53100"):
            connection.execute("call rekey.run_rotations()")
        estate.check(connection)
        assert rotation(connection, number, "attempts") == 1
        assert rotation(connection, number, "rows_done") >= done

        disk.leave(256 * MB)
        run(connection)
        assert rotation(connection, number, "state", "rows_done") == ("completed", estate.rows)
        estate.check(connection)


def test_no_space_for_wal(server: local.Server, disk: Disk, kek: bytes) -> None:
    """The server ends itself (PANIC), and cannot even recover before there is space."""
    estate = Estate.build(server, "full", kek, rows=1000)
    move(server, "pg_wal", disk)
    with estate.connect() as connection:
        number = begin(connection)
        done = rotation(connection, number, "rows_done")
        fill_segments(connection, disk)
        disk.leave(0)
        with pytest.raises(psycopg.OperationalError):
            run(connection)
    assert "PANIC" in server._run("/usr/bin/env", "cat", server.log)
    disk.leave(256 * MB)
    server.restart("immediate")  # it may be in the middle of a recovery, where it obeys no other
    with estate.connect() as connection:
        assert done <= rotation(connection, number, "rows_done") < estate.rows
        estate.check(connection)
        run(connection)
        assert rotation(connection, number, "state", "rows_done") == ("completed", estate.rows)
        estate.check(connection)


def fill_segments(connection: Connection, disk: Disk) -> None:
    """Write WAL until the last file of it that there is has little space left."""
    size = 16 * MB
    while True:
        name, offset = connection.execute(
            "select file_name, file_offset from pg_walfile_name_offset(pg_current_wal_insert_lsn())"
        ).fetchone() or ("", 0)
        last = max(path.name for path in (disk.path / "pg_wal").iterdir() if len(path.name) == 24)
        space = size - offset if name == last else size
        if space < MB // 2:
            return
        emit: LiteralString = "select pg_logical_emit_message(false, 'fill', repeat('x', %s))"
        connection.execute(emit, [min(space - MB // 4, 4 * MB)])
