"""A worker gives way to whoever else uses the server, and to nobody where a key is compromised."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, LiteralString

import psycopg
import pytest

from driving import fill, in_background, rotate, rotation, step_until, waits
from helpers import Connection, connect, unlock, value
from pg_rekey.worker import Steps

STEP: LiteralString = "select event, wait, detail from rekey.rotation_step(%s, %s)"
QUARTER = [0.5, 0.25, 0.25]


@pytest.fixture
def secrets(ready: Connection) -> int:
    """A rotation of some batches, planned."""
    ready.execute("select rekey.set_setting('min_pace', null)")
    ready.execute("select rekey.set_setting('batch_target', '10 ms')")
    fill(ready, 20_000)
    number = rotate(ready)
    step_until(ready, "planned")
    return number


def batch(connection: Connection, who_else: str | None) -> tuple[str, timedelta | None, dict[str, Any]]:
    row = connection.execute(STEP, (None, who_else)).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def pace(connection: Connection, number: int) -> tuple[float, str | None]:
    found: tuple[float, str | None] = rotation(connection, number, "pace", "gives_way_to")
    return found


def test_alone(ready: Connection, secrets: int) -> None:
    for _ in range(3):
        event, wait, _detail = batch(ready, "")
        assert (event, wait) == ("batch", None)
        assert pace(ready, secrets) == (1, None)


def test_in_company(ready: Connection, secrets: int) -> None:
    for expected in QUARTER:
        event, wait, detail = batch(ready, "3 active sessions")
        assert event == "batch"
        assert wait is not None
        # It works for a part of the time.
        assert wait.total_seconds() == pytest.approx(detail["seconds"] * (1 / expected - 1), rel=0.3)
        assert pace(ready, secrets) == (expected, "3 active sessions")
    for expected, told in ((0.5, "3 active sessions"), (1, None)):
        batch(ready, "")
        assert pace(ready, secrets) == (expected, told)


def test_the_verification_too(ready: Connection, secrets: int) -> None:
    assert step_until(ready, "checked")[-1] == "checked"
    event, wait, _detail = batch(ready, "3 active sessions")
    assert event == "checked"
    assert wait is not None
    assert pace(ready, secrets) == (0.5, "3 active sessions")


def test_the_next_chunk_goes_on_at_the_pace(ready: Connection, secrets: int) -> None:
    chunks: LiteralString = "select count(*) from rekey._chunks"
    before = value(ready, chunks)
    assert before > 1
    while value(ready, chunks) == before:
        batch(ready, "3 active sessions")
    batch(ready, "3 active sessions")
    assert pace(ready, secrets)[0] == 0.25


@pytest.mark.parametrize("why", ["compromise", "throttle", "setting"])
def test_who_gives_way_to_nobody(ready: Connection, secrets: int, why: str) -> None:
    if why == "compromise":
        ready.execute("select rekey.mark_key_compromised('default', 2)")
        step_until(ready, "planned")
    elif why == "throttle":
        ready.execute("select rekey.set_setting('max_rows_per_second', '1000000')")
    else:
        ready.execute("select rekey.set_setting('min_pace', '1')")
    for _ in range(3):
        event, wait, _detail = batch(ready, "3 active sessions")
        assert (event, wait) == ("batch", None)
    assert value(ready, "select max(pace) from rekey._chunks") == 1


@pytest.mark.parametrize("setting", ["0", "0.001", "1.1", "-1", "NaN", "much"])
def test_paces_that_cannot_be(ready: Connection, setting: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="min_pace"):
        ready.execute("select rekey.set_setting('min_pace', %s)", [setting])


@pytest.fixture
def worker(ready: Connection, db: str, kek: bytes) -> Iterator[Connection]:
    """A session as rekey_worker has it."""
    with connect(db, user="rekey_worker") as connection:
        unlock(connection, kek)
        yield connection


def busy(session: Callable[[], Connection]) -> Callable[[threading.Event], None]:
    """An application."""
    connection = session()
    connection.execute("set application_name = 'shop'")

    def task(stop: threading.Event) -> None:
        while not stop.wait(0.001):
            connection.execute("table pg_am")
            connection.execute("select pg_stat_force_next_flush()")

    return task


def test_who_may_see_sessions_sees_them(ready: Connection, session: Callable[[], Connection]) -> None:
    sees: LiteralString = "select rekey.who_else()"
    with in_background(busy(session)):
        while "active session" not in value(ready, sees):
            pass


@pytest.mark.parametrize("fast", [False, True])
def test_whoever_is_in_a_hurry(
    session: Callable[[], Connection], db: str, kek: bytes, secrets: int, fast: bool
) -> None:
    with psycopg.connect(db, autocommit=True, row_factory=psycopg.rows.dict_row) as connection:
        unlock(connection, kek)
        steps = Steps(connection, fast=fast)
        with in_background(busy(session)):
            while (step := steps.take())["wait"] is None and step["event"] != "idle":
                pass
    assert step["event"] == ("idle" if fast else "batch")


def test_who_may_not_goes_by_transactions(
    worker: Connection, ready: Connection, session: Callable[[], Connection], secrets: int
) -> None:
    assert value(worker, "select rekey.who_else()") is None
    with in_background(busy(session), busy(session)):
        batch(worker, None)
        assert pace(ready, secrets) == (1, None)  # too early to say
        threading.Event().wait(1.2)
        batch(worker, None)
        slower, told = pace(ready, secrets)
        assert slower == 0.5
        assert told is not None
        assert told.endswith("transactions a second")
        batch(worker, None)
        assert pace(ready, secrets) == (0.5, told)  # once a second


def test_who_waits_for_its_locks_is_given_way_to(
    worker: Connection, ready: Connection, session: Callable[[], Connection]
) -> None:
    ready.execute("select rekey.set_setting('min_pace', null)")
    ready.execute("create table t (id int primary key, v text)")
    ready.execute("select rekey.protect_column('public.t', 'v')")
    ready.execute(
        "insert into t select g, rekey.encrypt_text('v', context => array['public.t.v', g::text])"
        " from generate_series(1, 5000) g"
    )
    ready.execute("""
        create function hold() returns trigger language plpgsql as
          'begin perform pg_catalog.pg_advisory_xact_lock(77); return new; end';
        create trigger hold before update on t for each row when (new.id = 1) execute function hold()""")
    number = rotate(ready)
    step_until(ready, "planned")
    holder, writer = session(), session()
    with ThreadPoolExecutor(2) as pool:
        with holder.transaction():
            holder.execute("select pg_advisory_xact_lock(77)")
            swept = pool.submit(batch, worker, "")
            waits(holder, worker.info.backend_pid)
            written = pool.submit(writer.execute, "update t set v = v where id = 2")
            waits(holder, writer.info.backend_pid)
        event, wait, _detail = swept.result(30)
        written.result(30)
    assert event == "batch"
    assert wait is not None
    assert pace(ready, number) == (0.25, "sessions that wait for its locks")


def test_a_clock_that_was_wrong_sets_no_pace(worker: Connection, ready: Connection, secrets: int) -> None:
    batch(worker, "3 active sessions")
    ready.execute(
        "update rekey._chunks set looked_at = now() + interval '1 day', transactions = 0 where pace < 1"
    )
    batch(worker, None)
    assert pace(ready, secrets) == (1, None)


@pytest.mark.parametrize(("following", "rows"), [("null", 1000), ("'(3,7)'", 2000)])
def test_a_batch_that_ended_with_its_range_says_nothing_for_more(
    ready: Connection, secrets: int, following: LiteralString, rows: int
) -> None:
    """The rest of a chunk is short: that its rows were locked for a moment only is no reason to lock more."""
    step_until(ready, "planned")
    ready.execute("update rekey._chunks set batch_rows = 1000")
    advance: LiteralString = (
        "select rekey._advance(c, {}, 1, 0.001, 0.001)"
        " from (select * from rekey._chunks order by id limit 1) c"
    )
    ready.execute("update rekey._chunks set until_block = 100")
    ready.execute(advance.format(following).encode())
    assert value(ready, "select batch_rows from rekey._chunks order by id limit 1") == rows
