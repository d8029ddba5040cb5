"""`pg-rekey notify`: who is told what happens."""

import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from pg_rekey import db
from pg_rekey.cli.base import (
    InputPath,
    Output,
    confirm,
    database,
    fetch,
    fetch_one,
    output,
    private_text,
    scalar,
    yes_option,
)
from pg_rekey.cli.commands import Group
from pg_rekey.cli.parameters import ENDPOINT
from pg_rekey.errors import USAGE, Problem
from pg_rekey.notify import addresses
from pg_rekey.notify.addresses import Undelivered
from pg_rekey.notify.deliver import Courier, beginning
from pg_rekey.notify.email import Mailbox


@click.group(cls=Group)
def notify() -> None:
    """Endpoints: who is told of rotations that complete, fail or are held up, and of what else matters."""


@notify.command(example="pg-rekey notify add on-call --slack --file slack-address")
@click.argument("name")
@click.option("--file", "path", type=InputPath, help="Take the address from this file.")
@click.option("--event", "events", multiple=True, help="Only this event. Repeat it for others.")
@click.option("--slack", is_flag=True, help="A webhook of Slack, or of what takes the same body.")
@click.option(
    "--allow-private", is_flag=True, help="Its address may be private or loopback, and there without TLS."
)
@click.option(
    "--pg-net", "by_pg_net", is_flag=True, help="pg_net may send to it; it keeps the address in plain."
)
@database(unlocked=True)
def add(
    connection: db.Connection,
    out: Output,
    name: str,
    path: Path | None,
    events: tuple[str, ...],
    slack: bool,
    allow_private: bool,
    by_pg_net: bool,
) -> None:
    """Add an endpoint. Its address comes from a file, or standard input: it is a secret.

    https://... is a webhook, signed as Standard Webhooks has it; its secret is printed, once.
    smtps://USER:PASSWORD@HOST:465?from=SENDER&to=RECIPIENT is e-mail, smtp:// the same with STARTTLS.
    notify:CHANNEL is NOTIFY in the database. The address is kept in the database, under the KEK.

    Events: rotation.completed, rotation.failed, rotation.blocked, rotation.row_failed, keyring.overdue,
    key.compromised, key.destruction_due, kek.lost, kek.missing, kek.back, worker.silent, worker.back.
    """
    address = private_text(path, "Address").strip()
    _look_at(address, allow_private)
    db.copy_rows(connection, db.ENDPOINT, [[address]])
    given = [name, list(events) or None, slack, allow_private, by_pg_net]
    secret = scalar(connection, db.query("add endpoint"), *given)
    connection.execute(db.ENDPOINT.drop)
    shown = f"\nIts signing secret, which is not shown again: {secret}" if secret else ""
    out.done(f"endpoint {name} added{shown}", name=name, secret=secret)


def _look_at(address: str, allow_private: bool) -> None:
    """Refuse an address that the worker would refuse; what is wrong in it otherwise the database says."""
    try:
        parts = urlsplit(address)
        if parts.scheme.startswith("smtp"):
            Mailbox.parse(address)
        if parts.scheme != "notify" and not (parts.hostname and parts.port != 0):
            raise ValueError
        if parts.hostname:
            addresses.refuse(parts.hostname, allow_private=allow_private)
    except Undelivered as problem:
        raise Problem(str(problem), "If that is meant: --allow-private.", USAGE) from None
    except ValueError:
        hint = "It is https://..., smtps://USER:PASSWORD@HOST?from=...&to=..., or notify:CHANNEL."
        raise Problem("the address is no URL", hint, USAGE) from None


@notify.command("list", example="pg-rekey notify list")
@database()
def list_(connection: db.Connection, out: Output) -> None:
    """List the endpoints, and whether messages get there. Addresses are not shown."""
    columns = ("name", "kind", "events", "waiting", "dead", "last_delivered_at", "failing_since", "problem")
    out.table(fetch(connection, db.query("endpoints")), columns, empty="no endpoints")


@notify.command(example="pg-rekey notify messages --state dead")
@click.option("--endpoint", type=ENDPOINT, metavar="NAME", help="Only to this endpoint.")
@click.option("--state", type=click.Choice(["waiting", "delivered", "dead"]), help="Only in this state.")
@click.option(
    "--limit", type=click.IntRange(1), default=50, show_default=True, help="How many of the newest."
)
@database()
def messages(
    connection: db.Connection, out: Output, endpoint: str | None, state: str | None, limit: int
) -> None:
    """List messages, newest first: those that wait, and the last ones that were delivered or given up."""
    given: dict[str, Any] = {"endpoint": endpoint, "state": state, "before": None, "limit": limit}
    columns = ("id", "endpoint", "event", "text", "created_at", "state", "attempts", "last_error")
    rows = connection.execute(db.query("messages"), given).fetchall()
    out.table(rows, columns, empty="no messages")


@notify.command(example="pg-rekey notify test on-call")
@click.argument("name", type=ENDPOINT)
@output
def test(out: Output, name: str) -> None:
    """Send a test to an endpoint, from here, and say whether it got there."""
    with db.connect(autocommit=True) as connection:
        begin = beginning(connection)
        with begin(True):
            message = scalar(connection, "select rekey.test_endpoint(%s)", name)
        # What goes to a channel, the database itself sends.
        connection.execute("select rekey._tick_duty('notifications', now())")
        known = Courier(lambda *_, **__: None).deliver(begin, threading.Event(), only=name)
        found = fetch_one(
            connection, "select state, last_error from rekey.message_status where id = %s", message
        )
    if found["state"] != "delivered":
        missed = "another process is sending to it" if known else "its address cannot be opened here"
        why = found["last_error"] or missed
        raise Problem(f"endpoint {name} did not get it: {why}", "It is tried again by `pg-rekey work`.")
    out.done(f"endpoint {name} got it", name=name, **found)


@notify.command(example="pg-rekey notify remove on-call")
@click.argument("name", type=ENDPOINT)
@yes_option
@database()
def remove(connection: db.Connection, out: Output, name: str, yes: bool) -> None:
    """Remove an endpoint; messages that wait for it are dropped."""
    confirm(connection, f"Remove endpoint {name}?", yes)
    connection.execute("select rekey.remove_endpoint(%s)", [name])
    out.done(f"endpoint {name} removed", name=name)
