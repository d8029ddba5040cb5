"""`pg-rekey work`: the worker."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from pg_rekey import db
from pg_rekey.cli import follow
from pg_rekey.cli.base import FilePath, Output, fast_option, fetch_one, output, workers_option
from pg_rekey.cli.commands import Command
from pg_rekey.cli.rotate import held_up
from pg_rekey.errors import UNFINISHED
from pg_rekey.worker import Report, Worker


class Screen(Report):
    """What a person wants to hear of it: the bar, and what is out of the ordinary."""

    def __init__(self, bar: follow.Bar) -> None:
        self._bar = bar
        self._next = 0.0
        self._under_way = False

    def event(self, event: str, **fields: Any) -> None:
        """Say it in a sentence, where the bar does not show it."""
        if event in ("completed", "held up", "paused"):
            self._under_way = False
        match event:
            case "connected" if "worker" not in fields:
                follow.say(f"connected to database {fields['database']}")
            case "completed":
                follow.say(f"{follow.names(fields['completed'])} completed")
            case "held up":
                follow.say(held_up(fields))
            case "paused":
                follow.tell_paused(fields["rotations"])
            case "error":
                follow.tell_error(fields)
            case "stopped":
                self._bar.hide()
                rest = ": what is under way `pg-rekey work` goes on with" if self._under_way else ""
                batches = "batch" if fields["batches"] == 1 else "batches"
                follow.say(f"stopped after {fields['batches']} {batches}{rest}")

    def look(self, connection: db.Connection) -> None:
        """Show how far it is, a few times a second."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + follow.GLANCE
            state = fetch_one(connection, db.query("progress"), None, None)
            self._under_way = bool(state["unfinished"])
            self._bar.show(state)


@click.command(cls=Command, example="pg-rekey work --forever --workers 2")
@click.option("--forever", is_flag=True, help="Go on when everything is done, as a service does.")
@workers_option
@fast_option
@click.option(
    "--health-file", type=FilePath, help="Touched at every step; one that opens every row can take minutes."
)
@click.option(
    "--log",
    type=click.Choice(["bar", "json"]),
    help="What it prints: on a terminal a bar by default, elsewhere JSON lines.",
)
@output
def work(
    out: Output, forever: bool, workers: int, fast: bool, health_file: Path | None, log: str | None
) -> None:
    """Do what is due: scheduled rotations, re-encryption, retries, destructions.

    For servers without pg_cron, and for KEKs that the server must not have. SIGTERM and Ctrl-C end it after
    the batch in hand. A batch that takes longer than the setting step_limit is cancelled. Exit code 4 says
    that a rotation failed, or left rows that it could not re-encrypt.

    Workers are connections of this command. One that breaks off says so and connects again, while the others
    go on. `pg-rekey doctor` says how many suit the server.
    """
    in_json = out.json or log == "json" or (log is None and not sys.stdout.isatty())
    with nullcontext() if in_json else follow.Bar() as bar:
        report = Report() if bar is None else Screen(bar)
        worker = Worker(forever=forever, report=report, workers=workers, fast=fast, health_file=health_file)
        worker.run()
    if worker.held_up:
        raise click.exceptions.Exit(UNFINISHED)
