"""`pg-rekey secrets`, and .env files in and out."""

import ast
import contextlib
import getpass
import io
import stat
import sys
from pathlib import Path
from uuid import UUID

import pytest
from dotenv import dotenv_values
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo

from cli_fixtures import Cli, process
from helpers import Connection, value
from pg_rekey import db, envfile
from pg_rekey.cli import follow, secrets
from pg_rekey.errors import LOCKED, USAGE, Problem
from terminal import terminal

pytest_plugins = ["cli_fixtures"]

ENV = """\
# a comment
export PLAIN=value
SINGLE='it''s # not a comment'
DOUBLE="tab\\tquote\\" ${NOT_REPLACED}"

SPACED = a b c   # a comment
EMPTY=
BARE
MULTI="-----BEGIN-----
line two
-----END-----"
TWICE=first
TWICE=second
"""
TENANT = UUID(int=7)

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


def test_parse() -> None:
    assert envfile.parse(ENV.replace("it''s", "its")) == {
        "PLAIN": "value",
        "SINGLE": "its # not a comment",
        "DOUBLE": 'tab\tquote" ${NOT_REPLACED}',
        "SPACED": "a b c",
        "EMPTY": "",
        "MULTI": "-----BEGIN-----\nline two\n-----END-----",
        "TWICE": "second",
    }


@given(st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,9}", fullmatch=True), texts, max_size=4))
def test_what_is_written_is_read_back(values: dict[str, str]) -> None:
    file = io.StringIO(envfile.write(values), newline=None)
    assert dotenv_values(stream=file, interpolate=False) == values


@pytest.mark.parametrize("name", ["it's", "", " ", "a\nb", "export x"])
def test_names_that_a_file_cannot_hold_are_named(name: str) -> None:
    with contextlib.suppress(Problem):
        assert envfile.parse(envfile.write({"good": "x", name: "value"})) == {"good": "x", name: "value"}
        return
    with pytest.raises(Problem, match="cannot hold "):
        envfile.write({"good": "x", name: "value"})


def test_set_and_get(cli_ready: Cli, tmp_path: Path) -> None:
    cli_ready("secrets", "set", "a", stdin="from a pipe\n")
    assert cli_ready("secrets", "get", "a") == "from a pipe"
    path = tmp_path / "value"
    path.write_bytes(b"two\nlines\n")
    identity = cli_ready.json("secrets", "set", "a", "--file", path, "--description", "why")["id"]
    assert cli_ready.json("secrets", "get", "a") == {"name": "a", "value": "two\nlines\n"}
    assert cli_ready.json("secrets", "set", "a", stdin="again")["id"] == identity
    [row] = cli_ready.json("secrets", "list")
    assert (row["name"], row["description"], row["keyring"]) == ("a", "why", "default")
    assert "again" not in cli_ready("secrets", "list")


def test_value_typed_at_a_terminal(cli_ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(getpass, "getpass", lambda _: "typed")
    monkeypatch.setattr(secrets, "sys", type("Fake", (), {"stdin": Terminal(), "stdout": sys.stdout}))
    cli_ready("secrets", "set", "a")
    monkeypatch.undo()
    assert "typed" not in cli_ready.out + cli_ready.err


def test_values_that_cannot_be(cli_ready: Cli) -> None:
    cli_ready("secrets", "set", "a", stdin="nul\0byte", code=USAGE)
    assert "NUL" in cli_ready.err
    cli_ready("secrets", "set", "", stdin="value", code=1)
    assert "22023" in cli_ready.err
    cli_ready("secrets", "set", "a", "--keyring", "none", stdin="value", code=6)
    assert "RK007" in cli_ready.err
    cli_ready("secrets", "set", "a", "value", stdin="", code=USAGE)
    cli_ready("secrets", "set", "a", "--tenant", "nobody", stdin="value", code=USAGE)
    assert cli_ready("secrets", "list") == "no secrets\n"


def test_not_utf8(cli_ready: Cli, tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"canary\xff")
    cli_ready("secrets", "set", "a", "--file", path, code=1)
    assert "UTF-8" in cli_ready.err
    assert "canary" not in cli_ready.err


def test_delete(cli_ready: Cli) -> None:
    cli_ready("secrets", "set", "a", stdin="value")
    cli_ready("secrets", "rm", "a", code=1, stdin="n\n")
    assert "Delete secret a? [y/N]" in cli_ready.err
    assert cli_ready("secrets", "rm", "a", stdin="y\n") == "secret a deleted\n"
    cli_ready("secrets", "rm", "a", "--yes", code=6)
    cli_ready("secrets", "get", "a", code=6)
    assert "RK007" in cli_ready.err


def test_without_the_kek(cli_ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_REKEY_KEK")
    cli_ready("secrets", "set", "a", stdin="value", code=LOCKED)
    assert "PG_REKEY_KEK" in cli_ready.err


def test_tenants_do_not_mix(cli_ready: Cli) -> None:
    cli_ready("keyrings", "create", "seven", "--tenant", str(TENANT))
    cli_ready("secrets", "set", "a", "--tenant", str(TENANT), "--keyring", "seven", stdin="theirs")
    cli_ready("secrets", "set", "a", stdin="ours")
    assert cli_ready("secrets", "get", "a") == "ours"
    assert cli_ready("secrets", "get", "a", "--tenant", str(TENANT)) == "theirs"
    assert cli_ready.json("secrets", "export", "--tenant", str(TENANT)) == {"a": "theirs"}


def test_import_and_export(cli_ready: Cli, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(ENV.replace("it''s", "its"))
    assert cli_ready("secrets", "import", path) == "7 created, 0 updated, 0 unchanged\n"
    path.write_text(path.read_text().replace("second", "third"))
    report = cli_ready.json("secrets", "import", path)
    assert (report["created"], report["updated"], len(report["unchanged"])) == ([], ["TWICE"], 6)

    out = tmp_path / "out.env"
    assert cli_ready("secrets", "export", "--out", out) == f"7 secrets written to {out}\n"
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert dotenv_values(out, interpolate=False) == envfile.read(path)
    assert cli_ready("secrets", "export") == out.read_text()
    cli_ready("secrets", "export", "--out", out, code=1)


def test_export_to_a_terminal_asks(cli_ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli_ready("secrets", "set", "a", stdin="value")
    terminal = type("Terminal", (), {"isatty": lambda _: True})()
    monkeypatch.setattr(secrets, "sys", type("Fake", (), {"stdout": terminal}))
    cli_ready("secrets", "export", stdin="n\n", code=1)
    assert "value" not in cli_ready.out
    assert cli_ready("secrets", "export", "--yes") == "a='value'\n"


def test_import_is_one_transaction(cli_ready: Cli, ready: Connection, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(f"GOOD=1\n'{'x' * 300}'=2\n")
    cli_ready("secrets", "import", path, code=1)
    assert value(ready, "select count(*) from rekey.secrets") == 0


def test_import_of_what_is_no_env_file(cli_ready: Cli, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("GOOD=1\nBAD='canary\n")
    cli_ready("secrets", "import", path, code=1)
    assert f"line 2 of {path}" in cli_ready.err
    assert "canary" not in cli_ready.err
    cli_ready("secrets", "import", tmp_path / "none", code=USAGE)


def test_list_by_pattern_and_limit(cli_ready: Cli) -> None:
    for name in ("STRIPE_KEY", "STRIPE_TEST", "STRIPExKEY", "100%", "OTHER"):
        cli_ready("secrets", "set", name, stdin="x")

    def listed(*arguments: str) -> list[str]:
        return [row["name"] for row in cli_ready.json("secrets", "list", *arguments)]

    assert listed("STRIPE_*") == ["STRIPE_KEY", "STRIPE_TEST"]
    assert listed("STRIPE?KEY") == ["STRIPE_KEY", "STRIPExKEY"]
    assert listed("100%") == ["100%"]
    assert listed("*%") == ["100%"]
    assert listed("--limit", "2") == ["100%", "OTHER"]
    assert listed("nothing*") == []
    assert cli_ready("secrets", "list", "nothing*") == "no secret is like nothing*\n"


def test_a_long_list_comes_as_it_is_read(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One heading, one document, whatever the number of batches."""
    monkeypatch.setattr(secrets, "BATCH", 7)
    ready.execute("select count(rekey.set_secret('s' || n, 'value')) from generate_series(1, 100) n")
    lines = cli_ready("secrets", "list").splitlines()
    assert len(lines) == 101
    assert lines[0].split()[:2] == ["name", "keyring"]
    assert len({line.split()[0] for line in lines[1:]}) == 100
    assert len(cli_ready.json("secrets", "list")) == 100


def test_a_long_list_at_80_columns(cli_ready: Cli, ready: Connection) -> None:
    """The same whether each row is a line or not; no line is wider than the terminal."""
    ready.execute("select rekey.set_secret('s' || n, 'value') from generate_series(1, 3) n")
    with terminal("secrets", "list") as short:
        assert short.code() == 0
        assert [line.split()[:3] for line in short.lines] == [
            ["name", "keyring", "version"],
            *(["s" + number, "default", "1"] for number in "123"),
        ]
    ready.execute("select rekey.set_secret('\u4e2d', 'v', description => repeat('some words ', 12))")
    with terminal("secrets", "list") as long:
        assert long.code() == 0
        assert all(len(line) <= 80 for line in long.lines)
        assert "some words some words" in long.screen


def test_run_with_secrets_in_the_environment(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRIPE_KEY", "another")
    monkeypatch.setenv("KEPT", "kept")
    cli_ready("secrets", "set", "STRIPE_KEY", stdin="sk_live 'quoted'\nand more")
    shown = "import os; print(sorted((k, v) for k, v in os.environ.items() if k[0] in 'SKP'))"
    with process("secrets", "run", "--", sys.executable, "-c", shown) as running:
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    found = dict(ast.literal_eval(out))
    assert found["STRIPE_KEY"] == "sk_live 'quoted'\nand more"
    assert found["KEPT"] == "kept"
    assert not [name for name in found if name.startswith("PG_REKEY_")]
    with process("secrets", "run", "sh", "-c", "exit 42", "--json") as running:
        running.communicate(timeout=60)
    assert running.returncode == 42
    with process("secrets", "run", "no-such-program") as running:
        assert running.communicate(timeout=60)[1] == (
            "Error: no-such-program cannot be run: No such file or directory\n"
        )
    assert running.returncode == 127
    cli_ready("secrets", "set", "not a name", stdin="x")
    cli_ready("secrets", "run", "env", code=USAGE)
    assert "secret 'not a name' cannot be a variable of the environment" in cli_ready.err


def test_reading_where_nothing_may_be_written(
    cli_ready: Cli, ready: Connection, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a standby: there are no temporary tables."""
    cli_ready("secrets", "set", "a", stdin="value")
    options = "-c default_transaction_read_only=on"
    read_only = make_conninfo(db, options=options)
    monkeypatch.setenv("PG_REKEY_DSN", read_only)
    assert cli_ready("secrets", "get", "a") == "value"
    cli_ready("verify")
    cli_ready("secrets", "set", "a", stdin="other", code=1)
    assert "use the primary" in cli_ready.err
    monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(read_only, options=f"{options} -c log_statement=all"))
    cli_ready("secrets", "get", "a", code=LOCKED)
    assert "would log the KEK: log_statement is all" in cli_ready.err


def test_an_import_says_how_far_it_is(
    cli_ready: Cli, ready: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "LIFE_SIGN", 0)
    path = tmp_path / "many.env"
    values = {f"NAME_{number:04}": f"value {number}" for number in range(2 * db.BATCH + 1)}
    path.write_text(envfile.write(values))
    assert cli_ready("secrets", "import", path) == "2001 created, 0 updated, 0 unchanged\n"
    assert cli_ready.err.splitlines() == [
        f"importing, {done:,} of 2,001 secrets" for done in (1000, 2000, 2001)
    ]
    assert "importing" not in cli_ready.out
    path.write_text(envfile.write(values | {"NAME_0001": "new", "OTHER": "more"}))
    assert cli_ready("secrets", "import", path) == "1 created, 1 updated, 2000 unchanged\n"
    stored = ready.execute("select name, value from rekey.read_secrets()").fetchall()
    assert dict(stored) == values | {"NAME_0001": "new", "OTHER": "more"}
    # In one transaction: the batch that is refused takes those before it along.
    path.write_text(envfile.write({"FIRST": "x"} | values | {"Z" * 256: "too long"}))
    cli_ready("secrets", "import", path, code=1)
    assert "FIRST" not in cli_ready("secrets", "list")
