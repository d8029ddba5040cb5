"""Secrets by name, and who reaches those of which tenant."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from driving import FLIP, NIL, check, fill, read, refused, waits
from helpers import Connection, connect, unlock, value

A, B = "aaaaaaaa-0000-4000-8000-000000000001", "bbbbbbbb-0000-4000-8000-000000000002"
CLAIMS: LiteralString = "select set_config('request.jwt.claims', %s, false)"
MAX = 32 * 1024 * 1024


@pytest.fixture
def tenants(ready: Connection) -> Connection:
    """`ready`, with a keyring and a secret for each of two tenants, and one secret of none."""
    for name, tenant in (("a", A), ("b", B)):
        ready.execute("select rekey.create_keyring(%s, %s)", [name, tenant])
        ready.execute("select rekey.set_secret(%s, 'value', %s, %s)", [f"of {name}", tenant, name])
    ready.execute("select rekey.set_secret('of nobody', 'value')")
    return ready


@pytest.fixture
def login(ready: Connection, db: str, kek: bytes) -> Iterator[Callable[..., Connection]]:
    """Return a function that opens a session of a new login role, a member of these roles, and unlocks it."""
    opened: list[Connection] = []

    def open_session(*roles: str) -> Connection:
        name = f"rekey_test_{os.getpid()}_{len(opened)}"
        ready.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
        for role in roles:
            ready.execute(sql.SQL("grant {} to {}").format(sql.Identifier(role), sql.Identifier(name)))
        connection = connect(db, user=name)
        opened.append(connection)
        unlock(connection, kek)
        return connection

    yield open_session
    for connection in opened:
        name = connection.info.user
        connection.close()
        ready.execute(sql.SQL("drop owned by {0}; drop role {0}").format(sql.Identifier(name)))


@contextmanager
def service_role(connection: Connection) -> Iterator[None]:
    """Act as Supabase's service_role, which is made for the moment where it is missing."""
    with connection.transaction(force_rollback=True):
        if not value(connection, "select to_regrole('service_role') is not null"):
            connection.execute("create role service_role nologin bypassrls")
        connection.execute("grant rekey_app to service_role")
        connection.execute("set local role service_role")
        yield


def reached(connection: Connection) -> set[str]:
    """Return the tenants that this session reaches, whichever way it asks."""
    names = {"of nobody": NIL, "of a": A, "of b": B}
    by_function = {
        tenant for tenant in names.values() if value(connection, "select rekey.can_access_tenant(%s)", tenant)
    }
    rows = connection.execute("select name, value from rekey.decrypted_secrets").fetchall()
    assert {names[name] for name, _ in rows} == by_function
    assert {found for _, found in rows} <= {"value"}
    assert value(connection, "select count(*) from rekey.secrets") == len(by_function)
    calls: list[LiteralString] = [
        "select rekey.get_secret(%s, %s)",
        "select rekey.set_secret(%s, 'value', %s)",
        "select rekey.read_secrets(array[%s], %s)",
        "select rekey.delete_secret('missing' || %s, %s)",
    ]
    for name, tenant in names.items():
        for call in calls:
            if tenant in by_function:
                connection.execute(call, [name, tenant])
            else:
                with refused("42501"), connection.transaction():
                    connection.execute(call, [name, tenant])
    return by_function


VALUES = [
    "",
    "x",
    "a\nb\ttab",
    "\U0001f511 schl\u00fcssel \u202e",
    "'; drop table x; --",
    "\\x00",
    "\x01",
    "y" * 1000000,
]


def test_set_get_delete(ready: Connection) -> None:
    first = value(ready, "select rekey.set_secret('n', 'first', description => 'what for')")
    before = ready.execute("select created_at, updated_at from rekey.secrets").fetchone()
    for text in VALUES:
        assert value(ready, "select rekey.set_secret('n', %s)", text) == first
        assert value(ready, "select rekey.get_secret('n')") == text
        check(ready, {"n": text})
    row = ready.execute(
        "select created_at = %s, updated_at > %s, description from rekey.secrets", before
    ).fetchone()
    assert row == (True, True, "what for")
    ready.execute("select rekey.set_secret('n', 'x', description => 'else')")
    assert value(ready, "select description from rekey.decrypted_secrets") == "else"
    assert value(ready, "select rekey.delete_secret('n')") is True
    assert value(ready, "select rekey.delete_secret('n')") is False
    for name in ("n", None):
        with refused("RK007"):
            ready.execute("select rekey.get_secret(%s)", [name])


def test_names(ready: Connection) -> None:
    names = ["a", " ", "\u00e9", "e\u0301", "'\"%s$$\\", "\u202ertl", "\u00e9" * 127 + "a", "A"]
    for name in names:
        ready.execute("select rekey.set_secret(%s, %s)", [name, name])
    check(ready, {name: name for name in names})
    for bad in (None, "", "a" * 256, "\u00e9" * 128, "line\n", "\x7f"):
        with refused("22023"):
            ready.execute("select rekey.set_secret(%s, 'x')", [bad])
    with refused("22023"):
        ready.execute("select rekey.set_secret('a', null)")
    with refused("RK007"):
        ready.execute("select rekey.set_secret('a', 'x', keyring => 'nobody')")
    with refused("RK007"):
        ready.execute("select rekey.set_secret('a', 'x', keyring => null)")
    check(ready, {name: name for name in names})


def test_read_many(ready: Connection) -> None:
    model = fill(ready, 20)
    some: LiteralString = "select * from rekey.read_secrets(%s)"
    assert dict(ready.execute(some, [["s3", "s7", "missing", None]])) == {"s3": "s3", "s7": "s7"}
    assert ready.execute(some, [[]]).fetchall() == []
    ready.execute("select rekey.rotate_keys()")
    ready.execute("select rekey.set_secret('s1', 'on the next version')")
    assert read(ready) == model | {"s1": "on the next version"}
    ready.execute(FLIP.replace("'s1'", "'s9'").encode())
    with pytest.raises(psycopg.Error, match="'s9'") as caught:
        read(ready)
    assert caught.value.sqlstate == "RK003"
    assert len(ready.execute(some, [["s3", "s8"]]).fetchall()) == 2


def test_longest_value(ready: Connection) -> None:
    ready.execute("select rekey.set_secret('long', repeat('x', %s))", [MAX])
    assert value(ready, "select length(rekey.get_secret('long'))") == MAX
    for call in ("set_secret('longer', repeat('x', %s))", "encrypt(repeat('x', %s))"):
        with refused("22023"):
            ready.execute("select rekey." + call, [MAX + 1])
    assert value(ready, "select count(*) from rekey.secrets") == 1


SERVED: list[tuple[str | None, set[str]]] = [
    ("", {NIL}),
    ("not json", set()),
    ('{"a": "\\u0000"}', set()),
    ("null", set()),
    ("[]", set()),
    ('"text"', set()),
    ("{}", set()),
    ('{"sub": "me", "role": "service_role"}', set()),
    (json.dumps({"tenant_id": A}), set()),
    (json.dumps({"user_metadata": {"tenant_id": A}}), set()),
    (json.dumps({"app_metadata": {"tenant_id": A}}), {A}),
    (json.dumps({"app_metadata": {"tenant_id": A.upper()}}), {A}),
    (json.dumps({"app_metadata": {"tenant_id": NIL}}), {NIL}),
    (json.dumps({"app_metadata": {"tenant_ids": [A, B]}}), {A, B}),
    (json.dumps({"app_metadata": {"tenant_id": A, "tenant_ids": [B]}}), {A, B}),
    (json.dumps({"app_metadata": {"tenant_ids": A}}), set()),
    (json.dumps({"app_metadata": {"tenant_ids": [None, 1, {}, [A]]}}), set()),
    (json.dumps({"app_metadata": {"tenant_ids": {A: True}}}), set()),
    (json.dumps({"app_metadata": {"tenant_id": [A]}}), set()),
    (json.dumps({"app_metadata": {"tenant_id": None}}), set()),
    (json.dumps({"app_metadata": {"tenant_id": "%"}}), set()),
    (json.dumps({"app_metadata": A}), set()),
    (json.dumps({"app_metadata": None}), set()),
]


def test_tenants_of_a_jwt(tenants: Connection, login: Callable[..., Connection]) -> None:
    application = login("rekey_app")
    assert reached(application) == {NIL}
    for claims, expected in SERVED:
        application.execute(CLAIMS, [claims])
        assert reached(application) == expected, claims
    with application.transaction():
        application.execute("select set_config('request.jwt.claims', '{}', true)")
        assert reached(application) == set()
    assert value(application, "select rekey.can_access_tenant(null)") is False


def test_roles_that_reach_every_tenant(tenants: Connection, login: Callable[..., Connection]) -> None:
    administrator = login("rekey_app", "rekey_admin")
    for claims in ("", json.dumps({"app_metadata": {"tenant_id": A}})):
        administrator.execute(CLAIMS, [claims])
        assert reached(administrator) == {NIL, A, B}
    with service_role(tenants):
        assert reached(tenants) == {NIL, A, B}
    # A session that may become an administrator is none until it does; and the other way round.
    administrator.execute("set role rekey_app")
    administrator.execute(CLAIMS, [""])
    assert reached(administrator) == {NIL}


def test_nobody_else(tenants: Connection, login: Callable[..., Connection]) -> None:
    for call in (
        "select rekey.lock()",
        "select * from rekey.secrets",
        "select rekey.can_access_tenant(null)",
    ):
        with refused("42501"):
            tenants.execute("set role rekey_auditor")
            tenants.execute(call)
        tenants.execute("reset role")
    application = login("rekey_app")
    for statement in (
        "insert into rekey.secrets (name, keyring_id, ciphertext) values ('x', 1, '')",
        "update rekey.secrets set name = 'x'",
        "delete from rekey.secrets",
        "truncate rekey.secrets",
        "select * from rekey.encryption_keys",
        "select * from rekey._open('', '')",
        "select * from rekey._reencrypt('{}', '{}', '', '{}')",
        "select * from rekey._store_setting('kek_provider', 'file')",
    ):
        with refused("42501"):
            application.execute(statement)


def test_tenant_check(tenants: Connection, login: Callable[..., Connection]) -> None:
    tenants.execute(
        sql.SQL("""
        create schema app;
        grant usage on schema app to public;
        create function app.owns(tenant text) returns boolean return true;
        create function app."Owns!"(tenant uuid) returns boolean language plpgsql stable as $$
        begin
          if current_user <> 'rekey_sweeper' or has_schema_privilege('public', 'create')
             or has_table_privilege('rekey.encryption_keys', 'select')
             or has_table_privilege('rekey.secrets', 'select')
             or has_function_privilege('rekey._kek()', 'execute') then
            raise exception 'too many rights';
          elsif current_setting('request.jwt.claims', true) = 'raise' then
            raise division_by_zero;
          elsif current_setting('request.jwt.claims', true) = 'null' then
            return null;
          end if;
          return tenant = {a};
        end
        $$;
        create function app.owns(tenant uuid) returns boolean return app."Owns!"(tenant);
        """).format(a=A)
    )
    application = login("rekey_app")
    for function in ('app."Owns!"', "app.owns"):
        tenants.execute("select rekey.set_setting('tenant_check', %s)", [function])
        application.execute(CLAIMS, [json.dumps({"app_metadata": {"tenant_id": B}})])
        assert reached(application) == {A}
        application.execute(CLAIMS, ["null"])
        assert reached(application) == set()
        application.execute(CLAIMS, ["raise"])
        with refused("22012"):
            application.execute("select rekey.get_secret('of a', %s)", [A])
        assert reached(tenants) == {NIL, A, B}
        with service_role(tenants):
            assert reached(tenants) == {NIL, A, B}
    application.execute(CLAIMS, [""])
    tenants.execute("select rekey.set_setting('tenant_check', null)")
    assert reached(application) == {NIL}


def test_keyring_of_another_tenant(tenants: Connection, login: Callable[..., Connection]) -> None:
    envelope = value(tenants, "select rekey.encrypt('x'::text, 'b')")
    application = login("rekey_app")
    application.execute(CLAIMS, [json.dumps({"app_metadata": {"tenant_id": A}})])
    application.execute("select rekey.set_secret('own', 'x', %s, 'a')", [A])
    application.execute("select rekey.set_secret('common', 'x', %s)", [A])
    assert value(application, "select rekey.decrypt_text(rekey.encrypt('x'::text, 'a'))") == "x"
    calls: list[tuple[LiteralString, list[Any]]] = [
        ("select rekey.set_secret('own', 'x', %s, 'b')", [A]),
        ("select rekey.encrypt('x'::text, 'b')", []),
        ("select rekey.encrypt('x'::text, 'default')", []),
        ("select rekey.decrypt(%s::bytea)", [envelope]),
        ("select rekey.decrypt(%s::text)", [value(tenants, "select rekey._to_text(%s)", envelope)]),
    ]
    for call, parameters in calls:
        with refused("42501"):
            application.execute(call, parameters)
    # Even an administrator does not mix them.
    with refused("42501"):
        tenants.execute("select rekey.set_secret('mixed', 'x', %s, 'b')", [A])


def test_labels_that_are_reserved(tenants: Connection) -> None:
    identity, envelope = tenants.execute(
        "select id::text, ciphertext from rekey.secrets where name = 'of nobody'"
    ).fetchall()[0]
    for label in ("secret", "dek", "session"):
        for context in ([label], [label, NIL, identity], f'[0:2]={{"{label}",{NIL},{identity}}}'):
            with refused("42501"):
                tenants.execute("select rekey.decrypt(%s::bytea, %s::text[])", [envelope, context])
            with refused("42501"):
                tenants.execute("select rekey.encrypt('x'::text, context => %s::text[])", [context])
    tenants.execute("select rekey.encrypt('x'::text, context => '{Secret}')")


def test_reading_writes_nothing(tenants: Connection) -> None:
    envelope = value(tenants, "select rekey.encrypt('x'::text)")
    with tenants.transaction():
        tenants.execute("set transaction read only")
        assert value(tenants, "select rekey.get_secret('of nobody')") == "value"
        assert read(tenants) == {"of nobody": "value"}
        assert value(tenants, "select count(value) from rekey.decrypted_secrets") == 3
        assert value(tenants, "select rekey.decrypt_text(%s::bytea)", envelope) == "x"
        tenants.execute("select * from rekey.verify_ciphertexts()")
        with refused("25006"):
            tenants.execute("select rekey.set_secret('n', 'x')")


@pytest.mark.parametrize("ending", ["commit", "rollback"])
@pytest.mark.parametrize("known", [True, False])
def test_two_writers_of_one_name(ready: Connection, db: str, kek: bytes, known: bool, ending: str) -> None:
    write: LiteralString = "select rekey.set_secret('n', %s)"
    if known:
        ready.execute(write, ["before"])
    with connect(db) as one, connect(db) as two, ThreadPoolExecutor() as pool:
        for connection in (one, two):
            unlock(connection, kek)
        with one.transaction(force_rollback=ending == "rollback"):
            first = value(one, write, "one")
            waiting = pool.submit(value, two, write, "two")
            while not value(
                ready, "select count(*) from pg_locks where not granted and pid = %s", two.info.backend_pid
            ):
                assert not waiting.done()
        second = waiting.result(timeout=60)
        assert (second == first) is (known or ending == "commit")
        check(two, {"n": "two"})
        for level in ("repeatable read", "serializable"):
            with refused("40001"), two.transaction():
                two.execute("set transaction isolation level " + level)
                two.execute("select 1 from rekey.secrets")
                one.execute(write, ["one"])
                two.execute(write, ["two"])
            check(two, {"n": "one"})


def test_an_application_sees_only_the_keyrings_it_may_use(
    tenants: Connection, login: Callable[..., Connection]
) -> None:
    names: LiteralString = "select array_agg(name order by name) from rekey.keyrings"
    app = login("rekey_app")
    assert value(app, names) == ["default"]
    app.execute(CLAIMS, [json.dumps({"app_metadata": {"tenant_id": A}})])
    assert value(app, names) == ["a", "default"]
    assert value(login("rekey_app", "rekey_auditor"), names) == ["a", "b", "default"]


MANY: LiteralString = "select rekey.set_secrets(%s, %s, tenant_id => %s, keyring => %s, descriptions => %s)"


def test_many_at_once_are_stored_as_one_by_one(ready: Connection) -> None:
    identity = value(ready, "select rekey.set_secret('b', 'old', description => 'kept')")
    names, values = ["c", "b", "a"], ["", "new", "\u00e4" * 1000]
    ids = value(ready, MANY, names, values, NIL, "default", None)
    assert ids[1] == identity
    assert len(set(ids)) == 3
    assert ready.execute("select id, name, description from rekey.secrets order by name").fetchall() == [
        (ids[2], "a", None),
        (identity, "b", "kept"),
        (ids[0], "c", None),
    ]
    assert dict(ready.execute("select * from rekey.read_secrets()").fetchall()) == dict(
        zip(names, values, strict=True)
    )
    assert value(ready, MANY, ["a", "d"], ["x", "y"], NIL, "default", [None, "new"])[0] == ids[2]
    assert value(ready, "select description from rekey.secrets where name = 'd'") == "new"
    assert value(ready, MANY, [], [], NIL, "default", None) == []
    assert value(ready, "select sum(failed) from rekey.verify_ciphertexts()") == 0


@pytest.mark.parametrize(
    ("code", "names", "values", "tenant", "keyring", "descriptions"),
    [
        ("22023", None, ["x"], NIL, "default", None),
        ("22023", ["a"], None, NIL, "default", None),
        ("22023", ["a", "b"], ["x"], NIL, "default", None),
        ("22023", ["a"], ["x"], NIL, "default", ["x", "y"]),
        ("22023", [["a"]], [["x"]], NIL, "default", None),
        ("22023", ["a", "a"], ["x", "y"], NIL, "default", None),
        ("22023", ["a", None], ["x", "y"], NIL, "default", None),
        ("22023", ["a", ""], ["x", "y"], NIL, "default", None),
        ("22023", ["a", "b"], ["x", None], NIL, "default", None),
        ("22023", ["a", "b"], ["x", "y" * (MAX + 1)], NIL, "default", None),
        ("RK007", ["a"], ["x"], NIL, "none", None),
        ("42501", ["a"], ["x"], B, "a", None),
    ],
)
def test_many_at_once_are_refused_together(
    tenants: Connection, code: str, names: Any, values: Any, tenant: str, keyring: str, descriptions: Any
) -> None:
    before = value(tenants, "select count(*) from rekey.secrets")
    with refused(code):
        tenants.execute(MANY, [names, values, tenant, keyring, descriptions])
    assert value(tenants, "select count(*) from rekey.secrets") == before


def test_a_name_that_another_session_stores_meanwhile(ready: Connection, db: str, kek: bytes) -> None:
    names = [f"n{number}" for number in range(20)]
    with connect(db) as other, ThreadPoolExecutor() as pool, other.transaction():
        unlock(other, kek)
        identity = value(other, "select rekey.set_secret('n7', 'theirs')")
        many = pool.submit(value, ready, MANY, names, names, NIL, "default", None)
        waits(other, ready.info.backend_pid)
        other.execute("commit")
        assert many.result()[7] == identity
    assert dict(ready.execute("select * from rekey.read_secrets()").fetchall()) == {one: one for one in names}
