"""`pg-rekey columns`: every legacy format, adopted, rotated, and equal to what it was."""

import base64
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cli_fixtures import Cli
from driving import rotate, run
from helpers import Connection, belong, value
from pg_rekey.formats.base import variable

pytest_plugins = ["cli_fixtures"]

COUNT = 1000
PASSPHRASE = "canary passphrase of the old times"
FERNET = Fernet(base64.urlsafe_b64encode(hashlib.sha256(b"fernet").digest()))
HEX_KEY = hashlib.sha256(b"aes").hexdigest()
AES = AESGCM(bytes.fromhex(HEX_KEY))
KEYS = {
    "PG_REKEY_FROM_PGP_SYM": f"another\n{PASSPHRASE}\n",
    "PG_REKEY_FROM_FERNET": "\n".join(
        base64.urlsafe_b64encode(hashlib.sha256(name).digest()).decode() for name in (b"new", b"fernet")
    ),
    "PG_REKEY_FROM_V1": HEX_KEY,
    "PG_REKEY_FROM_AES_GCM": base64.b64encode(bytes.fromhex(HEX_KEY)).decode(),
}


def plain(number: int) -> str:
    return f"value {number} äöü"


def v1(number: int) -> str:
    nonce = os.urandom(12)
    sealed = AES.encrypt(nonce, plain(number).encode(), None)
    parts = (nonce, sealed[-16:], sealed[:-16])
    return ":".join(["v1", *(base64.b64encode(part).decode() for part in parts)])


def aes_gcm(number: int) -> bytes:
    nonce = os.urandom(12)
    return nonce + AES.encrypt(nonce, plain(number).encode(), None)


PGP = "pgp_sym_encrypt({}, %(key)s, 's2k-count=1024')"
# type of the column; format; what writes a value: an expression of pgcrypto, or a function
WRITERS: dict[str, tuple[str, str, str | Callable[[int], str | bytes]]] = {
    "plaintext": ("text", "plaintext", plain),
    "plaintext bytea": ("bytea", "plaintext", lambda number: plain(number).encode()),
    "pgp raw": ("bytea", "pgp_sym", PGP.format("%(plain)s")),
    "pgp armored": ("text", "pgp_sym", f"armor({PGP.format('%(plain)s')})"),
    "pgp cast to text": ("text", "pgp_sym", f"{PGP.format('%(plain)s')}::text"),
    "pgp of bytea": (
        "bytea",
        "pgp_sym",
        "pgp_sym_encrypt_bytea(convert_to(%(plain)s, 'UTF8'), %(key)s, 's2k-count=1024')",
    ),
    "fernet": ("text", "fernet", lambda number: FERNET.encrypt(plain(number).encode()).decode()),
    "fernet bytea": ("bytea", "fernet", lambda number: FERNET.encrypt(plain(number).encode())),
    "v1": ("text", "v1", v1),
    "v1 bytea": ("bytea", "v1", lambda number: v1(number).encode()),
    "aes_gcm": ("bytea", "aes_gcm", aes_gcm),
}


@pytest.fixture
def columns(cli_ready: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line with every old key in its environment."""
    for name, text in KEYS.items():
        monkeypatch.setenv(name, text)
    return cli_ready


def write(connection: Connection, kind: str, numbers: range, table: str = "t") -> None:
    """Fill a table with values as their own library writes them."""
    _, _, writer = WRITERS[kind]
    with connection.cursor() as cursor:
        if callable(writer):
            cursor.executemany(
                f"insert into {table} values (%s, %s)".encode(), [(n, writer(n)) for n in numbers]
            )
            return
        cursor.executemany(
            f"insert into {table} values (%(id)s, {writer})".encode(),
            [{"id": n, "plain": plain(n), "key": PASSPHRASE} for n in numbers],
        )


def opened(connection: Connection, table: str = "t") -> dict[int, str]:
    query = f"select id, rekey.decrypt_text(v, array['public.{table}.v', id::text]) from {table} order by id"
    return dict(connection.execute(query.encode()).fetchall())


@pytest.mark.parametrize("kind", list(WRITERS))
def test_each_format_is_adopted_and_rotated(columns: Cli, ready: Connection, kind: str) -> None:
    type_, name, _ = WRITERS[kind]
    ready.execute(f"create table t (id int primary key, v {type_})".encode())
    write(ready, kind, range(COUNT))
    model = {number: plain(number) for number in range(COUNT)}
    columns("columns", "protect", "t", "v")
    if name != "plaintext":
        damage = {
            "text": "overlay(v placing 'AAAA' from 80)",
            "bytea": "set_byte(v, octet_length(v) - 5, get_byte(v, octet_length(v) - 5) # 1)",
        }[type_]
        ready.execute(f"update t set v = {damage} where id = 7".encode())
        damaged = value(ready, "select v from t where id = 7")
        columns("columns", "adopt", "t", "v", "--from", name, "--dry-run", code=5)
        assert f"{COUNT - 1}" in columns.out
        assert "would not open: 7" in columns.out
        assert value(ready, "select count(*) from rekey.rotations") == 0
        columns("columns", "adopt", "t", "v", "--from", name, code=4)
        assert value(ready, "select v from t where id = 7") == damaged
        failures = "select row_key, reason from rekey.failure_status where resolved_at is null"
        [(key, reason)] = ready.execute(failures).fetchall()
        assert key == "7"
        assert name in reason
        ready.execute("delete from t where id = 7")
        del model[7]
    columns("columns", "adopt", "t", "v", "--from", name)
    done = "select sum(rows_done) from rekey.rotation_status where adopts = 'public.t.v'"
    assert value(ready, done) == len(model)
    assert opened(ready) == model
    rotate(ready)
    run(ready)
    assert opened(ready) == model
    assert value(ready, "select sum(rows) - sum(failed) from rekey.verify_ciphertexts()") == len(model)
    assert value(ready, "select (rekey.verify_audit_log()).valid")


def test_a_column_of_three_formats(columns: Cli, ready: Connection) -> None:
    ready.execute("create table t (id int primary key, v text)")
    write(ready, "plaintext", range(0, 50))
    write(ready, "fernet", range(50, 100))
    write(ready, "pgp armored", range(100, 150))
    columns("columns", "protect", "t", "v")
    columns("columns", "adopt", "t", "v", "--from", "plaintext", "--from", "fernet", code=4)
    assert value(ready, "select count(*) from rekey.failure_status where reason like '%%pgp_sym%%'") == 50
    formats = [word for name in ("plaintext", "fernet", "pgp_sym") for word in ("--from", name)]
    shown = columns.json("columns", "adopt", "t", "v", *formats, "--dry-run")
    assert [(one["format"], one["would_open"]) for one in shown] == [("pgp_sym", 50)]
    columns("columns", "adopt", "t", "v", *formats)
    assert opened(ready) == {number: plain(number) for number in range(150)}
    assert value(ready, "select count(*) from rekey.failure_status where resolved_at is null") == 0


def test_wrong_and_missing_keys(columns: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.execute("create table t (id int primary key, v bytea)")
    write(ready, "pgp raw", range(5))
    write(ready, "fernet bytea", range(5, 10))
    columns("columns", "protect", "t", "v")
    for name in ("pgp_sym", "fernet", "v1", "aes_gcm"):
        monkeypatch.delenv(variable(name))
        columns("columns", "adopt", "t", "v", "--from", name, code=3)
        assert variable(name) in columns.err
    monkeypatch.setenv("PG_REKEY_FROM_PGP_SYM", "wrong")
    monkeypatch.setenv("PG_REKEY_FROM_FERNET", Fernet.generate_key().decode())
    shown = columns.json(
        "columns", "adopt", "t", "v", "--from", "pgp_sym", "--from", "fernet", "--dry-run", code=5
    )
    assert [(one["format"], one["rows"], one["would_open"]) for one in shown] == [
        ("fernet", 5, 0),
        ("pgp_sym", 5, 0),
    ]
    monkeypatch.setenv("PG_REKEY_FROM_V1", "short")
    columns("columns", "adopt", "t", "v", "--from", "v1", code=3)
    assert "short" not in columns.err
    monkeypatch.setenv("PG_REKEY_FROM_FERNET", "canary-key")
    columns("columns", "adopt", "t", "v", "--from", "fernet", code=3)
    assert "canary-key" not in columns.err
    monkeypatch.setenv("PG_REKEY_FROM_FERNET_FILE", "/dev/null")
    columns("columns", "adopt", "t", "v", "--from", "fernet", code=3)
    assert "set together" in columns.err
    assert value(ready, "select count(*) from rekey.rotations") == 0


def test_an_interrupted_adoption_goes_on(columns: Cli, ready: Connection, tmp_path: Path) -> None:
    """Nothing is sealed twice: what is sealed opens to the old plain value, and each row is counted once."""
    ready.execute("create table t (id int primary key, v text)")
    write(ready, "fernet", range(4000))
    columns("columns", "protect", "t", "v")
    ready.execute("select rekey.set_setting('max_rows_per_second', '400')")  # it can't end before the signal
    command = [
        str(Path(sys.executable).parent / "pg-rekey"),
        "columns",
        "adopt",
        "t",
        "v",
        "--from",
        "fernet",
    ]
    for number in (signal.SIGINT, signal.SIGKILL):
        before = value(ready, "select coalesce(max(rows_done), 0) from rekey.rotation_status")
        with (
            (tmp_path / "out").open("ab") as out,
            subprocess.Popen(command, stdout=out, stderr=out) as process,
        ):
            deadline = time.monotonic() + 60
            while value(ready, "select coalesce(max(rows_done), 0) from rekey.rotation_status") == before:
                assert time.monotonic() < deadline, "it does nothing"
                time.sleep(0.01)
            process.send_signal(number)
        assert value(ready, "select count(*) from rekey.rotation_status where state = 'running'") == 1
    printed = (tmp_path / "out").read_text()
    assert "interrupted: nothing of rotation 1 is lost" in printed
    assert "The same command goes on with it" in printed
    columns("columns", "adopt", "t", "v", "--from", "plaintext", code=1)
    assert "Repeat that command" in columns.err
    ready.execute("select rekey.set_setting('max_rows_per_second', null)")
    columns("columns", "adopt", "t", "v", "--from", "fernet")
    assert value(ready, "select state || ' ' || rows_done from rekey.rotation_status") == "completed 4000"
    assert opened(ready) == {n: plain(n) for n in range(4000)}
    assert not any(line in printed for line in KEYS["PG_REKEY_FROM_FERNET"].split())


def test_protect_list_view_unprotect(columns: Cli, ready: Connection) -> None:
    ready.execute("create table t (a int, b text, v text, w text, primary key (a, b))")
    assert "no column is protected" in columns("columns", "list")
    assert "is protected" in columns(
        "columns", "protect", "t", "v", "--context", "b, a", "--encrypt-on-write"
    )
    columns("columns", "protect", "t", "none", code=1)
    assert "42703" in columns.err
    columns("columns", "protect", "nowhere", "v", code=1)
    ready.execute("insert into t select g, 'b', 'plain ' || g from generate_series(1, 5) g")
    [shown] = columns.json("columns", "list")
    assert shown["context_columns"] == ["b", "a"]
    assert shown["problem"] is None
    assert "public.t_decrypted" in columns("columns", "view", "t")
    assert value(ready, "select v from t_decrypted where a = 3") == "plain 3"
    assert (
        value(ready, "select rekey.decrypt_text(v, array['public.t.v', b, a::text]) from t where a = 3")
        == "plain 3"
    )
    columns("columns", "unprotect", "t", "v", code=8)
    assert "RK005" in columns.err
    columns("columns", "unprotect", "t", "v", "--decrypt", code=1, stdin="n\n")
    assert value(ready, "select count(*) from t where v like 'rk1:%%'") == 5
    ready.execute("drop view t_decrypted")
    columns("columns", "unprotect", "t", "v", "--decrypt", "--yes")
    assert value(ready, "select v from t where a = 3") == "plain 3"
    assert columns.json("columns", "list") == []


def test_find_counts_what_was_forgotten(columns: Cli, ready: Connection) -> None:
    assert "nothing was forgotten" in columns("columns", "find")
    ready.execute("create table accounts (id int primary key, api_key text, tokenizer text, stored bytea)")
    ready.execute("create table safe (id int primary key, password text)")
    columns("columns", "protect", "safe", "password", "--encrypt-on-write")
    ready.execute("insert into safe values (1, 'hidden-canary')")
    ready.execute("insert into accounts values (1, 'canary', 'a b', rekey.encrypt('canary'::text))")
    columns("columns", "find", code=5)
    assert "canary" not in columns.out
    found = {(one["relation"], one["column_name"]): one for one in columns.json("columns", "find", code=5)}
    assert set(found) == {("public.accounts", "api_key"), ("public.accounts", "stored")}
    assert "holds envelopes" in found["public.accounts", "stored"]["finding"]
    columns("columns", "protect", "accounts", "api_key")
    found = {(one["relation"], one["column_name"]): one for one in columns.json("columns", "find", code=5)}
    assert "columns adopt" in found["public.accounts", "api_key"]["advice"]


def test_find_looks_into_other_values_too(columns: Cli, ready: Connection) -> None:
    """Numbers have no room for an envelope; what begins alike is none; a materialized view is a copy."""
    ready.execute("""
        create domain sealed as text;
        create type pair as (a int, b text);
        create table t (id bigint, n numeric[], plain text, alike bytea, whole text, around varchar,
          document json, tree jsonb, many text[], raw bytea[], named sealed, both_of pair, hex text);
        insert into t select 1, '{1}', 'rk1:plain', '\\x524b01', e, 'see ' || e, json_build_object('a', e),
          jsonb_build_object('a', array[e]), array[e], array[r], e, row (1, e)::pair, r::text
        from (select rekey.encrypt_text('v') as e, rekey.encrypt('v'::text) as r) s;
        create materialized view copied as select whole from t;
        create table migrations as select p.prosrc as v, array[p.prosrc] as w from pg_proc p
          where p.pronamespace = 'rekey'::regnamespace;
        create materialized view empty as select whole from t with no data""")
    counted = ready.execute(
        "select relation::text, column_name, envelopes, embedded from rekey.find_envelopes()"
    ).fetchall()
    inner = ("around", "document", "tree", "many", "raw", "named", "both_of", "hex")
    assert {(table, name): counts for table, name, *counts in counted} == {
        ("copied", "whole"): [1, 0],
        ("migrations", "v"): [0, 0],
        ("migrations", "w"): [0, 0],
        ("t", "plain"): [0, 0],
        ("t", "alike"): [0, 0],
        ("t", "whole"): [1, 0],
        **{("t", name): [0, 1] for name in inner},
    }
    found = [(one["column_name"], one["finding"]) for one in columns.json("columns", "find", code=5)]
    assert found == [
        ("whole", "holds envelopes, and is not protected"),
        *((name, "holds envelopes within other values") for name in inner),
    ]


def test_find_says_what_it_cannot_read(ready: Connection, db: str) -> None:
    ready.execute("create table closed (password text)")
    ready.execute("create table policed (password text); alter table policed enable row level security")
    ready.execute("grant select on policed to rekey_auditor")
    ready.execute("set role rekey_auditor")
    rows = ready.execute("select relation::text, finding from rekey.find_unprotected() order by 1").fetchall()
    assert rows == [("closed", "cannot be read"), ("policed", "cannot be read")]
    ready.execute("reset role")


def test_the_vault_is_copied(columns: Cli, ready: Connection, kek: bytes) -> None:
    columns("secrets", "import", "--vault", code=1)
    columns("secrets", "import", code=2)
    ready.execute("create schema vault")
    ready.execute(
        "create table vault.decrypted_secrets"
        " (id uuid default gen_random_uuid(), name text, description text, decrypted_secret text)"
    )
    belong(ready, "supabase_vault", "vault")
    ready.execute(
        "insert into vault.decrypted_secrets (name, description, decrypted_secret) values"
        " ('stripe', 'of Stripe', 'sk'), ('pg_rekey_kek', '', %s), (null, '', 'nameless')",
        [kek.hex()],
    )
    assert "2 secrets copied" in columns("secrets", "import", "--vault")
    assert "0 secrets copied" in columns("secrets", "import", "--vault")
    assert columns("secrets", "get", "stripe") == "sk"
    assert value(ready, "select description from rekey.secrets where name = 'stripe'") == "of Stripe"


def test_search(cli_ready: Cli, ready: Connection) -> None:
    ready.execute("create table users (id int primary key, email text)")
    cli_ready("columns", "protect", "public.users", "email", "--encrypt-on-write")
    ready.execute("insert into users select g, 'User' || g || '@example.org' from generate_series(1, 500) g")
    command = ("columns", "search", "public.users", "email")
    [rotation] = cli_ready.json(*command, "--normalization", "lower", "--unique")
    assert (rotation["trigger"], rotation["state"]) == ("search", "completed")
    definition = "select indexdef from pg_indexes where indexname like 'users_email_bidx%%'"
    assert "CREATE UNIQUE INDEX" in value(ready, definition)
    search = "rekey.search('public.users.email', 'user7@EXAMPLE.org')"
    found = f"select id from users where email_bidx = any ({search})"
    assert value(ready, found) == 7
    # Repeated, it is filled anew, as it was made, and indexed once.
    cli_ready(*command)
    assert value(ready, definition.replace("indexdef", "count(*)")) == 1
    [shown] = cli_ready.json("columns", "list")
    assert (shown["index_column"], shown["normalization"]) == ("email_bidx", "lower")
    assert value(ready, found) == 7


def test_search_of_values_that_are_there_twice(cli_ready: Cli, ready: Connection) -> None:
    ready.execute("create table users (id int primary key, email text)")
    cli_ready("columns", "protect", "public.users", "email", "--encrypt-on-write")
    ready.execute("insert into users values (1, 'a'), (2, 'A')")
    cli_ready("columns", "search", "public.users", "email", "--normalization", "lower", "--unique", code=1)
    assert "two rows of public.users.email have equal values" in cli_ready.err
    assert value(ready, "select count(*) from pg_indexes where tablename = 'users'") == 1
    ready.execute("update users set email = 'b' where id = 2")
    cli_ready("columns", "search", "public.users", "email", "--unique")
    assert value(ready, "select count(*) from pg_indexes where tablename = 'users'") == 2
