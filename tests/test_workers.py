"""Several workers of one command: they share a rotation, and one that dies is noticed and comes back."""

import json
from typing import Any, LiteralString

import pytest

from cli_fixtures import Cli, eventually, process
from driving import check, fill, rotate, rotation
from helpers import Connection
from pg_rekey.errors import INTERRUPTED, UNREACHABLE, USAGE
from terminal import terminal

pytest_plugins = ["cli_fixtures"]

# The connections of commands, the first one first.
SESSIONS: LiteralString = """
    select pid from pg_stat_activity where datname = current_database() and application_name = 'pg-rekey'
    order by backend_start"""


def sessions(connection: Connection) -> list[int]:
    return [pid for (pid,) in connection.execute(SESSIONS).fetchall()]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def model(ready: Connection) -> dict[str, str]:
    """Secrets of some hundred blocks, in batches that are short."""
    ready.execute("select rekey.set_setting('batch_target', '10 ms')")
    # A hundred batches by default: then one that the throttle holds for 0.1 s would be told of.
    ready.execute("select rekey.set_setting('step_limit', '20 s')")
    return fill(ready, 6000)


@pytest.fixture
def slow(ready: Connection, model: dict[str, str]) -> dict[str, str]:
    """The same, with a throttle that makes a rotation last some seconds."""
    ready.execute("select rekey.set_setting('max_rows_per_second', '1500')")
    return model


def test_a_rotation_is_shared(cli_ready: Cli, ready: Connection, model: dict[str, str]) -> None:
    # One alone cannot do all.
    ready.execute("select rekey.set_setting('max_rows_per_second', '6000')")
    rotate(ready)
    log = lines(cli_ready("work", "--workers", "3", "--log", "json"))
    batches = [line for line in log if line["event"] == "batch"]
    assert len({line.get("worker") for line in batches}) > 1
    assert sum(line["rows"] for line in batches) == 6000
    assert log[-1] == {**log[-1], "event": "stopped", "batches": len(batches)}
    assert rotation(ready, 1, "state", "rows_done", "attempts") == ("completed", 6000, 0)
    eventually(lambda: sessions(ready) == [])
    check(ready, model)


def test_one_bar_for_all(cli_ready: Cli, ready: Connection, slow: dict[str, str]) -> None:
    with terminal("rotate", "--wait", "--workers", "3", lines=20) as shown:
        shown.read(until=lambda screen: "re-encrypting" in screen and "rows/s" in screen)
        assert len([line for line in shown.lines if line]) == 1, shown.screen
        eventually(lambda: len(sessions(ready)) == 3)
        ready.execute("select rekey.set_setting('max_rows_per_second', null)")
        assert shown.code() == 0
        assert "completed" in shown.screen
    check(ready, slow)


def test_one_that_is_killed_is_noticed_and_comes_back(
    cli_ready: Cli, ready: Connection, slow: dict[str, str]
) -> None:
    rotate(ready)
    with process("work", "--workers", "3", "--log", "json") as working:
        eventually(lambda: len(sessions(ready)) == 3 and rotation(ready, 1, "rows_done") > 0)
        killed = sessions(ready)[1]
        ready.execute("select pg_terminate_backend(%s)", [killed])
        eventually(lambda: len(sessions(ready)) == 3 and killed not in sessions(ready))
        ready.execute("select rekey.set_setting('max_rows_per_second', null)")
        out, err = working.communicate(timeout=60)
        assert working.returncode == 0, err
    [error] = [line for line in lines(out) if line["event"] == "error"]
    assert error["worker"] in (2, 3)
    connected = [line.get("worker") for line in lines(out) if line["event"] == "connected"]
    assert connected.count(error["worker"]) == 2
    assert rotation(ready, 1, "state") == "completed"
    check(ready, slow)


def test_a_person_reads_which_worker_broke_off(
    cli_ready: Cli, ready: Connection, slow: dict[str, str]
) -> None:
    with process("rotate", "--wait", "--workers", "2") as rotating:
        eventually(lambda: len(sessions(ready)) == 2 and rotation(ready, 1, "rows_done") > 0)
        ready.execute("select pg_terminate_backend(%s)", [sessions(ready)[1]])
        eventually(lambda: len(sessions(ready)) == 2)
        ready.execute("select rekey.set_setting('max_rows_per_second', null)")
        out, err = rotating.communicate(timeout=60)
        assert rotating.returncode == 0, err
    assert "worker 2: " in err
    assert "tries again in 1 s" in err
    assert "completed" in out
    check(ready, slow)


def test_when_the_first_one_is_killed_all_end(
    cli_ready: Cli, ready: Connection, slow: dict[str, str]
) -> None:
    with process("rotate", "--wait", "--workers", "3") as rotating:
        eventually(lambda: len(sessions(ready)) == 3 and rotation(ready, 1, "rows_done") > 0)
        ready.execute("select pg_terminate_backend(%s)", [sessions(ready)[0]])
        _, err = rotating.communicate(timeout=60)
        assert rotating.returncode in (1, UNREACHABLE), err
    eventually(lambda: not sessions(ready))
    ready.execute("select rekey.set_setting('max_rows_per_second', null)")
    cli_ready("work", "--workers", "2")
    assert rotation(ready, 1, "state") == "completed"
    check(ready, slow)


def test_ctrl_c_ends_all(cli_ready: Cli, ready: Connection, slow: dict[str, str]) -> None:
    with terminal("rotate", "--wait", "--workers", "3") as shown:
        shown.read(until=lambda screen: "rows/s" in screen)
        eventually(lambda: len(sessions(ready)) == 3)
        shown.interrupt()
        assert shown.code() == INTERRUPTED
        assert "nothing of rotation 1 is lost" in " ".join(shown.screen.split())
    assert sessions(ready) == []
    with terminal("work", "--workers", "3") as shown:
        shown.read(until=lambda screen: "rows/s" in screen)
        shown.interrupt()
        assert shown.code() == 0
        assert "stopped after" in shown.screen
    assert sessions(ready) == []
    check(ready, slow)


def test_workers_are_for_who_works(cli_ready: Cli) -> None:
    cli_ready("rotate", "--workers", "2", code=USAGE)
    assert "--workers and --fast are for --wait" in cli_ready.err
    cli_ready("work", "--workers", "0", code=USAGE)
