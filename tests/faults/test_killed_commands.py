"""Commands that are killed or interrupted in the middle: all of it or nothing, and once more is fine."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

import pytest

from cli_fixtures import Cli, eventually, process
from driving import check, fill, rotation, run
from helpers import Connection, unlock, value
from pg_rekey.errors import INTERRUPTED

pytest_plugins = ["cli_fixtures"]

NEXT = bytes(range(32))
SIGNALS = {
    signal.SIGKILL: -signal.SIGKILL,
    signal.SIGTERM: -signal.SIGTERM,
    signal.SIGINT: INTERRUPTED,
}
WAITS: LiteralString = """
    select count(*) from pg_stat_activity
    where datname = current_database() and application_name = 'pg-rekey' and wait_event_type = 'Lock'"""
THERE: LiteralString = """
    select count(*) from pg_stat_activity
    where datname = current_database() and application_name = 'pg-rekey'"""


@dataclass(frozen=True)
class Killed:
    """A command, the lock that stops it in the middle, and what it changes where it ends."""

    arguments: tuple[str, ...]
    lock: LiteralString
    trace: LiteralString


COMMANDS = {
    "kek rotate": Killed(
        ("kek", "rotate"),
        "select from rekey.encryption_keys order by id desc limit 1 for update",
        "select jsonb_agg(to_jsonb(k) order by k.id) from rekey.encryption_keys k",
    ),
    "secrets import": Killed(
        ("secrets", "import", "FILE"),
        "select from rekey.secrets where name = 's1' for update",
        "select jsonb_agg(to_jsonb(s) order by s.id) from rekey.secrets s",
    ),
    "rotate": Killed(
        ("rotate", "--wait"),
        "select from rekey.keyrings for update",
        "select count(*) from rekey.rotations",
    ),
    "columns adopt": Killed(
        ("columns", "adopt", "t", "v", "--from", "plaintext"),
        "select from rekey._audit_head for update",
        "select jsonb_agg(to_jsonb(t) order by t.id) from t",
    ),
}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=lambda it: it.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_killed(
    cli_ready: Cli,
    ready: Connection,
    session: Callable[[], Connection],
    kek: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    sent: signal.Signals,
) -> None:
    killed = COMMANDS[name]
    fill(ready, 3)
    file = tmp_path / ".env"
    file.write_text('s0="s0"\ns1="new"\ns4="s4"\n')
    ready.execute("create table t (id integer primary key, v text)")
    cli_ready("columns", "protect", "t", "v")
    ready.execute("insert into t select n, 'plain ' || n from generate_series(1, 20) n")
    monkeypatch.setenv("PG_REKEY_NEW_KEK", NEXT.hex())
    before = value(ready, killed.trace)
    arguments = [str(file) if one == "FILE" else one for one in killed.arguments]
    gate = session()
    with gate.transaction(), process(*arguments) as running:
        gate.execute(killed.lock)
        eventually(lambda: value(ready, WAITS))
        running.send_signal(sent)
        out, err = running.communicate(timeout=60)
        assert running.returncode == SIGNALS[sent]
        assert "Traceback" not in out + err
    eventually(lambda: not value(ready, THERE))
    assert value(ready, killed.trace) == before
    cli_ready(*arguments)
    assert value(ready, killed.trace) != before
    unlock(ready, kek, NEXT)
    run(ready)
    check(
        ready,
        {f"s{n}": f"s{n}" for n in range(1, 4)}
        | ({"s0": "s0", "s1": "new", "s4": "s4"} if "import" in name else {}),
    )


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=lambda it: it.name)
def test_rotate_and_wait_is_killed_while_it_sweeps(
    cli_ready: Cli, ready: Connection, sent: signal.Signals
) -> None:
    model = fill(ready, 300)
    ready.execute("select rekey.set_setting('max_rows_per_second', '100')")
    with process("rotate", "--wait") as running:
        eventually(lambda: value(ready, "select coalesce(sum(rows_done), 0) from rekey.rotations"))
        running.send_signal(sent)
        running.communicate(timeout=60)
    assert running.returncode == SIGNALS[sent]
    ready.execute("select rekey.set_setting('max_rows_per_second', null)")
    cli_ready("rotate", "--wait", code=7)
    assert "under way in rotation 1" in cli_ready.err
    cli_ready("work")
    assert rotation(ready, 1, "state", "rows_done") == ("completed", 300)
    check(ready, model)
