"""pg_upgrade takes a database along in the middle of a rotation, and the rotation goes on."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

import servers
from driving import on_versions, rotate, rotation, run, step
from estate import Estate
from pg_rekey import local, release


@pytest.fixture(
    params=[
        pytest.param(None, id="installed"),
        pytest.param(("15.19", "18.6"), id="15 to 18", marks=pytest.mark.pypi),
    ]
)
def pair(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[local.Server, local.Server]]:
    """A server of the oldest version that is here and one of the newest; and 15 and 18, as packages.

    With only one version, pg_upgrade refuses the same things and takes everything the same way.
    """
    with ExitStack() as stack:
        if request.param:
            try:
                found = [stack.enter_context(servers.unpacked(version)) for version in request.param]
            except servers.Unavailable as error:
                pytest.skip(str(error))
        else:
            usable = [one for one in local.installations() if (one.bindir / "pg_upgrade").exists()]
            found = sorted(usable, key=lambda one: one.major)
        if not found:
            pytest.skip("no PostgreSQL with pg_upgrade is here")
        for installation in found if request.param else ():
            local.install_extension(installation)
        started = []
        for installation in (found[0], found[-1]):
            monkeypatch.setattr(local, "ensure", lambda it=installation: it)
            started.append(stack.enter_context(local.Server()))
        yield started[0], started[1]


@pytest.mark.usefixtures("extension_files")
@pytest.mark.parametrize("road", ["plain", "extension"])
def test_pg_upgrade_in_the_middle(
    pair: tuple[local.Server, local.Server], kek: bytes, road: release.Road
) -> None:
    old, new = pair
    for server in pair:
        if road == "extension" and not server.installation.has("pg_rekey"):
            pytest.skip(f"the files of the extension are not in {server.installation.extensions}")
    estate = Estate.build(old, "upgraded", kek, road=road)
    with estate.connect() as connection:
        number = rotate(connection)
        while rotation(connection, number, "rows_done") == 0:
            step(connection)
        done = rotation(connection, number, "rows_done")
    for server in pair:
        server._pg_ctl("stop", "-m", "fast")
    (new.data / "postmaster.opts").rename(new.directory / "opts")
    upgrade(old, new)
    (new.directory / "opts").rename(new.data / "postmaster.opts")
    new.restart()
    copy = replace(estate, server=new)
    with copy.connect() as connection:
        assert rotation(connection, number, "state", "rows_done") == ("running", done)
        copy.check(connection)
        run(connection)
        assert rotation(connection, number, "state", "rows_failed") == ("completed", 0)
        assert set(on_versions(connection)) == {2}
        copy.check(connection)


def upgrade(old: local.Server, new: local.Server) -> None:
    """Run pg_upgrade."""
    account = new._account
    options = ("-U", old.superuser, "-s", str(new.directory))
    done = subprocess.run(
        [
            new.bindir / "pg_upgrade",
            "-b",
            old.bindir,
            "-B",
            new.bindir,
            "-d",
            old.data,
            "-D",
            new.data,
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=new.directory,  # where it leaves a script
        user=account and account.pw_uid,
        group=account and account.pw_gid,
        extra_groups=account and [],
    )
    assert done.returncode == 0, done.stdout
