"""What readers and writers notice of a rotation: latency at a fixed rate, before, during, afterwards."""

import itertools
import math
import multiprocessing
import random
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import Any, Self

import psycopg

from bench.estate import Estate, fill_secrets, settle, table_bytes, wal_bytes, wal_place
from bench.figures import p99
from bench.workers import Workers
from pg_rekey import worker

SIZE = 256
KINDS = {"read": (2, 100.0), "write": (2, 25.0)}  # processes, and calls a second of each
WINDOW = 0.5  # seconds of a point of the plot
PACED = "paced"  # the keyring that is rotated with max_rows_per_second


@dataclass(frozen=True)
class Load:
    """How much of everything; the rate is the throttle's, in rows a second, of a keyring of its own."""

    rows: int
    paced_rows: int
    seconds: float
    rounds: int
    rate: int


@dataclass
class Record:
    """What one client did: when each call was due, how long after that it ended, and what went wrong."""

    kind: str
    due: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def impact(estate: Estate, load: Load) -> dict[str, Any]:
    """Return the latencies of each round by phase, in seconds, and what became of WAL and table."""
    with estate.database("impact") as connection, Workers(1) as workers:
        connection.execute("select rekey.create_keyring(%s)", [PACED])
        fill_secrets(connection, load.rows, SIZE)
        last = load.rows + load.paced_rows
        fill_secrets(connection, last, SIZE, first=load.rows + 1, keyrings=[PACED])
        settle(connection, "rekey.secrets")
        before = table_bytes(connection, "rekey.secrets")
        rounds: list[dict[str, Any]] = []
        with Clients(last) as clients:
            for _ in range(load.rounds):
                spans: dict[str, tuple[float, float]] = {}
                settle(connection, "rekey.secrets")
                with _span(spans, "idle"):
                    time.sleep(load.seconds)
                first = wal_place(connection)
                rotated = 0
                with _span(spans, "rotation"):
                    until = time.monotonic() + load.seconds
                    while time.monotonic() < until:
                        rotated += workers.rotate(connection, "default").rows
                end = wal_place(connection)
                connection.execute("select rekey.set_setting('min_pace', '1')")
                fast = 0
                with _span(spans, "fast"):
                    until = time.monotonic() + load.seconds
                    while time.monotonic() < until:
                        fast += workers.rotate(connection, "default").rows
                connection.execute("select rekey.set_setting('min_pace', null)")
                settle(connection, "rekey.secrets")
                with Probe() as probe:
                    workers.rotate(connection, "default")
                settle(connection, "rekey.secrets")
                with _span(spans, "after"):
                    time.sleep(load.seconds)
                connection.execute("select rekey.set_setting('max_rows_per_second', %s)", [str(load.rate)])
                with _span(spans, "throttled"):
                    throttled = workers.rotate(connection, PACED)
                connection.execute("select rekey.set_setting('max_rows_per_second', null)")
                settle(connection, "rekey.secrets")
                with _span(spans, "bare"):
                    connection.execute("call bench.update_at_pace(%s, %s)", [load.rate, load.seconds])
                rounds.append(
                    {
                        "spans": spans,
                        "rotated_rows": rotated,
                        "rows_per_second": {
                            "rotation": rotated / _seconds(spans["rotation"]),
                            "fast": fast / _seconds(spans["fast"]),
                        },
                        "locked_seconds": probe.seconds,
                        "wal_bytes": wal_bytes(connection, first, end),
                        "throttled_rows_per_second": throttled.rows / throttled.sweep,
                    }
                )
            records = clients.stop()
        settle(connection, "rekey.secrets")
        after = table_bytes(connection, "rekey.secrets")
    timeline = _timeline(records, rounds[-1]["spans"])
    for one in rounds:
        one["calls"] = _latencies(records, one.pop("spans"))
    return {
        "rows": load.rows,
        "rates": {kind: count * rate for kind, (count, rate) in KINDS.items()},
        "throttle": load.rate,
        "timeline": timeline,
        "rounds": rounds,
        "table_bytes_before": before,
        "table_bytes_after": after,
        "errors": sum(len(record.errors) for record in records),
        "error_messages": sorted({error for record in records for error in record.errors})[:5],
    }


class Clients(AbstractContextManager["Clients"]):
    """The readers and writers, each a process with a session of its own."""

    def __init__(self, rows: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._running: list[tuple[BaseProcess, Pipe]] = []
        for kind, (count, rate) in KINDS.items():
            for number in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_client, args=(kind, rows, rate, number / count, self._stop, theirs), daemon=True
                )
                process.start()
                theirs.close()
                self._running.append((process, ours))
        for _, pipe in self._running:
            pipe.recv()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for process, pipe in self._running:
            pipe.close()
            process.join()

    def stop(self) -> list[Record]:
        """End them, and return what they did."""
        self._stop.set()
        return [pipe.recv() for _, pipe in self._running]


def _client(kind: str, rows: int, rate: float, offset: float, stop: Event, pipe: Pipe) -> None:
    """Read or write a secret each time that it is due, however long the last one took, until told to stop."""
    record = Record(kind)
    dice = random.Random(offset)
    with worker.connect() as connection:
        connection.execute("set application_name = 'bench'")  # whom workers give way to
        pipe.send("ready")
        begun = time.monotonic() + offset / rate
        for number in itertools.count():
            due = begun + number / rate
            if stop.wait(max(0.0, due - time.monotonic())):
                break
            name = f"secret-{dice.randint(1, rows)}"
            try:
                if kind == "write":
                    connection.execute("select rekey.set_secret(%s, %s)", [name, f"{number:0{SIZE}}"])
                else:
                    connection.execute("select rekey.get_secret(%s)", [name])
            except psycopg.Error as error:
                record.errors.append(" ".join(str(error).split()))
            record.due.append(due)
            record.seconds.append(time.monotonic() - due)
    pipe.send(record)


class Probe(AbstractContextManager["Probe"]):
    """Updates rows that a sweep is about to lock, one after the other, and times it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        dice = random.Random(1)
        with worker.connect() as connection:
            while not self._stop.is_set():
                rows = connection.execute(
                    "select first from rekey._chunks where kind = 'sweep' order by id limit 1"
                ).fetchall()
                if rows:
                    near = connection.execute(
                        "select id from rekey.secrets where ctid >= %s::tid limit 1000", [rows[0]["first"]]
                    ).fetchall()
                    if near:
                        begun = time.monotonic()
                        connection.execute(
                            "update rekey.secrets set description = null where id = %s",
                            [dice.choice(near)["id"]],
                        )
                        self.seconds.append(time.monotonic() - begun)


def _seconds(span: tuple[float, float]) -> float:
    begin, end = span
    return end - begin


@contextmanager
def _span(spans: dict[str, tuple[float, float]], phase: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    spans[phase] = (begun, time.monotonic())


def _timeline(records: list[Record], spans: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Return the 99th percentiles before, during and after a rotation, by kind, each of half a second."""
    begun = spans["idle"][0]
    phases = ("idle", "rotation", "after")
    return {
        kind: [
            {
                "phase": phase,
                "second": place * WINDOW,
                "p99": p99(calls) if len(calls) > 1 else None,
            }
            for phase in phases
            for place in range(
                math.ceil((spans[phase][0] - begun) / WINDOW), int((spans[phase][1] - begun) / WINDOW)
            )
            for calls in [
                [
                    seconds
                    for record in records
                    if record.kind == kind
                    for due, seconds in zip(record.due, record.seconds, strict=True)
                    if place * WINDOW <= due - begun < (place + 1) * WINDOW
                ]
            ]
        ]
        for kind in KINDS
    }


def _latencies(
    records: list[Record], spans: dict[str, tuple[float, float]]
) -> dict[str, dict[str, list[float]]]:
    """Return the latencies of the calls that were due in each phase, by kind."""
    return {
        phase: {
            kind: sorted(
                round(seconds, 6)
                for record in records
                if record.kind == kind
                for due, seconds in zip(record.due, record.seconds, strict=True)
                if begin <= due < end
            )
            for kind in KINDS
        }
        for phase, (begin, end) in spans.items()
    }
