"""`pg-rekey work`: the worker."""

from pathlib import Path

import click

from pg_rekey.cli.base import FilePath, Output, output
from pg_rekey.errors import UNFINISHED
from pg_rekey.worker import Worker


@click.command()
@click.option("--forever", is_flag=True, help="Go on when everything is done, as a service does.")
@click.option(
    "--health-file", type=FilePath, help="Touched at every step; one that opens every row can take minutes."
)
@output
def work(out: Output, forever: bool, health_file: Path | None) -> None:
    """Do what is due: scheduled rotations, re-encryption, retries, destructions.

    For servers without pg_cron, and for KEKs that the server must not have. SIGTERM and Ctrl-C end it after
    the batch in hand. It prints JSON log lines, with or without --json. A batch that takes longer than
    the setting step_limit is cancelled. Exit code 4 says that a rotation failed, or left rows that it could
    not re-encrypt.
    """
    worker = Worker(forever=forever, health_file=health_file)
    worker.run()
    if worker.held_up:
        raise click.exceptions.Exit(UNFINISHED)
