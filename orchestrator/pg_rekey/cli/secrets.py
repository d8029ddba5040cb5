"""`pg-rekey secrets`: values in, values out, never through an argument."""

import getpass
import sys
from collections.abc import Sequence
from dataclasses import astuple
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
    Row,
    confirm,
    database,
    fetch,
    scalar,
    tenant_option,
    write_new,
    yes_option,
)
from pg_rekey.errors import FAILED, FINDINGS, USAGE, Problem

keyring_option = click.option("--keyring", metavar="NAME", default="default", help="Keyring to encrypt with.")


@click.group()
def secrets() -> None:
    """Secrets: set, get, list, and whole .env files."""


@secrets.command("set")
@click.argument("name")
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
    [row] = _store(connection, [Secret(tenant, keyring, name, _value(path), description)])
    out.done(f"secret {name} stored", name=name, id=row["id"])


@secrets.command()
@click.argument("name")
@tenant_option
@database(unlocked=True)
def get(connection: db.Connection, out: Output, name: str, tenant: UUID) -> None:
    """Print the value of a secret."""
    value = scalar(connection, "select rekey.get_secret(%s, %s)", name, tenant)
    if out.json:
        out.document({"name": name, "value": value})
    else:
        click.echo(value, nl=sys.stdout.isatty())


@secrets.command("list")
@tenant_option
@database()
def list_(connection: db.Connection, out: Output, tenant: UUID) -> None:
    """List the names of secrets, without their values."""
    out.table(fetch(connection, db.query("secrets"), tenant), empty="no secrets")


@secrets.command()
@click.argument("name")
@tenant_option
@database()
def rm(connection: db.Connection, out: Output, name: str, tenant: UUID) -> None:
    """Delete a secret."""
    if not scalar(connection, "select rekey.delete_secret(%s, %s)", name, tenant):
        raise Problem(f"no such secret: {name}", "`pg-rekey secrets list` shows them.", FAILED)
    out.done(f"secret {name} deleted", name=name)


@secrets.command("import")
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
    known = _known(connection, found.secrets)
    changed = {one for one in found.secrets if known.get((one.tenant_id, one.name)) != one.value}
    _store(connection, list(changed))
    created = sorted(one.name for one in changed if (one.tenant_id, one.name) not in known)
    updated = sorted(one.name for one in changed if (one.tenant_id, one.name) in known)
    unchanged = sorted(one.name for one in found.secrets if one not in changed)
    out.done(
        f"{len(created)} created, {len(updated)} updated, {len(unchanged)} unchanged",
        created=created,
        updated=updated,
        unchanged=unchanged,
    )


def _adopt_vault(connection: db.Connection, out: Output, tenant: UUID, keyring: str) -> None:
    closed: list[psycopg.errors.Diagnostic] = []
    connection.add_notice_handler(
        lambda notice: closed.append(notice) if notice.sqlstate == "RK003" else None
    )
    count = scalar(connection, db.query("adopt vault"), keyring, tenant)
    connection.commit()
    left = f", {len(closed)} do not open" if closed else ""
    out.done(f"{count} secrets copied from the Vault{left}", copied=count, closed=len(closed))
    if closed:
        raise click.exceptions.Exit(FINDINGS)


def _given(parameter: str) -> bool:
    source = click.get_current_context().get_parameter_source(parameter)
    return source is not click.core.ParameterSource.DEFAULT


def _known(connection: db.Connection, wanted: Sequence[Secret]) -> dict[tuple[UUID, str], str]:
    """Return the values that are stored under these names now."""
    names: dict[UUID, list[str]] = {}
    for one in wanted:
        names.setdefault(one.tenant_id, []).append(one.name)
    statement = "select name, value from rekey.read_secrets(%s, %s)"
    return {
        (tenant, row["name"]): row["value"]
        for tenant, of_tenant in names.items()
        for row in fetch(connection, statement, of_tenant, tenant)
    }


@secrets.command()
@click.option("--out", "path", type=FilePath, help="A new file, readable by its owner only.")
@tenant_option
@yes_option
@database(unlocked=True)
def export(connection: db.Connection, out: Output, path: Path | None, tenant: UUID, yes: bool) -> None:
    """Print all secrets of a tenant as a .env file that python-dotenv reads back to the same values."""
    if path is None and sys.stdout.isatty():
        confirm(connection, "Show every secret on this terminal?", yes)
    rows = fetch(connection, "select name, value from rekey.read_secrets(tenant_id => %s)", tenant)
    values = {row["name"]: row["value"] for row in rows}
    if path is not None:
        write_new(path, envfile.write(values))
        out.done(f"{len(values)} secrets written to {path}", path=str(path), secrets=len(values))
    elif out.json:
        out.document(values)
    else:
        click.echo(envfile.write(values), nl=False)


def _store(connection: db.Connection, stored: Sequence[Secret]) -> list[Row]:
    """Store secrets. Their values go by binary COPY, which no log shows: one may show parameters."""
    connection.execute(
        "create temporary table pg_rekey_secrets"
        " (tenant_id uuid, keyring text, name text, value text, description text) on commit drop"
    )
    with (
        connection.cursor() as cursor,
        cursor.copy("copy pg_temp.pg_rekey_secrets from stdin binary") as copy,
    ):
        copy.set_types(["uuid", "text", "text", "text", "text"])
        for one in stored:
            copy.write_row(astuple(one))
    return fetch(connection, db.query("set copied secrets"))


def _value(path: Path | None) -> str:
    if path is not None:
        value = path.read_bytes().decode()
    elif sys.stdin.isatty():
        value = getpass.getpass("Value (not shown): ")
    else:
        value = sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    if "\0" in value:
        raise Problem("text in PostgreSQL cannot hold a NUL byte", "Store it as base64.", USAGE)
    return value
