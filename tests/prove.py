"""`make prove`: a kill storm with as many kills as are asked for, which takes too long for every run."""

import random
import sys

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from storm import Figures, storm


@click.command()
@click.option("--kills", type=click.IntRange(0), default=20, show_default=True, help="Kills of the storm.")
@click.option(
    "--minutes", type=click.FloatRange(0), default=2, show_default=True, help="For the stateful test."
)
@click.option("--seed", type=int, help="Repeat the actions of a run that printed it.")
def main(kills: int, minutes: float, seed: int | None) -> None:
    """Try hard to lose a value; exit code 1 if one was lost or does not open."""
    console = Console(highlight=False)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    console.print(f"seed {seed}")
    figures = raise_storm(console, kills, seed)
    show(console, figures)
    # The stateful test goes here: for so many minutes, with this seed.
    if not figures.fine:
        sys.exit(1)


def raise_storm(console: Console, kills: int, seed: int) -> Figures:
    """Run the storm with a bar on a terminal, a line for each kill elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("kill storm", total=kills)

        def report(number: int, what: str) -> None:
            progress.update(task, completed=number, description=what)
            if not console.is_terminal:
                console.print(f"{number}/{kills} {what}")

        return storm(kills, seed, report)


def show(console: Console, figures: Figures) -> None:
    """Print a table of the figures, and what was broken."""
    table = Table(
        title=f"kill storm, seed {figures.seed}, {figures.seconds:.0f} s", title_justify="left", box=None
    )
    table.add_column("", style="bold")
    table.add_column("", justify="right")
    for name, count in figures.killed.items():
        table.add_row(f"  {name}", f"{count:,}")
    table.add_section()
    for name in NUMBERS:
        count = getattr(figures, name)
        style = "red" if name in ("lost", "undecryptable") and count else None
        table.add_row(name.replace("_", " "), f"{count:,}", style=style)
    console.print(table)
    for problem in figures.broken:
        console.print(problem, style="red", markup=False, soft_wrap=True)


NUMBERS = (
    "kills",
    "rotations",
    "completed",
    "kek_rotations",
    "versions_destroyed",
    "answers_lost",
    "rows_written",
    "rows_checked",
    "lost",
    "undecryptable",
)

if __name__ == "__main__":
    main()
