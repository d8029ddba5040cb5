"""Files that hold what was removed from the audit log: written, read, and joined with what is left of it."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pg_rekey import db
from pg_rekey.errors import FINDINGS, Problem

FORMAT = "pg_rekey audit archive, format 1"
GENESIS = hashlib.sha256(b"pg_rekey/v1/audit").hexdigest()

_PARTS = (
    "id", "at", "actor", "role", "jwt_subject", "event", "keyring", "version", "rotation_id", "details"
)  # fmt: skip


@dataclass(frozen=True)
class Archive:
    """A file whose entries follow from each other; ``hashes`` has those that are looked for later."""

    path: Path
    sha256: str
    first: int
    last: int
    prev_hash: str
    hash: str
    checkpoint: dict[str, Any] | None
    hashes: dict[int, str]


def find(connection: db.Connection, until: datetime | None) -> dict[str, Any]:
    """Return first and last entry to export, with their hashes; by default what may be removed."""
    rows = connection.execute(db.query("audit archive range"), {"until": until}).fetchall()
    if not rows:
        raise Problem(
            "there is no entry so old that is not in a file yet",
            "The setting audit_keep says how long entries stay; --until DATE exports newer ones.",
        )
    return rows[0]


def lines(
    connection: db.Connection, wanted: Mapping[str, Any], checkpoint: Mapping[str, Any] | None
) -> Iterator[str]:
    """Yield the lines of a file: a header, then the entries; in the transaction that found the range."""
    [now] = connection.execute("select clock_timestamp() as at").fetchall()
    yield _line(
        {
            "format": FORMAT,
            "database": connection.info.dbname,
            "exported_at": now["at"].isoformat(),
            "exported_by": connection.info.user,
        }
        | dict(wanted)
        | {"checkpoint": checkpoint}
    )
    with connection.cursor("pg_rekey_audit") as cursor:
        for row in cursor.execute(
            db.query("export audit log"), {"first": wanted["first"], "last": wanted["last"]}
        ):
            yield _line(row)


def read(path: Path, anchored: int | None = None) -> Archive:
    """Return what a file holds, having computed every hash of it; what does not fit is a finding.

    ``anchored``: an entry whose hash is wanted, besides those that also stay in the log.
    """
    digest = hashlib.sha256()
    hashes: dict[int, str] = {}
    try:
        with path.open("rb") as file:
            header = json.loads(_counted(file.readline(), digest))
            if header["format"] != FORMAT:
                raise ValueError
            number, found = header["first"] - 1, header["prev_hash"]
            for line in file:
                entry = json.loads(_counted(line, digest))
                number += 1
                if entry["id"] != number or entry["prev_hash"] != found or entry["hash"] != _hash(entry):
                    raise Problem(f"{path} was changed: entry {number} does not follow", None, FINDINGS)
                found = entry["hash"]
                if number == anchored or entry["event"].startswith(("key.", "kek.", "audit.")):
                    hashes[number] = found
        if (number, found) != (header["last"], header["hash"]):
            raise Problem(f"{path} is cut off, or was changed: entry {number + 1} is missing", None, FINDINGS)
        return Archive(
            path,
            digest.hexdigest(),
            header["first"],
            number,
            header["prev_hash"],
            found,
            header["checkpoint"],
            hashes,
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Problem(
            f"{path} was changed, or is no file of `pg-rekey audit export`", None, FINDINGS
        ) from None


def join(
    connection: db.Connection, files: Sequence[Archive], anchor: Mapping[str, Any] | None
) -> tuple[int, str] | None:
    """Tell the first entry that does not fit, and why, where files do not lead to a log that holds by itself.

    ``anchor``: a checkpoint from before the entries that the log has.
    """
    given = {file.sha256: file for file in files}
    hashes: dict[int, str] = {0: GENESIS}
    last, before = 0, GENESIS
    for row in connection.execute(db.query("audit removals")).fetchall():
        said = row["details"]
        file = given.pop(said["file_sha256"], None)
        if file is None:
            place = f"entries {said['first']} to {said['last']}"
            return said[
                "first"
            ], f"the file of {place} is not given, or was changed: SHA-256 {said['file_sha256']}"
        if (file.first, file.prev_hash, file.last, file.hash) != (
            last + 1, before, said["last"], said["hash"]
        ):  # fmt: skip
            return file.first, f"{file.path} does not follow from what is before it"
        last, before = file.last, file.hash
        hashes |= file.hashes
    for file in given.values():
        return file.first, f"{file.path} is not of this log: none of its audit.pruned names it"
    for row in connection.execute(db.query("audit kept"), [last]).fetchall():
        if hashes.get(row["id"]) != row["hash"]:
            return row["id"], "it is not the one that the file has"
    hashes[last] = before
    if anchor is not None and hashes.get(anchor["id"]) != anchor["hash"]:
        return anchor["id"], "the log is not the one that was anchored"
    return None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


def _counted(line: bytes, digest: "hashlib._Hash") -> bytes:
    digest.update(line)
    return line


def _hash(entry: Mapping[str, Any]) -> str:
    parts = (None if entry[name] is None else str(entry[name]).encode() for name in _PARTS)
    encoded = (b"\xff\xff\xff\xff" if part is None else len(part).to_bytes(4, "big") + part for part in parts)
    return hashlib.sha256(bytes.fromhex(entry["prev_hash"]) + b"".join(encoded)).hexdigest()
