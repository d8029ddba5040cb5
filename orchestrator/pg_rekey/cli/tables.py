"""Tables that fit the terminal: no word and no date is broken, and nothing is cut."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from rich.cells import cell_len
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pg_rekey.cli.words import shown

Row = Mapping[str, Any]
NIL = UUID(int=0)
GAP = 2
INDENT = 4
# Room that a sentence needs to stand in a column; with less it stands under its row.
SENTENCE = 30
UNLIMITED = 10_000
# A terminal that is narrower shows no column without anything in it.
WIDE = 120
_HEADINGS = {
    "active_version": "version",
    "column_name": "column",
    "encrypt_on_write": "on write",
    "fire_triggers": "triggers",
    "kek_id": "KEK",
    "key_version": "version",
    "rows_done": "done",
    "rows_failed": "failed",
    "rows_total": "rows",
    "to_version": "to",
}
# What a state means, in colour beside its word.
_STYLES = {
    "green": ("active", "completed", "complete", "on time"),
    "cyan": ("queued", "running", "verifying", "searching", "looking"),
    "yellow": ("paused", "disabled", "warning", "none", "destroy_scheduled", "completed_with_failures"),
    "red": ("failed", "overdue", "compromised", "critical", "lost"),
    "dim": ("decrypt_only", "destroyed", "retired", "superseded", "rolled_back", "info"),
}
STYLES = {word: style for style, words in _STYLES.items() for word in words}
_SAYING = ("state", "severity", "schedule", "finding")


def heading(column: str) -> str:
    """Return what stands over a column."""
    return _HEADINGS.get(column) or column.removesuffix("_at").removesuffix("_id").replace("_", " ")


def fitted(
    rows: Sequence[Row], columns: Sequence[str], width: int, header: bool = True
) -> Iterator[RenderableType]:
    """Yield what makes a table of this width.

    On one that is not wide, columns without anything in them are left out, and times to come are relative.
    What does not fit then: all times are short, a sentence goes over several lines, and what is widest stands
    under its row.
    """
    cells = _fitting(rows, columns, width)
    below: dict[str, list[str]] = {}
    widths = {name: _width({name: texts}) for name, texts in cells.items()}
    while sum(widths.values()) + GAP * (len(widths) - 1) > width and len(widths) > 1:
        widest = max(_movable(widths), key=lambda name: widths[name])
        room = width - sum(widths.values()) + widths[widest] - GAP * (len(widths) - 1)
        if room >= max(SENTENCE, *(cell_len(word) for text in cells[widest] for word in text.split())):
            widths[widest] = room
            break
        below[widest] = cells.pop(widest)
        del widths[widest]
    numbers = _numbers(rows, columns)
    if not below:
        yield _table(cells, widths, numbers, header)
        return
    if header:
        yield _table({name: [] for name in cells}, widths, numbers)
    for number in range(len(rows)):
        yield _table({name: [texts[number]] for name, texts in cells.items()}, widths, numbers, header=False)
        for name in columns:
            if name in below and _is_something(rows[number][name]):
                text = Text.assemble((f"{heading(name)}: ", "dim"), below[name][number])
                yield Padding(text, (0, 0, 0, INDENT))


def lines(rows: Sequence[Row], columns: Sequence[str], width: int, header: bool = True) -> list[str] | None:
    """Return the lines of such a table where a line is enough for each row, without colours; else None.

    For any number of rows: what lays tables out takes a thousand times as long as to read them.
    """
    cells = _fitting(rows, columns, width)
    if _width(cells) > width:
        return None
    numbers = _numbers(rows, cells)
    padded = []
    for name, texts in cells.items():
        room = _width({name: texts})
        pads = [" " * (room - _length(text)) for text in (heading(name), *texts)]
        pairs = zip(pads, (heading(name), *texts), strict=True)
        padded.append([pad + text if name in numbers else text + pad for pad, text in pairs])
    found = [(" " * GAP).join(line).rstrip() for line in zip(*padded, strict=True)]
    return found if header else found[1:]


def _fitting(rows: Sequence[Row], columns: Sequence[str], width: int) -> dict[str, list[str]]:
    """Return the cells of a table, with times that take as much room as there is."""
    columns, now = telling(rows, columns, width), datetime.now(UTC)
    cells = _cells(rows, columns, None if width >= WIDE else now, whole=True)
    return cells if _width(cells) <= width else _cells(rows, columns, now)


def telling(rows: Sequence[Row], columns: Sequence[str], width: int) -> list[str]:
    """Return the columns that are shown at this width: where it is not wide, those that say something."""
    if width >= WIDE and _width(_cells(rows, columns)) <= width:
        return list(columns)
    return [name for name in columns if any(_is_something(row[name]) for row in rows)]


def record(row: Row, width: int) -> Table:
    """Return a table with a line for each column of a row that says something."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in row.items():
        if value is not None and (width >= WIDE or _is_something(value)):
            text = shown(name, value)
            table.add_row(name.replace("_", " "), Text(text, STYLES.get(text, "")))
    return table


def _cells(
    rows: Sequence[Row], columns: Sequence[str], now: datetime | None = None, whole: bool = False
) -> dict[str, list[str]]:
    # As seen from now, what is of no tenant does not say so.
    given = {name: [None if now and row[name] == NIL else row[name] for row in rows] for name in columns}
    return {name: [shown(name, one, now=now, whole=whole) for one in given[name]] for name in columns}


def _numbers(rows: Sequence[Row], columns: Iterable[str]) -> list[str]:
    return [name for name in columns if all(isinstance(row[name], int | float | None) for row in rows)]


def _is_something(value: Any) -> bool:
    return value not in (None, "", NIL, [], {})


def _width(cells: Mapping[str, Sequence[str]]) -> int:
    widths = [max(map(_length, (heading(name), *cells[name]))) for name in cells]
    return sum(widths) + GAP * (len(widths) - 1)


def _length(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def _movable(widths: Mapping[str, int]) -> list[str]:
    """Return the columns that a row is understood without: neither its name nor what it says of that."""
    names = list(widths)[1:]
    return [name for name in names if name not in _SAYING] or names


def _table(
    cells: Mapping[str, Sequence[str]], widths: Mapping[str, int], numbers: Sequence[str], header: bool = True
) -> Table:
    table = Table(box=None, pad_edge=False, show_header=header, header_style="bold")
    for name, width in widths.items():
        table.add_column(heading(name), justify="right" if name in numbers else "left", width=width)
    for texts in zip(*(cells[name] for name in widths), strict=True):
        table.add_row(*(Text(text, STYLES.get(text, "")) for text in texts))
    return table
