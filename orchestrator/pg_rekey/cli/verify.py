"""`pg-rekey verify`: does every row open?"""

import click

from pg_rekey import db
from pg_rekey.cli.base import Output, database, fetch, keyring_option
from pg_rekey.cli.commands import Command
from pg_rekey.errors import FINDINGS


@click.command(cls=Command, example="pg-rekey verify --keyring default")
@keyring_option
@database(unlocked=True)
def verify(connection: db.Connection, out: Output, keyring: str | None) -> None:
    """Check the tag of every ciphertext; nothing is decrypted, nothing changed. Exit code 5 if one fails."""
    rows = fetch(connection, "select * from rekey.verify_ciphertexts(%s)", keyring)
    out.table(rows, empty="there is nothing encrypted")
    if any(row["failed"] for row in rows):
        raise click.exceptions.Exit(FINDINGS)
