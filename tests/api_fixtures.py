"""The HTTP API in this process, on the database of a test. (PYTEST_DONT_REWRITE)"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from psycopg import sql
from psycopg.conninfo import make_conninfo

from helpers import Connection, connect
from pg_rekey.api.app import create_app
from pg_rekey.api.database import Pools
from pg_rekey.api.tokens import Role, Token, Tokens

pytest_plugins = ["cli_fixtures"]

ALICE, BOB, PROMETHEUS = "canary-alice-token", "canary-bob-token", "canary-prometheus-token"
ROSA, OLAF = "canary-rosa-token", "canary-olaf-token"
TOKENS: tuple[tuple[str, str, Role], ...] = (
    ("alice", ALICE, "admin"),
    ("bob", BOB, "admin"),
    ("olaf", OLAF, "operate"),
    ("rosa", ROSA, "read"),
    ("prom", PROMETHEUS, "metrics"),
)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass
class Api:
    """The API with its tokens, as clients of several addresses see it."""

    app: FastAPI
    stack: ExitStack
    clients: dict[str, TestClient] = field(default_factory=dict)

    def __call__(
        self, method: str, path: str, *, token: str | None = ALICE, address: str = "192.0.2.1", **options: Any
    ) -> Any:
        """Send a request; a token comes as its header."""
        if address not in self.clients:
            client = TestClient(self.app, client=(address, 50000), follow_redirects=False)
            self.clients[address] = self.stack.enter_context(client)
        headers = options.pop("headers", {})
        if token is not None:
            headers = {"Authorization": f"Bearer {token}", **headers}
        return self.clients[address].request(method, path, headers=headers, **options)

    def get(self, path: str, status: int = 200, **options: Any) -> Any:
        """Return the document of a GET that should end with this status."""
        response = self("GET", path, **options)
        assert response.status_code == status, response.text
        return response.json()

    def rotate(self, status: int = 202, **options: Any) -> Any:
        """Return the document of a rotation that should end with this status."""
        response = self("POST", "/api/keys/rotate", **options)
        assert response.status_code == status, response.text
        return response.json()


LOGINS = {"": "rekey_admin", "_operate": "rekey_operator", "_read": "rekey_auditor"}


@pytest.fixture(scope="session")
def api_role(server: str) -> Iterator[str]:
    """A role that may log in, a member of rekey_admin and of nothing else.

    Beside it are those for tokens that may less: its name with _operate and _read.
    """
    name = f"rekey_api_{os.getpid()}"
    with connect(server) as connection:
        for suffix, role in LOGINS.items():
            login, of = sql.Identifier(f"{name}{suffix}"), sql.Identifier(role)
            connection.execute(sql.SQL("create role {} login in role {}").format(login, of))
        yield name
        for suffix in LOGINS:
            connection.execute(sql.SQL("drop role {}").format(sql.Identifier(f"{name}{suffix}")))


@pytest.fixture
def api_env(environment: None, db: str, api_role: str, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of the API: its roles' DSNs, of which the first is returned, and the KEK."""
    dsn = make_conninfo(db, user=api_role)
    monkeypatch.setenv("PG_REKEY_DSN", dsn)
    monkeypatch.setenv("PG_REKEY_OPERATE_DSN", make_conninfo(db, user=f"{api_role}_operate"))
    monkeypatch.setenv("PG_REKEY_READ_DSN", make_conninfo(db, user=f"{api_role}_read"))
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    return dsn


@pytest.fixture
def new_api(api_env: str) -> Iterator[Api]:
    """The API on a database without a KEK and a keyring."""
    tokens = Tokens(Token(name, bytes.fromhex(digest(token)), role) for name, token, role in TOKENS)
    with ExitStack() as stack:
        pools = stack.enter_context(Pools.from_environment())
        yield Api(create_app(pools, tokens), stack)


@pytest.fixture
def api(ready: Connection, new_api: Api) -> Api:
    """The API on a database that is ready."""
    return new_api
