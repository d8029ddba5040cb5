"""What `make packages` makes for other registries than PyPI: each is installed, and works."""

import json
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import npm
import servers
from helpers import connect, create_database, initialize, value
from packages import build
from pg_rekey import local, release


def test_the_npm_package_carries_the_sql(tmp_path: Path) -> None:
    """Packed, and installed in an empty folder."""
    folder = build.npm(tmp_path / "npm")
    [packed] = json.loads(npm.npm(folder, "pack", "--json"))
    assert {one["path"] for one in packed["files"]} == {
        "LICENSE",
        "README.md",
        "index.d.ts",
        "index.js",
        "package.json",
        "pg_rekey.sql",
    }
    empty = tmp_path / "empty"
    empty.mkdir()
    npm.install(empty, folder / packed["filename"])
    script = "import { sql, version } from 'pg-rekey'; process.stdout.write(JSON.stringify({ sql, version }))"
    said = subprocess.run(
        ["node", "--input-type=module", "--eval", script],
        cwd=empty,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout) == {"sql": release.assemble("plain"), "version": release.version()}
    assert (empty / "node_modules/pg-rekey/pg_rekey.sql").read_text() == release.assemble("plain")


@pytest.mark.npm
def test_its_types_are_those_of_the_database(tmp_path: Path, ready: object) -> None:
    """TypeScript takes a program that uses them."""
    npm.install(build.npm(tmp_path / "npm"), "typescript@5.9.3")
    program = tmp_path / "npm" / "program.ts"
    program.write_text(
        "import { sql, version, type RotationStatus } from './index.js'\n"
        "const text: string = sql + version\n"
        "const done = (one: RotationStatus): boolean => one.state === 'completed' && text !== ''\n"
        "export default done\n"
    )
    tsc = [
        "node",
        "node_modules/typescript/bin/tsc",
        "--strict",
        "--noEmit",
        "--module",
        "nodenext",
        program.name,
    ]
    done = subprocess.run(tsc, cwd=program.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def copy() -> Iterator[local.Installation]:
    """A server of our own, without the extension's files."""
    try:
        with servers.copied(local.ensure()) as copy:
            for path in copy.extensions.glob("pg_rekey*"):
                path.unlink()
            yield copy
    except servers.Unavailable as error:
        pytest.skip(str(error))


def test_the_archive_for_pgxn_installs(
    tmp_path: Path, copy: local.Installation, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.pgxn(tmp_path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    root = tmp_path / path.stem
    described = json.loads((root / "META.json").read_text())
    assert described["version"] == release.version()
    assert (root / described["provides"]["pg_rekey"]["file"]).exists()
    for target in ("all", "install"):
        subprocess.run(
            ["make", "-C", root, target, f"PG_CONFIG={copy.bindir / 'pg_config'}"],
            check=True,
            capture_output=True,
        )
    works(copy, kek, monkeypatch)


def test_the_folder_for_database_dev_is_an_extension(
    tmp_path: Path, copy: local.Installation, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dbdev takes one control file, the scripts beside it, and nothing that is psql's."""
    folder = build.database_dev(tmp_path / "it")
    assert [path.name for path in folder.glob("*.control")] == ["pg_rekey.control"]
    for path in folder.glob("*.sql"):
        assert not [line for line in path.read_text().splitlines() if line.startswith("\\")]
    for path in (*folder.glob("*.control"), *folder.glob("*.sql")):
        (copy.extensions / path.name).write_bytes(path.read_bytes())
    works(copy, kek, monkeypatch)


def works(installation: local.Installation, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the extension on a server of this installation, and use it."""
    monkeypatch.setattr(local, "ensure", lambda: installation)
    with local.Server() as server:
        dsn = create_database(server.dsn(), "packed")
        with connect(dsn) as connection:
            connection.execute("create extension pg_rekey cascade")
            initialize(connection, kek)
            connection.execute("select rekey.set_secret('name', 'value')")
            assert value(connection, "select rekey.get_secret('name')") == "value"
