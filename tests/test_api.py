"""The HTTP API: every route, every refusal, and what it leaves in the audit log and in its own."""

import json
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import psycopg
import pytest
from starlette.testclient import TestClient

from api_fixtures import ALICE, BOB, OLAF, PROMETHEUS, Api, digest
from helpers import Connection, connect, value
from pg_rekey import db as database
from pg_rekey import errors
from pg_rekey.api import database as transactions
from pg_rekey.api import tokens
from pg_rekey.api.logs import JsonHandler
from pg_rekey.api.middleware import Requests
from pg_rekey.api.refusals import BODY_LIMIT
from pg_rekey.errors import USAGE, Problem

pytest_plugins = ["api_fixtures"]

ROUTES = [
    ("POST", "/api/keys/rotate", 202),
    ("GET", "/api/keys", 200),
    ("GET", "/api/rotations", 200),
    ("GET", "/api/rotations/1", 200),
    ("GET", "/api/audit", 200),
    ("GET", "/metrics", 200),
]
# Those of test_api_control.py and test_api_events.py.
CONTROL: list[tuple[str, str]] = [
    *(("POST", f"/api/keys/{verb}") for verb in ("disable", "enable", "compromise")),
    *(("POST", f"/api/keys/{verb}") for verb in ("schedule-destruction", "cancel-destruction")),
    *(("POST", f"/api/rotations/1/{verb}") for verb in ("pause", "resume", "retry", "rollback")),
    *(("POST", f"/api/keyrings/{verb}") for verb in ("create", "retire")),
    *(("POST", f"/api/schedule/{verb}") for verb in ("set", "clear")),
    ("POST", "/api/rotations/resolve"),
    ("POST", "/api/work"),
    *(("GET", f"/api/{name}") for name in ("keyrings", "keys/usage", "verify", "rotations/failures")),
    *(("GET", f"/api/{name}") for name in ("columns", "columns/find", "settings", "doctor")),
    *(("GET", f"/api/{name}") for name in ("audit/verify", "audit/checkpoint")),
    *(("GET", f"/api/{name}") for name in ("endpoints", "endpoints/messages")),
    ("POST", "/api/endpoints/test"),
    *(("GET", f"/api/{name}") for name in ("events", "rotations/1/events")),
]


def lines(capsys: pytest.CaptureFixture[str], event: str | None = None) -> list[dict[str, Any]]:
    """Return the log lines since the last look, those of one event or all."""
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in found if event in (None, line["event"])]


def denied(connection: Connection) -> list[tuple[str | None, dict[str, Any]]]:
    """Return subject and details of the refusals in the audit log."""
    statement = "select jwt_subject, details from rekey.audit_log where event = 'access.denied' order by id"
    return list(connection.execute(statement).fetchall())


def assert_error(response: Any, status: int, code: str) -> dict[str, Any]:
    """Assert the one shape of errors, and return it."""
    assert response.status_code == status, response.text
    document: dict[str, Any] = response.json()
    assert list(document) == ["code", "message", "hint", "request_id"]
    assert document["code"] == code
    assert document["request_id"] == response.headers["x-request-id"]
    return document


# Tokens


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_every_route_with_every_kind_of_token(
    method: str, path: str, status: int, api: Api, ready: Connection
) -> None:
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.run_rotations()")
    for token in (None, "canary-stranger", ""):
        response = api(method, path, token=token)
        assert_error(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    basic = {"Authorization": f"Basic {ALICE}"}
    assert_error(api(method, path, token=None, headers=basic), 401, "unauthorized")
    if path == "/metrics":
        assert api(method, path, token=PROMETHEUS).status_code == status
    else:
        assert "metrics" in assert_error(api(method, path, token=PROMETHEUS), 403, "forbidden")["message"]
    for token in (ALICE, BOB):
        response = api(method, path, token=token, json={"supersede": True} if method == "POST" else None)
        assert response.status_code == status, response.text
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"


def test_a_token_is_asked_for_before_the_body_is_read(api: Api) -> None:
    broken: dict[str, Any] = {"content": "{", "headers": {"Content-Type": "application/json"}}
    assert_error(api("POST", "/api/keys/rotate", token=None, **broken), 401, "unauthorized")
    assert_error(api("POST", "/api/keys/rotate", **broken), 422, "invalid_request")


def test_tokens_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    made, entry = tokens.make("alice")
    assert entry == f"alice:{digest(made)}"
    assert len(made) >= 43
    monkeypatch.setenv(tokens.ADMIN, f" {entry},bob:{digest(BOB).upper()} olaf:{digest(OLAF)}:operate\n")
    path = tmp_path / "metrics"
    path.write_text(f"# who collects\nprom:{digest(PROMETHEUS)}  # since May\n\n")
    monkeypatch.setenv(f"{tokens.METRICS}_FILE", str(path))
    known = tokens.Tokens.from_environment()
    for token, name, role in (
        (made, "alice", "admin"),
        (BOB, "bob", "admin"),
        (OLAF, "olaf", "operate"),
        (PROMETHEUS, "prom", "metrics"),
    ):
        found = known.find(token)
        assert found is not None
        assert (found.name, found.role) == (name, role)
    assert known.find("canary") is None
    assert known.find("\xff") is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "no administrator token"),
        ({tokens.ADMIN: " , "}, "no administrator token"),
        ({tokens.METRICS: f"a:{digest('a')}"}, "no administrator token"),
        ({tokens.ADMIN: "x", f"{tokens.ADMIN}_FILE": "y"}, "are set together"),
        ({f"{tokens.ADMIN}_FILE": "/nowhere/canary"}, "cannot be read: No such file"),
        ({f"{tokens.ADMIN}_FILE": "/dev/null"}, "no administrator token"),
        ({tokens.ADMIN: f"a:{digest('a')} b:canary"}, f"entry 2 of {tokens.ADMIN} is not name:hash"),
        ({tokens.ADMIN: f"a:{digest('a')} b:{digest('b')}:canary"}, f"entry 2 of {tokens.ADMIN} is not"),
        ({tokens.ADMIN: f"a:{digest('a')}:read"}, "no administrator token"),
        ({tokens.METRICS: f"a:{digest('a')}:read"}, f"entry 1 of {tokens.METRICS} is not name:hash,"),
        ({tokens.ADMIN: f"a b:{digest('a')}"}, "entry 1 of"),
        ({tokens.ADMIN: f"{'a' * 64}:{digest('a')}"}, "entry 1 of"),
        ({tokens.ADMIN: f"a:{digest('a')} a:{digest('b')}"}, "two tokens have the name a"),
        ({tokens.ADMIN: f"a:{digest('a')} b:{digest('a')}"}, "two tokens have the hash"),
        (
            {tokens.ADMIN: f"a:{digest('a')}", tokens.METRICS: f"a:{digest('b')}"},
            "two tokens have the name a",
        ),
        ({tokens.ADMIN: f"a:{digest('a')}", tokens.METRICS: f"b:{digest('a')}"}, "two tokens have the hash"),
    ],
)
def test_wrong_tokens_are_refused_at_the_start(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (tokens.ADMIN, tokens.METRICS):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(Problem, match=re.escape(message)) as caught:
        tokens.Tokens.from_environment()
    assert caught.value.exit_code == USAGE
    assert "canary" not in caught.value.message


# Routes


def test_rotate_every_keyring(api: Api, ready: Connection) -> None:
    ready.execute("select rekey.create_keyring('other')")
    response = api("POST", "/api/keys/rotate")
    assert response.status_code == 202
    assert "location" not in response.headers
    found = response.json()["rotations"]
    assert {(row["keyring"], row["state"], row["to_version"]) for row in found} == {
        ("default", "queued", 2),
        ("other", "queued", 2),
    }
    # Those under way come back as they are.
    assert response.json()["passed_by"] == []
    assert api.rotate() == {"rotations": found, "passed_by": [row["keyring"] for row in found]}
    assert api.rotate(json={"supersede": True})["passed_by"] == []
    subjects = (
        "select distinct jwt_subject, actor, role from rekey.audit_log where event = 'rotation.requested'"
    )
    [(subject, actor, role)] = ready.execute(subjects).fetchall()
    assert (subject, role) == ("alice", "rekey_admin")
    assert actor.startswith("rekey_api_")
    assert {row["requested_by"] for row in found} == {"alice as rekey_admin"}


def test_rotate_one_keyring(api: Api, ready: Connection) -> None:
    ready.execute("select rekey.create_keyring('other')")
    ready.execute("select rekey.set_secret('a', 'value')")
    response = api("POST", "/api/keys/rotate", token=BOB, json={"keyring": "default", "reason": "q\n1"})
    assert response.status_code == 202
    [begun] = response.json()["rotations"]
    assert response.headers["location"] == f"/api/rotations/{begun['id']}"
    assert api.get(response.headers["location"]) == begun
    assert begun["reason"] == "q\n1"
    assert api.rotate(409, json={"keyring": "default"})["code"] == "RK004"
    [next_one] = api.rotate(json={"keyring": "default", "supersede": True})["rotations"]
    assert next_one["to_version"] == 3
    ready.execute("call rekey.run_rotations()")
    assert api.get(f"/api/rotations/{next_one['id']}")["state"] == "completed"
    assert api.get(f"/api/rotations/{begun['id']}")["state"] == "superseded"
    subjects = "select jwt_subject from rekey.audit_log where event = 'rotation.requested' order by id"
    assert ready.execute(subjects).fetchall() == [("bob",), ("alice",)]


def test_keys(api: Api, ready: Connection) -> None:
    ready.execute("select rekey.create_keyring('other')")
    ready.execute("select rekey.rotate_keys('default')")
    found = api.get("/api/keys")["keys"]
    assert [(key["keyring"], key["version"], key["state"]) for key in found] == [
        ("default", 1, "decrypt_only"),
        ("default", 2, "active"),
        ("other", 1, "active"),
    ]
    assert api.get("/api/keys?keyring=other")["keys"] == found[2:]
    assert api.get("/api/keys?keyring=none", 404)["code"] == "RK007"


def test_rotations_by_page(api: Api, ready: Connection) -> None:
    ready.execute("select rekey.create_keyring('other')")
    for _ in range(3):
        ready.execute("select rekey.rotate_keys(supersede => true)")
    everything = api.get("/api/rotations")
    assert everything["next"] is None
    ids = [row["id"] for row in everything["rotations"]]
    assert ids == sorted(ids, reverse=True)
    assert len(ids) == 6
    seen, before = [], ""
    for _ in range(3):
        page = api.get(f"/api/rotations?limit=2{before}")
        seen += page["rotations"]
        before = f"&before={page['next']}"
    assert page["next"] is None
    assert seen == everything["rotations"]
    found = api.get("/api/rotations?keyring=other&state=queued")["rotations"]
    assert [(row["keyring"], row["state"]) for row in found] == [("other", "queued")]
    assert api.get("/api/rotations/99", 404)["code"] == "RK007"


def test_audit_by_page(api: Api, ready: Connection) -> None:
    api.rotate()
    everything = api.get("/api/audit")
    columns = "id, event, encode(prev_hash, 'hex'), encode(hash, 'hex')"
    rows = ready.execute(f"select {columns} from rekey.audit_log order by id desc").fetchall()
    found = [(row["id"], row["event"], row["prev_hash"], row["hash"]) for row in everything["entries"]]
    assert found == rows
    first = api.get("/api/audit?limit=2&keyring=default")
    second = api.get(f"/api/audit?limit=1000&before={first['next']}")
    assert first["entries"] + second["entries"] == everything["entries"][: len(rows)]
    assert second["next"] is None


def test_metrics(api: Api) -> None:
    response = api("GET", "/metrics", token=PROMETHEUS)
    assert response.headers["content-type"].startswith("text/plain")
    assert "pg_rekey_keyrings 1.0\n" in response.text


def test_health_needs_no_token(new_api: Api) -> None:
    assert new_api.get("/healthz", token=None) == {"status": "ok"}


def test_docs_load_nothing_from_elsewhere(new_api: Api) -> None:
    page = new_api("GET", "/docs", token=None).text
    assert "://" not in page
    for asset in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert new_api("GET", asset, token=None).status_code == 200


def test_openapi_describes_everything(new_api: Api) -> None:
    document = new_api.get("/openapi.json", token=None)
    paths = {path for _, path, _ in ROUTES} | {path for _, path in CONTROL}
    assert set(document["paths"]) == {*(re.sub(r"\d", "{id}", path) for path in paths), "/healthz"}
    error = {"$ref": "#/components/schemas/Error"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["summary"]
            assert operation["description"]
            assert operation.get("security", []) == ([] if path == "/healthz" else [{"HTTPBearer": []}])
            for status, response in operation["responses"].items():
                if status >= "400":
                    assert response["content"] == {"application/json": {"schema": error}}
    [scheme] = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")


# Errors


def test_errors_of_the_database(api: Api, ready: Connection) -> None:
    assert api.rotate(404, json={"keyring": "none"})["code"] == "RK007"
    ready.execute("select rekey.retire_keyring('default')")
    assert api.rotate(409, json={"keyring": "default"})["code"] == "RK006"


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [("", 503, "RK001"), ("nonsense", 503, "RK001"), ("00" * 32, 500, "RK002")],
)
def test_without_the_right_kek(
    given: str, status: int, code: str, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", given)
    document = api.rotate(status)
    assert document["code"] == code
    assert document["hint"]


def test_the_kek_lasts_one_transaction(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.rotate()
    monkeypatch.delenv("PG_REKEY_KEK")
    for _ in range(database.POOL_SIZE):
        assert api.rotate(503, json={"supersede": True})["code"] == "RK001"


def test_without_an_installation(new_api: Api, conn: Connection) -> None:
    conn.execute("drop schema rekey_targets cascade; drop schema rekey cascade")
    for method, path, _ in ROUTES:
        response = new_api(method, path)
        assert response.status_code == 503
        assert "pg-rekey init" in response.json()["hint"]
    # The database answers, and a refusal is one without an audit log too.
    assert new_api("GET", "/healthz").status_code == 200
    assert new_api("GET", "/api/keys", token=None).status_code == 401


def test_a_lock_that_is_not_given_back(api: Api, ready: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "STATEMENT_TIMEOUT", "50ms")
    with ready.transaction():
        ready.execute("lock table rekey.rotations")
        assert api.get("/api/rotations", 503)["code"] == "57014"
    assert api.get("/api/rotations")["rotations"] == []


def test_without_a_connection(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.app.state.pools.__exit__()
    for method, path, _ in [*ROUTES, ("GET", "/healthz", 200)]:
        assert_error(api(method, path), 503, "unavailable")


def test_a_connection_that_breaks_is_replaced(api: Api, ready: Connection) -> None:
    assert api.get("/api/keys")
    backends = """
        select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity
        where datname = current_database() and usename ~ '^rekey_api_'"""
    assert value(ready, backends) >= 1
    assert api.get("/api/keys")


def test_a_session_that_is_ended_in_the_middle_of_a_request(api: Api, ready: Connection, db: str) -> None:
    end = """
        select pg_terminate_backend(pid, 5000) from pg_stat_activity
        where datname = current_database() and usename ~ '^rekey_api_' and wait_event_type = 'Lock'"""
    with ThreadPoolExecutor() as threads, connect(db) as observer, ready.transaction():
        ready.execute("lock table rekey.rotations")
        answer = threads.submit(api, "GET", "/api/rotations")
        while not observer.execute(end).fetchall():
            assert not answer.done()
        assert_error(answer.result(), 503, "57P01")
    assert api.get("/api/rotations")


def test_an_error_that_nobody_foresaw(
    api: Api, ready: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    ready.execute("""
        create or replace function rekey.metrics(out name text, out labels jsonb, out value double precision)
        returns setof record language plpgsql as $$
        begin
          raise exception 'canary' using errcode = 'P0099', detail = 'canary', hint = 'canary';
        end $$""")
    response = api("GET", "/metrics")
    document = assert_error(response, 500, "internal")
    assert "canary" not in response.text
    [error, request] = lines(capsys)
    assert (error["event"], error["error"]) == ("error", "ProgrammingError")
    assert error["request_id"] == document["request_id"]
    assert any("routes.py" in frame and "prometheus" in frame for frame in error["frames"])
    assert request["sqlstate"] == "P0099"
    assert "canary" not in json.dumps([error, request])


def test_an_exception_that_nobody_foresaw(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise ValueError("canary")

    assert api("GET", "/api/keys").status_code == 200  # has a connection, which takes queries too
    capsys.readouterr()
    monkeypatch.setattr(database, "query", fail)
    assert_error(api("GET", "/api/keys"), 500, "internal")
    [error, request] = lines(capsys)
    assert (error["error"], request["status"]) == ("ValueError", 500)
    assert "canary" not in json.dumps([error, request])


def test_an_exception_after_the_answer_began(capsys: pytest.CaptureFixture[str]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("canary")

    client = TestClient(Requests(app))
    client.get("/")
    assert [line["event"] for line in lines(capsys)] == ["error", "request"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (psycopg.errors.lookup("42501")(), 403),
        (psycopg.errors.lookup("22023")(), 400),
        (psycopg.errors.lookup("55P03")(), 503),
        (psycopg.errors.lookup("57014")(), 503),
        (psycopg.errors.lookup("57P01")(), 503),
        (psycopg.errors.lookup("40P01")(), 503),
        (psycopg.errors.lookup("3F000")(), 503),
        (psycopg.errors.lookup("53300")(), 503),
        (psycopg.errors.lookup("25006")(), 503),
        (psycopg.errors.lookup("22012")(), None),
        (psycopg.errors.lookup("42P01")(), None),
        (psycopg.OperationalError("the connection is lost"), 503),
        (psycopg.DataError("not text"), None),
    ],
)
def test_http_status_of_database_errors(error: psycopg.Error, status: int | None) -> None:
    assert errors.http_status(error) == status


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/canary", 404, "not_found"),
        ("GET", "/api/keys/", 404, "not_found"),
        ("GET", "/static-offline-docs/canary", 404, "not_found"),
        ("GET", "/api/keys/rotate", 405, "method_not_allowed"),
        ("DELETE", "/api/keys", 405, "method_not_allowed"),
        ("HEAD", "/api/keys", 405, "method_not_allowed"),
    ],
)
def test_what_the_framework_refuses(
    method: str, path: str, status: int, code: str, new_api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    response = new_api(method, path)
    if method == "HEAD":
        assert response.status_code == status
    else:
        assert_error(response, status, code)
    assert (status == 405) == ("allow" in response.headers)
    assert "canary" not in capsys.readouterr().out


# Requests


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/rotations?limit=0", None),
        ("GET", "/api/rotations?limit=1001", None),
        ("GET", "/api/rotations?state=canary", None),
        ("GET", "/api/rotations?before=canary", None),
        ("GET", f"/api/rotations/{2**63}", None),
        ("GET", "/api/rotations/canary", None),
        ("GET", "/api/audit?limit=1e3", None),
        ("GET", "/api/keys?keyring=", None),
        ("GET", "/api/keys?keyring=a&keyring=canary", None),
        ("GET", "/api/keys?canary-1=1", None),
        ("GET", "/metrics?keyring=canary", None),
        ("POST", "/api/keys/rotate?keyring=canary", None),
        ("GET", "/api/keys?keyring=canary%00", None),
        ("GET", f"/api/keys?keyring={'canary' * 11}", None),
        ("POST", "/api/keys/rotate", '{"canary-1": 1}'),
        ("POST", "/api/keys/rotate", f'{{"{"canary" * 7}": 1}}'),
        ("POST", "/api/keys/rotate", '{"keyring": ["canary"]}'),
        ("POST", "/api/keys/rotate", '{"keyring": "canary\\u0000"}'),
        ("POST", "/api/keys/rotate", '{"keyring": "canary\\ud800"}'),
        ("POST", "/api/keys/rotate", '{"reason": "canary\\u0000"}'),
        ("POST", "/api/keys/rotate", '{"supersede": "canary"}'),
        ("POST", "/api/keys/rotate", '{"supersede": 1}'),
        ("POST", "/api/keys/rotate", '{"canary'),
        ("POST", "/api/keys/rotate", '"canary"'),
    ],
)
def test_validation_repeats_nothing(
    method: str, path: str, body: str | None, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    response = api(method, path, content=body, headers={"Content-Type": "application/json"})
    document = assert_error(response, 422, "invalid_request")
    assert document["message"]
    assert "canary" not in response.text + capsys.readouterr().out


def test_an_unknown_field_is_named(api: Api) -> None:
    said = assert_error(
        api("POST", "/api/keys/rotate", json={"kering": "a", "now": 1}), 422, "invalid_request"
    )
    assert said["message"] == (
        "body: there is no field 'kering'. Did you mean 'keyring'?; "
        "body: there is no field 'now'. There are: keyring, reason, supersede."
    )
    said = assert_error(api("GET", "/api/rotations?stat=failed"), 422, "invalid_request")
    assert "a query parameter 'stat' is unknown" in said["message"]


@pytest.mark.parametrize("body", ["null", "{}", ""])
def test_a_rotation_without_wishes(body: str, api: Api) -> None:
    assert api.rotate(content=body, headers={"Content-Type": "application/json"})["rotations"]


@pytest.mark.parametrize("body", ["[" * 10_000, "1" * 10_000, b"\xff"])
def test_bodies_that_cannot_be_read(body: str | bytes, api: Api) -> None:
    response = api("POST", "/api/keys/rotate", content=body, headers={"Content-Type": "application/json"})
    assert_error(response, 400, "bad_request")


def chunks(size: int) -> Iterator[bytes]:
    """Yield a body of blanks, which has no Content-Length."""
    while size > 0:
        yield b" " * min(size, 1000)
        size -= 1000


def test_bodies_have_a_limit(api: Api) -> None:
    for content in (" " * (BODY_LIMIT - 2) + "{}", chunks(BODY_LIMIT)):
        response = api(
            "POST", "/api/keys/rotate", content=content, headers={"Content-Type": "application/json"}
        )
        assert response.status_code in (202, 422)
    for content in (" " * (BODY_LIMIT - 1) + "{}", chunks(BODY_LIMIT + 1)):
        assert_error(api("POST", "/api/keys/rotate", content=content), 413, "too_large")
    assert_error(api("GET", "/healthz", content="x" * (BODY_LIMIT + 1)), 413, "too_large")


def test_request_ids(new_api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        new_api("GET", "/healthz", headers={"X-Request-ID": "a.b_c-1"}).headers["x-request-id"] == "a.b_c-1"
    )
    assert [line["request_id"] for line in lines(capsys)] == ["a.b_c-1"]
    for bad in ("", "a" * 65, "a b", "ä".encode()):
        made = new_api("GET", "/healthz", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_a_log_line_for_each_request(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.rotate(404, json={"keyring": "canary"})
    api("GET", "/api/rotations/5?keyring=canary", token=BOB, address="192.0.2.7")
    [first, second] = lines(capsys, "request")
    assert {name: first[name] for name in ("method", "route", "status", "client", "token", "sqlstate")} == {
        "method": "POST",
        "route": "/api/keys/rotate",
        "status": 404,
        "client": "192.0.2.1",
        "token": "alice",
        "sqlstate": "RK007",
    }
    assert first["milliseconds"] >= 0
    assert (second["route"], second["token"], second["client"]) == ("/api/rotations/{id}", "bob", "192.0.2.7")
    assert "canary" not in json.dumps([first, second])


def test_what_libraries_log(capsys: pytest.CaptureFixture[str]) -> None:
    handler = JsonHandler()
    logger = logging.getLogger("test_what_libraries_log")
    logger.propagate = False
    logger.addHandler(handler)
    logger.warning("two\nlines of %s", "text")
    try:
        raise ValueError("canary")
    except ValueError as error:
        logger.exception("it failed\n%s", error)
    [first, second] = lines(capsys, "log")
    assert (first["level"], first["logger"], first["message"]) == (
        "warning",
        logger.name,
        "two lines of text",
    )
    assert (second["message"], second["error"]) == ("it failed", "ValueError")
    assert second["frames"][0].endswith("test_what_libraries_log")


# Audit


def test_refusals_are_audited_once_a_minute_for_each_caller(api: Api, ready: Connection) -> None:
    for _ in range(2):
        api("GET", "/api/keys", token="canary", headers={"X-Request-ID": "first"})
        api("GET", "/api/audit", token=PROMETHEUS)
        api("GET", "/metrics", token=None, address="192.0.2.2")
    first, second, third = denied(ready)
    details = {"via": "http", "route": "GET /api/keys", "client": "192.0.2.1", "request_id": "first"}
    assert first == (None, details)
    assert (second[0], second[1]["route"]) == ("prom", "GET /api/audit")
    assert (third[0], third[1]["client"]) == (None, "192.0.2.2")
    assert value(ready, "select valid from rekey.verify_audit_log()")


def test_refusals_of_the_database_are_audited(api: Api, ready: Connection) -> None:
    ready.execute("revoke execute on function rekey.rotate_keys from rekey_admin")
    assert api.rotate(403)["code"] == "42501"
    [(subject, details)] = denied(ready)
    assert (subject, details["route"]) == ("alice", "POST /api/keys/rotate")


def test_a_refusal_that_cannot_be_audited_is_one(
    api: Api, ready: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    ready.execute("drop function rekey._note_denied")
    assert_error(api("GET", "/api/keys", token=None), 401, "unauthorized")
    [line] = lines(capsys, "refusal not audited")
    assert (line["sqlstate"], line["client"]) == ("42883", "192.0.2.1")


class TestSecrets:
    """Nothing that is secret reaches a log, an answer or the audit log."""

    secrets: ClassVar[list[str]] = [ALICE, BOB, PROMETHEUS, digest(ALICE), digest(BOB), digest(PROMETHEUS)]

    def test_in_logs(
        self, api: Api, ready: Connection, kek: bytes, db: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        ready.execute("select rekey.set_secret('a', 'canary-value')")
        answers = []
        for token in (None, "canary-stranger", PROMETHEUS, ALICE):
            for method, path, _ in ROUTES:
                answers += [api(method, path, token=token).text, api(method, f"{path}?token={ALICE}").text]
            answers.append(api("GET", f"/{ALICE}", token=token).text)
            answers.append(api("POST", "/api/keys/rotate", token=token, json={ALICE: BOB}).text)
        printed = capfd.readouterr()
        assert printed.err == ""
        with connect(db) as connection:
            log = str(connection.execute("select * from rekey.audit_log").fetchall())
        for secret in [*self.secrets, kek.hex(), "canary-value", "canary-stranger"]:
            assert secret not in "".join(answers)
            assert secret not in printed.out
            assert secret not in log
