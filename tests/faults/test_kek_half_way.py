"""The KEK is rotated in the database and not yet in an environment, or the other way round."""

import signal

import pytest

from cli_fixtures import Cli, eventually, process
from driving import check, fill, rotation
from helpers import Connection, unlock, value
from pg_rekey.errors import LOCKED

pytest_plugins = ["cli_fixtures"]

NEXT = bytes(range(32))
USES = (("secrets", "get", "s1"), ("rotate", "--wait"), ("work",), ("work", "--forever"), ("verify",))


def give(monkeypatch: pytest.MonkeyPatch, current: bytes | None, following: bytes | None = None) -> None:
    for name, kek in (("PG_REKEY_KEK", current), ("PG_REKEY_NEW_KEK", following)):
        if kek:
            monkeypatch.setenv(name, kek.hex())
        else:
            monkeypatch.delenv(name, raising=False)


def switch(connection: Connection, kek: bytes) -> None:
    """Rotate the KEK in the database."""
    unlock(connection, kek, NEXT)
    connection.execute("select rekey.rotate_kek()")


@pytest.mark.parametrize("ahead", ["the database", "the environment"])
def test_one_is_ahead(
    cli_ready: Cli, ready: Connection, kek: bytes, monkeypatch: pytest.MonkeyPatch, ahead: str
) -> None:
    """With the wrong one alone every command says so and changes nothing; with both at hand, all goes on."""
    model = fill(ready, 3)
    if ahead == "the database":
        switch(ready, kek)
    active, wrong = (NEXT, kek) if ahead == "the database" else (kek, NEXT)
    give(monkeypatch, wrong)
    entries = value(ready, "select count(*) from rekey.audit_log")
    for arguments in USES:
        cli_ready(*arguments, code=LOCKED)
        assert "wrong KEK" in cli_ready.err, arguments
        assert "pg-rekey kek check" in cli_ready.err
    assert value(ready, "select count(*) from rekey.audit_log") == entries
    if ahead == "the database":
        assert cli_ready.json("kek", "check")["state"] == "retired"
    else:
        cli_ready("kek", "check", code=LOCKED)
    for given in ((wrong, active), (active, wrong), (None, active), (active, None)):
        give(monkeypatch, *given)
        assert cli_ready("secrets", "get", "s1") == "s1"
        cli_ready("rotate", "--wait")
    unlock(ready, active)
    check(ready, model)


@pytest.mark.parametrize("both", [True, False], ids=["with the next KEK", "without it"])
def test_a_worker_at_work_while_the_kek_is_rotated(
    cli_ready: Cli, ready: Connection, kek: bytes, monkeypatch: pytest.MonkeyPatch, both: bool
) -> None:
    model = fill(ready, 400)
    ready.execute("select rekey.set_setting('max_rows_per_second', '100')")
    cli_ready("rotate")
    give(monkeypatch, kek, NEXT if both else None)
    with process("work", "--forever") as running:
        eventually(lambda: rotation(ready, 1, "rows_done") > 0)
        switch(ready, kek)
        ready.execute("select rekey.set_setting('max_rows_per_second', null)")
        if both:
            eventually(lambda: rotation(ready, 1, "state") == "completed")
        else:
            assert running.stdout
            lines = iter(running.stdout.readline, "")
            assert any('"event": "error"' in line and "wrong KEK" in line for line in lines)
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    if both:
        assert "locked" not in out
        assert "error" not in out
    else:
        assert rotation(ready, 1, "state") == "running"
        cli_ready("work", code=LOCKED)
        assert "wrong KEK" in cli_ready.err
        give(monkeypatch, NEXT)
        cli_ready("work")
    assert rotation(ready, 1, "state", "rows_done") == ("completed", 400)
    unlock(ready, NEXT)
    check(ready, model)
