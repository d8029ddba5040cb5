"""Tables are rewritten, and partitions come and go, while a rotation sweeps and verifies them."""

import contextlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import pytest
from psycopg import errors

from column_fixtures import protect
from driving import check, events, fill, in_background, rotate, rotation, run, states, step, step_until, waits
from estate import ROUNDS
from helpers import Connection, value

pytest_plugins = ["column_fixtures"]

TABLES: LiteralString = """
    create table texts (id int primary key, v text, n int default 0);
    create table bytes (id int primary key, v bytea, n int default 0);
    create table parts (id int primary key, v text, n int default 0) partition by range (id);
    create table parts_1 partition of parts for values from (0) to (200);
    create table parts_2 partition of parts for values from (200) to (400);
"""
ROWS = 300
SECRETS_REWRITTEN: list[LiteralString] = [
    "vacuum full rekey.secrets",
    "cluster rekey.secrets using secrets_pkey",
    "alter table rekey.secrets set (fillfactor = 60)",
    "alter table rekey.secrets alter column description set storage plain",
]
COLUMNS_REWRITTEN: list[LiteralString] = [
    "vacuum full app.texts",
    "alter table app.bytes add column m text default random()::text",
    "cluster app.texts using texts_pkey",
    "cluster app.parts_2 using parts_2_pkey",
    "alter table app.bytes drop column m",
    "vacuum full app.bytes",
    "alter table app.texts alter column n type bigint",
    "alter table app.texts alter column n type int",
    "vacuum full app.parts",
]


@pytest.fixture
def columns(app: Connection) -> dict[str, dict[str, str]]:
    """Three protected tables of text, bytea and partitions; returns what they hold."""
    app.execute(TABLES)
    for table in ("texts", "bytes", "parts"):
        protect(app, table, encrypt_on_write=True)
        plain = "convert_to('x' || g, 'UTF8')" if table == "bytes" else "'x' || g"
        app.execute(f"insert into {table} select g, {plain} from generate_series(1, {ROWS}) g".encode())
    return {
        f"app.{table}": {str(n): f"x{n}" for n in range(1, ROWS + 1)} for table in ("texts", "bytes", "parts")
    }


def test_everything_is_rewritten_all_the_time(
    ready: Connection,
    app: Connection,
    session: Callable[[], Connection],
    columns: dict[str, dict[str, str]],
) -> None:
    """Nobody deadlocks: neither a rotation nor who rewrites a table gets an error."""
    model = fill(ready, ROWS)

    def rewrite(statements: list[LiteralString]) -> Callable[[threading.Event], None]:
        connection = session()

        def task(stop: threading.Event) -> None:
            while not stop.is_set():
                for statement in statements:
                    connection.execute(statement)

        return task

    def work() -> Callable[[threading.Event], None]:
        connection = session()
        return lambda _: run(connection, "3 s")

    def move(stop: threading.Event) -> None:
        while not stop.wait(0.01):
            app.execute("update texts set n = n + 1 where id % 3 = 0")

    with in_background(rewrite(SECRETS_REWRITTEN), rewrite(COLUMNS_REWRITTEN), move):
        for _ in range(2 * ROUNDS):
            number = rotate(ready, supersede=True)
            with in_background(work(), work()):
                pass
    # What moved behind every sweep is found by the last one.
    run(ready, "60 s")
    assert rotation(ready, number, "state", "rows_failed") == ("completed", 0)
    assert "rotation.error" not in events(ready)
    check(ready, model, columns=columns)


@pytest.mark.parametrize("table", ["rekey.secrets", "app.texts", "app.bytes"])
def test_a_rewrite_waits_for_a_batch_and_a_verification(
    ready: Connection,
    session: Callable[[], Connection],
    columns: dict[str, dict[str, str]],
    table: str,
) -> None:
    model = fill(ready, ROWS)
    number = rotate(ready)
    worker, other = session(), session()
    rewrites = [f"vacuum full {table}", f"cluster {table} using {table.split('.')[1]}_pkey"]
    seen: list[str] = []
    while "completed" not in seen:
        with ThreadPoolExecutor(1) as pool, worker.transaction():
            seen.append(step(worker)[0])
            holds = value(
                ready,
                "select count(*) from pg_locks where pid = %s and relation = %s::regclass",
                worker.info.backend_pid,
                table,
            )
            rewriting = pool.submit(other.execute, rewrites[len(seen) % 2].encode())
            if holds:
                waits(ready, other.info.backend_pid)
            else:
                rewriting.result(30)
        rewriting.result(30)
    assert seen.count("batch") >= 4
    assert rotation(ready, number, "rows_done", "rows_failed", "last_error") == (4 * ROWS, 0, None)
    check(ready, model, columns=columns)


@pytest.mark.parametrize("table", ["rekey.secrets", "app.texts", "app.bytes"])
def test_a_batch_and_a_verification_wait_for_a_rewrite(
    ready: Connection,
    session: Callable[[], Connection],
    columns: dict[str, dict[str, str]],
    table: str,
) -> None:
    model = fill(ready, ROWS)
    number = rotate(ready)
    worker, other = session(), session()
    rewrites = [f"cluster {table} using {table.split('.')[1]}_pkey"]
    if table != "rekey.secrets":
        rewrites += [f"alter table {table} alter column n type {kind}" for kind in ("bigint", "int")]
    seen: list[str] = []
    waited = 0
    for rewrite in itertools.islice(itertools.cycle(rewrites), 200):
        if {"verified", "completed"} & set(seen):
            break
        with ThreadPoolExecutor(1) as pool:
            with other.transaction():
                other.execute(rewrite.encode())
                stepping = pool.submit(step, worker)
                waited += until_done_or_waiting(ready, worker, stepping)
            seen.append(stepping.result(30)[0])
    assert waited > 1
    assert "batch" in seen
    assert {"verified", "completed"} & set(seen)
    run(ready, "60 s")
    assert rotation(ready, number, "state", "rows_done") == ("completed", 4 * ROWS)
    assert rotation(ready, number, "rows_failed", "last_error") == (0, None)
    check(ready, model, columns=columns)


def test_a_partition_comes_and_goes_all_the_time(
    ready: Connection,
    session: Callable[[], Connection],
    columns: dict[str, dict[str, str]],
) -> None:
    number = rotate(ready)
    worker, other = session(), session()
    changes = itertools.cycle(
        [
            "alter table app.parts detach partition app.parts_2",
            "alter table app.parts attach partition app.parts_2 for values from (200) to (400)",
        ]
    )
    for change in itertools.islice(changes, 24):
        with ThreadPoolExecutor(1) as pool:
            with other.transaction():
                other.execute(change.encode())
                stepping = pool.submit(step, worker)
                until_done_or_waiting(ready, worker, stepping)
            event = stepping.result(30)[0]
        assert event != "completed" or "attach" in change.split()
    ready.execute("update rekey.rotations set next_attempt_at = null")
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed", 0)
    assert ready.execute("select version, rows from rekey.key_usage()").fetchall() == [(1, 0), (2, 3 * ROWS)]
    check(ready, {}, columns=columns)


def test_a_partitioned_table_is_changed_while_a_batch_is_in_hand(
    ready: Connection,
    session: Callable[[], Connection],
    columns: dict[str, dict[str, str]],
) -> None:
    """A batch locks a partition before the partitioned table, DDL the other way: one of them tries again."""
    rotate(ready)
    ready.execute("delete from app.texts")
    ready.execute("delete from app.bytes")
    step_until(ready, "planned")
    worker, other, holder = session(), session(), session()
    with ThreadPoolExecutor(2) as pool:
        with holder.transaction():
            # The batch has read its rows, and waits before it writes them.
            holder.execute("select pg_advisory_xact_lock(id, 2) from rekey.keyrings")
            stepping = pool.submit(step, worker)
            waits(ready, worker.info.backend_pid)
            changing = pool.submit(other.execute, "alter table app.parts add column m int")
            waits(ready, other.info.backend_pid)
        with contextlib.suppress(errors.DeadlockDetected):
            changing.result(30)
        assert stepping.result(30)[0] in ("batch", "error")
    run(ready)
    check(ready, {}, columns=columns | {"app.texts": {}, "app.bytes": {}})


def until_done_or_waiting(ready: Connection, worker: Connection, stepping: Any) -> bool:
    """Return whether the step waits for a lock, as soon as that is known."""
    waiting: LiteralString = "select count(*) from pg_locks where pid = %s and not granted"
    while not stepping.done():
        if value(ready, waiting, worker.info.backend_pid):
            return True
    return False


# For a snapshot that is older, a table that was rewritten like this has no rows at all.
REWRITE: LiteralString = "alter table app.one add column m text default random()::text"


@pytest.fixture
def held_back(app: Connection) -> str:
    """A value sealed with version 1 that is not stored yet, for the table `one`."""
    app.execute("create table one (id int primary key, v text)")
    protect(app, "one")
    return str(value(app, "select rekey.encrypt_text('late', context => array['app.one.v', '0'])"))


def meanwhile(app: Connection, ready: Connection, worker: Connection, statement: LiteralString) -> None:
    """Run a statement that comes to a table while it is rewritten."""
    with ThreadPoolExecutor(1) as pool:
        with app.transaction():
            app.execute(REWRITE)
            running = pool.submit(worker.execute, statement)
            until_done_or_waiting(ready, worker, running)
        running.result(30)


def test_a_rewritten_table_is_not_taken_for_empty_by_the_verification(
    ready: Connection, app: Connection, session: Callable[[], Connection], held_back: str
) -> None:
    number = rotate(ready)
    step_until(ready, "swept")
    step_until(ready, "swept")  # the barrier: what comes now is found by the verification only
    app.execute("insert into one values (0, %s)", [held_back])
    meanwhile(app, ready, session(), "select rekey.rotation_step()")
    assert rotation(ready, number, "state") == "running"
    run(ready)
    assert value(ready, "select rows from rekey.key_usage() where version = 1") == 0


def test_a_rewritten_table_is_not_taken_for_empty_by_a_destruction(
    ready: Connection, app: Connection, session: Callable[[], Connection], held_back: str
) -> None:
    rotate(ready)
    ready.execute("call rekey.tick()")
    with ready.transaction():
        ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
        # Its trigger does not know yet.
        app.execute("insert into one values (0, %s)", [held_back])
    meanwhile(app, ready, session(), "call rekey.tick()")
    assert states(ready)[1] == "destroy_scheduled"
    check(ready, {})
