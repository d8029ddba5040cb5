"""The Supabase Vault: the extension itself where it is installed, and a stand-in for it."""

import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cli_fixtures import Cli
from driving import refused
from helpers import Connection, connect, create_database, initialize, install, unlock, value
from hosted import Hosted
from pg_rekey import local, release
from pg_rekey.errors import FINDINGS

pytest_plugins = ["cli_fixtures"]

SCRIPT = "#!/bin/sh\necho {}\n"
BREAK = {
    "of another key": "encode(sha256('other') || sha256('other'), 'base64')",
    "cut": "left(secret, 8)",
    "not base64": "'?' || secret",
    "plain, as a restored dead row": "'canary-plain'",
}


@pytest.fixture(scope="module")
def vault() -> Iterator[local.Server]:
    """A server with supabase_vault, whose root key a script prints."""
    if not local.ensure().has("supabase_vault"):
        pytest.skip("supabase_vault is not installed")
    with local.Server(settings={"shared_preload_libraries": ""}) as server:
        script = server.directory / "getkey"
        server.write("getkey", SCRIPT.format(secrets.token_hex(32)))
        server._run("/usr/bin/env", "chmod", "700", script)
        settings = {"shared_preload_libraries": "supabase_vault", "vault.getkey_script": str(script)}
        server.write("data/postgresql.conf", local.settings_text(settings), append=True)
        server.restart()
        yield server


@pytest.fixture(params=["supabase_vault", "stand-in"])
def database(request: pytest.FixtureRequest, kek: bytes) -> str:
    """A database with a Vault and pg_rekey, unlocked by nobody yet; the DSN of who may read the Vault."""
    if request.param == "stand-in":
        hosted: Hosted = request.getfixturevalue("hosted")
        dsn = hosted.make_database()
    else:
        server: local.Server = request.getfixturevalue("vault")
        dsn = create_database(server.dsn(), f"vault_{secrets.token_hex(4)}")
        with connect(dsn) as connection:
            connection.execute("create extension supabase_vault cascade")
    install(dsn, release.assemble("plain"))
    with connect(dsn) as connection:
        initialize(connection, kek)
        connection.execute(
            "select vault.create_secret('value ' || n, 'name ' || n) from generate_series(1, 3) n"
        )
    return dsn


@pytest.fixture
def connection(database: str, kek: bytes) -> Iterator[Connection]:
    """A session there, unlocked."""
    with connect(database) as connection:
        unlock(connection, kek)
        yield connection


def damage(connection: Connection, expression: str) -> None:
    """Let the second secret be one that does not open."""
    # On a hosted project nobody may update the table but its owner.
    owner = value(
        connection, "select relowner::regrole::text from pg_class where oid = 'vault.secrets'::regclass"
    )
    with connect(make_conninfo(connection.info.dsn, user=owner)) as admin:
        admin.execute(f"update vault.secrets set secret = {expression} where name = 'name 2'".encode())


@pytest.mark.parametrize("kind", list(BREAK))
def test_one_that_does_not_open_stops_no_other(connection: Connection, kind: str) -> None:
    damage(connection, BREAK[kind])
    said: list[tuple[str | None, ...]] = []
    connection.add_notice_handler(lambda it: said.append((it.sqlstate, it.message_primary, it.message_hint)))
    assert value(connection, "select rekey.adopt_vault()") == 2
    [(sqlstate, message, hint)] = said
    assert (sqlstate, message) == ("RK003", "secret 'name 2' of the Vault does not open")
    assert hint is not None
    assert "DELETE FROM vault.secrets WHERE id = " in hint
    assert value(connection, "select array_agg(name order by name) from rekey.secrets") == [
        "name 1",
        "name 3",
    ]
    assert value(connection, "select rekey.get_secret('name 3')") == "value 3"
    assert value(connection, "select rekey.adopt_vault()") == 0


def test_what_the_hint_says_mends_it(connection: Connection) -> None:
    damage(connection, BREAK["of another key"])
    with pytest.raises(psycopg.Error), connection.transaction():
        connection.execute("select vault.update_secret(id, 'new') from vault.secrets where name = 'name 2'")
    connection.execute("delete from vault.secrets where name = 'name 2'")
    connection.execute("select vault.create_secret('new', 'name 2')")
    assert value(connection, "select rekey.adopt_vault()") == 3
    assert value(connection, "select rekey.get_secret('name 2')") == "new"


def test_the_kek_is_found_beside_one_that_does_not_open(
    connection: Connection, database: str, kek: bytes
) -> None:
    connection.execute(f"select vault.create_secret('{kek.hex()}', 'pg_rekey_kek')".encode())
    damage(connection, BREAK["of another key"])
    connection.execute("select rekey.set_setting('kek_provider', 'vault')")
    with connect(database) as locked:
        locked.execute("select rekey.set_secret('a', 'b')")
        assert value(locked, "select rekey.get_secret('a')") == "b"
        assert value(locked, "select rekey.adopt_vault()") == 2


def test_an_error_that_is_not_the_vaults_stops_it(connection: Connection) -> None:
    connection.execute("select rekey.lock()")
    with refused("RK001"):
        connection.execute("select rekey.adopt_vault()")


def test_the_command_says_how_many_are_left(
    cli: Cli, connection: Connection, database: str, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_DSN", database)
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    damage(connection, BREAK["cut"])
    assert cli.json("secrets", "import", "--vault", code=FINDINGS) == {"copied": 2, "closed": 1}
    assert "secret 'name 2' of the Vault does not open" in cli.err
    connection.execute("delete from vault.secrets where name = 'name 2'")
    cli("secrets", "import", "--vault")
    assert "0 secrets copied from the Vault\n" in cli.out


def test_a_plain_value_is_left_in_a_dead_row(vault: local.Server) -> None:
    """As docs/supabase.md says; until VACUUM takes it away."""
    dsn = create_database(vault.dsn(), "dead")
    with connect(dsn) as connection:
        connection.execute("create extension supabase_vault cascade")
        connection.execute("create extension pageinspect")
        connection.execute("select vault.create_secret('canary in the heap', 'it')")
        pages = "generate_series(0, pg_relation_size('vault.secrets') / 8192 - 1) b"
        items = "heap_page_items(get_raw_page('vault.secrets', b::int)) i"
        found = f"select count(*) from {pages}, {items} where position('canary' in i.t_data) > 0"
        assert value(connection, found.encode()) == 1  # type: ignore[arg-type]
        connection.execute("vacuum vault.secrets")
        assert value(connection, found.encode()) == 0  # type: ignore[arg-type]
