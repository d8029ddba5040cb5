"""`make bench ARGS="--against REV"`: this SQL and that of a revision, in two databases, taking turns."""

import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.estate import Estate, fill_columns, fill_secrets, settle, value
from pg_rekey import db, release, worker

SIZE = 256
EACH = 10  # rows of a table, and partitions to a row


@dataclass(frozen=True)
class Contest:
    """How much of everything."""

    tables: int
    partitions: int
    secrets: int
    calls: int
    rounds: int


def script(revision: str) -> str:
    """Return the installation script that was committed at a revision."""
    found = re.search(r"default_version = '([^']+)'", _show(f"{revision}:sql/pg_rekey.control"))
    assert found, f"{revision} names no version"
    return _show(f"{revision}:sql/dist/pg_rekey--{found[1]}.sql").removeprefix(release.EXTENSION_GUARD)


def against(estate: Estate, revision: str, contest: Contest) -> dict[str, Any]:
    """Return the seconds of each round, of this SQL (now) and that revision's (then), by what was done."""
    estate.install("bench_then", script(revision))
    with estate.database("now") as now, estate.database("then", "bench_then") as then:
        sides = {"now": Side(now, contest), "then": Side(then, contest)}
        # What leaves tables behind comes last.
        deeds: dict[str, Callable[[Side], Iterator[tuple[str, float]]]] = {
            "secrets": Side.rotate_secrets,
            "partitions": Side.rotate_partitions,
            "protect": Side.protect,
            "tables": Side.rotate_tables,
            "calls": Side.call,
            "columns": Side.use_columns,
            "adopt": Side.adopt,
        }
        seconds: dict[str, dict[str, list[float]]] = {}
        for name, deed in deeds.items():
            for number in range(1 if name == "protect" else contest.rounds):
                for side in random.Random(number).sample(sorted(sides), len(sides)):
                    for what, took in deed(sides[side]):
                        seconds.setdefault(what, {one: [] for one in sides})[side].append(took)
    return {"revision": revision, "seconds": seconds}


class Side:
    """A database of the contest."""

    def __init__(self, connection: db.Connection, contest: Contest) -> None:
        self.connection = connection
        self.contest = contest
        self.steps = worker.Steps(connection)
        self.filled = False
        connection.execute("create schema many")
        connection.execute("set client_min_messages = error")
        fill_secrets(connection, contest.secrets, SIZE)
        self._partitions()
        settle(connection)

    def rotate_secrets(self) -> Iterator[tuple[str, float]]:
        """Rotate rekey.secrets, beside a table whose partitions are nearly all empty."""
        yield f"rotation of {self.contest.secrets:,} secrets of {SIZE} bytes", self._rotate("default")["all"]

    def rotate_partitions(self) -> Iterator[tuple[str, float]]:
        """Rotate a table of many partitions with few rows."""
        took = self._rotate("parts")
        rows = self.contest.partitions // EACH
        table = f"a table of {self.contest.partitions:,} partitions, {rows:,} rows"
        yield f"{table}: planning", took["planned"]
        yield "its sweep, a row", took["batch"] / rows
        yield "its verification", took["completed"]

    def protect(self) -> Iterator[tuple[str, float]]:
        """Protect many tables, and fill them; time some of the first, and some of the last."""
        self.connection.execute("select rekey.create_keyring('many')")
        took = [self._protect(f"many.t{n}", "many") for n in range(self.contest.tables)]
        for n in range(self.contest.tables):
            self._fill(f"many.t{n}", "many", 1, EACH)
        self._protect("many.whole", "whole")
        self._fill("many.whole", "whole", 1, EACH * self.contest.tables)
        settle(self.connection)
        few = max(len(took) // 20, 1)
        for place in (few, len(took) - few):
            around = took[place - few : place + few]
            yield f"`protect_column` no. {place + 1:,}", sum(around) / len(around)

    def rotate_tables(self) -> Iterator[tuple[str, float]]:
        """Rotate one table, and as many rows in many tables."""
        rows, tables = EACH * self.contest.tables, self.contest.tables
        yield f"rotation of a table of {rows:,} rows", self._rotate("whole")["all"]
        yield f"rotation of {tables:,} tables of {EACH} rows", self._rotate("many")["all"]

    def call(self) -> Iterator[tuple[str, float]]:
        """Call what is called most, many columns being protected."""
        self.connection.execute("call rekey.tick()")  # the census of the day
        for what, statement in (
            ("`tick`, idle", "call rekey.tick()"),
            ("`get_secret`", "select rekey.get_secret('secret-1')"),
        ):
            begun = time.monotonic()
            for _ in range(self.contest.calls):
                self.connection.execute(statement.encode())
            yield what, (time.monotonic() - begun) / self.contest.calls

    def use_columns(self) -> Iterator[tuple[str, float]]:
        """Read and write a protected column, many rows in a statement."""
        rows = self.contest.secrets // 50
        if not self.filled:
            fill_columns(self.connection, rows, SIZE)
            self.filled = True
        settle(self.connection, "bench.sealed", "bench.plain")
        for what, statement in (
            (f"a decrypted view of {rows:,} rows, a row", "select count(v) from bench.sealed_decrypted"),
            ("an UPDATE of them, encrypted on write", "update bench.sealed set v = bench.value(id, 256)"),
            ("the same UPDATE of plain values", "update bench.plain set v = bench.value(id, 256)"),
        ):
            begun = time.monotonic()
            self.connection.execute(statement.encode())
            yield what, (time.monotonic() - begun) / rows

    def adopt(self) -> Iterator[tuple[str, float]]:
        """Adopt a table beside many that are protected."""
        number = value(self.connection, "select count(*) from rekey.protected_columns")
        table = f"many.adopted{number}"
        self._protect(table, "many")
        self.connection.execute(
            f"insert into {table} select g, 'plain ' || g from generate_series(1, {EACH}) g".encode()
        )
        begun = time.monotonic()
        self.connection.execute("select rekey.adopt_column(%s, 'v', values_are_tokens => true)", [table])
        self._drain()
        yield f"adoption of {EACH} rows beside {self.contest.tables:,} columns", time.monotonic() - begun

    def _partitions(self) -> None:
        self.connection.execute("select rekey.create_keyring(n) from unnest('{parts,whole}'::text[]) n")
        self.connection.execute(
            "create table many.parts (id int primary key, v text) partition by range (id)"
        )
        for n in range(self.contest.partitions):
            bounds = f"for values from ({n}) to ({n + 1})"
            self.connection.execute(f"create table many.part{n} partition of many.parts {bounds}".encode())
        self.connection.execute("select rekey.protect_column('many.parts', 'v', 'parts')")
        for n in range(self.contest.partitions // EACH):
            self._fill("many.parts", "parts", n * EACH, n * EACH)

    def _protect(self, table: str, keyring: str) -> float:
        self.connection.execute(f"create table {table} (id int primary key, v text)".encode())
        begun = time.monotonic()
        self.connection.execute("select rekey.protect_column(%s, 'v', %s)", [table, keyring])
        return time.monotonic() - begun

    def _fill(self, table: str, keyring: str, first: int, last: int) -> None:
        self.connection.execute(
            f"insert into {table} select g, rekey.encrypt_text('value ' || g, '{keyring}',"
            f" array['{table}.v', g::text]) from generate_series({first}, {last}) g".encode()
        )

    def _rotate(self, keyring: str) -> dict[str, float]:
        """Rotate a keyring; return the seconds of all of it, and of the steps of each kind."""
        begun = time.monotonic()
        rows = self.connection.execute("select id from rekey.rotate_keys(%s)", [keyring]).fetchall()
        took = self._drain()
        took["all"] = time.monotonic() - begun
        done = value(self.connection, "select state from rekey.rotation_status where id = %s", rows[0]["id"])
        assert done == "completed", done
        settle(self.connection)
        return took

    def _drain(self) -> dict[str, float]:
        took: dict[str, float] = {}
        while True:
            begun = time.monotonic()
            step = self.steps.take()
            event = step["event"]
            took[event] = took.get(event, 0) + time.monotonic() - begun
            if event == "idle":
                return took
            assert event not in ("error", "canceled", "locked"), step["detail"]
            if step["wait"] is not None:
                time.sleep(step["wait"].total_seconds())


def _show(what: str) -> str:
    return subprocess.run(
        ["git", "show", what], cwd=release.ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
