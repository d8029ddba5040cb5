"""What a rotation costs as tables and keyrings grow: time, memory, WAL, size on disk."""

import time
from dataclasses import dataclass
from typing import Any

from bench.estate import (
    Estate,
    empty_secrets,
    fill_secrets,
    pg_rekey,
    settle,
    table_bytes,
    value,
    wal_bytes,
    wal_place,
)
from bench.workers import Workers, request
from pg_rekey import db

SIZE = 256
EACH = 1000  # secrets of a keyring, where there are many
STEPS = ((100, 5), (10, 3), (1, 1))  # a hundredth of the rows, five times; a tenth; all of them
CALLS = 4
SMALL_ROUNDS = 10
TICKS = 20
ALL_ROUNDS = 3
NOTES = "bench.notes"


@dataclass(frozen=True)
class Extent:
    """How much of everything."""

    rows: int
    keyrings: int
    column_rows: int


def scale(estate: Estate, extent: Extent) -> dict[str, Any]:
    """Return what was measured, in seconds, bytes and rows; one worker does it all."""
    with estate.database("scale") as connection, Workers(1) as workers:
        results = {
            "size": SIZE,
            **_grow(estate, connection, workers, extent.rows),
            "small": _small(connection, workers, extent.rows),
            "many": _many(connection, workers, extent.rows),
            "keyrings": _keyrings(connection, workers, extent.keyrings),
        }
    with estate.database("column") as connection:
        return results | {"column": _column(connection, extent.column_rows)}


def _grow(estate: Estate, connection: db.Connection, workers: Workers, rows: int) -> dict[str, Any]:
    """Rotate one keyring with more and more secrets; of the last step, time `rotate_keys` alone, too."""
    steps = []
    calls: list[float] = []
    filled = 0
    for part, rounds in STEPS:
        last = part == 1
        fill_secrets(connection, rows // part, SIZE, first=filled + 1)
        filled = rows // part
        settle(connection, "rekey.secrets")
        step: dict[str, Any] = {
            "rows": filled,
            "table_bytes_before": table_bytes(connection, "rekey.secrets"),
        }
        samples = []
        for _ in range(rounds):
            calls = [request(connection, "default", supersede=True)[1] for _ in range(CALLS if last else 0)]
            begin = wal_place(connection)
            rotation = workers.rotate(connection, "default", supersede=last)
            end = wal_place(connection)
            wal = wal_bytes(connection, begin, end)
            calls.append(rotation.call)
            samples.append({
                "seconds": rotation.seconds,
                "server_bytes": rotation.server_bytes,
                "worker_bytes": rotation.worker_bytes,
                "wal_bytes": wal,
                "record_bytes": estate.record_bytes(begin, end, wal),
            })  # fmt: skip
            settle(connection, "rekey.secrets")
        step |= {name: [sample[name] for sample in samples] for name in samples[0]}
        step["table_bytes_after"] = table_bytes(connection, "rekey.secrets")
        steps.append(step)
    return {"steps": steps, "rotate_keys_seconds": calls}


def _small(connection: db.Connection, workers: Workers, others: int) -> dict[str, Any]:
    """Rotate a keyring of few secrets among many of another one."""
    connection.execute("select rekey.create_keyring('small')")
    fill_secrets(connection, others + EACH, SIZE, first=others + 1, keyrings=["small"])
    settle(connection, "rekey.secrets")
    rotations = [workers.rotate(connection, "small") for _ in range(SMALL_ROUNDS)]
    assert all(one.rows == EACH for one in rotations), rotations
    return {"rows": EACH, "others": others, "seconds": [one.seconds for one in rotations]}


def _many(connection: db.Connection, workers: Workers, rows: int) -> dict[str, Any]:
    """Rotate many keyrings at once, whose secrets lie among each other."""
    empty_secrets(connection)
    names = _create_keyrings(connection, max(rows // EACH, 2))
    fill_secrets(connection, rows, SIZE, keyrings=names)
    settle(connection, "rekey.secrets")
    rotation = workers.rotate(connection)
    assert rotation.rows == rows, rotation
    return {"keyrings": len(names), "rows": rows, "seconds": [rotation.seconds]}


def _keyrings(connection: db.Connection, workers: Workers, count: int) -> dict[str, Any]:
    """Time `tick` with nothing due, and `rotate_keys` for all, with many keyrings that hold nothing."""
    empty_secrets(connection)
    _create_keyrings(connection, count - value(connection, "select count(*) from rekey.keyrings"))
    settle(connection)
    connection.execute("call rekey.tick()")  # the census of the day
    ticks = []
    for _ in range(TICKS):
        begun = time.monotonic()
        connection.execute("call rekey.tick()")
        ticks.append(time.monotonic() - begun)
    rotations = [workers.rotate(connection) for _ in range(ALL_ROUNDS)]
    return {
        "keyrings": value(connection, "select count(*) from rekey.keyrings"),
        "tick_seconds": ticks,
        "rotate_keys_seconds": [one.call for one in rotations],
        "carry_out_seconds": [one.seconds for one in rotations],
    }


def _column(connection: db.Connection, rows: int) -> dict[str, Any]:
    """Adopt and rotate a column of a user's table, which has no free space, by `pg-rekey work`."""
    connection.execute(
        f"create table {NOTES} (id bigint generated always as identity primary key, note text)".encode()
    )
    connection.execute(
        f"insert into {NOTES} (note) select bench.value(n, %s) from generate_series(1, %s) n".encode(),
        [SIZE, rows],
    )
    settle(connection, NOTES)
    plain = table_bytes(connection, NOTES)
    connection.execute("select rekey.protect_column(%s, 'note')", [NOTES])
    connection.execute("select rekey.adopt_column(%s, 'note', values_are_tokens => true)", [NOTES])
    adoption = _work(connection, rows)
    settle(connection, NOTES)
    adopted = table_bytes(connection, NOTES)
    connection.execute(f"vacuum (full, analyze) {NOTES}".encode())
    settle(connection)
    full = table_bytes(connection, NOTES)
    connection.execute("select rekey.rotate_keys('default')")
    rotation = _work(connection, rows)
    settle(connection, NOTES)
    return {
        "rows": rows,
        "adoption_seconds": [adoption],
        "rotation_seconds": [rotation],
        "plain_bytes": plain,
        "adopted_bytes": adopted,
        "full_bytes": full,
        "rotated_bytes": table_bytes(connection, NOTES),
    }


def _work(connection: db.Connection, rows: int) -> float:
    """Let `pg-rekey work` do what was asked for; return the seconds between request and completion."""
    pg_rekey("work")
    [done] = connection.execute("""
        select state, rows_done, extract(epoch from finished_at - created_at)::float as seconds
        from rekey.rotation_status order by id desc limit 1""").fetchall()
    assert (done["state"], done["rows_done"]) == ("completed", rows), done
    return float(done["seconds"])


def _create_keyrings(connection: db.Connection, count: int) -> list[str]:
    rows = connection.execute(
        "select (rekey.create_keyring('keyring-' || gen_random_uuid())).name from generate_series(1, %s)",
        [count],
    ).fetchall()
    return [row["name"] for row in rows]
