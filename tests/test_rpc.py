"""public.rotate_keys and public.key_rotation_status, called as PostgREST calls them."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from helpers import Connection, connect, install, value
from hosted import Hosted
from pg_rekey import release
from pg_rekey.db import query
from pg_rekey.errors import HTTP_STATUS
from postgrest import PostgREST, Response

ANNE = {"sub": "7d0f1e54-0000-4000-8000-000000000001"}
BERT = {"sub": "7d0f1e54-0000-4000-8000-000000000002"}
DENIED = """
    select role, jwt_subject, details from rekey.audit_log where event = 'access.denied' order by id"""


@pytest.fixture
def project(hosted: Hosted, kek: bytes) -> str:
    """A project with pg_rekey, its KEK in the Vault, and the keyring `default`: all of it in SQL."""
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(dsn) as connection:
        connection.execute("select vault.create_secret(%s, 'pg_rekey_kek')", [kek.hex()])
        connection.execute("select rekey.set_setting('kek_provider', 'vault')")
        connection.execute("select rekey.register_kek()")
        connection.execute("select rekey.create_keyring('default')")
    return dsn


@pytest.fixture
def owner(project: str) -> Iterator[Connection]:
    """The project's owner, by SQL."""
    with connect(project) as connection:
        yield connection


@pytest.fixture
def api(project: str) -> PostgREST:
    return PostgREST(project)


def rotate(
    api: PostgREST,
    claims: Mapping[str, Any] | None = None,
    role: str = "service_role",
    method: str = "POST",
    **arguments: Any,
) -> Response:
    return api.rpc("rotate_keys", arguments, role=role, claims=claims, method=method)


def test_service_role_rotates_and_follows(api: PostgREST, owner: Connection) -> None:
    answer = rotate(api, keyring="default", reason="by RPC")
    assert answer.status == 200
    [rotation] = answer.body["rotations"]
    assert (rotation["keyring"], rotation["state"], rotation["to_version"]) == ("default", "queued", 2)
    again = rotate(api, keyring="default")
    assert (again.status, again.body["code"]) == (409, "RK004")
    assert "supersede" in again.body["hint"]
    assert rotate(api).body["rotations"][0]["id"] == rotation["id"]
    assert rotate(api, supersede=True).body["rotations"][0]["to_version"] == 3
    owner.execute("call rekey.run_rotations()")
    status = api.rpc("key_rotation_status", role="service_role", method="GET")
    assert status.status == 200
    [keyring] = status.body["keyrings"]
    assert (keyring["name"], keyring["version"], keyring["rotation"]["state"]) == ("default", 3, "completed")
    assert status.body["kek"] == {"id": 1, "provider": "vault"}
    assert status.body["version"] == release.version()
    entry = """
        select actor, role, details ->> 'reason' from rekey.audit_log
        where event = 'rotation.requested' order by id limit 1"""
    assert owner.execute(entry).fetchall() == [("authenticator", "service_role", "by RPC")]


INCIDENT: list[tuple[str, dict[str, Any]]] = [
    ("pause_rotation", {"id": 1}),
    ("retry_rotation", {"id": 1}),
    ("rollback_rotation", {"id": 1}),
    ("mark_key_compromised", {"keyring": "default", "version": 1}),
]


def test_an_incident_by_rpc(api: PostgREST, owner: Connection) -> None:
    """Pause, find the row that failed, retry, go back, and give a version up."""

    def call(name: str, **arguments: Any) -> Any:
        answer = api.rpc(name, arguments, role="service_role", claims=ANNE)
        assert answer.status == 200, answer.body
        [rotation] = answer.body["rotations"]
        return rotation

    owner.execute("select rekey.set_secret('a', 'value')")
    rotate(api, keyring="default")
    assert call("pause_rotation", id=1)["state"] == "paused"
    again = api.rpc("pause_rotation", {"id": 1}, role="service_role")
    assert (again.status, again.body["code"]) == (409, "RK006")
    assert api.rpc("retry_rotation", {"id": 99}, role="service_role").status == 404
    owner.execute("select rekey.resume_rotation(1)")
    damage = "update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)"
    with connect(owner.info.dsn, user="supabase_admin") as admin:
        admin.execute(damage)
        owner.execute("call rekey.run_rotations()")
        admin.execute(damage)
    assert call("retry_rotation", id=1)["state"] in ("queued", "running")
    owner.execute("call rekey.run_rotations()")
    back = call("rollback_rotation", id=1, reason="a client")
    assert (back["trigger"], back["to_version"], back["reason"]) == ("rollback", 1, "a client")
    assert back["requested_by"] == f"{ANNE['sub']} as service_role"
    moved = call("mark_key_compromised", keyring="default", version=2, reason="a leak")
    assert moved["trigger"] == "compromise"
    [keyring] = api.rpc("key_rotation_status", role="service_role").body["keyrings"]
    assert {"percent", "rows_per_second", "seconds_left", "started_at"} <= keyring["rotation"].keys()


@pytest.mark.parametrize(("name", "arguments"), INCIDENT)
def test_an_incident_is_for_administrators(
    name: str, arguments: dict[str, Any], api: PostgREST, owner: Connection
) -> None:
    assert api.rpc(name, arguments, role="anon").status == 401
    answer = api.rpc(name, arguments, role="authenticated", claims=ANNE)
    assert (answer.status, answer.body["code"]) == (403, "42501")
    assert owner.execute(DENIED).fetchall() == [("authenticated", ANNE["sub"], {"function": name})]


def test_progress_in_the_status(ready: Connection) -> None:
    ready.execute("select rekey.set_secret(n::text, 'value') from generate_series(1, 10) n")
    ready.execute("select rekey.rotate_keys()")
    look = "select key_rotation_status() -> 'keyrings' -> 0 -> 'rotation'"
    queued: Any = value(ready, look)
    assert (queued["percent"], queued["rows_per_second"], queued["seconds_left"]) == (None, None, None)
    ready.execute("""
        update rekey.rotations set state = 'running', rows_total = 100, rows_done = 25,
          started_at = clock_timestamp() - interval '5 seconds'""")
    running: Any = value(ready, look)
    assert running["percent"] == 25.0
    assert 0 < running["rows_per_second"] <= 5
    assert running["seconds_left"] >= 15


def test_a_member_of_rekey_admin_rotates_in_sql(owner: Connection) -> None:
    assert value(owner, "select rotate_keys('default') -> 'rotations' -> 0 ->> 'state'") == "queued"
    with pytest.raises(errors.DatabaseError) as raised:
        owner.execute("select rotate_keys('default')")
    assert raised.value.sqlstate == "RK004"
    assert raised.value.diag.message_hint
    assert (
        value(owner, "select key_rotation_status() -> 'keyrings' -> 0 -> 'rotation' ->> 'state'") == "queued"
    )


def test_anon_may_not_even_call(api: PostgREST, owner: Connection) -> None:
    for function in ("rotate_keys", "key_rotation_status"):
        assert api.rpc(function, role="anon").status == 401
    assert owner.execute(DENIED).fetchall() == []


def test_a_refusal_is_audited_once_a_minute_for_each_caller(
    api: PostgREST, owner: Connection, hosted: Hosted, project: str
) -> None:
    for claims in (ANNE, ANNE, BERT, ANNE):
        answer = rotate(api, claims, "authenticated")
        assert (answer.status, answer.body["code"]) == (403, "42501")
        assert set(answer.body) == {"code", "message", "details", "hint"}
    details = {"function": "rotate_keys"}
    assert owner.execute(DENIED).fetchall() == [
        ("authenticated", ANNE["sub"], details),
        ("authenticated", BERT["sub"], details),
    ]
    with connect(hosted.admin(project)) as admin:
        admin.execute("set session_replication_role = replica")
        admin.execute("update rekey.audit_log set at = at - interval '61 s' where event = 'access.denied'")
    assert rotate(api, ANNE, "authenticated").status == 403
    assert len(owner.execute(DENIED).fetchall()) == 3
    assert value(owner, "select count(*) from rekey.rotations") == 0


@pytest.mark.parametrize("function", ["rotate_keys", "key_rotation_status"])
def test_a_get_request_is_refused_without_an_entry(api: PostgREST, owner: Connection, function: str) -> None:
    assert api.rpc(function, role="authenticated", claims=ANNE, method="GET").status == 403
    assert owner.execute(DENIED).fetchall() == []


def test_rotation_by_get_is_not_allowed(api: PostgREST) -> None:
    assert rotate(api, method="GET").status == 405


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"app_metadata": {"key_admin": True}}, 200),
        ({"app_metadata": {"key_admin": "true"}}, 403),
        ({"app_metadata": {"key_admin": False}}, 403),
        ({"app_metadata": {"key_admin": {}}}, 403),
        ({"app_metadata": {"other": True}}, 403),
        ({"app_metadata": ["key_admin"]}, 403),
        ({"app_metadata": True}, 403),
        ({"user_metadata": {"key_admin": True}}, 403),
        ({"key_admin": True}, 403),
    ],
)
def test_users_need_the_claim_that_the_setting_names(
    api: PostgREST, owner: Connection, claims: dict[str, Any], status: int
) -> None:
    assert rotate(api, ANNE | claims, "authenticated").status == 403  # as long as no claim is named
    owner.execute("select rekey.set_setting('jwt_admin_claim', 'key_admin')")
    assert rotate(api, BERT | claims, "authenticated").status == status
    assert api.rpc("key_rotation_status", role="authenticated", claims=claims).status == status
    assert rotate(api, claims, "anon").status == 401


@pytest.mark.parametrize(
    ("spoil", "arguments", "status", "code"),
    [
        ("select", {"keyring": "none"}, 404, "RK007"),
        ("select rekey.retire_keyring('default')", {"keyring": "default"}, 409, "RK006"),
        ("delete from vault.secrets", {"keyring": "default"}, 503, "RK001"),
        ("select vault.update_secret(id, repeat('0', 64)) from vault.secrets", {}, 500, "RK002"),
    ],
)
def test_errors_have_their_status_and_change_nothing(
    api: PostgREST, owner: Connection, spoil: str, arguments: dict[str, Any], status: int, code: str
) -> None:
    owner.execute(spoil.encode())
    before = value(owner, "select count(*) from rekey.audit_log")
    answer = rotate(api, **arguments)
    assert (answer.status, answer.body["code"]) == (status, code)
    assert answer.body["message"]
    assert value(owner, "select count(*) from rekey.audit_log") == before
    assert value(owner, "select count(*) from rekey.encryption_keys") == 1


def test_other_errors_are_passed_on(api: PostgREST, owner: Connection, project: str) -> None:
    """A time-out, here of waiting for the row of the keyring, is PostgREST's to answer."""
    with (
        connect(project, user="authenticator", options="-c lock_timeout=200ms") as impatient,
        owner.transaction(),
        impatient.transaction(force_rollback=True),
    ):
        owner.execute("select rekey.set_schedule('default', '1 day')")
        impatient.execute("select set_config('request.method', 'POST', true)")
        impatient.execute("set local role service_role")
        with pytest.raises(errors.LockNotAvailable):
            impatient.execute("select public.rotate_keys('default')")


def test_forged_claims_and_methods_without_the_role_gain_nothing(project: str, owner: Connection) -> None:
    owner.execute("select rekey.set_setting('jwt_admin_claim', 'key_admin')")
    owner.execute("create role rekey_stranger login")
    owner.execute("grant rekey_app to rekey_stranger")
    try:
        with connect(make_conninfo(project, user="rekey_stranger")) as stranger:
            stranger.execute(
                """select set_config('request.jwt.claims', '{"app_metadata": {"key_admin": true}}', false)"""
            )
            with pytest.raises(errors.InsufficientPrivilege):
                stranger.execute("select public.rotate_keys()")
            with pytest.raises(errors.InsufficientPrivilege):
                stranger.execute("select rekey._rpc_change('rotate_keys', '{}')")
    finally:
        owner.execute("drop role rekey_stranger")


def test_claims_and_refusals_count_only_from_postgrests_own_login(
    project: str, owner: Connection, hosted: Hosted
) -> None:
    """Another login that may set the role can run SQL, and make up the request."""
    owner.execute("select rekey.set_setting('jwt_admin_claim', 'key_admin')")
    with connect(hosted.admin(project)) as admin:
        admin.execute("create role rekey_other login in role authenticated")
    try:
        entries = value(owner, "select count(*) from rekey.audit_log")
        with connect(project, user="rekey_other") as session, session.transaction():
            session.execute("set local role authenticated")
            session.execute("select set_config('request.method', 'POST', true)")
            for n in range(3):
                claims = f"""{{"sub": "{n}", "app_metadata": {{"key_admin": true}}}}"""
                session.execute("select set_config('request.jwt.claims', %s, true)", (claims,))
                assert value(session, "select public.rotate_keys() ->> 'code'") == "42501"
            owner.execute("set lock_timeout = '2s'")
            assert owner.execute("select from rekey.rotate_keys('default')").rowcount == 1
        assert owner.execute(DENIED).fetchall() == []
        assert value(owner, "select count(*) from rekey.audit_log") > entries
        owner.execute("select rekey.set_setting('postgrest_login', 'rekey_other')")
        with connect(project, user="rekey_other") as session:
            session.execute("set role authenticated")
            session.execute("select set_config('request.method', 'POST', false)")
            assert value(session, "select public.rotate_keys() ->> 'code'") == "42501"
        assert len(owner.execute(DENIED).fetchall()) == 1
    finally:
        with connect(hosted.admin(project)) as admin:
            admin.execute("drop role rekey_other")


def test_a_user_in_sql_is_refused_with_an_error(project: str) -> None:
    with connect(project, user="authenticator") as connection:
        connection.execute("set role authenticated")
        for call in ("rotate_keys", "key_rotation_status"):
            with pytest.raises(errors.InsufficientPrivilege) as raised:
                connection.execute(f"select public.{call}()".encode())
            assert "jwt_admin_claim" in str(raised.value.diag.message_hint)


def test_doctor_takes_only_what_the_rpc_needs(project: str, owner: Connection) -> None:
    grants = query("doctor: grants")
    assert owner.execute(grants).fetchall() == []
    owner.execute("grant execute on function rekey.version to authenticated")
    owner.execute("grant execute on function rekey._rpc_change to anon")
    found = {row[1] for row in owner.execute(grants)}
    assert found == {"authenticated may use rekey.version()", "anon may use rekey._rpc_change()"}


def test_hints_are_in_the_words_of_its_clients(hosted: Hosted, owner: Connection) -> None:
    api = PostgREST(owner.info.dsn)
    assert (
        "key_rotation_status" in api.rpc("rotate_keys", {"keyring": "nope"}, role="service_role").body["hint"]
    )
    api.rpc("rotate_keys", {"keyring": "default"}, role="service_role")
    busy = api.rpc("rotate_keys", {"keyring": "default"}, role="service_role")
    assert (busy.status, busy.body["code"]) == (409, "RK004")
    assert busy.body["hint"].endswith('take its rows along: "supersede": true.')


def test_keyrings_that_got_no_new_version_are_named(hosted: Hosted, owner: Connection) -> None:
    api = PostgREST(owner.info.dsn)
    owner.execute("select rekey.create_keyring('busy')")
    owner.execute("select rekey.rotate_keys('busy')")
    first = api.rpc("rotate_keys", {"reason": "a leak"}, role="service_role").body
    assert [row["keyring"] for row in first["rotations"]] == ["busy", "default"]
    assert first["passed_by"] == ["busy"]
    again = api.rpc("rotate_keys", {"supersede": True}, role="service_role").body
    assert (len(again["rotations"]), again["passed_by"]) == (2, [])


def test_status_before_anything_is_set_up(hosted: Hosted) -> None:
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    answer = PostgREST(dsn).rpc("key_rotation_status", role="service_role")
    assert answer.body == {"version": release.version(), "kek": None, "worker": None, "keyrings": []}
    assert PostgREST(dsn).rpc("rotate_keys", role="service_role").body == {"rotations": [], "passed_by": []}


@pytest.mark.parametrize("name", ["rotate_keys", "key_rotation_status", "mark_key_compromised"])
def test_the_users_own_function_of_that_name_is_not_replaced(hosted: Hosted, name: str) -> None:
    dsn = hosted.make_database()
    with connect(dsn) as connection:
        connection.execute(f"create function public.{name}(integer) returns integer return 1".encode())
    with pytest.raises(errors.DuplicateFunction) as raised:
        install(dsn, release.assemble("supabase"))
    assert "rename or drop" in str(raised.value.diag.message_hint)


def test_status_codes_of_postgrest_are_those_of_the_orchestrator(owner: Connection) -> None:
    """One table in SQL, for PostgREST; one in Python, for pg-rekey serve."""
    for code, status in HTTP_STATUS.items():
        ours = code.startswith("RK") or code in ("42501", "22023")
        assert value(owner, "select rekey._http_status(%s)", code) == (status if ours else None)


def test_errors_on_a_server_that_is_not_supabases(ready: Connection) -> None:
    """As PostgREST in front of docker-compose.yml's server gets them."""
    with ready.transaction():
        ready.execute("set local request.method = 'POST'")
        answer = value(ready, "select public.rotate_keys('nobody')")
        assert value(ready, "select current_setting('response.status')") == "404"
    assert (answer["code"], answer["details"]) == ("RK007", None)
    assert "nobody" in answer["message"]
    with pytest.raises(errors.Error) as caught:
        ready.execute("select public.rotate_keys('nobody')")
    assert caught.value.sqlstate == "RK007"


def test_whoever_was_granted_the_rpc_without_being_an_administrator(ready: Connection) -> None:
    with ready.transaction(force_rollback=True):
        ready.execute("grant execute on function public.rotate_keys, rekey._rpc_change to rekey_app")
        ready.execute("select rekey.set_setting('postgrest_login', session_user::text)")
        ready.execute("set local request.method = 'POST'")
        ready.execute("set local role rekey_app")
        answer = value(ready, "select public.rotate_keys()")
        assert (answer["code"], value(ready, "select current_setting('response.status')")) == ("42501", "403")
        ready.execute("reset role")
        assert ready.execute(DENIED).fetchall() == [("rekey_app", None, {"function": "rotate_keys"})]
        assert value(ready, "select count(*) from rekey.rotations") == 0
