"""Columns are adopted without a dead end: in line, saying for what they wait, and none is lost."""

import pytest

from cli_fixtures import Cli, eventually, process
from column_fixtures import protect
from driving import check, refused, rotate, rotation, run, states, step_until
from helpers import Connection, value

pytest_plugins = ["cli_fixtures", "column_fixtures"]

TABLES = ("a", "b", "c")
MODEL = {str(n): f"plain {n}" for n in range(1, 51)}


@pytest.fixture
def tables(app: Connection) -> tuple[str, ...]:
    """Three tables of plain values, each with a protected column of one keyring."""
    for table in TABLES:
        app.execute(f"create table {table} (id int primary key, v text)".encode())
        app.execute(f"insert into {table} select g, 'plain ' || g from generate_series(1, 50) g".encode())
        protect(app, table)
    return TABLES


def adopt(connection: Connection, table: str) -> int:
    return int(value(connection, "select id from rekey.adopt_column(%s, 'v')", table))


def whole(ready: Connection, tables: tuple[str, ...]) -> None:
    """Check that every value of these tables is an envelope, and opens to what it was."""
    check(ready, {}, columns={f"app.{table}": MODEL for table in tables})
    assert value(ready, "select count(*) from rekey.find_unprotected()") == 0


def test_adoptions_of_one_keyring_follow_each_other(
    ready: Connection, app: Connection, tables: tuple[str, ...]
) -> None:
    first, second, third = (adopt(app, table) for table in tables)
    assert rotation(ready, second, "state", "blocked_by") == (
        "queued",
        [{"rotation": first, "state": "queued", "adopts": "app.a.v"}],
    )
    with refused("RK004"):
        adopt(app, "b")
    run(ready)
    for number in (first, second, third):
        assert rotation(ready, number, "state", "rows_done", "blocked_by") == ("completed", 50, None)
    # One after the other, as they came.
    started = "select array_agg(id order by started_at) = array_agg(id order by id) from rekey.rotations"
    assert ready.execute(started.encode()).fetchone() == (True,)
    whole(ready, tables)


def test_an_adoption_waits_for_a_rotation_too(
    ready: Connection, app: Connection, tables: tuple[str, ...]
) -> None:
    """What is sealed in the end has the version that is active then."""
    moving = rotate(ready)
    ready.execute("select rekey.pause_rotation(%s)", [moving])
    first, second = adopt(app, "a"), adopt(app, "b")
    run(ready)  # ends, since nothing can be done
    assert rotation(ready, first, "state") == rotation(ready, second, "state") == "queued"
    assert rotation(ready, second, "blocked_by") == [{"rotation": moving, "state": "paused"}]
    with refused("RK004"):
        rotate(ready)
    with refused("RK004"):
        ready.execute("select rekey.retire_keyring('default')")
    ready.execute("select rekey.resume_rotation(%s)", [moving])
    run(ready)
    assert rotation(ready, second, "state", "to_version") == ("completed", 2)
    adopt(app, "c")
    run(ready)
    whole(ready, tables)


@pytest.mark.parametrize("how", ["supersede", "compromise of the active one", "compromise of an older one"])
def test_what_is_in_line_is_not_superseded(
    ready: Connection, app: Connection, tables: tuple[str, ...], how: str
) -> None:
    """The adoption under way is, and has to be asked for again; those in line come after the new rotation."""
    rotate(ready)
    run(ready)
    first, second, third = (adopt(app, table) for table in tables)
    if how == "supersede":
        after = rotate(ready, supersede=True)
    else:
        version = 2 if how == "compromise of the active one" else 1
        after = value(ready, "select id from rekey.mark_key_compromised('default', %s)", version)
    assert rotation(ready, first, "state") == "superseded"
    assert rotation(ready, second, "blocked_by") == [{"rotation": after, "state": "queued"}]
    ready.execute("select rekey.pause_rotation(%s)", [third])
    run(ready)
    assert rotation(ready, after, "state") == rotation(ready, second, "state") == "completed"
    assert rotation(ready, third, "state", "rows_done") == ("paused", 0)
    active = max(states(ready))
    # A rotation by the schedule, or by hand, does not wait for what is paused in line.
    last = rotate(ready)
    run(ready)
    assert rotation(ready, last, "state", "to_version") == ("completed", active + 1)
    ready.execute("select rekey.resume_rotation(%s)", [third])
    adopt(app, "a")
    run(ready)
    assert rotation(ready, third, "state", "to_version", "rows_done") == ("completed", active + 1, 50)
    whole(ready, tables)


def test_a_rotation_is_rolled_back_and_adoptions_in_line_come_after(
    ready: Connection, app: Connection, tables: tuple[str, ...]
) -> None:
    moving = rotate(ready)
    first, second = adopt(app, "a"), adopt(app, "b")
    back = value(ready, "select id from rekey.rollback_rotation(%s)", moving)
    assert rotation(ready, first, "state", "blocked_by") == (
        "queued",
        [{"rotation": back, "state": "queued"}],
    )
    run(ready)
    assert rotation(ready, second, "state", "to_version") == ("completed", 1)
    # While an adoption is under way, a rotation that is older by number is not the last one.
    moving = rotate(ready)
    run(ready)
    third = adopt(app, "c")
    with refused("RK006"):
        ready.execute("select rekey.rollback_rotation(%s)", [moving])
    run(ready)
    assert rotation(ready, third, "state") == "completed"
    whole(ready, tables)


def test_what_an_adoption_left_is_retried_after_later_rotations(
    ready: Connection, app: Connection, tables: tuple[str, ...]
) -> None:
    """No other rotation takes it along; what is under way is waited for."""
    app.execute("insert into a values (51, 'gAAAAA' || repeat('x', 120))")
    first = adopt(app, "a")
    run(ready)
    assert rotation(ready, first, "state", "rows_failed") == ("completed_with_failures", 1)
    rotate(ready)
    run(ready)
    second = adopt(app, "b")
    ready.execute("select rekey.pause_rotation(%s)", [second])
    app.execute("update a set v = 'plain 51' where id = 51")
    ready.execute("select rekey.retry_rotation(%s)", [first])
    assert rotation(ready, first, "state", "blocked_by") == (
        "queued",
        [{"rotation": second, "state": "paused", "adopts": "app.b.v"}],
    )
    ready.execute("select rekey.resume_rotation(%s)", [second])
    adopt(app, "c")
    run(ready)
    assert rotation(ready, first, "state", "rows_done", "to_version") == ("completed", 51, 2)
    app.execute("delete from a where id = 51")
    whole(ready, tables)


def test_a_column_in_line_is_let_go(ready: Connection, app: Connection, tables: tuple[str, ...]) -> None:
    first, second = adopt(app, "a"), adopt(app, "b")
    assert value(app, "select rekey.unprotect_column('b', 'v')") == 0
    run(ready)
    assert rotation(ready, first, "state") == "completed"
    assert rotation(ready, second, "state") == "superseded"
    assert value(app, "select count(*) from b where v = 'plain ' || id") == 50


def test_the_terminal_says_what_an_adoption_waits_for(
    ready: Connection, cli_ready: Cli, app: Connection, tables: tuple[str, ...]
) -> None:
    moving = rotate(ready)
    ready.execute("select rekey.pause_rotation(%s)", [moving])
    with process("columns", "adopt", "app.a", "v", "--from", "plaintext") as running:
        eventually(lambda: value(ready, "select count(*) from rekey.rotations") == 2)
        assert running.stderr is not None
        assert running.stderr.readline() == (f"waits for rotation {moving} of its keyring, which is paused\n")
        ready.execute("select rekey.resume_rotation(%s)", [moving])
        out, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert "completed" in out
    assert "goes on" in err
    step_until(ready, "idle")
    check(ready, {}, columns={"app.a": MODEL})


def test_the_terminal_says_that_somebody_locks_the_table(
    ready: Connection, cli_ready: Cli, app: Connection, tables: tuple[str, ...]
) -> None:
    ready.execute("select rekey.set_setting('max_rows_per_second', '20')")
    with process("columns", "adopt", "app.a", "v", "--from", "plaintext") as running:
        eventually(lambda: value(ready, "select count(*) from rekey.rotations where rows_done > 0"))
        with app.transaction():
            app.execute("lock table a in access exclusive mode")
            assert running.stderr is not None
            # (Before its own session meets the lock, a step of the engine may.)
            said = iter(running.stderr.readline, "")
            assert any(line == "waits for somebody who locks the table of app.a.v\n" for line in said)
        ready.execute("select rekey.set_setting('max_rows_per_second', null)")
        _, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert "goes on" in err
    check(ready, {}, columns={"app.a": MODEL})


@pytest.mark.parametrize(
    ("definition", "context", "warned"),
    [
        ("id serial primary key, conn_id text unique, v text", None, True),
        ("id uuid default gen_random_uuid() primary key, conn_id text, v text, unique (conn_id)", None, True),
        ("id int generated always as identity primary key, conn_id text unique, v text", None, True),
        ("id serial primary key, conn_id text unique, v text", "conn_id", False),
        ("id int primary key, conn_id text unique, v text", None, False),
        ("id serial primary key, conn_id text, v text", None, False),
    ],
)
def test_protect_says_what_encrypt_on_write_will_need(
    cli_ready: Cli, ready: Connection, definition: str, context: str | None, warned: bool
) -> None:
    """Before any value is bound to the primary key; and so it is: the second call is refused just then."""
    ready.execute(f"create table t ({definition})".encode())
    options = ["--context", context] if context else []
    cli_ready("columns", "protect", "t", "v", *options)
    assert ("encrypt_on_write will be refused with this context" in cli_ready.err) is warned
    cli_ready("columns", "protect", "t", "v", *options, "--encrypt-on-write", code=1 if warned else 0)
    if warned:
        assert "Name that other key in --context" in cli_ready.err
        cli_ready("columns", "unprotect", "t", "v")
        cli_ready("columns", "protect", "t", "v", "--context", "conn_id", "--encrypt-on-write")


def test_an_old_entry_of_the_quarantine_hides_no_value(
    ready: Connection, app: Connection, tables: tuple[str, ...]
) -> None:
    """One of a row that is gone is not taken for one that was left behind."""
    app.execute("insert into a values (51, 'gAAAAA' || repeat('x', 120))")
    adopt(app, "a")
    run(ready)
    app.execute("delete from a where id = 51")
    number = adopt(app, "a")
    step_until(ready, "planned", "checked", "verified")
    app.execute("update a set v = 'plain 1' where id = 1")
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    check(ready, {}, columns={"app.a": MODEL})


def test_an_entry_of_the_quarantine_whose_row_is_gone_hides_no_value(
    ready: Connection, app: Connection, tables: tuple[str, ...]
) -> None:
    """Nor one of the same adoption; what is still refused goes on being no hindrance."""
    app.execute("insert into a values (51, 'gAAAAA' || repeat('x', 120)), (52, 'gAAAAA' || repeat('x', 120))")
    number = adopt(app, "a")
    step_until(ready, "batch")
    app.execute("delete from a where id = 51; update a set v = 'plain 1' where id = 1")
    run(ready)
    assert rotation(ready, number, "state") == "completed_with_failures"
    assert value(app, "select string_agg(id::text, ',') from a where v !~ '^rk1:'") == "52"
    app.execute("delete from a where id = 52")
    check(ready, {}, columns={"app.a": MODEL})
