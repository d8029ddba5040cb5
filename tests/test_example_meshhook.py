"""examples/meshhook: a multi-tenant schema whose secrets are adopted and rotated while its API goes on."""

import base64
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from psycopg import errors

from cli_fixtures import Cli
from driving import in_background, refused, rotation
from helpers import Connection, connect, install, value
from hosted import Hosted
from pg_rekey import release

pytest_plugins = ["cli_fixtures"]

EXAMPLE = release.ROOT / "examples" / "meshhook"
USERS = [UUID(int=number) for number in (1, 2)]
KEYS = 40


@pytest.fixture
def product(hosted: Hosted) -> str:
    """The product with plain secrets, and pg_rekey beside it with a KEK in the Vault."""
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(dsn) as connection:
        connection.execute((EXAMPLE / "schema.sql").read_bytes())
        connection.execute(
            "select vault.create_secret(encode(extensions.gen_random_bytes(32), 'hex'), 'pg_rekey_kek')"
        )
        connection.execute("select rekey.set_setting('kek_provider', 'vault')")
        connection.execute("select rekey.register_kek(), rekey.create_keyring('default')")
        for user in USERS:
            with acting(connection, user):
                connection.execute(
                    "insert into projects (id, owner_id, name) values (%s, %s, 'p')", [user, user]
                )
                for number in range(KEYS):
                    connection.execute(
                        "insert into secrets (project_id, key, value_encrypted) values (%s, %s, %s)",
                        [user, f"k{number}", f"old {number}".encode()],
                    )
    return dsn


class acting:
    """Act as a logged-in user for one transaction, as PostgREST does."""

    def __init__(self, connection: Connection, user: UUID) -> None:
        self._connection, self._user = connection, user

    def __enter__(self) -> None:
        claims = json.dumps({"sub": str(self._user), "role": "authenticated"})
        self._connection.execute("begin")
        self._connection.execute(
            "select set_config('role', 'authenticated', true), set_config('request.jwt.claims', %s, true)",
            [claims],
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._connection.execute("rollback" if kind else "commit")


@pytest.fixture
def owner(product: str) -> Iterator[Connection]:
    with connect(product) as connection:
        yield connection


@pytest.fixture
def api(product: str) -> Iterator[Callable[[], Connection]]:
    """Return a function that opens a connection of the API."""
    opened: list[Connection] = []

    def connect_api() -> Connection:
        opened.append(connect(product, user="authenticator"))
        return opened[-1]

    yield connect_api
    for connection in opened:
        connection.close()


def read(connection: Connection, user: UUID) -> dict[str, str]:
    """Return what a user sees through the view."""
    query = "select key, convert_from(value_encrypted, 'UTF8') from secrets_decrypted"
    with acting(connection, user):
        return dict(connection.execute(query).fetchall())


UPSERT = """
    insert into secrets (project_id, key, value_encrypted) values (%s, %s, %s)
    on conflict (project_id, key) do update set value_encrypted = excluded.value_encrypted"""
UPDATE = "update secrets set value_encrypted = %s where project_id = %s and key = %s"


def client(connection: Connection, user: UUID, model: dict[str, str]) -> Callable[[threading.Event], None]:
    """An API that writes both ways and reads back what it wrote; the model holds what was committed last."""
    choice = random.Random(user.int)

    def task(stop: threading.Event) -> None:
        count = 0
        while not stop.wait(0.002):
            count += 1
            key, new = f"k{choice.randrange(KEYS + 5)}", f"new {count}"
            with acting(connection, user):
                if key in model and choice.random() < 0.5:
                    connection.execute(UPDATE, [new.encode(), user, key])
                else:
                    connection.execute(UPSERT, [user, key, new.encode()])
            model[key] = new
            with acting(connection, user):
                found = value(
                    connection,
                    "select convert_from(value_encrypted, 'UTF8') from secrets_decrypted where key = %s",
                    key,
                )
            assert found == new

    return task


def work(connection: Connection) -> None:
    connection.execute("call rekey.run_rotations('30 s')")


def test_secrets_are_adopted_and_rotated_while_the_api_goes_on(
    owner: Connection, api: Callable[[], Connection], product: str
) -> None:
    models = [{f"k{number}": f"old {number}" for number in range(KEYS)} for _ in USERS]
    connections = [api() for _ in USERS]
    owner.execute((EXAMPLE / "protect.sql").read_bytes())
    for user, model, connection in zip(USERS, models, connections, strict=True):
        assert read(connection, user) == model  # nothing is adopted yet
    untouched = "select key, updated_at from secrets where key = 'k0' order by project_id"
    with in_background(*(client(api(), user, model) for user, model in zip(USERS, models, strict=True))):
        work(owner)
        assert rotation(owner, 1, "state", "trigger", "rows_failed") == ("completed", "adoption", 0)
        owner.execute("select rekey.rotate_keys()")
        work(owner)
        assert rotation(owner, 2, "state", "rows_failed") == ("completed", 0)
    before = owner.execute(untouched).fetchall()
    owner.execute("select rekey.rotate_keys()")
    work(owner)
    assert owner.execute(untouched).fetchall() == before
    for user, model, connection in zip(USERS, models, connections, strict=True):
        assert read(connection, user) == model
    rows = sum(map(len, models))
    header = """
        select count(*) from secrets
        where substr(value_encrypted, 1, 3) = '\\x524b01' and get_byte(value_encrypted, 10) = 3"""
    assert value(owner, header) == rows
    verified = "select sum(rows), sum(failed) from rekey.verify_ciphertexts()"
    assert owner.execute(verified).fetchone() == (rows, 0)
    assert value(owner, "select count(*) from audit_log where user_id is null") == 0
    with connect(product) as connection, refused("RK005"):
        connection.execute("select rekey.unprotect_column('public.secrets', 'value_encrypted')")


@pytest.fixture
def protected(owner: Connection) -> Connection:
    owner.execute((EXAMPLE / "protect.sql").read_bytes())
    work(owner)
    return owner


def stolen(owner: Connection) -> bytes:
    """Return the ciphertext of a secret of the first user."""
    found = value(owner, "select value_encrypted from secrets where project_id = %s and key = 'k1'", USERS[0])
    return bytes(found)


def test_another_user_sees_nothing(protected: Connection, api: Callable[[], Connection]) -> None:
    connection = api()
    assert read(connection, uuid4()) == {}
    ciphertext = stolen(protected)
    context = ["public.secrets.value_encrypted", str(USERS[0]), "k1"]
    protected.execute("revoke select on secrets from authenticated")
    with refused("42501"), acting(connection, USERS[1]):
        connection.execute("select rekey.decrypt(%s::bytea, %s::text[])", [ciphertext, context])
    with refused("42501"), acting(connection, USERS[1]):
        connection.execute("select rekey.get_secret('x', %s)", [USERS[0]])


def test_an_envelope_of_another_row_is_refused(protected: Connection, api: Callable[[], Connection]) -> None:
    connection = api()
    for key in ("k2", "brand new"):
        with refused("RK003"), acting(connection, USERS[0]):
            connection.execute(UPSERT, [USERS[0], key, stolen(protected)])
    with refused("RK003"), acting(connection, USERS[1]):
        connection.execute(UPDATE, [stolen(protected), USERS[1], "k1"])
    with acting(connection, USERS[0]):
        connection.execute(UPSERT, [USERS[0], "k1", stolen(protected)])
    assert read(connection, USERS[0])["k1"] == "old 1"


def test_a_row_that_moves_is_sealed_anew(protected: Connection, api: Callable[[], Connection]) -> None:
    connection, other = api(), uuid4()
    with acting(connection, USERS[0]):
        connection.execute(
            "insert into projects (id, owner_id, name) values (%s, %s, 'q')", [other, USERS[0]]
        )
        connection.execute("update secrets set key = 'renamed' where key = 'k1'")
        connection.execute("update secrets set project_id = %s where key = 'k2'", [other])
    found = read(connection, USERS[0])
    assert (found["renamed"], found["k2"]) == ("old 1", "old 2")
    assert value(protected, "select sum(failed) from rekey.verify_ciphertexts()") == 0


def test_the_primary_key_is_no_context_here(owner: Connection) -> None:
    with pytest.raises(errors.InvalidParameterValue) as raised:
        owner.execute(
            "select rekey.protect_column('public.secrets', 'value_encrypted', encrypt_on_write => true)"
        )
    assert "ON CONFLICT" in str(raised.value.diag.message_hint)


def test_triggers_that_do_not_know_of_sweeps_keep_rows_in_quarantine(owner: Connection) -> None:
    """Nothing is changed, and the quarantine says what is wrong."""
    script = (EXAMPLE / "protect.sql").read_text()
    owner.execute(script[script.index("-- Tenants are projects") :].encode())
    work(owner)
    assert rotation(owner, 1, "state", "rows_done", "rows_failed") == ("completed_with_failures", 0, 2 * KEYS)
    assert "user_id" in value(owner, "select reason from rekey.failure_status limit 1")
    assert (
        value(owner, "select count(*) from secrets where value_encrypted = convert_to('old 7', 'UTF8')") == 2
    )
    owner.execute(script[: script.index("-- Tenants are projects")].encode())
    owner.execute("select rekey.retry_rotation(1)")
    work(owner)
    assert rotation(owner, 1, "state", "rows_done") == ("completed", 2 * KEYS)


def v1(key: bytes, text: str) -> bytes:
    """Encrypt a value as the product did itself."""
    iv = os.urandom(12)
    sealed = AESGCM(key).encrypt(iv, text.encode(), None)
    parts = (iv, sealed[-16:], sealed[:-16])
    return ":".join(["v1", *(base64.b64encode(part).decode() for part in parts)]).encode()


def test_what_the_product_encrypted_is_adopted(
    owner: Connection, api: Callable[[], Connection], cli: Cli, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, in place of the example's last step, while the API goes on in plain text."""
    key = os.urandom(32)
    monkeypatch.setenv("PG_REKEY_DSN", product)
    monkeypatch.setenv("PG_REKEY_FROM_V1", key.hex())
    models = [{f"k{number}": f"old {number}" for number in range(KEYS)} for _ in USERS]
    for user, model in zip(USERS, models, strict=True):
        with acting(owner, user):
            for name, text in model.items():
                owner.execute(UPDATE, [v1(key, text), user, name])
    damaged = v1(os.urandom(32), "lost")
    with acting(owner, USERS[0]):
        owner.execute(UPSERT, [USERS[0], "damaged", damaged])
    script = (EXAMPLE / "protect.sql").read_text()
    owner.execute(script[: script.index("-- What is there already")].encode())
    command = ("columns", "adopt", "public.secrets", "value_encrypted", "--from")
    cli(*command, "plaintext", code=5)
    cli(*command, "v1", "--dry-run", code=5)
    quiet = "select count(*), (select max(updated_at) from secrets) from audit_log"
    before = owner.execute(quiet).fetchone()
    cli(*command, "v1", code=4)
    assert owner.execute(quiet).fetchone() == before
    left = "select value_encrypted from secrets where key = 'damaged'"
    assert (value(owner, "select count(*) from rekey.failure_status"), value(owner, left)) == (1, damaged)
    owner.execute("delete from secrets where key = 'damaged'")
    tasks = (client(api(), user, model) for user, model in zip(USERS, models, strict=True))
    with in_background(*tasks):
        cli(*command, "v1")
        cli("rotate", "--wait")
    for user, model in zip(USERS, models, strict=True):
        assert read(api(), user) == model
    cli("verify")
