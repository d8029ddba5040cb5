"""What all commands share: the root group, output as tables or JSON, and the connection."""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, cast
from uuid import UUID

import click
import psycopg
from rich.console import Console
from rich.table import Table

from pg_rekey import db
from pg_rekey.errors import INTERRUPTED, Problem, from_database
from pg_rekey.hints import ACTIONS

P = ParamSpec("P")
Row = Mapping[str, Any]
NIL = UUID(int=0)


class Root(click.Group):
    """The root group: the one place where errors become messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a person sees neither a traceback nor what a secret could hide in."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _pointed_to_keyring(error) from None
        except psycopg.Error as error:
            raise from_database(error) from None
        except (KeyboardInterrupt, click.Abort):
            raise Problem("interrupted", None, INTERRUPTED) from None
        except UnicodeError:
            raise Problem("this is not UTF-8 text") from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Problem(": ".join(str(part) for part in (error.filename, error.strerror) if part)) from None


def _pointed_to_keyring(error: click.UsageError) -> click.UsageError:
    """Return the error, with how a keyring is named where a command was given one as an argument."""
    given = re.fullmatch(r"Got unexpected extra argument \((.*)\)", error.message)
    if given and error.ctx and any("--keyring" in one.opts for one in error.ctx.command.params):
        return click.UsageError(f"{error.message}. A keyring is named by --keyring {given[1]}.", error.ctx)
    return error


class Output:
    """Prints what a command found: for a person, or as one JSON document."""

    def __init__(self, as_json: bool) -> None:
        self.json = as_json
        self._console = Console(markup=False, highlight=False, emoji=False)
        if not self._console.is_terminal:
            self._console.width = 10_000

    def table(self, rows: Iterable[Row], columns: Sequence[str] = (), empty: str = "none") -> None:
        """Print rows, for a person only the columns named."""
        rows = list(rows)
        if self.json:
            self.document(rows)
        elif not rows:
            self.say(empty)
        else:
            columns = columns or list(rows[0])
            table = Table(box=None, pad_edge=False, header_style="bold")
            for column in columns:
                number = all(isinstance(row[column], int | float | None) for row in rows)
                table.add_column(
                    column.replace("_", " "), justify="right" if number else "left", overflow="fold"
                )
            for row in rows:
                table.add_row(*(cell(row[column]) for column in columns))
            self._console.print(table)

    def record(self, row: Row) -> None:
        """Print one row, a line for each column that has a value."""
        if self.json:
            self.document(row)
            return
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, value in row.items():
            if value is not None:
                table.add_row(name.replace("_", " "), cell(value))
        self._console.print(table)

    def done(self, message: str, **data: Any) -> None:
        """Say what was done; as JSON, the data."""
        if self.json:
            self.document(data)
        else:
            self.say(message)

    def say(self, message: str = "", style: str | None = None) -> None:
        """Print a line for a person; JSON readers do not see it."""
        if not self.json:
            self._console.print(message, style=style)

    def document(self, data: Any) -> None:
        """Print one JSON document."""
        click.echo(to_json(data))


def to_json(data: Any) -> str:
    """Return data as a JSON document."""
    return json.dumps(data, default=_plain, indent=2, ensure_ascii=False)


def cell(value: Any) -> str:
    """Return a value as a table shows it, with nothing in it that a terminal would obey."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case datetime():
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
        case bytes():
            return value.hex()
        case dict() | list():
            value = json.dumps(value, default=_plain, ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def _plain(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return value.hex()
    return str(value)


def output(function: Callable[Concatenate[Output, P], None]) -> Callable[P, None]:
    """Give a command the option --json, and its Output as first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
    @functools.wraps(function)
    def command(*args: P.args, **options: P.kwargs) -> None:
        function(Output(bool(options.pop("as_json"))), *args, **options)

    return cast(Callable[P, None], command)


def database(
    *, unlocked: bool = False
) -> Callable[[Callable[Concatenate[db.Connection, Output, P], None]], Callable[P, None]]:
    """Give a command its connection and its Output: one transaction, committed unless the command fails.

    Unlocked: with the KEK of the environment; where there is none, the one that the server itself can read.
    """

    def decorate(function: Callable[Concatenate[db.Connection, Output, P], None]) -> Callable[P, None]:
        @functools.wraps(function)
        def command(out: Output, /, *args: P.args, **options: P.kwargs) -> None:
            with db.connect() as connection:
                if unlocked and db.in_environment():
                    db.unlock(connection)
                function(connection, out, *args, **options)

        return output(command)

    return decorate


def confirm(connection: db.Connection, question: str, yes: bool) -> None:
    """Say which database this is, and ask before something that cannot be taken back."""
    click.echo(db.where(connection), err=True)
    if yes:
        return
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort as error:
        if not isinstance(error.__context__, EOFError):
            raise
        raise Problem("nobody answers: nothing was changed", "Say --yes.") from None
    if not agreed:
        raise Problem("nothing was changed")


def fetch(connection: db.Connection, statement: str, *parameters: Any) -> list[Row]:
    """Return all rows of a statement."""
    return list(connection.execute(statement, parameters or None).fetchall())


def fetch_one(connection: db.Connection, statement: str, *parameters: Any) -> Row:
    """Return the first row of a statement that always has one."""
    [row] = fetch(connection, statement, *parameters)
    return row


def fetch_of(connection: db.Connection, keyring: str | None, statement: str, *parameters: Any) -> list[Row]:
    """Return all rows of a statement on one keyring or on all, or say that there is no such keyring."""
    rows = fetch(connection, statement, keyring, keyring, *parameters)
    known = "select exists (select from rekey.keyrings where name = %s)"
    if keyring is not None and not rows and not scalar(connection, known, keyring):
        raise Problem(f"no such keyring: {keyring!r} [RK007]", ACTIONS["create_keyring"].command)
    return rows


def scalar(connection: db.Connection, statement: str, *parameters: Any) -> Any:
    """Return the only value of a statement."""
    [value] = fetch_one(connection, statement, *parameters).values()
    return value


def write_new(path: Path, text: str | Iterable[str], mode: int = 0o600) -> None:
    """Write a file that must not exist yet, private from its first byte, and wait until it is on disk."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise Problem(f"{path} exists already", "It is not overwritten: give another name.") from None
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            os.fchmod(descriptor, mode)
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(descriptor)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        path.unlink()
        raise


yes_option = click.option("--yes", is_flag=True, help="Do not ask.")
reason_option = click.option("--reason", help="Why, for the audit log.")
keyring_option = click.option("--keyring", metavar="NAME", help="Only this keyring.")
tenant_option = click.option(
    "--tenant", type=click.UUID, default=NIL, metavar="UUID", help="Tenant; the nil UUID by default."
)
FilePath = click.Path(dir_okay=False, path_type=Path)
InputPath = click.Path(exists=True, dir_okay=False, path_type=Path)
