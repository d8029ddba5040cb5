"""What all commands share: the root group, output as tables or JSON, and the connection."""

import functools
import getpass
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, cast

import click
from rich.console import Console, RenderableType
from rich.text import Text

from pg_rekey import db
from pg_rekey.cli import parameters, tables
from pg_rekey.cli.tables import NIL, UNLIMITED, Row
from pg_rekey.errors import USAGE, Problem, missing

P = ParamSpec("P")


class Output:
    """Prints what a command found: for a person, or as one JSON document."""

    def __init__(self, as_json: bool) -> None:
        self.json = as_json
        self._console = Console(markup=False, highlight=False, emoji=False)
        if not self._console.is_terminal:
            self._console.width = UNLIMITED

    def table(self, rows: Iterable[Row], columns: Sequence[str] = (), empty: str = "none") -> None:
        """Print rows, for a person only the columns named."""
        rows = list(rows)
        if self.json:
            self.document(rows)
        else:
            self.show(*self.fit(rows, columns, empty))

    def stream(self, batches: Iterable[Sequence[Row]], empty: str = "none") -> None:
        """Print rows as they come, in batches of any number; as JSON, one document with a line for each."""
        count, columns = 0, None
        for batch in batches:
            if self.json:
                click.echo((",\n" if count else "[\n") + ",\n".join(map(_LINE.encode, batch)), nl=False)
            else:
                before, width = columns, self._console.width
                columns = tables.telling(batch, list(batch[0]), width)
                lines = tables.lines(batch, columns, width, header=columns != before)
                if lines is None:
                    self.show(*tables.fitted(batch, columns, width, header=columns != before))
                else:
                    click.echo("\n".join(lines))
            count += len(batch)
        if self.json:
            click.echo("\n]" if count else "[]")
        elif not count:
            self.say(empty)

    def fit(
        self, rows: Sequence[Row], columns: Sequence[str] = (), empty: str = "none"
    ) -> list[RenderableType]:
        """Return what makes a table as wide as the terminal."""
        if not rows:
            return [Text(empty)]
        return list(tables.fitted(rows, columns or list(rows[0]), self._console.width))

    def record(self, row: Row) -> None:
        """Print one row, a line for each column that has a value."""
        if self.json:
            self.document(row)
        else:
            self.show(self.listed(row))

    def listed(self, row: Row) -> RenderableType:
        """Return what shows one row, a line for each column."""
        return tables.record(row, self._console.width)

    def done(self, message: str, **data: Any) -> None:
        """Say what was done; as JSON, the data."""
        if self.json:
            self.document(data)
        else:
            self.say(message)

    def say(self, message: str = "", style: str | None = None) -> None:
        """Print a line for a person; JSON readers do not see it."""
        if not self.json:
            self.show(Text(message, style or ""))

    def document(self, data: Any) -> None:
        """Print one JSON document."""
        click.echo(to_json(data))

    def show(self, *parts: RenderableType) -> None:
        """Print for a person, without the blanks that tables fill their lines with."""
        with self._console.capture() as capture:
            for part in parts:
                self._console.print(part)
        for line in capture.get().splitlines():
            click.echo(line.rstrip(), color=self._console.is_terminal)


def to_json(data: Any) -> str:
    """Return data as a JSON document."""
    return json.dumps(data, default=_plain, indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return value.hex()
    return str(value)


# (Without indentation, which Python's encoder takes ten times as long for.)
_LINE = json.JSONEncoder(default=_plain, ensure_ascii=False)


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
        click.echo(err=True)
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
        raise missing("create_keyring", f"no such keyring: {keyring!r}")
    return rows


def scalar(connection: db.Connection, statement: str, *parameters: Any) -> Any:
    """Return the only value of a statement."""
    [value] = fetch_one(connection, statement, *parameters).values()
    return value


def private_text(path: Path | None, what: str = "Value") -> str:
    """Return what is in a file, is typed unseen, or comes by standard input without its last line break."""
    if path is not None:
        value = path.read_bytes().decode()
    elif sys.stdin.isatty():
        value = getpass.getpass(f"{what} (not shown): ")
    else:
        value = sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    if "\0" in value:
        raise Problem("text in PostgreSQL cannot hold a NUL byte", "Store it as base64.", USAGE)
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
keyring_option = click.option("--keyring", type=parameters.KEYRING, metavar="NAME", help="Only this keyring.")
tenant_option = click.option(
    "--tenant", type=click.UUID, default=NIL, metavar="UUID", help="Tenant; the nil UUID by default."
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=1,
    metavar="N",
    help="Share the work among N connections.",
)
fast_option = click.option(
    "--fast", is_flag=True, help="Give way to nobody but to who waits for locks: see the setting min_pace."
)
FilePath = click.Path(dir_okay=False, path_type=Path)
InputPath = click.Path(exists=True, dir_okay=False, path_type=Path)
