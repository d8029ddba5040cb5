"""A dump brings everything along: what is restored opens, rotates and verifies as before."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

from helpers import Connection, connect, initialize, install, unlock, value
from hosted import Hosted
from pg_rekey import local, release

# Everything that a dump must bring along, and in what order it can be compared.
STATE = {
    "settings": "select * from rekey.settings",
    "worker": "select * from rekey._worker",
    "session key": "select * from rekey._session_key",
    "keks": "select * from rekey.keks order by id",
    "keyrings": "select * from rekey.keyrings order by id",
    "keys": "select * from rekey.encryption_keys order by id",
    "secrets": "select * from rekey.secrets order by tenant_id, id",
    "columns": "select * from rekey.protected_columns order by id",
    "rotations": "select * from rekey.rotations order by id",
    "failures": "select * from rekey.rotation_failures order by id",
    "chunks": "select * from rekey._chunks order by id",
    "audit": "select * from rekey.audit_log order by id",
    "head": "select * from rekey._audit_head",
    "endpoints": "select * from rekey._endpoints order by id",
    "messages": "select * from rekey._notifications order by id",
    "told": "select * from rekey._told order by 1, 2",
    "notifier": "select * from rekey._notifier",
    "schedules": "select * from rekey.schedule_status order by keyring",
    "sequences": "select sequencename, last_value from pg_sequences where schemaname = 'rekey' order by 1",
}


KEPT: LiteralString = """
    select rekey.decrypt_text(w, array['public.kept.v', id::text]) from public.kept where id = %s"""


@dataclass
class Tools:
    """pg_dump and its kin, no older than the server."""

    bindir: Path

    def run(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of them; what it prints as an error belongs to the failure."""
        done = subprocess.run(
            [self.bindir / program, *arguments], capture_output=True, text=True, check=False, timeout=60
        )
        if check and done.returncode != 0:
            pytest.fail(f"{program}: {done.stderr}")
        return done

    def dump(self, dsn: str, path: Path, *options: str) -> None:
        """Dump a database into a file."""
        self.run("pg_dump", "--dbname", dsn, "--file", str(path), *options)

    def restore(self, dsn: str, path: Path, *options: str) -> None:
        """Restore an archive; the first error ends it."""
        self.run("pg_restore", "--dbname", dsn, "--exit-on-error", *options, str(path))


def tools_for(dsn: str) -> Tools:
    """Return tools that can dump this server, or skip."""
    if named := os.environ.get("PG_REKEY_TEST_BINDIR"):
        return Tools(Path(named))
    installation = local.ensure()
    with connect(dsn) as connection:
        major = connection.info.server_version // 10000
    if installation.major < major:
        older = f"pg_dump {installation.major} cannot dump a server of version {major}"
        pytest.skip(f"{older}: PG_REKEY_TEST_BINDIR names another")
    return Tools(installation.bindir)


@pytest.fixture
def tools(server: str) -> Tools:
    return tools_for(server)


def fill(dsn: str, kek: bytes) -> None:
    """Leave something in every table: two keyrings, rotations over and half-way, a damaged row."""
    with connect(dsn) as connection:
        initialize(connection, kek)
        connection.execute("select rekey.create_keyring('tenant', gen_random_uuid(), '90 days')")
        connection.execute(
            "select rekey.set_secret('name ' || i, 'value ' || i) from generate_series(1, 120) i"
        )
        connection.execute("select rekey.set_setting('destroy_wait', '99 days')")
        connection.execute("select rekey.add_endpoint('web', 'https://hooks.example.com/x')")
        connection.execute("select rekey.test_endpoint('web')")
        # Where the column stands differs in the restored table, and its name from when it was registered.
        connection.execute("create table public.kept (id int primary key, gone text, v text)")
        connection.execute("alter table public.kept drop column gone")
        connection.execute("select rekey.protect_column('public.kept', 'v')")
        connection.execute("alter table public.kept rename column v to w")
        connection.execute("""
            select rekey.protect_column('public.kept', 'w', encrypt_on_write => true,
              search_path => 'public, "A, b"',
              fire_triggers => not has_parameter_privilege('session_replication_role', 'set'))""")
        connection.execute("insert into public.kept select i, 'kept ' || i from generate_series(1, 50) i")
        connection.execute("select rekey.rotate_keys()")
        connection.execute("call rekey.run_rotations('10 s')")
        connection.execute("select rekey.disable_key('tenant', 1)")
        connection.execute("select rekey.set_secret('damaged', 'lost')")
        connection.execute("""
            update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)
            where name = 'damaged'""")
        connection.execute("select rekey.rotate_keys('default')")
        connection.execute("call rekey.run_rotations('10 s')")
        connection.execute("select rekey._tick_duty('notifications', now())")
        connection.execute("select rekey.set_setting('max_rows_per_second', '50')")
        connection.execute("select rekey.rotate_keys('default')")
        for _ in range(2):  # plans, and sweeps the first batch
            connection.execute("select rekey.rotation_step()")
        assert value(connection, "select rows_done from rekey.rotation_status order by id desc limit 1") > 0
        assert all(connection.execute(query.encode()).fetchall() for query in STATE.values())


def state(connection: Connection) -> dict[str, list[Any]]:
    return {name: connection.execute(query.encode()).fetchall() for name, query in STATE.items()}


def compare(before: str, after: str) -> None:
    """Compare what is in two databases."""
    with connect(before) as old, connect(after) as new:
        expected, found = state(old), state(new)
        assert [name for name in STATE if found[name] != expected[name]] == []


def check_that_it_works(dsn: str, kek: bytes) -> None:
    """Open old secrets, write new ones, end the rotation under way, rotate again, verify the chain."""
    with connect(dsn) as connection:
        last = value(connection, "select max(id) from rekey.rotations")
        entries = value(connection, "select max(id) from rekey.audit_log")
        unlock(connection, kek)
        assert value(connection, "select rekey.get_secret('name 7')") == "value 7"
        assert value(connection, "select problem from rekey.column_status") is None
        assert value(connection, KEPT, 7) == "kept 7"
        connection.execute("insert into public.kept values (51, 'kept 51')")
        connection.execute("select rekey.set_secret('name 7', 'changed')")
        connection.execute("select rekey.set_setting('max_rows_per_second', null)")
        connection.execute("update rekey._worker set next_batch_at = null")
        connection.execute("call rekey.run_rotations('20 s')")
        state_of = "select state from rekey.rotation_status where id = %s"
        assert value(connection, state_of, last) == "completed_with_failures"
        connection.execute("select rekey.delete_secret('damaged')")
        connection.execute("select rekey.rotate_keys()")
        connection.execute("call rekey.run_rotations('20 s')")
        assert connection.execute(
            "select id, state from rekey.rotation_status where id > %s order by id", [last]
        ).fetchall() == [(last + 1, "completed"), (last + 2, "completed")]
        assert [value(connection, KEPT, key) for key in (7, 51)] == ["kept 7", "kept 51"]
        versions = "select count(distinct substr(decode(substr(w, 5, 16), 'base64'), 8, 4)) from public.kept"
        assert value(connection, versions) == 1
        connection.execute("select rekey.create_keyring('new')")
        connection.execute("select rekey.add_endpoint('new', 'https://hooks.example.com/y')")
        assert value(connection, "select count(*) from rekey._open_endpoints()") == 2
        assert value(connection, "select sum(failed) from rekey.verify_ciphertexts()") == 0
        assert value(connection, "select rekey.get_secret('name 7')") == "changed"
        assert value(connection, "select rekey.get_secret('name 120')") == "value 120"
        assert value(connection, "select destroy_wait::text from rekey.settings") == "99 days"
        assert value(connection, "select (rekey.verify_audit_log()).valid")
        assert value(connection, "select max(id) from rekey.audit_log") > entries
        for statement in ("delete from rekey.audit_log", "truncate rekey.encryption_keys cascade"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())


def test_plain_road_custom_format(
    tools: Tools, db: str, make_database: Callable[..., str], kek: bytes, tmp_path: Path
) -> None:
    fill(db, kek)
    tools.dump(db, tmp_path / "dump", "--format", "custom")
    restored = make_database()
    tools.restore(restored, tmp_path / "dump", "--single-transaction")
    compare(db, restored)
    check_that_it_works(restored, kek)


def test_plain_road_plain_format(
    tools: Tools, db: str, make_database: Callable[..., str], kek: bytes, tmp_path: Path
) -> None:
    fill(db, kek)
    tools.dump(db, tmp_path / "dump.sql")
    assert kek.hex() not in (tmp_path / "dump.sql").read_text()
    restored = make_database()
    tools.run(
        "psql", "--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-1", "-q", "-f", str(tmp_path / "dump.sql"), restored
    )
    compare(db, restored)
    check_that_it_works(restored, kek)


def test_a_rebuilt_table_is_rebound_where_it_was_restored(
    tools: Tools, db: str, make_database: Callable[..., str], kek: bytes, tmp_path: Path
) -> None:
    """What was a part of it is known by its name alone there."""
    with connect(db) as connection:
        initialize(connection, kek)
        connection.execute("create table public.kept (id int primary key, w text)")
        connection.execute("select rekey.protect_column('public.kept', 'w', encrypt_on_write => true)")
        connection.execute("insert into public.kept select i, 'kept ' || i from generate_series(1, 50) i")
        connection.execute("select rekey.rotate_keys()")
        connection.execute("call rekey.run_rotations('10 s')")
        connection.execute("create table public.anew (like public.kept including all)")
        connection.execute("insert into public.anew select * from public.kept; truncate public.kept")
        connection.execute("alter table public.kept rename to old; alter table public.anew rename to kept")
        connection.execute("select rekey.rotate_keys()")
        connection.execute("select rekey.rotation_step()")  # which notes the names
    tools.dump(db, tmp_path / "dump", "--format", "custom")
    restored = make_database()
    tools.restore(restored, tmp_path / "dump", "--single-transaction")
    with connect(restored) as connection:
        unlock(connection, kek)
        problem: LiteralString = "select problem from rekey.column_status"
        assert "its name belongs to" in value(connection, problem)
        connection.execute("select rekey.rebind_column('public.kept', 'w')")
        assert value(connection, problem) is None
        connection.execute("update rekey.rotations set next_attempt_at = null")
        connection.execute("call rekey.run_rotations('10 s')")
        assert value(connection, "select state from rekey.rotation_status order by id desc limit 1") == (
            "completed"
        )


@pytest.mark.usefixtures("extension_files")
@pytest.mark.parametrize("format_", ["custom", "plain"])
def test_extension_road(
    tools: Tools, make_database: Callable[..., str], kek: bytes, tmp_path: Path, format_: str
) -> None:
    dsn, restored = make_database(), make_database()
    with connect(dsn) as connection:
        connection.execute("create extension pg_rekey cascade")
    fill(dsn, kek)
    tools.dump(dsn, tmp_path / "dump", "--format", format_)
    if format_ == "custom":
        tools.restore(restored, tmp_path / "dump", "--single-transaction")
    else:
        script = str(tmp_path / "dump")
        tools.run("psql", "--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-1", "-q", "-f", script, restored)
    compare(dsn, restored)
    check_that_it_works(restored, kek)
    with connect(restored) as connection:
        assert value(connection, "select count(*) from pg_extension where extname = 'pg_rekey'") == 1


SCHEMAS = ("--schema", "rekey", "--schema", "rekey_targets")
TABLE = "create table public.kept (id int primary key, w text)"


def test_hosted_road(hosted: Hosted, kek: bytes, tmp_path: Path) -> None:
    """Migrations make the schema in the new project, the dump brings the rows."""
    dsn, restored = hosted.make_database(), hosted.make_database()
    install(dsn, release.assemble("supabase"))
    fill(dsn, kek)
    tools = tools_for(dsn)
    tools.dump(dsn, tmp_path / "dump", "--format", "custom", "--data-only", *SCHEMAS)
    tools.dump(dsn, tmp_path / "kept", "--format", "custom", "--data-only", "--table", "public.kept")
    install(restored, release.assemble("supabase"))
    with connect(restored) as connection:
        connection.execute(TABLE)
    for name in ("dump", "kept"):
        tools.restore(restored, tmp_path / name, "--single-transaction")
    compare(dsn, restored)
    with connect(restored) as connection:
        assert "not restored" in value(connection, "select problem from rekey.column_status")
        connection.execute("select rekey.protect_column('kept', 'w', encrypt_on_write => true)")
    check_that_it_works(restored, kek)


def test_a_partition_that_leaves_after_a_restore_blocks(
    db: str, ready: Connection, make_database: Callable[..., str], tools: Tools, tmp_path: Path
) -> None:
    """Before anything was noted there, the names say which relations there were."""
    ready.execute(
        "create table public.ev (id int primary key, v text) partition by list (id);"
        "create table public.ev_1 partition of public.ev for values in (1);"
        "create table public.ev_2 partition of public.ev for values in (2)"
    )
    ready.execute("select rekey.protect_column('public.ev', 'v')")
    ready.execute("insert into public.ev values (1, 'x'), (2, 'y')")
    tools.dump(db, tmp_path / "dump", "--format", "custom")
    restored = make_database()
    tools.restore(restored, tmp_path / "dump")
    with connect(restored) as connection:
        problem: LiteralString = "select problem from rekey.column_status"
        assert value(connection, problem) is None
        connection.execute("alter table public.ev detach partition public.ev_2")
        assert "public.ev_2" in value(connection, problem)
        value(connection, "select rekey._note_names()")
        assert "public.ev_2" in value(connection, problem)
        connection.execute("alter table public.ev attach partition public.ev_2 for values in (2)")
        assert value(connection, problem) is None


def test_hosted_road_whole_schema(hosted: Hosted, kek: bytes, tmp_path: Path) -> None:
    """Who is no superuser cannot give the dispatchers away: nothing counts until code is loaded anew."""
    dsn, restored = hosted.make_database(), hosted.make_database()
    install(dsn, release.assemble("supabase"))
    fill(dsn, kek)
    tools = tools_for(dsn)
    tools.dump(dsn, tmp_path / "dump", "--format", "custom", *SCHEMAS)
    tools.dump(dsn, tmp_path / "kept", "--format", "custom", "--data-only", "--table", "public.kept")
    with connect(restored) as connection:
        connection.execute(TABLE)
    tools.restore(restored, tmp_path / "kept")
    done = tools.run("pg_restore", "--dbname", restored, str(tmp_path / "dump"), check=False)
    complaints = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(complaints) == 5, done.stderr
    assert all("permission denied for schema rekey" in line for line in complaints)
    compare(dsn, restored)
    with connect(restored) as connection:
        with pytest.raises(psycopg.Error, match="does not run as rekey_sweeper") as raised:
            connection.execute("select rekey.key_usage()")
        assert raised.value.sqlstate == "RK005"
        with connection.transaction():
            connection.execute(release.assemble_code().encode())
        connection.execute("reset search_path")
        connection.execute("select rekey.protect_column('kept', 'w', encrypt_on_write => true)")
    check_that_it_works(restored, kek)
