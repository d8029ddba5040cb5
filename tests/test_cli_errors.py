"""Errors of the command line: what was meant, which role is missing, exit codes, JSON, other versions."""

import json
from collections.abc import Callable, Iterator

import psycopg
import pytest

from cli_fixtures import Cli
from helpers import Connection, connect
from pg_rekey.cli import main
from pg_rekey.cli.roles import NEEDS
from terminal import see, terminal
from test_cli_help import ALL

pytest_plugins = ["cli_fixtures"]

LOGIN = "rekey_test_asker"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("rotate --keyring defualt", "Did you mean 'default'? `pg-rekey keyrings list`"),
        ("keys list --keyring Default2", "Did you mean 'default'?"),
        ("schedule clear deafult", "Did you mean 'default'?"),
        ("keyrings retire defaul --yes", "Did you mean 'default'?"),
        ("columns protect public.acounts api_key", "Did you mean 'public.accounts'?"),
        ("columns protect public.accounts apikey", "Did you mean 'api_key'?"),
        ("settings set max_row_per_second 5", "Did you mean 'max_rows_per_second'?"),
        ("secrets get STRIPE_KYE", "Did you mean 'STRIPE_KEY'? `pg-rekey secrets list`"),
        ("secrets rm stripe_key --yes", "Did you mean 'STRIPE_KEY'?"),
    ],
)
def test_what_was_meant(arguments: str, meant: str, cli_ready: Cli, ready: Connection) -> None:
    ready.execute("create table public.accounts (id int primary key, api_key text)")
    cli_ready("secrets", "set", "STRIPE_KEY", stdin="x")
    with pytest.raises(AssertionError):
        cli_ready(*arguments.split())
    assert meant in cli_ready.err


def test_nothing_is_meant_where_nothing_is_alike(cli_ready: Cli) -> None:
    cli_ready("rotate", "--keyring", "warehouse", code=6)
    assert "Did you mean" not in cli_ready.err


def test_exit_codes_tell_what_is_wrong(cli_ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli_ready("rotations", "show", 99, code=6)
    cli_ready("rotate")
    cli_ready("rotate", code=7)
    cli_ready("secrets", "set", "a", stdin="x")
    cli_ready("rotate", "--supersede", "--wait")
    cli_ready("keys", "disable", "default", "2")
    cli_ready("keys", "enable", "default", "2")
    monkeypatch.setenv("PG_REKEY_DSN", "postgresql://127.0.0.1:1/none")
    cli_ready("status", code=9)
    assert "The connection is that of PG_REKEY_DSN." in cli_ready.err
    for name in ("PG_REKEY_DSN", "PGHOST", "PGHOSTADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PGPORT", "1")
    cli_ready("status", code=9)
    assert "Set PG_REKEY_DSN to postgresql://" in cli_ready.err
    assert ". Is the server running" in cli_ready.err


def test_what_is_in_use(cli_ready: Cli, ready: Connection) -> None:
    cli_ready("secrets", "set", "a", stdin="x")
    cli_ready("keyrings", "retire", "default", "--yes", code=8)
    assert "[RK005]" in cli_ready.err


@pytest.mark.parametrize("arguments", ["rotate --keyring nope", "rotations show 99"])
def test_errors_in_json(arguments: str, cli_ready: Cli) -> None:
    cli_ready(*arguments.split(), "--json", code=6)
    error = json.loads(cli_ready.err)
    assert cli_ready.out == ""
    assert (error["code"], error["exit_code"]) == ("RK007", 6)
    assert error["message"].startswith("no such ")
    assert "pg-rekey" in error["hint"]


def test_wrong_usage_in_json(cli_ready: Cli) -> None:
    cli_ready("rotate", "--json", "--all", "--keyring", "default", code=2)
    error = json.loads(cli_ready.err)
    assert (error["code"], error["exit_code"]) == (None, 2)
    assert error["message"] == "--keyring and --all exclude each other"
    cli_ready("rotate", "--jsno", code=2)
    assert cli_ready.err.startswith("Usage: ")


def test_an_error_is_not_broken_within_a_word(cli_ready: Cli) -> None:
    lines = see("rotate", "--keyring", "nope", code=6)
    assert max(map(len, lines)) <= 80
    lines_of_usage = see("init", "--provider", "foo", code=2)
    assert lines_of_usage[-1].split()[0] == "'file'."
    said = " ".join(" ".join(lines).split())
    assert "shows those that there are; `pg-rekey keyrings create NAME` makes one." in said


def test_an_error_does_not_stand_beside_a_question(cli_ready: Cli) -> None:
    with terminal("keys", "compromise", "default", "1") as shown:
        shown.read(until=lambda screen: "[y/N]" in screen)
        shown.interrupt()
        assert shown.code() == 130
        assert shown.lines[-1] == "Error: interrupted"
    cli_ready("keys", "compromise", "default", "1", code=1, stdin="")
    assert "\nError: nobody answers" in cli_ready.err


@pytest.fixture
def login(db: str, ready: Connection, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that gives roles to the login that the command line is."""
    ready.execute(f"create role {LOGIN} login")
    monkeypatch.setenv("PG_REKEY_DSN", psycopg.conninfo.make_conninfo(db, user=LOGIN))

    def grant(*roles: str) -> None:
        for role in roles:
            ready.execute(f"grant {role} to {LOGIN}")

    yield grant
    ready.execute(f"drop role {LOGIN}")


@pytest.mark.parametrize(
    ("arguments", "role"),
    [
        ("rotate", "rekey_admin"),
        ("status", "rekey_operator"),
        ("keys disable default 1", "rekey_admin"),
        ("keys list", "rekey_operator"),
        ("audit list", "rekey_auditor"),
        ("secrets get a", "rekey_app"),
        ("settings set max_attempts 5", "rekey_admin"),
        ("verify", "rekey_operator"),
        ("work", "rekey_operator"),
        ("metrics", "rekey_operator"),
        ("rotations pause 1", "rekey_admin"),
    ],
)
def test_which_role_is_missing(arguments: str, role: str, cli_ready: Cli, login: Callable[..., None]) -> None:
    cli_ready(*arguments.split(), code=1)
    assert f"takes the role {role}, and {LOGIN} is no member of it." in cli_ready.err
    assert f"GRANT {role} TO {LOGIN};" in cli_ready.err
    login(role)
    expected = {"secrets get a": 6, "rotations pause 1": 6, "keys disable default 1": 1}
    cli_ready(*arguments.split(), code=expected.get(arguments, 0))
    assert "42501" not in cli_ready.err


def test_a_member_of_another_role(cli_ready: Cli, login: Callable[..., None]) -> None:
    login("rekey_auditor")
    cli_ready("rotate", code=1)
    assert f"GRANT rekey_admin TO {LOGIN};" in cli_ready.err


def test_roles_are_those_of_commands() -> None:
    paths = {" ".join(path) for path in ALL} | set(main.commands)
    assert set(NEEDS) <= paths


@pytest.mark.parametrize("version", ["0.0.9", "9.9.9"])
def test_every_command_notices_another_version(
    version: str, cli_ready: Cli, ready: Connection, db: str
) -> None:
    ready.execute(
        "create or replace function rekey.version() returns text language sql immutable parallel safe"
        f" set search_path = pg_catalog, pg_temp return '{version}'"
    )
    for command in ("status", "rotate", "work", "secrets list", "keys list"):
        cli_ready(*command.split())
        assert f"Warning: pg_rekey in this database is {version}, this is " in cli_ready.err
        hint = f"Hint: Use pg-rekey {version}; where that is the older one, run `pg-rekey upgrade`."
        assert hint in cli_ready.err
    assert cli_ready.json("status")["rotations"] == []
    cli_ready("doctor", code=5)
    with connect(db) as connection:
        connection.execute(
            "create or replace function rekey.version() returns text language sql as $$select '0.0.8'$$"
        )
    cli_ready("status")
    assert "is 0.0.8, this is" in cli_ready.err
