"""`pg-rekey columns`: the user's own tables."""

import time
from collections.abc import Iterator

import click
import psycopg

from pg_rekey import adoption, db, doctor, worker
from pg_rekey.adoption import ATTEMPTS, PASSING, SHOWN_KEYS
from pg_rekey.cli import words
from pg_rekey.cli.base import Output, confirm, database, fetch, output, reason_option, scalar, yes_option
from pg_rekey.cli.commands import Group
from pg_rekey.cli.follow import follow
from pg_rekey.cli.parameters import COLUMN, KEYRING, TABLE
from pg_rekey.cli.rotate import work
from pg_rekey.cli.rotations import COLUMNS
from pg_rekey.errors import FINDINGS, UNFINISHED, Problem
from pg_rekey.formats import FORMATS, Keys
from pg_rekey.formats.wrappers import WRAPPERS
from pg_rekey.hints import Road

WITH_KEYS = "The same command goes on with it: no other worker has the keys."
SHOWN = (
    "label",
    "relation",
    "column_name",
    "keyring",
    "context_columns",
    "encrypt_on_write",
    "fire_triggers",
    "search_path",
    "problem",
)


@click.group(cls=Group)
def columns() -> None:
    """Columns of your own tables: protect, adopt what is there, find what was forgotten."""


@columns.command("list", example="pg-rekey columns list")
@database()
def list_(connection: db.Connection, out: Output) -> None:
    """List the protected columns, what blocks them, and what their rotations break or set off."""
    rows = doctor.columns(connection, Road.COMMAND)
    out.table(rows, SHOWN, empty="no column is protected")
    for row in rows:
        for finding in row["findings"]:
            out.say(f"{row['label']}: {finding}")


@columns.command(example="pg-rekey columns protect public.accounts api_key --encrypt-on-write")
@click.argument("table", type=TABLE)
@click.argument("column", type=COLUMN)
@click.option("--keyring", type=KEYRING, default="default", show_default=True, metavar="NAME")
@click.option("--context", metavar="A,B", help="What tells rows apart; the primary key by default.")
@click.option("--encrypt-on-write", is_flag=True, help="A trigger encrypts what is written.")
@click.option("--no-fire-triggers", is_flag=True, help="Rotations do not fire its triggers and rules.")
@click.option("--search-path", metavar="A,B", help="With which they run; the path of this login by default.")
@database(unlocked=True)
def protect(
    connection: db.Connection,
    out: Output,
    table: str,
    column: str,
    keyring: str,
    context: str | None,
    encrypt_on_write: bool,
    no_fire_triggers: bool,
    search_path: str | None,
) -> None:
    """Put a bytea or text column under rotation; no value changes yet. What envelopes break: warnings."""
    names = [name.strip() for name in context.split(",")] if context is not None else None
    table = db.named(connection, table)
    options = (encrypt_on_write, not no_fire_triggers, search_path)
    label = scalar(connection, db.query("protect column"), table, column, keyring, names, *options)
    out.done(
        f"{label} is protected; `pg-rekey columns adopt` encrypts what is there", label=label, keyring=keyring
    )


@columns.command(example="pg-rekey columns adopt public.accounts api_key --from plaintext")
@click.argument("table", type=TABLE)
@click.argument("column", type=COLUMN)
@click.option(
    "--from",
    "formats",
    type=click.Choice(FORMATS),
    metavar="FORMAT",
    multiple=True,
    required=True,
    help=f"As what values may be taken, once for each: {', '.join(FORMATS)}.",
)
@click.option("--dry-run", is_flag=True, help="Open every value, change nothing, count them by format.")
@click.option(
    "--unwrap", type=click.Choice(list(WRAPPERS)), help="Opened values are texts in this, take it off."
)
@click.option(
    "--values-are-tokens", is_flag=True, help="With plaintext: what looks random is tokens or keys."
)
@click.option("--force", is_flag=True, help="With plaintext: also what looks encrypted in another format.")
@reason_option
@output
def adopt(
    out: Output,
    table: str,
    column: str,
    formats: tuple[str, ...],
    dry_run: bool,
    unwrap: str | None,
    values_are_tokens: bool,
    force: bool,
    reason: str | None,
) -> None:
    """Encrypt what stands in a protected column and is no envelope yet: online, in batches.

    The keys come from PG_REKEY_FROM_<FORMAT>, also as _FILE or _COMMAND, one key a line. Repeated after an
    interruption, it goes on where it stopped. A value that does not open is left as it is, and named:
    exit code 4. A column that is to be taken for plaintext and looks encrypted is refused: exit code 5.
    """
    formats = tuple(dict.fromkeys(formats))
    keys = Keys.from_environment(formats, unwrap, force)
    with worker.connect() as connection:
        table = db.named(connection, table)
        if dry_run:
            _dry_run(connection, out, table, column, formats, values_are_tokens, keys)
            return
        number = adoption.begin(connection, table, column, formats, keys, reason, values_are_tokens)
        advance = adoption.advance(connection, number, keys)
        resume = WITH_KEYS if set(formats) - {"plaintext"} else None
        rotations = follow(connection, [number], lambda: next(advance, None), resume)
        out.table(rotations, COLUMNS)
    if any(row["state"] != "completed" for row in rotations):
        raise click.exceptions.Exit(UNFINISHED)


def _dry_run(
    connection: db.Connection,
    out: Output,
    table: str,
    column: str,
    formats: tuple[str, ...],
    values_are_tokens: bool,
    keys: Keys,
) -> None:
    begun = time.monotonic()
    doubt = None if keys.force else adoption.doubt(connection, table, column, formats, values_are_tokens)
    found = adoption.preview(connection, table, column, formats, keys)
    rows = [
        {
            "format": name,
            "rows": one.rows,
            "would_open": one.opens,
            "would_not": one.rows - one.opens,
            "keys": one.closed,
            "doubt": doubt if name == "plaintext" else None,
        }
        for name, one in sorted(found.items())
    ]
    closed = sum(one.rows - one.opens for one in found.values())
    if out.json:
        out.document(rows)
    else:
        out.table(rows, ("format", "rows", "would_open", "would_not"), empty="every value is an envelope")
        for name, one in sorted(found.items()):
            if one.closed:
                more = ", ..." if one.rows - one.opens > SHOWN_KEYS else ""
                out.say(f"{name} would not open: {', '.join(one.closed)}{more}")
        if doubt:
            out.say(f"{table}.{column} {doubt}")
        out.say(f"looked at in {time.monotonic() - begun:.1f} s; nothing was changed")
    if closed or doubt:
        raise click.exceptions.Exit(FINDINGS)


@columns.command(example="pg-rekey columns search public.users email --normalization lower --unique")
@click.argument("table", type=TABLE)
@click.argument("column", type=COLUMN)
@click.option(
    "--index-column", metavar="NAME", help="Column of type bytea beside it; COLUMN_bidx by default."
)
@click.option(
    "--normalization",
    type=click.Choice(("exact", "lower", "trim_lower", "digits")),
    help="What is taken for equal; exact by default.",
)
@click.option("--unique", is_flag=True, help="No two rows may have equal values.")
@output
def search(
    out: Output, table: str, column: str, index_column: str | None, normalization: str | None, unique: bool
) -> None:
    """Make a protected column searchable by equality: fill a blind index beside it, and index that.

    Both online, in batches. Repeated, it fills it anew: after an update of the collation or of Unicode.
    """
    with worker.connect() as connection:
        table = db.named(connection, table)
        with worker.transaction(connection):
            statement = scalar(
                connection, db.query("make searchable"), table, column, index_column, normalization
            )
        numbers = [row["id"] for row in fetch(connection, db.query("filling"), table, column)]
        steps = worker.Steps(connection)
        rotations = follow(connection, numbers, lambda: work(steps))
        indexes = fetch(connection, db.query("search indexes"), table, column)
        if not any(row["valid"] and row["unique"] >= unique for row in indexes):
            _index(connection, table, column, statement, unique)
        out.table(rotations, COLUMNS)
    if any(row["state"] != "completed" for row in rotations):
        raise click.exceptions.Exit(UNFINISHED)


def _index(connection: db.Connection, table: str, column: str, statement: str, unique: bool) -> None:
    """Index a blind index without locking out who writes; leave none behind that is not valid."""
    if unique:
        statement = statement.replace("create index", "create unique index", 1)
    try:
        connection.execute(statement.encode())
    except psycopg.errors.FeatureNotSupported as error:
        raise Problem(
            f"{table} is partitioned: its index is not made concurrently",
            f"Run: {statement.replace(' concurrently', '')}",
        ) from error
    except psycopg.errors.UniqueViolation as error:
        for row in fetch(connection, db.query("search indexes"), table, column):
            if not row["valid"]:
                connection.execute(f"drop index concurrently {row['name']}".encode())
        raise Problem(
            f"two rows of {table}.{column} have equal values", "Change one of them, and repeat this."
        ) from error


@columns.command(example="pg-rekey columns unprotect public.accounts api_key --decrypt")
@click.argument("table", type=TABLE)
@click.argument("column", type=COLUMN)
@click.option("--decrypt", is_flag=True, help="Decrypt what is encrypted, in batches.")
@yes_option
@output
def unprotect(out: Output, table: str, column: str, decrypt: bool, yes: bool) -> None:
    """Take a column out of rotation. It is refused while rows are encrypted, unless --decrypt.

    A table that was dropped is named as `pg-rekey columns list` shows it.
    """
    with worker.connect() as connection:
        if decrypt:
            confirm(connection, f"Write the plain values of {table}.{column} back?", yes)
        for row in fetch(connection, db.query("dropped column"), table, column):
            connection.execute("select rekey.unprotect_column(%s)", [row["label"]])
            out.done(f"{row['label']} is forgotten", table=table, column=column)
            return
        total = 0
        table = db.named(connection, table)
        for count in release(connection, table, column, decrypt):
            total += count
            click.echo(f"{words.count(total, 'row')} decrypted", err=True)
    out.done(f"{table}.{column} is not protected any more", table=table, column=column)


def release(connection: db.Connection, table: str, column: str, decrypt: bool) -> Iterator[int]:
    """Decrypt a protected column in batches, each a transaction, and let go of it; yield their rows."""
    attempts = 0
    while True:
        try:
            with worker.transaction(connection):
                # A queued lock would stop those who write.
                connection.execute("set local lock_timeout = '5 s'")
                count = int(scalar(connection, db.query("unprotect column"), table, column, decrypt))
        except psycopg.Error as error:
            attempts += 1
            # RK005: the last rows were locked by others.
            if not decrypt or error.sqlstate not in (*PASSING, "RK005") or attempts >= ATTEMPTS:
                raise
            time.sleep(min(2**attempts / 10, 5))
            continue
        attempts = 0
        if not count:
            return
        yield count


@columns.command(example="pg-rekey columns rebind public.accounts api_key")
@click.argument("table", type=TABLE)
@click.argument("column", type=COLUMN)
@click.option("--label", metavar="LABEL", help="Which protected column, where the names do not tell.")
@yes_option
@database(unlocked=True)
def rebind(
    connection: db.Connection, out: Output, table: str, column: str, label: str | None, yes: bool
) -> None:
    """Go on after a table was rebuilt under its name, lost a partition, or was emptied.

    Binds a protected column to the table that has its values now, after every one of them was opened. Named
    as it is registered, it stays: that confirms what blocks it. Example: pg-rekey columns rebind
    public.accounts api_key
    """
    confirm(connection, f"Bind the protected column to {table}.{column}?", yes)
    table = db.named(connection, table)
    name = scalar(connection, db.query("rebind column"), table, column, label)
    out.done(f"{name} is bound to {table}.{column}", label=name, table=table, column=column)


@columns.command(example="pg-rekey columns view public.accounts")
@click.argument("table", type=TABLE)
@database()
def view(connection: db.Connection, out: Output, table: str) -> None:
    """Make the view TABLE_decrypted, which shows the rows opened, under the rights of whoever reads it."""
    table = db.named(connection, table)
    name = scalar(connection, "select rekey.create_decrypted_view(%s::regclass)", table)
    out.done(f"view {name} made; grant SELECT on it to its readers", view=name)


@columns.command(example="pg-rekey columns find")
@database()
def find(connection: db.Connection, out: Output) -> None:
    """Find columns that were forgotten, by counting; no value is shown. Exit code 5 if there are any.

    Those that hold envelopes without protection, or what another tool encrypted, and those whose name, or a
    key of whose JSON, sounds like a secret. What cannot be read is named.
    """
    rows = doctor.unprotected(connection, Road.COMMAND)
    shown = ("relation", "column_name", "finding", "rows", "advice")
    unread = [row["name"] for row in fetch(connection, db.query("never searched"))]
    out.table(rows, shown, empty="nothing was found in what was read" if unread else "nothing was forgotten")
    if unread:
        click.echo(f"never read: {', '.join(unread)}", err=True)
    if rows:
        raise click.exceptions.Exit(FINDINGS)
