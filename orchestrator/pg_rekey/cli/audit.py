"""`pg-rekey audit`: the log of everything that happened to keys, and the proof that it is whole."""

import json
from datetime import UTC, datetime
from pathlib import Path

import click
from psycopg.types.json import Jsonb

from pg_rekey import audit as checkpoints
from pg_rekey import audit_archive, db
from pg_rekey.cli.base import (
    FilePath,
    InputPath,
    Output,
    confirm,
    database,
    fetch_of,
    fetch_one,
    keyring_option,
    output,
    scalar,
    to_json,
    write_new,
    yes_option,
)
from pg_rekey.cli.commands import Group
from pg_rekey.cli.words import count
from pg_rekey.errors import FINDINGS, Problem


@click.group(cls=Group)
def audit() -> None:
    """The audit log: a hash chain of everything that happened to keys."""


@audit.command("list", example="pg-rekey audit list --keyring default --limit 10")
@keyring_option
@click.option(
    "--limit", type=click.IntRange(1), default=50, show_default=True, help="How many of the newest."
)
@database()
def list_(connection: db.Connection, out: Output, keyring: str | None, limit: int) -> None:
    """List entries, newest first."""
    columns = ("id", "at", "actor", "event", "keyring", "version", "rotation_id", "details")
    out.table(fetch_of(connection, keyring, db.query("audit log"), limit), columns, empty="no entries")


@audit.command(example="pg-rekey audit verify --anchor checkpoint.json --public-key signer.pub")
@click.option("--anchor", type=InputPath, help="A signed checkpoint, kept elsewhere.")
@click.option("--public-key", type=InputPath, help="The key that checks its signature.")
@click.option(
    "--archive",
    "archives",
    type=InputPath,
    multiple=True,
    help="A file that entries were removed to. Repeat it: all of them, in any order.",
)
@database()
def verify(
    connection: db.Connection,
    out: Output,
    anchor: Path | None,
    public_key: Path | None,
    archives: tuple[Path, ...],
) -> None:
    """Check the whole chain, with an anchor also that it was not computed anew or cut. Exit code 5 if bad.

    Where old entries were removed, the chain is checked from there on; with the files they are in, all of it:

    pg-rekey audit verify --archive audit-2026.jsonl --archive audit-2027.jsonl
    """
    if (anchor is None) != (public_key is None):
        raise click.UsageError("--anchor and --public-key go together")
    checkpoint = None
    if anchor and public_key:
        checkpoint = checkpoints.check(anchor.read_text(), public_key.read_text())
    # One snapshot for the log and what is joined with it.
    connection.execute("set transaction isolation level repeatable read, read only")
    files = [audit_archive.read(path, checkpoint["id"] if checkpoint else None) for path in archives]
    older = None
    if checkpoint and checkpoint["id"] <= max((file.last for file in files), default=-1):
        older, checkpoint = checkpoint, None
    result = dict(
        fetch_one(
            connection, "select * from rekey.verify_audit_log(%s)", Jsonb(checkpoint) if checkpoint else None
        )
    )
    if result["valid"] and files:
        bad = audit_archive.join(connection, files, older)
        if bad is not None:
            result |= {"valid": False, "first_bad": bad[0], "reason": bad[1]}
    if not result["valid"]:
        out.done(f"the audit log is NOT whole, entry {result['first_bad']}: {result['reason']}", **result)
        raise click.exceptions.Exit(FINDINGS)
    since = " and holds the anchor" if anchor else ""
    removed = scalar(connection, "select rekey.audit_checkpoint()")["id"] - result["entries"]
    where = f", {removed:,} more {'in files' if files else 'removed to files: --archive'}" if removed else ""
    out.done(
        f"the audit log is whole{since}: {count(result['entries'], 'entry', 'entries')}{where}",
        **result,
        removed=removed,
    )


@audit.command(example="pg-rekey audit export audit-2026.jsonl --key signer")
@click.argument("path", metavar="FILE", type=FilePath)
@click.option(
    "--until",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="DATE",
    help="Entries before this day (UTC); else those that audit_keep lets go.",
)
@click.option("--key", type=InputPath, help="The private key that signs a checkpoint. Removal takes one.")
@database()
def export(
    connection: db.Connection, out: Output, path: Path, until: datetime | None, key: Path | None
) -> None:
    """Write old entries to a new file, with all that proves them; nothing is removed.

    pg-rekey audit export audit-2026.jsonl --key signer
    """
    connection.execute("set transaction isolation level repeatable read, read only")
    wanted = audit_archive.find(connection, until.replace(tzinfo=UTC) if until else None)
    now = scalar(connection, "select rekey.audit_checkpoint()")
    signed = checkpoints.sign(now, key.read_text()) if key else None
    write_new(path, audit_archive.lines(connection, wanted, signed))
    written = audit_archive.read(path)
    out.done(
        f"entries {written.first} to {written.last} written to {path}, SHA-256 {written.sha256}",
        path=str(path),
        sha256=written.sha256,
        **wanted,
    )


@audit.command(example="pg-rekey audit prune audit-2026.jsonl --public-key signer.pub")
@click.argument("path", metavar="FILE", type=InputPath)
@click.option("--public-key", type=InputPath, required=True, help="The key that checks its checkpoint.")
@yes_option
@database()
def prune(connection: db.Connection, out: Output, path: Path, public_key: Path, yes: bool) -> None:
    """Remove from the log what is in a file of `audit export`. Keep the file as long as the log counts.

    Only what is older than the setting audit_keep goes, and nothing of key.* and kek.*. For whom may execute
    rekey.prune_audit_log(): that is a right of its own.

    pg-rekey audit prune audit-2026.jsonl --public-key signer.pub
    """
    file = audit_archive.read(path)
    if file.checkpoint is None:
        raise Problem(f"{path} has no signed checkpoint", "`pg-rekey audit export FILE --key KEY` signs one.")
    checkpoints.check(json.dumps(file.checkpoint), public_key.read_text())
    confirm(
        connection, f"Remove entries {file.first} to {file.last} from the audit log, as {path} has them?", yes
    )
    removed = scalar(
        connection,
        "select rekey.prune_audit_log(%s, %s, %s, %s, %s)",
        file.first,
        file.last,
        file.hash,
        file.sha256,
        Jsonb(file.checkpoint),
    )
    out.done(
        f"{count(removed, 'entry', 'entries')} removed from the audit log; keep {path}",
        removed=removed,
        path=str(path),
    )


@audit.command(example="pg-rekey audit checkpoint --key signer --out checkpoint.json")
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


@audit.command(example="pg-rekey audit keygen signer")
@click.argument("path", type=FilePath)
@output
def keygen(out: Output, path: Path) -> None:
    """Make a key pair for checkpoints: PATH, for the signer only, and PATH.pub, for the auditor."""
    private, public = checkpoints.generate()
    public_path = path.with_name(f"{path.name}.pub")
    write_new(path, private)
    write_new(public_path, public, 0o644)
    out.done(f"private key {path}, public key {public_path}", private=str(path), public=str(public_path))
