"""The key-encryption key: how it is brought, registered, rotated, lost, and where else it may come from."""

import base64
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

import reference
from driving import check, events, fill, refused, rotate, run, waits
from helpers import Connection, belong, connect, initialize, unlock, value

NEXT, OTHER = (hashlib.sha256(name).digest() for name in (b"next", b"other"))
READ: LiteralString = "select rekey.get_secret('s1')"
BLOB: LiteralString = "select current_setting('rekey.unlocked')"
USES: list[LiteralString] = [
    READ,
    "select rekey.set_secret('n', 'x')",
    "select rekey.encrypt('x'::text)",
    "select rekey.create_keyring('x')",
    "select rekey.rotate_keys()",
    "select rekey.mark_key_compromised('default', 1)",
    "select rekey.verify_ciphertexts()",
    "select rekey.register_kek()",
    "select rekey.rotate_kek()",
]


def footprint(connection: Connection) -> Any:
    """What a refused call must leave as it was."""
    query: LiteralString = """
        select (select jsonb_agg(to_jsonb(k) order by id) from rekey.keyrings k),
          (select jsonb_agg(to_jsonb(k) order by id) from rekey.encryption_keys k),
          (select jsonb_agg(to_jsonb(k) order by id) from rekey.keks k),
          (select jsonb_agg(to_jsonb(s)) from rekey.settings s), (select count(*) from rekey.audit_log)"""
    return connection.execute(query).fetchone()


@pytest.fixture
def stored(ready: Connection) -> Connection:
    """`ready`, with a secret s1, and locked again."""
    fill(ready, 1)
    ready.execute("select rekey.lock()")
    return ready


def deny(connection: Connection, code: str, statement: LiteralString = READ, *parameters: Any) -> None:
    """Expect an error with a hint, and nothing changed by it."""
    before = footprint(connection)
    with pytest.raises(psycopg.Error) as caught, connection.transaction():
        connection.execute(statement, parameters)
    assert caught.value.sqlstate == code, caught.value
    assert caught.value.diag.message_hint or code not in ("RK001", "RK002")
    assert footprint(connection) == before


def test_transaction_scope_ends_with_it(stored: Connection, kek: bytes) -> None:
    with stored.transaction():
        assert unlock(stored, kek, scope="transaction") == reference.fingerprint(kek)
        assert value(stored, READ) == "s1"
        blob = value(stored, BLOB)
        assert kek.hex() not in blob
    assert value(stored, BLOB) == ""
    deny(stored, "RK001")
    with stored.transaction(force_rollback=True):
        unlock(stored, kek)
    deny(stored, "RK001")
    for copied in (blob, "s" + blob[1:], "r" + blob[1:], blob[:-1] + "z", blob[:-2], "s" * 193, "x"):
        with stored.transaction():
            stored.execute("select set_config('rekey.unlocked', %s, true)", [copied])
            deny(stored, "RK001")


def test_unlock_by_parameter(stored: Connection, kek: bytes) -> None:
    unlocked: LiteralString = "select rekey.unlock(%s::bytea, %s)"
    with stored.transaction():
        assert value(stored, unlocked, kek + NEXT, "transaction") == reference.fingerprint(kek)
        assert value(stored, READ) == "s1"
    deny(stored, "RK001")
    value(stored, unlocked, kek, "session")
    assert value(stored, READ) == "s1"


def test_session_scope_ends_with_lock(stored: Connection, db: str, kek: bytes) -> None:
    unlock(stored, kek)
    for _ in range(2):
        assert value(stored, READ) == "s1"
    blob = value(stored, BLOB)
    with connect(db) as other:
        other.execute("select set_config('rekey.unlocked', %s, false)", [blob])
        deny(other, "RK001")
    stored.execute("set session authorization rekey_worker")
    stored.execute("reset session authorization")
    assert value(stored, READ) == "s1"
    with stored.transaction():
        unlock(stored, kek, scope="transaction")
        stored.execute("select rekey.lock()")
        deny(stored, "RK001")
    deny(stored, "RK001")
    stored.execute("select set_config('rekey.unlocked', %s, false)", ["t" + blob[1:]])
    deny(stored, "RK001")


def test_blob_is_of_one_login(stored: Connection, kek: bytes) -> None:
    unlock(stored, kek)
    with stored.transaction(force_rollback=True):
        login = sql.Identifier(f"rekey_test_{os.getpid()}")
        stored.execute(sql.SQL("create role {0}; grant rekey_app to {0}").format(login))
        assert value(stored, READ) == "s1"
        stored.execute(sql.SQL("set local session authorization {}").format(login))
        with refused("RK001"):
            stored.execute(READ)


def test_no_kek_and_wrong_kek(stored: Connection, kek: bytes) -> None:
    for use in USES:
        deny(stored, "RK001", use)
    # As a copy of the KEK that was rotated away elsewhere would be: at hand, and wrong.
    stored.execute("update rekey.keks set fingerprint = %s", [reference.fingerprint(OTHER)])
    unlock(stored, OTHER)
    stored.execute("update rekey.keks set fingerprint = %s", [reference.fingerprint(kek)])
    for use in USES:
        deny(stored, "RK002", use)


def test_unlock_refuses_another_kek(stored: Connection) -> None:
    for keks in ([OTHER], [OTHER, NEXT], [NEXT, OTHER]):
        for scope in ("transaction", "session"):
            with stored.transaction():
                with refused("RK002"):
                    unlock(stored, *keks, scope=scope)
                assert value(stored, BLOB) == ""


def test_unlock_refuses_other_lengths_and_scopes(conn: Connection, kek: bytes) -> None:
    for length in (0, 1, 31, 33, 63, 65, 96):
        deny(conn, "22023", "select rekey.unlock(%s::bytea)", bytes(length))
        with refused("22023"):
            unlock(conn, bytes(length))
    deny(conn, "22023", "select rekey.unlock(null)")
    with refused("22023"):
        unlock(conn)
    for scope in (None, "", "Session", "forever"):
        deny(conn, "22023", "select rekey.unlock(%s::bytea, %s)", kek, scope)
    deny(conn, "42P01", "select rekey.unlock_copied()")


def test_register(conn: Connection, kek: bytes) -> None:
    for statement in ("select rekey.encrypt('x'::text)", "select rekey.create_keyring('x')"):
        with refused("RK001" if "keyring" in statement else "RK007"):
            conn.execute(statement)
    deny(conn, "RK001", "select rekey.register_kek()")
    conn.execute("select set_config('rekey.unlocked', 's' || repeat('00', 96), false)")
    deny(conn, "RK001", "select rekey.register_kek()")
    unlock(conn, kek)
    for _ in range(2):
        assert value(conn, "select rekey.register_kek()") == 1
    assert conn.execute("select id, state from rekey.keks").fetchall() == [(1, "active")]
    assert events(conn) == ["kek.registered"]
    deny(conn, "RK006", "select rekey.register_kek(true)")


def test_rotate_kek(stored: Connection, db: str, kek: bytes) -> None:
    stored.execute("update rekey.encryption_keys set destroy_after = null")
    unlock(stored, kek)
    rotate(stored)
    query: LiteralString = (
        "select kek_id, keyring_id, version, wrapped_key from rekey.encryption_keys order by id"
    )
    before = [reference.unwrap(kek, *row) for row in stored.execute(query)]
    rows = value(stored, "select jsonb_agg(to_jsonb(s)) from rekey.secrets s")
    with connect(db) as old, connect(db) as both, connect(db) as new:
        unlock(old, kek)
        # The next KEK is handed out first: whoever has both is not cut off at the switch.
        for order in ((NEXT, kek), (kek, NEXT)):
            assert unlock(both, *order) == reference.fingerprint(kek)
            assert value(both, READ) == "s1"
        assert value(both, "select rekey.rotate_kek()") == 2
        assert value(both, READ) == "s1"
        deny(old, "RK002")
        with refused("RK002"):
            unlock(old, kek)
        assert unlock(new, NEXT) == reference.fingerprint(NEXT)
        assert value(new, READ) == "s1"
        deny(both, "RK001", "select rekey.rotate_kek()")  # nothing new among the two
        assert unlock(both, kek, NEXT) == reference.fingerprint(NEXT)
        assert value(both, READ) == "s1"
        after = [reference.unwrap(NEXT, *row) for row in new.execute(query)]
        assert None not in before
        assert after == before
        assert value(new, "select jsonb_agg(to_jsonb(s)) from rekey.secrets s") == rows
        assert new.execute("select id, state from rekey.keks order by id").fetchall() == [
            (1, "retired"),
            (2, "active"),
        ]
        run(new)
        check(new, {"s1": "s1"})
        assert events(new).count("kek.rotated") == 1
        unlock(new, NEXT, kek)
        deny(new, "RK001", "select rekey.rotate_kek()")  # a retired KEK does not come back


def test_rotate_kek_leaves_all_where_one_key_is_damaged(stored: Connection, kek: bytes) -> None:
    unlock(stored, kek, NEXT)
    stored.execute("select rekey.create_keyring('damaged')")
    stored.execute("select rekey.create_keyring('fine')")
    for damage in (
        "set_bit(wrapped_key, 300, 1 - get_bit(wrapped_key, 300))",
        "substr(wrapped_key, 1, 100)",
        "wrapped_key || wrapped_key",
        "''",
        "(select wrapped_key from rekey.encryption_keys order by id limit 1)",
    ):
        with stored.transaction(force_rollback=True):
            stored.execute(
                "update rekey.encryption_keys set wrapped_key = " + damage + " where keyring_id ="
                " (select id from rekey.keyrings where name = 'damaged')"
            )
            deny(stored, "RK003", "select rekey.rotate_kek()")
            deny(stored, "RK006", "select rekey.encrypt('x'::text, 'damaged')")
            assert value(stored, READ) == "s1"
    stored.execute("select rekey.rotate_kek()")
    assert value(stored, READ) == "s1"


@pytest.mark.parametrize(
    "maker", ["select rekey.create_keyring('new')", "select rekey.rotate_keys('default')"]
)
@pytest.mark.parametrize("maker_first", [True, False])
def test_makers_of_keys_and_rotate_kek_wait_for_each_other(
    stored: Connection, db: str, kek: bytes, maker: LiteralString, maker_first: bool
) -> None:
    calls: list[LiteralString] = [maker, "select rekey.rotate_kek()"]
    first, second = calls if maker_first else reversed(calls)
    with connect(db) as one, connect(db) as two, ThreadPoolExecutor() as pool:
        for connection in (one, two):
            unlock(connection, kek, NEXT)
        with one.transaction():
            one.execute(first)
            waiting: Future[Any] = pool.submit(two.execute, second)
            waits(stored, two.info.backend_pid)
        waiting.result(timeout=60)
        assert value(one, "select count(*) from rekey.encryption_keys where kek_id <> 2") == 0
        assert value(one, "select rekey.decrypt_text(rekey.encrypt('x'::text))") == "x"
        for (name,) in one.execute("select name from rekey.keyrings").fetchall():
            assert value(one, "select rekey.decrypt_text(rekey.encrypt('x'::text, %s))", name) == "x"
        run(one)
        check(one, {"s1": "s1"})


def test_lost_kek(ready: Connection, kek: bytes) -> None:
    fill(ready, 3)
    held = value(ready, "select rekey.encrypt('held'::text)")
    rotate(ready)
    ready.execute("select rekey.lock()")
    with refused("RK002"):
        unlock(ready, NEXT)
    with ready.transaction():
        assert unlock(ready, NEXT, scope="replacement") == reference.fingerprint(NEXT)
        deny(ready, "RK002", "select rekey.register_kek()")
        assert value(ready, "select rekey.register_kek(true)") == 2
    with ready.transaction():
        unlock(ready, kek, scope="replacement")
        deny(ready, "RK006", "select rekey.register_kek(true)")  # found again, after all: too late
    with refused("RK002"):
        unlock(ready, kek)
    unlock(ready, NEXT)
    for statement, parameter in ((READ, []), ("select rekey.decrypt(%s::bytea)", [held])):
        with pytest.raises(psycopg.Error, match="KEK 1, which is lost") as caught:
            ready.execute(statement, parameter)
        assert caught.value.sqlstate == "RK006"
    assert ready.execute("select version, kek_state from rekey.key_status order by version").fetchall() == [
        (1, "lost"),
        (2, "lost"),
        (3, "active"),
    ]
    ready.execute("select rekey.set_secret('new', 'x')")
    ready.execute("select rekey.set_secret('s1', 'again')")
    run(ready)
    finished: LiteralString = "select state, rows_failed from rekey.rotations order by id desc limit 1"
    assert ready.execute(finished).fetchone() == ("completed_with_failures", 2)
    ready.execute("select rekey.delete_secret(n) from unnest('{s2,s3}'::text[]) n")
    ready.execute("call rekey.tick()")
    check(ready, {"new": "x", "s1": "again"})
    assert events(ready).count("kek.lost") == 1
    assert events(ready).count("kek.registered") == 2
    unlock(ready, NEXT, OTHER)
    assert value(ready, "select rekey.rotate_kek()") == 3
    check(ready, {"new": "x", "s1": "again"})


BAD_TEXTS = [
    "",
    "  ",
    "z" * 64,
    "ab" * 31,
    "ab" * 33,
    "0x" + "ab" * 32,
    base64.b64encode(bytes(31)).decode(),
    base64.b64encode(bytes(33)).decode(),
    base64.b64encode(bytes(32)).decode().rstrip("="),
    "password",
    "\u00e9" * 64,
]


def texts(kek: bytes) -> list[str]:
    """Forms in which a KEK may be written."""
    encoded = base64.b64encode(kek).decode()
    return [kek.hex(), kek.hex().upper(), encoded, f" {encoded}\r\n", f"\t{kek.hex()}\n\n"]


class Vault:
    """A stand-in for Supabase's Vault: a table, and the view that the provider reads."""

    setting = "kek_secret_name"

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.name = "pg_rekey_kek"
        connection.execute("create schema vault")
        connection.execute("create table vault.secrets (name text primary key, secret text)")
        connection.execute(
            "create view vault.decrypted_secrets as"
            " select name, secret as decrypted_secret from vault.secrets"
        )
        belong(connection, "supabase_vault", "vault")

    def put(self, text: str | None, suffix: str = "") -> None:
        self.connection.execute("delete from vault.secrets where name = %s", [self.name + suffix])
        if text is not None:
            self.connection.execute("insert into vault.secrets values (%s, %s)", [self.name + suffix, text])


class File:
    """Links in the data directory to files elsewhere that the server may read."""

    setting = "kek_file"

    def __init__(self, data: Path, elsewhere: Path) -> None:
        self.data, self.elsewhere = data, elsewhere
        self.name = f"{elsewhere.name}.kek"
        self.owner = data.stat()

    def put(self, text: str | None, suffix: str = "") -> None:
        link, target = self.data / (self.name + suffix), self.elsewhere / f"kek{suffix}"
        link.unlink(missing_ok=True)
        if text is not None:
            target.write_text(text)
            target.chmod(0o600)
            os.chown(target, self.owner.st_uid, self.owner.st_gid)
            link.symlink_to(target)


@pytest.fixture(params=["vault", "file"])
def provider(request: pytest.FixtureRequest, stored: Connection) -> Iterator[Vault | File]:
    if request.param == "vault":
        provider: Vault | File = Vault(stored)
        stored.execute("select rekey.set_setting('kek_provider', 'vault')")
        yield provider
        return
    data = Path(value(stored, "show data_directory"))
    if not ((data / "postmaster.pid").exists() and os.access(data, os.W_OK)):
        pytest.skip("the server's data directory is not reachable")
    elsewhere = Path(tempfile.mkdtemp(prefix="pgrk-kek-", dir="/tmp"))
    shutil.chown(elsewhere, data.stat().st_uid, data.stat().st_gid)
    provider = File(data, elsewhere)
    stored.execute("select rekey.set_setting('kek_file', %s)", [provider.name])
    stored.execute("select rekey.set_setting('kek_provider', 'file')")
    yield provider
    for suffix in ("", "_new"):
        provider.put(None, suffix)
    shutil.rmtree(elsewhere)


def test_provider_formats(provider: Vault | File, stored: Connection, kek: bytes) -> None:
    deny(stored, "RK001")
    for text in texts(kek):
        provider.put(text)
        assert value(stored, READ) == "s1", text
    for text in BAD_TEXTS:
        provider.put(text)
        deny(stored, "RK001")
    provider.put(OTHER.hex())
    deny(stored, "RK002")
    unlock(stored, kek)  # what the session brings comes first
    assert value(stored, READ) == "s1"


def test_provider_has_the_next_kek(provider: Vault | File, stored: Connection, kek: bytes) -> None:
    provider.put(kek.hex())
    stored.execute("set role rekey_app")
    assert value(stored, READ) == "s1"
    stored.execute("set role rekey_worker")
    stored.execute("call rekey.tick()")
    stored.execute("reset role")
    deny(stored, "RK001", "select rekey.rotate_kek()")
    provider.put(base64.b64encode(NEXT).decode(), "_new")
    assert value(stored, READ) == "s1"
    assert value(stored, "select rekey.rotate_kek()") == 2
    for current, following in ((kek, NEXT), (NEXT, NEXT), (NEXT, None), (None, NEXT), (NEXT, OTHER)):
        provider.put(current.hex() if current else None)
        provider.put(following.hex() if following else None, "_new")
        assert value(stored, READ) == "s1"
    rotate(stored)
    stored.execute("call rekey.tick()")
    assert value(stored, "select state from rekey.rotations") == "completed"
    check(stored, {"s1": "s1"})


def test_provider_that_cannot_be_read(stored: Connection) -> None:
    stored.execute("select rekey.set_setting('kek_provider', 'vault')")
    deny(stored, "RK001")
    Vault(stored)
    deny(stored, "RK001")  # no right yet
    stored.execute("select rekey.set_setting('kek_provider', 'vault')")
    deny(stored, "RK001")  # no secret yet
    stored.execute("revoke all on vault.decrypted_secrets from rekey_owner")
    stored.execute("select rekey.set_setting('kek_provider', 'file')")
    stored.execute("select rekey.set_setting('kek_file', 'base')")  # a directory
    deny(stored, "RK001")


def test_set_setting_grants_with_the_rights_of_its_caller(stored: Connection) -> None:
    Vault(stored)
    stored.execute("set role rekey_admin")
    choices: list[LiteralString] = [
        "select rekey.set_setting('kek_provider', 'vault')",
        "select rekey.set_setting('kek_provider', 'file')",
    ]
    for statement in choices:
        with refused("42501"):
            stored.execute(statement)
    stored.execute("reset role")
    for statement in choices:
        stored.execute(statement)
    stored.execute("grant usage on schema vault to rekey_admin")
    stored.execute("set role rekey_admin")
    for statement in choices:
        stored.execute(statement)
    assert value(stored, "select value from rekey.setting_status where name = 'kek_provider'") == "file"


BAD_SETTINGS = [
    ("kek_provider", "env"),
    ("kek_secret_name", ""),
    ("kek_file", "/etc/passwd"),
    ("kek_file", "../kek"),
    ("kek_file", "a/../../kek"),
    ("kek_file", ""),
    ("destroy_wait", "-1 day"),
    ("destroy_wait", "10000 years"),
    ("destroy_wait", "soon"),
    ("batch_target", "0"),
    ("batch_target", "1 day"),
    ("max_rows_per_second", "0"),
    ("max_rows_per_second", "99999999999"),
    ("max_rows_per_second", "many"),
    ("max_attempts", "0"),
    ("tenant_check", "no.such_function"),
    ("tenant_check", "public.f(uuid); drop table x"),
    ("jwt_admin_claim", ""),
    ("singleton", "false"),
    ("ctid", "(0,1)"),
    ("nothing", "1"),
    ("", "1"),
    (None, "1"),
    ("tenant_check", "f"),
    ("tenant_check", "a.b.c"),
    ("tenant_check", "pg_catalog.uuid_send"),
]


def test_settings_refused(stored: Connection) -> None:
    for name, setting in BAD_SETTINGS:
        deny(stored, "22023", "select rekey.set_setting(%s, %s)", name, setting)


def test_settings(stored: Connection) -> None:
    status: LiteralString = "select value from rekey.setting_status where name = 'max_rows_per_second'"
    for setting in ("500", None):
        stored.execute("select rekey.set_setting('max_rows_per_second', %s)", [setting])
        assert value(stored, status) == setting
    for _ in range(2):  # the second one changes nothing
        stored.execute("select rekey.set_setting('destroy_wait', '90 days')")
    stored.execute("select rekey.set_setting('destroy_wait', null)")
    assert value(stored, "select value from rekey.setting_status where name = 'destroy_wait'") == "45 days"
    assert events(stored).count("setting.changed") == 4


def test_session_key_is_made_once(make_database: Callable[..., str], kek: bytes) -> None:
    """Two sessions that unlock a fresh database at the same time."""
    dsn = make_database(os.environ["PG_REKEY_TEST_TEMPLATE"])
    with connect(dsn) as one, connect(dsn) as two, ThreadPoolExecutor() as pool:
        with one.transaction():
            unlock(one, kek)
            second = pool.submit(unlock, two, kek)
            with connect(dsn) as observer:
                waits(observer, two.info.backend_pid)
        assert second.result(timeout=60) == reference.fingerprint(kek)
        initialize(one, kek)
        assert value(two, "select rekey.decrypt_text(rekey.encrypt('x'::text))") == "x"
