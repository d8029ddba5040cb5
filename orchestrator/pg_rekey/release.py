"""Assemble the SQL sources: the only place that knows how the files of ``sql/`` become an installation.

Four roads lead to the same catalog: ``extension`` (CREATE EXTENSION), ``plain`` (``pg-rekey init``, in one
transaction), ``supabase`` (a migration) and ``pgtle`` (CREATE EXTENSION where pg_tle keeps the scripts, since
nobody can place files). The script is the same but for the first line, which keeps psql from running what
belongs to CREATE EXTENSION, and what hands it to pg_tle. In a checkout it is assembled from the sources; an
installed wheel carries it assembled.

From one release to the next there is a step: ``sql/update.sql``, then what ``sql/updates/A--B.sql`` does to
the state, where that file exists, and then all the code anew. What was released is frozen:
``sql/dist/released.sha256`` has the checksums.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Literal

import click

Road = Literal["extension", "plain", "supabase", "pgtle"]
Step = tuple[str, str]

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = Path(__file__).parent / "sql"
SOURCES = ROOT / "sql"
DIST = SOURCES / "dist"
MIGRATIONS = ROOT / "supabase" / "migrations"
FIRST_MIGRATION = datetime(2026, 1, 1)
STAMP = "%Y%m%d%H%M%S"
PGTLE_QUOTE = "$_pg_rekey_tle_$"
EXTENSION_GUARD = '\\echo Use "CREATE EXTENSION pg_rekey" to load this file. \\quit\n'


def version() -> str:
    """Return the version of this release, as the control file states it."""
    return _control("default_version")


def released() -> list[str]:
    """Return the versions that were released, the oldest first."""
    return [match[1] for path in frozen() if (match := re.fullmatch(r"pg_rekey--([^-]+)\.sql", path.name))]


def frozen() -> dict[Path, str]:
    """Return the files that may never change again, with their checksums."""
    path = _checksums()
    lines = path.read_text().splitlines() if path.exists() else []
    return {ROOT / name: digest for digest, name in (line.split("  ") for line in lines)}


def steps(since: str | None = None) -> list[Step]:
    """Return the steps from a version to this one, or all that there are. KeyError: it is not among them."""
    chain = list(dict.fromkeys([*released(), version()]))
    if since is not None:
        if since not in chain:
            raise KeyError(since)
        chain = chain[chain.index(since) :]
    return list(pairwise(chain))


def sql_script(road: Road) -> str:
    """Return the whole installation script of one road, to be run in one transaction."""
    if PACKAGED.is_dir():
        return _for_road(road, (PACKAGED / _file(version())).read_text())
    return assemble(road)


def step_script(road: Road, step: Step) -> str:
    """Return the script of one step on one road, to be run in one transaction."""
    return _for_road(road, (_scripts() / _file(*step)).read_text())


def assemble(road: Road) -> str:
    """Assemble the whole installation script of one road from the sources."""
    once = sorted((SOURCES / "schema").glob("*.sql"))
    return _for_road(road, _join(version(), [*once, *_code(), SOURCES / "extension.sql"]))


def assemble_step(road: Road, step: Step) -> str:
    """Assemble the script from one version to the next of one road from the sources."""
    update = SOURCES / "updates" / f"{'--'.join(step)}.sql"
    changes = [SOURCES / "update.sql", *([update] if update.exists() else [])]
    script = _join(" to ".join(step), [*changes, *_code(), SOURCES / "extension.sql"])
    return _for_road(road, script.replace("__SINCE__", step[0]))


def pgtle_update(since: str) -> str:
    """Return what teaches pg_tle the way from a version to this one. KeyError: there is none."""
    calls = [
        f"install_update_path('pg_rekey', '{step[0]}', '{step[1]}', {_quoted(script)})"
        for step in steps(since)
        for script in [step_script("plain", step)]
    ]
    if not calls:
        raise KeyError(since)
    # For databases that are restored, and for new ones: they get the default version.
    calls += [
        f"install_extension_version_sql('pg_rekey', '{version()}', {_quoted(sql_script('plain'))})",
        f"set_default_version('pg_rekey', '{version()}')",
    ]
    head = f"-- For a member of pgtle_admin; then: alter extension pg_rekey update to '{version()}';\n"
    return head + "begin;\n" + "".join(f"select pgtle.{call};\n" for call in calls) + "commit;\n"


def code() -> Iterator[tuple[Path, str]]:
    """Yield the files of what is idempotent, each with its SQL: functions, views, policies and grants."""
    for path in (SOURCES / "header.sql", *_code()):
        yield path, path.read_text().replace("__VERSION__", version())


def assemble_code() -> str:
    """Assemble that in one script."""
    return "\n".join(text for _, text in code())


def outputs() -> dict[Path, str]:
    """Return the generated files of this version, as they should be."""
    wanted = {DIST / _file(version()): assemble("extension")}
    if history := steps():
        last = history[-1]
        wanted[DIST / _file(*last)] = assemble_step("extension", last)
        wanted[_migration(len(history))] = assemble_step("supabase", last)
    else:
        wanted[_migration(0)] = assemble("supabase")
    return wanted


def problems() -> list[str]:
    """Return what is wrong with the generated files, a line each; nothing: they can be committed."""
    found = [f"{_name(path)} is stale: run `make sql`" for path in stale()]
    kept = frozen()
    for path, digest in kept.items():
        if not path.exists() or _digest(path.read_text()) != digest:
            found.append(f"{_name(path)} was released and may not change: restore it")
    if any(kept.get(path, _digest(text)) != _digest(text) for path, text in outputs().items()):
        found.append(
            f"{version()} was released: raise default_version in sql/pg_rekey.control to change its SQL"
        )
    known = {"--".join(step) for step in steps()}
    for path in sorted((SOURCES / "updates").glob("*.sql")):
        if path.stem not in known:
            found.append(f"{_name(path)} belongs to no step from one release to the next")
    changelog = ROOT / "CHANGELOG.md"
    for heading in re.findall(r"^## \[?(\d[^\s\]]*)", changelog.read_text(), re.MULTILINE):
        if heading not in released():
            found.append(f"CHANGELOG.md has {heading}, which is not frozen: run `make sql ARGS=--freeze`")
    return found


def stale() -> list[Path]:
    """Return the generated files that are missing, differ from their sources, or should not be there."""
    wanted = outputs()
    kept = frozen()
    there = [*DIST.glob("*.sql"), *MIGRATIONS.glob("*_pg_rekey*.sql")]
    differ = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    return [path for path in [*differ, *sorted(set(there) - set(wanted))] if path not in kept]


def write() -> None:
    """Write the generated files, and remove those that are of no version; what was released stays."""
    wanted = outputs()
    for path in stale():
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
        else:
            path.unlink()


def freeze() -> None:
    """Add the files of this version to those that may never change again."""
    lines = [f"{_digest(text)}  {_name(path)}\n" for path, text in outputs().items()]
    with _checksums().open("a") as file:
        file.writelines(lines)


def script_version(script: str) -> str | None:
    """Return the version that a script leads to, as its first line says; None: it is none of ours."""
    match = re.match(r"-- pg_rekey (?:\S+ to )?(\S+), assembled", script)
    return match and match[1]


def _control(name: str) -> str:
    """Return a text of the extension's control file."""
    folder = PACKAGED if PACKAGED.is_dir() else SOURCES
    match = re.search(rf"^{name} = '([^']+)'", (folder / "pg_rekey.control").read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"pg_rekey.control has no {name}")
    return match[1]


def _scripts() -> Path:
    return PACKAGED if PACKAGED.is_dir() else DIST


def _checksums() -> Path:
    return _scripts() / "released.sha256"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file(*versions: str) -> str:
    return f"pg_rekey--{'--'.join(versions)}.sql"


def _migration(place: int) -> Path:
    """Return the migration of our own Supabase project for the installation (0) or a later step."""
    stamp = FIRST_MIGRATION + timedelta(days=place)
    return MIGRATIONS / f"{stamp:{STAMP}}_pg_rekey.sql"


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _code() -> Iterator[Path]:
    yield from sorted((SOURCES / "code").glob("*.sql"))
    yield SOURCES / "footer.sql"


def _for_road(road: Road, script: str) -> str:
    if road == "extension":
        return script
    bare = script.removeprefix(EXTENSION_GUARD)
    return bare if road != "pgtle" else _for_pgtle(bare)


def _for_pgtle(script: str) -> str:
    """Return what hands the installation to pg_tle, with what the control file says of it."""
    described = ", ".join(f"'{text}'" for text in ("pg_rekey", version(), _control("comment")))
    return (
        "-- For a member of pgtle_admin; then: create extension pg_rekey schema pg_catalog;\n"
        f"select pgtle.install_extension({described}, {_quoted(script)}, '{{{_control('requires')}}}');\n"
    )


def _quoted(script: str) -> str:
    assert PGTLE_QUOTE not in script
    return f"{PGTLE_QUOTE}\n{script}{PGTLE_QUOTE}"


def _join(title: str, files: list[Path]) -> str:
    parts = [f"-- pg_rekey {title}, assembled by `make sql`: edit the sources in sql/, not this file.\n"]
    for path in [SOURCES / "header.sql", *files]:
        parts.append(f"\n-- {path.relative_to(ROOT)}\n{path.read_text().strip()}\n")
    return EXTENSION_GUARD + "".join(parts).replace("__VERSION__", version())


@click.command()
@click.option(
    "--check", is_flag=True, help="Write nothing; fail if a file is stale, or was released and changed."
)
@click.option(
    "--freeze", "freezing", is_flag=True, help="After writing, freeze this version: it is being released."
)
def main(check: bool, freezing: bool) -> None:
    """Write the generated SQL files."""
    if not check:
        write()
    found = problems() if check or freezing else []
    if freezing and version() not in released():
        found = [problem for problem in found if not problem.startswith(f"CHANGELOG.md has {version()},")]
        if not found:
            freeze()
    for problem in found:
        click.echo(problem, err=True)
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
