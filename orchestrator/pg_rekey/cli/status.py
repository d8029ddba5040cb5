"""`pg-rekey status`: keys, rotations and the worker at a glance."""

import time
from typing import Any

import click
import psycopg
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pg_rekey import db
from pg_rekey.cli.base import Output, database, fetch, fetch_one, scalar
from pg_rekey.cli.commands import Command
from pg_rekey.cli.follow import NOBODY
from pg_rekey.cli.rotations import COLUMNS
from pg_rekey.cli.words import count
from pg_rekey.errors import FINDINGS, UNFINISHED

KEYRINGS = ("keyring", "version", "since", "rotate_every", "next_rotation_at", "schedule")
LAST = ("keyring", "last_rotation", "rows", "took", "counted_at")
ROTATIONS = (*COLUMNS[:-1], "blocked_by", "last_error")
REFRESH = 2.0


@click.command(cls=Command, example="pg-rekey status --watch")
@click.option(
    "--check", is_flag=True, help="Exit code 4 if a rotation failed, 5 if one is overdue or unscheduled."
)
@click.option("--watch", is_flag=True, help="Look again every two seconds, until Ctrl-C.")
@database()
def status(connection: db.Connection, out: Output, check: bool, watch: bool) -> None:
    """Show keyrings, rotations under way or gone wrong, and when the worker last ran."""
    if watch:
        if check or out.json or not Console().is_terminal:
            raise click.UsageError("--watch is for a terminal, without --check and --json")
        _watch(connection, out)
        return
    found = _look(connection)
    if out.json:
        del found["idle"]
        out.document(found)
    else:
        out.show(*_view(connection, out, found))
    if check and any(row["state"] in ("failed", "completed_with_failures") for row in found["rotations"]):
        raise click.exceptions.Exit(UNFINISHED)
    if check and any(row["schedule"] != "on time" for row in found["keyrings"]):
        raise click.exceptions.Exit(FINDINGS)


def _watch(connection: db.Connection, out: Output) -> None:
    with Live(screen=True, auto_refresh=False) as live:
        while True:
            live.update(Group(*_view(connection, out, _look(connection))), refresh=True)
            connection.rollback()
            time.sleep(REFRESH)


def _look(connection: db.Connection) -> dict[str, Any]:
    search = fetch(connection, "select * from rekey.search_status")
    rotations = fetch(connection, db.query("status rotations"))
    under_way = any(row["state"] in ("queued", "running", "verifying") for row in rotations)
    known = fetch_one(connection, db.query("status secrets"))
    secrets = known["secrets"]
    if known["countable"]:
        secrets = scalar(connection, "select count(*) from rekey.secrets")
    return {
        "secrets": secrets,
        "secrets_estimated": not known["countable"],
        "keyrings": fetch(connection, db.query("status keyrings")),
        "rotations": rotations,
        "worker": {
            **fetch_one(connection, db.query("status worker")),
            "pg_cron_workers": _workers(connection),
        },
        "search": search[0] if search else None,
        "messages": fetch_one(connection, db.query("status messages")),
        "idle": under_way and not scalar(connection, db.query("worked on")),
    }


def _workers(connection: db.Connection) -> int | None:
    """Return how many workers pg_cron runs; None where it is not in this database, or not for this role."""
    try:
        with connection.transaction():
            jobs = db.worker_jobs(connection, connection.info.dbname)
    except (
        psycopg.errors.InsufficientPrivilege,
        psycopg.errors.InvalidSchemaName,
        psycopg.errors.UndefinedTable,
    ):
        return None
    return len([job for job in jobs if job["active"] and db.is_worker(job)]) or None


def _view(connection: db.Connection, out: Output, found: dict[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(db.where(connection), "bold"), ""]
    parts += out.fit(found["keyrings"], KEYRINGS, "no keyrings: run `pg-rekey init`")
    if found["secrets"] is not None:
        about = "about " if found["secrets_estimated"] else ""
        parts.append(Text(f"{about}{count(found['secrets'], 'secret')}"))
    if last := [row for row in found["keyrings"] if row["last_rotation"]]:
        parts += ["", *out.fit(last, LAST)]
    parts += ["", *out.fit(found["rotations"], ROTATIONS, "no rotation is under way")]
    if found["idle"]:
        parts.append(Text(NOBODY, "yellow"))
    worker = {**found["worker"], "last_tick_at": found["worker"]["last_tick_at"] or "never"}
    parts += ["", out.listed(worker)]
    if any(found["messages"].values()):
        parts += ["", out.listed(found["messages"])]
    if found["search"] and found["search"]["state"] != "complete":
        parts += ["", Text("search for versions that are to be destroyed", "bold")]
        parts.append(out.listed(found["search"]))
    return parts
