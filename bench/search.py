"""What a blind index costs: `python -m bench.search`. Searchable columns beside plain ones, in one run.

Looking up by equality before, during and after a rotation; writing; and a rotation of a searchable column
beside one that is not. Ratios of one run are what it is for: the machine may be busy.
"""

import json
import random
import statistics
import threading
import time
from typing import Any, LiteralString

import click
import psycopg

from bench.estate import Estate
from pg_rekey import db, worker

TABLES: LiteralString = """
    create table plain (id int primary key, email text, n int default 0);
    create table sealed (id int primary key, email text, n int default 0);
    create table searched (id int primary key, email text, n int default 0);
    create table wide (id int primary key, email text, a int, b int, c int, d int, e int);
    create table wide_sealed (like wide including all);
    create index on wide (a); create index on wide (b); create index on wide (c);
    create index on wide (d); create index on wide (e);
    create index on wide_sealed (a); create index on wide_sealed (b); create index on wide_sealed (c);
    create index on wide_sealed (d); create index on wide_sealed (e);
    select rekey.create_keyring('sealed'), rekey.create_keyring('searched'), rekey.create_keyring('wide'),
      rekey.create_keyring('wide_sealed');
    select rekey.protect_column('sealed', 'email', 'sealed', encrypt_on_write => true),
      rekey.protect_column('searched', 'email', 'searched', encrypt_on_write => true),
      rekey.protect_column('wide', 'email', 'wide', encrypt_on_write => true),
      rekey.protect_column('wide_sealed', 'email', 'wide_sealed', encrypt_on_write => true);
    select rekey.make_searchable('searched', 'email'), rekey.make_searchable('wide', 'email')"""
FILL = "insert into {} (id, email) select g, 'user' || g || '@example.org' from generate_series({}, {}) g"
LOOK_PLAIN: LiteralString = "select id from plain where email = %s"
LOOK: LiteralString = (
    "select id from searched where email_bidx = any (rekey.search('public.searched.email', %s))"
)
SEARCH: LiteralString = "select rekey.search('public.searched.email', %s)"


def name(number: int) -> str:
    return f"user{number}@example.org"


def spread(connection: db.Connection, query: LiteralString, rows: int, loops: int) -> dict[str, float]:
    """Look rows up one by one; return median and 99th percentile in microseconds, and what was missed."""
    times, missed = [], 0
    for _ in range(loops):
        number = random.randrange(1, rows + 1)
        begun = time.perf_counter()
        found = connection.execute(query, [name(number)]).fetchall()
        times.append(time.perf_counter() - begun)
        missed += "id" in query[:9] and [row["id"] for row in found] != [number]
    times.sort()
    return {
        "median": statistics.median(times) * 1e6,
        "p99": times[int(len(times) * 0.99)] * 1e6,
        "missed": missed,
    }


def seconds(connection: db.Connection, statement: str) -> float:
    begun = time.perf_counter()
    connection.execute(statement.encode())
    return time.perf_counter() - begun


def rotate(connection: db.Connection, keyring: str) -> dict[str, float]:
    """Rotate a keyring with one worker; return seconds, bytes of WAL and of the table after VACUUM."""
    connection.execute("vacuum analyze")
    connection.execute("checkpoint")
    before = connection.execute("select pg_current_wal_lsn() as lsn").fetchone()
    steps = worker.Steps(connection, fast=True)
    begun = time.perf_counter()
    connection.execute("select from rekey.rotate_keys(%s)", [keyring])
    while (step := steps.take())["event"] != "idle":
        if step["wait"] is not None:
            time.sleep(step["wait"].total_seconds())
    took = time.perf_counter() - begun
    assert before is not None
    after = connection.execute(
        "select pg_wal_lsn_diff(pg_current_wal_lsn(), %s)::bigint as wal", [before["lsn"]]
    ).fetchone()
    connection.execute(f"vacuum {keyring}".encode())
    size = connection.execute("select pg_total_relation_size(%s::regclass) as size", [keyring]).fetchone()
    assert after is not None
    assert size is not None
    return {"seconds": took, "wal": after["wal"], "size": size["size"]}


def measure(estate: Estate, rows: int, loops: int, rounds: int) -> dict[str, Any]:
    """Return what was measured."""
    with estate.database("search") as connection:
        connection.execute(TABLES)
        result: dict[str, Any] = {"rows": rows}
        _work(threading.Event())
        result["insert"] = {
            table: seconds(connection, FILL.format(table, 1, rows))
            for table in ("plain", "sealed", "searched", "wide", "wide_sealed")
        }
        connection.execute("create unique index on plain (email)")
        connection.execute(
            "create unique index on searched (email_bidx); create unique index on wide (email_bidx)"
        )
        connection.execute("vacuum analyze")
        looks = result["look"] = {
            "plain": spread(connection, LOOK_PLAIN, rows, loops),
            "search alone": spread(connection, SEARCH, rows, loops),
            "before": spread(connection, LOOK, rows, loops),
        }
        connection.execute("select from rekey.rotate_keys('searched')")
        looks["begun"] = spread(connection, LOOK, rows, loops)
        looks["search alone, two versions"] = spread(connection, SEARCH, rows, loops)
        result["insert"]["searched, in a rotation"] = seconds(
            connection, FILL.format("searched", rows + 1, 2 * rows)
        )
        connection.execute("delete from searched where id > %s", [rows])
        stop = threading.Event()
        thread = threading.Thread(target=_work, args=(stop,))
        thread.start()
        looks["during"] = spread(connection, LOOK, rows, loops)
        looks["plain, during"] = spread(connection, LOOK_PLAIN, rows, loops)
        thread.join()
        looks["after"] = spread(connection, LOOK, rows, loops)
        for keyring in ("sealed", "searched", "wide_sealed", "wide") * rounds:
            result.setdefault("rotation", {}).setdefault(keyring, []).append(rotate(connection, keyring))
        return result


def _work(stop: threading.Event) -> None:
    with worker.connect() as connection:
        steps = worker.Steps(connection, fast=True)
        while not stop.is_set() and (step := steps.take())["event"] != "idle":
            if step["wait"] is not None:
                time.sleep(step["wait"].total_seconds())


@click.command()
@click.option("--rows", default=100_000, show_default=True)
@click.option("--loops", default=3000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(rows: int, loops: int, rounds: int) -> None:
    """Measure what a blind index costs, and print it as JSON."""
    with Estate.started() as estate, psycopg.connect(estate.server.dsn()) as connection:
        version = connection.info.parameter_status("server_version")
        print(json.dumps({"postgres": version} | measure(estate, rows, loops, rounds), indent=1))


if __name__ == "__main__":
    main()
