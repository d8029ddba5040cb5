"""What the daily count tells, and what doctor looks at every time."""

from typing import Any, LiteralString

import pytest

from cli_fixtures import Cli
from column_fixtures import protect
from driving import refused
from helpers import Connection, connect, value

pytest_plugins = ["cli_fixtures", "column_fixtures"]

FAILURES: LiteralString = (
    "select row_key, rotation_id, version, reason from rekey.failure_status"
    " where resolved_at is null order by 1"
)


def census(connection: Connection) -> None:
    connection.execute("update rekey._worker set last_census_at = null")
    connection.execute("select rekey._tick_duty('census', now())")
    assert value(connection, "select last_error from rekey.worker_status") is None
    assert value(connection, "select last_census_at is not null from rekey.worker_status")


def metric(connection: Connection, name: str, **labels: str) -> Any:
    rows = connection.execute("select labels, value from rekey.metrics() where name = %s", [name]).fetchall()
    return sum(number for found, number in rows if labels.items() <= found.items())


def kinds(connection: Connection) -> dict[str, list[str]]:
    query: LiteralString = (
        "select kind, array_agg(finding order by finding) from rekey.findings() group by kind"
    )
    return dict(connection.execute(query).fetchall())


@pytest.fixture
def held(ready: Connection, app: Connection) -> bytes:
    """A table with three values, and an envelope of a version that was destroyed since."""
    app.execute("create table t (id int primary key, v bytea)")
    protect(app, "app.t")
    app.execute(
        "insert into t select g, rekey.encrypt('x'::text, 'default', array['app.t.v', g::text])"
        " from generate_series(1, 4) g"
    )
    envelope = bytes(value(app, "select v from t where id = 4"))
    app.execute("delete from t where id = 4")
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.run_rotations()")
    ready.execute("call rekey.tick()")
    ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
    ready.execute("call rekey.tick()")
    assert value(ready, "select state from rekey.key_status where version = 1") == "destroyed"
    return envelope


def test_rows_on_a_destroyed_key(ready: Connection, app: Connection, held: bytes, cli_ready: Cli) -> None:
    app.execute("insert into t values (4, %s)", [held])
    census(ready)
    [(key, rotation, version, reason)] = ready.execute(FAILURES).fetchall()
    assert (key, rotation, version) == ("4", None, 1)
    assert "destroyed" in reason
    entries: LiteralString = (
        "select event, details from rekey.audit_log where event in ('rotation.row_failed', 'census.found')"
    )
    (failed, details), (found, more) = ready.execute(entries).fetchall()
    assert (failed, found) == ("rotation.row_failed", "census.found")
    assert (details["rows"], details["first"], details["found_by"]) == (1, ["4"], "census")
    assert (more["kind"], more["count"]) == ("destroyed", 1)
    assert metric(ready, "pg_rekey_rotation_failures_open") == 1
    assert metric(ready, "pg_rekey_census_rows", kind="destroyed") == 1
    assert metric(ready, "pg_rekey_findings", kind="destroyed") == 1
    said = "1 rows of app.t.v stand on version 1 of keyring default, which is destroyed"
    cli_ready("doctor", code=5)
    assert said in cli_ready.out
    assert value(ready, "select finding from rekey.census_status") == said

    # Nothing new is nothing to tell; what was given up is known; what is gone leaves.
    census(ready)
    assert len(ready.execute(entries).fetchall()) == 2
    ready.execute("select rekey.resolve_failure(id, 'discard') from rekey.failure_status")
    census(ready)
    assert ready.execute(FAILURES).fetchall() == []
    assert ready.execute("select * from rekey.census_status").fetchall() == []


def test_what_the_census_put_into_quarantine_leaves_it(
    ready: Connection, app: Connection, held: bytes
) -> None:
    app.execute("insert into t values (4, %s), (5, %s)", [held, held])
    census(ready)
    assert len(ready.execute(FAILURES).fetchall()) == 2
    ready.execute("select rekey.resolve_failure(min(id), 'retry') from rekey.failure_status")
    app.execute("delete from t where id = 5")
    census(ready)
    assert [row[0] for row in ready.execute(FAILURES)] == ["4"]
    app.execute("delete from t where id = 4")
    census(ready)
    assert ready.execute(FAILURES).fetchall() == []
    # What a rotation meets is that rotation's from then on.
    app.execute("insert into t values (4, %s)", [held])
    census(ready)
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.run_rotations()")
    assert [row[1] for row in ready.execute(FAILURES)] == [2]
    census(ready)
    assert len(ready.execute(FAILURES).fetchall()) == 1


def test_a_row_on_the_active_version_that_is_damaged(ready: Connection, db: str) -> None:
    ready.execute("select rekey.set_secret('s' || n, 'v') from generate_series(1, 3) n")
    census(ready)
    assert ready.execute(FAILURES).fetchall() == []
    damage: LiteralString = (
        "update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)"
    )
    ready.execute(damage + " where name = 's2'")
    for _ in range(2):
        census(ready)
        [(_, rotation, version, reason)] = ready.execute(FAILURES).fetchall()
        assert (rotation, version) == (None, 1)
        assert "does not open" in reason
        assert metric(ready, "pg_rekey_census_rows", kind="unopenable") == 1
    ready.execute(damage + " where name = 's2'")
    census(ready)
    assert ready.execute(FAILURES).fetchall() == []
    ready.execute(damage + " where name = 's3'")
    with connect(db) as locked:
        census(locked)  # without the KEK it counts only
        assert locked.execute(FAILURES).fetchall() == []


def test_versions_and_keyrings_that_there_are_not(ready: Connection, app: Connection, held: bytes) -> None:
    made_up: LiteralString = "insert into t values (%s, overlay(%s::bytea placing int4send(%s) from %s))"
    app.execute(made_up, [7, held, 99, 8])
    app.execute(made_up, [8, held, 77, 4])
    census(ready)
    assert [(row[0], row[2]) for row in ready.execute(FAILURES)] == [("7", 99)]
    rows = ready.execute("select kind, keyring, version from rekey.census_status order by keyring").fetchall()
    assert rows == [("unknown", "default", 99), ("unknown", "no. 77", 1)]
    assert metric(ready, "pg_rekey_census_rows", kind="unknown") == 2


def test_a_column_that_is_blocked_keeps_nobody_from_looking(
    ready: Connection, app: Connection, held: bytes, cli_ready: Cli
) -> None:
    app.execute("create table other (id int primary key, v bytea)")
    protect(app, "app.other")
    app.execute("alter table other force row level security")
    app.execute("insert into t values (4, %s)", [held])
    census(ready)
    assert len(ready.execute(FAILURES).fetchall()) == 1
    assert metric(ready, "pg_rekey_findings", kind="blocked") == 1
    cli_ready("doctor", code=5)
    assert "app.other.v: FORCE ROW LEVEL SECURITY may hide rows of app.other" in cli_ready.out


def test_a_table_that_cannot_be_counted(ready: Connection, app: Connection, held: bytes) -> None:
    app.execute("create table other (id int primary key, v bytea)")
    protect(app, "app.other")
    app.execute("insert into t values (4, %s)", [held])
    with app.transaction():
        app.execute("lock table other")
        ready.execute("set lock_timeout = '100ms'")
        census(ready)
    assert len(ready.execute(FAILURES).fetchall()) == 1
    found = value(ready, "select finding from rekey.census_status where kind = 'uncounted'")
    assert found.startswith("app.other.v cannot be counted: ")
    census(ready)
    assert ready.execute("select from rekey.census_status where kind = 'uncounted'").fetchall() == []


TRIGGERS: LiteralString = """
create function nop() returns trigger language plpgsql as 'begin return new; end';
create function nothing() returns trigger language plpgsql as 'begin return null; end';
create table acc (id int primary key, name text, api_key text, updated_at timestamptz default now());
create trigger a_when after update on acc for each row
when (old.* is distinct from new.*) execute function nop();
create trigger b_upd before update on acc for each row
when (old.* is distinct from new.*) execute function nop();
create trigger b_depth before update on acc for each row when (pg_trigger_depth() = 0) execute function nop();
create trigger c_of after update of name on acc for each row execute function nop();
create trigger d_stmt after update on acc for each statement execute function nothing();
create trigger e_dis after update on acc for each row execute function nop();
alter table acc disable trigger e_dis;
create trigger f_key after update of api_key on acc for each row
when (old.api_key is distinct from new.api_key) execute function nop();
create trigger g_plain after insert or update on acc for each row execute function nop();
create trigger h_insert after insert on acc for each row execute function nop();
create trigger i_passes after update on acc for each row
when (not rekey.is_sweeping('app.acc')) execute function nop();
create rule r_also as on update to acc do also notify changed;
create rule r_insert as on insert to acc do also notify changed;
"""
FIRED = {
    "trigger a_when fires for every row of a rotation for which its condition is true",
    "trigger b_upd fires for every row of a rotation for which its condition is true",
    "trigger b_depth fires for every row of a rotation for which its condition is true",
    "trigger d_stmt fires once a batch of a rotation",
    "trigger f_key fires for every row of a rotation for which its condition is true",
    "trigger g_plain fires for every row of a rotation",
    "rule r_also of app.acc is applied to the updates of a rotation",
}


@pytest.mark.parametrize("before", [True, False])
def test_what_a_sweep_sets_off(ready: Connection, app: Connection, cli_ready: Cli, before: bool) -> None:
    """Whether it was there before `protect`, which warns, or came after it."""
    if before:
        app.execute(TRIGGERS)
    else:
        app.execute("create table acc (id int primary key, name text, api_key text, updated_at timestamptz)")
    said: list[str] = []
    app.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    protect(app, "app.acc", "api_key")
    assert set(said) == (FIRED if before else set())
    if not before:
        app.execute(TRIGGERS.replace("create table acc", "create table unused"))
    found = ready.execute("select finding from rekey.protection_findings()").fetchall()
    assert {row[0] for row in found} == FIRED
    cli_ready("doctor", code=5)
    cli_ready("columns", "list")
    assert all(one in cli_ready.out for one in FIRED)
    census(ready)
    assert metric(ready, "pg_rekey_findings", kind="trigger") == 6
    assert metric(ready, "pg_rekey_findings", kind="rule") == 1


def test_triggers_of_partitions(ready: Connection, app: Connection) -> None:
    app.execute("""
        create function nop() returns trigger language plpgsql as 'begin return new; end';
        create table p (id int primary key, v bytea) partition by range (id);
        create table p1 partition of p for values from (0) to (10);
        create table p2 (v bytea, id int not null);
        alter table p attach partition p2 for values from (10) to (20);
        create trigger everywhere after update on p for each row execute function nop();
        create trigger alone after update of v on p2 for each row execute function nop();
        create trigger never after update on p for each statement execute function nop();
    """)
    protect(app, "app.p")
    rows = ready.execute("select finding from rekey.protection_findings() order by 1").fetchall()
    assert [row[0] for row in rows] == [
        "trigger alone fires for every row of a rotation, in app.p2",
        "trigger everywhere fires for every row of a rotation",
    ]


PUBLICATIONS: dict[str, tuple[LiteralString, str]] = {
    "all": ("for all tables", "sends every row of a rotation"),
    "table": ("for table app.acc", "sends every row of a rotation"),
    "columns": (
        "for table app.acc (id, v) with (publish_via_partition_root)",
        "sends every row of a rotation",
    ),
    "without": (
        "for table app.acc (id) with (publish_via_partition_root)",
        "sends every row of a rotation, without the column",
    ),
    "filtered": (
        "for table app.acc where (id > 5) with (publish_via_partition_root)",
        "sends the rows of a rotation that its filter lets through",
    ),
    "schema": ("for tables in schema app", "sends every row of a rotation"),
    "partition": ("for table app.acc_1", "sends every row of a rotation"),
    "inserts": ("for table app.acc with (publish = 'insert, delete')", ""),
    "elsewhere": ("for table app.unused", ""),
}


@pytest.mark.parametrize("form", PUBLICATIONS)
def test_publications(ready: Connection, app: Connection, form: str) -> None:
    app.execute("create table acc (id int primary key, v bytea) partition by range (id)")
    app.execute("create table acc_1 partition of acc for values from (0) to (100); create table unused ()")
    protect(app, "app.acc")
    clause, said = PUBLICATIONS[form]
    ready.execute("create publication everything " + clause)
    rows = ready.execute(
        "select finding from rekey.protection_findings() where kind = 'publication'"
    ).fetchall()
    assert rows == ([(f"publication everything {said}",)] if said else [])


def test_triggers_of_ours_that_are_off_gone_or_old(ready: Connection, app: Connection) -> None:
    app.execute("create table t (id int primary key, v bytea)")
    protect(app, "app.t", encrypt_on_write=True)
    assert kinds(ready) == {}
    app.execute("alter table t enable trigger zz_pg_rekey_1")
    assert "do not fire in the replica role" in kinds(ready)["write trigger"][0]
    app.execute("alter table t disable trigger zz_pg_rekey_1")
    assert "is off, or was dropped or replaced" in kinds(ready)["blocked"][0]
    app.execute("alter table t enable always trigger zz_pg_rekey_1")
    assert kinds(ready) == {}
    ready.execute(
        "create or replace function rekey_targets.column_1_trigger() returns trigger language plpgsql as"
        " 'begin return new; end'"
    )
    assert "is not as this version" in kinds(ready)["write trigger"][0]
    protect(app, "app.t", encrypt_on_write=True)
    assert kinds(ready) == {}
    app.execute(
        "create function nop() returns trigger language plpgsql as 'begin return new; end';"
        "create or replace trigger zz_pg_rekey_1 before insert or update on t"
        " for each row execute function nop(); alter table t enable always trigger zz_pg_rekey_1"
    )
    assert "is off, or was dropped or replaced" in kinds(ready)["blocked"][0]


def test_sequences_that_stayed_behind(ready: Connection, cli_ready: Cli) -> None:
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.run_rotations()")
    assert "sequence" not in kinds(ready)
    behind = {"encryption_keys_id_seq", "rotations_id_seq"}
    for name in behind:
        ready.execute("select setval(('rekey.' || %s)::regclass, 1, false)", [name])
    assert len(kinds(ready)["sequence"]) == 2
    cli_ready("doctor", code=5)
    assert "rekey.resync_sequences()" in cli_ready.out
    cli_ready("rotate", code=1)
    assert "pg-rekey doctor" in cli_ready.err
    census(ready)
    assert metric(ready, "pg_rekey_findings", kind="sequence") == 2
    assert value(ready, "select rekey.resync_sequences()") == 2
    assert "sequence" not in kinds(ready)
    cli_ready("rotate", "--wait")


def test_who_may_see_findings(ready: Connection) -> None:
    ready.execute("set role rekey_app")
    queries: list[LiteralString] = [
        "select * from rekey.findings()",
        "select * from rekey.protection_findings()",
        "select * from rekey.census_status",
        "select rekey.resync_sequences()",
    ]
    for query in queries:
        with refused("42501"):
            ready.execute(query)


def test_a_large_table_is_read_once(ready: Connection) -> None:
    """Part by part: not what is left of it, each time."""
    blocks: dict[int, int] = {}
    for number, rows in enumerate((8_000, 40_000)):
        name = f"public.t{number}"
        ready.execute(f"create table {name} (id int primary key, v bytea) with (fillfactor = 10)".encode())
        protect(ready, name)
        ready.execute(
            f"with one as (select rekey.encrypt('x'::text, context => array['{name}.v', '7']) v)"
            f" insert into {name} select g, one.v from one, generate_series(1, {rows}) g".encode()
        )
        ready.execute(f"vacuum {name}".encode())
        found: LiteralString = "select (sum(rows), sum(failed))::text from rekey._open_target(%s)"
        assert value(ready, found, f"{name}.v") == f"({rows},{rows - 1})"
        row = ready.execute(
            b"explain (analyze, buffers, format json) " + found.encode(), [f"{name}.v"]
        ).fetchone()
        assert row
        blocks[rows] = row[0][0]["Plan"]["Shared Hit Blocks"]
    assert blocks[40_000] < 7 * blocks[8_000], blocks
