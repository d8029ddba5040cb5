"""No key and no value appears in what the server logs, however loud it is told to be."""

import base64
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

import reference
from canaries import explained_parameters
from helpers import Connection, belong, connect, install, unlock, value
from pg_rekey import local, release

Settings = dict[str, str]

LOUD: Settings = {
    "client_min_messages": "log",
    "log_statement": "all",
    "log_min_duration_statement": "0",
    "log_parameter_max_length": "-1",
    "log_parameter_max_length_on_error": "-1",
    "log_error_verbosity": "verbose",
    "debug_print_plan": "on",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_nested_statements": "on",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_verbose": "on",
}
PGAUDIT: Settings = {
    "client_min_messages": "log",
    "log_min_duration_statement": "0",
    "pgaudit.log": "all",
    "pgaudit.log_client": "on",
    "pgaudit.log_parameter": "on",
    "pgaudit.log_catalog": "on",
    "pgaudit.log_rows": "on",
}
NEXT, REPLACEMENT, WRONG = (os.urandom(32) for _ in range(3))
VALUE = "plaintext canary 4711 " * 3


@pytest.fixture(params=["auto_explain", "pgaudit"])
def loud(request: pytest.FixtureRequest, make_database: Callable[..., str]) -> Iterator[tuple[str, Settings]]:
    """DSN of a database, and the settings that make a session log all it can."""
    if request.param == "auto_explain":
        dsn = make_database(os.environ["PG_REKEY_TEST_TEMPLATE"])
        with connect(dsn) as connection:
            major = connection.info.server_version // 10000
        yield dsn, LOUD | explained_parameters(major)
        return
    installation = local.ensure()
    if not installation.has("pgaudit"):
        pytest.skip("pgaudit is not installed")
    with local.Server(settings={"shared_preload_libraries": "pgaudit"}) as server:
        install(server.dsn(), release.assemble("plain"))
        yield server.dsn(), PGAUDIT


def forms(secret: bytes) -> Iterator[str]:
    """Yield how bytes may look in a log."""
    for part in {secret, secret[:32], secret[-32:]}:
        yield part.hex()
        yield part.decode("latin-1").lower()
        yield base64.b64encode(part).decode().rstrip("=").lower()
        yield "".join(chr(c) if 32 <= c < 127 and c != 92 else f"\\{c:03o}" for c in part).lower()
        yield " ".join(str(c - 256 if c > 127 else c) for c in part)  # debug_print_plan


class Session:
    """A session whose server messages are kept."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.log: list[str] = []
        self.connection = connection
        connection.add_notice_handler(self.note)
        connection.execute("load 'auto_explain'")
        for name, setting in settings.items():
            connection.execute("select set_config(%s, %s, false)", [name, setting])

    def note(self, message: psycopg.errors.Diagnostic) -> None:
        fields = (message.message_primary, message.message_detail, message.message_hint, message.context)
        self.log.extend(field for field in fields if field)

    def run(self, *statements: LiteralString) -> None:
        for statement in statements:
            self.connection.execute(statement)

    def fail(self, code: str, statement: LiteralString) -> None:
        with pytest.raises(psycopg.Error) as caught:
            self.connection.execute(statement)
        assert caught.value.sqlstate == code
        self.note(caught.value.diag)

    def found(self, secret: bytes) -> list[str]:
        """Return the messages in which these bytes stand."""
        needles = set(forms(secret))
        return [text for text in self.log if any(needle in text.lower() for needle in needles)]


def deks(connection: Connection, *keks: bytes) -> set[bytes]:
    """Unwrap every DEK, with an implementation of our own."""
    rows = connection.execute(
        "select kek_id, keyring_id, version, wrapped_key from rekey.encryption_keys"
        " where wrapped_key is not null"
    ).fetchall()
    opened = {reference.unwrap(kek, *row) for row in rows for kek in keks}
    return {dek for dek in opened if dek}


def fill(connection: Connection, table: LiteralString, *rows: str | bytes) -> None:
    """Make a temporary table with one column v, filled without a statement that shows it."""
    kind = "text" if isinstance(rows[0], str) else "bytea"
    connection.execute(
        sql.SQL("create temporary table {} (v {})").format(sql.Identifier(table), sql.SQL(kind))
    )
    with connection.cursor().copy(
        sql.SQL("copy {} from stdin (format binary)").format(sql.Identifier(table))
    ) as copy:
        copy.set_types([kind])
        for row in rows:
            copy.write_row([row])


def use_all(session: Session, quiet: Connection, kek: bytes) -> set[bytes]:
    """Call whatever handles a key; return all the DEKs there were."""
    seen: set[bytes] = set()
    connection = session.connection
    unlock(connection, kek)
    session.run(
        "select rekey.register_kek()",
        "select rekey.create_keyring('default')",
        "select rekey.create_keyring('busy')",
        "select rekey.create_keyring('empty')",
    )
    fill(connection, "plain", VALUE)
    session.run(
        "select rekey.set_secret('a', v) from plain",
        "select rekey.set_secret('a', v) from plain",
        "select rekey.set_secret('b' || n, v, keyring => 'busy') from plain, generate_series(1, 20) n",
        "select rekey.set_secrets(array['c', 'd'], array[v, v], descriptions => array[null, 'x']) from plain",
        "select rekey.set_secrets(array['d', 'e'], array[v, v]) from plain",
        "select rekey.get_secret('a')",
        "select * from rekey.read_secrets()",
        "select * from rekey.decrypted_secrets",
        "select rekey.decrypt(rekey.encrypt(v, context => '{c}'), '{c}') from plain",
        "select rekey.decrypt_text(rekey.encrypt_text(v)) from plain",
        "select rekey.decrypt_many(array[rekey.encrypt(v), rekey.encrypt(v)]) from plain",
        "select rekey.decrypt_many(array[rekey.encrypt_text(v, context => '{c}')], '{{c}}') from plain",
        "select rekey.decrypt_text(rekey.encrypt(convert_to(v, 'UTF8'))) from plain",
        "select * from rekey.verify_ciphertexts()",
    )
    session.fail("RK003", "select rekey.decrypt(rekey.encrypt(v), '{other}') from plain")
    seen |= deks(quiet, kek)

    session.run(
        "select * from rekey.rotate_keys()",
        "select * from rekey.rotation_step()",
        "call rekey.run_rotations()",
        "select rekey.rollback_rotation(id) from rekey.rotation_status where keyring = 'default'",
        "select * from rekey.mark_key_compromised('default', 2)",
        "select rekey.set_schedule('empty', '1 minute', now() - interval '1 day')",
        "call rekey.tick()",
        "select rekey.schedule_key_destruction('busy', 1, '0 s')",
        "select * from rekey.metrics()",
        "call rekey.tick()",
    )
    seen |= deks(quiet, kek)
    with connection.transaction():
        session.run(
            "set transaction isolation level repeatable read", "select rekey.set_secret('a', v) from plain"
        )

    session.run("select rekey.lock()")
    session.fail("RK001", "select rekey.get_secret('a')")
    with pytest.raises(psycopg.Error) as caught:
        unlock(connection, WRONG)
    session.note(caught.value.diag)
    unlock(connection, kek, NEXT)
    session.run("select rekey.rotate_kek()", "select rekey.get_secret('a')", "select rekey.lock()")
    seen |= deks(quiet, NEXT)

    quiet.execute("create schema vault")
    quiet.execute("create table vault.secrets (name text, decrypted_secret text)")
    quiet.execute("insert into vault.secrets values ('pg_rekey_kek', %s)", [NEXT.hex()])
    quiet.execute("create view vault.decrypted_secrets as select * from vault.secrets")
    belong(quiet, "supabase_vault", "vault")
    session.run(
        "select rekey.set_setting('kek_provider', 'vault')",
        "select rekey.get_secret('a')",
        "select * from rekey.rotate_keys()",
        "call rekey.tick()",
    )
    quiet.execute("update vault.secrets set decrypted_secret = %s", [base64.b64encode(WRONG).decode()])
    session.fail("RK002", "select rekey.get_secret('a')")
    seen |= deks(quiet, NEXT)

    quiet.execute(
        "update rekey.encryption_keys"
        " set wrapped_key = set_byte(wrapped_key, 40, 7 # get_byte(wrapped_key, 40)) where is_active"
    )
    unlock(connection, NEXT, REPLACEMENT)
    session.fail("RK003", "select rekey.rotate_kek()")
    session.fail("RK006", "select rekey.set_secret('a', v) from plain")
    session.run("select * from rekey.verify_ciphertexts()")
    with connection.transaction():
        unlock(connection, REPLACEMENT, scope="replacement")
        session.run("select rekey.register_kek(true)")
        session.run("select rekey.set_secret('a', v) from plain", "select rekey.get_secret('a')")
    seen |= deks(quiet, REPLACEMENT)
    return seen


def test_nothing_secret_is_logged(loud: tuple[str, Settings], kek: bytes) -> None:
    dsn, settings = loud
    with connect(dsn) as quiet, connect(dsn) as connection:
        session = Session(connection, settings)
        keys = use_all(session, quiet, kek)
        assert len(keys) > 8
        session_key = value(quiet, "select key from rekey._session_key")

        secrets = {
            "session key": session_key,
            "value": VALUE.encode(),
            "kek": kek,
            "next kek": NEXT,
            "replacement": REPLACEMENT,
            "wrong kek": WRONG,
        }
        secrets |= {
            f"wrapping key of {name}": reference.wrapping_key(secrets[name])
            for name in ("kek", "next kek", "replacement", "wrong kek")
        }
        secrets |= {f"DEK {number}": key for number, key in enumerate(keys)}
        leaks = {name: found[0][:2000] for name, key in secrets.items() if (found := session.found(key))}
        assert leaks == {}
        assert len(session.log) > 1000

        # The trap works: what the rules forbid is seen.
        canary = os.urandom(32)
        fill(session.connection, "canary", canary)
        session.run("""
            do $$
            declare
              v_key bytea;
            begin
              select c.v into v_key from pg_temp.canary c;
              perform set_config('rekey.canary', encode(v_key, 'hex'), true);
            end
            $$""")
        assert session.found(canary)


PASSPHRASE = "passphrase canary 0815"
OPEN = "plaintext of a table before and after 1234 " * 3


def use_columns(session: Session, quiet: Connection, kek: bytes) -> None:
    """Protect, adopt, write, read and let go: plain values and passphrases never come in a statement."""
    connection = session.connection
    unlock(connection, kek)
    session.run("select rekey.register_kek()", "select rekey.create_keyring('default')")
    fill(connection, "plain", VALUE)
    quiet.execute("create table texts (id int primary key, v text)")
    quiet.execute("create table messages (id int primary key, v bytea)")
    quiet.execute("create table written (id int primary key, v text)")
    quiet.execute("insert into texts select g, %s from generate_series(1, 5) g", [OPEN])
    quiet.execute(
        "insert into messages select g, pgp_sym_encrypt(%s, %s) from generate_series(1, 5) g",
        [OPEN, PASSPHRASE],
    )
    quiet.execute("insert into messages values (6, convert_to('gAAAAA' || repeat('x', 120), 'UTF8'))")
    session.run(
        "select rekey.protect_column('texts', 'v')",
        "select rekey.protect_column('messages', 'v')",
        "select rekey.protect_column('written', 'v', encrypt_on_write => true)",
        "select rekey.adoption_preview('texts', 'v')",
        "select rekey.adopt_column('texts', 'v')",
        "call rekey.run_rotations()",
    )
    assert value(quiet, "select count(*) from texts where v like 'rk1:%%'") == 5
    session.run("select rekey.adopt_column('messages', 'v', '{pgp_sym,fernet}')")
    with connection.transaction():
        session.run("select rekey.rotation_step()")
    with connection.transaction():
        session.run("create temporary table pg_rekey_passphrases (passphrase bytea) on commit drop")
        copy_in(connection, "pg_rekey_passphrases", ["bytea"], (b"wrong",), (PASSPHRASE.encode(),))
        session.run("select rekey.adoption_batch(2)")
        session.run(
            'create temporary table pg_rekey_opened ("row" text, plaintext bytea, problem text)'
            " on commit drop"
        )
        row = value(quiet, "select ctid::text from messages where id = 6")
        copy_in(connection, "pg_rekey_opened", ["text", "bytea", "text"], (row, OPEN.encode(), None))
        session.run("select rekey.adoption_store(2, 'messages')")
    session.run(
        "call rekey.run_rotations()",
        "insert into written select g, v from plain, generate_series(1, 3) g",
        "update written set v = v || '!' where false",
        "update written set v = (select v from plain), id = 10 where id = 3",
        "select rekey.create_decrypted_view('written')",
        "select * from written_decrypted",
        "do $$ declare r record; begin for r in select * from written_decrypted loop end loop; end $$",
        "select rekey.decrypt_many(array_agg(v), array_agg(array['public.written.v', id::text]))"
        " from written",
        "select rekey.rotate_keys()",
        "call rekey.run_rotations()",
        "select * from rekey.find_unprotected()",
        "select rekey.unprotect_column('messages', 'v', decrypt => true)",
    )
    assert value(quiet, "select count(*) from messages where v = convert_to(%s, 'UTF8')", OPEN) == 6
    assert value(quiet, "select count(*) from written where v like 'rk1:%%'") == 3


def copy_in(connection: Connection, table: str, types: list[str], *rows: tuple[object, ...]) -> None:
    """Fill a temporary table by binary COPY, as pg-rekey does."""
    with connection.cursor() as cursor, cursor.copy(f"copy {table} from stdin binary".encode()) as copy:
        copy.set_types(types)
        for row in rows:
            copy.write_row(row)


def test_nothing_of_protected_columns_is_logged(loud: tuple[str, Settings], kek: bytes) -> None:
    dsn, settings = loud
    with connect(dsn) as quiet, connect(dsn) as connection:
        session = Session(connection, settings)
        use_columns(session, quiet, kek)
        secrets = {
            "value": VALUE.encode(),
            "open value": OPEN.encode(),
            "passphrase": PASSPHRASE.encode(),
            "kek": kek,
        }
        secrets |= {f"DEK {number}": key for number, key in enumerate(deks(quiet, kek))}
        leaks = {name: found[0][:2000] for name, key in secrets.items() if (found := session.found(key))}
        assert leaks == {}
        assert len(session.log) > 300


def test_a_second_attempt_to_unlock_is_not_logged(loud: tuple[str, Settings], kek: bytes) -> None:
    """PL/pgSQL evaluates an expression that failed in this transaction with parameters."""
    dsn, settings = loud
    with connect(dsn) as connection:
        session = Session(connection, settings)
        unlock(connection, kek)
        session.run("select rekey.register_kek()", "select rekey.create_keyring('default')")
        with connection.transaction():
            for given in (WRONG, kek, WRONG[:5], kek):
                try:
                    unlock(connection, given, scope="transaction")
                except psycopg.Error as error:
                    session.note(error.diag)
            session.run("select rekey.set_secret('a', 'b')")
        assert session.found(kek) == []
        assert session.found(WRONG) == []


def test_a_second_attempt_with_a_value_is_not_logged(loud: tuple[str, Settings], kek: bytes) -> None:
    """Nor is a value that was in hand when something failed, whatever it was."""
    dsn, settings = loud
    with connect(dsn) as connection:
        session = Session(connection, settings)
        unlock(connection, kek)
        session.run("select rekey.register_kek()", "select rekey.create_keyring('default')")
        session.run("create table written (id int primary key, v text)")
        session.run("select rekey.protect_column('written', 'v', encrypt_on_write => true)")
        session.run("create table kept (id int primary key, v text)")
        session.run("select rekey.protect_column('kept', 'v')")
        half_hex = "\\x" + "c30d0407" * 12 + VALUE
        copy_in(connection, "kept", ["int4", "text"], (1, half_hex), (2, half_hex), (3, half_hex))
        fill(connection, "plain", VALUE)
        fill(connection, "raw", b"\xff" + VALUE.encode())
        session.run("create temporary table sealed as select rekey.encrypt(v) as v from raw")

        statements: tuple[LiteralString, ...] = (
            "select rekey.set_secret('a', v) from plain",
            "select rekey.encrypt(v) from plain",
            "select rekey.encrypt_text(v) from plain",
            "select rekey.encrypt(v) from raw",
        )

        def attempt(code: str | None) -> None:
            for statement in statements:
                with expected(session, code), connection.transaction():
                    session.run(statement)
            with expected(session, code), connection.transaction():
                copy_in(connection, "written", ["int4", "text"], (1, VALUE))

        session.run("select rekey.lock()")
        with connection.transaction():
            attempt("RK001")
            unlock(connection, kek, scope="transaction")
            attempt(None)
            for _ in range(2):
                with expected(session, "22021"), connection.transaction():
                    session.run("select rekey.decrypt_text(v) from sealed")
            session.run("select rekey.adopt_column('kept', 'v')")
            session.run("select rekey.rotation_step()", "select rekey.rotation_step()")
        assert value(connection, "select count(*) from kept where v like 'rk1:%%'") == 3
        assert session.found(VALUE.encode()) == []
        assert len(session.log) > 200


ADDRESS = "https://hooks.example.com/services/canary-address-4711"
MAILBOX = "smtps://rekey:canary-mail-password-4711@mail.example.com?from=a@example.com&to=b@example.com"


def test_nothing_of_endpoints_is_logged(loud: tuple[str, Settings], kek: bytes) -> None:
    dsn, settings = loud
    with connect(dsn) as quiet, connect(dsn) as connection:
        session = Session(connection, settings)
        unlock(connection, kek)
        session.run("select rekey.register_kek()", "select rekey.create_keyring('default')")
        fill(
            connection,
            "given",
            ADDRESS,
            MAILBOX,
            "https://user@canary-address-4711/",
            "ftp://canary-address-4711",
        )
        secrets = [
            row[0]
            for row in connection.execute(
                "select rekey.add_endpoint('e' || length(v), v) from given where v ~ '^(https://hooks|smtps)'"
            )
        ]
        session.fail("22023", "select rekey.add_endpoint('x', v) from given where v ~ 'user'")
        session.fail("22023", "select rekey.add_endpoint('x', v) from given where v ~ '^ftp'")
        session.fail(
            "22023", "select rekey.add_endpoint('x', v, by_pg_net => true) from given where v ~ '^smtps'"
        )
        session.run("select rekey.test_endpoint(name) from rekey.endpoint_status")
        unlock(connection, kek, NEXT)
        session.run("select rekey.rotate_kek()", "select rekey.lock()")
        session.fail("RK001", "select * from rekey._open_endpoints()")
        unlock(connection, NEXT)
        session.run(
            "select rekey.mark_key_compromised('default', 1)",
            "call rekey.tick()",
            "select * from rekey._open_endpoints()",
            "update rekey._endpoints set by_pg_net = true where kind = 'webhook'",
            "select * from rekey._pg_net_requests()",
            "select rekey._note_delivery(id, 'HTTP status 500') from rekey.message_status",
            "select * from rekey.endpoint_status",
            "select rekey.remove_endpoint(name) from rekey.endpoint_status",
        )
        opened = [one for one in secrets if one]
        assert len(opened) == 1
        whsec = opened[0]
        leaks = {
            text: found[:3]
            for text in (
                "canary-address-4711",
                "canary-mail-password-4711",
                whsec,
                whsec.removeprefix("whsec_"),
            )
            if (found := session.found(text.encode()))
        }
        assert leaks == {}
        key = base64.b64decode(whsec.removeprefix("whsec_"))
        assert session.found(key) == []
        # The trap works: a literal is seen.
        session.run("select rekey.add_endpoint('literal', 'https://hooks.example.com/canary-literal')")
        assert session.found(b"canary-literal") != []
        assert value(quiet, "select count(*) from rekey._endpoints") == 1


def test_what_is_searched_for_is_not_logged(loud: tuple[str, Settings], kek: bytes) -> None:
    """Nor what is indexed: on write, under each version, filled, adopted, swept and checked."""
    dsn, settings = loud
    with connect(dsn) as connection:
        session = Session(connection, settings)
        unlock(connection, kek)
        session.run("select rekey.register_kek()", "select rekey.create_keyring('default')")
        session.run("create table written (id int primary key, v text)")
        fill(connection, "plain", VALUE)
        copy_in(connection, "written", ["int4", "text"], (1, VALUE + "adopted"))
        session.run(
            "select rekey.protect_column('written', 'v', encrypt_on_write => true)",
            "select rekey.make_searchable('written', 'v', normalization => 'trim_lower')",
            "create unique index on written (v_bidx)",
            "call rekey.run_rotations()",
            "select rekey.adopt_column('written', 'v')",
            "call rekey.run_rotations()",
            "select rekey.rotate_keys()",
            "insert into written select 2, v from plain",
            "update written set v = v || 'x' where id = 1 and false",
        )
        with expected(session, "23505"):
            session.run("insert into written select 3, v from plain")
        session.run(
            "select id from plain p, written w where v_bidx = any (rekey.search('public.written.v', p.v))",
            "select rekey.search_many('public.written.v', array_agg(p.v)) from plain p",
            "call rekey.run_rotations()",
            "select rekey.verify_ciphertexts()",
            "select rekey._census()",
        )
        with connection.transaction():
            for _ in range(2):
                with expected(session, "23505"), connection.transaction():
                    session.run("insert into written select 3, v from plain")
                session.run("select rekey.search('public.written.v', v) from plain")
        assert value(connection, "select count(*) from written where v_bidx is not null") == 2
        assert session.found(VALUE.encode()) == []
        assert session.found(VALUE.strip().lower().encode()) == []
        assert [key for key in deks(connection, kek) if session.found(key)] == []
        assert len(session.log) > 200


@contextlib.contextmanager
def expected(session: Session, code: str | None) -> Iterator[None]:
    """Expect an error with this code, or none, and keep what it says."""
    found = None
    try:
        yield
    except psycopg.Error as error:
        found = error.sqlstate
        session.note(error.diag)
    assert found == code
