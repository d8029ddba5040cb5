"""`make prove`: what takes too long for every run: a long kill storm, a long random walk, a million IVs."""

import random
import sys

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import stateful
import storm
from driving import sealed_ivs
from flaws import FLAWS, find
from helpers import connect, create_database, initialize, install
from pg_rekey import kek as keks
from pg_rekey import local, release

ROWS, ROTATIONS = 50_000, 20
STORM = (
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


@click.command()
@click.option("--kills", type=click.IntRange(0), default=20, show_default=True, help="Kills of the storm.")
@click.option(
    "--minutes", type=click.FloatRange(0), default=2, show_default=True, help="For the random walk."
)
@click.option("--flaws", is_flag=True, help="Break the product on purpose, and see that the walk finds it.")
@click.option("--seed", type=int, help="Repeat a run that printed it: the walk, and the orders of the storm.")
def main(kills: int, minutes: float, flaws: bool, seed: int | None) -> None:
    """Try hard to lose a value; exit code 1 if one was lost or does not open, or anything else is wrong."""
    console = Console(highlight=False)
    seed = random.SystemRandom().randrange(10**9) if seed is None else seed
    if flaws:
        sys.exit(0 if find_flaws(console, minutes) else 1)
    fine = True
    if kills:
        console.print(f"kill storm, seed {seed}")
        figures = raise_storm(console, kills, seed)
        show_storm(console, figures)
        fine = figures.fine
    if minutes:
        console.print("random walk")
        fine &= walk(console, minutes, seed)
        fine &= count_ivs(console)
    sys.exit(0 if fine else 1)


def raise_storm(console: Console, kills: int, seed: int) -> storm.Figures:
    """Run the storm with a bar on a terminal, a line for each kill elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("kill storm", total=kills)

        def report(number: int, what: str) -> None:
            progress.update(task, completed=number, description=what)
            if not console.is_terminal:
                console.print(f"{number}/{kills} {what}")

        return storm.storm(kills, seed, report)


def show_storm(console: Console, figures: storm.Figures) -> None:
    """Print a table of the figures, and what was broken."""
    table = plain_table(f"kill storm, seed {figures.seed}, {figures.seconds:.0f} s")
    for name, count in figures.killed.items():
        table.add_row(f"  {name}", f"{count:,}")
    table.add_section()
    for name in STORM:
        count = getattr(figures, name)
        style = "red" if name in ("lost", "undecryptable") and count else None
        table.add_row(name.replace("_", " "), f"{count:,}", style=style)
    console.print(table)
    for problem in figures.broken:
        console.print(problem, style="red", markup=False)


def walk(console: Console, minutes: float, seed: int) -> bool:
    """Walk at random beside the model; print what was found, or how far it went."""
    try:
        figures = stateful.prove(minutes, seed, console.print)
    except Exception as error:
        console.print_exception(max_frames=4)
        console.print(*error.__notes__, sep="\n", style="red", markup=False)
        return False
    table = plain_table(f"random walk, {figures.seconds:.0f} s")
    table.add_row("seeds", f"{figures.seeds[0]} to {figures.seeds[-1]}")
    table.add_row("walks", f"{figures.walks:,}")
    table.add_row("steps, every invariant checked after each", f"{figures.steps:,}")
    console.print(table)
    return True


def find_flaws(console: Console, minutes: float) -> bool:
    """Walk on broken products; print by what each was found, or that it was not."""
    fine = True
    for flaw in FLAWS:
        number, found = find(flaw, minutes)
        fine &= number is not None
        console.print(f"{flaw.name}: {f'seed {number}: {found}' if number else 'NOT FOUND'}", markup=False)
    return fine


def count_ivs(console: Console) -> bool:
    """Rotate until a million values were sealed, and look for an IV that came twice."""
    with local.Server() as server:
        dsn = create_database(server.dsn(), "ivs")
        install(dsn, release.assemble("plain"))
        with connect(dsn) as connection:
            initialize(connection, bytes.fromhex(keks.generate()))
            total, distinct = sealed_ivs(connection, ROWS, ROTATIONS)
    console.print(f"{total:,} values sealed, {distinct:,} different IVs")
    return total == distinct


def plain_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    return table


if __name__ == "__main__":
    main()
