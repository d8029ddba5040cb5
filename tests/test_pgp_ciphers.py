"""Adopting pgp_sym values whose cipher the server's OpenSSL does not have."""

from collections.abc import Iterator

import psycopg
import pytest

from cli_fixtures import Cli
from helpers import Connection, connect, create_database, initialize, install, value
from pg_rekey import local, release

pytest_plugins = ["cli_fixtures"]

PASSPHRASE = "pass"
# 'the value': by pgcrypto of PostgreSQL 15.14 with OpenSSL 1.1; of 15.18 with OpenSSL 3, without them.
MADE = {
    "bf": (
        "c30d040403022c35487c65cfa0f461d23201728bf874e1ad39c98d1d15e1294f4dd3109d8f807e386d0cff3cf902be20"
        "6a03d5320c06f4605c2cff69f666cc87717990"
    ),
    "cast5": (
        "c30d04030302c801ef5f3fb5371064d23201f0bc9dd7862c2fd651180849d66e89baef60dab89a9fd0a22f1074508a53"
        "a971051f8e2b7be383bc520832bd78cf16c368"
    ),
}
UNENCRYPTED = {
    "bf": (
        "c30d040403028842c0ea6286d7256fd23201056fccee726d45564556cb0f74006b0c8bba7468652076616c7565d31482"
        "0b9feb5589f71dbc2737693ffcb912b37c9418"
    ),
    "cast5": (
        "c30d04030302a1c402538d4e96c96bd23201dd156d111041aa98aa98cb0f74006b0c8bba7468652076616c7565d314a7"
        "b29b5c06af54d89aa3a307f9ea6bf9b3a58260"
    ),
}
AES = (
    "c30d04070302277f09b04fceb80d6fd23a0189b5984524c45ef31f052b081142f196250b774fc1d5c5e92ad07589a4a0"
    "88b733fde05f193dba0e36eecf4edf51b85bd0c022b8dd1b9be4de"
)
LEGACY = """
openssl_conf = it
[it]
providers = list
[list]
default = on
legacy = on
[on]
activate = 1
"""


@pytest.fixture
def modern(ready: Connection) -> None:
    """The server's OpenSSL has no Blowfish."""
    try:
        ready.execute("select public.encrypt('', '0123456789012345', 'bf')")
    except psycopg.errors.ExternalRoutineInvocationException:
        return
    pytest.skip("this server's OpenSSL has the cipher")


def table(connection: Connection) -> None:
    """Make a protected column."""
    connection.execute("create table t (id int primary key, v text)")
    connection.execute("select rekey.protect_column('t', 'v')")


def reasons(ready: Connection) -> set[str]:
    return {reason for (reason,) in ready.execute("select reason from rekey.failure_status")}


@pytest.mark.usefixtures("modern")
@pytest.mark.parametrize("armored", [False, True])
@pytest.mark.parametrize("cipher", list(MADE))
def test_what_openssl_3_does_not_open_is_told(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch, cipher: str, armored: bool
) -> None:
    monkeypatch.setenv("PG_REKEY_FROM_PGP_SYM", PASSPHRASE)
    table(ready)
    form = "public.armor(decode(%s, 'hex'))" if armored else r"'\x' || %s"
    for number, message in enumerate((MADE[cipher], AES, MADE[cipher][:-2] + "00")):
        ready.execute(f"insert into t values (%s, {form})".encode(), [number, message])
    cli_ready("columns", "adopt", "t", "v", "--from", "pgp_sym", code=4)
    assert value(ready, "select count(*) from rekey.failure_status") == 2
    assert reasons(ready) == {
        f"pgp_sym does not open: made with the cipher {cipher},"
        " which OpenSSL 3 has in its legacy provider alone; or damaged, or another passphrase"
    }


@pytest.mark.usefixtures("modern")
@pytest.mark.parametrize("cipher", list(UNENCRYPTED))
def test_what_was_never_encrypted_is_told(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch, cipher: str
) -> None:
    """It is adopted once it was taken out, as docs/adopting.md has it."""
    monkeypatch.setenv("PG_REKEY_FROM_PGP_SYM", "another passphrase")
    table(ready)
    ready.execute(r"insert into t values (1, '\x' || %s)", [UNENCRYPTED[cipher]])
    cli_ready("columns", "adopt", "t", "v", "--from", "pgp_sym", code=4)
    assert reasons(ready) == {
        "pgp_sym holds its value unencrypted: pgcrypto wrote it where OpenSSL did not have"
        f" the cipher {cipher} (CVE-2026-14663)"
    }
    taken = "select public.pgp_sym_decrypt(v::bytea, 'any', 'ignore-cipher-failure=1') from t"
    assert value(ready, taken) == "the value"


def test_a_cipher_that_pgcrypto_never_had(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_FROM_PGP_SYM", PASSPHRASE)
    table(ready)
    ready.execute(r"insert into t values (1, '\x' || %s)", [AES.replace("c30d0407", "c30d040a")])
    cli_ready("columns", "adopt", "t", "v", "--from", "pgp_sym", code=4)
    assert reasons(ready) == {"pgp_sym does not open: pgcrypto does not have cipher 10 of OpenPGP"}


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, 15, 16, 17, 26, 39])
def test_damage_stays_damage(conn: Connection, cut: int) -> None:
    whole = bytes.fromhex(UNENCRYPTED["bf"])
    said = "pgp_sym does not open: damaged, or another passphrase"
    assert value(conn, "select rekey._pgp_problem(%s)", whole[:cut]) == said
    assert value(conn, "select rekey._pgp_problem(null)") == said


@pytest.fixture
def legacy() -> Iterator[Connection]:
    """A session on a server whose OpenSSL has the legacy provider too."""
    with local.Server(settings={"shared_preload_libraries": ""}) as server:
        server.write("openssl.cnf", LEGACY)
        server.environment = {"OPENSSL_CONF": str(server.directory / "openssl.cnf")}
        server.restart()
        dsn = create_database(server.dsn(), "legacy")
        install(dsn, release.assemble("plain"))
        with connect(dsn) as connection:
            try:
                connection.execute("select public.encrypt('', '0123456789012345', 'bf')")
            except psycopg.errors.ExternalRoutineInvocationException:
                pytest.skip("OpenSSL's legacy provider is not installed")
            yield connection


def test_with_the_legacy_provider_they_open(
    legacy: Connection, kek: bytes, cli_ready: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize(legacy, kek)
    table(legacy)
    for number, message in enumerate(MADE.values()):
        legacy.execute(r"insert into t values (%s, '\x' || %s)", [number, message])
    monkeypatch.setenv("PG_REKEY_FROM_PGP_SYM", PASSPHRASE)
    monkeypatch.setenv("PG_REKEY_DSN", f"{legacy.info.dsn} user=postgres")
    cli_ready("columns", "adopt", "t", "v", "--from", "pgp_sym")
    opened = "select array_agg(rekey.decrypt_text(v, array['public.t.v', id::text])) from t"
    assert value(legacy, opened) == ["the value"] * 2
