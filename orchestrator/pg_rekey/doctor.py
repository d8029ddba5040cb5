"""What could be wrong with an installation, and what to do about it."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import psycopg
from psycopg.rows import DictRow

from pg_rekey import db, hints, release
from pg_rekey import kek as keks
from pg_rekey.hints import Road

Severity = Literal["critical", "warning", "info"]
CHECKS = (
    "row security",
    "logging",
    "definer functions",
    "grants",
    "server version",
    "logical decoding",
    "KEK",
    "worker",
    "schedules",
    "HTTP API",
    "rotations",
    "notifications",
)


@dataclass(frozen=True)
class Finding:
    """One thing that should be looked at; an info is no more than that."""

    severity: Severity
    finding: str
    advice: str

    def row(self) -> dict[str, Any]:
        """Return it as a row of a table."""
        return asdict(self)


def examine(connection: db.Connection) -> list[Finding]:
    """Return what is not as it should be, the worst first."""
    found = [*_environment(), *_pooler(connection)]
    missing = _statement(connection, "installed")
    if missing:
        found += missing
    else:
        found += _guarded(connection, "findings", lambda: list(_findings(connection)))
        for name in CHECKS:
            found += _guarded(connection, name, partial(_statement, connection, name))
        found += _guarded(connection, "release", lambda: list(_release(connection)))
        found += _workers(connection)
        found += _guarded(connection, "pg_cron", lambda: list(_cron(connection)))
    return sorted(found, key=lambda finding: ("critical", "warning", "info").index(finding.severity))


def columns(connection: db.Connection, road: Road) -> list[DictRow]:
    """Return the protected columns, with what their rotations break or set off, and what to do about it."""
    rows = connection.execute(db.query("columns")).fetchall()
    found = connection.execute(db.query("column findings")).fetchall()
    for row in rows:
        of_it = [one for one in found if one["label"] == row["label"]]
        row["findings"] = [f"{one['finding']} ({hints.advice(one, road)})" for one in of_it]
    return rows


def unprotected(connection: db.Connection, road: Road) -> list[DictRow]:
    """Return columns that were forgotten, and what to do about them."""
    rows = connection.execute(db.query("unprotected")).fetchall()
    for row in rows:
        row["advice"] = hints.advice(row, road)
    return rows


def _findings(connection: db.Connection) -> Iterator[Finding]:
    for row in connection.execute(db.query("doctor: findings")).fetchall():
        yield Finding(row["severity"], row["finding"], hints.advice(row, Road.COMMAND))


def _release(connection: db.Connection) -> Iterator[Finding]:
    [row] = connection.execute("select rekey.version() as version").fetchall()
    ours = release.version()
    if row["version"] != ours:
        yield Finding(
            "warning",
            f"this database has pg_rekey {row['version']}, and this is pg-rekey {ours}",
            "`pg-rekey upgrade` upgrades an older database; a newer one needs a newer pg-rekey.",
        )


def _statement(connection: db.Connection, name: str) -> list[Finding]:
    return [Finding(**row) for row in connection.execute(db.query(f"doctor: {name}")).fetchall()]


def _guarded(connection: db.Connection, name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        with connection.transaction():
            return check()
    except psycopg.errors.InsufficientPrivilege:
        # What nobody looked at is not in order: a monitor with the wrong role must not be green.
        who = connection.info.user
        advice = {
            "pg_cron": f"GRANT USAGE ON SCHEMA cron TO {who}, or run it as a superuser.",
            "logical decoding": f"GRANT pg_read_all_settings TO {who}, to see if output_plugin_libraries"
            " names the plugins of the replication slots.",
        }.get(name, f"Run it as a member of rekey_auditor or rekey_admin: GRANT rekey_auditor TO {who}.")
        return [Finding("warning", f"this role may not examine: {name}", advice)]
    except psycopg.Error as error:
        if error.sqlstate != "RK005":
            raise
        return []  # a table of ours hides rows, of which "findings" tells


def _environment() -> Iterator[Finding]:
    for variable in (f"{keks.CURRENT}_FILE", f"{keks.NEXT}_FILE"):
        path = os.environ.get(variable)
        if path and os.path.exists(path):
            found = os.stat(path)
            mode = stat.S_IMODE(found.st_mode)
            # As libpq has it for private keys. A file of root's that its group may read is how Kubernetes (by
            # fsGroup) and systemd (by an ACL, whose mask shows as the group's rights) give it to one account.
            if not mode & (0o037 if found.st_uid == 0 else 0o077):
                continue
            finding = f"others can read {variable} (mode {mode:04o})"
            if os.path.ismount(path):
                # As Docker Compose mounts a secret: with its mode outside, where its directory may be closed.
                yield Finding(
                    "info", finding, "Let nobody but its owner enter the directory that it comes from."
                )
            else:
                yield Finding("critical", finding, f"chmod 600 {path}, or mount it with mode 0400.")


def _pooler(connection: db.Connection) -> Iterator[Finding]:
    if db.is_pooled(connection):
        yield Finding(
            "warning",
            "there is a connection pooler between here and the server",
            "In transaction mode, unlock transactions only: a session that is unlocked serves others too.",
        )


def _cores(connection: db.Connection) -> int | None:
    """Return how many cores the server has, where that can be known: on this machine."""
    here = connection.info.host.startswith("/") or connection.info.hostaddr in ("127.0.0.1", "::1")
    return os.cpu_count() if here else None


def _workers(connection: db.Connection) -> Iterator[Finding]:
    if (cores := _cores(connection)) is None:
        yield Finding(
            "info",
            "how many workers suit the server is not known here: as many as it has cores share a rotation",
            "Run doctor on the machine of the server, or count them there: nproc.",
        )
        return
    if cores == 1:
        yield Finding("info", "one core: one worker suits it", "More would only take turns.")
        return
    half = cores // 2
    yield Finding(
        "info",
        f"{cores} cores: up to {cores} workers share a rotation, {half} where others are to feel less of it",
        f"`pg-rekey rotate --wait` and `pg-rekey work` take --workers {cores}; pg_cron, in SQL: select "
        f"rekey.schedule_worker(workers => {half})",
    )


def _cron(connection: db.Connection) -> Iterator[Finding]:
    [here] = connection.execute(db.query("init")).fetchall()
    if here["pg_cron"]:
        jobs = db.worker_jobs(connection, here["database"])
    elif here["cron_database"] not in (None, here["database"]):
        try:
            with db.connect(database=here["cron_database"]) as other:
                jobs = db.worker_jobs(other, here["database"])
        except (psycopg.OperationalError, psycopg.errors.UndefinedTable):
            return
    else:
        return
    fix = "Run `pg-rekey init` again: it puts the job right."
    if not jobs:
        yield Finding("info", "pg_cron has no job for this database that this role can see", fix)
    kinds = {
        "call rekey.tick()": "rekey.tick",
        "select rekey.watch()": "rekey.watch",
        "call rekey.run_rotations()": "rekey.run_rotations",
    }
    for bare, called in kinds.items():
        helps = called == "rekey.run_rotations"
        alike = [job for job in jobs if called in job["command"].lower()]
        if len(alike) > 1 and not helps:
            said = f"pg_cron has {len(alike)} jobs for the worker"
            yield Finding(
                "warning", f"{said}, by `{bare}`", "In SQL: select cron.unschedule(NUMBER), of all but one."
            )
        elif jobs and not alike and not helps:
            yield Finding("warning", f"pg_cron has no job of one bare `{bare}`", fix)
        for job in alike:
            if job["command"].strip().rstrip(";").lower() != bare:
                yield Finding("warning", f"pg_cron's job {job['jobid']} is not one bare `{bare}`", fix)
    for job in jobs:
        name = f"pg_cron's job {job['jobid']}"
        if not job["active"]:
            yield Finding("warning", f"{name} is not active", fix)
        if job["superuser"]:
            yield Finding("warning", f"{name} runs as the superuser {job['username']}", fix)
    cores, workers = _cores(connection), sum(db.is_worker(job) for job in jobs)
    if cores and workers > cores:
        yield Finding(
            "warning",
            f"pg_cron has {workers} workers, and the server {cores} cores",
            f"In SQL: select rekey.schedule_worker(workers => {cores})",
        )
    if jobs and connection.execute(db.query("kek provider")).fetchall() == [{"value": "session"}]:
        yield Finding(
            "warning",
            "pg_cron rotates nothing: the server itself has no KEK",
            "`pg-rekey kek store`, or `pg-rekey work --forever` with the KEK.",
        )
