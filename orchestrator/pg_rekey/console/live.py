"""What changes on a page while it is open: fragments of it, made once for all who look at the same thing."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
from fastapi import Request, Response
from sse_starlette import ServerSentEvent

from pg_rekey.api import actions
from pg_rekey.api.feed import ENDED, Course, Feed, Snapshot, progress_of, stream
from pg_rekey.api.models import Progress
from pg_rekey.api.refusals import Refusal
from pg_rekey.api.tokens import Role, Token
from pg_rekey.console import views
from pg_rekey.doctor import Finding

Row = dict[str, Any]
# Rotations under way that the first page shows.
SHOWN = 10
# A browser comes back so soon after the end of a stream.
RETRY_MILLISECONDS = 500
# The first page does not examine everything anew each time.
DOCTOR_SECONDS = 60.0
# Nor does it wait for a statement of it for longer.
PATIENCE = "500ms"


class Doctor:
    """What the doctor said last, for pages that only count it; each role of a token sees something else."""

    def __init__(self) -> None:
        self._said: dict[Role, tuple[float, list[Finding]]] = {}

    def look(self, request: Request, timeout: str | None) -> list[Finding] | None:
        """Return the findings, examined anew where the last ones are old; None: that took too long."""
        token: Token = request.state.token
        said = self._said.get(token.role)
        if timeout is None or said is None or time.monotonic() - said[0] > DOCTOR_SECONDS:
            try:
                found = actions.examine(request, timeout)
            except (Refusal, psycopg.OperationalError):
                return None
            said = self._said[token.role] = (time.monotonic(), found)
        return said[1]


def doctor(request: Request, timeout: str | None = None) -> list[Finding] | None:
    """Return what the doctor finds, without what is no more than an info; None: not in this time.

    timeout: of a statement, where the findings may be a minute old; None: they are to be new.
    """
    found: list[Finding] | None = request.app.state.doctor.look(request, timeout)
    return None if found is None else [one for one in found if one.severity != "info"]


def rotation(request: Request, row: Row) -> str:
    """Return the part of a rotation's page that changes."""
    snapshot: Snapshot | None = request.app.state.feed.snapshot
    course = snapshot.courses.get(row["id"]) if snapshot else None
    if course is None:
        course = Course()
        course.note(row, datetime.now(UTC))
    return _rotation(progress_of(row, course), course, row["finished_at"])


def _rotation(progress: Progress, course: Course, finished_at: datetime | None) -> str:
    now = finished_at or datetime.now(UTC)
    return views.render("_rotation.html", one=progress, points=list(course.points), until=now)


def under_way(request: Request, rows: Sequence[Row]) -> str:
    """Return the part of the first page that changes."""
    snapshot: Snapshot | None = request.app.state.feed.snapshot
    courses = snapshot.courses if snapshot else {}
    shown = []
    for row in rows:
        course = courses.get(row["id"], Course())
        if not course.lately:
            course.note(row, datetime.now(UTC))
        shown.append(progress_of(row, course))
    return _under_way(shown)


def _under_way(shown: Sequence[Progress]) -> str:
    going = [one for one in shown if one.state not in ENDED]
    return views.render("_under_way.html", rotations=going[:SHOWN], more=len(going) > SHOWN)


class Fragments:
    """Fragments of the last snapshot."""

    def __init__(self) -> None:
        self._of: Snapshot | None = None
        self._made: dict[int | None, str] = {}

    def get(self, snapshot: Snapshot, id: int | None) -> str:
        """Return the fragment of one rotation, or of all that are under way, made once for each snapshot."""
        if snapshot is not self._of:
            self._of, self._made = snapshot, {}
        if id not in self._made:
            if id is None:
                self._made[id] = _under_way(list(snapshot.progress.values()))
            else:
                one = snapshot.progress[id]
                self._made[id] = _rotation(one, snapshot.courses[id], one.finished_at)
        return self._made[id]


def events(request: Request, id: int | None) -> Response:
    """Answer with what changes on a page, as server-sent events."""
    feed: Feed = request.app.state.feed
    if feed.full():
        raise Refusal(503, "busy", "too many pages are open already", "Try again later.")
    return stream(_events(feed, request.app.state.fragments, id), views.HEADERS)


async def _events(feed: Feed, fragments: Fragments, id: int | None) -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent(comment="open", retry=RETRY_MILLISECONDS)
    sent: str | None = None
    changes: int | None = None
    troubled = False
    async for snapshot in feed.follow(id):
        if snapshot.problem:
            troubled = True
            yield ServerSentEvent(data=snapshot.problem, event="problem")
            continue
        if troubled:
            troubled = False
            yield ServerSentEvent(data="", event="fine")
        if id is None or id in snapshot.progress:
            html = fragments.get(snapshot, id)
            if html != sent:
                sent = html
                yield ServerSentEvent(data=json.dumps({"id": "live", "html": html}), event="fragment")
        if changes not in (None, snapshot.changes):
            yield ServerSentEvent(data="", event="changed")
        changes = snapshot.changes
