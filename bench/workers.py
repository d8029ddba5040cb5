"""Worker processes, as `pg-rekey work` is one, and rotations that they carry out."""

import multiprocessing
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

from pg_rekey import db, worker

SAMPLING = 0.02


@dataclass(frozen=True)
class Drained:
    """What a worker did until nothing was left."""

    rows: int
    swept: tuple[float, float] | None  # from the begin of its first batch to the end of its last one
    completed: float  # when its last step that completed something was committed; 0: none did


@dataclass(frozen=True)
class Rotation:
    """A rotation, or those of many keyrings, from the call to the end of the verification; in seconds."""

    rows: int
    call: float
    seconds: float
    sweep: float
    server_bytes: int  # private memory of the workers' sessions in the server, at its highest
    worker_bytes: int  # the same of the workers themselves


class Workers(AbstractContextManager["Workers"]):
    """Workers, each a process with a session of its own that is unlocked with the KEK of the environment."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._running: list[tuple[BaseProcess, Pipe]] = []
        self._backends: list[int] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._running.append((process, ours))
        for _, pipe in self._running:
            self._backends.append(pipe.recv())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, pipe in self._running:
            pipe.close()
            process.join()

    def rotate(
        self, connection: db.Connection, keyring: str | None = None, *, supersede: bool = False
    ) -> Rotation:
        """Rotate a keyring, or all of them, by `rekey.rotate_keys`, and carry it out."""
        begun = time.monotonic()
        rotations, call = request(connection, keyring, supersede=supersede)
        server, own = self._measured_drain()
        drained = [pipe.recv() for _, pipe in self._running]
        states = connection.execute(
            "select state, sum(rows_done)::bigint as rows from rekey.rotation_status"
            " where id = any (%s) group by state",
            [rotations],
        ).fetchall()
        assert [state["state"] for state in states] == ["completed"], states
        assert states[0]["rows"] == sum(one.rows for one in drained), (states, drained)
        swept = [one.swept for one in drained if one.swept]
        return Rotation(
            rows=states[0]["rows"],
            call=call,
            seconds=max(one.completed for one in drained) - begun,
            sweep=max(end for _, end in swept) - min(begin for begin, _ in swept) if swept else 0.0,
            server_bytes=server,
            worker_bytes=own,
        )

    def _measured_drain(self) -> tuple[int, int]:
        """Let the workers work until nothing is left; return the highest private memory, server and own."""
        for _, pipe in self._running:
            pipe.send("work")
        server = own = 0
        while not all(pipe.poll() for _, pipe in self._running):
            server = max(server, *map(_private_bytes, self._backends))
            own = max(own, *(_private_bytes(process.pid or 0) for process, _ in self._running))
            time.sleep(SAMPLING)
        return server, own


def request(
    connection: db.Connection, keyring: str | None = None, *, supersede: bool = False
) -> tuple[list[int], float]:
    """Call `rekey.rotate_keys`; return the rotations, and the seconds until it was committed."""
    begun = time.monotonic()
    rows = connection.execute(
        "select id from rekey.rotate_keys(%s, supersede => %s)", [keyring, supersede]
    ).fetchall()
    return [row["id"] for row in rows], time.monotonic() - begun


def _serve(pipe: Pipe) -> None:
    """Drain what is there each time the parent says so, until it closes the pipe."""
    with worker.connect() as connection:
        pipe.send(connection.info.backend_pid)
        while _received(pipe):
            pipe.send(_drain(connection))


def _received(pipe: Pipe) -> bool:
    try:
        return bool(pipe.recv())
    except EOFError:
        return False


def _drain(connection: db.Connection) -> Drained:
    rows = 0
    batches: list[float] = []
    completed = 0.0
    steps = worker.Steps(connection)
    while True:
        begun = time.monotonic()
        done = steps.take()
        ended = time.monotonic()
        match done["event"]:
            case "idle":
                return Drained(rows, (batches[0], batches[-1]) if batches else None, completed)
            case "batch":
                rows += done["rows"]
                batches += [begun, ended]
            case "completed":
                completed = ended
            case "error" | "canceled" | "locked":
                raise RuntimeError(done["detail"])
        if done["wait"] is not None:
            time.sleep(done["wait"].total_seconds())


def _private_bytes(pid: int) -> int:
    """Return the memory that a process shares with nobody, or 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines.get("RssAnon", "0 kB").split()[0]) * 1024
