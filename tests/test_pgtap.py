"""Runs the pgTAP files of tests/pgtap."""

from pathlib import Path

import pytest

from helpers import Connection, value

FILES = sorted((Path(__file__).parent / "pgtap").glob("*.sql"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.stem))
def test_pgtap(conn: Connection, path: Path) -> None:
    if not value(conn, "select count(*) from pg_available_extensions where name = 'pgtap'"):
        pytest.skip("the server does not have pgTAP")
    cursor = conn.execute(path.read_bytes())
    lines: list[str] = []
    for result in cursor.results():
        if result.description:
            lines.extend(str(row[0]) for row in result)
    assert lines[0].startswith("1..")
    assert [line for line in lines[1:] if not line.startswith("ok ")] == []
    assert len(lines) - 1 == int(lines[0].removeprefix("1.."))
