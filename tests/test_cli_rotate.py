"""`pg-rekey rotate` and `pg-rekey work`: in this process, and as processes that are interrupted."""

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cli_fixtures import HURRIED, Cli, eventually, process
from helpers import Connection, connect, unlock, value
from pg_rekey import worker
from pg_rekey.cli.rotate import held_up
from pg_rekey.cli.words import blockers
from pg_rekey.errors import INTERRUPTED, LOCKED, UNFINISHED, USAGE

pytest_plugins = ["cli_fixtures"]

SECRETS = "select count(rekey.set_secret('s' || n, 'value')) from generate_series(1, %s) n"


def states(connection: Connection) -> list[str]:
    return [state for (state,) in connection.execute("select state from rekey.rotations order by id")]


def test_without_waiting(cli_ready: Cli) -> None:
    [row] = cli_ready.json("rotate", "--reason", "why")
    assert (row["keyring"], row["state"], row["reason"]) == ("default", "queued", "why")
    cli_ready("rotate", code=7)
    assert "[RK004]" in cli_ready.err
    [row] = cli_ready.json("rotate", "--supersede")
    assert row["to_version"] == 3


def test_waiting(cli_ready: Cli, ready: Connection) -> None:
    ready.execute(SECRETS, [500])
    [row] = cli_ready.json("rotate", "--wait")
    assert (row["state"], row["rows_done"], row["rows_failed"]) == ("completed", 500, 0)
    assert "completed" in cli_ready("rotate", "--wait")


def test_which_keyring(cli_ready: Cli) -> None:
    cli_ready("rotate", "--keyring", "none", code=6)
    assert "[RK007]" in cli_ready.err
    cli_ready("keyrings", "create", "second")
    cli_ready("rotate", code=USAGE)
    assert "--keyring with one of: default, second" in cli_ready.err
    assert cli_ready.json("rotate", "--keyring", "second", "--wait")[0]["keyring"] == "second"
    assert {row["keyring"] for row in cli_ready.json("rotate", "--all", "--wait")} == {"default", "second"}
    cli_ready("rotate", "--all", "--keyring", "second", code=USAGE)
    cli_ready("rotate", "--dry-run", "--wait", code=USAGE)


def test_all_says_which_keyrings_got_no_new_version(cli_ready: Cli, ready: Connection) -> None:
    cli_ready("keyrings", "create", "second")
    cli_ready("rotate", "--keyring", "second", "--reason", "yearly")
    rows = cli_ready.json("rotate", "--all", "--reason", "KEK leaked", code=UNFINISHED)
    found = {row["keyring"]: (row["passed_by"], row["reason"]) for row in rows}
    assert found == {"default": (False, "KEK leaked"), "second": (True, "yearly")}
    assert "no new version, as a rotation is under way: 'second' (rotation 1)" in cli_ready.err
    rows = cli_ready.json("rotate", "--all", "--wait", code=UNFINISHED)
    assert {(row["keyring"], row["state"], row["passed_by"]) for row in rows} == {
        ("default", "completed", True),
        ("second", "completed", True),
    }
    cli_ready("rotate", "--keyring", "second")
    rows = cli_ready.json("rotate", "--all", "--supersede", "--wait")
    assert {(row["to_version"], row["passed_by"]) for row in rows} == {(3, False), (4, False)}
    assert cli_ready.err == ""
    noted = "select keyring, details ->> 'reason' from rekey.audit_log where event = 'rotation.passed_by'"
    assert ready.execute(noted).fetchall() == [
        ("second", "KEK leaked"),
        ("second", None),
        ("default", None),
    ]


@pytest.mark.parametrize(
    "command", ["rotate", "verify", "keys list", "keys usage", "rotations list", "audit list"]
)
def test_a_keyring_given_as_an_argument(command: str, cli: Cli) -> None:
    cli(*command.split(), "default", code=USAGE)
    assert "A keyring is named by --keyring default." in cli.err


def test_a_command_that_takes_no_keyring(cli: Cli) -> None:
    cli("status", "default", code=USAGE)
    assert "--keyring" not in cli.err


@pytest.mark.parametrize("command", ["keys list", "rotations list", "audit list"])
def test_a_list_of_a_keyring_that_is_not_there(command: str, cli_ready: Cli, ready: Connection) -> None:
    cli_ready(*command.split(), "--keyring", "nope", code=6)
    assert "Error: no such keyring: 'nope' [RK007]\nHint: `pg-rekey keyrings list`" in cli_ready.err
    assert cli_ready.out == ""
    cli_ready(*command.split(), "--keyring", "default")
    ready.execute("select rekey.create_keyring('gone'), rekey.retire_keyring('gone')")
    cli_ready(*command.split(), "--keyring", "gone")


def test_no_keyring(cli_db: Cli) -> None:
    cli_db("rotate", code=1)
    assert "there is no keyring" in cli_db.err


def test_without_the_kek(cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_REKEY_KEK")
    cli_ready("rotate", "--wait", code=LOCKED)
    monkeypatch.setenv("PG_REKEY_KEK", bytes(32).hex())
    cli_ready("rotate", "--wait", code=LOCKED)
    assert "wrong KEK" in cli_ready.err
    assert states(ready) == []


def test_kek_that_goes_away_meanwhile(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(_: object) -> dict[str, Any]:
        detail = {"error": "wrong KEK"}
        return {"event": "locked", "keyring_count": 0, "rows": 0, "wait": None, "detail": detail}

    monkeypatch.setattr(worker.Steps, "take", locked)
    cli_ready("rotate", "--wait", code=LOCKED)
    assert "wrong KEK: the rotation stays queued" in cli_ready.err
    cli_ready("work", code=LOCKED)
    assert states(ready) == ["queued"]


def test_dry_run(cli_ready: Cli, ready: Connection) -> None:
    ready.execute(SECRETS, [1200])
    before = value(ready, "select count(*) from rekey.audit_log")
    document = cli_ready.json("rotate", "--dry-run")
    assert (document["rows"], document["failed"]) == (1200, 0)
    assert document["estimate"] > document["opened_in"]
    assert re.search(r"a rotation takes about \d+ seconds? \(a guess", cli_ready("rotate", "--dry-run"))
    assert value(ready, "select count(*) from rekey.audit_log") == before
    assert states(ready) == []
    cli_ready("rotate", "--wait")
    assert "rows/s of the fastest of the last five" in cli_ready(
        "rotate", "--dry-run", "--keyring", "default"
    )


def test_waits_for_a_writer_and_says_so(cli_ready: Cli, ready: Connection, db: str, kek: bytes) -> None:
    with psycopg.connect(db) as writer:
        import pg_rekey

        pg_rekey.unlock(writer, kek)
        writer.execute("select rekey.set_secret('a', 'value')")
        done = threading.Timer(1.5, writer.commit)
        done.start()
        cli_ready("rotate", "--wait")
        done.join()
    assert (
        f"waits for the transaction of pid {writer.info.backend_pid if not writer.closed else ''}"
        in cli_ready.err
    )
    assert "goes on" in cli_ready.err


def test_paused_meanwhile(cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    def pause(_: object) -> dict[str, Any]:
        ready.execute("select rekey.pause_rotation(1)")
        return {"event": "idle", "detail": None, "wait": None}

    monkeypatch.setattr(worker.Steps, "take", pause)
    cli_ready("rotate", "--wait", code=UNFINISHED)
    assert "rotation 1 is paused: `pg-rekey rotations resume 1` goes on" in cli_ready.err


def test_interrupted(cli_ready: Cli, ready: Connection) -> None:
    """Ctrl-C leaves the rotation to the next worker, without a traceback."""
    ready.execute(SECRETS, [400])
    ready.execute("select rekey.set_setting('max_rows_per_second', '100')")
    with process("rotate", "--wait") as running:
        eventually(lambda: value(ready, "select coalesce(sum(rows_done), 0) from rekey.rotations"))
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == INTERRUPTED
    assert "interrupted: nothing of rotation 1 is lost" in err
    assert "`pg-rekey work` goes on" in err
    assert "Traceback" not in out + err
    ready.execute("select rekey.set_setting('max_rows_per_second', null)")
    cli_ready("work")
    assert states(ready) == ["completed"]


def test_work_until_idle(cli_ready: Cli, ready: Connection, tmp_path: Path) -> None:
    ready.execute(SECRETS, [100])
    cli_ready("rotate")
    health = tmp_path / "health"
    lines = [json.loads(line) for line in cli_ready("work", "--health-file", health).splitlines()]
    assert health.exists()
    events = [line["event"] for line in lines]
    assert events[0] == "connected"
    assert events[-1] == "stopped"
    [batch] = [line for line in lines if line["event"] == "batch"]
    assert (batch["batch"], batch["rows"], batch["rotations"]) == (1, 100, [1])
    assert "milliseconds" in batch
    assert states(ready) == ["completed"]
    assert value(ready, "select last_tick_at is not null from rekey.worker_status")


def test_work_forever_ends_on_sigterm(cli_ready: Cli, ready: Connection) -> None:
    ready.execute(SECRETS, [300])
    ready.execute("select rekey.set_setting('max_rows_per_second', '100')")
    cli_ready("rotate")
    with process("work", "--forever", command=HURRIED) as running:
        eventually(lambda: value(ready, "select rows_done > 0 from rekey.rotations"))
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["event"] == "stopped"
    # What was logged is what was committed.
    logged = sum(json.loads(line).get("rows", 0) for line in out.splitlines() if '"batch"' in line)
    assert value(ready, "select rows_done from rekey.rotations") == logged


def test_work_forever_outlives_its_connection(cli_ready: Cli, ready: Connection) -> None:
    kill = (
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = current_database() and application_name = 'pg-rekey'"
    )
    with process("work", "--forever", command=HURRIED) as running:
        eventually(lambda: value(ready, "select last_tick_at is not null from rekey.worker_status"))
        ready.execute("update rekey._worker set last_tick_at = null")
        ready.execute(kill)
        eventually(lambda: value(ready, "select last_tick_at is not null from rekey.worker_status"))
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=60)
    events = [json.loads(line)["event"] for line in out.splitlines()]
    assert running.returncode == 0
    assert events == ["connected", "error", "connected", "stopped"]


def test_work_forever_outlives_a_rotation_of_the_kek(
    cli_ready: Cli, ready: Connection, kek: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits until somebody gives it the new one."""
    file, new = tmp_path / "kek", bytes(range(32))
    file.write_text(kek.hex())
    monkeypatch.delenv("PG_REKEY_KEK")
    monkeypatch.setenv("PG_REKEY_KEK_FILE", str(file))
    with process("work", "--forever", command=HURRIED) as running:
        eventually(lambda: value(ready, "select last_tick_at is not null from rekey.worker_status"))
        unlock(ready, kek, new)
        ready.execute("select rekey.rotate_kek()")
        ready.execute("select rekey.rotate_keys()")
        eventually(lambda: value(ready, "select locked_since is not null from rekey.worker_status"))
        file.write_text(new.hex())
        eventually(lambda: states(ready) == ["completed"])
        running.send_signal(signal.SIGTERM)
        out, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    events = [json.loads(line)["event"] for line in out.splitlines()]
    assert {"locked", "error", "completed"} < set(events)


def test_work_forever_says_at_once_that_the_kek_is_wrong(
    cli_ready: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", bytes(32).hex())
    cli_ready("work", "--forever", code=LOCKED)
    monkeypatch.setenv("PG_REKEY_KEK", "nonsense")
    cli_ready("work", "--forever", code=LOCKED)


def test_second_signal_ends_at_once() -> None:
    seen = []
    before = signal.getsignal(signal.SIGINT)
    with worker._on_signal(lambda *_: seen.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert seen == [1]
    assert signal.getsignal(signal.SIGINT) == before


def test_killed_worker_leaves_nothing_half_done(cli_ready: Cli, ready: Connection, db: str) -> None:
    ready.execute(SECRETS, [300])
    ready.execute("select rekey.set_setting('max_rows_per_second', '200')")
    cli_ready("rotate")
    with process("work") as running:
        eventually(lambda: value(ready, "select rows_done > 0 from rekey.rotations"))
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)
    ready.execute("select rekey.set_setting('max_rows_per_second', null)")
    cli_ready("work")
    with connect(db) as connection:
        assert states(connection) == ["completed"]
    assert {row["failed"] for row in cli_ready.json("verify")} == {0}


def test_both_say_which_table_held_a_rotation_up(cli_ready: Cli, ready: Connection) -> None:
    ready.execute(SECRETS, [3])
    ready.execute("update rekey.secrets set ciphertext = set_byte(ciphertext, 40, 1) where name = 's1'")
    cli_ready("rotate", "--wait", code=UNFINISHED)
    said = "rotation 1 of keyring default left 1 row of rekey.secrets: `pg-rekey rotations failures 1`"
    assert said in cli_ready.err
    cli_ready("rotate")
    lines = [json.loads(line) for line in cli_ready("work", code=UNFINISHED).splitlines()]
    [held] = [line for line in lines if line["event"] == "held up"]
    assert (held["id"], held["state"], held["relations"]) == (2, "completed_with_failures", ["rekey.secrets"])
    # What was so before is nothing that this one did.
    cli_ready("work")


def test_what_a_rotation_waits_for_in_a_table() -> None:
    assert blockers([{"target": "a.b.c", "relation": "a.b", "error": "a.b: no", "sqlstate": "40001"}]) == (
        "another attempt: a.b: no"
    )
    assert held_up({"id": 1, "keyring": "k", "state": "failed", "last_error": "a.b: no"}) == (
        "rotation 1 of keyring k failed: a.b: no"
    )
