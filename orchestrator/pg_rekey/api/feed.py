"""How far rotations are, for all who follow them: one reader of the database, however many they are.

It reads only while somebody listens, and tells them only when something changed.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psycopg
from fastapi import Request, Response
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from pg_rekey import db
from pg_rekey.api.database import STATEMENT_TIMEOUT
from pg_rekey.api.models import Progress
from pg_rekey.api.refusals import Refusal
from pg_rekey.api.tokens import DATABASE_ROLES

Row = dict[str, Any]
# Between two looks, while something is under way and while nothing is.
BUSY_SECONDS, IDLE_SECONDS = 1.0, 2.0
# A stream ends before the answer has to (protocol.ANSWER_SECONDS). Who asks again shows the token again.
STREAM_SECONDS = 50.0
# Half of the places of connections, so that others find one.
STREAMS = 256
# A client that does not read for so long is gone.
SEND_SECONDS = 10.0
# A stream that has not ended so long after the server was told to stop is cut off.
END_SECONDS = 5.0
# What one look reads, and what is kept of each rotation: its pace is that of the last seconds.
ROTATIONS = 200
PACE_SECONDS = 15.0
POINTS = 240
ENDED = ("completed", "completed_with_failures", "rolled_back", "superseded")


@dataclass
class Course:
    """What was seen of a rotation: times and rows, for its pace and for the plot."""

    lately: deque[tuple[float, int]] = field(default_factory=deque)
    points: list[tuple[datetime, int]] = field(default_factory=list)

    def note(self, row: Row, now: datetime) -> None:
        """Note how far it is now."""
        clock = time.monotonic()
        if self.lately and row["rows_done"] < self.lately[-1][1]:
            self.lately.clear()  # it began again
        self.lately.append((clock, row["rows_done"]))
        while clock - self.lately[0][0] > PACE_SECONDS and len(self.lately) > 2:
            self.lately.popleft()
        if not self.points and row["started_at"]:
            self.points.append((row["started_at"], 0))
        if self.points and self.points[-1][1] != row["rows_done"]:
            self.points.append((row["finished_at"] or now, row["rows_done"]))
        if len(self.points) > POINTS:
            del self.points[1:-1:2]

    def pace(self) -> float | None:
        """Return the rows a second of the last seconds, where they were long enough to tell."""
        (begun, before), (now, after) = self.lately[0], self.lately[-1]
        return (after - before) / (now - begun) if now - begun >= 1 else None


@dataclass(frozen=True)
class Snapshot:
    """What one look found. `changes` counts what else pages show: states, and what the worker says."""

    progress: dict[int, Progress]
    courses: dict[int, Course]
    worker: Row | None
    problem: str | None = None
    changes: int = 0


class Feed:
    """Hands out what one reader saw."""

    def __init__(self, pool: db.Pool) -> None:
        self._pool = pool
        self.snapshot: Snapshot | None = None
        self._courses: dict[int, Course] = {}
        self._following: dict[object, int | None] = {}
        self._news = asyncio.Event()
        self._wanted = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._closed = False

    def full(self) -> bool:
        """Tell whether nobody else may follow."""
        return len(self._following) >= STREAMS

    def close(self) -> None:
        """End every stream: the server stops."""
        self._closed = True
        self._news.set()

    async def follow(self, id: int | None = None) -> AsyncIterator[Snapshot]:
        """Yield what is new, for as long as a stream lasts. id: also this rotation, though it has ended."""
        until = time.monotonic() + STREAM_SECONDS
        me = object()
        seen: Snapshot | None = None
        self._following[me] = id
        self._wanted.set()
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_on())
        try:
            while not self._closed and (left := until - time.monotonic()) > 0:
                news, snapshot = self._news, self.snapshot
                if (
                    snapshot is not None
                    and snapshot is not seen
                    and (id is None or self._covers(id, snapshot))
                ):
                    seen = snapshot
                    yield snapshot
                elif not self._closed:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(news.wait(), left)
        finally:
            del self._following[me]

    @staticmethod
    def _covers(id: int, snapshot: Snapshot) -> bool:
        """Tell whether a snapshot was taken after somebody began to follow this rotation."""
        return id in snapshot.progress or snapshot.problem is not None

    async def _read_on(self) -> None:
        self.snapshot = None
        while self._following and not self._closed:
            snapshot = await run_in_threadpool(self._look)
            if snapshot != self.snapshot:
                self.snapshot = snapshot
                news, self._news = self._news, asyncio.Event()
                news.set()
            busy = any(one.phase != "ended" for one in snapshot.progress.values())
            self._wanted.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), BUSY_SECONDS if busy else IDLE_SECONDS)

    def _look(self) -> Snapshot:
        before = self.snapshot
        wanted = {one for one in self._following.copy().values() if one}
        # Those that were under way are looked at once more: how they ended.
        wanted |= {one.id for one in before.progress.values() if one.phase != "ended"} if before else set()
        try:
            with self._pool.connection() as connection:
                connection.execute(
                    db.query("api transaction"), [STATEMENT_TIMEOUT, "", DATABASE_ROLES["read"]]
                )
                rows = connection.execute(
                    db.query("api progress"), {"ids": list(wanted), "limit": ROTATIONS}
                ).fetchall()
                [worker] = connection.execute(db.query("status worker")).fetchall()
        except psycopg.Error:
            # What the library says holds host, user and database.
            return Snapshot(
                before.progress if before else {}, self._courses, None, "the database is not available"
            )
        now = datetime.now(UTC)
        self._courses = {row["id"]: self._courses.get(row["id"], Course()) for row in rows}
        for row in rows:
            self._courses[row["id"]].note(row, now)
        progress = {row["id"]: progress_of(row, self._courses[row["id"]]) for row in rows}
        what = [(one.id, one.state, one.phase, one.rows_failed, one.last_error) for one in progress.values()]
        return Snapshot(
            progress, self._courses, worker, None, hash((*what, worker["locked_since"], worker["last_error"]))
        )


def progress_of(row: Row, course: Course) -> Progress:
    """Return how far a rotation is, a row of rekey.rotation_status, at the pace of its course."""
    pace = course.pace() if row["state"] == "running" else None
    total, done = row["rows_total"], row["rows_done"]
    return Progress.model_validate(
        {
            **row,
            "phase": _phase(row),
            "percent": round(100 * min(done / total, 1), 1) if total else None,
            "rows_per_second": None if pace is None else round(pace),
            "seconds_left": round((total - done) / pace) if pace and total and total >= done else None,
        }
    )


def _phase(row: Row) -> str:
    if row["state"] in ENDED:
        return "ended"
    if row["state"] in ("paused", "failed"):
        return str(row["state"])
    if row["blocked_by"]:
        return "waiting"
    return {"queued": "in line", "running": "re-encrypting"}.get(row["state"], "verifying")


def events(request: Request, id: int | None = None) -> Response:
    """Answer with the progress of one rotation, or of all, as server-sent events."""
    feed: Feed = request.app.state.feed
    if feed.full():
        raise Refusal(503, "busy", "too many follow rotations already", "Try again later.")
    return stream(_events(feed, id))


def stream(
    content: AsyncIterator[ServerSentEvent], headers: Mapping[str, str] | None = None
) -> EventSourceResponse:
    """Return an answer of server-sent events, which end by themselves when the server stops."""
    return EventSourceResponse(
        content, headers=headers, send_timeout=SEND_SECONDS, shutdown_grace_period=END_SECONDS
    )


async def _events(feed: Feed, id: int | None) -> AsyncIterator[ServerSentEvent]:
    sent: dict[int, Progress] = {}
    async for snapshot in feed.follow(id):
        if snapshot.problem:
            yield ServerSentEvent(data=json.dumps({"message": snapshot.problem}), event="problem")
            continue
        for one in snapshot.progress.values():
            if id in (None, one.id) and sent.get(one.id) != one:
                sent[one.id] = one
                yield ServerSentEvent(data=one.model_dump_json(), event="progress")
        if id in snapshot.progress and snapshot.progress[id].phase == "ended":
            yield ServerSentEvent(data="{}", event="end")
            return
