"""Each role of token has a login of its own: what the HTTP layer gets wrong, the database still refuses."""

import json
from typing import Any

import psycopg
import pytest

from api_fixtures import ALICE, OLAF, PROMETHEUS, ROSA, Api, digest
from cli_fixtures import eventually, process
from helpers import Connection, value
from pg_rekey import db as database
from pg_rekey.api import tokens
from pg_rekey.api.database import Pools

pytest_plugins = ["api_fixtures"]

SUFFIXES = {ALICE: "", OLAF: "_operate", ROSA: "_read", PROMETHEUS: "_read"}
# What a `read` token must not get done, whoever it becomes before.
FORBIDDEN = (
    "select rekey.rotate_keys()",
    "select rekey.pause_rotation(1)",
    "select * from rekey.rotation_step()",
    "select * from rekey._open_endpoints()",
    "select rekey.get_secret('a')",
    "select wrapped_key from rekey.encryption_keys",
)


def injected(monkeypatch: pytest.MonkeyPatch, statement: str) -> None:
    """Have GET /api/keys run another statement, as if a hole in the HTTP layer let a client do so."""
    real = database.query

    def query(name: str) -> str:
        if name != "keys":
            return real(name)
        returning = "returning 1 as id" if statement.startswith("insert") else ""
        return f"{statement} where %s::text is null or %s::text is null {returning}"

    monkeypatch.setattr(database, "query", query)


@pytest.mark.parametrize("token", [ROSA, OLAF, ALICE])
def test_each_role_of_token_has_its_login(
    token: str, api: Api, ready: Connection, api_role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.execute("create table public.probe (login text)")
    ready.execute("grant insert on public.probe to rekey_admin, rekey_auditor, rekey_operator")
    injected(monkeypatch, "insert into public.probe select session_user")
    api("GET", "/api/keys", token=token)
    assert value(ready, "select login from public.probe") == f"{api_role}{SUFFIXES[token]}"


@pytest.mark.parametrize(
    "escape", ["reset role", "set role rekey_admin", "set session authorization default"]
)
@pytest.mark.parametrize("statement", FORBIDDEN)
def test_a_session_of_a_read_token_gets_no_further(
    statement: str, escape: str, api: Api, ready: Connection
) -> None:
    ready.execute("select rekey.rotate_keys()")
    with api.app.state.pools.of("rekey_auditor").connection() as connection:
        connection.execute(database.query("api transaction"), ["5s", "", "rekey_auditor"])
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(f"{escape}; {statement}".encode())


def test_a_session_of_an_operate_token_gets_no_further(api: Api, ready: Connection) -> None:
    with api.app.state.pools.of("rekey_operator").connection() as connection:
        connection.execute(database.query("api transaction"), ["5s", "", "rekey_operator"])
        connection.execute("reset role")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select rekey.rotate_keys()")


def test_a_hole_in_the_http_layer_gets_no_further(
    api: Api, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    injected(monkeypatch, "select set_config('role', 'none', true), rekey.rotate_keys()")
    response = api("GET", "/api/keys", token=ROSA)
    assert (response.status_code, response.json()["code"]) == (403, "42501")
    injected(monkeypatch, "select set_config('role', 'rekey_admin', true)")
    assert api("GET", "/api/keys", token=ROSA).status_code == 403
    assert value(ready, "select count(*) from rekey.rotations") == 0


def test_without_logins_of_their_own_all_have_the_first(
    new_api: Api, ready: Connection, api_role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PG_REKEY_READ_DSN", "PG_REKEY_OPERATE_DSN"):
        monkeypatch.delenv(variable)
    with Pools.from_environment() as pools:
        assert pools.logins() == {}
        new_api.app.state.pools = pools
        for token in (ROSA, OLAF, ALICE):
            assert new_api("GET", "/api/keys", token=token).status_code == 200
        with pools.of("rekey_auditor").connection() as connection:
            [row] = connection.execute("select session_user::text as login").fetchall()
    assert row["login"] == api_role


def test_a_login_that_may_more_than_its_role_is_warned_of(
    api_env: str, ready: Connection, api_role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(**environment: str) -> list[dict[str, Any]]:
        given = {tokens.ADMIN: f"alice:{digest(ALICE)}", **environment}
        with process("serve", "--port", "0", **given) as serving:
            look = "select count(*) from pg_stat_activity where usename ~ %s and state = 'idle'"
            eventually(lambda: value(ready, look, f"^{api_role}") >= (2 if environment else 3))
            eventually(lambda: value(ready, look, f"^{api_role}") >= 1)
            serving.terminate()
            lines = serving.communicate()[0].splitlines()
        return [one for one in map(json.loads, lines) if one["event"] == "login"]

    assert warned() == []
    [line] = warned(PG_REKEY_READ_DSN=api_env)
    assert line["login"] == api_role
    assert "create role rekey_api_read login in role rekey_auditor" in line["warning"]
