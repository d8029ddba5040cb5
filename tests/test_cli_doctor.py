"""`pg-rekey doctor`: each finding, with what to do."""

import os
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

import servers
from cli_fixtures import Cli
from driving import refused, waits
from helpers import Connection, connect, value
from pg_rekey import db as database
from pg_rekey import doctor, local
from pg_rekey.errors import FINDINGS

pytest_plugins = ["cli_fixtures"]


def findings(cli: Cli) -> dict[str, str]:
    """Return what doctor finds, with its severity, apart from the version of this machine's server."""
    cli("doctor", "--json", code=FINDINGS)
    import json

    return {row["finding"]: row["severity"] for row in json.loads(cli.out)}


def test_nothing_to_complain_about(cli_ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [one for one in doctor.CHECKS if one != "server version"])
    cli_ready("schedule", "set", "default", "90 days")
    cli_ready("work")
    assert "critical" not in cli_ready("doctor")
    assert "warning" not in cli_ready.out


@pytest.mark.usefixtures("empty")
def test_not_installed(cli: Cli) -> None:
    assert findings(cli)["pg_rekey is not installed in this database"] == "critical"


def test_not_set_up(cli_db: Cli) -> None:
    assert findings(cli_db)["no KEK is registered"] == "critical"


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ("-c log_statement=all", "log_statement is all: "),
        ("-c log_min_duration_statement=100", "log_min_duration_statement is 100ms: "),
        ("-c log_min_duration_sample=100", "log_min_duration_sample is 100ms: "),
        ("-c log_parameter_max_length_on_error=-1", "log_parameter_max_length_on_error is -1: "),
        (
            "-c session_preload_libraries=auto_explain -c auto_explain.log_min_duration=0"
            " -c auto_explain.log_nested_statements=on",
            "auto_explain.log_nested_statements is on: ",
        ),
        ("-c pgaudit.log=all -c pgaudit.log_parameter=on", "pgaudit.log_parameter is on: "),
        (
            "-c pg_stat_statements.track=all -c pg_stat_statements.track_utility=on",
            "pg_stat_statements.track is all: ",
        ),
    ],
)
def test_log_settings(
    options: str, finding: str, cli_ready: Cli, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(one.startswith(finding) for one in findings(cli_ready))
    monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(db, options=options))
    assert any(one.startswith(finding) for one in findings(cli_ready))


def test_rights(cli_ready: Cli, ready: Connection) -> None:
    ready.execute("""
        grant execute on function rekey.version to public;
        grant select on rekey.keyrings to public;
        alter function rekey.metrics() owner to current_user;
    """)
    found = findings(cli_ready)
    assert found["PUBLIC may use rekey.version()"] == "critical"
    assert found["PUBLIC may use rekey.keyrings"] == "critical"
    assert any(one.startswith("rekey.metrics() runs with the rights of the superuser") for one in found)


def test_worker_and_schedules(cli_ready: Cli, ready: Connection) -> None:
    found = findings(cli_ready)
    assert "there has never been a tick" in found
    assert "keyring default has no schedule" in found
    ready.execute(
        "update rekey._worker set last_tick_at = now() - interval '6 minutes', locked_since = now()"
    )
    ready.execute("select rekey.set_schedule('default', '90 days', now() - interval '1 day')")
    text = "\n".join(findings(cli_ready))
    assert "no tick since" in text
    assert "the worker has been without the KEK since" in text
    assert "keyring default is overdue since" in text


def test_rotations_gone_wrong(cli_ready: Cli, ready: Connection) -> None:
    cli_ready("secrets", "set", "a", stdin="value")
    ready.execute(
        "update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)"
    )
    cli_ready("rotate", "--wait", code=4)
    assert findings(cli_ready)["1 row did not open in rotation 1 of keyring default"] == "critical"
    ready.execute("update rekey.rotations set state = 'failed', last_error = 'disk full'")
    assert findings(cli_ready)["rotation 1 of keyring default failed: disk full"] == "critical"


def test_where_the_kek_is(
    cli_ready: Cli, ready: Connection, kek: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.execute("update rekey.settings set kek_provider = 'vault'")
    assert findings(cli_ready)["the KEK is in the database that it protects"] == "warning"
    path = tmp_path / "kek"
    path.write_text(kek.hex())
    monkeypatch.delenv("PG_REKEY_KEK")
    monkeypatch.setenv("PG_REKEY_KEK_FILE", str(path))
    for mode in (0o644, 0o660, 0o600):
        path.chmod(mode)
        finding = f"others can read PG_REKEY_KEK_FILE (mode {mode:04o})"
        assert findings(cli_ready).get(finding) == (None if mode == 0o600 else "critical")
    path.chmod(0o644)
    monkeypatch.setattr(os.path, "ismount", lambda mount: mount == str(path))
    assert findings(cli_ready)["others can read PG_REKEY_KEK_FILE (mode 0644)"] == "info"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("owner", [0, 10001])
def test_a_secret_that_is_mounted_for_a_group(
    owner: int, cli_ready: Cli, tmp_path: Path, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kubernetes does with fsGroup, and systemd with an ACL: root's file; nobody else's."""
    path = tmp_path / "kek"
    path.write_text(kek.hex())
    path.chmod(0o440)
    os.chown(path, owner, 10001)
    monkeypatch.delenv("PG_REKEY_KEK")
    monkeypatch.setenv("PG_REKEY_KEK_FILE", str(path))
    critical = "others can read PG_REKEY_KEK_FILE (mode 0440)" in findings(cli_ready)
    assert critical == (owner != 0)


def test_how_old_the_kek_is(cli_ready: Cli, ready: Connection) -> None:
    old = "the KEK is in use since"
    ready.execute("update rekey.keks set created_at = now() - interval '23 months'")
    assert not any(one.startswith(old) for one in findings(cli_ready))
    ready.execute("update rekey.keks set created_at = now() - interval '25 months'")
    assert [severity for one, severity in findings(cli_ready).items() if one.startswith(old)] == ["warning"]


def test_server_versions(cli_db: Cli) -> None:
    query = database.query("doctor: server version")
    number = "current_setting('server_version_num')::int"
    expected = {
        150014: (["critical", "critical", "warning"], "15.19"),
        150015: (["critical", "warning"], "15.19"),
        150016: (["warning"], "15.19"),
        150018: (["warning"], "15.19"),
        150019: ([], ""),
        160010: (["critical", "critical", "warning"], "16.15"),
        160014: (["warning"], "16.15"),
        160015: ([], ""),
        170006: (["critical", "critical", "warning"], "17.11"),
        170007: (["critical", "warning"], "17.11"),
        170010: (["warning"], "17.11"),
        170011: ([], ""),
        180000: (["critical", "warning"], "18.6"),
        180004: (["warning"], "18.6"),
        180006: ([], ""),
        190000: ([], ""),
    }
    with database.connect() as connection:
        for version, (severities, least) in expected.items():
            rows = connection.execute(query.replace(number, str(version))).fetchall()
            assert sorted(row["severity"] for row in rows) == severities, version
            assert {row["advice"] for row in rows} == (
                {f"Update the server to {least} or later."} if least else set()
            )


@pytest.mark.npm
@pytest.mark.parametrize(
    ("version", "loses"), [("15.14", True), ("15.18", False), ("17.6", True), ("18.0", False)]
)
def test_a_server_that_overwrites_newer_rows(
    version: str, loses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so of servers that do, and of no others."""
    try:
        with servers.unpacked(version) as one:
            monkeypatch.setattr(local, "ensure", lambda: one)
            with local.Server() as server, connect(server.dsn()) as first, connect(server.dsn()) as second:
                first.execute("create table t as select 1 as id, 'old' as v")
                waiter = Thread(target=lambda: second.execute("update t set v = 'late' where ctid = '(0,1)'"))
                with first.transaction():
                    first.execute("update t set v = 'new' where id = 1")
                    waiter.start()
                    waits(first, second.info.backend_pid)
                waiter.join()
                assert value(first, "select v from t") == ("late" if loses else "new")
                rows = first.execute(database.query("doctor: server version").encode()).fetchall()
    except servers.Unavailable as error:
        pytest.skip(str(error))
    assert any("UPDATE ... WHERE ctid" in finding for _, finding, _ in rows) is loses


def test_a_slot_whose_plugin_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with local.Server(settings={"wal_level": "logical", "shared_preload_libraries": ""}) as server:
        with connect(server.dsn()) as connection:
            allowed = value(connection, "select current_setting('output_plugin_libraries', true)")
            if allowed is None:
                pytest.skip("this release of PostgreSQL has no output_plugin_libraries")
            query = database.query("doctor: logical decoding").encode()
            connection.execute("select pg_create_logical_replication_slot('feed', 'test_decoding')")
            connection.execute("select pg_create_physical_replication_slot('standby')")
            assert connection.execute(query).fetchall() == []
            connection.execute("create role monitor login")
            with connect(server.dsn(user="monitor")) as monitor, refused("42501"):
                monitor.execute(query)
            server.write(
                "data/postgresql.conf", "output_plugin_libraries = '\"pgoutput\" , wal2json'\n", append=True
            )
            server.restart()
        with connect(server.dsn()) as connection:
            [(severity, finding, _)] = connection.execute(query).fetchall()
            assert (severity, "slot feed" in finding, "test_decoding" in finding) == ("warning", True, True)
            with refused("42501"):
                connection.execute("select * from pg_logical_slot_get_changes('feed', null, null)")


def test_pooler() -> None:
    """A pooler tells its clients another process than the one that serves them."""

    class Fake:
        info = SimpleNamespace(backend_pid=1)

        def execute(self, _: str) -> Any:
            return SimpleNamespace(fetchone=lambda: {"pid": 2})

    [finding] = doctor._pooler(Fake())  # type: ignore[arg-type]
    assert "pooler" in finding.finding


@pytest.mark.parametrize(
    ("cores", "said", "advice"),
    [
        (8, "8 cores: up to 8 workers", "workers => 4"),
        (1, "one core: one worker", "take turns"),
        (2, "2 cores: up to 2 workers share a rotation, 1 where", "workers => 1"),
    ],
)
def test_how_many_workers_suit_the_server(
    cores: int, said: str, advice: str, cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    [found] = doctor._workers(ready)  # it reads only where it is connected to
    assert found.severity == "info"
    assert said in found.finding
    assert advice in found.advice


def test_the_cores_of_another_machine_are_not_known() -> None:
    class Elsewhere:
        info = SimpleNamespace(host="db.example.com", hostaddr="192.0.2.1")

    [found] = doctor._workers(Elsewhere())  # type: ignore[arg-type]
    assert "is not known here" in found.finding


def test_a_role_with_few_rights(
    cli_ready: Cli, ready: Connection, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"rekey_test_few_{os.getpid()}"
    ready.execute(f"create role {name} login; grant rekey_app to {name}")
    try:
        monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(db, user=name))
        monkeypatch.setattr(doctor, "CHECKS", [one for one in doctor.CHECKS if one != "server version"])
        found = {row["finding"]: row for row in cli_ready.json("doctor", code=FINDINGS)}
        assert found["this role may not examine: worker"]["severity"] == "warning"
        assert f"GRANT rekey_auditor TO {name}" in found["this role may not examine: findings"]["advice"]
        ready.execute(f"grant rekey_auditor to {name}".encode())
        found = {row["finding"]: row for row in cli_ready.json("doctor", code=FINDINGS)}
        assert [
            one for one in found if one.startswith("this role may not examine: ") and "pg_cron" not in one
        ] == []
    finally:
        ready.execute(f"drop role {name}")


def test_it_reads_only(cli_ready: Cli, ready: Connection) -> None:
    before = value(ready, "select count(*) from rekey.audit_log")
    cli_ready("doctor", code=FINDINGS)
    assert value(ready, "select count(*) from rekey.audit_log") == before
