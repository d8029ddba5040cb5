"""What does not open says nothing more than that, wherever it stands; and servers that lack a cipher."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest

from cli_fixtures import Cli
from driving import NIL, check, fill, rotate, rotation, run, sealed_ivs, step, step_until
from helpers import Connection, connect, create_database, drop_database, install, value
from pg_rekey import local, release

pytest_plugins = ["cli_fixtures"]

REFUSED = (
    "RK003 cannot open ciphertext"
    " It was damaged, or sealed for another context: tenant, row, column, or parts in another order."
)
TENANT = "00000000-0000-0000-0000-00000000000b"

# Stores an envelope, or its text form, reads it, and takes that back; what came of it.
TRIED = """
    create function pg_temp.tried(store text, read text, given {}) returns text
    language plpgsql as $$
    declare
      v_value text;
      v_hint text;
    begin
      execute store using given;
      execute read into v_value using given;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then
        return 'opened ' || v_value;
      when others then
        get stacked diagnostics v_hint = pg_exception_hint;
        return sqlstate || ' ' || sqlerrm || ' ' || v_hint;
    end
    $$"""

# Where an envelope stands: how it gets there, how it is read, and where its envelope is found.
Place = tuple[str, str, str]


def secret(name: str, tenant: str = NIL) -> Place:
    where = f"from rekey.secrets where name = '{name}' and tenant_id = '{tenant}'"
    return (
        f"update rekey.secrets set ciphertext = $1 where name = '{name}' and tenant_id = '{tenant}'",
        f"select rekey.get_secret('{name}', '{tenant}')",
        f"select ciphertext {where}",
    )


def column(table: str, name: str, row: int) -> Place:
    return (
        f"update {table} set {name} = $1 where id = {row}",
        f"select {name} from {table}_decrypted where id = {row}",
        f"select {name} from {table} where id = {row}",
    )


def kept(*context: str) -> Place:
    parts = ", ".join(f"'{part}'" for part in context)
    return (
        "select",
        f"select rekey.decrypt($1, array[{parts}]::text[])",
        f"select rekey.encrypt('x'::text, context => array[{parts}]::text[])",
    )


@pytest.fixture
def places(ready: Connection) -> dict[str, Place]:
    """Envelopes of the empty string in secrets, in protected columns, and kept by an application."""
    for kind in ("bytea", "text"):
        ready.execute(TRIED.format(kind).encode())
    # The table would refuse some of them before they are read.
    ready.execute("alter table rekey.secrets drop constraint secrets_ciphertext_check")
    ready.execute("select rekey.create_keyring('second')")
    ready.execute("select rekey.set_secret(n, '') from unnest('{a,b}'::text[]) n")
    ready.execute("select rekey.set_secret('a', '', tenant_id => %s)", (TENANT,))
    ready.execute("select rekey.set_secret('second', '', keyring => 'second')")
    for table in ("t", "u"):
        ready.execute(f"create table {table} (id int primary key, v bytea, w bytea)".encode())
        for name in ("v", "w"):
            ready.execute("select rekey.protect_column(%s, %s)", (table, name))
        ready.execute(
            f"insert into {table} select g,"
            f" rekey.encrypt(''::text, context => array['public.{table}.v', g::text]),"
            f" rekey.encrypt(''::text, context => array['public.{table}.w', g::text])"
            " from generate_series(1, 2) g".encode()
        )
        ready.execute("select rekey.create_decrypted_view(%s)", (table,))
    return {
        "secret": secret("a"),
        "secret in another row": secret("b"),
        "secret of another tenant": secret("a", TENANT),
        "secret of another keyring": secret("second"),
        "column": column("t", "v", 1),
        "column in another row": column("t", "v", 2),
        "another column": column("t", "w", 1),
        "column of another table": column("u", "v", 1),
        "kept": kept(),
        "kept with a context": kept("a", "b"),
    }


def tried(connection: Connection, place: Place, given: bytes | str) -> str:
    """Return what came of storing this in a place and reading it."""
    return str(value(connection, "select pg_temp.tried(%s, %s, %s)", *place[:2], given))


def envelope(connection: Connection, place: Place) -> bytes:
    [(found,)] = connection.execute(place[2].encode()).fetchall()
    return bytes(found)


# What comes before is no envelope: the view shows it, and the table's generated column cannot be computed.
SMALLEST = {"secret": 11, "column": 3, "kept": 0}


@pytest.mark.parametrize("name", SMALLEST)
def test_every_bit_and_every_length(ready: Connection, places: dict[str, Place], name: str) -> None:
    place, smallest = places[name], SMALLEST[name]
    whole = envelope(ready, place)
    assert tried(ready, place, whole) in ("opened ", "opened x", r"opened \x", r"opened \x78")
    outcomes = ready.execute(
        """
        with damaged as (
          select set_bit(%(e)s::bytea, n, 1 - get_bit(%(e)s, n)) as e
          from generate_series(case %(smallest)s when 3 then 24 else 0 end, octet_length(%(e)s) * 8 - 1) n
          union all
          select substr(%(e)s, 1, n) from generate_series(%(smallest)s, octet_length(%(e)s) - 1) n
          union all
          select %(e)s || decode(repeat('00', n), 'hex') from generate_series(1, 33) n
          union all
          select substr(%(e)s, 1, 27 + 16 * n) || substr(%(e)s, 28) from generate_series(0, 3) n where n <> 0
        )
        select distinct pg_temp.tried(%(store)s, %(read)s, e) from damaged
        """,
        {"e": whole, "smallest": smallest, "store": place[0], "read": place[1]},
    ).fetchall()
    assert outcomes == [(REFUSED,)]


@pytest.mark.parametrize("name", ["column", "kept"])
def test_every_character_of_the_text_form(ready: Connection, places: dict[str, Place], name: str) -> None:
    place = places[name]
    if name == "column":
        ready.execute("create table s (id int primary key, v text)")
        ready.execute("select rekey.protect_column('s', 'v')")
        ready.execute(
            "insert into s select 1, rekey.encrypt_text(''::text, context => array['public.s.v', '1'])"
        )
        ready.execute("select rekey.create_decrypted_view('s')")
        place = column("s", "v", 1)
        text = str(value(ready, "select v from s"))
    else:
        text = str(value(ready, "select rekey.encrypt_text(''::text)"))
    assert tried(ready, place, text) in ("opened ", r"opened \x")
    smallest = 4 if name == "column" else 0  # without rk1: it is a plain value of the column
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    damaged = [text[:n] for n in range(smallest, len(text))]
    damaged += [text + "A" * n for n in range(1, 9)]
    for n in range(smallest, len(text)):
        following = alphabet[(alphabet.find(text[n]) + 1) % 64]
        damaged += [
            text[:n] + other + text[n + 1 :] for other in (following, "\u00e9", "=", "\n") if other != text[n]
        ]
    outcomes = ready.execute(
        "select distinct pg_temp.tried(%s, %s, d) from unnest(%s::text[]) d", (*place[:2], damaged)
    ).fetchall()
    assert outcomes == [(REFUSED,)]


def test_nothing_opens_in_another_place(ready: Connection, places: dict[str, Place]) -> None:
    """Swapped rows, tenants, columns, tables, keyrings, versions; whole, or with the header of the place."""
    old = {name: envelope(ready, place) for name, place in places.items()}
    for keyring in ("default", "second"):
        rotate(ready, keyring)
    run(ready)
    new = {name: envelope(ready, place) for name, place in places.items()}
    assert all(new[name][7:11] == b"\0\0\0\x02" for name in new)
    foreign = {
        **{f"old {name}": one for name, one in old.items()},
        **{f"new {name}": one for name, one in new.items()},
    }
    opened = []
    for (source, one), (name, place) in itertools.product(foreign.items(), places.items()):
        if source[4:] != name and (outcome := tried(ready, place, one)) != REFUSED:
            opened.append((source, name, outcome))
        for header in (old[name][:11], new[name][:11]):
            spliced = header + one[11:]
            if spliced != one and (outcome := tried(ready, place, spliced)) != REFUSED:
                opened.append((source, name, outcome))
    assert opened == []


def test_a_key_that_may_not_be_used_is_told_apart(ready: Connection, places: dict[str, Place]) -> None:
    """Not by who holds the ciphertext, but by what was done to the key: RK006 says nothing of the value."""
    old = envelope(ready, places["kept"])
    rotate(ready)
    run(ready)
    ready.execute("select rekey.disable_key('default', 1)")
    whole, damaged = (tried(ready, places["kept"], one) for one in (old, old[:-1] + bytes([old[-1] ^ 1])))
    assert whole == damaged
    assert whole.startswith("RK006 cannot open ciphertext: key version 1 is disabled")


def test_no_iv_comes_twice(ready: Connection) -> None:
    """Over sweeps of real rows; `make prove` has a million of them."""
    assert sealed_ivs(ready, 20_000, 5) == (102_000, 102_000)


def test_tags_are_compared_as_hashes_under_the_key(conn: Connection) -> None:
    """Else the time of a comparison that ends at the first difference tells a caller where that is."""
    conn.execute("create temporary table t (key bytea, iv bytea, sealed bytea, aad bytea)")
    plan = conn.execute(
        "explain (verbose) select rekey._aead_decrypt(key, iv, sealed, aad) from t"
    ).fetchall()
    text = " ".join(line for (line,) in plan)
    given, computed = text.split("sha256(")[1:3]
    assert given == "(substr(key, 1, 32) || substr(sealed, (octet_length(sealed) - 31)))) = "
    assert computed.startswith("(substr(key, 1, 32) || substr(hmac(")
    assert text.count("hmac(") == 1


# Asks for a property that only the FIPS provider's algorithms have: nothing is found but random numbers.
NOTHING_APPROVED = """
openssl_conf = init
[init]
alg_section = algorithms
random = random
[algorithms]
default_properties = fips=yes
[random]
properties = -fips
seed_properties = -fips
"""
FIPS = """
openssl_conf = init
.include {}
[init]
providers = providers
alg_section = algorithms
[providers]
fips = fips_sect
base = base
[base]
activate = 1
[algorithms]
default_properties = fips=yes
"""
# A cipher that only OpenSSL's legacy provider has stands in for AES: to pgcrypto, AES cannot be had.
NO_AES = "const void *EVP_des_cbc(void); const void *EVP_aes_256_cbc(void) { return EVP_des_cbc(); }"


def without_digests(server: local.Server) -> dict[str, str]:
    """No digest and no cipher is approved."""
    return {"OPENSSL_CONF": write(server, "openssl.cnf", NOTHING_APPROVED)}


def without_aes(server: local.Server) -> dict[str, str]:
    """Tags can be computed, but nothing can be encrypted or decrypted."""
    if not shutil.which("cc"):
        pytest.skip("cc is not installed")
    library = server.directory / "no_aes.so"
    compiler = ["cc", "-shared", "-fPIC", "-o", str(library), write(server, "no_aes.c", NO_AES)]
    subprocess.run(compiler, check=True, capture_output=True)
    return {"LD_PRELOAD": str(library)}


def with_fips_provider(server: local.Server) -> dict[str, str]:
    """The server has OpenSSL's FIPS provider, and nothing else."""
    told = subprocess.run(["openssl", "version", "-m"], capture_output=True, text=True, check=True).stdout
    module = Path(os.environ.get("OPENSSL_MODULES") or told.split('"')[1]) / "fips.so"
    if not module.exists():
        pytest.skip("OpenSSL's FIPS provider is not installed")
    installed = server.directory / "fipsmodule.cnf"
    installing = ["openssl", "fipsinstall", "-module", str(module), "-out", str(installed)]
    subprocess.run(installing, check=True, capture_output=True)
    installed.chmod(0o644)
    return {
        "OPENSSL_CONF": write(server, "fips.cnf", FIPS.format(installed)),
        "OPENSSL_MODULES": str(module.parent),
    }


def write(server: local.Server, name: str, text: str) -> str:
    path = server.directory / name
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def poor() -> Iterator[local.Server]:
    """A server that can be restarted without some of its ciphers."""
    with local.Server(settings={"shared_preload_libraries": ""}) as server:
        yield server


@pytest.fixture
def poor_db(poor: local.Server, kek: bytes) -> Iterator[str]:
    """A database there, ready, which takes its KEK from a file."""
    poor.write("data/pg_rekey.kek", kek.hex())
    poor.write("data/pg_rekey.kek_new", os.urandom(32).hex())
    create_database(poor.dsn(), "poor")
    install(poor.dsn("poor"), release.assemble("plain"))
    with connect(poor.dsn("poor")) as connection:
        connection.execute("select rekey.set_setting('kek_provider', 'file')")
        connection.execute("select rekey.register_kek()")
        connection.execute("select rekey.create_keyring('default')")
    yield poor.dsn("poor")
    poor.environment = {}
    poor.restart()
    drop_database(poor.dsn(), "poor")


# Everything that seals or opens; what it must not be is RK003, which says that a value is damaged.
CALLS: list[LiteralString] = [
    "select rekey.get_secret('s1')",
    "select * from rekey.read_secrets()",
    "select rekey.decrypt(%s::bytea)",
    "select rekey.set_secret('new', 'value')",
    "select rekey.encrypt('value'::text)",
    "select rekey.create_keyring('new')",
    "select * from rekey.verify_ciphertexts()",
    "select rekey.rotate_kek()",
    "select * from rekey.rotate_keys(supersede => true)",
]
STATE: LiteralString = """
    select (select jsonb_agg(to_jsonb(s) order by s.id) from rekey.secrets s),
      (select jsonb_agg(to_jsonb(k) order by k.id) from rekey.encryption_keys k),
      (select jsonb_agg(to_jsonb(k) order by k.id) from rekey.keks k),
      (select jsonb_agg(to_jsonb(k) order by k.id) from rekey.keyrings k),
      (select jsonb_agg(to_jsonb(f)) from rekey.rotation_failures f)
"""


def outcome_of_step(connection: Connection) -> str:
    """Return the event of a step, or the code of its error."""
    try:
        return step(connection)[0]
    except psycopg.Error as error:
        return str(error.sqlstate)


# Without digests the step ends as it began: no entry of the audit log, which is hashed, can say why.
@pytest.mark.parametrize(
    ("mode", "outcomes"), [(without_digests, {"22023"}), (without_aes, {"error", "waiting"})]
)
def test_a_cipher_that_is_gone_is_no_damage(
    poor: local.Server, poor_db: str, mode: Callable[[local.Server], dict[str, str]], outcomes: set[str]
) -> None:
    """The server comes back without it while a rotation is half-way: nothing changes or is given up."""
    with connect(poor_db) as connection:
        model = fill(connection, 6000)
        kept = value(connection, "select rekey.encrypt('kept'::text)")
        number = rotate(connection)
        step_until(connection, "batch")
        assert 0 < rotation(connection, number, "rows_done") < 6000
    poor.environment = mode(poor)
    poor.restart()
    with connect(poor_db) as connection:
        before = connection.execute(STATE).fetchall()
        for call in CALLS:
            with pytest.raises(psycopg.Error, match=r"[Cc]ipher cannot be initialized|could not") as caught:
                connection.execute(call, (kept,) if "%" in call else None)
            assert caught.value.sqlstate in ("22023", "39000", "XX000"), call
        assert {outcome_of_step(connection) for _ in range(2)} == outcomes
        assert connection.execute(STATE).fetchall() == before
        assert rotation(connection, number, "state", "rows_failed") == ("running", 0)
    poor.environment = {}
    poor.restart()
    with connect(poor_db) as connection:
        connection.execute("update rekey.rotations set next_attempt_at = null")
        run(connection)
        assert rotation(connection, number, "state", "rows_failed") == ("completed", 0)
        assert value(connection, "select convert_from(rekey.decrypt(%s::bytea), 'UTF8')", kept) == "kept"
        check(connection, model)


@pytest.mark.parametrize("mode", [without_digests, without_aes])
def test_init_changes_nothing_where_a_cipher_is_missing(
    poor: local.Server,
    mode: Callable[[local.Server], dict[str, str]],
    cli: Cli,
    kek: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poor.environment = mode(poor)
    poor.restart()
    dsn = create_database(poor.dsn(), "bare")
    try:
        monkeypatch.setenv("PG_REKEY_DSN", dsn)
        monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
        cli("init", code=1)
        assert "ipher cannot be initialized" in cli.err
        with connect(dsn) as connection:
            assert value(connection, "select to_regnamespace('rekey') is null")
            assert value(connection, "select count(*) from pg_extension where extname = 'pgcrypto'") == 0
    finally:
        drop_database(poor.dsn(), "bare")
        poor.environment = {}
        poor.restart()


def test_a_server_in_fips_mode(poor: local.Server, poor_db: str) -> None:
    """AES-CBC, HMAC-SHA-512, SHA-256 and the random numbers are all approved: everything works."""
    poor.environment = with_fips_provider(poor)
    poor.restart()
    with connect(poor_db) as connection:
        with pytest.raises(psycopg.Error):
            connection.execute("select md5('FIPS')")
        model = fill(connection, 500)
        connection.execute("select rekey.set_secret('new', 'value')")
        number = rotate(connection)
        run(connection)
        assert rotation(connection, number, "state") == "completed"
        check(connection, model | {"new": "value"})
