"""Adoption of values that take a key: the server seals, this side opens what pgcrypto cannot."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import psycopg

from pg_rekey import db, worker
from pg_rekey.errors import LOCKED, Problem
from pg_rekey.formats import Keys, Opened

# Another attempt may succeed; or find the column blocked, whose table and functions were dropped.
PASSING = ("40001", "40P01", "55P03", "57014", "42883", "42P01")
ATTEMPTS = 8
SHOWN_KEYS = 10


@dataclass
class Found:
    """What a dry run found of one format."""

    rows: int = 0
    opens: int = 0
    closed: list[str] = field(default_factory=list)  # the first rows that do not open


def begin(
    connection: db.Connection,
    table: str,
    column: str,
    formats: Sequence[str],
    keys: Keys,
    reason: str | None,
    values_are_tokens: bool,
) -> int:
    """Queue the adoption, or find the one of this column that is under way; return its number."""
    [row] = connection.execute(db.query("adoption under way"), [table, column]).fetchall() or [{}]
    if row:
        asked = (sorted(formats), keys.force, keys.unwrap)
        if (sorted(row["formats"]), row["forced"], row["unwrap"]) != asked:
            off = f", with --unwrap {row['unwrap']}" if row["unwrap"] else ""
            raise Problem(
                f"rotation {row['id']} adopts this column from {', '.join(row['formats'])}{off}",
                "Repeat that command, or let it end first.",
            )
        return int(row["id"])
    with worker.transaction(connection):
        [row] = connection.execute(
            db.query("adopt column"),
            [table, column, list(formats), keys.force, reason, values_are_tokens, keys.unwrap],
        ).fetchall()
    return int(row["id"])


def advance(connection: db.Connection, number: int, keys: Keys) -> Iterator[None]:
    """Take the steps of an adoption until it has ended or somebody paused it."""
    attempts = 0
    locked = False
    steps = worker.Steps(connection)
    while True:
        state = connection.execute(
            "select state, adopts from rekey.rotation_status where id = %s", [number]
        ).fetchone()
        if state is None or state["state"] not in ("queued", "running", "verifying"):
            return
        try:
            # False: nothing is left of this pass, or somebody else has the last of it in hand.
            if state["state"] != "running" or not _batch(connection, steps, number, keys):
                step = steps.take()
                if step["event"] == "locked":
                    raise Problem(f"{step['detail']['error']}: it stays queued", None, LOCKED)
                if step["event"] in ("idle", "waiting", "blocked", "error"):
                    time.sleep(step["wait"].total_seconds() if step["wait"] else 0.2)
            attempts = 0
            if locked:
                locked = False
                click.echo("goes on", err=True)
        except psycopg.errors.LockNotAvailable:
            # Whoever locks a table ends some time: that is waited for.
            if not locked:
                locked = True
                click.echo(f"waits for somebody who locks the table of {state['adopts']}", err=True)
        except psycopg.Error as error:
            attempts += 1
            if error.sqlstate not in PASSING or attempts >= ATTEMPTS:
                raise
            time.sleep(min(2**attempts / 10, 5))
        yield


def doubt(
    connection: db.Connection, table: str, column: str, formats: Sequence[str], values_are_tokens: bool
) -> str | None:
    """Say why the values may not be the plaintext that they are to be taken for, if so."""
    [row] = connection.execute(
        db.query("adoption doubt"), [table, column, list(formats), values_are_tokens]
    ).fetchall()
    return None if row["doubt"] is None else str(row["doubt"])


def preview(
    connection: db.Connection, table: str, column: str, formats: Sequence[str], keys: Keys
) -> dict[str, Found]:
    """Say what an adoption would find, by format; every transaction is taken back."""
    found: dict[str, Found] = {}
    relation: int | None = None
    first = "(0,0)"
    while True:
        with connection.transaction(force_rollback=True):
            _send_passphrases(connection, keys)
            batch = connection.execute(
                db.query("adoption preview"), [table, column, list(formats), keys.force, relation, first]
            ).fetchone()
        assert batch is not None
        _count(batch, keys, found)
        if batch["next"] is None and batch["next_relation"] is None:
            return found
        relation = batch["relation"] if batch["next"] else batch["next_relation"]
        first = batch["next"] or "(0,0)"


def _count(batch: dict[str, Any], keys: Keys, found: dict[str, Found]) -> None:
    """Add the values of a batch to what was found."""
    opened = _open(batch, keys)
    for place, name in enumerate(batch["formats"] or []):
        client = opened.get(place)
        one = found.setdefault(client.format if client else name, Found())
        one.rows += 1
        if (client.plaintext is not None) if client else batch["problems"][place] is None:
            one.opens += 1
        elif len(one.closed) < SHOWN_KEYS:
            one.closed.append(batch["keys"][place])


def _open(batch: dict[str, Any], keys: Keys) -> dict[int, Opened]:
    """Open what the server could not, by place."""
    legacy = batch["legacy"] or []
    places = [place for place, value in enumerate(legacy) if value is not None]
    marks = [batch["formats"][place] for place in places]
    return dict(zip(places, keys.open([legacy[place] for place in places], marks), strict=True))


def _batch(connection: db.Connection, steps: worker.Steps, number: int, keys: Keys) -> bool:
    """Adopt a batch in a transaction; tell whether there was one."""
    with worker.transaction(connection):
        steps.limit()
        _send_passphrases(connection, keys)
        batch = connection.execute(db.query("adoption batch"), [number]).fetchone()
        if batch is None or batch["relation"] is None:
            return False
        opened = [
            (batch["rows"][place], one.plaintext, one.problem) for place, one in _open(batch, keys).items()
        ]
        if opened:
            connection.execute(
                'create temporary table pg_rekey_opened ("row" text, plaintext bytea, problem text)'
                " on commit drop"
            )
            _copy(connection, "pg_rekey_opened", ["text", "bytea", "text"], opened)
            connection.execute(
                "select rekey.adoption_store(%s, %s::oid::regclass)", [number, batch["relation"]]
            )
    return True


def _send_passphrases(connection: db.Connection, keys: Keys) -> None:
    if keys.passphrases:
        connection.execute("create temporary table pg_rekey_passphrases (passphrase bytea) on commit drop")
        _copy(connection, "pg_rekey_passphrases", ["bytea"], [(one,) for one in keys.passphrases])


def _copy(connection: db.Connection, table: str, types: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Fill a temporary table by binary COPY, which no log shows."""
    with (
        connection.cursor() as cursor,
        cursor.copy(f"copy pg_temp.{table} from stdin binary".encode()) as copy,
    ):
        copy.set_types(types)
        for row in rows:
            copy.write_row(row)
