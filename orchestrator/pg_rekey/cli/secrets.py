"""`pg-rekey secrets`: values in, values out, never through an argument."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import astuple
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from uuid import UUID

import click
import psycopg

from pg_rekey import archive, db, envfile
from pg_rekey.archive import Archive, Secret
from pg_rekey.cli.base import (
    FilePath,
    InputPath,
    Output,
    confirm,
    database,
    fetch,
    private_text,
    scalar,
    tenant_option,
    write_new,
    yes_option,
)
from pg_rekey.cli.commands import Group
from pg_rekey.cli.follow import Count
from pg_rekey.cli.parameters import KEYRING, SECRET
from pg_rekey.cli.words import count
from pg_rekey.errors import FINDINGS, USAGE, Problem, missing

# Rows that a list takes from the server at a time.
BATCH = 1000
# The exit code of shells where there is no such command.
NOT_RUN = 127
READ = "select name, value from rekey.read_secrets(%s::text[], %s)"
keyring_option = click.option(
    "--keyring", type=KEYRING, metavar="NAME", default="default", help="Keyring to encrypt with."
)


@click.group(cls=Group)
def secrets() -> None:
    """Secrets: set, get, list, run a command with them, and whole .env files."""


@secrets.command("set", example="pg-rekey secrets set STRIPE_KEY --file stripe-key")
@click.argument("name", type=SECRET)
@click.option("--file", "path", type=InputPath, help="Take the value from this file.")
@tenant_option
@keyring_option
@click.option("--description", help="What it is for; not encrypted.")
@database(unlocked=True)
def set_(
    connection: db.Connection,
    out: Output,
    name: str,
    path: Path | None,
    tenant: UUID,
    keyring: str,
    description: str | None,
) -> None:
    """Store a secret. The value comes from a file, or standard input without its last line break."""
    [identity] = _store(connection, tenant, keyring, [(name, private_text(path), description)])
    out.done(f"secret {name} stored", name=name, id=identity)


@secrets.command(example="pg-rekey secrets get STRIPE_KEY")
@click.argument("name", type=SECRET)
@tenant_option
@database(unlocked=True)
def get(connection: db.Connection, out: Output, name: str, tenant: UUID) -> None:
    """Print the value of a secret."""
    value = scalar(connection, "select rekey.get_secret(%s, %s)", name, tenant)
    if out.json:
        out.document({"name": name, "value": value})
    else:
        click.echo(value, nl=sys.stdout.isatty())


@secrets.command("list", example="pg-rekey secrets list 'STRIPE_*' --limit 20")
@click.argument("pattern", required=False)
@click.option("--limit", type=click.IntRange(1), help="How many at most.")
@tenant_option
@database()
def list_(
    connection: db.Connection, out: Output, pattern: str | None, limit: int | None, tenant: UUID
) -> None:
    """List the names of secrets, without their values: all, or those like PATTERN, with * and ?."""
    like = pattern and re.sub(r"([%_\\])", r"\\\1", pattern).translate({ord("*"): "%", ord("?"): "_"})
    # By a cursor of the server: there may be any number.
    with connection.cursor("secrets") as cursor:
        cursor.execute(db.query("secrets"), [tenant, like, like, limit])
        out.stream(
            iter(lambda: cursor.fetchmany(BATCH), []),
            empty=f"no secret is like {pattern}" if pattern else "no secrets",
        )


@secrets.command(
    context_settings={"allow_interspersed_args": False}, example="pg-rekey secrets run -- npm start"
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@tenant_option
def run(command: tuple[str, ...], tenant: UUID) -> None:
    """Run a command with all secrets of a tenant in its environment, and nowhere else.

    They go before variables of the same name. Variables of pg-rekey, such as the KEK, do not get there. The
    exit code is that of the command, or 127 where it cannot be run.
    """
    with db.connect() as connection:
        if db.in_environment():
            db.unlock(connection)
        rows = fetch(connection, READ, None, tenant)
    values = {row["name"]: row["value"] for row in rows}
    for name in values:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise Problem(
                f"secret {name!r} cannot be a variable of the environment",
                "Names have letters, digits and underscores there. `pg-rekey secrets get` reads it.",
                USAGE,
            )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG_REKEY_")}
    try:
        os.execvpe(command[0], command, environment | values)
    except OSError as error:
        raise Problem(f"{command[0]} cannot be run: {error.strerror}", None, NOT_RUN) from None


@secrets.command(example="pg-rekey secrets rm STRIPE_KEY")
@click.argument("name", type=SECRET)
@tenant_option
@yes_option
@database()
def rm(connection: db.Connection, out: Output, name: str, tenant: UUID, yes: bool) -> None:
    """Delete a secret, for good: it asks."""
    confirm(connection, f"Delete secret {name}?", yes)
    if not scalar(connection, "select rekey.delete_secret(%s, %s)", name, tenant):
        raise missing("secrets", f"no such secret: {name!r}")
    out.done(f"secret {name} deleted", name=name)


@secrets.command("import", example="pg-rekey secrets import .env")
@click.argument("path", type=InputPath, required=False)
@click.option("--vault", is_flag=True, help="In place of a file: the secrets of the Supabase Vault.")
@tenant_option
@keyring_option
@database(unlocked=True)
def import_(
    connection: db.Connection, out: Output, path: Path | None, vault: bool, tenant: UUID, keyring: str
) -> None:
    """Store all values of a .env file, in one transaction. ${...} is stored as it stands.

    The file may also be one that `pg-rekey uninstall --export` wrote: each of its secrets goes to its own
    tenant and keyring, and keyrings that are missing are made. With --vault, every secret of the Supabase
    Vault whose name is not taken; the Vault keeps its own. Exit code 5 if one of them does not open.
    """
    if vault == (path is not None):
        raise click.UsageError("a file, or --vault")
    if path is None:
        _adopt_vault(connection, out, tenant, keyring)
        return
    found = archive.read(path)
    if found is None:
        values = envfile.read(path)
        found = Archive([], [Secret(tenant, keyring, name, value) for name, value in values.items()])
    elif _given("tenant") or _given("keyring"):
        raise click.UsageError(f"{path} names the tenant and the keyring of each secret itself")
    for one in found.keyrings:
        connection.execute(db.query("import keyring"), astuple(one))
    with Count("importing", len(found.secrets), "secrets") as progress:
        names = _import(connection, found.secrets, progress)
    said = ", ".join(f"{len(of_kind)} {kind}" for kind, of_kind in names.items())
    out.done(said, **names)


def _import(connection: db.Connection, wanted: Sequence[Secret], progress: Count) -> dict[str, list[str]]:
    """Store what is new or another value, and return the names of these and of the others, sorted."""
    names: dict[str, list[str]] = {"created": [], "updated": [], "unchanged": []}

    # By name, as everybody else does: so no two of them meet in a deadlock.
    in_order = sorted(wanted, key=attrgetter("tenant_id", "keyring", "name"))
    for (tenant, keyring), group in groupby(in_order, key=attrgetter("tenant_id", "keyring")):
        for batch in db.batches((one.name, one.value, one.description) for one in group):
            rows = fetch(connection, READ, [name for name, _, _ in batch], tenant)
            known = {row["name"]: row["value"] for row in rows}
            changed = [row for row in batch if known.get(row[0]) != row[1]]
            names["created"] += [name for name, _, _ in changed if name not in known]
            names["updated"] += [name for name, _, _ in changed if name in known]
            names["unchanged"] += [name for name, value, _ in batch if known.get(name) == value]
            _store(connection, tenant, keyring, changed)
            progress.advance(len(batch))
    return {kind: sorted(of_kind) for kind, of_kind in names.items()}


def _adopt_vault(connection: db.Connection, out: Output, tenant: UUID, keyring: str) -> None:
    closed: list[psycopg.errors.Diagnostic] = []
    connection.add_notice_handler(
        lambda notice: closed.append(notice) if notice.sqlstate == "RK003" else None
    )
    copied = scalar(connection, db.query("adopt vault"), keyring, tenant)
    connection.commit()
    left = f", {len(closed):,} {'does' if len(closed) == 1 else 'do'} not open" if closed else ""
    out.done(f"{count(copied, 'secret')} copied from the Vault{left}", copied=copied, closed=len(closed))
    if closed:
        raise click.exceptions.Exit(FINDINGS)


def _given(parameter: str) -> bool:
    source = click.get_current_context().get_parameter_source(parameter)
    return source is not click.core.ParameterSource.DEFAULT


@secrets.command(example="pg-rekey secrets export --out secrets.env")
@click.option("--out", "path", type=FilePath, help="A new file, readable by its owner only.")
@tenant_option
@yes_option
@database(unlocked=True)
def export(connection: db.Connection, out: Output, path: Path | None, tenant: UUID, yes: bool) -> None:
    """Print all secrets of a tenant as a .env file that python-dotenv reads back to the same values."""
    if path is None and sys.stdout.isatty():
        confirm(connection, "Show every secret on this terminal?", yes)
    rows = fetch(connection, READ, None, tenant)
    values = {row["name"]: row["value"] for row in rows}
    if path is not None:
        write_new(path, envfile.write(values))
        out.done(f"{count(len(values), 'secret')} written to {path}", path=str(path), secrets=len(values))
    elif out.json:
        out.document(values)
    else:
        click.echo(envfile.write(values), nl=False)


def _store(
    connection: db.Connection, tenant: UUID, keyring: str, stored: Sequence[tuple[str, str, str | None]]
) -> list[UUID]:
    """Store secrets: name, value, description. They go by binary COPY, which no log shows: one may show
    parameters."""
    if not stored:
        return []
    db.copy_rows(connection, db.SECRETS, stored)
    ids: list[UUID] = scalar(connection, db.query("set copied secrets"), tenant, keyring)
    connection.execute(db.SECRETS.drop)
    return ids
