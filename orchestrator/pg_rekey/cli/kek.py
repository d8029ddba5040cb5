"""`pg-rekey kek`: the key-encryption key, which the database never stores."""

from pathlib import Path

import click

from pg_rekey import db
from pg_rekey import kek as keks
from pg_rekey.cli.base import (
    FilePath,
    InputPath,
    Output,
    confirm,
    database,
    fetch,
    fetch_one,
    output,
    scalar,
    write_new,
    yes_option,
)
from pg_rekey.cli.commands import Group
from pg_rekey.errors import LOCKED, USAGE, Problem

# What stores a secret there.
VAULT = ("vault.create_secret(text,text,text,uuid)", "vault.update_secret(uuid,text,text,text,uuid)")


@click.group(cls=Group)
def kek() -> None:
    """The key-encryption key (KEK): make, check, replace it."""


@kek.command(example="pg-rekey kek generate --out kek")
@click.option("--out", "path", type=FilePath, help="A new file, readable by its owner only.")
@output
def generate(out: Output, path: Path | None) -> None:
    """Make a KEK, as 64 hexadecimal characters. Keep it where the backups of the database are not."""
    value = keks.generate()
    fingerprint = keks.fingerprint(bytes.fromhex(value))
    if path is not None:
        write_new(path, value + "\n")
        out.done(f"KEK {fingerprint} written to {path}", path=str(path), fingerprint=fingerprint)
    elif out.json:
        out.document({"kek": value, "fingerprint": fingerprint})
    else:
        click.echo(value)


@kek.command("list", example="pg-rekey kek list")
@database()
def list_(connection: db.Connection, out: Output) -> None:
    """List the KEKs that this database has known, by number and fingerprint."""
    out.table(fetch(connection, "select * from rekey.keks order by id"), empty="no KEK is registered")


@kek.command(example="pg-rekey kek check --file kek-of-2025")
@click.option("--file", "path", type=InputPath, help="A kept copy; without it, the KEK of the environment.")
@database()
def check(connection: db.Connection, out: Output, path: Path | None) -> None:
    """Say which number a copy of a KEK is. Exit code 3 if this database has never known it."""
    value = keks.read_file(path, str(path)) if path else keks.require()
    fingerprint = keks.fingerprint(value)
    rows = fetch(connection, "select * from rekey.keks where fingerprint = %s", fingerprint)
    if not rows:
        hint = "`pg-rekey kek list` shows those that it knows."
        raise Problem(f"this database does not know KEK {fingerprint}", hint, LOCKED)
    out.done(f"KEK {rows[0]['id']}, {rows[0]['state']}", **rows[0])


@kek.command(example="pg-rekey kek store --provider vault")
@click.option("--provider", type=click.Choice(["vault", "file"]), required=True)
@click.option("--out", "path", type=FilePath, help="With file: a new file, readable by its owner only.")
@click.option("--next", "following", is_flag=True, help="The next KEK, from PG_REKEY_NEW_KEK and so on.")
@database()
def store(connection: db.Connection, out: Output, provider: str, path: Path | None, following: bool) -> None:
    """Put the KEK of the environment where the server can read it, so that rotations run unattended."""
    if (provider == "file") != (path is not None):
        raise click.UsageError("--out goes with --provider file, and only with it")
    value = keks.require(keks.NEXT if following else keks.CURRENT)
    suffix = "_new" if following else ""
    place = fetch_one(connection, db.query("kek place"), suffix, suffix)
    setting = f"Then: pg-rekey settings set kek_provider {provider}"
    if path is not None:
        write_new(path, value.hex() + "\n")
        target = place["kek_file"]
        out.done(
            f"{path} written. Copy it to the server's data directory as {target}, for the server's account\n"
            f"only. {setting}",
            path=str(path),
            target=target,
        )
        return
    if not db.trusts(connection, "supabase_vault", "vault.secrets", *VAULT, events=20):
        raise Problem("this database has no Supabase Vault", "Use --provider file.")
    db.copy_keks(connection, [value])
    exists = fetch(connection, "select from vault.secrets where name = %s", place["kek_secret_name"])
    connection.execute(db.query("update vault" if exists else "store in vault"), [place["kek_secret_name"]])
    out.done(f"stored in the Vault as {place['kek_secret_name']}.\n{setting}", name=place["kek_secret_name"])


@kek.command(example="PG_REKEY_KEK_FILE=kek PG_REKEY_NEW_KEK_FILE=kek-new pg-rekey kek rotate")
@database()
def rotate(connection: db.Connection, out: Output) -> None:
    """Wrap every key anew under the next KEK (PG_REKEY_NEW_KEK and so on); no data is touched."""
    if db.in_environment():
        db.unlock(connection)
    number = scalar(connection, "select rekey.rotate_kek()")
    out.done(
        f"KEK {number} is active. Give every client the new one; keep the old one as long as backups.",
        kek=number,
    )


@kek.command(example="PG_REKEY_NEW_KEK_FILE=kek-new pg-rekey kek replace --lost")
@click.option("--lost", is_flag=True, help="Yes, the KEK is lost.")
@yes_option
@database()
def replace(connection: db.Connection, out: Output, lost: bool, yes: bool) -> None:
    """Register a new KEK in place of one that is lost: what the lost one protects cannot be opened any more.

    The new one comes from PG_REKEY_NEW_KEK and so on, else from PG_REKEY_KEK.
    """
    if not lost:
        raise Problem(
            "replacing a KEK is for one that is lost",
            "Say --lost. Where you still have it, use `pg-rekey kek rotate`: nothing is lost then.",
            USAGE,
        )
    value = keks.read(keks.NEXT) or keks.require()
    confirm(connection, "Give up everything that the lost KEK protects?", yes)
    db.unlock(connection, value, "replacement")
    number = scalar(connection, "select rekey.register_kek(true)")
    out.done(f"KEK {number} is active: new secrets can be written", kek=number)
