"""Progress as server-sent events: by one reader of the database, for a second at most after it changed."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from api_fixtures import ROSA, Api
from helpers import Connection
from pg_rekey.api import feed as feeds
from pg_rekey.api.feed import Course, Feed, Snapshot
from test_api import assert_error

pytest_plugins = ["api_fixtures"]


def read(text: str) -> list[tuple[str, Any]]:
    """Return the events of a stream."""
    blocks = [block.split("\r\n") for block in text.split("\r\n\r\n") if block and not block.startswith(":")]
    return [
        (lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))) for lines in blocks
    ]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "STREAM_SECONDS", 2.0)
    monkeypatch.setattr(feeds, "BUSY_SECONDS", 0.05)


def test_a_rotation_that_has_ended(api: Api, ready: Connection) -> None:
    ready.execute("select rekey.set_secret('a', 'value')")
    [begun] = api.rotate()["rotations"]
    ready.execute("call rekey.run_rotations()")
    response = api("GET", f"/api/rotations/{begun['id']}/events", token=ROSA)
    assert response.headers["content-type"].startswith("text/event-stream")
    [(name, progress), end] = read(response.text)
    assert (name, end) == ("progress", ("end", {}))
    assert progress["id"] == begun["id"]
    assert (progress["state"], progress["phase"], progress["percent"]) == ("completed", "ended", 100.0)
    assert_error(api("GET", "/api/rotations/99/events"), 404, "RK007")


def test_all_that_is_under_way(api: Api, ready: Connection) -> None:
    ready.execute("select rekey.create_keyring('other')")
    api.rotate()
    found = read(api("GET", "/api/events", token=ROSA).text)
    assert {(name, one["keyring"], one["phase"]) for name, one in found} == {
        ("progress", "default", "in line"),
        ("progress", "other", "in line"),
    }


def test_streams_have_a_limit(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "STREAMS", 0)
    assert_error(api("GET", "/api/events"), 503, "busy")


def test_one_reader_for_many(api: Api, ready: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees the rotation go by, and the database is asked once for all of them."""
    looks: list[int] = []
    look = Feed._look

    def counted(feed: Feed) -> Snapshot:
        looks.append(1)
        return look(feed)

    monkeypatch.setattr(Feed, "_look", counted)
    [begun] = api.rotate()["rotations"]

    async def follow(feed: Feed) -> list[str]:
        return [one.progress[begun["id"]].state async for one in feed.follow(begun["id"])]

    async def watch() -> list[list[str]]:
        feed = Feed(api.app.state.pools.of("rekey_auditor"))
        followers = [asyncio.create_task(follow(feed)) for _ in range(100)]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(ready.execute, "call rekey.run_rotations()")
        seen = await asyncio.gather(*followers)
        assert feed._reader is not None
        await asyncio.wait_for(feed._reader, 10)  # nobody listens any more
        return seen

    seen = asyncio.run(watch())
    assert len(seen) == 100
    for states in seen:
        assert states[0] == "queued"
        assert states[-1] == "completed"
    assert len(looks) < 100


def test_without_a_database(api: Api) -> None:
    api.app.state.pools.__exit__()

    async def first() -> Snapshot:
        feed = Feed(api.app.state.pools.of("rekey_auditor"))
        found = await anext(feed.follow())
        feed.close()
        return found

    assert asyncio.run(first()).problem == "the database is not available"


def test_a_server_that_stops_ends_its_streams(api: Api) -> None:
    async def watch() -> list[Snapshot]:
        feed = Feed(api.app.state.pools.of("rekey_auditor"))
        asyncio.get_running_loop().call_later(0.3, feed.close)
        return [one async for one in feed.follow()]

    assert asyncio.run(asyncio.wait_for(watch(), 1.8)) is not None


def test_the_pace_of_a_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("pg_rekey.api.feed.time.monotonic", lambda: clock)
    course = Course()
    begun = datetime(2026, 11, 30, tzinfo=UTC)
    row = {"rows_done": 0, "started_at": begun, "finished_at": None}
    for second in range(1000):
        clock = float(second)
        course.note({**row, "rows_done": 100 * second}, begun)
    assert course.pace() == 100
    assert len(course.points) <= feeds.POINTS
    assert course.points[0] == (begun, 0)
    assert course.points[-1][1] == 99_900
    course.note(row, begun)
    assert course.pace() is None
