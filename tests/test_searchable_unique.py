"""A unique blind index while rotations run: never two rows with one value, at any isolation level."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import LiteralString

import psycopg
import pytest

from column_fixtures import protect
from driving import in_background, refused, rotate, run, waits
from helpers import Connection, value
from test_searchable import wrong

pytest_plugins = ["column_fixtures"]

VALUES = 40
SECONDS = 12.0
LEVELS = {"rc": "read committed", "rr": "repeatable read", "s": "serializable"}


@pytest.fixture
def unique(app: Connection, ready: Connection) -> None:
    """app.t, whose column v is searchable and unique; nothing in it."""
    app.execute(
        "create table t (id bigint generated always as identity primary key, v text, n int default 0)"
    )
    protect(app, "t", context_columns=["id"], encrypt_on_write=True)
    app.execute("select rekey.make_searchable('t', 'v', normalization => 'lower')")
    run(ready)
    app.execute("create unique index t_v on t (v_bidx)")


def twice(ready: Connection) -> list[tuple[str, int]]:
    """Return the values that stand in more than one row."""
    return ready.execute("""
        select lower(rekey.decrypt_text(v, array['app.t.v', id::text])), count(*) from app.t
        where v is not null group by 1 having count(*) > 1""").fetchall()


def write(connection: Connection, level: str, errors: Counter[str], stop: threading.Event, seed: int) -> None:
    """Insert, upsert, update and delete at random, until told to stop."""
    chosen = random.Random(seed)
    connection.execute(f"set default_transaction_isolation = '{LEVELS[level]}'".encode())
    while not stop.is_set():
        text = (
            f"Value {chosen.randrange(VALUES)}"
            if chosen.random() < 0.5
            else f"value {chosen.randrange(VALUES)}"
        )
        kind = chosen.choice(["insert", "insert", "upsert", "upsert", "nothing", "update", "delete", "other"])
        try:
            match kind:
                case "insert":
                    connection.execute("insert into app.t (v) values (%s)", [text])
                case "upsert":
                    connection.execute(
                        "insert into app.t (v) values (%s) on conflict (v_bidx) do update set n = t.n + 1",
                        [text],
                    )
                case "nothing":
                    connection.execute("insert into app.t (v) values (%s) on conflict do nothing", [text])
                case "update":
                    connection.execute(
                        "update app.t set v = %s where id = (select id from app.t order by random() limit 1)",
                        [text],
                    )
                case "other":
                    connection.execute(
                        "update app.t set n = n + 1 where v_bidx = any (rekey.search('app.t.v', %s))", [text]
                    )
                case _:
                    connection.execute(
                        "delete from app.t where v_bidx = any (rekey.search('app.t.v', %s))", [text]
                    )
            errors[f"{kind} done"] += 1
        except psycopg.Error as error:
            errors[f"{kind} {error.sqlstate}"] += 1


@pytest.mark.parametrize("levels", [("rc", "rc", "rc"), ("rr", "rr", "rc"), ("s", "s", "rc")])
def test_a_storm_of_duplicates(
    unique: None,
    ready: Connection,
    session: Callable[[], Connection],
    levels: tuple[str, ...],
) -> None:
    """Rotations, superseded and rolled back ones too, so that three versions are live at a time."""
    errors: Counter[str] = Counter()
    writers = [session() for _ in levels]
    tasks = [
        lambda stop, w=w, level=level, seed=seed: write(w, level, errors, stop, seed)
        for seed, (w, level) in enumerate(zip(writers, levels, strict=True))
    ]
    most, rotations, found = 0, 0, []
    with in_background(*tasks):
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            number = rotate(ready, supersede=True)
            rotations += 1
            for _ in range(random.randrange(1, 12)):
                ready.execute("select from rekey.rotation_step()")
                most = max(most, value(ready, "select cardinality(versions) from rekey._blind_indexes"))
            if random.random() < 0.2:
                ready.execute("select from rekey.rollback_rotation(%s)", [number])
            if random.random() < 0.3:
                run(ready, "2 s")
            found += twice(ready)
    run(ready)
    assert found == []
    assert twice(ready) == []
    assert wrong(ready) == 0
    states = ready.execute("select state, count(*) from rekey.rotations group by 1").fetchall()
    print(rotations, "rotations,", most, "versions at once,", sorted(errors.items()), states)
    assert most >= 3
    assert {key.split()[1] for key in errors} <= {"done", "23505", "40001", "40P01"}
    # In READ COMMITTED an upsert meets a duplicate only where another's row came to stand on another version
    # at that moment: once in 2,659 in a run on 18.6, not at all in those on 15.20.
    if set(levels) == {"rc"}:
        for kind in ("upsert", "nothing"):
            assert errors[f"{kind} 23505"] < errors[f"{kind} done"] / 100
    assert (
        min(errors[f"{kind} done"] for kind in ("insert", "upsert", "nothing", "update", "delete", "other"))
        > 10
    )


ASKS: LiteralString = """
    create or replace function rekey._versions_to_ask(id integer, relation oid) returns integer[]
    language sql volatile security definer
    return (select array[max(v), min(v)] from rekey._blind_indexes b, unnest(b.versions) v)"""


@pytest.mark.parametrize("asked", ["all", "the oldest and the active one"])
def test_three_versions_at_once(unique: None, app: Connection, ready: Connection, asked: str) -> None:
    """A value is asked for under each of them; under two, a duplicate on the third comes in."""
    for number in (1, 2, 3):
        app.execute("insert into t (v) values (%s)", [f"on version {number}"])
        if number < 3:
            rotate(ready, supersede=True)
    on: LiteralString = "select array_agg(rekey._int4(v_bidx, 0) order by id) from app.t"
    assert value(ready, on) == [1, 2, 3]
    if asked != "all":
        ready.execute(ASKS)
        app.execute("insert into t (v) values ('on version 2')")
        assert twice(ready) == [("on version 2", 2)]
        return
    for number in (1, 2, 3):
        with refused("23505", "t_v"):
            app.execute("insert into t (v) values (%s)", [f"ON VERSION {number}"])
        upsert: LiteralString = "insert into t (v) values (%s) on conflict (v_bidx) do update set n = t.n + 1"
        app.execute(upsert, [f"On version {number}"])
    assert value(app, "select array_agg(n order by id) from t") == [1, 1, 1]
    # Rolled back, the newest is one of those that are asked for beside the active one.
    ready.execute("select from rekey.rollback_rotation((select max(id) from rekey.rotations))")
    for number in (1, 2, 3):
        with refused("23505", "t_v"):
            app.execute("insert into t (v) values (%s)", [f"on version {number}"])
    run(ready)
    assert value(ready, on) == [2, 2, 2]
    assert wrong(ready) == 0


def test_a_writer_from_before_the_rotation(
    unique: None, app: Connection, ready: Connection, session: Callable[[], Connection]
) -> None:
    """Who sealed with the version before finds whoever writes the same value with the new one."""
    old, new = session(), session()
    with ThreadPoolExecutor(1) as pool:
        with old.transaction():
            old.execute("insert into app.t (v) values ('x')")
            rotate(ready)
            second = pool.submit(new.execute, "insert into app.t (v) values ('X')")
            waits(ready, new.info.backend_pid)
        with refused("23505"):
            second.result(30)
    run(ready)
    assert wrong(ready) == 0
