"""Docker Compose: what the files promise, what `make kek` makes, and a whole system in containers."""

import configparser
import json
import os
import re
import shutil
import stat
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from psycopg.conninfo import make_conninfo

from helpers import connect, value
from pg_rekey import kek as keks
from pg_rekey import release
from pg_rekey.api.tokens import Tokens
from postgrest import PostgREST, Response

COMPOSE = release.ROOT / "docker-compose.yml"
SESSION = release.ROOT / "docker-compose.session.yml"
DOCKERFILES = sorted(release.ROOT.glob("docker/*.Dockerfile"))
BASE_IMAGES = ("postgres:17-trixie", "python:3.13-slim-trixie")
CHECKOUT = (
    "LICENSE",
    "Makefile",
    "README.md",
    "docker",
    "orchestrator",
    "pyproject.toml",
    "requirements",
    "sql",
    ".dockerignore",
)
ROWS = 20_000
# What only the tests do: they connect from outside, and are in a hurry.
TESTS = "tests.yml"
OVERRIDE = """
services:
  db: {ports: ["127.0.0.1::5432"], healthcheck: {interval: 1s}}
  worker: {healthcheck: {interval: 1s}}
  api: {healthcheck: {interval: 1s}}
"""


class _Loader(yaml.SafeLoader):
    """Reads Compose's tags, too."""


def _override(loader: yaml.SafeLoader, node: yaml.Node) -> list[Any]:
    assert isinstance(node, yaml.SequenceNode)
    return loader.construct_sequence(node)


_Loader.add_constructor("!override", _override)


def read(path: Path) -> Any:
    return yaml.load(path.read_text(), _Loader)


def holders(services: dict[str, Any]) -> set[str]:
    """Return the services that have the KEK."""
    return {name for name, service in services.items() if "kek" in service.get("secrets", ())}


def test_every_service_is_confined() -> None:
    for name, service in read(COMPOSE)["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert "build" in service or "COMPOSE_PROJECT_NAME" in service["image"] or ":v" in service["image"], (
            name
        )


def test_no_service_is_told_a_secret() -> None:
    for path in (COMPOSE, SESSION):
        for service in read(path)["services"].values():
            for name, text in service.get("environment", {}).items():
                if re.search("PASSWORD|SECRET|TOKEN|KEK|SERVICEFILE", name):
                    assert text.lstrip("@").startswith("/run/secrets/"), name


def test_who_has_the_kek() -> None:
    assert holders(read(COMPOSE)["services"]) == {"db"}
    session = read(SESSION)["services"]
    assert holders(session) == {"init", "worker", "api"}
    assert session["db"]["secrets"] == ["postgres"]  # in place of the other list, says its tag


def test_the_data_are_in_a_named_volume() -> None:
    compose = read(COMPOSE)
    assert compose["services"]["db"]["volumes"] == ["data:/var/lib/postgresql/data"]
    assert "data" in compose["volumes"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfiles_copy_what_is_there(path: Path) -> None:
    ignored, *let_in = [
        line for line in (release.ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert ignored == "*"
    copied = re.findall(r"(?m)^COPY (?!--)(.+) \S+$", path.read_text())
    assert copied
    for source in " ".join(copied).split():
        assert list(release.ROOT.glob(source)), source
        assert f"!{source.split('/')[0]}" in let_in, source
    # Only images that can be had without a registry's help elsewhere; testcontainers and CI build on them.
    text = path.read_text()
    for name, default in re.findall(r"(?m)^ARG (\w+)=(\S+)$", text):
        text = text.replace(f"${name}", default)
    assert re.findall(r"(?m)^FROM (\S+:\S+)", text)[0] in BASE_IMAGES


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What git has of these files, as far as an image or Compose needs it."""
    for name in (*CHECKOUT, COMPOSE.name, SESSION.name):
        source, target = release.ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    """Return this environment without what would change how Compose and `make kek` behave."""
    kept = {name: text for name, text in os.environ.items() if not re.match("PG|COMPOSE_", name)}
    return kept | more


def make_kek(checkout: Path, **more: str) -> str:
    """Run `make kek`, and return what it says."""
    made = subprocess.run(
        ["make", "kek"], cwd=checkout, env=environment(**more), capture_output=True, text=True, check=True
    )
    return made.stdout


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_make_kek_makes_every_secret_once(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "made ./secrets/kek" in make_kek(checkout)
    secrets = checkout / "secrets"
    made = contents(secrets)
    assert set(made) == {*read(COMPOSE)["secrets"], "admin.header"}
    assert len(keks.parse(made["kek"])) == 32
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in secrets.iterdir()}
    assert modes.pop("admin.header") == 0o600
    assert set(modes.values()) == {0o644}
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert (checkout / ".env").read_text() == "PG_REKEY_SECRETS=./secrets\n"

    monkeypatch.delenv("PG_REKEY_API_TOKENS", raising=False)
    monkeypatch.setenv("PG_REKEY_API_TOKENS_FILE", str(secrets / "api_tokens"))
    bearer = made["admin.header"].removeprefix("Authorization: Bearer ").strip()
    found = Tokens.from_environment().find(bearer)
    assert found is not None
    assert found.name == "admin"

    for name in ("postgres", "api_tokens"):
        (secrets / name).unlink()
    (checkout / ".env").write_text("OTHER=1\n")
    make_kek(checkout)
    again = contents(secrets)
    assert {name for name in made if made[name] != again[name]} == {"postgres", "api_tokens", "admin.header"}
    assert (checkout / ".env").read_text() == "OTHER=1\nPG_REKEY_SECRETS=./secrets\n"


def test_make_kek_keeps_a_kek_of_ones_own(checkout: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "kek").write_text("mine")
    (elsewhere / "kek").chmod(0o600)
    make_kek(checkout, PG_REKEY_SECRETS=str(elsewhere))
    make_kek(checkout)  # where, says .env
    assert (elsewhere / "kek").read_text() == "mine"
    assert stat.S_IMODE((elsewhere / "kek").stat().st_mode) == 0o644
    assert not (checkout / "secrets").exists()


@dataclass
class System:
    """The services of a checkout, in a project of their own."""

    checkout: Path
    project: str
    files: tuple[str, ...] = (COMPOSE.name, TESTS)

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run docker compose."""
        done = subprocess.run(
            ["docker", "compose", *arguments],
            cwd=self.checkout,
            env=environment(
                COMPOSE_PROJECT_NAME=self.project,
                COMPOSE_FILE=os.pathsep.join(self.files),
                PG_REKEY_API_PORT="0",
            ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr + self._logs()
        return done

    def _logs(self) -> str:
        return self.run("logs", "--no-color", check=False).stdout

    def up(self, *arguments: str) -> None:
        """Start everything, and wait until it is healthy."""
        self.run("up", "--detach", "--wait", *arguments)

    def inside(self, service: str, *command: str) -> str:
        """Return what a command in a container prints on both outputs."""
        done = self.run("exec", "-T", service, *command, check=False)
        return done.stdout + done.stderr

    def secret(self, name: str) -> str:
        """Return a password or key that `make kek` made."""
        text = (self.checkout / "secrets" / name).read_text()
        if not text.startswith("["):
            return text
        service = configparser.ConfigParser()
        service.read_string(text)
        return service["pg_rekey"]["password"]

    def dsn(self, user: str, secret: str) -> str:
        """Return how to connect from here; only for the tests is the port published."""
        host, port = self.run("port", "db", "5432").stdout.strip().split(":")
        return make_conninfo(host=host, port=port, dbname="app", user=user, password=self.secret(secret))

    def rotate(self, bearer: str | None) -> Response:
        """Ask the API to rotate."""
        address = self.run("port", "api", "8080").stdout.strip()
        request = urllib.request.Request(f"http://{address}/api/keys/rotate", method="POST")
        if bearer is not None:
            request.add_header("authorization", f"Bearer {bearer}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return Response(answer.status, json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                return Response(error.code, json.load(error))

    def last(self) -> dict[str, Any]:
        """Return the last rotation."""
        with connect(self.dsn("postgres", "postgres")) as connection:
            status = "select to_jsonb(r) from rekey.rotation_status r order by id desc limit 1"
            found: dict[str, Any] = value(connection, status)
            return found

    def wait(self, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the last rotation once it is so far."""
        until = time.monotonic() + 120
        while not reached(rotation := self.last()):
            assert time.monotonic() < until, f"{rotation}\n{self._logs()}"
            time.sleep(0.2)
        return rotation


@pytest.fixture
def system(checkout: Path) -> Iterator[System]:
    """A checkout from which nothing was started yet."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "ls"], capture_output=True).returncode
    ):
        pytest.skip("no Docker engine with Compose answers")
    for image in BASE_IMAGES:
        if all(
            subprocess.run(["docker", *verb, image], capture_output=True).returncode
            for verb in (("image", "inspect"), ("pull",))
        ):
            pytest.skip(f"the image {image} cannot be had")
    (checkout / TESTS).write_text(OVERRIDE)
    system = System(checkout, f"rekey-test-{os.getpid()}")
    try:
        yield system
    finally:
        if (checkout / ".env").exists():
            system.run("--profile", "*", "down", "--volumes", "--rmi", "local", "--timeout", "5")


@pytest.mark.docker
def test_a_system_in_containers(system: System) -> None:
    refused = system.run("up", check=False)
    assert refused.returncode != 0
    assert 'there is no KEK, run "make kek"' in refused.stderr

    make_kek(system.checkout)
    system.up("--build")
    _is_confined(system)
    bearer = system.secret("admin.header").removeprefix("Authorization: Bearer ").strip()
    assert system.rotate(None).status == 401
    assert system.rotate("wrong").status == 401
    assert system.rotate(bearer).status == 202
    _answers_postgrest(system)
    system.wait(lambda rotation: rotation["state"] == "completed")

    _survives_down_and_up(system)

    system.files = (COMPOSE.name, SESSION.name, TESTS)
    system.up()
    assert "kek" not in system.inside("db", "ls", "/run/secrets")
    with connect(system.dsn("postgres", "postgres")) as connection, pytest.raises(psycopg.Error, match="KEK"):
        connection.execute("select rekey.get_secret('1')")
    assert system.rotate(bearer).status == 202
    system.wait(lambda rotation: rotation["state"] == "completed")
    doctor = json.loads(
        system.run("exec", "-T", "worker", "pg-rekey", "doctor", "--json", check=False).stdout
    )
    assert {row["severity"] for row in doctor if "others can read" in row["finding"]} == {"info"}


def _is_confined(system: System) -> None:
    for service in ("db", "worker", "api"):
        assert system.inside(service, "id", "-u").strip() != "0"
        assert "Read-only file system" in system.inside(service, "touch", "/opt/x")
        status = system.inside(service, "cat", "/proc/1/status")
        assert re.search(r"(?m)^CapEff:\s+0+$", status)
        assert re.search(r"(?m)^NoNewPrivs:\s+1$", status)
    assert "kek" not in system.inside("worker", "ls", "/run/secrets")
    containers = system.run("ps", "--all", "--quiet").stdout.split()
    told = subprocess.run(
        ["docker", "inspect", *containers], capture_output=True, text=True, check=True
    ).stdout
    told += system.run("logs").stdout + system.run("config").stdout
    for name in read(COMPOSE)["secrets"]:
        assert system.secret(name) not in told, name


def _answers_postgrest(system: System) -> None:
    """As PostgREST, whose image may not be there: with its login, and roles as its tokens name them."""
    config = json.loads(system.run("--profile", "supabase", "config", "--format", "json").stdout)
    assert config["services"]["postgrest"]["environment"]["PGUSER"] == "authenticator"
    behind = PostgREST(system.dsn("authenticator", "postgrest"))
    assert behind.rpc("rotate_keys").status == 401
    assert behind.rpc("rotate_keys", role="authenticated", claims={"sub": "x"}).status == 403
    answer = behind.rpc("rotate_keys", {"supersede": True}, role="service_role")
    assert (answer.status, answer.body["rotations"][0]["to_version"]) == (200, 3)


def _survives_down_and_up(system: System) -> None:
    """What is due is begun by pg_cron, interrupted, and ended; every secret is right afterwards."""
    system.run("stop", "worker")
    with connect(system.dsn("postgres", "postgres")) as connection:
        secrets = "select count(rekey.set_secret(n::text, 'value ' || n)) from generate_series(1, %s) n"
        connection.execute(secrets, [ROWS])
        connection.execute("select rekey.set_setting('max_rows_per_second', '400')")
        connection.execute("select rekey.set_schedule('default', '1 day', now())")
    system.wait(lambda rotation: rotation["trigger"] == "schedule" and rotation["rows_done"] > 0)
    system.run("start", "worker")
    system.run("kill", "worker")
    assert system.last()["state"] == "running"
    system.run("down")
    system.up()
    rotation = system.last()
    assert rotation["trigger"] == "schedule"
    assert 0 < rotation["rows_done"] < ROWS
    with connect(system.dsn("postgres", "postgres")) as connection:
        connection.execute("select rekey.set_setting('max_rows_per_second', null)")
    system.wait(lambda rotation: rotation["state"] == "completed")
    with connect(system.dsn("postgres", "postgres")) as connection:
        right = "select count(*) from rekey.read_secrets() s where s.value = 'value ' || s.name"
        assert value(connection, right) == ROWS
        assert value(connection, "select valid from rekey.verify_audit_log()")
        assert value(connection, "select array_agg(version) from rekey.key_usage() where rows > 0") == [4]
        schedule = "select rotate_every::text from rekey.keyrings where name = 'default'"
        assert value(connection, schedule) == "1 day"  # which no `up` took back
