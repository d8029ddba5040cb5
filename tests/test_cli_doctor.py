"""`pg-rekey doctor`: each finding, with what to do."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from cli_fixtures import Cli
from helpers import Connection, value
from pg_rekey import db as database
from pg_rekey import doctor
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
    assert findings(cli_ready)["1 rows did not open in rotation 1 of keyring default"] == "critical"
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
        150015: "critical",
        150016: "warning",
        150018: "warning",
        150019: None,
        170007: "critical",
        170010: "warning",
        170011: None,
        180004: "warning",
        190000: None,
    }
    with database.connect() as connection:
        for version, severity in expected.items():
            rows = connection.execute(query.replace(number, str(version))).fetchall()
            assert [row["severity"] for row in rows] == ([severity] if severity else []), version


def test_pooler() -> None:
    """A pooler tells its clients another process than the one that serves them."""

    class Fake:
        info = SimpleNamespace(backend_pid=1)

        def execute(self, _: str) -> Any:
            return SimpleNamespace(fetchone=lambda: {"pid": 2})

    [finding] = doctor._pooler(Fake())  # type: ignore[arg-type]
    assert "pooler" in finding.finding


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
