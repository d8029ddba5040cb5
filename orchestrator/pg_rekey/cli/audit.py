"""`pg-rekey audit`: the log of everything that happened to keys, and the proof that it is whole."""

from pathlib import Path

import click
from psycopg.types.json import Jsonb

from pg_rekey import audit as checkpoints
from pg_rekey import db
from pg_rekey.cli.base import (
    FilePath,
    InputPath,
    Output,
    database,
    fetch_of,
    fetch_one,
    keyring_option,
    output,
    scalar,
    to_json,
    write_new,
)
from pg_rekey.errors import FINDINGS


@click.group()
def audit() -> None:
    """The audit log: a hash chain of everything that happened to keys."""


@audit.command("list")
@keyring_option
@click.option(
    "--limit", type=click.IntRange(1), default=50, show_default=True, help="How many of the newest."
)
@database()
def list_(connection: db.Connection, out: Output, keyring: str | None, limit: int) -> None:
    """List entries, newest first."""
    columns = ("id", "at", "actor", "event", "keyring", "version", "rotation_id", "details")
    out.table(fetch_of(connection, keyring, db.query("audit log"), limit), columns, empty="no entries")


@audit.command()
@click.option("--anchor", type=InputPath, help="A signed checkpoint, kept elsewhere.")
@click.option("--public-key", type=InputPath, help="The key that checks its signature.")
@database()
def verify(connection: db.Connection, out: Output, anchor: Path | None, public_key: Path | None) -> None:
    """Check the whole chain, with an anchor also that it was not computed anew or cut. Exit code 5 if bad."""
    if (anchor is None) != (public_key is None):
        raise click.UsageError("--anchor and --public-key go together")
    checkpoint = None
    if anchor and public_key:
        checkpoint = Jsonb(checkpoints.check(anchor.read_text(), public_key.read_text()))
    result = fetch_one(connection, "select * from rekey.verify_audit_log(%s)", checkpoint)
    since = " and holds the anchor" if anchor else ""
    if result["valid"]:
        out.done(f"the audit log is whole{since}: {result['entries']} entries", **result)
    else:
        out.done(f"the audit log is NOT whole, entry {result['first_bad']}: {result['reason']}", **result)
        raise click.exceptions.Exit(FINDINGS)


@audit.command()
@click.option("--key", type=InputPath, required=True, help="The private key to sign with.")
@click.option("--out", "path", type=FilePath, help="A new file; standard output without it.")
@database()
def checkpoint(connection: db.Connection, out: Output, key: Path, path: Path | None) -> None:
    """Sign the end of the log as it is now. Keep it where whoever owns the database cannot reach it."""
    now = scalar(connection, "select rekey.audit_checkpoint()")
    signed = checkpoints.sign(now, key.read_text())
    if path is None:
        out.document(signed)
    else:
        write_new(path, to_json(signed) + "\n", 0o644)
        out.done(f"checkpoint at entry {now['id']} written to {path}", path=str(path), **now)


@audit.command()
@click.argument("path", type=FilePath)
@output
def keygen(out: Output, path: Path) -> None:
    """Make a key pair for checkpoints: PATH, for the signer only, and PATH.pub, for the auditor."""
    private, public = checkpoints.generate()
    public_path = path.with_name(f"{path.name}.pub")
    write_new(path, private)
    write_new(public_path, public, 0o644)
    out.done(f"private key {path}, public key {public_path}", private=str(path), public=str(public_path))
