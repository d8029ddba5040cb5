"""Control over HTTP: what each role of token may do, and what the database then does."""

from pathlib import Path
from typing import Any

import pytest

from api_fixtures import ALICE, BOB, OLAF, PROMETHEUS, ROSA, Api, digest
from helpers import Connection, value
from pg_rekey import db as database
from pg_rekey.api import actions, tokens
from test_api import CONTROL, assert_error

pytest_plugins = ["api_fixtures"]

READ = {
    "keyrings",
    "rotations/failures",
    "columns",
    "columns/find",
    "settings",
    "doctor",
    "audit/verify",
    "audit/checkpoint",
    "endpoints",
    "endpoints/messages",
    "events",
    "rotations/1/events",
}
OPERATE = {"work", "keys/usage", "verify", "rotations/1/pause", "rotations/1/resume", "rotations/1/retry"}
DAMAGE = """
    update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)
    where name = 'a'"""


def post(api: Api, path: str, status: int = 200, token: str = ALICE, **body: Any) -> Any:
    response = api("POST", f"/api/{path}", token=token, json=body or None)
    assert response.status_code == status, response.text
    return response.json()


# Tokens


@pytest.mark.parametrize(("method", "path"), CONTROL)
def test_what_a_role_may(method: str, path: str, api: Api, ready: Connection) -> None:
    name = path.removeprefix("/api/")
    for token in (None, "canary-stranger"):
        assert_error(api(method, path, token=token), 401, "unauthorized")
    for token in (PROMETHEUS, ROSA, OLAF):
        allowed = name in {ROSA: READ, OLAF: READ | OPERATE}.get(token, set())
        if "events" in name and allowed:
            continue  # test_api_events.py reads them
        response = api(method, path, token=token)
        if allowed:
            assert response.status_code in (200, 404, 409), response.text
        else:
            assert_error(response, 403, "forbidden")


@pytest.mark.parametrize(
    ("token", "role"), [(ROSA, "rekey_auditor"), (OLAF, "rekey_operator"), (ALICE, "rekey_admin")]
)
def test_the_database_sees_the_role_of_a_token(
    token: str, role: str, api: Api, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the server asks for it, the database refuses what the token's role may not."""
    monkeypatch.setattr(
        database, "query", lambda name, real=database.query: PROBE if name == "keys" else real(name)
    )
    ready.execute("create table public.probe (role text)")
    ready.execute("grant insert on public.probe to rekey_admin, rekey_auditor, rekey_operator")
    api("GET", "/api/keys", token=token)
    assert value(ready, "select string_agg(role, ' ') from public.probe") == role


PROBE = """
    insert into public.probe select current_setting('role')
    where %s::text is null or %s::text is null returning 1 as id"""


def test_a_token_is_revoked_without_a_restart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, api: Api
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"alice:{digest(ALICE)}\nbob:{digest(BOB)}\n")
    monkeypatch.delenv(tokens.ADMIN, raising=False)
    monkeypatch.setenv(f"{tokens.ADMIN}_FILE", str(path))
    api.app.state.tokens = tokens.Tokens.from_environment()
    assert api("GET", "/api/keys", token=BOB).status_code == 200
    path.write_text(f"alice:{digest(ALICE)}\nrosa:{digest(ROSA)}:read\n")
    assert_error(api("GET", "/api/keys", token=BOB), 401, "unauthorized")
    assert api("GET", "/api/keys", token=ROSA).status_code == 200
    # What cannot be read lets nobody in, until it can.
    path.write_text("nonsense")
    for _ in range(2):
        assert_error(api("GET", "/api/keys"), 503, "unavailable")
    path.unlink()
    assert_error(api("GET", "/api/keys"), 503, "unavailable")
    path.write_text(f"alice:{digest(ALICE)}\n")
    assert api("GET", "/api/keys").status_code == 200


# Keyrings and keys


def test_keyrings(api: Api, ready: Connection) -> None:
    made = post(api, "keyrings/create", 201, name="billing", rotate_every="90 days")
    assert (made["active_version"], made["rotate_every"], made["overdue"]) == (1, "90 days", False)
    assert post(api, "keyrings/create", 409, name="billing")["code"] == "23505"
    assert post(api, "keyrings/create", 400, name="other", rotate_every="often")["code"] == "22007"
    assert post(api, "keyrings/create", 400, name="other", rotate_every="1 second")["code"] == "22023"
    first = api.get("/api/keyrings?limit=1", token=ROSA)
    assert ([one["name"] for one in first["keyrings"]], first["next"]) == (["billing"], "billing")
    second = api.get("/api/keyrings?limit=1&after=billing", token=ROSA)
    assert ([one["name"] for one in second["keyrings"]], second["next"]) == (["default"], None)
    assert post(api, "keyrings/retire", keyring="billing")["retired_at"]
    assert post(api, "keyrings/retire", 409, keyring="billing")["code"] == "RK006"
    assert post(api, "keyrings/retire", 404, keyring="none")["code"] == "RK007"


def test_schedules(api: Api, ready: Connection) -> None:
    found = post(
        api, "schedule/set", keyring="default", rotate_every="1 mon", first_at="2030-01-01T00:00:00Z"
    )
    assert (found["rotate_every"], found["next_rotation_at"]) == ("1 mon", "2030-01-01T00:00:00Z")
    post(api, "schedule/set", 422, keyring="default", rotate_every="1 day", first_at="2030-01-01T00:00:00")
    for seconds in (15, "15"):  # which would be in 1970
        post(api, "schedule/set", 422, keyring="default", rotate_every="1 day", first_at=seconds)
    api.get("/api/audit?until=15", 422)
    assert post(api, "schedule/clear", keyring="default")["rotate_every"] is None


def test_the_life_of_a_version(api: Api, ready: Connection) -> None:
    ready.execute("select rekey.set_secret('a', 'value')")
    api.rotate()
    key: dict[str, Any] = {"keyring": "default", "version": 1}
    assert post(api, "keys/disable", 409, **key)["code"] == "RK005"
    while post(api, "work", token=OLAF)["event"] != "idle":
        pass
    assert api.get("/api/keys/usage", token=OLAF)["usage"][-1] | {} == {
        "keyring": "default",
        "version": 2,
        "state": "active",
        "rows": 1,
        "relations": ["rekey.secrets"],
    }
    assert post(api, "keys/disable", **key, reason="doubt")["state"] == "disabled"
    assert post(api, "keys/enable", **key)["state"] == "decrypt_only"
    scheduled = post(api, "keys/schedule-destruction", **key, wait="7 days")
    assert (scheduled["state"], scheduled["destroy_after"] is None) == ("destroy_scheduled", False)
    assert post(api, "keys/cancel-destruction", **key)["state"] == "decrypt_only"
    assert post(api, "keys/cancel-destruction", 409, **key)["code"] == "RK006"
    assert post(api, "keys/schedule-destruction", 409, keyring="default", version=2)["code"] == "RK006"
    assert (
        post(api, "keys/compromise", keyring="default", version=2, reason="a leak")["state"] == "compromised"
    )
    assert post(api, "keys/compromise", 404, keyring="default", version=9)["code"] == "RK007"
    assert [row["state"] for row in api.get("/api/rotations?state=queued")["rotations"]] == ["queued"]
    reasons = "select jwt_subject, details ->> 'reason' from rekey.audit_log where event = 'key.compromised'"
    assert ready.execute(reasons).fetchall() == [("alice", "a leak")]


# Rotations


def test_pause_resume_roll_back(api: Api, ready: Connection) -> None:
    [begun] = api.rotate()["rotations"]
    path = f"rotations/{begun['id']}"
    assert post(api, f"{path}/pause", token=OLAF)["state"] == "paused"
    assert post(api, f"{path}/pause", 409, token=OLAF)["code"] == "RK006"
    assert post(api, f"{path}/resume", token=OLAF)["state"] in ("queued", "running")
    assert post(api, f"{path}/retry", 409, token=OLAF)["code"] == "RK006"
    assert post(api, "rotations/99/pause", 404)["code"] == "RK007"
    back = post(api, f"{path}/rollback", 202, reason="a client cannot read it")
    assert (back["trigger"], back["to_version"], back["reason"]) == ("rollback", 1, "a client cannot read it")
    assert back["requested_by"] == "alice as rekey_admin"
    assert api.get(f"/api/{path}")["state"] == "rolled_back"


def test_quarantine(api: Api, ready: Connection) -> None:
    ready.execute("select rekey.set_secret('a', 'value'), rekey.set_secret('b', 'value')")
    ready.execute(DAMAGE)
    [begun] = api.rotate()["rotations"]
    ready.execute("call rekey.run_rotations()")
    assert api.get(f"/api/rotations/{begun['id']}")["state"] == "completed_with_failures"
    [failure] = api.get(f"/api/rotations/failures?rotation={begun['id']}", token=ROSA)["failures"]
    assert (failure["target"], failure["version"], failure["resolved_at"]) == ("rekey.secrets", 1, None)
    found = api.get("/api/verify", token=OLAF)
    assert (found["rows"], found["failed"]) == (2, 1)
    ready.execute(DAMAGE)  # the other way round: it is whole again
    assert post(api, f"rotations/{begun['id']}/retry", token=OLAF)["state"] in ("queued", "running")
    ready.execute("call rekey.run_rotations()")
    assert api.get(f"/api/rotations/{begun['id']}")["state"] == "completed"
    assert api.get("/api/rotations/failures", token=ROSA)["failures"] == []
    assert [one["resolution"] for one in api.get("/api/rotations/failures?all=true")["failures"]] == ["retry"]
    resolved: dict[str, Any] = {"failure": failure["id"], "action": "discard"}
    assert post(api, "rotations/resolve", 409, **resolved)["code"] == "RK006"
    assert post(api, "rotations/resolve", 404, failure=99, action="discard")["code"] == "RK007"


def test_a_row_is_given_up(api: Api, ready: Connection) -> None:
    ready.execute("select rekey.set_secret('a', 'value')")
    ready.execute(DAMAGE)
    api.rotate()
    ready.execute("call rekey.run_rotations()")
    [failure] = api.get("/api/rotations/failures")["failures"]
    done = post(api, "rotations/resolve", failure=failure["id"], action="discard", reason="it is gone")
    assert (done["resolution"], done["resolve_reason"]) == ("discard", "it is gone")
    assert done["resolved_by"] == "alice as rekey_admin"


# The rest


def test_columns(api: Api, ready: Connection) -> None:
    ready.execute("create table public.card (id int primary key, number text, api_key text)")
    ready.execute("insert into public.card values (1, 'x', 'k')")
    ready.execute("grant select on public.card to rekey_auditor")
    ready.execute("select rekey.protect_column('public.card', 'number')")
    [column] = api.get("/api/columns", token=ROSA)["columns"]
    assert (column["label"], column["problem"]) == ("public.card.number", None)
    found = api.get("/api/columns/find", token=ROSA)["columns"]
    assert ("public.card", "api_key") in [(one["relation"], one["column_name"]) for one in found]


def test_audit_filters(api: Api, ready: Connection) -> None:
    api.rotate()
    post(api, "rotations/1/pause", token=OLAF)
    [entry] = api.get("/api/audit?event=rotation.paused", token=ROSA)["entries"]
    assert (entry["jwt_subject"], entry["role"]) == ("olaf", "rekey_admin")
    assert [one["id"] for one in api.get("/api/audit?actor=olaf")["entries"]] == [entry["id"]]
    at = entry["at"].replace("+", "%2B")
    assert entry["id"] in [one["id"] for one in api.get(f"/api/audit?since={at}")["entries"]]
    assert entry["id"] not in [one["id"] for one in api.get(f"/api/audit?until={at}")["entries"]]
    assert api.get("/api/audit/verify", token=ROSA)["valid"] is True
    checkpoint = api.get("/api/audit/checkpoint", token=ROSA)["checkpoint"]
    assert checkpoint["id"] == api.get("/api/audit?limit=1")["entries"][0]["id"]


def test_settings_and_doctor(api: Api, ready: Connection) -> None:
    settings = {one["name"]: one["value"] for one in api.get("/api/settings", token=ROSA)["settings"]}
    assert settings["kek_provider"] == "session"
    findings = api.get("/api/doctor", token=ROSA)["findings"]
    assert any("there has never been a tick" in one["finding"] for one in findings)


def test_only_a_few_read_everything_at_once(
    api: Api, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [actions._LONG.acquire(blocking=False) for _ in range(database.POOL_SIZE // 2)]
    try:
        assert all(held)
        assert_error(api("GET", "/api/verify"), 503, "busy")
        assert api("GET", "/api/keys").status_code == 200
    finally:
        actions._LONG.release(len(held))
    assert api("GET", "/api/verify").status_code == 200


def test_work_ends_in_time(api: Api, ready: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "WORK_SECONDS", 0.0)
    assert post(api, "work") == {"steps": 0, "rows": 0, "event": "batch"}
