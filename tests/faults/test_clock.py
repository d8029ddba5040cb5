"""The clock of the server jumps: no rotation comes twice, no key is destroyed early, nothing hangs."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import pytest

from driving import events, rotate, rotation, run, states, step_until
from estate import Estate
from helpers import Connection, destroy_due, value
from pg_rekey import local

numbers = itertools.count(1)


class Clock:
    """What the server takes for the time: the real one, and an offset that can be changed at any moment."""

    def __init__(self, library: Path, folder: Path) -> None:
        """Begin with the real time."""
        folder.chmod(0o755)
        self._file = folder / "time"
        self.jump("+0")
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            # What waits must still wake up; and shared memory is none of its business.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DISABLE_SHM": "1",
        }

    def jump(self, offset: str) -> None:
        """Set the clock to this far from the real time: +60d, -2d."""
        new = self._file.with_suffix(".new")
        new.write_text(offset)
        new.replace(self._file)


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip("libfaketime is not installed")
    with tempfile.TemporaryDirectory(prefix="pgrk-clock-", dir="/tmp") as folder:
        yield Clock(found[0], Path(folder))


@pytest.fixture(scope="module")
def server(clock: Clock) -> Iterator[local.Server]:
    with local.Server(environment=clock.environment) as server:
        yield server


@pytest.fixture
def estate(server: local.Server, clock: Clock, kek: bytes) -> Iterator[Estate]:
    clock.jump("+0")
    yield Estate.build(server, f"jumped_{next(numbers)}", kek)
    clock.jump("+0")


def scheduled(connection: Connection) -> int:
    """Count the rotations that a schedule began."""
    return int(value(connection, "select count(*) from rekey.rotations where trigger = 'schedule'"))


def tick(connection: Connection) -> None:
    connection.execute("call rekey.tick()")


def test_the_clock_is_false(estate: Estate, clock: Clock) -> None:
    """The server follows: without this, the tests below would say nothing."""
    with estate.connect() as connection:
        real = value(connection, "select clock_timestamp()")
        for days in (60, -2):
            clock.jump(f"{days:+}d")
            found = value(connection, "select clock_timestamp()") - real
            assert abs(found.total_seconds() / 86400 - days) < 0.01


@pytest.mark.parametrize(("jump", "rotations"), [("-2d", 1), ("+60d", 2)])
def test_a_schedule_is_kept_over_a_jump(estate: Estate, clock: Clock, jump: str, rotations: int) -> None:
    """However far it jumps, a schedule is due once at most; back again, it does not rotate again."""
    with estate.connect() as connection:
        connection.execute("select rekey.set_schedule('default', '30 days', now() - interval '1 minute')")
        tick(connection)
        assert scheduled(connection) == 1
        for offset in (jump, jump, "+0", "+0"):
            clock.jump(offset)
            tick(connection)
            tick(connection)
            estate.check(connection)
        assert scheduled(connection) == rotations
        assert value(connection, "select count(*) from rekey.rotations where state <> 'completed'") == 0
        assert "rotation.error" not in events(connection)


@pytest.mark.parametrize("jump", ["+60d", "-2d"])
def test_a_destruction_is_not_brought_forward_by_a_jump(estate: Estate, clock: Clock, jump: str) -> None:
    with estate.connect() as connection:
        rotate(connection)
        tick(connection)
        connection.execute("select rekey.schedule_key_destruction('default', 1)")  # in 45 days
        clock.jump(jump)
        for _ in range(3):
            tick(connection)
        assert states(connection)[1] == "destroy_scheduled"
        postponed: LiteralString = "select count(*) from rekey.audit_log where details ? 'postponed'"
        assert value(connection, postponed) == (1 if jump == "+60d" else 0)
        clock.jump("+0")
        for _ in range(2):
            tick(connection)
        assert states(connection)[1] == "destroy_scheduled"
        estate.check(connection)
        # When its day comes without a jump, it is destroyed.
        for hours in range(0, 62 * 24, 20):
            clock.jump(f"+{hours}h")
            destroy_due(connection)
            connection.execute("select rekey._tick_duty('end', now())")
            if jump == "-2d" and hours < 45 * 24:
                assert states(connection)[1] == "destroy_scheduled"
        assert states(connection)[1] == "destroyed"
        estate.check(connection)


@pytest.mark.parametrize("jump", ["-2d", "+60d"])
def test_what_was_noted_under_a_wrong_clock_stops_nothing(estate: Estate, clock: Clock, jump: str) -> None:
    """A pause after an error, the throttle, and a wait for a writer, each noted at the other time."""
    with estate.connect() as connection, estate.connect() as writer:
        connection.execute("select rekey.set_setting('max_rows_per_second', '1000')")
        opposite = jump.translate(str.maketrans("+-", "-+"))
        clock.jump(opposite)
        number = rotate(connection)
        writer.execute("begin")
        writer.execute("select rekey.set_secret('s1', 's1')")
        later = rotate(connection, supersede=True)
        step_until(connection, "blocked", seconds=60)
        assert rotation(connection, later, "blocked_by") is not None
        connection.execute(
            "update rekey.rotations set next_attempt_at = now() + interval '5 minutes', attempts = 3"
        )
        clock.jump(jump)
        writer.execute("commit")
        connection.execute("set statement_timeout = '60 s'")
        run(connection)
        assert rotation(connection, later, "state", "rows_failed") == ("completed", 0)
        assert rotation(connection, number, "state") == "superseded"
        metric: LiteralString = "select value from rekey.metrics() where name like '%%blocked_seconds'"
        assert value(connection, metric) == 0
        estate.check(connection)
