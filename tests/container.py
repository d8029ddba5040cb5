"""The server that the tests run on, which may be the database image of docker/ in a container.

`make test TARGET=...` says what it is: `local`, a throwaway server of the machine's own PostgreSQL; `docker`,
the image; `docker:18`, the same of another version. Without TARGET, it is Docker where that answers and no
PostgreSQL is installed. PG_REKEY_TEST_DSN names a server of one's own instead.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import click
from docker.errors import BuildError, DockerException
from testcontainers.community.postgres import PostgresContainer
from testcontainers.core.config import ConnectionMode
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.image import DockerImage

from pg_rekey import local, release

DSN = "PG_REKEY_TEST_DSN"
PUT_EXTENSION = "PG_REKEY_TEST_PUT_EXTENSION"
TARGET = "PG_REKEY_TEST_TARGET"


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The DSN of a superuser."""
    if dsn := os.environ.get(DSN):
        yield dsn
    elif (major := wanted()) is not None:
        with started(build(major)) as dsn:
            yield dsn
    else:
        local.ensure_test_tools()
        with local.Server() as throwaway:
            yield throwaway.dsn()


def is_shared() -> bool:
    """Tell whether all processes of a run have one server; otherwise each can have its own."""
    return bool(os.environ.get(DSN)) or wanted() is not None


def wanted() -> str | None:
    """Return the version to run in a container, '' for what the image has, or None for no container."""
    target = os.environ.get(TARGET, "")
    if not target:
        return "" if local.find() is None and answers() else None
    found = re.fullmatch(r"local|docker(?::(\d+))?", target)
    if not found:
        raise click.UsageError(f"TARGET is local, docker or docker:{local.OLDEST} and the like, not {target}")
    return None if target == "local" else found[1] or ""


def answers() -> bool:
    """Tell whether there is a Docker that answers."""
    try:
        return subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def build(major: str = "") -> str:
    """Build the stage `test` of the database image, and return its tag."""
    tag = f"pg-rekey-db-test:{major or 'latest'}"
    print(f"building {tag} for the tests", file=sys.stderr)
    try:
        DockerImage(
            path=release.ROOT,
            dockerfile_path="docker/db.Dockerfile",
            target="test",
            tag=tag,
            buildargs={"POSTGRES": major} if major else {},
            forcerm=True,
            clean_up=False,
        ).build()
    except BuildError as error:
        log = "".join(str(line.get("stream", "")) for line in error.build_log)
        raise click.ClickException(f"{tag} cannot be built: {error}\n{log[-2000:]}") from error
    except DockerException as error:
        raise click.ClickException(f"Docker: {error}") from error
    return tag


@contextlib.contextmanager
def started(tag: str) -> Iterator[str]:
    """A container of that image; the environment gets its DSN, and the command that copies files to it."""
    settings = local.SETTINGS | local.CRON | {"fsync": "off", "full_page_writes": "off"}
    container = PostgresContainer(tag, username="postgres", dbname="postgres", driver=None)
    container.with_env("POSTGRES_INITDB_ARGS", " ".join(local.INITDB))
    # Tests log in as many roles; so nobody but this machine may reach it.
    container.with_env("POSTGRES_HOST_AUTH_METHOD", "trust")
    container.ports[str(container.port)] = ("127.0.0.1", None)  # type: ignore[assignment]
    container.with_command(["postgres", *(f"-c{name}={value}" for name, value in settings.items())])
    with container:
        mode = container.get_docker_client().get_connection_mode()
        host = container.get_container_host_ip() if mode is ConnectionMode.bridge_ip else "127.0.0.1"
        put = [sys.executable, __file__, container.get_container_id()]
        os.environ[PUT_EXTENSION] = shlex.join(put)
        os.environ[DSN] = (
            f"postgresql://postgres@{host}:{container.get_exposed_port(container.port)}/postgres"
        )
        yield os.environ[DSN]


def put(name: str, *files: str) -> None:
    """Copy files to where CREATE EXTENSION of a container looks for them."""
    with contextlib.closing(DockerClient().client) as client:
        container = client.containers.get(name)
        major = container.exec_run(["printenv", "PG_MAJOR"]).output.decode().strip()
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for file in map(Path, files):
                member = tarfile.TarInfo(file.name)
                member.mode, member.size = 0o644, file.stat().st_size
                with file.open("rb") as content:
                    archive.addfile(member, content)
        container.put_archive(f"/usr/share/postgresql/{major}/extension", packed.getvalue())


if __name__ == "__main__":
    put(*sys.argv[1:])
