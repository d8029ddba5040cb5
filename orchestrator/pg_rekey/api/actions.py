"""What tokens do with the database: each is a transaction of a few statements on the contract in SQL.

The routes and the console have them in common.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Literal, LiteralString
from uuid import UUID

from fastapi import Request

from pg_rekey import db, doctor
from pg_rekey.api.database import LONG_TIMEOUT, OWN_ROLE, transaction
from pg_rekey.api.refusals import Refusal, no_keyring
from pg_rekey.hints import Road

Row = dict[str, Any]
# Changes of a rotation, and of a version of a key, by the functions of these names.
RotationVerb = Literal["pause", "resume", "retry", "rollback"]
KeyVerb = Literal["disable", "enable", "compromise", "cancel-destruction"]
_ON_ROTATION: dict[RotationVerb, LiteralString] = {
    "pause": "select rekey.pause_rotation(%(id)s)",
    "resume": "select rekey.resume_rotation(%(id)s)",
    "retry": "select rekey.retry_rotation(%(id)s)",
    "rollback": "select * from rekey.rollback_rotation(%(id)s, %(reason)s)",
}
_ON_KEY: dict[KeyVerb, LiteralString] = {
    "disable": "select rekey.disable_key(%(keyring)s, %(version)s, %(reason)s)",
    "enable": "select rekey.enable_key(%(keyring)s, %(version)s, %(reason)s)",
    "compromise": "select rekey.mark_key_compromised(%(keyring)s, %(version)s, %(reason)s)",
    "cancel-destruction": "select rekey.cancel_key_destruction(%(keyring)s, %(version)s)",
}
# What reads every row leaves connections of the pool to everybody else.
_LONG = threading.BoundedSemaphore(db.POOL_SIZE // 2)
# How long a request may work: it answers while its client still waits.
WORK_SECONDS = 5.0


def one(connection: db.Connection, statement: str, *parameters: Any) -> Row:
    """Return the only row of a statement."""
    [row] = connection.execute(statement, parameters).fetchall()
    return row


def page(request: Request, query: str, limit: int, key: str, **filters: Any) -> tuple[list[Row], Any]:
    """Return a page of rows, and where the next one begins if there is one."""
    with transaction(request) as connection:
        # One more than asked for tells whether there is a next page.
        rows = connection.execute(db.query(query), {**filters, "limit": limit + 1}).fetchall()
        if not rows:
            _check_keyring(request, connection, filters.get("keyring"))
    return rows[:limit], rows[limit - 1][key] if len(rows) > limit else None


def rows(request: Request, query: str, **filters: Any) -> list[Row]:
    """Return the rows of a named statement."""
    with transaction(request) as connection:
        return connection.execute(db.query(query), filters).fetchall()


def keys(request: Request, keyring: str | None) -> list[Row]:
    """Return the versions of one keyring or of every one."""
    with transaction(request) as connection:
        rows = connection.execute(db.query("keys"), [keyring, keyring]).fetchall()
        if not rows:
            _check_keyring(request, connection, keyring)
        return rows


def rotation(request: Request, id: int) -> Row:
    """Return a rotation."""
    with transaction(request) as connection:
        row = connection.execute("select * from rekey.rotation_status where id = %s", [id]).fetchone()
    if row is None:
        raise Refusal(404, "RK007", f"no such rotation: {id}", "See GET /api/rotations.")
    return row


def rotate(request: Request, keyring: str | None, reason: str | None, supersede: bool) -> list[Row]:
    """Rotate one keyring or every one; `passed_by` tells of each rotation whether it was under way before."""
    request.state.keyring = keyring
    with transaction(request) as connection:
        _unlock(connection)
        return connection.execute(
            "select r.*, r.created_at <> now() as passed_by from rekey.rotate_keys(%s, %s, %s) r",
            [keyring, reason, supersede],
        ).fetchall()


def on_rotation(request: Request, verb: RotationVerb, id: int, reason: str | None = None) -> Row:
    """Pause, resume, retry or roll back a rotation; return it, or the one that rolls it back."""
    # In SQL these are an administrator's; here a token to operate with may pause, resume and retry.
    with transaction(request, role=OWN_ROLE) as connection:
        if verb == "rollback":
            _unlock(connection)
        [done] = connection.execute(_ON_ROTATION[verb], {"id": id, "reason": reason}).fetchall()
        return (
            done
            if verb == "rollback"
            else one(connection, "select * from rekey.rotation_status where id = %s", id)
        )


def on_key(request: Request, verb: KeyVerb, keyring: str, version: int, reason: str | None = None) -> Row:
    """Disable or enable a version, mark it as compromised, or cancel its destruction; return it."""
    request.state.keyring = keyring
    with transaction(request) as connection:
        if verb == "compromise":
            _unlock(connection)
        connection.execute(_ON_KEY[verb], {"keyring": keyring, "version": version, "reason": reason})
        return _key(connection, keyring, version)


def schedule_destruction(request: Request, keyring: str, version: int, wait: str | None) -> Row:
    """Have a version destroyed after a time; return it."""
    request.state.keyring = keyring
    # It looks for the version in every row that may have it.
    with long(request) as connection:
        _unlock(connection)
        connection.execute(
            "select rekey.schedule_key_destruction(%s, %s, %s::interval)", [keyring, version, wait]
        )
        return _key(connection, keyring, version)


def create_keyring(request: Request, name: str, tenant_id: UUID, rotate_every: str | None) -> Row:
    """Make a keyring; return it."""
    with transaction(request) as connection:
        _unlock(connection)
        connection.execute(
            "select rekey.create_keyring(%s, %s, %s::interval)", [name, tenant_id, rotate_every]
        )
        return keyring(connection, name)


def retire_keyring(request: Request, name: str) -> Row:
    """Retire a keyring that no row uses; return it."""
    request.state.keyring = name
    with long(request) as connection:
        connection.execute("select rekey.retire_keyring(%s)", [name])
        return keyring(connection, name)


def set_schedule(request: Request, name: str, rotate_every: str, first_at: datetime | None) -> Row:
    """Have a keyring rotated every so often; return its schedule."""
    request.state.keyring = name
    with transaction(request) as connection:
        connection.execute("select rekey.set_schedule(%s, %s::interval, %s)", [name, rotate_every, first_at])
        return one(connection, db.query("api schedule"), name)


def clear_schedule(request: Request, name: str) -> Row:
    """End the schedule of a keyring; return what there is of it."""
    request.state.keyring = name
    with transaction(request) as connection:
        connection.execute("select rekey.clear_schedule(%s)", [name])
        return one(connection, db.query("api schedule"), name)


def resolve(request: Request, failure: int, action: str, reason: str | None) -> Row:
    """Close an entry of the quarantine; return it."""
    with transaction(request) as connection:
        _unlock(connection)
        connection.execute("select rekey.resolve_failure(%s, %s, %s)", [failure, action, reason])
        return one(connection, "select * from rekey.failure_status where id = %s", failure)


def test_endpoint(request: Request, name: str) -> Row:
    """Put a test into the queue of an endpoint; return the message."""
    with transaction(request) as connection:
        message = one(connection, "select rekey.test_endpoint(%s) as id", name)["id"]
        return one(connection, "select * from rekey.message_status where id = %s", message)


def usage(request: Request, name: str | None) -> list[Row]:
    """Count the rows on each version."""
    request.state.keyring = name
    with long(request) as connection:
        return connection.execute("select * from rekey.key_usage(%s) order by 1, 2", [name]).fetchall()


def verify(request: Request, name: str | None) -> list[Row]:
    """Open every row; return how many did, and did not, by relation, keyring and version."""
    request.state.keyring = name
    with long(request) as connection:
        _unlock(connection)
        return connection.execute(
            "select * from rekey.verify_ciphertexts(%s) order by 1, 2, 3", [name]
        ).fetchall()


def verify_audit_log(request: Request) -> Row:
    """Check the chain of the audit log."""
    with long(request) as connection:
        return one(connection, "select * from rekey.verify_audit_log()")


def checkpoint(request: Request) -> Row:
    """Return the end of the audit log."""
    with transaction(request) as connection:
        document: Row = one(connection, "select rekey.audit_checkpoint() as checkpoint")["checkpoint"]
        return document


def find_unprotected(request: Request) -> list[Row]:
    """Look for columns that were forgotten, with the rights of the token's role."""
    with long(request) as connection:
        return doctor.unprotected(connection, Road.HTTP)


def columns(request: Request) -> list[Row]:
    """Return the protected columns, and what their rotations break or set off."""
    with transaction(request) as connection:
        return doctor.columns(connection, Road.HTTP)


def examine(request: Request, timeout: str | None = None) -> list[doctor.Finding]:
    """Return what `pg-rekey doctor` says; timeout: of a statement of it, for whoever cannot wait."""
    with transaction(request, timeout=timeout) if timeout else long(request) as connection:
        return doctor.examine(connection)


def work(request: Request) -> tuple[int, int, str]:
    """Do what is due for some seconds; return how many steps, their rows, and what the last one was."""
    until = time.monotonic() + WORK_SECONDS
    steps = swept = 0
    event = "batch"
    while time.monotonic() < until and event not in ("idle", "waiting", "blocked", "locked", "error"):
        with long(request) as connection:
            _unlock(connection)
            step = one(
                connection, "select * from rekey.rotation_step(%s, rekey.who_else())", event == "whole"
            )
        event = step["event"]
        steps += event not in ("idle", "whole")
        swept += step["rows"] or 0
    return steps, swept, event


def keyring(connection: db.Connection, name: str) -> Row:
    """Return a keyring."""
    return one(connection, f"{db.query('api keyring')} where k.name = %s", name)


@contextmanager
def long(request: Request) -> Iterator[db.Connection]:
    """Lend a connection for what reads every row; only a few do so at the same time."""
    if not _LONG.acquire(blocking=False):
        raise Refusal(
            503, "busy", "others are reading every row at this moment", "Try again when they have ended."
        )
    try:
        with transaction(request, timeout=LONG_TIMEOUT) as connection:
            yield connection
    finally:
        _LONG.release()


def _check_keyring(request: Request, connection: db.Connection, name: str | None) -> None:
    """Refuse a keyring that there is none of: an empty list would look like peace."""
    known = "select from rekey.keyrings where name = %s"
    if name is not None and not connection.execute(known, [name]).fetchall():
        raise no_keyring(request, name)


def _key(connection: db.Connection, keyring: str, version: int) -> Row:
    statement = "select * from rekey.key_status where keyring = %s and version = %s"
    return one(connection, statement, keyring, version)


def _unlock(connection: db.Connection) -> None:
    if db.in_environment():
        db.unlock(connection)
