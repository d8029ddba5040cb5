"""Many values in one statement, and keys that a session carries: they open what opened before, no more."""

import os
from collections.abc import Callable, Iterator
from typing import LiteralString

import psycopg
import pytest

from column_fixtures import protect
from driving import NIL, refused, rotate, run
from helpers import Connection, belong, connect, unlock, value

pytest_plugins = ["column_fixtures"]

A, B = ("00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b")
READ: LiteralString = "select rekey.decrypt_text(v, array['app.t.v', id::text], {}) from app.t where id = 1"
ALL: LiteralString = "select id, v from app.t_decrypted order by id"


@pytest.fixture
def table(app: Connection) -> Connection:
    """The owner's session; app.t has 20 sealed rows, and a view that opens them."""
    app.execute("create table t (id int primary key, v text)")
    protect(app, "t", encrypt_on_write=True)
    app.execute("insert into t select g, 'value ' || g from generate_series(1, 20) g")
    app.execute("select rekey.create_decrypted_view('t')")
    return app


@pytest.fixture
def reader(table: Connection, owner: str, db: str, kek: bytes) -> Iterator[Connection]:
    """A role of applications that may read app.t, in an unlocked session."""
    name = f"{owner}_reader"
    table.execute("grant usage on schema app to rekey_app")
    with connect(db) as connection:
        connection.execute(f"create role {name} login in role rekey_app".encode())
        connection.execute(f"grant select on app.t, app.t_decrypted to {name}".encode())
    with connect(db, user=name) as session:
        unlock(session, kek)
        yield session
    with connect(db) as connection:
        connection.execute(f"drop owned by {name}".encode())
        connection.execute(f"drop role {name}".encode())


def calls(connection: Connection, function: str, statement: LiteralString) -> int:
    """Return how often a statement calls a function of ours."""
    count: LiteralString = "select coalesce(sum(pg_stat_get_xact_function_calls(p.oid)), 0) from pg_proc p"
    with connection.transaction():
        connection.execute("set local track_functions = 'all'")
        before = value(connection, count + " where p.proname = %s", function)
        connection.execute(statement)
        return int(value(connection, count + " where p.proname = %s", function)) - int(before)


def during(statement: str) -> bytes:
    """A statement that gets a pass and a sealed value, does something, and opens the one with the other."""
    return f"""
        do $$
        declare
          v_pass bytea := rekey.reading_pass('app.t.v');
          v_sealed text := (select v from app.t where id = 1);
        begin
          {statement}
          if rekey.decrypt_text(v_sealed, '{{app.t.v,1}}', v_pass) <> 'value 1' then
            raise exception 'it opened to something else';
          end if;
        end $$""".encode()


# --- what a view opens ---


def test_a_view_opens_all_and_asks_once(table: Connection, ready: Connection) -> None:
    ready.execute("grant select on app.t to public")
    table.execute("alter table t disable trigger zz_pg_rekey_1")  # plain values, as before an adoption
    table.execute("insert into t values (21, null), (22, 'plain'), (23, 'rk1 is how it begins')")
    wanted = [(g, f"value {g}") for g in range(1, 21)] + [
        (21, None),
        (22, "plain"),
        (23, "rk1 is how it begins"),
    ]
    assert table.execute(ALL).fetchall() == wanted
    assert calls(ready, "reading_pass", ALL) == 1
    assert calls(ready, "_passed_key", ALL) == 20
    assert calls(ready, "_open", ALL) == 0
    assert calls(ready, "_deks", ALL) == 0


def test_versions_that_a_pass_does_not_have(table: Connection, ready: Connection) -> None:
    """The 8 newest are in it; older ones, and other keyrings, open row by row."""
    ready.execute("select rekey.create_keyring('other')")
    table.execute(
        "insert into t values (30, rekey.encrypt_text('of another', 'other', array['app.t.v', '30']))"
    )
    for version in range(2, 13):
        ready.execute("select rekey.rotate_keys('default', supersede => true)")
        table.execute("insert into t values (%s, %s)", [100 + version, f"version {version}"])
    wanted = (
        [(g, f"value {g}") for g in range(1, 21)]
        + [(30, "of another")]
        + [(100 + version, f"version {version}") for version in range(2, 13)]
    )
    assert table.execute(ALL).fetchall() == wanted
    opened_by_row = calls(ready, "_open", ALL)
    assert opened_by_row == 20 + 1 + 3  # version 1, the other keyring, versions 2 to 4


def test_a_version_in_between_that_may_not_be_used(table: Connection, ready: Connection) -> None:
    for _ in range(3):
        rotate(ready)
        run(ready)
    ready.execute("select rekey.disable_key('default', 2)")
    assert len(table.execute(ALL).fetchall()) == 20
    assert calls(ready, "_open", ALL) == 0


def test_what_does_not_open_says_why(table: Connection, ready: Connection) -> None:
    table.execute("alter table t disable trigger zz_pg_rekey_1")
    for wrong in ("(select v from t where id = 2)", "'rk1:UksB'"):
        table.execute(f"update t set v = {wrong} where id = 1".encode())
        with refused("RK003"):
            table.execute(ALL)
    table.execute("delete from t where id = 1")
    assert len(table.execute(ALL).fetchall()) == 19
    damaged: LiteralString = """
        update rekey.encryption_keys
        set wrapped_key = set_byte(wrapped_key, 40, 7 # get_byte(wrapped_key, 40))"""
    disabled: LiteralString = """
        update rekey.encryption_keys set state = 'decrypt_only';
        update rekey.encryption_keys set state = 'disabled'"""
    for change in (disabled, damaged):
        with ready.transaction(force_rollback=True):
            ready.execute(change)
            with refused("RK006"), ready.transaction():
                ready.execute(ALL)
    table.execute("select rekey.lock()")
    with refused("RK001"):
        table.execute(ALL)


def test_bytes_and_texts(app: Connection, ready: Connection) -> None:
    app.execute("create table b (id int primary key, v bytea)")
    protect(app, "b", encrypt_on_write=True)
    app.execute("insert into b select g, decode(repeat('ff', g), 'hex') from generate_series(1, 5) g")
    app.execute("select rekey.create_decrypted_view('b')")
    assert app.execute("select v from b_decrypted order by id").fetchall() == [
        (b"\xff" * g,) for g in range(1, 6)
    ]
    assert calls(ready, "_open", "select * from app.b_decrypted") == 0
    label: LiteralString = "array['app.b.v', id::text], (select rekey.reading_pass('app.b.v'))"
    assert value(app, f"select rekey.decrypt(v, {label}) from b where id = 1") == b"\xff"
    with refused("22021"):
        app.execute(f"select rekey.decrypt_text(v, {label}) from b".encode())
    assert value(app, f"select rekey.decrypt_text(null::text, {label}) from b limit 1") is None


# --- attacks with a pass ---


def test_a_pass_is_of_its_statement(reader: Connection, table: Connection, owner: str) -> None:
    sealed = value(table, "select v from t where id = 1")
    opened: LiteralString = "select rekey.decrypt_text(%s::text, '{app.t.v,1}', %s::bytea)"
    with refused("42501"), reader.transaction():
        given = value(reader, "select rekey.reading_pass('app.t.v')")
        assert value(reader, opened, sealed, given) == "value 1"
        table.execute(f"revoke select on t from {owner}_reader".encode())
        reader.execute("select from information_schema.sql_features limit 1")  # hears of it with a new lock
        assert value(reader, opened, sealed, given) == "value 1"
    assert value(reader, "select rekey.reading_pass('app.t.v')") is None


def test_a_pass_is_of_its_transaction(reader: Connection, ready: Connection, owner: str) -> None:
    """A statement of the client may have several."""
    ready.execute(
        f"""
        create procedure public.revoke_it() language plpgsql security definer as
        $$ begin revoke select on app.t from {owner}_reader; end $$""".encode()
    )
    reader.execute(during("call public.revoke_it(); rollback;"))
    with refused("42501"):
        reader.execute(during("call public.revoke_it(); commit;"))


@pytest.mark.parametrize(
    ("between", "code"),
    [
        ("", None),
        ("perform rekey.lock();", "RK001"),
        ("set role rekey_app;", "42501"),
        ("set role rekey_app; reset role;", None),
        ("perform set_config('request.jwt.claims', '{}', true);", "42501"),
        ("perform set_config('rekey.unlocked', 's' || repeat('00', 96), false);", "RK001"),
    ],
)
def test_what_changes_within_the_statement(reader: Connection, between: str, code: str | None) -> None:
    if code is None:
        reader.execute(during(between))
    else:
        with refused(code):
            reader.execute(during(between))


def test_a_pass_is_of_its_session(reader: Connection, db: str, owner: str, kek: bytes) -> None:
    """Another session of the same role, at the same statement of its own, gets nothing by it."""
    given = value(reader, "select rekey.reading_pass('app.t.v')")
    unlocked = value(reader, "select current_setting('rekey.unlocked')")
    with connect(db, user=f"{owner}_reader") as other:
        other.execute("select set_config('rekey.unlocked', %s, false)", [unlocked])
        with refused("RK001"):
            other.execute(READ.format("%s::bytea").encode(), [given])


def test_a_pass_is_of_its_label(reader: Connection, table: Connection) -> None:
    table.execute("create table u (id int primary key, v text)")
    protect(table, "u", encrypt_on_write=True)
    table.execute("insert into u values (1, 'not for him')")
    sealed = value(table, "select v from u")
    with refused("42501"):
        reader.execute(
            "select rekey.decrypt_text(%s::text, '{app.u.v,1}', rekey.reading_pass('app.t.v'))", [sealed]
        )
    with refused("RK003"):
        reader.execute(
            "select rekey.decrypt_text(%s::text, '{app.t.v,1}', rekey.reading_pass('app.t.v'))", [sealed]
        )
    for label in ("app.u.v", "secret", "session", "dek", "no such", ""):
        assert value(reader, "select rekey.reading_pass(%s)", label) is None
    assert value(reader, "select rekey.reading_pass(null)") is None
    for context in ("null::text[]", "array[['app.t.v', '1']]"):
        with refused("22023"):
            reader.execute(
                f"select rekey.decrypt_text(v, {context}, rekey.reading_pass('app.t.v')) from app.t".encode()
            )


def test_a_pass_that_was_made_up(reader: Connection, table: Connection, ready: Connection) -> None:
    """Whatever stands in it, it opens what would open without, and nothing else."""
    tampered: LiteralString = """
        with pass as (select rekey.reading_pass('app.t.v') as p)
        select count(*) from pass, generate_series(0, octet_length(p) - 1) g, app.t
        where t.id = 1
          and rekey.decrypt_text(v, '{app.t.v,1}', set_byte(p, g, 1 # get_byte(p, g))) = 'value 1'"""
    assert value(reader, tampered) == value(reader, "select octet_length(rekey.reading_pass('app.t.v'))")
    for made_up in (b"", b"x", b"RK\x01", bytes(11 + 16 + 112), b"RK\x01" + b"\xff" * 136):
        assert value(reader, READ.format("%s::bytea"), made_up) == "value 1"
    sealed = value(table, "select decode(right(v, -4), 'base64') from t where id = 1")
    assert value(reader, READ.format("%s::bytea"), sealed) == "value 1"  # an envelope is no pass
    with ready.transaction(force_rollback=True):
        ready.execute("delete from rekey._session_key")
        ready.execute("select rekey.set_setting('kek_provider', 'file')")
        with refused("RK001"):
            ready.execute(READ.format("%s::bytea").encode(), [sealed])
    for version in (2, 1000, -(2**31), 2**31 - 1):
        other = sealed[:7] + version.to_bytes(4, "big", signed=True) + sealed[11:]
        with refused("RK003"):
            reader.execute(
                "select rekey.decrypt(%s::bytea, '{app.t.v,1}', rekey.reading_pass('app.t.v'))", [other]
            )


def test_a_cursor_outlives_no_lock(reader: Connection) -> None:
    with reader.transaction():
        reader.execute("declare c cursor for select v from app.t_decrypted order by id")
        assert reader.execute("fetch 2 from c").fetchall() == [("value 1",), ("value 2",)]
        assert reader.execute("fetch 2 from c").fetchall() == [("value 3",), ("value 4",)]
        reader.execute("select rekey.lock()")
        with refused("RK001"), reader.transaction():
            reader.execute("fetch 2 from c")


def test_code_of_others_gets_no_pass(table: Connection, ready: Connection, owner: str) -> None:
    """An index expression of the owner's, evaluated while somebody else maintains the table."""
    table.execute("create table seen (what text)")
    table.execute("create table bait (id int)")
    table.execute("insert into bait values (1)")
    table.execute(
        """
        create function peek(id int) returns text language plpgsql immutable as $$
        declare
          v_pass bytea := rekey.reading_pass('app.t.v');
        begin
          return coalesce(encode(v_pass, 'hex'), 'none');
        end $$"""
    )
    table.execute("create index peeking on bait (app.peek(id))")
    assert value(table, "select app.peek(1)") != "none"
    ready.execute("set enable_seqscan = off; set enable_bitmapscan = off")
    ready.execute("reindex index app.peeking")
    found = "select app.peek(id) from app.bait where app.peek(id) = 'none'"
    plan = "\n".join(row[0] for row in ready.execute(f"explain {found}".encode()))
    assert "Index" in plan
    count: LiteralString = "select count(*) from app.bait where app.peek(id) = 'none'"
    assert value(ready, count) == 1


def test_an_old_snapshot_reads_on(reader: Connection, ready: Connection) -> None:
    reader.execute("begin isolation level repeatable read")
    assert len(reader.execute(ALL).fetchall()) == 20
    rotate(ready)
    run(ready)
    assert len(reader.execute(ALL).fetchall()) == 20
    reader.execute("commit")
    assert len(reader.execute(ALL).fetchall()) == 20


# --- tenants ---


@pytest.fixture
def tenants(table: Connection, ready: Connection) -> Connection:
    """Two keyrings of tenants, and a tenant_check that counts how often it is asked."""
    ready.execute("create schema project; create sequence project.asked")
    ready.execute("grant usage on schema project to public; grant usage on sequence project.asked to public")
    ready.execute(
        """
        create function project.check(uuid) returns boolean language sql volatile
        return nextval('project.asked') > 0
          and $1::text = any (string_to_array(current_setting('my.tenants', true), ','))"""
    )
    ready.execute("select rekey.set_setting('tenant_check', 'project.check')")
    ready.execute("select rekey.create_keyring('a', %s), rekey.create_keyring('b', %s)", [A, B])
    return ready


def asked(connection: Connection) -> int:
    return int(value(connection, "select coalesce(pg_sequence_last_value('project.asked'), 0)"))


def test_a_tenant_is_asked_for_once(tenants: Connection, reader: Connection) -> None:
    reader.execute("select set_config('my.tenants', %s, false)", [NIL])
    assert len(reader.execute(ALL).fetchall()) == 20
    assert asked(tenants) == 1
    sealed = [row[0] for row in reader.execute("select v from app.t order by id")]
    opened: LiteralString = """
        select rekey.decrypt_many(%s::text[], array_agg(array['app.t.v', id::text] order by id)) from app.t"""
    assert value(reader, opened, sealed) == [f"value {g}".encode() for g in range(1, 21)]
    assert asked(tenants) == 2


def test_a_pass_is_of_a_tenant(tenants: Connection, table: Connection, reader: Connection) -> None:
    """A value of another tenant's keyring, in a column that one may read, opens for that tenant only."""
    table.execute("select set_config('my.tenants', %s, false)", [f"{NIL},{A},{B}"])
    for place, keyring in ((31, "a"), (32, "b")):
        table.execute(
            "insert into t values (%s, rekey.encrypt_text(%s, %s, array['app.t.v', %s::int::text]))",
            [place, f"of {keyring}", keyring, place],
        )
    reader.execute("select set_config('my.tenants', %s, false)", [f"{NIL},{A}"])
    assert value(reader, "select v from app.t_decrypted where id = 31") == "of a"
    with refused("42501"):
        reader.execute("select v from app.t_decrypted where id in (1, 32)")
    with refused("42501"):
        reader.execute(
            "select rekey.decrypt_many(array_agg(v), array_agg(array['app.t.v', id::text])) from app.t"
        )
    reader.execute("select set_config('my.tenants', %s, false)", [A])
    with refused("42501"):
        reader.execute("select v from app.t_decrypted where id = 1")
    assert value(reader, "select v from app.t_decrypted where id = 31") == "of a"


# --- many at once ---


def test_decrypt_many(ready: Connection) -> None:
    ready.execute("select rekey.create_keyring('other')")
    ready.execute(
        """
        create table sealed as
        select g as id, rekey.encrypt(('value ' || g)::text,
          case when g % 3 = 0 then 'other' else 'default' end, array['x', null, g::text]) as v
        from generate_series(1, 300) g"""
    )
    rotate(ready)
    both: LiteralString = """
        select
          rekey.decrypt_many(array_agg(v order by id), array_agg(array['x', null, id::text] order by id)),
          rekey.decrypt_many(array_agg('rk1:' || translate(encode(v, 'base64'), E'\n', '') order by id),
            array_agg(array['x', null, id::text] order by id))
        from sealed"""
    wanted = [f"value {g}".encode() for g in range(1, 301)]
    assert ready.execute(both).fetchone() == (wanted, wanted)
    assert calls(ready, "_deks", both) == 2
    plain: LiteralString = (
        "select rekey.decrypt_many(array[rekey.encrypt('a'::text), null, rekey.encrypt(''::text)])"
    )
    assert value(ready, plain) == [b"a", None, b""]
    assert value(ready, "select rekey.decrypt_many('{}'::bytea[])") == []
    assert value(ready, "select rekey.decrypt_many(null::bytea[])") is None
    assert value(ready, "select rekey.decrypt_many('{null,null}'::text[])") == [None, None]
    one: LiteralString = (
        "select rekey.decrypt_many(array[rekey.encrypt('a'::text, context => '{l}')], '{{l}}')"
    )
    assert value(ready, one) == [b"a"]


@pytest.mark.parametrize(
    ("contexts", "code"),
    [
        ("'{x,1}'", "22023"),
        ("'{{x,1}}'", "22023"),
        ("null", "22023"),
        ("'{{{x},{1}},{{x},{2}}}'", "22023"),
        ("'{{x,1},{secret,2}}'", "42501"),
        ("'{{x,2},{x,1}}'", "RK003"),
        ("'{{x},{x}}'", "RK003"),
        ("default", "RK003"),
    ],
)
def test_decrypt_many_refuses(ready: Connection, contexts: str, code: str) -> None:
    ready.execute(
        "create table sealed as"
        " select rekey.encrypt('v'::text, context => array['x', g::text]) as v from generate_series(1, 2) g"
    )
    given = "" if contexts == "default" else f", {contexts}"
    with refused(code):
        ready.execute(f"select rekey.decrypt_many(array_agg(v){given}) from sealed".encode())
    with refused("22023"):
        ready.execute("select rekey.decrypt_many(array[array_agg(v), array_agg(v)]) from sealed")


def test_decrypt_many_says_which(ready: Connection) -> None:
    ready.execute(
        "create table sealed as select g, rekey.encrypt('v'::text) as v from generate_series(1, 3) g"
    )
    together: LiteralString = "select rekey.decrypt_many(array_agg(v order by g)) from sealed"
    for damage in ("set_byte(v, 30, 1 # get_byte(v, 30))", "substr(v, 1, 20)", "''"):
        with ready.transaction(force_rollback=True):
            ready.execute(f"update sealed set v = {damage} where g = 2".encode())
            with pytest.raises(psycopg.Error) as caught:
                ready.execute(together)
            assert (caught.value.sqlstate, "no. 2" in str(caught.value)) == ("RK003", True)
    rotate(ready)
    run(ready)
    ready.execute("select rekey.disable_key('default', 1)")
    with pytest.raises(psycopg.Error) as caught:
        ready.execute(together)
    assert (caught.value.sqlstate, "key version 1 is disabled" in str(caught.value)) == ("RK006", True)
    ready.execute("select rekey.lock()")
    with refused("RK001"):
        ready.execute(together)


def test_decrypt_many_of_a_column(reader: Connection, table: Connection, owner: str) -> None:
    opened: LiteralString = "select rekey.decrypt_many(%s::text[], %s::text[])"
    sealed = [row[0] for row in reader.execute("select v from app.t order by id")]
    contexts = [["app.t.v", str(g)] for g in range(1, 21)]
    assert value(reader, opened, sealed, contexts)[19] == b"value 20"
    table.execute(f"revoke select on t from {owner}_reader".encode())
    with refused("42501"):
        reader.execute(opened, [sealed, contexts])
    with refused("42501"):  # the label of a later one counts as well
        reader.execute(opened, [sealed, [["mine", "1"], *contexts[1:]]])


# --- keys that a session carries ---

CARRIED: LiteralString = """
    select name, current_setting(name, true)
    from generate_series(0, 7) n cross join lateral (select 'rekey.key_' || n as name) s
    where current_setting(name, true) <> ''"""


def carried(connection: Connection) -> dict[str, str]:
    return dict(connection.execute(CARRIED).fetchall())


def carry(connection: Connection, variables: dict[str, str]) -> None:
    for name, setting in variables.items():
        connection.execute("select set_config(%s, %s, false)", [name, setting])


GET: LiteralString = "select rekey.get_secret('s')"


@pytest.fixture
def stored(ready: Connection) -> Connection:
    """A secret, and a session that carries its key."""
    ready.execute("select rekey.set_secret('s', 'value')")
    assert value(ready, GET) == "value"
    assert carried(ready)
    return ready


def test_a_key_is_carried_sealed(stored: Connection, kek: bytes) -> None:
    [(dek,)] = stored.execute(
        "select d.key from rekey._deks((select array_agg(id) from rekey.keyrings), '{1}') d"
    )
    for setting in carried(stored).values():
        assert not any(part.hex() in setting for part in (dek[:32], dek[32:]))
    assert calls(stored, "_kek", GET) == 0


def test_a_carried_key_ends_with_the_lock(stored: Connection, kek: bytes) -> None:
    before = carried(stored)
    stored.execute("select rekey.lock()")
    for said in ({}, before, {"rekey.unlocked": "s" + "00" * 96}):
        carry(stored, said)
        with refused("RK001"):
            stored.execute(GET)
    unlock(stored, kek)
    assert value(stored, GET) == "value"


def test_a_carried_key_is_of_its_session(stored: Connection, db: str, kek: bytes) -> None:
    unlocked = value(stored, "select current_setting('rekey.unlocked')")
    with connect(db) as other:
        carry(other, carried(stored))
        with refused("RK001"):
            other.execute(GET)
        carry(other, {"rekey.unlocked": unlocked})
        with refused("RK001"):
            other.execute(GET)


def test_a_carried_key_is_of_its_transaction(stored: Connection, kek: bytes) -> None:
    stored.execute("select rekey.lock()")
    with stored.transaction():
        unlock(stored, kek, scope="transaction")
        assert value(stored, GET) == "value"
        before = carried(stored) | {
            "rekey.unlocked": value(stored, "select current_setting('rekey.unlocked')")
        }
    with refused("RK001"):
        stored.execute(GET)
    carry(stored, before)
    with refused("RK001"):
        stored.execute(GET)


def test_a_carried_key_heeds_its_state(
    stored: Connection, session: Callable[[], Connection], kek: bytes
) -> None:
    other = session()
    rotate(other)
    other.execute("select rekey.encrypt('x'::text)")
    sealed = value(stored, "select ciphertext from rekey.secrets")
    opened: LiteralString = "select rekey.decrypt(%s::bytea, '{x}')"
    with refused("RK003"):
        stored.execute(opened, [sealed])
    run(other)
    stored.execute(GET)
    other.execute("select rekey.disable_key('default', 1)")
    with refused("RK006"):
        stored.execute(opened, [sealed])
    other.execute("select rekey.enable_key('default', 1)")
    with refused("RK003"):
        stored.execute(opened, [sealed])
    next_kek = os.urandom(32)
    unlock(other, kek, next_kek)
    other.execute("select rekey.rotate_kek()")
    with refused("RK002"):
        stored.execute(GET)
    unlock(stored, next_kek)
    assert value(stored, GET) == "value"


def put_in_vault(connection: Connection, kek: bytes) -> None:
    """Let the server find the KEK by itself, in a stand-in for the Vault."""
    connection.execute(
        "create schema vault; create table vault.decrypted_secrets (name text, decrypted_secret text)"
    )
    connection.execute("insert into vault.decrypted_secrets values ('pg_rekey_kek', %s)", [kek.hex()])
    connection.execute("create view vault.secrets as select * from vault.decrypted_secrets")
    belong(connection, "supabase_vault", "vault")
    connection.execute("select rekey.set_setting('kek_provider', 'vault')")


def test_a_standby_has_what_a_pass_is_sealed_with(conn: Connection, kek: bytes) -> None:
    """Nobody unlocked a session before, and whoever only reads could not make the key of sessions."""
    put_in_vault(conn, kek)
    conn.execute("select rekey.register_kek(), rekey.create_keyring('default')")
    conn.execute("create table t (id int primary key, v text)")
    protect(conn, "t", encrypt_on_write=True)
    conn.execute("insert into t values (1, 'value')")
    conn.execute("select rekey.create_decrypted_view('t')")
    conn.execute("set default_transaction_read_only = on")
    assert calls(conn, "_open", "select v from t_decrypted") == 0
    assert value(conn, "select v from t_decrypted") == "value"


def test_what_a_session_only_says(stored: Connection, kek: bytes) -> None:
    """Without an unlocked session, what the server's own KEK opened is carried for that statement."""
    put_in_vault(stored, kek)
    for said in ("", "s" + "00" * 96, "t" + "00" * 96, "s", "x"):
        stored.execute("update vault.decrypted_secrets set decrypted_secret = %s", [kek.hex()])
        with stored.transaction():
            stored.execute("select rekey.lock()")
            stored.execute("select set_config('rekey.unlocked', %s, false)", [said])
            twice = "select rekey.get_secret('s') from generate_series(1, 3)"
            assert len(stored.execute(twice.encode()).fetchall()) == 3
            before = carried(stored)
            stored.execute("delete from vault.decrypted_secrets")
            with refused("RK001"), stored.transaction():
                stored.execute(GET)
            carry(stored, before)
            with refused("RK001"), stored.transaction():
                stored.execute(GET)
            stored.execute("insert into vault.decrypted_secrets values ('pg_rekey_kek', %s)", [kek.hex()])


def test_what_stands_in_a_carried_key_is_not_believed(stored: Connection) -> None:
    names = [f"rekey.key_{n}" for n in range(8)]
    for setting in ("", "x", "00" * 128, "ff" * 128, "0" * 255, "x" * 256, "0" * 255 + "\n"):
        carry(stored, dict.fromkeys(names, setting))
        assert value(stored, GET) == "value"


def test_old_and_new_versions_are_carried_side_by_side(stored: Connection) -> None:
    for _ in range(2):
        rotate(stored)
        stored.execute("select rekey.set_secret('new', 'value')")
        run(stored)
    assert len(carried(stored)) == 3


RENAME = "alter table app.t rename {} to {};"


@pytest.mark.parametrize(
    "change",
    [
        "alter table app.t rename v to w; alter table app.t add v text;",
        "".join(RENAME.format(*names) for names in (("v", "w"), ("other", "v"), ("w", "other"))),
        "create trigger zzz before insert on app.t for each row execute function app.keep();",
    ],
)
def test_what_a_statement_does_to_its_table(table: Connection, change: str) -> None:
    """What is asked for each row is asked again after it."""
    table.execute("alter table t add other text")
    table.execute("create function keep() returns trigger language plpgsql as 'begin return new; end'")
    statement = f"""
        do $$ begin
          insert into app.t values (51, 'first');
          {change}
          execute 'insert into app.t values (52, ''second'')';
        end $$"""
    with refused("RK005"):
        table.execute(statement.encode())
