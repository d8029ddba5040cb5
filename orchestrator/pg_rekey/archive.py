"""What is kept when pg_rekey goes: every secret in one document, the audit log in another."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from pg_rekey import db
from pg_rekey.errors import Problem

SECRETS = "pg_rekey secrets, format 1"
AUDIT_LOG = "pg_rekey audit log, format 1"

Document = dict[str, Any]


@dataclass(frozen=True)
class Secret:
    """A secret as it can be stored anew."""

    tenant_id: UUID
    keyring: str
    name: str
    value: str
    description: str | None = None


@dataclass(frozen=True)
class Keyring:
    """A keyring as it can be made anew."""

    name: str
    tenant_id: UUID
    rotate_every: str | None


@dataclass(frozen=True)
class Archive:
    """The secrets of a document, and the keyrings that they stand on."""

    keyrings: list[Keyring]
    secrets: list[Secret]


def secrets(connection: db.Connection) -> Document:
    """Return all secrets of all tenants; within a transaction that has the KEK and lets nobody write."""
    connection.execute("set local intervalstyle = 'iso_8601'")
    keyrings = connection.execute(db.query("export keyrings")).fetchall()
    # Values come without a join and without an order: those spill to temporary files.
    rows = connection.execute(db.query("export secrets")).fetchall()
    values = {
        tenant: {
            row["name"]: row["value"]
            for row in connection.execute(
                "select name, value from rekey.read_secrets(tenant_id => %s)", [tenant]
            )
        }
        for tenant in dict.fromkeys(row["tenant_id"] for row in rows)
    }
    # Counted with the rights of the owner, in the rows themselves.
    [counted] = connection.execute(
        "select coalesce(sum(rows), 0)::bigint as rows from rekey.key_usage()"
    ).fetchall()
    read = sum(len(of_tenant) for of_tenant in values.values())
    if not read == len(rows) == counted["rows"]:
        raise Problem(
            f"{counted['rows']} secrets are there, and {read} could be read: nothing was dropped",
            "`pg-rekey verify` looks for rows that do not open; `pg-rekey secrets rm` deletes one.",
        )
    return _document(
        connection,
        SECRETS,
        keyrings=keyrings,
        secrets=[row | {"value": values[row["tenant_id"]][row["name"]]} for row in rows],
    )


def audit_log(connection: db.Connection) -> Document:
    """Return the audit log, and whether its chain holds."""
    [checkpoint] = connection.execute("select rekey.audit_checkpoint() as now").fetchall()
    [verified] = connection.execute("select * from rekey.verify_audit_log()").fetchall()
    entries = connection.execute(db.query("export audit log"), {"first": 0, "last": 2**62}).fetchall()
    return _document(connection, AUDIT_LOG, checkpoint=checkpoint["now"], verified=verified, entries=entries)


def read(path: Path) -> Archive | None:
    """Return what a document of secrets holds; None where the file is something else."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.startswith("{"):
        return None
    try:
        document = json.loads(text)
    except ValueError:
        if SECRETS in text:
            raise Problem(f"{path} is cut off, or was changed: it is no whole export of pg-rekey") from None
        return None
    if not isinstance(document, dict) or document.get("format") != SECRETS:
        return None
    try:
        return Archive(
            [
                Keyring(one["name"], UUID(one["tenant_id"]), one["rotate_every"])
                for one in document["keyrings"]
            ],
            [
                Secret(UUID(one["tenant_id"]), one["keyring"], one["name"], one["value"], one["description"])
                for one in document["secrets"]
            ],
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Problem(f"{path} was changed: it is no export of pg-rekey any more") from None


def _document(connection: db.Connection, kind: str, **content: Any) -> Document:
    return {
        "format": kind,
        "database": connection.info.dbname,
        "exported_at": datetime.now(UTC),
        "exported_by": connection.info.user,
    } | content
