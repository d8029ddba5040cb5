"""What is published: the source distribution, the wheel built from it, and what `make install` places."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import connect, value
from pg_rekey import local, release

PACKAGE = release.ROOT / "orchestrator" / "pg_rekey"


def run(*command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command that should succeed, and return what it prints."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> set[str]:
    """Return the files below a folder, without what Python leaves there."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, release.ROOT)
    return folder


@pytest.fixture(scope="module")
def sources(built: Path) -> Path:
    """The source distribution, unpacked."""
    [path] = built.glob("*.tar.gz")
    run("tar", "-xzf", path, "-C", built)
    return built / path.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    [path] = built.glob("*.whl")
    return path


def test_sources(sources: Path) -> None:
    """All that builds, installs and tests, and nothing else that lies about."""
    project = tomllib.loads((release.ROOT / "pyproject.toml").read_text())
    names = [name[1:] for name in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]]
    included = {path.name for name in names for path in release.ROOT.glob(name)}
    always = {".gitignore", "LICENSE", "PKG-INFO", "pyproject.toml"}
    assert {path.name for path in sources.iterdir()} == included | always
    for folder in ("orchestrator", "sql", "supabase", "tests"):
        assert files(sources / folder) == files(release.ROOT / folder)


@pytest.mark.parametrize("name", ["api", "build", "dev"])
def test_what_is_locked(name: str) -> None:
    """CI and the images install one release of each dependency, by hash, and within the declared range."""
    project = tomllib.loads((release.ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    declared = {
        "api": project["project"]["dependencies"] + extras["api"],
        "build": project["build-system"]["requires"],
        "dev": project["project"]["dependencies"] + extras["api"] + extras["dev"],
    }[name]
    text = (release.ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ")
    lines = [line.split(" --hash=sha256:") for line in text.splitlines() if not line.startswith("#")]
    assert all(len(line) > 1 for line in lines)
    locked: dict[str, set[str]] = {}
    for requirement in (Requirement(line[0].strip()) for line in lines):
        [version] = requirement.specifier
        assert version.operator == "=="
        locked.setdefault(canonicalize_name(requirement.name), set()).add(version.version)
    for requirement in map(Requirement, declared):
        if requirement.name != project["project"]["name"]:
            versions = locked[canonicalize_name(requirement.name)]
            assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_wheel(wheel: Path) -> None:
    """The package and the assembled scripts."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0] == f"pg_rekey-{release.version()}.dist-info"}
    scripts = {f"sql/{path.name}" for path in (release.SOURCES / "pg_rekey.control", *release.DIST.iterdir())}
    assert names - metadata == {f"pg_rekey/{name}" for name in files(PACKAGE) | scripts}


def test_metadata(built: Path, sources: Path) -> None:
    """What a package index shows has no links that lead nowhere, and no source of diagrams."""
    packages = [path for path in built.iterdir() if path.is_file()]
    run(sys.executable, "-m", "twine", "check", "--strict", *packages)
    metadata = message_from_string((sources / "PKG-INFO").read_text())
    assert metadata["Version"] == release.version()
    page = metadata.get_payload()
    assert isinstance(page, str)
    assert page.startswith("# pg_rekey\n")
    assert re.findall(r"\]\((?!https:)|mermaid", page) == []
    assert "docs/operations.md: schedules" in page


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pg-rekey` of the wheel, in a virtual environment that has its dependencies from ours."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", folder)
    run(*pip, "install", "--no-index", "--no-deps", wheel)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "pg-rekey"


def test_the_wheel_initialises_a_database(
    command: Path, make_database: Callable[..., str], kek: bytes, tmp_path: Path
) -> None:
    """From an empty directory."""
    dsn = make_database()
    environment = {"PATH": os.defpath, "PG_REKEY_DSN": dsn, "PG_REKEY_KEK": kek.hex()}
    where = "import pg_rekey; print(pg_rekey.__file__)"
    assert run(command.parent / "python", "-I", "-c", where).startswith(str(command.parents[1]))
    said = run(command, "init", cwd=tmp_path, env=environment)
    assert f"pg_rekey {release.version()} installed in schema rekey" in said
    assert said.endswith("ready\n")
    assert "is up to date" in run(command, "upgrade", cwd=tmp_path, env=environment)
    run(command, "rotate", "--wait", cwd=tmp_path, env=environment)
    with connect(dsn) as connection:
        assert value(connection, "select state from rekey.rotation_status") == "completed"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("road", ["plain", "extension", "supabase", "pgtle"])
def test_the_wheel_prints_its_scripts(command: Path, tmp_path: Path, road: release.Road) -> None:
    assert run(command, "sql", "--road", road, cwd=tmp_path) == release.assemble(road)


@pytest.mark.parametrize("with_pgxs", [True, False])
def test_make_installs_the_extension(sources: Path, tmp_path: Path, with_pgxs: bool) -> None:
    """From the source distribution to where packagers want it, with make and what comes with the server."""
    if (installation := local.find()) is None:
        pytest.skip("no PostgreSQL is here")
    pg_config = installation.bindir / "pg_config"
    folder = installation.extensions
    if with_pgxs:
        if not Path(run(pg_config, "--pgxs").strip()).exists():
            pytest.skip("PGXS is not installed")
    else:
        folder = Path("/opt/a place/extension")
        pg_config = tmp_path / "pg_config"
        pg_config.write_text('#!/bin/sh\n[ "$1" = --pgxs ] && echo /nowhere/pgxs.mk || echo "/opt/a place"\n')
        pg_config.chmod(0o755)
    target = tmp_path / "root"
    options = (f"PG_CONFIG={pg_config}", f"DESTDIR={target}")
    run("make", "-C", sources, "install", *options, env={"PATH": os.defpath})
    placed = target / folder.relative_to("/")
    assert files(target) == {str(placed.relative_to(target) / path.name) for path in local.extension_files()}
    for path in local.extension_files():
        assert (placed / path.name).read_text() == path.read_text()
        assert (placed / path.name).stat().st_mode & 0o777 == 0o644
    run("make", "-C", sources, "uninstall", *options, env={"PATH": os.defpath})
    assert files(target) == set()


def test_make_says_what_it_lacks(sources: Path) -> None:
    command = ["make", "-C", str(sources), "install", "PG_CONFIG=/nowhere/pg_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "PG_CONFIG=/path/to/pg_config" in done.stderr
