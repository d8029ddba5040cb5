"""Help pages and completion: whole, grouped, with examples that are right, as wide as the terminal."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cli_fixtures import COMMAND, Cli
from helpers import Connection
from pg_rekey.cli import main
from pg_rekey.cli.commands import Command, Group
from terminal import see

pytest_plugins = ["cli_fixtures"]

OPERATIONS = Path(__file__).parents[1] / "docs" / "operations.md"


def commands(group: click.Group = main, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


ALL = dict(commands())


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_the_example_is_one_of_this_command(path: tuple[str, ...], cli: Cli) -> None:
    """It parses: its options and arguments are those of the command."""
    command = ALL[path]
    assert isinstance(command, Command)
    page = cli(*path, "--help")
    for line in command.example.splitlines():
        assert f"  {line}\n" in page
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        words = words[: words.index(">>")] if ">>" in words else words
        assert words[: len(path) + 1] == ["pg-rekey", *path]
        given = [word for word in words[len(path) + 1 :] if word not in (".env", "kek-of-2025")]
        try:
            command.make_context(path[-1], list(given), resilient_parsing=True)
        except click.UsageError as error:
            pytest.fail(f"{line}: {error.message}")
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in given if re.match(r"--\w", word)} <= known


def test_the_five_to_begin_with_come_first() -> None:
    screen = "\n".join(see("--help", lines=200))
    first = screen[screen.index("To begin with:") : screen.index("What is encrypted:")]
    assert re.findall(r"(?m)^  (\w+)  ", first) == ["init", "rotate", "status", "work", "doctor"]


def test_no_description_is_cut() -> None:
    for group in (main, *(one for one in main.commands.values() if isinstance(one, Group))):
        page = group.get_help(click.Context(group, info_name="pg-rekey"))
        assert "..." not in page.partition("\n")[2]
    listed = {name for names in type(main).sections.values() for name in names}
    assert listed == set(main.commands)


def test_a_page_is_as_wide_as_the_terminal() -> None:
    narrow, wide = (see("rotate", "--help", columns=columns) for columns in (80, 200))
    assert max(map(len, narrow)) <= 80
    assert 110 < max(map(len, wide)) <= 200


def test_help_names_exit_codes_environment_and_docs(cli: Cli) -> None:
    """Those of the table in docs/operations.md."""
    page = " ".join(cli("--help").split())
    table = OPERATIONS.read_text().partition("| exit code of pg-rekey | meaning |")[2].partition("\n\n")[0]
    documented = re.findall(r"(?m)^\| (\d+) \|", table)
    assert documented == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "127", "130"]
    for code in documented:
        assert re.search(rf"[ ,]{code} [a-zA-Z]", page[page.index("Exit codes:") :]), code
    for name in ("PG_REKEY_DSN", "DATABASE_URL", "PG_REKEY_KEK_FILE", "NO_COLOR", "docs/operations.md"):
        assert name in page


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, cli: Cli) -> None:
    assert "_PG_REKEY_COMPLETE" in cli("completion", shell)
    cli("completion", "tcsh", code=2)


def test_fish_takes_a_comma_for_no_end(cli: Cli) -> None:
    """What it is given is a type, a comma, a name with its description: click's own splits at each."""
    assert [line.strip() for line in cli("completion", "fish").splitlines() if "split" in line] == [
        'set -l metadata (string split --max 1 "," $completion);'
    ]


def test_no_description_is_cut_in_a_shell(cli: Cli) -> None:
    environment = {"_PG_REKEY_COMPLETE": "fish_complete", "COMP_WORDS": "pg-rekey keys c", "COMP_CWORD": "c"}
    done = subprocess.run([COMMAND], env=os.environ | environment, capture_output=True, text=True, check=True)
    [cancel, compromise] = done.stdout.splitlines()
    assert cancel == "plain,cancel-destruction\tCancel a destruction that has not happened yet."
    assert compromise.endswith(": at once it encrypts nothing any more, and its rows are re-encrypted.")


def complete(line: str) -> list[str]:
    """Return what bash is offered for a line."""
    words = line.split(" ")
    environment = {
        "_PG_REKEY_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run([COMMAND], env=os.environ | environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [offered.partition(",")[2] for offered in done.stdout.splitlines() if offered]


def test_names_are_completed(cli_ready: Cli, ready: Connection) -> None:
    tenant = "11111111-2222-3333-4444-555555555555"
    cli_ready("keyrings", "create", "default-2")
    cli_ready("secrets", "set", "STRIPE_KEY", stdin="x")
    cli_ready("secrets", "set", "OTHER", "--tenant", tenant, stdin="x")
    cli_ready("rotate", "--keyring", "default", "--wait")
    ready.execute(
        "insert into rekey.rotation_failures (keyring_id, target, relation, row_key, version, reason)"
        " select id, 'rekey.secrets', 'rekey.secrets', '1', 1, 'x' from rekey.keyrings where name = 'default'"
    )
    ready.execute('create table public."Accounts" (id int primary key, api_key text, size int)')
    assert complete("pg-rekey ro") == ["rotate", "rotations"]
    assert complete("pg-rekey rotate --keyring d") == ["default", "default-2"]
    assert complete("pg-rekey keyrings retire default-") == ["default-2"]
    assert complete("pg-rekey rotations show ") == ["1"]
    assert complete("pg-rekey rotations resolve ") == ["1"]
    assert complete("pg-rekey keys disable default ") == ["2", "1"]
    assert complete("pg-rekey keys compromise default 1") == ["1"]
    assert complete("pg-rekey keys enable default-2 ") == ["1"]
    assert complete("pg-rekey settings set max_") == ["max_attempts", "max_rows_per_second"]
    assert complete("pg-rekey secrets get ") == ["STRIPE_KEY"]
    assert complete(f"pg-rekey secrets get --tenant {tenant} ") == ["OTHER"]
    assert complete("pg-rekey columns protect ") == ['public."Accounts"']
    assert complete('pg-rekey columns protect public.\\"Accounts\\" a') == ["api_key"]


def test_completion_without_a_database(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_DSN", "postgresql://127.0.0.1:1/none")
    assert complete("pg-rekey rotate --keyring d") == []
