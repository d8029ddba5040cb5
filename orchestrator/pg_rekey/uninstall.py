"""Taking pg_rekey out of a database, and losing nothing by it."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import psycopg
from psycopg import sql

from pg_rekey import archive, db, release, worker
from pg_rekey.archive import Document
from pg_rekey.errors import Problem, explain

LOCK_ATTEMPTS = 20
PASSING = ("40001", "40P01", "55P03")  # another attempt may succeed
JOBS = ("call rekey.tick()", "call rekey.run_rotations()", "select rekey.watch()")
OPENING = ("active", "decrypt_only", "compromised")  # states of key versions that open for everybody

Row = dict[str, Any]


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way, and what to do about it."""

    what: str
    advice: str


@dataclass(frozen=True)
class Column:
    """A protected column of a table, and how many of its rows are to be decrypted."""

    label: str
    table: str
    column: str
    rows: int


@dataclass
class Plan:
    """What an uninstallation would do, and what keeps it from being done."""

    columns: list[Column] = field(default_factory=list)
    secrets: int = 0
    tenants: int = 0
    audit_entries: int = 0
    obstacles: list[Obstacle] = field(default_factory=list)


@dataclass
class Roles:
    """What became of the roles."""

    dropped: list[Row] = field(default_factory=list)  # name and members
    kept: list[Row] = field(default_factory=list)  # name and why


def look(connection: db.Connection) -> Row:
    """Return what there is, as far as anybody may see it."""
    [here] = _rows(connection, "uninstall")
    return here


def plan(connection: db.Connection, export: Path | None, audit_log: Path | None) -> Plan:
    """Look at everything and change nothing; every encrypted row is opened."""
    made = Plan()
    with worker.transaction(connection):
        _look_at_rows(connection, made)
    made.obstacles += _files(made, export, audit_log)
    return made


def _look_at_rows(connection: db.Connection, made: Plan) -> None:
    made.obstacles += _objects(connection)
    envelopes = _rows(connection, "uninstall envelopes")
    protected = _rows(connection, "uninstall columns")
    for row in protected:
        found = next((one for one in envelopes if _key(one) == _key(row)), None)
        unread = any(one["relation"] == row["relation"] and one["column"] is None for one in envelopes)
        made.columns.append(
            Column(row["label"], row["table"], row["column"], found["envelopes"] if found else 0)
        )
        made.obstacles += _column(connection, row, found, unread)
    keys = {_key(row) for row in protected}
    made.obstacles += _envelopes([row for row in envelopes if _key(row) not in keys])
    if any(row["problem"] for row in protected):
        made.obstacles.append(
            Obstacle("rows were not opened, since a column is blocked", "Mend that first, and look again.")
        )
    else:
        made.obstacles += _closed(connection)
    [counts] = _rows(connection, "uninstall counts")
    made.secrets, made.tenants, made.audit_entries = (
        counts[name] for name in ("secrets", "tenants", "audit_entries")
    )


def drop(connection: db.Connection, here: Row, save: Callable[[Document, Document], None]) -> None:
    """Drop everything in one transaction, once nothing in the database needs it any more.

    The tables are locked first, so that nobody encrypts, or stores a secret, from then on. Then: a last look,
    everything read out, everything dropped; and ``save`` is called with the secrets and the audit log last of
    all, so that nothing but the COMMIT can fail after it.
    """
    saved = False

    def save_once(secrets: Document, audit_log: Document) -> None:
        nonlocal saved
        save(secrets, audit_log)
        saved = True

    for attempt in range(1, LOCK_ATTEMPTS + 1):
        try:
            with worker.transaction(connection):
                connection.execute("set local lock_timeout = '2 s'")
                for row in _rows(connection, "uninstall locks"):
                    connection.execute(row["statement"].encode())
                _drop_locked(connection, here, save_once)
            return
        except psycopg.errors.DependentObjectsStillExist as error:
            detail = (error.diag.message_detail or "").replace("\n", "; ")
            raise Problem(f"something needs pg_rekey: nothing was dropped: {detail}") from None
        except psycopg.Error as error:
            if saved:
                raise Problem(
                    f"{explain(error)[0]}: whether pg_rekey was dropped is not known",
                    "What was exported is complete. `pg-rekey uninstall --dry-run` says whether pg_rekey is "
                    "still there; if so, repeat the command with other file names.",
                ) from None
            if error.sqlstate not in PASSING:
                raise
            if attempt == LOCK_ATTEMPTS:
                raise _held(connection) from None
            time.sleep(1)


def _drop_locked(connection: db.Connection, here: Row, save: Callable[[Document, Document], None]) -> None:
    left = list(_objects(connection))
    left += _envelopes(_rows(connection, "uninstall envelopes"))
    left += [
        Obstacle(f"{row['label']} is protected", "Somebody protected it meanwhile: repeat the command.")
        for row in _rows(connection, "uninstall columns")
    ]
    if left:
        raise Problem(f"{left[0].what}: nothing was dropped", left[0].advice)
    secrets, audit_log = archive.secrets(connection), archive.audit_log(connection)
    if here["pg_cron"]:
        connection.execute("select rekey.unschedule_worker()")
    if here["extension"]:
        connection.execute("drop extension pg_rekey restrict")
    else:
        for row in _rows(connection, "uninstall RPC"):
            connection.execute(f"drop function {row['function']} restrict".encode())
    # All at once, so that they may depend on each other; and what these roles were granted in this database.
    connection.execute("drop owned by rekey_owner, rekey_sweeper restrict")
    save(secrets, audit_log)


def _held(connection: db.Connection) -> Problem:
    holders = [row["holder"] for row in _rows(connection, "lock holders")]
    return Problem(
        "the tables of pg_rekey could not be locked: nothing was dropped",
        f"In the way: {'; '.join(holders)}. Let it end, and repeat the command."
        if holders
        else "Stop what uses them, and repeat the command.",
    )


def _rows(connection: db.Connection, name: str) -> list[Row]:
    return connection.execute(db.query(name)).fetchall()


def _key(row: Row) -> tuple[int | None, str | None]:
    return row["relation"], row["column"]


def _objects(connection: db.Connection) -> Iterator[Obstacle]:
    """Find objects of others that would go along, or break."""
    made = re.findall(
        r"^create (?:or replace )?(?:table|view|function|procedure|type|sequence) (rekey\w*\.\w+)",
        release.sql_script("plain"),
        re.MULTILINE,
    )
    for row in _rows(connection, "uninstall objects"):
        if row["name"] not in made:
            yield Obstacle(
                f"{row['name']} is no part of pg_rekey {release.version()}",
                "If it is yours, move it to another schema or drop it. Else use the pg-rekey of the version "
                "that is installed.",
            )
    for row in _rows(connection, "uninstall strays"):
        yield Obstacle(
            f"{row['object']} belongs to {row['owner']}", "Give it another owner: ALTER ... OWNER TO."
        )
    for row in _rows(connection, "uninstall dependents"):
        yield Obstacle(
            f"{row['dependent']} uses pg_rekey",
            "Drop it or change it: nothing of yours is dropped here. A decrypted view can be made anew over "
            "the table itself, once its columns are decrypted (`pg-rekey columns unprotect --decrypt`).",
        )


def _column(connection: db.Connection, row: Row, found: Row | None, unread: bool) -> Iterator[Obstacle]:
    """Find what keeps a protected column from being decrypted by this session."""
    if row["problem"]:
        yield Obstacle(f"{row['label']} is blocked", row["problem"])
        return
    if found and found["embedded"]:
        yield _embedded(found)
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(
                "select from rekey._release_column(%s::regclass, %s, %s)",
                [row["table"], row["column"], unread or bool(found and found["envelopes"])],
            )
    except psycopg.errors.InsufficientPrivilege:
        rows = "its rows" if found is None else f"its {found['envelopes']} encrypted rows"
        yield Obstacle(
            f"{row['label']}: {rows} are for {row['owner']} to decrypt, who owns the table",
            f"As {row['owner']}, with rekey_admin and rekey_app: "
            f"pg-rekey columns unprotect {_arguments(row)} --decrypt",
        )
    except psycopg.Error as error:
        if error.sqlstate != "RK004":
            raise
        yield Obstacle(
            explain(error)[0],
            f"Let it end. Or end it: pg-rekey rotate --keyring {quote(row['keyring'])} --supersede",
        )


def _envelopes(found: list[Row]) -> Iterator[Obstacle]:
    """Find envelopes that nothing decrypts, and tables that may hide some."""
    for row in found:
        name = f"{row['table']}.{row['column']}"
        if row["column"] is None:
            yield Obstacle(
                f"{row['table']} cannot be read whole, and may hold envelopes",
                "Have its owner granted to this role, or a superuser do it. Where its indexes or statistics "
                "call a function of another role: give that to a superuser, if you trust it.",
            )
        elif row["copied"]:
            yield Obstacle(
                f"{name}, of a materialized view, holds envelopes",
                f"Decrypt the columns that it is made of, then REFRESH MATERIALIZED VIEW {row['table']}.",
            )
        elif row["envelopes"]:
            yield Obstacle(
                f"{name} holds {row['envelopes']} envelopes, and is not protected",
                f"If they are its own: pg-rekey columns protect {_arguments(row)}, and again. "
                "Else decrypt them as they were encrypted (rekey.decrypt), or delete them.",
            )
        if row["embedded"]:
            yield _embedded(row)


def _arguments(row: Row) -> str:
    return f"{quote(row['table'])} {quote(row['column'])}"


def _embedded(row: Row) -> Obstacle:
    return Obstacle(
        f"{row['table']}.{row['column']} has envelopes within {row['embedded']} values",
        "Decrypt them as they were encrypted (rekey.decrypt), or delete them.",
    )


def _closed(connection: db.Connection) -> Iterator[Obstacle]:
    """Open every row, and find those that do not."""
    for row in _rows(connection, "uninstall rows"):
        name = f"version {row['version']} of keyring {row['keyring']}"
        if row["state"] not in OPENING:
            where = f"{row['rows']} rows of {row['relation']} stand on {name}"
            yield Obstacle(
                f"{where}, which is {row['state'] or 'unknown'}",
                "`pg-rekey keys enable`, or `pg-rekey keys cancel-destruction`. Delete them if it is gone.",
            )
        elif row["failed"]:
            yield Obstacle(
                f"{row['failed']} rows of {row['relation']} on {name} do not open",
                "`pg-rekey rotate --wait` and `pg-rekey rotations failures` name them. Mend them, or delete "
                "them if they are lost anyway.",
            )


def _files(made: Plan, export: Path | None, audit_log: Path | None) -> Iterator[Obstacle]:
    """Find what keeps the secrets and the audit log from being written."""
    if made.secrets and export is None:
        yield Obstacle(f"{made.secrets} secrets would be lost", "--export FILE writes them to a new file.")
    if made.audit_entries and audit_log is None:
        yield Obstacle(
            f"{made.audit_entries} entries of the audit log would be lost",
            "--audit-log FILE writes them to a new file.",
        )
    if export and audit_log and export.absolute() == audit_log.absolute():
        yield Obstacle("--export and --audit-log name one file", "Secrets are not for auditors: give two.")
    for path in filter(None, (export, audit_log)):
        if os.path.lexists(path):
            yield Obstacle(
                f"{path} exists already",
                "Give another name. If an uninstallation that was killed wrote it, it holds what was there "
                "then: delete it once this one is done.",
            )
        elif not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
            yield Obstacle(f"{path} cannot be written", "Give a name in a directory that is yours.")


def other_databases(connection: db.Connection) -> list[str]:
    """Return the databases of this server, beside this one, that have pg_rekey."""
    return [row["name"] for row in _rows(connection, "uninstall databases")]


def roles(connection: db.Connection) -> list[Row]:
    """Return the roles of pg_rekey that are there, and their members."""
    return _rows(connection, "uninstall roles")


def drop_roles(connection: db.Connection) -> Roles:
    """Drop the roles that nothing uses: PostgreSQL itself looks, in every database of the server."""
    done = Roles()
    if databases := other_databases(connection):
        why = f"pg_rekey is in {', '.join(databases)} too"
        done.kept = [{"name": row["name"], "why": why} for row in roles(connection)]
        return done
    with connection.transaction():
        connection.execute("set local lock_timeout = '5 s'")
        for row in roles(connection):
            name = sql.Identifier(row["name"])
            try:
                with connection.transaction():
                    if (
                        row["name"] == "rekey_worker"
                        and _rows(connection, "uninstall cron usage")[0]["granted"]
                    ):
                        connection.execute("revoke usage on schema cron from rekey_worker")
                    connection.execute(sql.SQL("drop role {}").format(name))
                done.dropped.append(row)
            except (
                psycopg.errors.DependentObjectsStillExist,
                psycopg.errors.InsufficientPrivilege,
                psycopg.errors.LockNotAvailable,
                psycopg.errors.ObjectInUse,
            ) as error:
                detail = error.diag.message_detail or error.diag.message_primary or ""
                done.kept.append({"name": row["name"], "why": "; ".join(detail.splitlines())})
    return done


def jobs(connection: db.Connection, here: Row) -> list[Row]:
    """Return the worker's jobs for this database, as far as this role may see them."""
    with _cron(connection, here) as cron:
        return _jobs(cron, here)


def unschedule(connection: db.Connection, here: Row) -> tuple[list[int], list[int]]:
    """End the jobs for this database; return their numbers, and those that are for somebody else to end."""
    ended: list[int] = []
    with _cron(connection, here) as cron:
        found = _jobs(cron, here)
        for job in found:
            if cron and job["command"] in JOBS:
                with suppress(psycopg.Error), cron.transaction():
                    if db.trusts(cron, "pg_cron", "cron.job", "cron.unschedule(bigint)", events=8):
                        cron.execute("select cron.unschedule(%s::bigint)", [job["jobid"]])
                        ended.append(job["jobid"])
    return ended, [job["jobid"] for job in found if job["jobid"] not in ended]


@contextmanager
def _cron(connection: db.Connection, here: Row) -> Iterator[db.Connection | None]:
    """Yield a connection to the database that pg_cron lives in; None where it cannot be had."""
    if here["pg_cron"]:
        yield connection
    elif here["cron_database"] in (None, here["database"]):
        yield None
    else:
        try:
            other = db.connect(autocommit=True, database=here["cron_database"])
        except psycopg.OperationalError:
            yield None
            return
        with other:
            yield other


def _jobs(cron: db.Connection | None, here: Row) -> list[Row]:
    if cron is None:
        return []
    try:
        return db.worker_jobs(cron, here["database"])
    except psycopg.errors.InsufficientPrivilege:
        return []


def migrations(connection: db.Connection) -> list[str]:
    """Return the versions under which the Supabase CLI has noted our migration."""
    try:
        return db.migrations(connection)
    except psycopg.errors.InsufficientPrivilege:
        return []
