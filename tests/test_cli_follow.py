"""Rotations that are followed: a bar on a terminal, lines elsewhere, by who works and who watches."""

import json
import re
from collections.abc import Iterator

import psycopg
import pytest

import pg_rekey
from cli_fixtures import HURRIED, Cli, eventually, process
from helpers import Connection, value
from pg_rekey.cli import follow
from pg_rekey.errors import INTERRUPTED, UNFINISHED
from terminal import see, terminal

pytest_plugins = ["cli_fixtures"]

SECRETS = "select count(rekey.set_secret('s' || n, 'value')) from generate_series(1, %s) n"
BAR = re.compile(
    r"^\S+ rotation 1 (re-encrypting|verifying|waiting) .* [\d,]+/1,500 ( *[\d,]+ rows/s)? +[\d:-]+$"
)


@pytest.fixture
def slow(cli_ready: Cli, ready: Connection) -> Cli:
    """1,500 secrets, and a throttle that makes a rotation of them last some seconds."""
    ready.execute(SECRETS, [1500])
    ready.execute("select rekey.set_setting('max_rows_per_second', '500')")
    return cli_ready


def go(ready: Connection) -> None:
    ready.execute("select rekey.set_setting('max_rows_per_second', null)")


@pytest.fixture
def writer(db: str, kek: bytes, cli_ready: Cli) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A writer that has not committed yet: it holds up what begins now."""
    with psycopg.connect(db) as connection:
        pg_rekey.unlock(connection, kek)
        connection.execute("select rekey.set_secret('open', 'value')")
        yield connection


def test_a_bar_at_80_columns(slow: Cli) -> None:
    """One line with the phase, rows, rate and time left; and the result in its place."""
    with terminal("rotate", "--wait", lines=20) as shown:
        shown.read(until=lambda screen: "re-encrypting" in screen and "rows/s" in screen)
        [line] = [one for one in shown.lines if one]
        assert BAR.match(line)
        assert shown.code() == 0
        assert [line.split()[:3] for line in shown.lines if line] == [
            ["id", "keyring", "state"],
            ["1", "default", "completed"],
        ]


def test_a_bar_without_utf_8_stays_one_line(slow: Cli) -> None:
    with terminal("rotate", "--wait", lines=20, PYTHONUTF8="0", PYTHONIOENCODING="ascii") as shown:
        shown.read(until=lambda screen: "re-encrypting" in screen and "rows/s" in screen)
        [line] = [one for one in shown.lines if one]
        assert line.isascii()
        assert BAR.match(line)
        assert shown.code() == 0
        assert len([one for one in shown.lines if one]) == 2


def test_a_bar_that_waits(
    slow: Cli, ready: Connection, writer: psycopg.Connection[tuple[object, ...]]
) -> None:
    """Who is waited for stands above the bar, with an age that goes on; the bar keeps its rows."""
    go(ready)
    with terminal("rotate", "--wait", lines=20) as shown:
        shown.read(until=lambda screen: "rotation 1 waiting" in screen)
        said, *_, bar = (line for line in shown.lines if line)
        assert said.startswith(f"waits for the transaction of pid {writer.info.backend_pid}, ")
        assert "1,500/1,500" in bar
        assert "0:00" not in bar
        first = re.search(r"open for (\d+) second", " ".join(shown.lines))
        assert first
        later = f"open for {int(first[1]) + 2} seconds"
        shown.read(until=lambda screen: later in " ".join(screen.split()))
        assert len([line for line in shown.lines if line.startswith("waits for ")]) == 1
        writer.commit()
        assert shown.code() == 0
        screen = " ".join(shown.screen.split())
        assert re.findall(r"waited for the transaction of pid \d+, postgres, open for \d+ seconds", screen)
        assert "waits for" not in screen


def test_the_verification_has_a_bar_of_its_own(slow: Cli, ready: Connection) -> None:
    state = {"ids": [1], "unfinished": 1, "paused": None, "running": 0, "verifying": 1, "total": 1000}
    state |= {"done": 1000, "blocks": 400, "blocked_by": None}
    bar = follow.Bar()
    for blocks, completed, total in ((None, 1000, 1000), (400, 0, 400), (100, 300, 400), (0, 400, 400)):
        bar.show(state | {"blocks": blocks})
        assert (bar._progress.tasks[0].completed, bar._progress.tasks[0].total) == (completed, total)
    assert bar._progress.tasks[0].description == "rotation 1 verifying"


def test_blocks_to_verify(ready: Connection) -> None:
    """They go down while a verification is under way."""
    ready.execute(SECRETS.replace("'value'", "repeat('value', 80)"), [6000])
    ready.execute("select rekey.rotate_keys()")
    seen = []
    while True:
        [(event,)] = ready.execute("select event from rekey.rotation_step()").fetchall()
        seen.append(value(ready, "select blocks_to_verify from rekey.rotation_status"))
        if event in ("completed", "idle"):
            break
    known = [blocks for blocks in seen if blocks is not None]
    assert known
    assert known == sorted(known, reverse=True)
    assert seen[-1] is None


def test_lines_where_there_is_no_terminal(slow: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LIFE_SIGN", 0.0)
    slow("rotate", "--wait")
    assert re.search(r"^rotation 1 re-encrypting, [\d,]+ of 1,500 rows$", slow.err, re.MULTILINE)


def test_after_ctrl_c_the_hint_names_what_goes_on(slow: Cli, ready: Connection) -> None:
    with terminal("rotate", "--wait") as shown:
        shown.read(until=lambda screen: "rows/s" in screen)
        shown.interrupt()
        assert shown.code() == INTERRUPTED
        assert "Hint: `pg-rekey work` goes on" in shown.screen
    go(ready)
    with terminal("work") as working:
        assert working.code() == 0
        assert "rotation 1 completed" in working.screen
    assert slow.json("rotations", "list")[0]["state"] == "completed"


def test_rotate_offers_to_follow_what_is_under_way(slow: Cli, ready: Connection) -> None:
    slow("rotate")
    slow("rotate", "--wait", code=7)
    assert "RK004" in slow.err
    with terminal("rotate", "--wait") as shown:
        shown.read(until=lambda screen: "Go on with that one? [Y/n]" in screen)
        go(ready)
        shown.type("\n")
        assert shown.code() == 0
        assert re.search(r"1  default  completed  manual +2", shown.screen)
    slow("rotate")
    with terminal("rotate", "--wait") as shown:
        shown.read(until=lambda screen: "[Y/n]" in screen)
        shown.type("n\n")
        assert shown.code() == 7
        assert "--supersede" in shown.screen


def test_watching_one_that_others_work_on(slow: Cli, ready: Connection) -> None:
    slow("rotations", "watch")
    assert slow.out == "no rotation is under way\n"
    slow("rotations", "watch", 9, code=6)
    slow("rotate")
    with process("work"), terminal("rotations", "watch", "1", lines=20) as shown:
        eventually(lambda: value(ready, "select rows_done > 0 from rekey.rotations"))
        shown.read(until=lambda screen: "re-encrypting" in screen)
        assert "nobody works on it" not in shown.screen
        with terminal("rotations", "watch") as other:
            other.read(until=lambda screen: "re-encrypting" in screen)
            other.interrupt()
            assert other.code() == INTERRUPTED
            assert "Hint: It goes on as before; `pg-rekey rotations watch` shows it again." in other.screen
        go(ready)
        assert shown.code() == 0
        assert re.search(r"1  default  completed", shown.screen)
    slow("rotations", "watch", "1")


def test_watching_one_that_nobody_works_on(slow: Cli, ready: Connection) -> None:
    slow("rotate")
    with terminal("rotations", "watch", lines=20) as shown:
        shown.read(until=lambda screen: "nobody works on it now: `pg-rekey work` does" in screen)
        ready.execute("select rekey.pause_rotation(1)")
        assert shown.code() == UNFINISHED
        assert "rotation 1 is paused: `pg-rekey rotations resume 1` goes on" in shown.screen


def test_work_shows_a_bar_on_a_terminal(slow: Cli, ready: Connection) -> None:
    slow("rotate")
    with terminal("work", lines=20) as shown:
        shown.read(until=lambda screen: "rotation 1 re-encrypting" in screen)
        shown.interrupt()
        assert shown.code() == 0
        assert shown.lines[-1].endswith(": what is under way `pg-rekey work` goes on with")
    with terminal("work", lines=20) as shown:
        shown.read(until=lambda screen: "rotation 1 re-encrypting" in screen)
        assert '{"at"' not in shown.screen
        go(ready)
        assert shown.code() == 0
        assert re.search(r"rotation 1 completed\s+stopped after \d+ batches$", shown.screen)


def test_work_in_json_on_a_terminal(slow: Cli, ready: Connection) -> None:
    screen = see("work", "--log", "json", columns=200)
    assert [json.loads(line)["event"] for line in screen] == ["connected", "stopped"]


def test_work_says_that_all_is_paused(slow: Cli, ready: Connection) -> None:
    slow("rotate")
    slow("rotations", "pause", 1)
    screen = see("work")
    assert "rotation 1 is paused: `pg-rekey rotations resume 1` goes on" in screen
    lines = [json.loads(line) for line in slow("work").splitlines()]
    assert [line["rotations"] for line in lines if line["event"] == "paused"] == [[1]]


def test_work_tells_of_a_table_that_holds_up(slow: Cli, ready: Connection) -> None:
    go(ready)
    ready.execute("update rekey.secrets set ciphertext = set_byte(ciphertext, 40, 0) where name = 's1'")
    ready.execute("update rekey.secrets set ciphertext = set_byte(ciphertext, 41, 0) where name = 's1'")
    slow("rotate")
    screen = " ".join(see("work", code=UNFINISHED))
    assert "rotation 1 of keyring default left 1 row of rekey.secrets" in screen


def test_work_goes_on_after_its_connection_was_lost(slow: Cli, ready: Connection) -> None:
    kill = (
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = current_database() and application_name = 'pg-rekey'"
    )
    with terminal("work", "--forever", command=HURRIED) as shown:
        shown.read(until=lambda screen: "connected to database" in screen)
        eventually(lambda: value(ready, "select last_tick_at is not null from rekey.worker_status"))
        ready.execute(kill)
        shown.read(until=lambda screen: screen.count("connected to database") == 2)
        shown.interrupt()
        assert shown.code() == 0
        assert "terminating connection" in shown.screen
