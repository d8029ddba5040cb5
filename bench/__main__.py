"""`make bench`: measure it all on a server of its own, print it, write JSON and docs/benchmarks.md."""

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import psycopg
from rich.console import Console

from bench import plot, report
from bench.against import Contest, against
from bench.calls import calls
from bench.estate import Estate
from bench.impact import Load, impact
from bench.race import Heat, race
from bench.scale import Extent, scale
from bench.targets import targets
from pg_rekey import release

PARTS = ("race", "impact", "calls", "scale")


@dataclass(frozen=True)
class Amounts:
    """How much of everything."""

    heats: tuple[Heat, ...]
    share: float  # of the rows, for what takes too long
    load: Load
    loops: int
    rounds: int
    extent: Extent
    contest: Contest


FULL = Amounts(
    heats=(Heat(256, 100_000, 5), Heat(32, 100_000, 2), Heat(1024, 50_000, 2), Heat(16_384, 5_000, 2)),
    share=0.05,
    load=Load(rows=100_000, paced_rows=10_000, seconds=6, rounds=3, rate=2000),
    loops=1000,
    rounds=5,
    extent=Extent(rows=1_000_000, keyrings=10_000, column_rows=100_000),
    contest=Contest(tables=200, partitions=200, secrets=50_000, calls=1000, rounds=3),
)
SMOKE = Amounts(
    heats=(Heat(256, 200, 2), *(Heat(size, 200, 1) for size in (32, 1024, 16_384))),
    share=0.05,
    load=Load(rows=500, paced_rows=200, seconds=0.5, rounds=1, rate=1000),
    loops=20,
    rounds=1,
    extent=Extent(rows=2000, keyrings=20, column_rows=200),
    contest=Contest(tables=4, partitions=20, secrets=100, calls=2, rounds=1),
)


@click.command()
@click.option(
    "--rows",
    type=click.IntRange(10_000, 10_000_000),
    default=FULL.extent.rows,
    show_default=True,
    help="Rows of the largest rotation.",
)
@click.option("--smoke", is_flag=True, help="A little of everything, to see that it works; no --docs.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="This part alone; no --docs.")
@click.option(
    "--against",
    "revision",
    metavar="REV",
    help="Nothing but many tables, partitions and secrets, beside the SQL of this git revision; no --docs.",
)
@click.option(
    "--json",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results.json"),
    show_default="bench/results.json",
    help="Where all that was measured goes.",
)
@click.option("--docs/--no-docs", default=True, show_default=True, help="Write docs/benchmarks.md.")
def main(rows: int, smoke: bool, only: tuple[str, ...], revision: str | None, path: Path, docs: bool) -> None:
    """Measure rotations beside what people do today, their impact, single calls, and how it all grows."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    amounts = SMOKE if smoke else replace(FULL, extent=replace(FULL.extent, rows=rows))
    results = measure(amounts, only or PARTS, console, revision)
    made = report.sections(results)
    for tables in made.values():
        for table in tables:
            table.print(console)
    if "targets" in made:
        results["targets"] = [asdict(one) | {"reached": one.reached} for one in targets(results)]
    path.write_text(json.dumps(results, indent=1) + "\n")
    if docs and not smoke and not only and not revision:
        report.write(made)
        plot.draw(results["impact"])


def measure(
    amounts: Amounts, parts: tuple[str, ...], console: Console, revision: str | None = None
) -> dict[str, Any]:
    """Return what each part measured, and on what; or only how this compares to another revision."""
    begun = time.monotonic()
    with Estate.started() as estate:
        running: dict[str, Callable[[], Any]] = {
            "race": lambda: race(estate, amounts.heats, amounts.share),
            "impact": lambda: impact(estate, amounts.load),
            "calls": lambda: calls(estate, amounts.loops, amounts.rounds),
            "scale": lambda: scale(estate, amounts.extent),
        }
        if revision is not None:
            running = {"against": lambda: against(estate, revision, amounts.contest)}
            parts = ("against",)
        results: dict[str, Any] = {"about": about(estate)}
        for part in parts:
            console.print(f"{time.monotonic() - begun:4.0f} s: {part}")
            results[part] = running[part]()
    results["about"]["seconds"] = time.monotonic() - begun
    return results


def about(estate: Estate) -> dict[str, Any]:
    """Return what is measured, on what machine, with which settings."""
    with psycopg.connect(estate.server.dsn()) as connection:
        version = connection.info.parameter_status("server_version")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "pg_rekey": release.version(),
        "postgres": version,
        "python": platform.python_version(),
        "machine": processor(),
        "cores": os.cpu_count(),
        "settings": estate.settings(),
    }


def processor() -> str:
    """Return what the processor calls itself, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
