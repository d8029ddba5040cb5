"""What was measured, as tables: on the terminal, and in docs/benchmarks.md between markers."""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from bench.figures import extent, median, number, p99, ratios, scaled, spread
from bench.targets import Target, targets

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
PHASES = {
    "idle": "before",
    "rotation": "during rotations, one worker, default settings",
    "fast": "during rotations that give way to nobody (`min_pace` 1)",
    "after": "after them",
    "throttled": "during one with `max_rows_per_second`",
    "bare": "during bare UPDATEs at that pace",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first column says what it is."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: bool = True  # whether what stands in the other columns is numbers

    def markdown(self) -> str:
        """Write it as a page shows it."""
        align = "--:" if self.numbers else "---"
        lines = [self.columns, ("---", *(align for _ in self.columns[1:])), *self.rows]
        title = f"{self.title}:\n\n" if self.title else ""
        return title + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def print(self, console: Console) -> None:
        """Print it on a terminal."""
        table = RichTable(title=re.sub("[`*]", "", self.title), title_justify="left", box=box.SIMPLE_HEAD)
        for column in self.columns:
            right = self.numbers and column != self.columns[0]
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(re.sub("[`*]", "", cell) for cell in row))
        console.print(table)


def sections(results: dict[str, Any]) -> dict[str, list[Table]]:
    """Return the tables of each section that there are results for."""
    made = {name: make(results[name]) for name, make in SECTIONS.items() if name in results}
    if "against" in results:
        made["against"] = [_against(results["against"])]
    if made.keys() == SECTIONS.keys():
        made["asked"] = [_asked(results)]
        made["targets"] = [_targets(targets(results))]
    return made


def write(made: dict[str, list[Table]], page: Path = PAGE) -> None:
    """Put the tables of each section between its markers, in place of those that are there."""
    text = page.read_text()
    for name, tables in made.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{page} has no markers {name}")
        between = "\n\n".join(table.markdown() for table in tables)
        text = f"{before}{begin}\n{between}\n\n{end}{after}"
    page.write_text(text)


def _asked(results: dict[str, Any]) -> Table:
    """What a user asks first."""
    impact, calls, last = results["impact"], results["calls"], results["scale"]["steps"][-1]
    [heat] = [heat for heat in results["race"] if heat["size"] == calls["size"]]
    rate = {one["name"]: [one["rows"] / took for took in one["seconds"]] for one in heat["competitors"]}
    micros = {one["name"]: median(scaled(one["seconds"], 1e6)) for one in calls["calls"]}

    def felt(kind: str) -> str:
        tails = [
            median([1000 * p99(one["calls"][phase][kind]) for one in impact["rounds"]])
            for phase in ("idle", "rotation")
        ]
        return f"{tails[1]} ms during a rotation, {tails[0]} ms before"

    beside = [one["rows_per_second"]["rotation"] for one in impact["rounds"]]
    longest = [1000 * max(one["locked_seconds"], default=0) for one in impact["rounds"]]
    return Table(
        f"Values of {calls['size']} bytes, default settings",
        ("what a user asks", "measured"),
        [
            ("rows a second, one worker, two", f"{median(rate['rekey_1'])}, {median(rate['rekey_2'])}"),
            ("the same beside readers and writers, to whom one worker gives way", median(beside)),
            ("99th percentile of reads", felt("read")),
            ("99th percentile of writes", felt("write")),
            ("longest wait for a row that a batch has locked", f"{median(longest)} ms"),
            ("an envelope", f"{calls['envelope_bytes']} bytes"),
            ("WAL of a row that is rotated", spread(scaled(last["wal_bytes"], 1 / last["rows"]), "bytes")),
            ("a read: `get_secret`, `decrypt`", f"{micros['get_secret']} µs, {micros['decrypt']} µs"),
            ("a write: `set_secret`, `encrypt`", f"{micros['set_secret']} µs, {micros['encrypt']} µs"),
        ],
        numbers=False,
    )


def _about(about: dict[str, Any]) -> list[Table]:
    rows = [
        ("when", f"{about['date']}, in {number(about['seconds'] / 60)} minutes"),
        ("what", f"pg_rekey {about['pg_rekey']}, PostgreSQL {about['postgres']}, Python {about['python']}"),
        ("on", f"{about['machine']}, {about['cores']} cores"),
        ("settings", ", ".join(f"`{name} = {setting}`" for name, setting in about["settings"].items())),
    ]
    return [Table("", ("this run", ""), rows, numbers=False)]


def _race(race: list[dict[str, Any]]) -> list[Table]:
    return [_heat(heat) for heat in race]


def _heat(heat: dict[str, Any]) -> Table:
    cost = {one["name"]: scaled(one["seconds"], 1e6 / one["rows"]) for one in heat["competitors"]}
    ours, floor = cost["rekey_1"], cost["floor"]
    rows = []
    for one in heat["competitors"]:
        micros = cost[one["name"]]
        rates = [1e6 / each for each in micros]
        rows.append(
            (
                one["label"],
                median(rates),
                extent(rates),
                median(micros),
                spread(ratios(micros, floor)),
                spread(ratios(micros, ours)),
            )
        )
    rounds = len(ours)
    return Table(
        f"{heat['size']:,} bytes, {heat['rows']:,} rows, {rounds} rounds",
        ("way to rotate", "rows/s", "range", "µs a row", "time to the floor's", "time to one worker's"),
        rows,
    )


def _impact(impact: dict[str, Any]) -> list[Table]:
    rounds = impact["rounds"]

    def cells(phase: str, kind: str) -> tuple[str, ...]:
        calls = [one["calls"][phase][kind] for one in rounds]
        idle = [p99(one["calls"]["idle"][kind]) for one in rounds]
        tails = [p99(one) for one in calls]
        medians = [statistics.median(one) for one in calls]
        return (
            f"{sum(map(len, calls)):,}",
            spread(scaled(medians, 1000)),
            spread(scaled(tails, 1000)),
            spread(ratios(tails, idle)),
        )

    rates = " and ".join(f"{rate:.0f} {kind}s" for kind, rate in impact["rates"].items())
    latencies = Table(
        f"{impact['rows']:,} secrets, {rates} a second, {len(rounds)} rounds; latencies in ms",
        ("phase", "calls", "median", "p99", "p99 to before"),
        [
            (f"{kind}s {what}", *cells(phase, kind))
            for kind in impact["rates"]
            for phase, what in PHASES.items()
        ],
    )
    wal = [one["wal_bytes"] / one["rotated_rows"] for one in rounds]
    kept = [one["throttled_rows_per_second"] for one in rounds]
    before, after = impact["table_bytes_before"], impact["table_bytes_after"]
    rest = Table(
        "And",
        ("what", "measured"),
        [
            ("errors", number(impact["errors"])),
            ("WAL for each row that was rotated, that of the writers included", spread(wal, "bytes")),
            (
                "rows a second beside them, giving way to them, and to nobody",
                " and ".join(
                    spread([one["rows_per_second"][phase] for one in rounds])
                    for phase in ("rotation", "fast")
                ),
            ),
            (
                "the longest UPDATE of a row that a sweep is about to lock, in ms",
                spread([1000 * max(one["locked_seconds"], default=0) for one in rounds]),
            ),
            ("rows a second, where `max_rows_per_second` was " + number(impact["throttle"]), spread(kept)),
            ("`rekey.secrets` before all this", f"{number(before / 1e6)} MB"),
            ("`rekey.secrets` afterwards, vacuumed", f"{number(after / 1e6)} MB"),
        ],
    )
    return [latencies, rest]


def _calls(calls: dict[str, Any]) -> list[Table]:
    rows = []
    for one in calls["calls"]:
        micros = scaled(one["seconds"], 1e6)
        rows.append((one["label"], median(micros), extent(micros)))
    return [Table(f"Values of {calls['size']} bytes", ("call", "µs", "range"), rows)]


def _scale(scale: dict[str, Any]) -> list[Table]:
    growth = Table(
        f"One keyring, values of {scale['size']} bytes, one worker",
        (
            "rows",
            "µs a row",
            "private memory of its session, MB",
            "of the worker, MB",
            "WAL a row, bytes",
            "without page images",
            "`rekey.secrets`, MB",
            "after, MB",
        ),
        [
            (
                f"{step['rows']:,}",
                spread(scaled(step["seconds"], 1e6 / step["rows"])),
                spread(scaled(step["server_bytes"], 1e-6)),
                spread(scaled(step["worker_bytes"], 1e-6)),
                spread(scaled(step["wal_bytes"], 1 / step["rows"])),
                _known([size / step["rows"] for size in step["record_bytes"] if size is not None]),
                number(step["table_bytes_before"] / 1e6),
                number(step["table_bytes_after"] / 1e6),
            )
            for step in scale["steps"]
        ],
    )
    last, small, many = scale["steps"][-1], scale["small"], scale["many"]
    keyrings, column = scale["keyrings"], scale["column"]
    all_of_them = f"all of {keyrings['keyrings']:,} keyrings without secrets"
    rest = Table(
        "And",
        ("what", "measured"),
        [
            (
                f"`rotate_keys` for a keyring with {last['rows']:,} secrets",
                spread(scaled(scale["rotate_keys_seconds"], 1000), "ms"),
            ),
            (
                f"rotation of a keyring of {small['rows']:,} among {small['others']:,} secrets",
                spread(small["seconds"], "s"),
            ),
            (
                f"rotation of {many['keyrings']:,} keyrings, {many['rows']:,} secrets in all",
                spread(scaled(many["seconds"], 1e6 / many["rows"]), "µs a row"),
            ),
            (f"`rotate_keys` for {all_of_them}", spread(keyrings["rotate_keys_seconds"], "s")),
            ("until those rotations are completed", spread(keyrings["carry_out_seconds"], "s")),
            (
                f"`tick` with nothing due and {keyrings['keyrings']:,} keyrings",
                spread(scaled(keyrings["tick_seconds"], 1000), "ms"),
            ),
            (
                f"adoption of {column['rows']:,} plain values in a user's table",
                spread(scaled(column["adoption_seconds"], 1e6 / column["rows"]), "µs a row"),
            ),
            ("their rotation", spread(scaled(column["rotation_seconds"], 1e6 / column["rows"]), "µs a row")),
            ("that table: plain", f"{number(column['plain_bytes'] / 1e6)} MB"),
            ("adopted, vacuumed", f"{number(column['adopted_bytes'] / 1e6)} MB"),
            ("after VACUUM FULL", f"{number(column['full_bytes'] / 1e6)} MB"),
            ("rotated from there, vacuumed", f"{number(column['rotated_bytes'] / 1e6)} MB"),
        ],
    )
    return [growth, rest]


def _known(samples: list[float]) -> str:
    return spread(samples) if samples else "unknown"


def _targets(found: list[Target]) -> Table:
    def aim(target: Target) -> str:
        bounds = (("at least", target.at_least), ("at most", target.at_most))
        return ", ".join(f"{word} {number(bound)}" for word, bound in bounds if bound is not None)

    return Table(
        "",
        ("target", "aim", "measured", "range", "reached"),
        [
            (
                target.promise,
                f"{aim(target)} {target.unit}".strip(),
                f"{median(target.samples)} {target.unit}".strip(),
                extent(target.samples),
                "yes" if target.reached else "**no**",
            )
            for target in found
        ],
    )


def _against(against: dict[str, Any]) -> Table:
    return Table(
        f"Beside {against['revision']}, in turns; in ms",
        ("what", "this", "that", "this to that"),
        [
            (
                what,
                median(scaled(one["now"], 1000)),
                median(scaled(one["then"], 1000)),
                spread(ratios(one["now"], one["then"])),
            )
            for what, one in against["seconds"].items()
        ],
    )


SECTIONS: dict[str, Callable[[Any], list[Table]]] = {
    "about": _about,
    "race": _race,
    "impact": _impact,
    "calls": _calls,
    "scale": _scale,
}
