"""Make what other registries than PyPI take, in build/: `make packages`. Nothing is sent anywhere.

npm: the package `pg-rekey`, the SQL and its types for PGlite and other JavaScript. PGXN: an archive with
META.json. database.dev: a folder for `dbdev publish`.
"""

import json
import shutil
import zipfile
from pathlib import Path

from pg_rekey import release

HERE = Path(__file__).parent
BUILD = release.ROOT / "build"
LICENSE = release.ROOT / "LICENSE"


def main() -> None:
    """Make all of them, and say where they are."""
    for path in (npm(BUILD / "npm"), pgxn(BUILD), database_dev(BUILD / "database.dev")):
        print(path.relative_to(release.ROOT))


def npm(folder: Path) -> Path:
    """Make the npm package, for `npm pack` or `npm publish`."""
    empty(folder)
    script = release.assemble("plain")
    described = json.loads((HERE / "npm" / "package.json").read_text())
    described = {"name": described.pop("name"), "version": release.version(), **described}
    (folder / "package.json").write_text(json.dumps(described, indent=2) + "\n")
    (folder / "index.js").write_text(
        f"export const version = {json.dumps(release.version())}\nexport const sql = {json.dumps(script)}\n"
    )
    (folder / "pg_rekey.sql").write_text(script)
    for path in (HERE / "npm" / "index.d.ts", HERE / "npm" / "README.md", LICENSE):
        shutil.copy(path, folder)
    return folder


def pgxn(folder: Path) -> Path:
    """Make the archive, in which `make install` does what it does in sql/."""
    described = json.loads((HERE / "pgxn" / "META.json").read_text())
    described["version"] = release.version()
    file = f"sql/dist/pg_rekey--{release.version()}.sql"
    described["provides"] = {
        "pg_rekey": {"abstract": described["abstract"], "file": file, "version": release.version()}
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"pg_rekey-{release.version()}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{path.stem}/META.json", json.dumps(described, indent=2) + "\n")
        archive.write(HERE / "pgxn" / "Makefile", f"{path.stem}/Makefile")
        kept = [
            LICENSE,
            release.ROOT / "README.md",
            release.ROOT / "CHANGELOG.md",
            release.SOURCES / "Makefile",
        ]
        for one in [
            *kept,
            release.SOURCES / "pg_rekey.control",
            *sorted(release.DIST.glob("pg_rekey--*.sql")),
        ]:
            archive.write(one, f"{path.stem}/{one.relative_to(release.ROOT)}")
    return path


def database_dev(folder: Path) -> Path:
    """Make the folder: the control file, the scripts without what is psql's, and a page."""
    empty(folder)
    shutil.copy(release.SOURCES / "pg_rekey.control", folder)
    shutil.copy(HERE / "npm" / "README.md", folder)
    for path in release.DIST.glob("pg_rekey--*.sql"):
        (folder / path.name).write_text(path.read_text().removeprefix(release.EXTENSION_GUARD))
    return folder


def empty(folder: Path) -> None:
    """Make a folder, or empty it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


if __name__ == "__main__":
    main()
