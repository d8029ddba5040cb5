"""How far rotations are, live: a bar on a terminal, elsewhere a line now and then."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from pg_rekey import db
from pg_rekey.cli.base import fetch, fetch_one, scalar
from pg_rekey.cli.tables import Row
from pg_rekey.cli.words import blockers
from pg_rekey.errors import INTERRUPTED, Problem

# Without a terminal: seconds between two signs of life.
LIFE_SIGN = 30.0
NOBODY = "nobody works on it now: `pg-rekey work` does, or pg_cron, once a minute"
# Between two looks at what others do.
GLANCE = 0.5


class Bar:
    """Shows on standard error how far rotations are: their phase, rows, rows a second, and the time left.

    What is printed meanwhile appears above it; what they wait for, between that and the bar.
    """

    def __init__(self) -> None:
        self._progress = Line()
        self._terminal = not self._progress.disable
        self._task = self._progress.add_task("", total=None, visible=False, done=0, rows=None, things="rows")
        self._phase = ""
        self._blocks = 0  # as many as its verification began with
        self._waiting: object = None
        self._next = time.monotonic() + LIFE_SIGN

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._progress.stop()

    def hide(self) -> None:
        """Take the bar away."""
        self._progress.update(self._task, visible=False)

    def show(self, state: Row) -> None:
        """Show how far they are, as the query `progress` says; what they wait for is said once."""
        self._wait(state["blocked_by"])
        phase = _phase(state)
        if phase != self._phase:
            self._progress.reset(self._task, visible=bool(state["unfinished"]))
            self._phase, self._blocks = phase, 0
        self._blocks = max(self._blocks, state["blocks"] or 0)
        if phase == "verifying" and self._blocks:
            total, completed = self._blocks, self._blocks - (state["blocks"] or 0)
        else:
            total, completed = state["total"], state["done"]
        name = names(state["ids"] or [])
        self._progress.update(
            self._task,
            description=f"{name} {phase}",
            total=total,
            completed=completed,
            done=state["done"],
            rows=state["total"],
            waits=phase == "waiting",
            visible=bool(state["unfinished"]),
        )
        if not self._terminal and time.monotonic() >= self._next:
            self._next = time.monotonic() + LIFE_SIGN
            rows = "" if state["total"] is None else f", {state['done']:,} of {state['total']:,} rows"
            say(f"{name} {phase}{rows}")

    def _wait(self, given: list[dict[str, Any]] | None) -> None:
        """Say what they wait for: with an age that goes on, as long as it is so; without a terminal, once."""
        before, waiting = self._waiting, _without_ages(given)
        self._waiting = waiting
        if self._terminal:
            if waiting == before and any("age_seconds" not in one for one in given or []):
                return  # whoever was waited for has gone, and with him how long it was
            if before and waiting != before:
                say(f"waited for {self._progress.line}")
            self._progress.line = blockers(given)
        elif waiting != before:
            say(f"waits for {blockers(given)}" if waiting else "goes on")


class Count:
    """Shows on standard error how many of a number are done: a bar, or a line now and then."""

    def __init__(self, what: str, total: int, things: str) -> None:
        self._what, self._total, self._things = what, total, things
        self._done = 0
        self._progress = Line()
        self._task = self._progress.add_task(what, total=total, done=0, rows=total, things=things)
        self._next = time.monotonic() + LIFE_SIGN

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._progress.update(self._task, visible=False)
        self._progress.stop()

    def advance(self, number: int) -> None:
        """Count so many more as done."""
        self._done += number
        self._progress.update(self._task, completed=self._done, done=self._done)
        if self._progress.disable and time.monotonic() >= self._next:
            self._next = time.monotonic() + LIFE_SIGN
            say(f"{self._what}, {self._done:,} of {self._total:,} {self._things}")


def names(ids: list[int]) -> str:
    """Name one rotation, or say how many they are."""
    return f"rotation {ids[0]}" if len(ids) == 1 else f"{len(ids)} rotations"


def _phase(state: Row) -> str:
    if state["blocked_by"]:
        return "waiting"
    if state["running"]:
        return "re-encrypting"
    return "verifying" if state["verifying"] else "queued"


def _without_ages(given: list[dict[str, Any]] | None) -> object:
    """Return what is the same as long as the same things are in the way."""
    return [{name: one[name] for name in one if name != "age_seconds"} for one in given or []] or None


def say(message: str) -> None:
    """Print a line to standard error, above the bar where there is one: rich sees only sys.stderr."""
    print(message, file=sys.stderr, flush=True)


def tell_error(fields: Mapping[str, Any]) -> None:
    """Say what went wrong with a worker, and that it tries again."""
    who = f"worker {fields['worker']}: " if "worker" in fields else ""
    say(f"{who}{fields['error']}; tries again in {fields['retry_in']:.0f} s")


def tell_paused(ids: list[int]) -> None:
    """Say how to go on with rotations that are paused."""
    for one in ids:
        say(f"rotation {one} is paused: `pg-rekey rotations resume {one}` goes on")


def watch(connection: db.Connection, ids: list[int]) -> list[Row]:
    """Show how far these rotations are until they have ended, while others do the work."""
    asked = time.monotonic() + 4 * GLANCE  # whoever was told to work may be about to begin

    def glance() -> None:
        nonlocal asked
        if time.monotonic() >= asked:
            asked = math.inf if warn_idle(connection) else time.monotonic() + LIFE_SIGN
        time.sleep(GLANCE)

    return follow(connection, ids, glance, "It goes on as before; `pg-rekey rotations watch` shows it again.")


def warn_idle(connection: db.Connection) -> bool:
    """Say so where nobody works on what is under way."""
    idle = not scalar(connection, db.query("worked on"))
    if idle:
        say(NOBODY)
    return idle


def follow(
    connection: db.Connection, ids: list[int], steps: Callable[[], None], interrupted: str | None = None
) -> list[Row]:
    """Take steps until these rotations have ended, and show how far they are.

    interrupted: what goes on with them after an interruption, where not every worker does.
    """
    try:
        with Bar() as bar:
            while True:
                state = fetch_one(connection, db.query("progress"), ids, ids)
                bar.show(state)
                if not state["unfinished"]:
                    break
                steps()
    except KeyboardInterrupt:
        raise Problem(
            f"interrupted: nothing of {names(ids)} is lost, and everything can be read and written",
            interrupted or "`pg-rekey work` goes on; so does pg_cron, where it runs the worker.",
            INTERRUPTED,
        ) from None
    tell_paused(state["paused"] or [])
    return fetch(connection, "select * from rekey.rotation_status where id = any(%s) order by id", ids)


def _column() -> Column:
    return Column(no_wrap=True, overflow="crop")


class _Rows(ProgressColumn):
    """Rows that are done, of how many."""

    def render(self, task: Task) -> Text:
        """Show them with separators."""
        rows = task.fields["rows"]
        return Text("" if rows is None else f"{task.fields['done']:,}/{rows:,}", "progress.download")


class _TimeLeft(TimeRemainingColumn):
    """The time left; nothing while others hold it up, since nobody knows how long."""

    def render(self, task: Task) -> Text:
        """Show it."""
        return Text("") if task.fields.get("waits") else super().render(task)


class _Pace(ProgressColumn):
    """Rows, or whatever they are, a second."""

    def render(self, task: Task) -> Text:
        """Show the pace of the last moments, of blocks too in rows."""
        if not task.speed or not task.total or not task.fields["rows"]:
            return Text("")
        pace = task.speed * task.fields["rows"] / task.total
        return Text(f"{pace:,.0f} {task.fields['things']}/s", "progress.data.speed")


class Line(Progress):
    """A bar on one line of standard error, where that is a terminal, and above it what is waited for.

    line: what that is; empty: nothing.
    """

    def __init__(self) -> None:
        self.line = ""
        console = Console(stderr=True, highlight=False, markup=False)
        super().__init__(
            SpinnerColumn("dots" if console.encoding.startswith("utf") else "line"),
            TextColumn("{task.description}", markup=False, table_column=_column()),
            BarColumn(bar_width=None),
            _Rows(_column()),
            _Pace(_column()),
            _TimeLeft(table_column=_column()),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield what is waited for, and the bar."""
        if self.line:
            yield Text(f"waits for {self.line}")
        yield from super().get_renderables()
