"""The worker: does what is due, batch by batch, where pg_cron or the KEK is not in the server."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import click
import psycopg

from pg_rekey import db
from pg_rekey.errors import LOCKED, Problem
from pg_rekey.notify.deliver import Courier, beginning
from pg_rekey.vacuum import Vacuum

TICK_SECONDS = 10.0
LONGEST_PAUSE = 30.0
# Seconds until a worker of a crew that found nothing to do looks again.
IDLE = 1.0
# Seconds that a batch in hand has where all is to end at once.
GRACE = 5.0
# Seconds that a worker which ends waits for messages to be delivered: as long as one takes at most, and some.
LAST_DELIVERY = 25.0
QUIET = ("waiting", "idle")


def connect() -> db.Connection:
    """Connect for work of many transactions, each of them begun by transaction(), in autocommit mode."""
    connection = db.connect(autocommit=True)
    try:
        if db.is_pooled(connection):
            with transaction(connection):
                pass  # says at once whether the KEK is right
        else:
            # Counting every row of a large table is one statement.
            connection.execute("set statement_timeout = 0")
            # As autovacuum does: nobody is to notice.
            connection.execute("set vacuum_cost_delay = '2 ms'")
            if db.in_environment():
                db.unlock(connection, scope="session")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(connection: db.Connection) -> Iterator[None]:
    """Begin a transaction that has the KEK; behind a pooler, for itself alone: sessions serve others too."""
    pooled = db.is_pooled(connection)
    with connection.transaction():
        if pooled:
            connection.execute("set local statement_timeout = 0")
            if db.in_environment():
                db.unlock(connection)
        yield


class Steps:
    """Steps of the rotations under way, each in a transaction of its own; now and then a vacuum between.

    fast: they give way to nobody but to who waits for their locks. beside: those of another worker in this
    process, which are as fast.
    """

    def __init__(
        self, connection: db.Connection, *, fast: bool = False, beside: "Steps | None" = None
    ) -> None:
        self._connection = connection
        self._fast: bool = beside._fast if beside else fast
        self._vacuum: Vacuum = Vacuum(connection, beside._vacuum if beside else None)
        self.refresh()

    def refresh(self) -> None:
        """Heed what the setting step_limit is now."""
        [row] = self._connection.execute(db.query("step limit")).fetchall()
        self._limit = f"{row['milliseconds']} ms"

    def take(self) -> dict[str, Any]:
        """Take one."""
        # A trigger may sleep in a batch; what reads whole tables takes long for good reason.
        row = self._take(whole=False)
        if row["event"] == "whole":
            row = self._take(whole=True)
        if row["event"] == "batch" and row["rows"]:
            self._vacuum.swept(row["detail"]["relation"], row["rows"])
        return row

    def _take(self, *, whole: bool) -> dict[str, Any]:
        with transaction(self._connection):
            # A crash takes back some batches, rows and progress together; what is audited waits for the disk.
            self._connection.execute("set local synchronous_commit = off")
            if not whole:
                self.limit()
            [row] = self._connection.execute(
                "select * from rekey.rotation_step(%s, case when %s then '' else rekey.who_else() end)",
                [whole, self._fast],
            ).fetchall()
            return row

    def limit(self) -> None:
        """Have the server cancel statements of this transaction that take too long for a batch."""
        self._connection.execute("select set_config('statement_timeout', %s, true)", [self._limit])


def _do(connection: db.Connection, duty: str, begun: datetime) -> str | None:
    with transaction(connection):
        [row] = connection.execute("select rekey._tick_duty(%s, %s) as next", [duty, begun]).fetchall()
    return None if row["next"] is None else str(row["next"])


def search(connection: db.Connection) -> dict[str, Any]:
    """Take a step of the search for versions that are to be destroyed, as the role of the connection."""
    with transaction(connection):
        [row] = connection.execute("select * from rekey.search_step()").fetchall()
    return row


def held_up(connection: db.Connection, ids: list[int] | None = None) -> list[dict[str, Any]]:
    """Return the rotations that failed or have failures, and the tables that held them up."""
    return connection.execute(db.query("held up"), [ids, ids]).fetchall()


def log(event: str, **fields: Any) -> None:
    """Print a JSON log line."""
    line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
    line |= {name: value for name, value in fields.items() if value is not None}
    click.echo(json.dumps(line, default=str, ensure_ascii=False))


class Report:
    """What a worker says of its work: a JSON log line for each event."""

    def event(self, event: str, **fields: Any) -> None:
        """Say what happened."""
        log(event, **fields)

    def look(self, connection: db.Connection) -> None:
        """Have a look at how far everything is, between two steps."""


class Crew:
    """Workers beside the one of this thread, each with its own connection, while a `with` statement lasts.

    steps: those of this thread. workers: how many they are, this one included. tell: gets events, with the
    number of the worker (2 and so on) as `worker`, from one thread at a time.

    Who loses the connection says so, and connects again; the others go on meanwhile. At the end each ends
    after the batch in hand; where an error or Ctrl-C is the reason, GRACE seconds later at most.
    """

    def __init__(self, steps: Steps, workers: int, tell: Callable[..., None]) -> None:
        self._steps = steps
        self._tell_one = tell
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._connections: dict[int, db.Connection] = {}
        # Daemons: whoever presses Ctrl-C twice does not wait for them.
        self._threads = [
            threading.Thread(target=self._run, args=[number], daemon=True) for number in range(2, workers + 1)
        ]
        self.batches = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stop.set()
        until = time.monotonic() + GRACE
        for thread in self._threads:
            thread.join(None if kind is None else max(0.0, until - time.monotonic()))
        for connection in list(self._connections.values()):
            with suppress(psycopg.Error):
                connection.cancel_safe()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        pause = 1.0
        while not self._stop.is_set():
            try:
                with connect() as connection:
                    self._connections[number] = connection
                    self._tell("connected", worker=number, database=connection.info.dbname)
                    pause = 1.0
                    self._work(Steps(connection, beside=self._steps), number)
            except (psycopg.Error, Problem) as error:
                if not self._stop.is_set():
                    self._tell("error", worker=number, error=_one_line(error), retry_in=pause)
                    self._stop.wait(pause)
                    pause = min(pause * 2, LONGEST_PAUSE)
            finally:
                self._connections.pop(number, None)

    def _work(self, steps: Steps, number: int) -> None:
        refreshed = time.monotonic()
        while not self._stop.is_set():
            begun = time.monotonic()
            if begun > refreshed + TICK_SECONDS:
                refreshed = begun
                steps.refresh()
            done = steps.take()
            event = done["event"]
            if event == "batch":
                with self._lock:
                    self.batches += 1
            if event not in (*QUIET, "locked"):  # without the KEK the first worker ends, or says so
                self._tell(event, worker=number, **_fields(done, begun))
            if event in ("idle", "locked"):
                self._stop.wait(IDLE)
            elif done["wait"] is not None:
                self._stop.wait(done["wait"].total_seconds())

    def _tell(self, event: str, **fields: Any) -> None:
        with self._lock:
            self._tell_one(event, **fields)


def _fields(done: dict[str, Any], begun: float) -> dict[str, Any]:
    """Return what there is to say of a step, which was begun at that time of time.monotonic()."""
    return {
        "rows": done["rows"],
        "keyrings": done["keyring_count"],
        "milliseconds": round((time.monotonic() - begun) * 1000),
        **(done["detail"] or {}),
    }


class Post:
    """Delivers messages to endpoints, in a thread beside the work: who is slow to answer holds up nothing."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._courier = Courier(tell)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def deliver(self) -> None:
        """Have delivered what waits."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._deliver, daemon=True)
            self._thread.start()

    def end(self, *, at_once: bool) -> None:
        """Let it deliver what it can, or only the message in hand."""
        if self._thread is not None:
            if not at_once:
                self._thread.join(LAST_DELIVERY)
            self._stop.set()
            # The message in hand: ended after it was sent, it would be sent again.
            self._thread.join(LAST_DELIVERY)

    def _deliver(self) -> None:
        try:
            with db.connect(autocommit=True, quiet=True) as connection:
                self._courier.deliver(beginning(connection), self._stop)
        except (psycopg.Error, Problem) as error:
            self._tell("error", error=_one_line(error))


class Worker:
    """Does the duties of rekey.tick() in steps that it can end between."""

    def __init__(
        self,
        *,
        forever: bool,
        report: Report,
        workers: int = 1,
        fast: bool = False,
        health_file: Path | None = None,
    ) -> None:
        self._forever = forever
        self._fast = fast
        self._workers = workers
        self._report = report
        self._health_file = health_file
        self._stop = threading.Event()
        self._post = Post(report.event)
        self._batches = 0
        self._pause = 1.0
        self.held_up: list[dict[str, Any]] = []  # rotations that ended failed, or with failures, meanwhile

    def stop(self, *_: object) -> None:
        """End after the batch in hand."""
        self._stop.set()

    def run(self) -> None:
        """Work until everything is done or, forever, until told to stop, and reconnect."""
        with _on_signal(self.stop):
            connected = False
            while not self._stop.is_set():
                try:
                    with connect() as connection:
                        connected = True
                        self._report.event("connected", database=connection.info.dbname)
                        self._work_with_others(connection)
                except (psycopg.Error, Problem) as error:
                    # A worker that once worked outlives a KEK rotation, a failover, whatever comes.
                    if not self._forever or not (connected or isinstance(error, psycopg.OperationalError)):
                        raise
                    self._report.event("error", error=_one_line(error), retry_in=self._pause)
                    self._stop.wait(self._pause)
                    self._pause = min(self._pause * 2, LONGEST_PAUSE)
                else:
                    break
            self._post.end(at_once=self._stop.is_set())
            self._report.event("stopped", batches=self._batches)

    def _work_with_others(self, connection: db.Connection) -> None:
        steps = Steps(connection, fast=self._fast)
        crew = Crew(steps, self._workers, self._report.event)
        try:
            with crew:
                self._work(connection, steps)
        finally:
            self._batches += crew.batches

    def _work(self, connection: db.Connection, steps: Steps) -> None:
        before = {(row["id"], row["state"]) for row in held_up(connection)}
        while not self._stop.is_set():
            steps.refresh()
            [clock] = connection.execute("select clock_timestamp() as now").fetchall()
            begun = clock["now"]
            until = time.monotonic() + TICK_SECONDS
            _do(connection, "schedules", begun)
            done = self._destroy(connection, begun, until)
            _do(connection, "census", begun)
            idle = self._sweep(connection, steps, time.monotonic() + TICK_SECONDS) and done
            _do(connection, "end", begun)
            if _do(connection, "notifications", begun):
                self._post.deliver()
            if idle and not self._forever:
                self.held_up = [row for row in held_up(connection) if (row["id"], row["state"]) not in before]
                for row in self.held_up:
                    self._report.event("held up", **row)
                [progress] = connection.execute(db.query("progress"), [None, None]).fetchall()
                if progress["paused"]:
                    self._report.event("paused", rotations=progress["paused"])
                return
            if idle:
                self._stop.wait(max(0.0, until - time.monotonic()))

    def _destroy(self, connection: db.Connection, begun: datetime, until: float) -> bool:
        """Destroy what is due, after searching the database; tell whether nothing is left to do now."""
        while (duty := _do(connection, "destructions", begun)) is not None:
            while duty == "search":
                self._healthy()
                step = search(connection)
                event, detail = step["event"], step["detail"] or {}
                if event not in QUIET:
                    self._report.event("search", step=event, **detail)
                if event in ("complete", "incomplete", "idle"):
                    break
                if detail.get("blocked_by"):
                    return True  # the next tick looks again
                if self._stop.wait(step["wait"].total_seconds() if step["wait"] else 0.0):
                    return False
                if time.monotonic() > until:
                    return False
            if self._stop.is_set():
                return False
        return True

    def _sweep(self, connection: db.Connection, steps: Steps, until: float) -> bool:
        """Take steps until the next tick is due; tell whether nothing is left to do."""
        while not self._stop.is_set() and time.monotonic() < until:
            self._healthy()
            self._report.look(connection)
            begun = time.monotonic()
            done = steps.take()
            event = done["event"]
            if event == "idle":
                self._pause = 1.0
                return True
            if event == "batch":
                self._batches += 1
            if event not in QUIET:
                self._report.event(
                    event, batch=self._batches if event == "batch" else None, **_fields(done, begun)
                )
            if event == "locked":
                detail = done["detail"] or {}
                raise Problem(detail.get("error", "the KEK is not available"), None, LOCKED)
            self._pause = 1.0
            if done["wait"] is not None:
                self._stop.wait(done["wait"].total_seconds())
        return False

    def _healthy(self) -> None:
        if self._health_file is not None:
            self._health_file.touch()


@contextmanager
def _on_signal(handler: Callable[..., None]) -> Iterator[None]:
    """Call a handler on SIGTERM and SIGINT; the second one ends the process at once."""

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        handler(number, frame)

    before = {number: signal.signal(number, once) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _one_line(error: Exception) -> str:
    """Return what an error says, without line breaks."""
    return " ".join(str(error).split())
