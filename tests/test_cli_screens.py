"""What a person sees at 80 columns: tables without broken words, in words and with separators."""

import datetime as dt
import itertools
import re
from uuid import UUID

import pytest

from cli_fixtures import Cli
from helpers import Connection
from pg_rekey.cli.words import blockers, interval, interval_of, shown, time
from terminal import see, terminal

pytest_plugins = ["cli_fixtures"]

TENANT = "11111111-2222-3333-4444-555555555555"
UNITS = re.compile(
    r"[0-9a-f-]{36}|\d{4}-\d\d-\d\d|\d\d:\d\d:\d\dZ|completed_with_failures|rotation\.row_failed"
)
NOON = dt.datetime(2026, 11, 29, 12, tzinfo=dt.UTC)


@pytest.fixture
def used(cli_ready: Cli, ready: Connection) -> Cli:
    """A database in which something has happened: two keyrings, a tenant, a rotation with failures."""
    cli_ready("keyrings", "create", "tenant-a", "--tenant", TENANT, "--rotate-every", "12 hours")
    cli_ready("schedule", "set", "default", "90 days")
    cli_ready("kek", "list")
    ready.execute(
        "select count(rekey.set_secret('secret number ' || n, 'value', description => 'for the thing that"
        " does this or that')) from generate_series(1, 1200) n"
    )
    ready.execute(
        "update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)"
        " where name = 'secret number 7'"
    )
    cli_ready("rotate", "--keyring", "default", "--wait", code=4)
    cli_ready("rotate", "--keyring", "tenant-a")
    return cli_ready


TABLES = {
    "status": 0,
    "keyrings list": 0,
    "keys list": 0,
    "keys usage": 0,
    "rotations list": 0,
    "rotations show 1": 0,
    "rotations failures": 0,
    "schedule show": 0,
    "settings show": 0,
    "secrets list": 0,
    "kek list": 0,
    "audit list": 0,
    "verify": 5,
    "doctor": 5,
}


def test_no_table_breaks_a_word(used: Cli) -> None:
    """Every word at 80 columns is one of those at 250 columns, and what is named there is here."""
    for command, code in TABLES.items():
        narrow = see(*command.split(), code=code, lines=2000)
        wide = see(*command.split(), code=code, columns=250, lines=2000)
        used(*command.split(), code=code)
        words = {word for line in wide for word in line.split()}
        times = re.compile(r"in|\d+|(day|hour|minute|second)s?|\d\d:\d\d:\d\dZ|\d{4}-\d\d-\d\d")
        broken = {
            word
            for line in narrow
            for word in line.split()
            if word not in words and not word.endswith(":") and not times.fullmatch(word)
        }
        assert broken == set(), command
        # A tenant or an empty column may be left out at 80 columns, nothing else.
        found = {whole for line in narrow for whole in UNITS.findall(line)}
        for whole in {whole for line in wide for whole in UNITS.findall(line)} - found:
            assert re.fullmatch(r"[0-]{36}|\d{4}-\d\d-\d\d|\d\d:\d\d:\d\dZ", whole), (command, whole)


def test_keyrings_without_tenants(cli_ready: Cli) -> None:
    cli_ready("schedule", "set", "default", "90 days")
    heading, row = see("keyrings", "list")
    assert heading.split() == ["name", "version", "rotate", "every", "next", "rotation", "created"]
    assert "90 days" in row
    assert re.search("in (89|90) days", row)
    wide = see("keyrings", "list", columns=200)[1]
    assert str(UUID(int=0)) in wide
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ", wide)


def test_a_rotation_at_80_columns(used: Cli) -> None:
    heading, *rows = see("rotations", "list")
    assert heading.split() == ["id", "keyring", "state", "trigger", "to", "rows", "done", "failed"]
    assert re.search(r"completed_with_failures +manual +2 +1,200 +1,199 +1$", rows[1])


def test_states_have_their_colour_and_their_word(used: Cli) -> None:
    with terminal("rotations", "list", columns=120) as shown_in_colour:
        shown_in_colour.code()
    assert b"\x1b[33mcompleted_with_failures" in shown_in_colour.raw
    assert b"\x1b[36mqueued" in shown_in_colour.raw
    with terminal("rotations", "list", columns=120, NO_COLOR="1") as plain:
        plain.code()
    assert b"\x1b[33m" not in plain.raw
    assert b"completed_with_failures" in plain.raw


def test_a_finding_stands_beside_its_severity(used: Cli) -> None:
    heading, *rows = see("doctor", code=5)
    assert heading.split() == ["severity", "finding"]
    assert any(row.startswith("warning   there has never been a tick") for row in rows)


def test_a_notice_breaks_no_word(used: Cli, ready: Connection) -> None:
    rows = see("rotate", "--all", code=4)
    assert rows[0] == "WARNING: no new version, as a rotation is under way: 'tenant-a' (rotation 2)"
    assert all(row.startswith("  ") for row in rows[1:3])
    assert "rows along: --supersede." in rows[2]


def test_without_a_terminal(used: Cli) -> None:
    """Everything in one line, and no blanks at the ends of lines."""
    lines = used("audit", "list").splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert all(re.match(r" *\d+  \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ  ", line) for line in lines[1:])
    assert "\x1b" not in used.out
    assert used("keys", "usage").splitlines()[1].endswith("rekey.secrets")


def test_status_says_what_holds_a_rotation_up(used: Cli, ready: Connection) -> None:
    ready.execute(
        "update rekey.rotations set blocked_by = %s where state = 'queued'",
        ['[{"prepared": "pay", "age_seconds": 9}]'],
    )
    lines = see("status")
    assert any("blocked by: the prepared transaction 'pay', open for 9 seconds" in line for line in lines)
    assert any("nobody works on it now: `pg-rekey work` does" in line for line in lines)
    assert used.json("status")["rotations"][-1]["blocked_by"] == [{"prepared": "pay", "age_seconds": 9}]
    keyring = next(row for row in used.json("status")["keyrings"] if row["keyring"] == "default")
    assert (keyring["rows"], keyring["rotate_every"]) == (1200, 90 * 86400)
    assert keyring["took"] > 0


def test_status_that_is_watched(used: Cli, ready: Connection) -> None:
    with terminal("status", "--watch") as watched:
        watched.read(until=lambda screen: "tenant-a  queued" in screen)
        ready.execute("select rekey.pause_rotation(2)")
        watched.read(until=lambda screen: "tenant-a  paused" in screen)
        watched.interrupt()
        assert watched.code() == 130
    used("status", "--watch", code=2)
    assert "--watch is for a terminal" in used.err


def test_a_terminal_that_cannot_show_a_value(cli_ready: Cli) -> None:
    cli_ready("secrets", "set", "word", stdin="日本")
    screen = " ".join(see("secrets", "get", "word", code=1, PYTHONUTF8="0", PYTHONIOENCODING="latin-1"))
    assert "the encoding of this terminal is latin-1" in screen
    assert "not UTF-8" not in screen


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (90 * 86400, "90 days"),
        (86400 + 7200 + 5, "1 day 2 hours"),
        (45, "45 seconds"),
        (0.2, "200 ms"),
        (0, "0 seconds"),
        (-3600, "-1 hour"),
        (1000 * 86400, "1,000 days"),
    ],
)
def test_intervals(seconds: float, words: str) -> None:
    assert interval(dt.timedelta(seconds=seconds)) == words


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("00:00:00.2", "200 ms"),
        ("00:20:00", "20 minutes"),
        ("12:00:00", "12 hours"),
        ("1 day 02:03:04", "1 day 2 hours 3 minutes 4 seconds"),
        ("3 years", "3 years"),
        ("45 days", "45 days"),
        ("8", "8"),
    ],
)
def test_intervals_as_postgresql_writes_them(written: str, words: str) -> None:
    assert interval_of(written) == words


def test_settings_in_words(cli_ready: Cli) -> None:
    screen = "\n".join(see("settings", "show", lines=200))
    assert re.search(r"batch_target +200 ms +", screen)
    assert not re.search(r"NULL|rekey\.\w+\(", screen)
    assert cli_ready.json("settings", "show")[2]["value"] == "00:00:00.2"
    assert cli_ready("settings", "set", "step_limit", "20 min") == "step_limit is 20 minutes\n"
    cli_ready("settings", "set", "step_limit", "", code=2)
    assert "--default takes a setting back to its default" in cli_ready.err
    assert "NULL" not in cli_ready.err


def test_details_in_words() -> None:
    details = {
        "destroy_after": (NOON + dt.timedelta(days=45)).isoformat(),
        "rotate_every": "12:00:00",
        "name": "batch_target",
        "to": "00:00:01",
        "reason": "12:00:00",
    }
    said = "rotate_every 12 hours, name batch_target, to 1 second, reason 12:00:00"
    assert shown("details", details) == f"destroy_after 2027-01-13 12:00:00Z, {said}"
    assert shown("details", details, now=NOON) == f"destroy_after in 45 days, {said}"


def test_the_audit_log_has_no_raw_times(used: Cli) -> None:
    screen = " ".join(see("audit", "list", lines=200))
    assert "rotate_every 12 hours" in " ".join(screen.split())
    assert re.search(r"next_rotation_at\s+in\s+\d+\s+(days|hours)", screen)
    assert not re.search(r"\dT\d|\d:\d\d\.\d", used("audit", "list"))


def test_columns_without_anything_in_them(cli_ready: Cli) -> None:
    """They are left out at 80 columns, also where there is room; what is of no tenant does not say so."""
    heading, _ = see("keyrings", "list")
    assert heading.split() == ["name", "version", "created"]
    assert "00000000" in see("keyrings", "list", columns=200)[1]
    assert see("secrets", "list") == ["no secrets"]
    cli_ready("secrets", "set", "a", stdin="x")
    assert "description" not in see("secrets", "list")[0]
    assert "description" in see("secrets", "list", columns=200)[0]
    assert see("secrets", "list", "b*") == ["no secret is like b*"]
    cli_ready("keyrings", "create", "tenant-a", "--tenant", TENANT)
    screen = "\n".join(see("keyrings", "list"))
    assert TENANT in screen
    assert "00000000" not in screen
    cli_ready("rotate", "--keyring", "default", "--wait")
    assert not any("tenant" in line for line in see("rotations", "show", "1"))


def test_a_column_that_appears_in_a_later_batch(cli_ready: Cli, ready: Connection) -> None:
    ready.execute(
        "select count(rekey.set_secret('s' || lpad(n::text, 4, '0'), 'v')) from generate_series(1, 1000) n"
    )
    cli_ready("secrets", "set", "t", "--description", "last", stdin="x")
    lines = see("secrets", "list", lines=1100)
    assert [line.split() for line in lines if line.startswith("name")] == [
        ["name", "keyring", "version", "created", "updated"],
        ["name", "keyring", "version", "description", "created", "updated"],
    ]
    assert "last" in lines[-1]


def test_status_says_when_rows_were_counted(cli_ready: Cli) -> None:
    cli_ready("secrets", "set", "a", stdin="x")
    lines = see("status")
    assert not any("last rotation" in line for line in lines)
    assert "last tick at  never" in lines
    cli_ready("rotate", "--wait")
    lines = see("status")
    place = next(number for number, line in enumerate(lines) if "last rotation" in line)
    assert lines[place].split() == ["keyring", "last", "rotation", "rows", "took", "counted"]
    assert re.fullmatch(
        r"default +1 +1  \d+ (ms|seconds?)  \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ", lines[place + 1]
    )
    [keyring] = cli_ready.json("status")["keyrings"]
    assert (keyring["last_rotation"], keyring["rows"]) == (1, 1)
    assert keyring["counted_at"]


def test_times() -> None:
    moments = [dt.timedelta(days=89, hours=5), -dt.timedelta(hours=3), -dt.timedelta(days=3)]
    assert [time(NOON + one, NOON) for one in moments] == ["in 89 days", "09:00:00Z", "2026-11-26"]
    assert time(NOON) == "2026-11-29 12:00:00Z"
    assert [time(NOON + one, NOON, whole=True) for one in moments[:2]] == [
        "in 89 days",
        "2026-11-29 09:00:00Z",
    ]


def test_values_obey_nobody() -> None:
    assert shown("a", "\x1b[31mred\n") == "\\x1b[31mred\\n"
    details = {"rows": 1234, "key_id": 1234, "rotate_every": None, "tenant_id": str(UUID(int=0))}
    given = [None, True, False, b"\x01", 1234567, ["a", "b"], details]
    assert [shown("a", one) for one in given] == [
        "",
        "yes",
        "no",
        "01",
        "1,234,567",
        "a, b",
        "rows 1,234, key_id 1234",
    ]
    names = itertools.product(("id", "to_version", "rotation_id", "kek"), [1234])
    assert [shown(name, value) for name, value in names] == ["1234"] * 4


def test_what_a_rotation_waits_for() -> None:
    assert blockers(None) == ""
    assert blockers([{"pid": 7, "role": "app", "age_seconds": 3}, {"rows": 2, "why": "locked or moved"}]) == (
        "the transaction of pid 7, app, open for 3 seconds; 2 rows that are locked or moved"
    )
    assert blockers([{"rows": 1, "why": "locked"}]) == "1 row that is locked"
    assert blockers([{"rows": 1234, "why": "locked"}]) == "1,234 rows that are locked"
    assert blockers([{"pid": 7, "role": "app"}]) == (
        "the transaction of pid 7, app, open, this role may not see since when"
    )
    assert blockers([{"target": "a.b.c", "why": "x"}]) == "the column a.b.c, which is blocked: x"
    assert (
        blockers([{"prepared": "x", "age_seconds": 9}]) == "the prepared transaction 'x', open for 9 seconds"
    )
