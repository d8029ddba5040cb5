"""`pg-rekey keyrings`: lines of key versions, one a tenant or application."""

from uuid import UUID

import click

from pg_rekey import db
from pg_rekey.cli.base import Output, confirm, database, fetch, fetch_one, scalar, tenant_option, yes_option
from pg_rekey.cli.commands import Group
from pg_rekey.cli.parameters import KEYRING
from pg_rekey.cli.words import count


@click.group(cls=Group)
def keyrings() -> None:
    """Keyrings: lines of key versions, one a tenant, one an application, or just `default`."""


@keyrings.command("list", example="pg-rekey keyrings list")
@database()
def list_(connection: db.Connection, out: Output) -> None:
    """List the keyrings with their active versions and schedules."""
    out.table(fetch(connection, db.query("keyrings")), empty="no keyrings")


@keyrings.command(example="pg-rekey keyrings create billing --rotate-every '90 days'")
@click.argument("name")
@tenant_option
@click.option("--rotate-every", metavar="INTERVAL", help="Cryptoperiod, such as '90 days'.")
@database(unlocked=True)
def create(connection: db.Connection, out: Output, name: str, tenant: UUID, rotate_every: str | None) -> None:
    """Create a keyring with its first key."""
    row = fetch_one(
        connection, "select * from rekey.create_keyring(%s, %s, %s::interval)", name, tenant, rotate_every
    )
    out.done(f"keyring {row['name']} created", **row)


@keyrings.command(example="pg-rekey keyrings retire billing")
@click.argument("name", type=KEYRING)
@yes_option
@database()
def retire(connection: db.Connection, out: Output, name: str, yes: bool) -> None:
    """Retire a keyring whose rows are gone: it takes no new values, and its last key may be destroyed."""
    confirm(connection, f"Retire keyring {name}?", yes)
    connection.execute("select rekey.retire_keyring(%s)", [name])
    out.done(f"keyring {name} retired", keyring=name)


@keyrings.command("confirm-emptied", example="pg-rekey keyrings confirm-emptied billing")
@click.argument("name", type=KEYRING)
@yes_option
@database()
def confirm_emptied(connection: db.Connection, out: Output, name: str, yes: bool) -> None:
    """Confirm that the secrets of a keyring are gone because they were deleted: its rotation waits for it."""
    confirm(connection, f"Are the secrets of keyring {name} gone because somebody deleted them?", yes)
    rows = scalar(connection, "select rekey.confirm_emptied(%s)", name)
    out.done(f"keyring {name} held {count(rows, 'secret')}, and is to hold none", keyring=name, rows=rows)
