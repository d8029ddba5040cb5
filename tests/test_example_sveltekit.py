"""examples/sveltekit: built, and run by node in front of a project that answers as PostgREST does."""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers import Connection, connect, install, value
from hosted import Hosted
from pg_rekey import release
from postgrest import Response, serve, token

pytestmark = pytest.mark.npm

EXAMPLE = release.ROOT / "examples" / "sveltekit"
ROUTE = "/api/keys/rotate"
KEY = "sb_publishable_of-the-tests"
ANNE = "7d0f1e54-0000-4000-8000-000000000001"
BERT = "7d0f1e54-0000-4000-8000-000000000002"
ADMIN = token(role="authenticated", sub=ANNE, app_metadata={"key_admin": True})
USER = token(role="authenticated", sub=BERT, app_metadata={}, user_metadata={"key_admin": True})


@dataclass
class App:
    """The running app, and the tokens that it was sent."""

    url: str
    sent: list[str] = field(default_factory=list)

    def __call__(self, jwt: str | None, body: Any = None, method: str = "POST") -> Response:
        """Ask the route as a browser does; text is sent as it is."""
        request = urllib.request.Request(self.url + ROUTE, headers={"origin": self.url}, method=method)
        if body is not None:
            request.data = (body if isinstance(body, str) else json.dumps(body)).encode()
            request.add_header("content-type", "application/json")
        if jwt is not None:
            request.add_header("authorization", f"Bearer {jwt}")
            self.sent.append(jwt)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return Response(answer.status, json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                return Response(error.code, json.load(error))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, with its packages, built."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    directory = tmp_path_factory.mktemp("app") / "sveltekit"
    shutil.copytree(EXAMPLE, directory, ignore=shutil.ignore_patterns("node_modules", ".svelte-kit", ".env"))
    for arguments in (["install", "--no-package-lock", "--no-audit", "--no-fund"], ["run", "build"]):
        done = subprocess.run(
            [npm, *arguments],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return directory


@contextmanager
def run(built: Path, supabase: str, log: Path) -> Iterator[App]:
    """Run the app in front of a Supabase; in the end, see that it printed no token and no key."""
    with log.open("w") as output:
        process = subprocess.Popen(
            ["node", "node_modules/vite/bin/vite.js", "preview", "--host", "127.0.0.1", "--port", "0"],
            cwd=built,
            env={
                "PATH": os.environ["PATH"],
                "NO_COLOR": "1",
                "PUBLIC_SUPABASE_URL": supabase,
                "PUBLIC_SUPABASE_PUBLISHABLE_KEY": KEY,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while not (ready := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        app = App(ready[0])
        yield app
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    printed = log.read_text()
    assert not [secret for secret in (KEY, *app.sent) if secret in printed]


@pytest.fixture(scope="module")
def project(hosting: Hosted, kek: bytes) -> str:
    """A project where users with the claim `key_admin` are administrators."""
    dsn = hosting.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(dsn) as connection:
        connection.execute("select vault.create_secret(%s, 'pg_rekey_kek')", [kek.hex()])
        connection.execute("select rekey.set_setting('kek_provider', 'vault')")
        connection.execute("select rekey.register_kek()")
        connection.execute("select rekey.create_keyring('default')")
        connection.execute("select rekey.set_setting('jwt_admin_claim', 'key_admin')")
    return dsn


@pytest.fixture
def owner(project: str) -> Iterator[Connection]:
    """The project's owner, by SQL."""
    with connect(project) as connection:
        yield connection


@pytest.fixture(scope="module")
def app(built: Path, project: str) -> Iterator[App]:
    """The app in front of the project."""
    with serve(project) as supabase, run(built, supabase, built / "app.log") as app:
        yield app


@pytest.fixture(scope="module")
def lonely(built: Path, project: str) -> Iterator[App]:
    """The app in front of a server that is gone."""
    with serve(project) as supabase:
        pass
    with run(built, supabase, built / "lonely.log") as app:
        yield app


def test_an_administrator_rotates_and_follows(app: App, owner: Connection) -> None:
    owner.execute("select rekey.create_keyring('cards')")
    begun = app(ADMIN, {"keyring": "cards", "reason": "quarterly"})
    assert begun.status == 202
    [rotation] = begun.body["rotations"]
    assert owner.execute(
        "select id, state, to_version from rekey.rotation_status where keyring = 'cards'"
    ).fetchall() == [(rotation["id"], "queued", 2)]
    entry = """
        select role, jwt_subject, details ->> 'reason' from rekey.audit_log
        where event = 'rotation.requested' and rotation_id = %s"""
    assert owner.execute(entry, [rotation["id"]]).fetchall() == [("authenticated", ANNE, "quarterly")]

    again = app(ADMIN, {"keyring": "cards"})
    assert (again.status, again.body["code"]) == (409, "RK004")
    assert "supersede" in again.body["hint"]
    assert app(ADMIN, {"keyring": "cards", "supersede": True}).body["rotations"][0]["to_version"] == 3

    status = app(ADMIN, method="GET")
    assert status.status == 200
    assert [one["rotation"]["state"] for one in status.body["keyrings"] if one["name"] == "cards"] == [
        "queued"
    ]


def test_without_a_body_every_keyring_is_rotated(app: App, owner: Connection) -> None:
    begun = app(ADMIN)
    assert begun.status == 202
    assert len(begun.body["rotations"]) == value(owner, "select count(*) from rekey.keyrings")


def test_a_user_without_the_claim_is_refused_and_audited(app: App, owner: Connection) -> None:
    before = value(owner, "select count(*) from rekey.rotations")
    refused = app(USER, {"keyring": "default"})
    assert (refused.status, refused.body["code"]) == (403, "42501")
    assert "app_metadata" in refused.body["hint"]
    denied = "select jwt_subject, details from rekey.audit_log where event = 'access.denied'"
    assert owner.execute(denied).fetchall() == [(BERT, {"function": "rotate_keys"})]
    assert app(USER, method="GET").status == 403
    assert value(owner, "select count(*) from rekey.rotations") == before


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize(
    "jwt",
    [f"{ADMIN[:-4]}AAAA", "not-a-token", token(role="anon")],
    ids=["signature", "no token", "anon"],
)
def test_a_token_that_is_not_a_users_is_401(app: App, jwt: str, method: str) -> None:
    assert app(jwt, method=method).status == 401


def test_a_keyring_that_is_not_there_is_404(app: App) -> None:
    missing = app(ADMIN, {"keyring": "none"})
    assert (missing.status, missing.body["code"]) == (404, "RK007")


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_without_a_token_nobody_is_asked(lonely: App, method: str) -> None:
    assert lonely(None, method=method).status == 401


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "null",
        "5",
        [],
        ["default"],
        {"key_ring": "default"},
        {"keyring": None},
        {"keyring": 1},
        {"reason": ["a"]},
        {"supersede": "true"},
        {"constructor": "default"},
        '{"__proto__": "default"}',
    ],
    ids=str,
)
def test_a_body_that_cannot_be_is_400(lonely: App, body: Any) -> None:
    refused = lonely(ADMIN, body)
    assert (refused.status, refused.body["code"]) == (400, "22023")
    assert "supersede" in refused.body["hint"]


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_without_supabase_it_is_503(lonely: App, method: str) -> None:
    failed = lonely(ADMIN, method=method)
    assert (failed.status, failed.body["code"]) == (503, "08006")
    assert set(failed.body) == {"code", "message", "hint"}
