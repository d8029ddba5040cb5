"""The cipher and the envelope, against RFC 7518, another implementation, and bad input."""

import base64
import os
import re
from datetime import UTC
from typing import Any, LiteralString

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row

import reference
from driving import fill, rotate, run
from helpers import Connection, value

LENGTHS = [0, 1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 1024, 1025]
KEY, IV = bytes(range(64)), bytes.fromhex("1af38c2dc2b96ffdd86694092341bc04")
ENCRYPT: LiteralString = "select rekey._aead_encrypt(%s, %s, %s, %s)"
DECRYPT: LiteralString = "select rekey._aead_decrypt(%s, %s, %s, %s)"
AUTHENTIC: LiteralString = "select rekey._is_authentic(%s, %s, %s, %s)"
REFUSED = "RK003 cannot open ciphertext"


@pytest.fixture
def attempt(ready: Connection) -> Connection:
    """A connection with pg_temp.attempt(envelope, context): what decrypting comes to."""
    for kind in ("bytea", "text"):
        ready.execute(f"""
            create function pg_temp.attempt(envelope {kind}, context text[] = '{{}}') returns text
            language plpgsql as $$
            begin
              return 'opened ' || encode(rekey.decrypt(envelope, context), 'escape');
            exception when others then
              return sqlstate || ' ' || sqlerrm;
            end
            $$""")
    return ready


def test_rfc_7518_b3(conn: Connection) -> None:
    plaintext = (
        b"A cipher system must not be required to be secret, and it must be able to fall into the hands of "
        b"the enemy without inconvenience"
    )
    sealed = bytes.fromhex(
        "4affaaadb78c31c5da4b1b590d10ffbd3dd8d5d302423526912da037ecbcc7bd822c301dd67c373bccb584ad3e9279c2"
        "e6d12a1374b77f077553df829410446b36ebd97066296ae6427ea75c2e0846a11a09ccf5370dc80bfecbad28c73f09b3"
        "a3b75e662a2594410ae496b2e2e6609e31e6e02cc837f053d21f37ff4f51950bbe2638d09dd7a4930930806d0703b1f6"
        "4dd3b4c088a7f45c216839645b2012bf2e6269a8c56a816dbc1b267761955bc5"
    )
    aad = b"The second principle of Auguste Kerckhoffs"
    assert value(conn, ENCRYPT, KEY, IV, plaintext, aad) == sealed
    assert value(conn, DECRYPT, KEY, IV, sealed, aad) == plaintext
    assert reference.encrypt(KEY, IV, plaintext, aad) == sealed


@settings(max_examples=60)
@given(st.data())
def test_same_as_the_reference(conn: Connection, data: st.DataObject) -> None:
    key, iv = (data.draw(st.binary(min_size=size, max_size=size)) for size in (64, 16))
    length = data.draw(st.sampled_from(LENGTHS))
    plaintext = data.draw(st.binary(min_size=length, max_size=length))
    aad = data.draw(st.binary(max_size=100))
    sealed = reference.encrypt(key, iv, plaintext, aad)
    assert value(conn, ENCRYPT, key, iv, plaintext, aad) == sealed
    assert value(conn, DECRYPT, key, iv, sealed, aad) == plaintext
    assert value(conn, DECRYPT, key, iv, sealed, aad + b"\0") is None
    assert value(conn, AUTHENTIC, key, iv, sealed, aad) is True
    assert value(conn, AUTHENTIC, key, iv, sealed, aad + b"\0") is False
    damaged = data.draw(st.integers(0, len(sealed) - 1))
    sealed = sealed[:damaged] + bytes([sealed[damaged] ^ 1]) + sealed[damaged + 1 :]
    assert value(conn, DECRYPT, key, iv, sealed, aad) is None
    assert value(conn, AUTHENTIC, key, iv, sealed, aad) is False


CALLS = (ENCRYPT, DECRYPT, AUTHENTIC)
BAD_LENGTHS: list[tuple[LiteralString, int, int | None]] = [
    *((statement, 0, bad) for statement in CALLS for bad in (0, 32, 63, 65, 128, None)),
    *((statement, 1, bad) for statement in CALLS for bad in (0, 12, 15, 17, 32, None)),
    *((statement, 2, bad) for statement in CALLS[1:] for bad in (0, 16, 32, 47, 49, 63, None)),
    *((statement, place, None) for statement in CALLS for place in (2, 3)),
]


def test_lengths_are_checked(conn: Connection) -> None:
    for statement, place, bad in BAD_LENGTHS:
        arguments: list[bytes | None] = [bytes(64), bytes(16), bytes(48), b""]
        arguments[place] = None if bad is None else bytes(bad)
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="takes a key of 64 bytes"):
            conn.execute(statement, arguments)


INLINED: dict[LiteralString, list[str]] = {
    "rekey._aead_encrypt(key, iv, plaintext, aad)": ["hmac(", "encrypt_iv("],
    "rekey._aead_decrypt(key, iv, plaintext, aad)": ["hmac(", "decrypt_iv("],
    "rekey._is_authentic(key, iv, plaintext, aad)": ["hmac("],
    "rekey._encipher(key, iv, plaintext)": ["encrypt_iv("],
    "rekey._decipher(key, iv, plaintext)": ["decrypt_iv("],
    "rekey._mac(key, aad, iv, plaintext)": ["hmac("],
    "rekey._part(part)": ["int4send("],
    "rekey._secret_context(id, id)": ["int4send("],
    "rekey._is_envelope(plaintext)": ["octet_length("],
    "rekey._int4(plaintext, 3)": ["get_byte("],
    "rekey._random_bytes(16)": ["gen_random_bytes("],
    "rekey._fingerprint(key)": ["hmac("],
    "rekey._wrapping_key(key)": ["hmac("],
    "rekey._wrap(key, iv, plaintext, aad)": ["hmac(", "encrypt_iv("],
    "rekey._unwrap(key, plaintext, aad)": ["hmac(", "decrypt_iv("],
    "rekey._parse_kek(part)": ["decode("],
}


def test_inlined(conn: Connection) -> None:
    """Else they are slow, and key bytes become parameters of a statement of their own."""
    conn.execute(
        "create temporary table t (key bytea, iv bytea, plaintext bytea, aad bytea, part text, id uuid)"
    )
    for call, parts in INLINED.items():
        plan = "\n".join(line for (line,) in conn.execute("explain (verbose) select " + call + " from t"))
        assert [part for part in parts if part not in plan] == [], call
        assert set(re.findall(r"rekey\.(\w+)\(", plan)) <= {"_refuse_lengths"}, call
    for call in ("encrypt", "encrypt_text"):
        plan = str(conn.execute(f"explain (verbose) select rekey.{call}(part) from t".encode()).fetchall())
        assert "rekey.encrypt(convert_to(part, 'UTF8'" in plan.replace("::name", "").replace("''", "'"), plan


@settings(max_examples=300)
@given(raw=st.binary() | st.tuples(st.text(), st.binary(max_size=4)).map(lambda it: it[0].encode() + it[1]))
@example(b"\xed\xa0\x80")
@example(b"\xc0\x80")
@example(b"\xf4\x90\x80\x80")
@example("ä€\U0010ffff".encode())
def test_text_is_what_utf_8_makes_it(conn: Connection, raw: bytes) -> None:
    try:
        text = raw.decode() if b"\0" not in raw else None
    except UnicodeDecodeError:
        text = None
    assert value(conn, "select rekey._as_text(%s)", raw) == text


def keys(connection: Connection, kek: bytes) -> dict[tuple[int, int], bytes]:
    """Unwrap all the DEKs."""
    rows = connection.execute("select kek_id, keyring_id, version, wrapped_key from rekey.encryption_keys")
    return {row[1:3]: reference.unwrap(kek, *row) or b"" for row in rows}


def test_whole_envelope_both_ways(ready: Connection, kek: bytes) -> None:
    assert value(ready, "select fingerprint from rekey.keks") == reference.fingerprint(kek)
    ((keyring, version), key), *_ = keys(ready, kek).items()
    assert len(key) == 64
    for length in LENGTHS:
        plaintext = os.urandom(length)
        envelope = value(
            ready, "select rekey.encrypt(%s::bytea, context => %s)", plaintext, ["a", None, "bc"]
        )
        assert envelope[:11] == reference.header(keyring, version)
        assert len(envelope) == 59 + 16 * (length // 16 + 1)
        assert reference.unseal(key, envelope, "a", None, "bc") == plaintext
        ours = reference.seal(key, keyring, version, os.urandom(16), plaintext, "ä", "")
        assert value(ready, "select rekey.decrypt(%s::bytea, %s)", ours, ["ä", ""]) == plaintext
        text = f"rk1:{base64.b64encode(ours).decode()}"
        assert value(ready, "select rekey.decrypt(%s::text, %s)", text, ["ä", ""]) == plaintext


def test_secret_is_bound_to_its_row(ready: Connection, kek: bytes) -> None:
    identity = value(ready, "select rekey.set_secret('n', 'välue')")
    ready.execute("select rekey.set_secret('other', 'x')")
    tenant, envelope = ready.execute(
        "select tenant_id, ciphertext from rekey.secrets where id = %s", [identity]
    ).fetchall()[0]
    ((keyring, version), key), *_ = keys(ready, kek).items()
    context = "secret", str(tenant), str(identity)
    assert reference.unseal(key, envelope, *context) == "välue".encode()
    ours = reference.seal(key, keyring, version, os.urandom(16), b"from outside", *context)
    ready.execute("update rekey.secrets set ciphertext = %s where id = %s", [ours, identity])
    assert value(ready, "select rekey.get_secret('n')") == "from outside"
    ready.execute("update rekey.secrets set ciphertext = %s where name = 'other'", [ours])
    with pytest.raises(psycopg.Error) as caught:
        ready.execute("select rekey.get_secret('other')")
    assert caught.value.sqlstate == "RK003"


def test_audit_chain(ready: Connection) -> None:
    ready.execute("select set_config('request.jwt.claims', '{\"sub\": \"somebody\"}', false)")
    ready.execute("""select rekey.create_keyring(E'sch\u00f6n "q"', rotate_every => '90 days')""")
    ready.execute("select rekey.rotate_keys(reason => 'because')")
    before = reference.GENESIS
    with ready.cursor(row_factory=dict_row) as cursor:
        entries = cursor.execute(
            "select a.*, a.details::text as details from rekey.audit_log a order by id"
        ).fetchall()
    assert len(entries) > 10
    assert entries[-1]["jwt_subject"] == "somebody"
    for entry in entries:
        assert entry["prev_hash"] == before
        before = reference.audit_hash(entry | {"at": entry["at"].astimezone(UTC)})
        assert entry["hash"] == before
    assert value(ready, "select (rekey.verify_audit_log()).valid")


@pytest.mark.parametrize(("length", "step"), [(0, 1), (1025, 8)])
def test_any_change_has_one_error(attempt: Connection, length: int, step: int) -> None:
    """Every bit of the shortest envelope, every byte of a longer one; cuts and extensions."""
    envelope = value(attempt, "select rekey.encrypt(%s::bytea)", bytes(length))
    outcomes = attempt.execute(
        """
        select pg_temp.attempt(set_bit(e, n, 1 - get_bit(e, n)))
        from (select %(e)s::bytea as e) o, generate_series(0, octet_length(e) * 8 - 1, %(step)s) n
        union
        select pg_temp.attempt(substr(e, 1, n)) from (select %(e)s::bytea as e) o,
          generate_series(0, octet_length(e) - 1) n
        union
        select pg_temp.attempt(substr(e, n)) from (select %(e)s::bytea as e) o,
          generate_series(2, octet_length(e) + 1) n
        union
        select pg_temp.attempt(e || decode(repeat('00', n), 'hex')) from (select %(e)s::bytea as e) o,
          generate_series(1, 33) n
        """,
        {"e": envelope, "step": step},
    ).fetchall()
    assert outcomes == [(REFUSED,)]


def test_key_versions_and_keyrings_cannot_be_swapped(attempt: Connection) -> None:
    attempt.execute("select rekey.create_keyring('second')")
    attempt.execute("create temporary table e as select rekey.encrypt('x'::text) as one")
    attempt.execute("select rekey.rotate_keys('default')")
    attempt.execute("alter table e add two bytea, add other bytea")
    attempt.execute("update e set two = rekey.encrypt('x'::text), other = rekey.encrypt('x'::text, 'second')")
    assert value(attempt, "select pg_temp.attempt(one) || pg_temp.attempt(two) from e") == "opened x" * 2
    swapped: LiteralString = "select pg_temp.attempt(substr({}, 1, 11) || substr({}, 12)) from e"
    for one, another in (("one", "two"), ("two", "one"), ("one", "other"), ("other", "one")):
        assert value(attempt, swapped.replace("{}", one, 1).replace("{}", another)) == REFUSED


CONTEXTS: list[list[str | None]] = [
    [],
    [""],
    [None],
    [None, None],
    ["a", "bc"],
    ["ab", "c"],
    ["abc"],
    ["a", None, "bc"],
    ["a", "", "bc"],
    ["bc", "a"],
    ["NULL"],
    ["é"],
    ["e\u0301"],
    ["\U0001f511", "\u202e"],
]


def test_context(attempt: Connection) -> None:
    for parts in CONTEXTS:
        assert value(attempt, "select rekey._context(%s)", parts) == reference.context(*parts)
        envelope = value(attempt, "select rekey.encrypt('x'::text, context => %s)", parts)
        for other in CONTEXTS:
            expected = "opened x" if other == parts else REFUSED
            assert value(attempt, "select pg_temp.attempt(%s::bytea, %s)", envelope, other) == expected


@pytest.mark.parametrize("context", [None, [["a"], ["b"]]])
def test_context_must_be_a_list(ready: Connection, context: Any) -> None:
    for call in ("rekey.encrypt('x'::text, 'default', %s)", "rekey.decrypt('rk1:'::text, %s)"):
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            ready.execute("select " + call, [context])


@pytest.mark.parametrize(
    ("plain", "padding"),
    [("forty bytes make one padding character..", "="), ("twenty make two: twenty", "==")],
)
def test_text_form_is_strict(attempt: Connection, plain: str, padding: str) -> None:
    text = value(attempt, "select rekey.encrypt_text(%s)", plain)
    while "+" not in text and "/" not in text:
        text = value(attempt, "select rekey.encrypt_text(%s)", plain)
    assert text.startswith("rk1:")
    assert "\n" not in text
    assert value(attempt, "select pg_temp.attempt(%s::text)", text) == f"opened {plain}"
    body = text.removeprefix("rk1:")
    bare = body.rstrip("=")
    assert body == bare + padding
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    loose_bits = bare[:-1] + alphabet[alphabet.index(bare[-1]) + 1] + padding
    assert base64.b64decode(loose_bits) == base64.b64decode(body)
    wrong = [
        body,
        f"RK1:{body}",
        f" {text}",
        f"{text}\n",
        f"{text} ",
        f"rk1:rk1:{body}",
        f"rk1: {body}",
        f"{text[:80]}\n{text[80:]}",
        f"{text[:80]}\r\n{text[80:]}",
        text.rstrip("="),
        f"{text}=",
        f"{text}====",
        f"rk1:{loose_bits}",
        text.replace("+", "-").replace("/", "_"),
        text[:-4],
        "rk1:",
        "rk1",
        "",
        f"\\x{base64.b64decode(body).hex()}",
    ]
    for form in wrong:
        assert value(attempt, "select pg_temp.attempt(%s::text)", form) == REFUSED, form


def test_null_stays_null(ready: Connection) -> None:
    for kind in ("bytea", "text"):
        for call in ("encrypt", "decrypt", *(["encrypt_text"] if kind == "text" else []), "decrypt_text"):
            assert value(ready, f"select rekey.{call}(null::{kind})") is None


def test_no_iv_twice(ready: Connection) -> None:
    """Neither one by one nor in a sweep, where a random IV must be drawn for each row."""
    ivs = ready.execute("""
        select substr(rekey.encrypt('x'::text), 12, 16) from generate_series(1, 2000)
        union all
        select substr(u, 12, 16)
        from (select rekey.encrypt('x'::text) as e offset 0) o,
          rekey._reencrypt(array_fill('(0,1)'::tid, array[20000]), array_fill(e, array[20000]), '',
            array_fill(''::bytea, array[20000])) r,
          unnest(r.made) u
    """).fetchall()
    assert len(ivs) == len(set(ivs)) == 22000


def test_a_sweep_opens_and_seals_each_row_once(ready: Connection) -> None:
    """The planner repeats an expression wherever an inlined function has its parameter more than once."""
    fill(ready, 1000)

    def calls() -> dict[str, int]:
        ready.execute("select pg_stat_force_next_flush()")
        query: LiteralString = (
            "select funcname, calls from pg_stat_user_functions where funcname like '%crypt_iv'"
        )
        return dict(ready.execute(query).fetchall())

    before = calls()
    rotate(ready)
    run(ready)
    after = calls()
    for name in ("encrypt_iv", "decrypt_iv"):
        # A few more for the keys and the session.
        assert 1000 <= after[name] - before.get(name, 0) < 1500, name
