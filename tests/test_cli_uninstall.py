"""`pg-rekey uninstall`: what was there before is there again, and whatever would be lost is in its way."""

import errno
import hashlib
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, LiteralString

import pytest
from psycopg.conninfo import make_conninfo

from cli_fixtures import Cli, process
from column_fixtures import protect
from driving import fill, rotate
from helpers import Connection, connect, create_database, install, value
from hosted import PROJECT, Hosted
from lossy import Lossy
from pg_rekey import local, release, uninstall
from pg_rekey.cli import base
from pg_rekey.cli import uninstall as command
from pg_rekey.errors import FINDINGS, INTERRUPTED, LOCKED, USAGE
from test_dump import tools_for

pytest_plugins = ["cli_fixtures", "column_fixtures"]

TENANT = "11111111-1111-4111-8111-111111111111"
NIL = "00000000-0000-0000-0000-000000000000"
ODD = 'it\'s "#${X}" \\ \n\r\täöü \U0001f511'
ROLES: LiteralString = """
    select count(*) from pg_roles
    where rolname ~ '^rekey_(owner|sweeper|admin|operator|auditor|app|worker)$'"""
HERE: LiteralString = "select to_regnamespace('rekey') is not null"
TABLES: LiteralString = """
    create table notes (id int primary key, "Value %s" text);
    insert into notes select g, 'note ' || g from generate_series(1, 6000) g;
    insert into notes values (0, null), (-1, '');
    create table files (region text, id int, v bytea, primary key (region, id)) partition by list (region);
    create table files_a partition of files for values in ('a');
    create table files_b partition of files for values in ('b');
    insert into files select r, g, convert_to(r || g, 'UTF8')
      from unnest('{a,b}'::text[]) r, generate_series(1, 50) g;
    insert into files values ('a', 0, '\\x00')"""


def dumped(dsn: str) -> list[str]:
    """Return everything in a database, in an order that does not depend on where rows are."""
    done = tools_for(dsn).run("pg_dump", "--dbname", dsn, "--exclude-table-data=cron.*")
    return sorted(
        line for line in done.stdout.splitlines() if not line.startswith(("--", "\\", "SELECT pg_c"))
    )


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "secrets.json", tmp_path / "audit.json"


@pytest.fixture
def exported(files: tuple[Path, Path]) -> tuple[str | Path, ...]:
    """The options that export."""
    return "--export", files[0], "--audit-log", files[1]


@pytest.fixture(scope="module")
def own() -> Iterator[local.Server]:
    """A server on which nothing else has pg_rekey; pg_cron, where there is one, is in database postgres."""
    with local.Server() as server:
        if server.installation.has("pg_cron"):
            with connect(server.dsn()) as connection:
                connection.execute("create extension pg_cron")
        yield server


def prepare(cli: Cli) -> None:
    """Protect and adopt the tables, with and without encryption on write; store secrets of two tenants."""
    cli("columns", "protect", "notes", "Value %s")
    cli("columns", "protect", "files", "v", "--encrypt-on-write")
    cli("columns", "adopt", "notes", "Value %s", "--from", "plaintext")
    cli("columns", "adopt", "files", "v", "--from", "plaintext")
    cli("keyrings", "create", "theirs", "--tenant", TENANT)
    cli("secrets", "set", "odd", "--description", "why", stdin=ODD)
    cli("secrets", "set", "empty", stdin="")
    cli("secrets", "set", "odd", "--tenant", TENANT, "--keyring", "theirs", stdin="theirs")
    cli("rotate", "--all", "--wait")


def check_audit_log(path: Path) -> None:
    """Compute the chain anew from the file alone, as docs/format.md says."""
    document = json.loads(path.read_text())
    hash_before = hashlib.sha256(b"pg_rekey/v1/audit").hexdigest()
    for number, entry in enumerate(document["entries"], 1):
        names = (
            "id",
            "at",
            "actor",
            "role",
            "jwt_subject",
            "event",
            "keyring",
            "version",
            "rotation_id",
            "details",
        )
        parts = [None if entry[name] is None else str(entry[name]).encode() for name in names]
        encoded = b"".join(
            b"\xff\xff\xff\xff" if part is None else len(part).to_bytes(4, "big") + part for part in parts
        )
        assert (entry["id"], entry["prev_hash"]) == (number, hash_before)
        hash_before = hashlib.sha256(bytes.fromhex(hash_before) + encoded).hexdigest()
        assert entry["hash"] == hash_before
    assert document["checkpoint"]["hash"] == hash_before
    assert document["verified"]["valid"]
    assert [entry["event"] for entry in document["entries"][-2:]] == ["column.unprotected"] * 2


def check_round_trip(cli: Cli, admin: str, files: tuple[Path, Path], before: list[str]) -> None:
    """Uninstall; everything is as before, and nothing is lost."""
    options = ("--export", files[0], "--audit-log", files[1])
    there = dumped(admin)
    plan = cli.json("uninstall", *options, "--dry-run")
    assert dumped(admin) == there
    assert [(one["column"], one["rows"]) for one in plan["columns"]] == [("v", 101), ("Value %s", 6001)]
    assert (plan["secrets"], plan["tenants"], plan["obstacles"]) == (3, 2, [])
    assert not any(path.exists() for path in files)

    assert "nobody answers: nothing was changed" in (cli("uninstall", *options, code=1), cli.err)[1]
    assert dumped(admin) == there
    done = cli.json("uninstall", *options, "--yes")
    assert done["roles"]["kept"] == []
    assert cli.err.startswith("database ")
    assert dumped(admin) == before
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    check_audit_log(files[1])
    with connect(admin) as connection:
        assert value(connection, ROLES) == 0
    assert "not installed" in cli("uninstall", *options, "--yes")


def check_import(cli: Cli, path: Path) -> None:
    """A fresh installation takes in what was exported, and once more changes nothing."""
    assert cli("secrets", "import", path) == "3 created, 0 updated, 0 unchanged\n"
    assert cli("secrets", "import", path) == "0 created, 0 updated, 3 unchanged\n"
    assert cli.json("secrets", "export") == {"odd": ODD, "empty": ""}
    assert cli.json("secrets", "export", "--tenant", TENANT) == {"odd": "theirs"}
    assert {(one["name"], one["description"]) for one in cli.json("secrets", "list")} == {
        ("odd", "why"),
        ("empty", None),
    }
    [theirs] = [one for one in cli.json("keyrings", "list") if one["name"] == "theirs"]
    assert theirs["tenant_id"] == TENANT


@pytest.mark.parametrize("road", ["plain", "extension"])
def test_there_and_back(
    cli: Cli,
    own: local.Server,
    files: tuple[Path, Path],
    kek: bytes,
    road: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the job of pg_cron in another database, and with roles that nothing else uses."""
    if road == "extension":
        request.getfixturevalue("extension_files")
    dsn = create_database(own.dsn(), road)
    monkeypatch.setenv("PG_REKEY_DSN", dsn)
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    with connect(dsn) as connection:
        connection.execute("create extension pgcrypto")
        connection.execute(TABLES)
    before = dumped(dsn)
    install_again = ("init", *(["--extension"] if road == "extension" else []))
    init = cli.json(*install_again)
    scheduled = init["cron"] == "elsewhere"
    if scheduled:
        with connect(own.dsn()) as connection:
            connection.execute(init["steps"][-1].partition("\n")[2].encode())
            # Not in the middle of what is compared.
            connection.execute("select cron.alter_job(jobid, schedule => '@reboot') from cron.job")
    prepare(cli)
    check_round_trip(cli, dsn, files, before)
    if scheduled:
        with connect(own.dsn()) as connection:
            assert value(connection, "select count(*) from cron.job") == 0
    cli(*install_again)
    check_import(cli, files[0])
    for path in files:
        path.unlink()
    cli("uninstall", "--export", files[0], "--audit-log", files[1], "--yes")


def test_there_and_back_on_hosted_supabase(
    cli: Cli, files: tuple[Path, Path], kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `postgres`, who is no superuser; the KEK in the Vault, the job in this database."""
    with Hosted.start() as hosted:
        dsn = hosted.make_database(PROJECT)
        monkeypatch.setenv("PG_REKEY_DSN", dsn)
        with connect(dsn) as connection:
            connection.execute(TABLES)
            connection.execute("select vault.create_secret(%s, 'pg_rekey_kek')", [kek.hex()])
            connection.execute("create schema supabase_migrations")
            connection.execute("create table supabase_migrations.schema_migrations (version text, name text)")
            connection.execute(
                "insert into supabase_migrations.schema_migrations values ('20260101000000', 'pg_rekey')"
            )
            before = dumped(hosted.admin(dsn))
            install(dsn, release.assemble("supabase"))
            connection.execute("select rekey.set_setting('kek_provider', 'vault')")
            connection.execute("select rekey.register_kek(), rekey.create_keyring('default')")
            if hosted.server.installation.has("pg_cron"):
                connection.execute("select rekey.schedule_worker('@reboot')")
        prepare(cli)
        check_round_trip(cli, hosted.admin(dsn), files, before)
        with connect(hosted.admin(dsn)) as connection:
            if hosted.server.installation.has("pg_cron"):
                assert value(connection, "select count(*) from cron.job") == 0
        install(dsn, release.assemble("supabase"))
        with connect(dsn) as connection:
            connection.execute("select rekey.set_setting('kek_provider', 'vault')")
            connection.execute("select rekey.register_kek(), rekey.create_keyring('default')")
        check_import(cli, files[0])

        # A table of somebody else, which may hold envelopes, is never taken for empty.
        with connect(hosted.admin(dsn)) as connection:
            connection.execute("create table closed (v text)")
        for path in files:
            path.unlink()
        cli("uninstall", "--export", files[0], "--audit-log", files[1], "--yes", code=1)
        assert "public.closed cannot be read whole" in cli.err
        with connect(hosted.admin(dsn)) as connection:
            connection.execute("grant select on closed to postgres")
        printed = cli("uninstall", "--export", files[0], "--audit-log", files[1], "--yes")
        assert "supabase migration repair --status reverted 20260101000000" in printed


def obstacles(cli: Cli, *options: str | Path) -> dict[str, str]:
    """Return what a dry run finds in the way, and its advice."""
    found = cli.json("uninstall", *options, "--dry-run", code=FINDINGS)["obstacles"]
    return {one["what"]: one["advice"] for one in found}


def test_everything_that_would_be_lost_is_in_the_way(
    cli_ready: Cli,
    ready: Connection,
    app: Connection,
    owner: str,
    db: str,
    files: tuple[Path, Path],
    exported: tuple[str | Path, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cli = cli_ready
    ready.execute("create table mine (id int primary key, v text)")
    protect(ready, "mine", encrypt_on_write=True)
    ready.execute("insert into mine select g, 'mine ' || g from generate_series(1, 5) g")
    app.execute("create table t (id int primary key, v text)")
    protect(app, "t", encrypt_on_write=True)
    app.execute("insert into t select g, 'theirs ' || g from generate_series(1, 5) g")
    app.execute("select rekey.create_decrypted_view('t')")
    cli("secrets", "set", "a", stdin="value")
    cli("keyrings", "create", "off")
    cli("secrets", "set", "off", "--keyring", "off", stdin="value")
    ready.execute("""
        create domain hidden as text;
        create table forgotten (plain text, sealed bytea, document jsonb, many text[], domain hidden,
          around text, raw bytea[], number int);
        insert into forgotten select 'x', rekey.encrypt(v), jsonb_build_object('a', e), array['b', e], e,
          'see ' || e, array[rekey.encrypt(v)], 1
        from (select 'v'::text as v, rekey.encrypt_text('v') as e) s;
        create materialized view copied as select * from mine;
        create table defaults (v text default rekey.encrypt_text('x'));
        create table rekey.users_own (v text);
        create table rekeys_own (v text);
        alter table rekeys_own owner to rekey_owner;
        alter table mine disable trigger user;
        update mine set v = overlay(v placing 'AAAA' from 90) where id = 3;
        alter table mine enable trigger user""")
    files[0].touch()
    before = dumped(db)
    found = obstacles(cli, *exported)
    for expected in (
        "public.forgotten.sealed holds 1 envelopes, and is not protected",
        *(
            f"public.forgotten.{name} has envelopes within 1 values"
            for name in ("document", "many", "domain", "around", "raw")
        ),
        "public.copied.v, of a materialized view, holds envelopes",
        f"app.t.v: its 5 encrypted rows are for {owner} to decrypt, who owns the table",
        "view app.t_decrypted uses pg_rekey",
        "default value for column v of table defaults uses pg_rekey",
        "rekey.users_own is no part of pg_rekey 0.1.0",
        "table rekeys_own belongs to rekey_owner",
        "1 rows of public.mine on version 1 of keyring default do not open",
        f"{files[0]} exists already",
    ):
        assert expected in found
    assert len(found) == 14, found
    assert "would be lost" in "".join(obstacles(cli))
    assert {"2 secrets would be lost"} <= set(obstacles(cli))
    assert "--export and --audit-log name one file" in obstacles(
        cli, "--export", files[1], "--audit-log", files[1]
    )
    assert f"{files[1]}/x cannot be written" in obstacles(cli, "--export", f"{files[1]}/x")
    assert "in the way: public.forgotten.sealed" in cli("uninstall", *exported, "--dry-run", code=FINDINGS)
    cli("uninstall", *exported, "--yes", code=1)
    assert "nothing was changed" in cli.err
    assert dumped(db) == before

    files[0].unlink()
    ready.execute("""
        drop table forgotten, defaults, rekey.users_own, rekeys_own;
        drop domain hidden;
        drop materialized view copied;
        delete from mine where id = 3""")
    app.execute("drop view t_decrypted")
    cli("keys", "disable", "off", "1", code=1)
    ready.execute(
        "update rekey.encryption_keys set state = 'decrypt_only' where is_active and keyring_id ="
        " (select id from rekey.keyrings where name = 'off')"
    )
    cli("keys", "disable", "off", "1")
    ready.execute("select rekey.adopt_column('mine', 'v')")
    ready.execute("alter table app.t force row level security")
    found = obstacles(cli, *exported)
    assert set(found) == {
        "public.mine.v is being adopted, by rotation 1",
        "app.t.v is blocked",
        "rows were not opened, since a column is blocked",
    }
    ready.execute("alter table app.t no force row level security")
    ready.execute("call rekey.run_rotations()")
    found = obstacles(cli, *exported)
    assert "1 rows of rekey.secrets stand on version 1 of keyring off, which is disabled" in found
    cli("keys", "enable", "off", "1")

    # What is left is for the owner of the other table, by the command that was named.
    [(_, advice)] = obstacles(cli, *exported).items()
    line = shlex.split(advice.partition(": pg-rekey ")[2])
    monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(db, user=owner))
    cli(*line, "--yes")
    monkeypatch.setenv("PG_REKEY_DSN", db)
    cli("uninstall", *exported, "--yes")
    assert not value(ready, HERE)
    assert ready.execute("select v from app.t order by id").fetchall() == [
        (f"theirs {n}",) for n in range(1, 6)
    ]
    assert value(ready, "select string_agg(v, ' ' order by id) from mine") == "mine 1 mine 2 mine 4 mine 5"


def test_a_wrong_or_missing_kek_changes_nothing(
    cli_ready: Cli, db: str, exported: tuple[str | Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli_ready("secrets", "set", "a", stdin="value")
    before = dumped(db)
    for variable in (bytes(32).hex(), ""):
        monkeypatch.setenv("PG_REKEY_KEK", variable)
        cli_ready("uninstall", *exported, "--yes", code=LOCKED)
        cli_ready("uninstall", *exported, "--dry-run", code=LOCKED)
    assert dumped(db) == before


@pytest.mark.parametrize("roles", ["", "in role rekey_admin, rekey_app"])
def test_others_than_the_installer_may_not(
    cli_ready: Cli,
    ready: Connection,
    db: str,
    exported: tuple[str | Path, ...],
    roles: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"stranger_{os.getpid()}"
    ready.execute(f"create role {name} login {roles}".encode())
    try:
        before = dumped(db)
        monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(db, user=name))
        for option in ("--yes", "--dry-run"):
            cli_ready("uninstall", *exported, option, code=1)
            assert f"{name} may not uninstall pg_rekey: nothing was changed" in cli_ready.err
            assert "and postgres that installed it" in cli_ready.err
        assert dumped(db) == before
    finally:
        ready.execute(f"drop role {name}".encode())


def test_roles_stay_while_another_database_has_them(
    cli_ready: Cli, ready: Connection, db: str, exported: tuple[str | Path, ...]
) -> None:
    """The template, for one. And a database of which nothing is known is not touched for its roles."""
    template = os.environ["PG_REKEY_TEST_TEMPLATE"]
    count = value(ready, ROLES)
    assert template in cli_ready("uninstall", *exported[2:], "--dry-run")
    done = cli_ready.json("uninstall", *exported[2:], "--yes")
    assert {role["name"] for role in done["roles"]["kept"]} >= {"rekey_owner", "rekey_app"}
    assert all(template in role["why"] for role in done["roles"]["kept"])
    assert "roles: stay" in cli_ready("uninstall", "--yes")
    assert value(ready, ROLES) == count
    assert not value(ready, HERE)


def test_roles_with_another_use_stay_and_a_repeat_drops_them(
    cli: Cli, own: local.Server, files: tuple[Path, Path], kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_DSN", dsn := create_database(own.dsn(), "used"))
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    cli("init")
    with connect(dsn) as connection:
        connection.execute("create table t (v text); grant select on t to rekey_app")
        connection.execute("create role a_member in role rekey_app, rekey_operator")
        printed = cli("uninstall", "--audit-log", files[1], "--yes")
        assert "role rekey_app stays: privileges for table t" in printed
        assert "role rekey_operator dropped, which had the members a_member" in printed
        assert connection.execute("select rolname from pg_roles where rolname ~ '^rekey_'").fetchall() == [
            ("rekey_app",)
        ]
        assert "roles rekey_app are left" in cli("uninstall", "--dry-run")
        connection.execute("revoke all on t from rekey_app")
        cli("uninstall", code=1)
        assert "role rekey_app dropped, which had the members a_member" in cli("uninstall", "--yes")
        connection.execute("drop role a_member")
        assert value(connection, ROLES) == 0


def test_nothing_was_ever_encrypted(
    cli_db: Cli, conn: Connection, exported: tuple[str | Path, ...], files: tuple[Path, Path]
) -> None:
    """Without a KEK, a secret or an entry of the audit log."""
    cli_db("uninstall", "--yes")
    assert not value(conn, HERE)


def plain(connection: Connection) -> int:
    return int(value(connection, "select count(*) from t where v = 'plain ' || id"))


def test_killed_and_interrupted_while_it_decrypts(
    cli_ready: Cli, ready: Connection, db: str, files: tuple[Path, Path], exported: tuple[str | Path, ...]
) -> None:
    """In the second of three batches, and in the third: everything opens, and a repeat goes on."""
    count = 15_000
    ready.execute("create table t (id int primary key, v text)")
    protect(ready, "t", encrypt_on_write=True)
    ready.execute(f"insert into t select g, 'plain ' || g from generate_series(1, {count}) g".encode())
    ready.execute("""
        create function hold() returns trigger language plpgsql as
          $$ begin perform pg_advisory_xact_lock(new.id); return new; end $$;
        create trigger hold before update on t
          for each row when (new.id in (7500, 12500)) execute function hold()""")
    values = fill(ready, 100)
    for number, held in ((signal.SIGKILL, 7500), (signal.SIGINT, 12_500)):
        before = plain(ready)
        with connect(db) as holder, holder.transaction():
            holder.execute("select pg_advisory_xact_lock(%s)", (held,))
            with process("uninstall", *map(str, exported), "--yes") as running:
                while plain(ready) == before:
                    assert running.poll() is None
                    time.sleep(0.02)
                running.send_signal(number)
                _, err = running.communicate(timeout=60)
        assert running.returncode == (INTERRUPTED if number == signal.SIGINT else -number)
        assert ("goes on where it stopped" in err) == (number == signal.SIGINT)
        left = count - plain(ready)
        assert 0 < left < count - before
        opened = "select sum(rows) - sum(failed) from rekey.verify_ciphertexts()"
        assert value(ready, opened) == left + len(values)
    plan = cli_ready.json("uninstall", *exported, "--dry-run")
    assert [one["rows"] for one in plan["columns"]] == [left]
    cli_ready("uninstall", *exported, "--yes")
    assert plain(ready) == count
    document = json.loads(files[0].read_text())
    assert {one["name"]: one["value"] for one in document["secrets"]} == values


# Ends as kill -9 would, right after a step.
KILLED = """
import os, signal
from pg_rekey import uninstall as steps
from pg_rekey.cli import main, uninstall as command
real = {module}.{name}
def then_die(*arguments):
    real(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
{module}.{name} = then_die
main()
"""


def run_killed(module: str, name: str, *options: str | Path) -> None:
    script = KILLED.format(module=module, name=name)
    done = subprocess.run(
        [sys.executable, "-c", script, "uninstall", *map(str, options), "--yes"], check=False
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.usefixtures("environment")
def test_killed_between_export_and_drop(
    cli_ready: Cli, ready: Connection, files: tuple[Path, Path], exported: tuple[str | Path, ...]
) -> None:
    values = fill(ready, 20)
    run_killed("command", "_save", *exported)
    assert value(ready, "select count(*) from rekey.secrets") == 20
    assert len(json.loads(files[0].read_text())["secrets"]) == 20
    assert f"{files[0]} exists already" in obstacles(cli_ready, *exported)
    again = ("--export", files[0].with_name("again"), "--audit-log", files[1].with_name("again too"))
    cli_ready("uninstall", *again, "--yes")
    document = json.loads(Path(again[1]).read_text())
    assert {one["name"]: one["value"] for one in document["secrets"]} == values
    assert not value(ready, HERE)


def test_killed_between_drop_and_roles(
    cli: Cli, own: local.Server, files: tuple[Path, Path], kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_DSN", dsn := create_database(own.dsn(), "half"))
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    cli("init")
    run_killed("steps", "drop", "--audit-log", files[1])
    with connect(dsn) as connection:
        assert not value(connection, HERE)
        assert value(connection, ROLES) == 7
        assert "are left" in cli("uninstall", "--dry-run")
        assert value(connection, ROLES) == 7
        cli("uninstall", "--yes")
        assert value(connection, ROLES) == 0


@pytest.mark.parametrize("answer", [True, False], ids=["answer lost", "commit lost"])
def test_a_lost_commit_is_told_as_unknown(
    cli_ready: Cli,
    ready: Connection,
    db: str,
    files: tuple[Path, Path],
    exported: tuple[str | Path, ...],
    answer: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(ready, 5)
    # Unlocking, the plan and the look for jobs have their own.
    with Lossy(db, nth=4, answer=answer) as proxy:
        monkeypatch.setenv("PG_REKEY_DSN", proxy.dsn)
        cli_ready("uninstall", *exported, "--yes", code=1)
        assert proxy.lost.is_set()
    assert "whether pg_rekey was dropped is not known" in cli_ready.err
    assert all(path.exists() for path in files)
    assert value(ready, HERE) is not answer
    monkeypatch.setenv("PG_REKEY_DSN", db)
    again = ("--export", files[0].with_name("again"), "--audit-log", files[1].with_name("again too"))
    cli_ready("uninstall", *again, "--yes")
    assert not value(ready, HERE)


def test_what_cannot_be_written_is_not_dropped(
    cli_ready: Cli,
    ready: Connection,
    db: str,
    files: tuple[Path, Path],
    exported: tuple[str | Path, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full disk, at the second file: neither is left."""
    fill(ready, 5)
    before = dumped(db)
    real = base.write_new

    def full(path: Path, text: str) -> None:
        if path == files[1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, text)

    monkeypatch.setattr(command, "write_new", full)
    cli_ready("uninstall", *exported, "--yes", code=1)
    assert "No space left on device: nothing was dropped" in cli_ready.err
    assert not any(path.exists() for path in files)
    assert dumped(db) == before


def test_whoever_uses_it_is_named(
    cli_ready: Cli,
    ready: Connection,
    session: Callable[[], Connection],
    files: tuple[Path, Path],
    exported: tuple[str | Path, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody stores a secret between its export and the end: who is about to is waited for."""
    monkeypatch.setattr(uninstall, "LOCK_ATTEMPTS", 1)
    fill(ready, 5)
    other = session()
    with other.transaction():
        other.execute("select rekey.set_secret('last', 'of all')")
        cli_ready("uninstall", *exported, "--yes", code=1)
    assert f"pid {other.info.backend_pid} (postgres, since " in cli_ready.err
    assert "nothing was dropped" in cli_ready.err
    assert not any(path.exists() for path in files)
    cli_ready("uninstall", *exported, "--yes")
    names = [one["name"] for one in json.loads(files[0].read_text())["secrets"]]
    assert sorted(names) == ["last", "s1", "s2", "s3", "s4", "s5"]


def test_what_comes_between_plan_and_drop_is_found(
    cli_ready: Cli,
    ready: Connection,
    db: str,
    files: tuple[Path, Path],
    exported: tuple[str | Path, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An application that still writes envelopes, a view that is just being made, a secret."""
    ready.execute("create table t (id int primary key, v text)")
    protect(ready, "t")
    insert: LiteralString = (
        "insert into t select 1, rekey.encrypt_text('v', context => array['public.t.v', '1'])"
    )
    view: LiteralString = "create view late as select rekey.version()"
    real = command._decrypt

    def between(statement: LiteralString) -> Callable[[Any, Any], None]:
        def decrypt(connection: Any, column: Any) -> None:
            real(connection, column)
            ready.execute(statement)

        return decrypt

    monkeypatch.setattr(command, "_decrypt", between(insert))
    cli_ready("uninstall", *exported, "--yes", code=1)
    assert "public.t.v holds 1 envelopes, and is not protected: nothing was dropped" in cli_ready.err
    assert "pg-rekey columns protect public.t v" in cli_ready.err
    protect(ready, "t")
    monkeypatch.setattr(command, "_decrypt", between(view))
    cli_ready("uninstall", *exported, "--yes", code=1)
    assert "view late uses pg_rekey: nothing was dropped" in cli_ready.err
    ready.execute("drop view late; create function rekey_targets.column_99_guard() returns int return 1")
    ready.execute("alter function rekey_targets.column_99_guard() owner to rekey_admin")
    cli_ready("uninstall", *exported, "--yes", code=1)
    assert "needs pg_rekey: nothing was dropped: function rekey_targets.column_99_guard()" in cli_ready.err
    ready.execute("drop function rekey_targets.column_99_guard()")
    assert value(ready, "select v from t") == "v"
    protect(ready, "t")
    monkeypatch.setattr(command, "_decrypt", between("select rekey.set_secret('late', 'v')"))
    cli_ready("uninstall", *exported[2:], "--yes", code=1)
    assert "more to export than there was: nothing was dropped" in cli_ready.err
    assert not any(path.exists() for path in files)
    monkeypatch.undo()


def test_a_rotation_under_way_is_no_obstacle_nor_a_value_that_begins_alike(
    cli_ready: Cli, ready: Connection, exported: tuple[str | Path, ...]
) -> None:
    ready.execute("create table t (id int primary key, v text); insert into t values (-1, 'rk1:plain')")
    ready.execute("create table b (id int primary key, v bytea); insert into b values (-1, '\\x524b01')")
    protect(ready, "b")
    protect(ready, "t", encrypt_on_write=True)
    ready.execute("insert into t select g, 'plain ' || g from generate_series(1, 100) g")
    rotate(ready)
    for _ in range(2):
        ready.execute("select rekey.rotation_step()")
    cli_ready("uninstall", *exported, "--yes")
    assert plain(ready) == 100
    assert value(ready, "select v from t where id = -1") == "rk1:plain"
    assert value(ready, "select v from b") == b"\x52\x4b\x01"


def test_an_export_that_was_changed_is_refused(
    cli_ready: Cli, ready: Connection, files: tuple[Path, Path], exported: tuple[str | Path, ...], db: str
) -> None:
    fill(ready, 2)
    cli_ready("uninstall", *exported, "--yes")
    install(db, release.assemble("plain"))
    cli_ready("init")
    text = files[0].read_text()
    files[0].write_text(text[:-20])
    cli_ready("secrets", "import", files[0], code=1)
    assert "cut off" in cli_ready.err
    files[0].write_text(text.replace('"keyring"', '"ring"'))
    cli_ready("secrets", "import", files[0], code=1)
    assert "was changed" in cli_ready.err
    files[0].write_text(text)
    cli_ready("secrets", "import", files[0], "--tenant", NIL, code=USAGE)
    cli_ready("secrets", "import", files[0])
