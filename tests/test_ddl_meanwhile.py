"""Tables that are renamed, moved, detached or dropped while a process sweeps or adopts them."""

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import LiteralString

import pytest

from cli_fixtures import Cli, eventually, process
from column_fixtures import protect
from driving import check, rotate, rotation, run, waits
from helpers import Connection, unlock, value

pytest_plugins = ["cli_fixtures", "column_fixtures"]

MODEL = {str(n): f"plain {n}" for n in range(1, 2001)}
PARTITIONED: LiteralString = """
    create table t (id int primary key, v text) partition by range (id);
    create table t1 partition of t for values from (0) to (1001);
    create table t2 partition of t for values from (1001) to (2001)"""
COMMANDS = {
    "rotate": ("rotate", "--wait"),
    "work": ("work",),
    # One that no other worker could do.
    "adopt": ("columns", "adopt", "app.t", "v", "--from", "plaintext", "--from", "fernet"),
}

GOES_ON: dict[str, tuple[LiteralString, ...]] = {
    "renamed": ("alter table app.t rename to u; alter table app.t1 rename to u1",),
    "moved": ("alter table app.t1 set schema other", "alter table app.t set schema other"),
    "in a schema that is renamed": ("alter schema app rename to apps",),
    "column renamed": ("alter table app.t rename column v to w",),
    "key renamed": ("alter table app.t rename column id to key",),
    "partition dropped": ("drop table app.t2",),
}
BLOCKS: dict[str, LiteralString] = {
    "partition detached": "alter table app.t detach partition app.t2",
    "dropped": "drop table app.t cascade",
    "dropped with its schema": "drop schema app cascade",
    "column dropped": "alter table app.t drop column v cascade",
}


def pairs(cases: Iterable[str]) -> list[tuple[str, str]]:
    """Return each case with `rotate --wait` and an adoption; `work` sweeps as the first, once for all."""
    first, *_ = cases
    return [(first, "work"), *itertools.product(cases, ("rotate", "adopt"))]


@pytest.fixture
def slow(ready: Connection, app: Connection) -> None:
    """2000 values in two partitions, and a throttle."""
    app.execute(PARTITIONED)
    ready.execute("create schema other; grant usage on schema other to public")
    protect(app, "t")
    app.execute("insert into t select g, 'plain ' || g from generate_series(1, 2000) g")


def begin(ready: Connection, app: Connection, command: str) -> tuple[str, ...]:
    """Prepare what a command works on, so slowly that something can come in between; return it."""
    if command != "adopt":
        app.execute("select rekey.adopt_column('t', 'v')")
        run(ready)
    ready.execute("select rekey.set_setting('max_rows_per_second', '700')")
    if command == "work":
        ready.execute("select rekey.rotate_keys()")
    return COMMANDS[command]


def in_the_middle(ready: Connection) -> int:
    """Wait until rows were done by the newest rotation; return its number."""
    done: LiteralString = "select count(*) from rekey.rotations where state = 'running' and rows_done > 100"
    eventually(lambda: value(ready, done))
    return int(value(ready, "select max(id) from rekey.rotations"))


@pytest.mark.parametrize(("what", "command"), pairs(GOES_ON))
def test_what_is_still_there_goes_on(
    ready: Connection,
    cli_ready: Cli,
    app: Connection,
    slow: None,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    command: str,
) -> None:
    monkeypatch.setenv("PG_REKEY_FROM_FERNET", "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=")
    with process(*begin(ready, app, command)) as running:
        number = in_the_middle(ready)
        for statement in GOES_ON[what]:
            ready.execute(statement)
        ready.execute("select rekey.set_setting('max_rows_per_second', null)")
        _, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert "rror" not in err
    assert rotation(ready, number, "state", "rows_failed") == ("completed", 0)
    table = value(ready, "select relation::text from rekey.column_status")
    column = "w" if what == "column renamed" else "v"
    key = "key" if what == "key renamed" else "id"
    opens = f"rekey.decrypt_text({column}, array['app.t.v', {key}::text]) = 'plain ' || {key}"
    [(rows,)] = ready.execute(f"select count(*) from {table} where {opens}".encode()).fetchall()
    assert rows == (1000 if what == "partition dropped" else 2000)


@pytest.mark.parametrize(("what", "command"), pairs(BLOCKS))
def test_what_is_gone_is_said_and_let_go(
    ready: Connection,
    cli_ready: Cli,
    app: Connection,
    slow: None,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    command: str,
) -> None:
    """The terminal says what it waits for, and what to do about it; then it ends, and others can begin."""
    monkeypatch.setenv("PG_REKEY_FROM_FERNET", "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=")
    with process(*begin(ready, app, command)) as running:
        number = in_the_middle(ready)
        ready.execute(BLOCKS[what])
        ready.execute("select rekey.set_setting('max_rows_per_second', null)")
        eventually(lambda: rotation(ready, number, "blocked_by"))
        if command != "work":
            assert running.stderr is not None
            # (A batch that the statement came into is tried again, and said so, before.)
            said = next(line for line in running.stderr if "waits for the column" in line)
            assert said.startswith("waits for the column app.t.v, which is blocked")
            assert ("rebind_column" if what == "partition detached" else "columns unprotect") in said
        if what == "partition detached":
            ready.execute("drop table app.t2")
        else:
            assert "is forgotten" in cli_ready("columns", "unprotect", "app.t", "v")
        ready.execute("update rekey.rotations set next_attempt_at = null")
        _, err = running.communicate(timeout=60)
    ends = "superseded" if command == "adopt" and what != "partition detached" else "completed"
    assert running.returncode == (4 if ends == "superseded" else 0), err
    assert rotation(ready, number, "state") == ends
    ready.execute("select rekey.rotate_keys()")
    run(ready)
    assert (
        value(
            ready, "select count(*) from rekey.rotation_status where state not in ('completed', 'superseded')"
        )
        == 0
    )
    if what == "partition detached":
        check(ready, {}, columns={"app.t": {key: it for key, it in MODEL.items() if int(key) <= 1000}})


@pytest.mark.parametrize("phase", ["adopted", "rotated", "decrypted"])
def test_who_changes_a_partitioned_table_meets_no_deadlock(
    ready: Connection, app: Connection, session: Callable[[], Connection], kek: bytes, phase: str
) -> None:
    """An UPDATE of a partition locks what it is a part of after it; ALTER TABLE comes from the other side."""
    app.execute(f"{PARTITIONED}; insert into t values (1, 'one')")
    ready.execute("grant usage on schema app to public")
    app.execute(
        "create function hold() returns trigger language plpgsql as"
        " 'begin perform pg_catalog.pg_advisory_xact_lock(77); return new; end';"
        "create trigger hold before update on t1 for each row execute function hold()"
    )
    label = protect(app, "t")
    app.execute("select rekey.adopt_column('t', 'v')")
    if phase != "adopted":
        run(ready)
        rotate(ready)
    if phase == "decrypted":
        run(ready)
    unlock(app, kek)
    decrypt: LiteralString = "select rekey.unprotect_column('t', 'v', decrypt => true)"
    # (A new session: one that has looked at the bounds of the partition before does not do so again.)
    worker, holder = session(), session()
    with ThreadPoolExecutor(2) as pool:
        with holder.transaction():
            holder.execute("select pg_advisory_xact_lock(77)")
            work = pool.submit(value, app, decrypt) if phase == "decrypted" else pool.submit(run, worker)
            waits(holder, (app if phase == "decrypted" else worker).info.backend_pid)
            change = pool.submit(ready.execute, b"alter table app.t add column n int")
            waits(holder, ready.info.backend_pid)
        change.result(30)
        work.result(30)
    opened = "v" if phase == "decrypted" else f"rekey.decrypt_text(v, '{{{label},1}}')"
    assert value(app, f"select {opened} from app.t") == "one"
