"""Assemble the SQL sources: the only place that knows how the files of ``sql/`` become an installation.

Three roads lead to the same catalog: ``extension`` (CREATE EXTENSION), ``plain`` (``pg-rekey init``, in one
transaction) and ``supabase`` (a migration). In a checkout the text is assembled from the sources; an
installed wheel carries it assembled.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import click

Road = Literal["extension", "plain", "supabase"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = Path(__file__).parent / "sql"
SOURCES = ROOT / "sql"
DIST = SOURCES / "dist"
MIGRATION = ROOT / "supabase" / "migrations" / "20260101000000_pg_rekey.sql"
EXTENSION_GUARD = '\\echo Use "CREATE EXTENSION pg_rekey" to load this file. \\quit\n'


def version() -> str:
    """Return the version of this release, as the control file states it."""
    folder = PACKAGED if PACKAGED.is_dir() else SOURCES
    control = (folder / "pg_rekey.control").read_text()
    match = re.search(r"^default_version = '([^']+)'", control, re.MULTILINE)
    if match is None:
        raise ValueError("pg_rekey.control has no default_version")
    return match[1]


def assemble(road: Road) -> str:
    """Assemble the whole installation script of one road from the sources."""
    sources = [*_once(), *_always()]
    if road == "extension":
        sources.append(SOURCES / "extension.sql")
    return (EXTENSION_GUARD if road == "extension" else "") + _join(sources)


def assemble_code() -> str:
    """Assemble what is idempotent: functions, views, policies and grants, without the tables."""
    return _join([SOURCES / "header.sql", *_always()])


def sql_script(road: Road) -> str:
    """Return the installation script of one road, to be run in one transaction."""
    if not PACKAGED.is_dir():
        return assemble(road)
    return (PACKAGED / (_extension_file() if road == "extension" else "pg_rekey-plain.sql")).read_text()


def outputs() -> dict[Path, str]:
    """Return the generated files, as they should be."""
    return {
        DIST / _extension_file(): assemble("extension"),
        DIST / "pg_rekey-plain.sql": assemble("plain"),
        MIGRATION: assemble("supabase"),
    }


def stale() -> list[Path]:
    """Return the generated files that are missing, differ from their sources, or should not be there."""
    wanted = outputs()
    differ = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    return differ + [path for path in sorted(DIST.glob("*.sql")) if path not in wanted]


def write() -> None:
    """Write the generated files, and remove those of other versions."""
    wanted = outputs()
    for path in stale():
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
        else:
            path.unlink()


def _extension_file() -> str:
    return f"pg_rekey--{version()}.sql"


def _once() -> Iterator[Path]:
    yield SOURCES / "header.sql"
    yield from sorted((SOURCES / "schema").glob("*.sql"))


def _always() -> Iterator[Path]:
    yield from sorted((SOURCES / "code").glob("*.sql"))
    yield SOURCES / "footer.sql"


def _join(sources: list[Path]) -> str:
    parts = [f"-- pg_rekey {version()}, assembled by `make sql`: edit the sources in sql/, not this file.\n"]
    for path in sources:
        parts.append(f"\n-- {path.relative_to(ROOT)}\n{path.read_text().strip()}\n")
    return "".join(parts).replace("__VERSION__", version())


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if a generated file is stale.")
def main(check: bool) -> None:
    """Write the generated SQL files."""
    if not check:
        write()
    elif files := stale():
        for path in files:
            click.echo(f"{path.relative_to(ROOT)} is stale: run `make sql`", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
