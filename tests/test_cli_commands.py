"""Keyrings, keys, rotations, schedules, settings, status, verification, metrics: each command, its errors."""

import datetime as dt
import os
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from psycopg.conninfo import make_conninfo

from cli_fixtures import Cli
from helpers import Connection, value
from pg_rekey.errors import FINDINGS, LOCKED, UNFINISHED, USAGE
from pg_rekey.metrics import HELP, exposition

pytest_plugins = ["cli_fixtures"]

DAMAGE = "update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)"


def test_keyrings(cli_ready: Cli) -> None:
    cli_ready("keyrings", "create", "app", "--rotate-every", "30 days")
    rows = {row["name"]: row for row in cli_ready.json("keyrings", "list")}
    assert rows["app"]["rotate_every"] == 30 * 86400
    assert rows["app"]["active_version"] == 1
    cli_ready("keyrings", "create", "app", code=1)
    assert "[23505]" in cli_ready.err
    cli_ready("keyrings", "create", "other", "--rotate-every", "now and then", code=1)
    cli_ready("keyrings", "retire", "app", code=1, stdin="n\n")
    assert cli_ready("keyrings", "retire", "app", "--yes") == "keyring app retired\n"
    cli_ready("keyrings", "retire", "none", "--yes", code=6)
    assert "[RK007]" in cli_ready.err


def test_creating_a_keyring_takes_the_kek(cli_ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_REKEY_KEK")
    cli_ready("keyrings", "create", "app", code=LOCKED)


def test_keys(cli_ready: Cli) -> None:
    cli_ready("secrets", "set", "a", stdin="value")
    cli_ready("rotate", "--wait")
    states = {row["version"]: row["state"] for row in cli_ready.json("keys", "list", "--keyring", "default")}
    assert states == {1: "decrypt_only", 2: "active"}
    usage = {row["version"]: row["rows"] for row in cli_ready.json("keys", "usage")}
    assert usage == {1: 0, 2: 1}

    assert "version 1 of keyring default is disabled" in cli_ready("keys", "disable", "default", "1")
    assert cli_ready.json("keys", "enable", "default", "1", "--reason", "found")["state"] == "decrypt_only"
    cli_ready("keys", "disable", "default", "2", code=1)
    assert "[RK006]" in cli_ready.err
    cli_ready("keys", "disable", "default", "9", code=6)
    assert "[RK007]" in cli_ready.err
    cli_ready("keys", "disable", "default", "one", code=USAGE)


def test_destruction(cli_ready: Cli, ready: Connection) -> None:
    cli_ready("secrets", "set", "a", stdin="value")
    cli_ready("keys", "schedule-destruction", "default", "1", "--yes", code=1)
    assert "[RK006]" in cli_ready.err
    cli_ready("rotate", "--wait")
    assert "is destroy_scheduled" in cli_ready("keys", "schedule-destruction", "default", "1")
    assert "database rekey_test_" in cli_ready.err
    cli_ready("keys", "cancel-destruction", "default", "1")
    cli_ready("keys", "schedule-destruction", "default", "1", "--wait", "0 s", code=1, stdin="n\n")
    said = cli_ready("keys", "schedule-destruction", "default", "1", "--wait", "40 days", stdin="y\n")
    day = (dt.datetime.now(dt.UTC) + dt.timedelta(days=40)).date().isoformat()
    assert f"destroy_scheduled, after {day}" in said
    assert "is decrypt_only" in cli_ready("keys", "cancel-destruction", "default", "1")
    cli_ready("keys", "cancel-destruction", "default", "1", code=1)
    cli_ready("keys", "schedule-destruction", "default", "1", "--wait", "-1 day", "--yes", code=1)


def test_compromise(cli_ready: Cli) -> None:
    cli_ready("secrets", "set", "a", stdin="value")
    cli_ready("keys", "compromise", "default", "1", code=1, stdin="")
    assert "nobody answers: nothing was changed" in cli_ready.err
    said = cli_ready("keys", "compromise", "default", "1", "--reason", "laptop stolen", "--yes")
    assert "version 1 of keyring default is compromised" in said
    cli_ready("work")
    assert {row["version"] for row in cli_ready.json("verify")} == {2}
    cli_ready("keys", "compromise", "default", "1", "--yes", code=1)


def test_rotations(cli_ready: Cli) -> None:
    [rotation] = cli_ready.json("rotate")
    number = rotation["id"]
    assert "is paused" in cli_ready("rotations", "pause", number)
    cli_ready("rotations", "pause", number, code=1)
    assert "is queued" in cli_ready("rotations", "resume", number)
    cli_ready("rotations", "retry", number, code=1)
    assert "[RK006]" in cli_ready.err
    shown = cli_ready("rotations", "show", number)
    assert re.search(r"^to version +2 *$", shown, re.MULTILINE)
    assert cli_ready.json("rotations", "show", number)["keyring"] == "default"
    cli_ready("rotations", "show", 99, code=6)
    assert "is rolled_back" in cli_ready("rotations", "rollback", number, "--reason", "second thoughts")
    assert [row["trigger"] for row in cli_ready.json("rotations", "list")] == ["rollback", "manual"]
    assert len(cli_ready.json("rotations", "list", "--keyring", "default", "--limit", "1")) == 1
    for command in ("pause", "resume", "retry", "rollback"):
        cli_ready("rotations", command, 99, code=6)
        assert "[RK007]" in cli_ready.err


def test_quarantine(cli_ready: Cli, ready: Connection) -> None:
    for name in "ab":
        cli_ready("secrets", "set", name, stdin="value")
    ready.execute(f"{DAMAGE} where name = 'a'")
    cli_ready("verify", code=FINDINGS)
    cli_ready("rotate", "--dry-run", code=FINDINGS)
    cli_ready("rotate", "--wait", code=UNFINISHED)
    assert "completed_with_failures" in cli_ready.out
    [failure] = cli_ready.json("rotations", "failures")
    assert failure["target"] == "rekey.secrets"
    cli_ready("rotations", "failures", 99, code=6)
    assert "no such rotation: 99 [RK007]" in cli_ready.err
    assert cli_ready("rotations", "failures", failure["rotation_id"]).count("\n") == 2
    cli_ready("status", "--check", code=UNFINISHED)
    ready.execute(f"{DAMAGE} where name = 'a'")
    assert (
        cli_ready("rotations", "resolve", failure["id"], "retry", "--reason", "mended")
        == "failure 1: retry\n"
    )
    cli_ready("rotations", "resolve", failure["id"], "discard", code=1)
    cli_ready("rotations", "resolve", failure["id"], "forget", code=USAGE)
    cli_ready("work")
    assert cli_ready("rotations", "failures") == "no failures\n"
    assert cli_ready.json("rotations", "failures", "--all")[0]["resolution"] == "retry"
    assert cli_ready.json("rotations", "show", failure["rotation_id"])["state"] == "completed"


def test_schedule(cli_ready: Cli) -> None:
    assert cli_ready.json("schedule", "show")[0]["rotate_every"] is None
    cli_ready("status", "--check", code=FINDINGS)
    cli_ready("schedule", "set", "default", "90 days")
    cli_ready("status", "--check")
    said = cli_ready("schedule", "set", "default", "90 days", "--first-at", "2000-01-01 00:00 UTC")
    assert "2000-01-01 00:00:00 UTC" in said
    assert cli_ready.json("schedule", "show")[0]["overdue"]
    cli_ready("status", "--check", code=FINDINGS)
    cli_ready("work")
    [rotation] = cli_ready.json("rotations", "list")
    assert (rotation["trigger"], rotation["state"]) == ("schedule", "completed")
    assert cli_ready("schedule", "clear", "default") == "keyring default has no schedule\n"
    for wrong in ("1 second", "often", "-1 day"):
        cli_ready("schedule", "set", "default", "--", wrong, code=1)
    cli_ready("schedule", "set", "none", "1 day", code=6)
    cli_ready("schedule", "clear", "none", code=6)


def test_settings(cli_ready: Cli) -> None:
    names = [row["name"] for row in cli_ready.json("settings", "show")]
    assert "batch_target" in names
    assert cli_ready("settings", "set", "max_rows_per_second", "5000") == "max_rows_per_second is 5000\n"
    assert (
        cli_ready("settings", "set", "max_rows_per_second", "--default") == "max_rows_per_second is not set\n"
    )
    cli_ready("settings", "set", "max_rows_per_second", code=USAGE)
    cli_ready("settings", "set", "max_rows_per_second", "1", "--default", code=USAGE)
    cli_ready("settings", "set", "max_rows_per_second", "none", code=1)
    cli_ready("settings", "set", "no_such_setting", "1", code=1)
    assert "[22023]" in cli_ready.err


def test_status(cli_ready: Cli) -> None:
    cli_ready("rotate")
    shown = cli_ready("status")
    assert shown.startswith("database rekey_test_")
    assert re.search(r"^ *1 +default +queued", shown, re.MULTILINE)
    document = cli_ready.json("status")
    assert document["worker"]["kek"] == 1
    assert (document["secrets"], document["secrets_estimated"]) == (0, False)
    assert "0 secrets" in shown
    assert document["keyrings"][0]["schedule"] == "none"
    cli_ready("status", "--check", code=FINDINGS)


def test_status_says_how_many_secrets_there_are(
    cli_ready: Cli, ready: Connection, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.execute("select rekey.set_secret('a', 'v')")
    assert "\n1 secret\n" in cli_ready("status")
    ready.execute("select rekey.set_secret('s' || n, 'v') from generate_series(1, 1499) n")
    assert "\n1,500 secrets\n" in cli_ready("status")
    name = f"rekey_test_status_{os.getpid()}"
    ready.execute(f"create role {name} login; grant rekey_auditor to {name}".encode())
    try:
        # Who may not read them is told what the server knows.
        monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(db, user=name))
        ready.execute("update pg_class set reltuples = -1 where oid = 'rekey.secrets'::regclass")
        assert " secrets" not in cli_ready("status")
        ready.execute("analyze rekey.secrets")
        assert "\nabout 1,500 secrets\n" in cli_ready("status")
    finally:
        ready.execute(f"drop role {name}".encode())


def test_status_before_init(cli_db: Cli) -> None:
    assert "pg-rekey init" in cli_db("status")


def test_verify(cli_ready: Cli) -> None:
    assert cli_ready("verify") == "there is nothing encrypted\n"
    cli_ready("secrets", "set", "a", stdin="value")
    [row] = cli_ready.json("verify", "--keyring", "default")
    assert (row["rows"], row["failed"]) == (1, 0)
    cli_ready("verify", "--keyring", "none", code=6)


def test_metrics(cli_ready: Cli) -> None:
    cli_ready("rotate", "--wait")
    text = cli_ready("metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {one.name for family in families.values() for one in family.samples} <= set(HELP)
    [total] = families["pg_rekey_rotations"].samples[-1:]
    assert "pg_rekey_rotations_total" in text
    assert total.value in (0.0, 1.0)
    assert {row["name"] for row in cli_ready.json("metrics")} <= set(HELP)


def test_metrics_without_a_value_are_left_out() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a", "labels": {"x": "1"}, "value": 1.0},
        {"name": "a", "labels": {"y": "2"}, "value": 2.0},
        {"name": "b", "labels": {}, "value": None},
    ]
    text = exposition(rows)
    assert 'a{x="1",y=""} 1.0' in text
    assert "\nb " not in text


def test_metrics_are_documented() -> None:
    page = Path(__file__).parents[1] / "docs" / "operations.md"
    missing = [name for name in HELP if name.removeprefix("pg_rekey_") not in page.read_text()]
    assert missing == []


def test_audit_log_has_the_reason(cli_ready: Cli, ready: Connection) -> None:
    cli_ready("rotate", "--reason", "as planned")
    asked = "select details ->> 'reason' from rekey.audit_log where event = 'rotation.requested'"
    assert value(ready, asked) == "as planned"
