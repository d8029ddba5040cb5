"""What looks encrypted is not taken for plaintext, and what people bring as plaintext is not stopped."""

import base64
import json
import os
import random
import re
import secrets
import string
import uuid
from collections.abc import Callable

import psycopg
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from cli_fixtures import Cli
from driving import run
from helpers import Connection, value

pytest_plugins = ["cli_fixtures"]


def b64(count: int) -> str:
    return base64.b64encode(os.urandom(count)).decode()


def url(count: int) -> str:
    return base64.urlsafe_b64encode(os.urandom(count)).decode().rstrip("=")


def wide(count: int) -> str:
    """Base64 of so many random bytes and some more, as ciphertexts of texts are."""
    return b64(count + random.randrange(40))


# The beginnings are as the tools write them; what follows is random.
MARKED: dict[str, list[str | bytes]] = {
    "aes_cbc": [
        f"{digit}{os.urandom(16).hex()[1:]}:{os.urandom(16 * size).hex()}"
        for digit in "09aeFE"
        for size in (1, 2, 70)
    ],
    "age": [
        "-----BEGIN AGE ENCRYPTED FILE-----\n" + b64(150),
        b"age-encryption.org/v1\n-> scrypt " + os.urandom(90),
        base64.b64encode(b"age-encryption.org/v1\n-> X25519 " + os.urandom(90)).decode(),
    ],
    "ansible_vault": ["$ANSIBLE_VAULT;1.1;AES256\n" + os.urandom(80).hex()],
    "armored": ["-----BEGIN CMS-----\nMIIB" + b64(90)],
    "aws_encryption": [
        b"\x02\x05\x78" + os.urandom(90),
        base64.b64encode(b"\x01\x80\x03\x78" + os.urandom(99)).decode(),
    ],
    "aws_kms": [
        bytes.fromhex("0102020078") + os.urandom(120),
        base64.b64encode(bytes.fromhex("0101020078") + os.urandom(120)).decode(),
    ],
    "better_auth": ["$ba$2$" + os.urandom(47).hex()],
    "calcom": [
        json.dumps(
            {
                "v": 1,
                "alg": "AES-256-GCM",
                "ring": "SMTP",
                "kid": "K1",
                "nonce": url(12),
                "ct": url(40),
                "tag": url(16),
            },
            separators=(",", ":"),
        )
    ],
    "ciphersweet": ["nacl:" + url(60), "fips:" + url(60), "brng:" + url(60)],
    "cloak": [
        b"\x01\x0aAES.GCM.V1" + os.urandom(60),
        base64.b64encode(b"\x01\x0aAES.GCM.V1" + os.urandom(60)).decode(),
    ],
    "cms": [bytes.fromhex("3082012d06092a864886f70d010703a0") + os.urandom(200)],
    "dataprotection": ["CfDJ8" + base64.urlsafe_b64encode(b"\x05" + os.urandom(90)).decode()],
    "dpapi": [
        bytes.fromhex("01000000d08c9ddf0115d1118c7a00c04fc297eb") + os.urandom(99),
        "01000000d08c9ddf0115d1118c7a00c04fc297eb" + os.urandom(99).hex(),
    ],
    "encrypted": [
        "enc:" + b64(40),
        "enc::" + b64(40),
        "enc:v2:" + b64(40),
        "enc_v1:" + b64(40),
        "ENC(" + b64(40) + ")",
        "{cipher}" + os.urandom(32).hex(),
        "{AES}" + b64(32),
        "encrypted:" + b64(80),
        "aes-256-gcm$" + b64(40),
        "aes256:" + os.urandom(40).hex(),
        "secretbox:" + b64(50),
        "__ENC__:" + b64(40),
        "<encrypted>" + b64(40),
        "kms:" + b64(100),
        "{xor}" + b64(12),
    ],
    "envelope": [' "rk1:' + b64(80) + '"'],
    "fernet": [
        "gAAAAA" + url(100),
        " gAAAAA" + url(100),
        "b'gAAAAA" + url(100) + "'",
        b"\x80\0\0\0\0\x6b\x0b\x36\xbf" + os.urandom(64),
        base64.b64encode(b"gAAAAA" + url(100).encode()).decode(),
    ],
    "gcp_kms": [b"\x0a\x24\0" + os.urandom(35) + b"\x12\x3a" + os.urandom(60)],
    "git_crypt": [b"\0GITCRYPT\0" + os.urandom(40)],
    "grafana": ["#" + b64(12) + "#*YWVzLWNmYg*" + b64(40), "*YWVzLWdjbQ*" + b64(40)],
    "halite": ["MUIFA" + url(120)],
    "iron": ["Fe26.2*1*" + os.urandom(32).hex() + "*" + url(16)],
    "iv_tag": [
        f"e{os.urandom(12).hex()[1:]}:{os.urandom(16).hex()}:{os.urandom(23).hex()}",
        f"e{b64(12)[1:]}:{b64(16)}:{b64(31)}",
        f"{os.urandom(12).hex()}:{os.urandom(16).hex()}:{os.urandom(23).hex()}",
        f"{os.urandom(16).hex()}:{os.urandom(41).hex()}:{os.urandom(16).hex()}",
        f"{b64(12)}:{b64(16)}:{b64(31)}",
        f"{b64(12)}:{b64(31)}:{b64(16)}",
        f"{os.urandom(12).hex()}:{os.urandom(600).hex()}:{os.urandom(16).hex()}",
        f"{b64(12)}:{b64(900)}:{b64(16)}",
        f"{b64(16)}:{b64(900)}:{b64(16)}",
    ],
    "jenkins": ["{AQAAABAAAAAw" + b64(48) + "}"],
    "json": [
        json.dumps({"iv": b64(16), "content": b64(40)}),
        json.dumps({"iv": b64(16), "v": 1, "ks": 128, "mode": "ccm", "cipher": "aes", "ct": b64(40)}),
        json.dumps({"ciphertext": b64(40), "nonce": b64(12), "tag": b64(16)}),
        json.dumps({"encrypted_data": b64(40), "iv": b64(16), "version": 3, "cipher": "aes-256-gcm"}),
        json.dumps({"k": "ct", "c": "mBbK" + b64(80), "i": {"t": "users", "c": "email"}, "v": 2}),
    ],
    "jwe": ["eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIn0.." + f"{url(12)}.{url(30)}.{url(16)}"],
    "k8s": ["k8s:enc:aescbc:v1:key1:" + b64(48)],
    "laravel": [
        base64.b64encode(
            json.dumps(
                {"iv": b64(16), "value": b64(32), "mac": "0" * 64, "tag": ""}, separators=(",", ":")
            ).encode()
        ).decode()
    ],
    "magento": ["0:3:" + b64(60)],
    "mongodb": [json.dumps({"$binary": {"base64": b64(80), "subType": "06"}})],
    "nextcloud": [
        f"{first}{os.urandom(32).hex()[1:]}|{os.urandom(16).hex()}|{os.urandom(64).hex()}|3" for first in "0e"
    ],
    "nss": [
        base64.b64encode(bytes.fromhex("303a0410f8000000000000000000000000000001") + os.urandom(40)).decode()
    ],
    "openpgp": [
        b"\x8c\x4d\x05\x09\x02\x03" + os.urandom(70),
        b"\xc3\x4d\x06\x1a\x09\x02\x0b\x03" + os.urandom(70),
        b"\xc1\x55\x06\x21\x06" + os.urandom(32) + b"\x19" + os.urandom(70),
        b"\x85\x01\x0c\x03" + os.urandom(8) + b"\x01" + os.urandom(200),
    ],
    "openssl": [
        base64.b64encode(b"Salted__" + os.urandom(40)).decode(),
        b"Salted__" + os.urandom(40),
        (b"Salted__" + os.urandom(40)).hex(),
    ],
    "paseto": ["v4.local." + url(80)],
    "pgp_sym": [
        bytes.fromhex("c30d04070302") + os.urandom(60),
        base64.b64encode(bytes.fromhex("c30d04070302") + os.urandom(60)).decode(),
        base64.encodebytes(bytes.fromhex("c30d04070302") + os.urandom(160)).decode(),
        (bytes.fromhex("c30d04070302") + os.urandom(60)).hex(),
        "\\x" + (bytes.fromhex("c30d04070302") + os.urandom(60)).hex(),
    ],
    "plug": ["QTEyOEdDTQ." + f"{url(30)}.{url(12)}.{url(40)}.{url(16)}"],
    "prisma": [f"v1.aesgcm256.5c0a0e46.{url(12)}.{url(40)}=="],
    "rails": [json.dumps({"p": b64(5), "h": {"iv": b64(12), "at": b64(16)}}, separators=(",", ":"))],
    "rails_message": [f"{first}{b64(50)[1:]}--{b64(12)}--{b64(16)}" for first in "Be"],
    "adonis": [f"app.v1:{url(40)}.{url(24)}.{url(16)}", f"app.{url(32)}.{url(16)}.{url(32)}"],
    "safe_storage": [b"v10\x9c" + os.urandom(40)],
    "saltpack": ["BEGIN KEYBASE SALTPACK ENCRYPTED MESSAGE. kcJn5brvybfNjz6 " + b64(60)],
    "sealed_object": [bytes.fromhex("aced000573720019") + b"javax.crypto.SealedObject" + os.urandom(90)],
    "simple_encryptor": [first + os.urandom(48).hex()[1:] + b64(16) for first in "0e"],
    "sops": [
        "ENC[AES256_GCM,data:" + b64(9) + ",iv:" + b64(32) + ",type:str]",
        "EJ[1:" + b64(32) + ":" + b64(24) + "]",
    ],
    "themis": [bytes.fromhex("000101400c00000010000000") + os.urandom(60)],
    "acra": [b'""""""""' + os.urandom(90)],
    "luks": [b"LUKS\xba\xbe\0\x02" + os.urandom(90)],
    "transit": ["vault:v1:" + b64(40)],
    "v1": [f"v1:{b64(12)}:{b64(16)}:{b64(30)}"],
    "versioned": ["v2:" + b64(40), "v3|" + b64(40)],
}


def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 1024)


PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER
PKCS8, OPENSSH = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.OpenSSH
NONE = serialization.NoEncryption()


def jwt() -> str:
    parts = ({"alg": "HS256", "typ": "JWT"}, {"sub": secrets.token_hex(6), "iat": 1700000000})
    return ".".join(
        [*(base64.urlsafe_b64encode(json.dumps(one).encode()).decode().rstrip("=") for one in parts), url(32)]
    )


def letters(alphabet: str, count: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(count))


ALNUM = string.ascii_letters + string.digits
# What people keep as it is, under the names of cases that are to be told from ciphertext.
PLAIN: dict[str, Callable[[], str | bytes]] = {
    "hex keys": lambda: secrets.token_hex(32),
    "hex keys of two lengths": lambda: secrets.token_hex(random.choice((16, 32))),
    "upper hex": lambda: secrets.token_hex(20).upper(),
    "uuids": lambda: str(uuid.uuid4()),
    "jwts": jwt,
    "stripe keys": lambda: "sk_live_51" + letters(ALNUM, 97),
    "old stripe keys": lambda: random.choice(("sk_live_", "sk_test_")) + letters(ALNUM, 24),
    "aws key ids": lambda: "AKIA" + letters(string.ascii_uppercase + "234567", 16),
    "aws secret keys": lambda: b64(30),
    "totp seeds": lambda: base64.b32encode(os.urandom(20)).decode(),
    "pem keys": lambda: rsa_key().private_bytes(PEM, PKCS8, NONE).decode(),
    "encrypted pem keys": lambda: (
        rsa_key().private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"x")).decode()
    ),
    "der keys": lambda: rsa_key().private_bytes(DER, PKCS8, NONE),
    "der keys in base64": lambda: base64.b64encode(rsa_key().private_bytes(DER, PKCS8, NONE)).decode(),
    "ssh keys": lambda: ed25519.Ed25519PrivateKey.generate().private_bytes(PEM, OPENSSH, NONE).decode(),
    "ssh public keys": lambda: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + b64(32)[:43],
    "webhook secrets": lambda: "whsec_" + b64(24),
    "bcrypt hashes": lambda: "$2b$12$" + letters("./" + ALNUM, 53),
    "argon2 hashes": lambda: "$argon2id$v=19$m=65536,t=3,p=4$" + b64(16)[:22] + "$" + b64(32)[:43],
    "django hashes": lambda: "pbkdf2_sha256$600000$" + letters(ALNUM, 22) + "$" + b64(32),
    "github tokens": lambda: "ghp_" + letters(ALNUM, 36),
    "gitlab tokens": lambda: "glpat-" + letters(ALNUM, 20),
    "slack tokens": lambda: (
        f"xoxb-{secrets.randbelow(10**12):012}-{secrets.randbelow(10**12):012}-{letters(ALNUM, 24)}"
    ),
    "sendgrid keys": lambda: f"SG.{url(16)}.{url(32)}",
    "google keys": lambda: "AIzaSy" + letters(ALNUM + "_-", 33),
    "telegram tokens": lambda: f"{secrets.randbelow(10**9) + 10**9}:AA{letters(ALNUM, 33)}",
    "ghost admin keys": lambda: f"{secrets.token_hex(12)}:{secrets.token_hex(32)}",
    "cloudflare keys": lambda: "v1.0-" + secrets.token_hex(12) + "-" + secrets.token_hex(73),
    "random tokens": lambda: secrets.token_urlsafe(32),
    "random bytes": lambda: os.urandom(64),
    "passwords": lambda: letters(ALNUM + "!$%&/()=?", random.randrange(8, 24)),
    "long passwords": lambda: letters(ALNUM, 24),
    "connection strings": lambda: f"postgres://app:{letters(ALNUM, 20)}@db.internal:5432/app",
    "user and password": lambda: base64.b64encode(f"user:{letters(ALNUM, 12)}".encode()).decode(),
    "service accounts": lambda: json.dumps(
        {"type": "service_account", "private_key_id": secrets.token_hex(20)}
    ),
    "jwk": lambda: json.dumps({"kty": "oct", "k": url(32), "alg": "A256GCM", "kid": secrets.token_hex(4)}),
    "emails": lambda: f"{letters(string.ascii_lowercase, 8)}@example.com",
    "sentences": lambda: f"The key is under the mat no. {secrets.randbelow(10**6)}; grüße.",
    "empty": lambda: "",
}


MARK = """
select coalesce(rekey._legacy_mark(v), rekey._legacy_mark(rekey._marked_inside(v)))
from unnest(%s::bytea[]) v
"""


def stored(values: list[str | bytes]) -> list[bytes]:
    return [one if isinstance(one, bytes) else one.encode() for one in values]


def table(connection: Connection, values: list[str | bytes]) -> None:
    """Make the table t of these values, and protect it."""
    type_ = "bytea" if isinstance(values[0], bytes) else "text"
    connection.execute(f"drop table if exists t; create table t (id int primary key, v {type_})".encode())
    with connection.cursor() as cursor:
        cursor.executemany("insert into t values (%s, %s)", list(enumerate(values)))
    connection.execute("select rekey.protect_column('t', 'v')")


@pytest.mark.parametrize("kind", MARKED)
def test_marks_are_known_by_name(ready: Connection, kind: str) -> None:
    for one in stored(MARKED[kind]):
        [(mark,)] = ready.execute(MARK, [[one]]).fetchall()
        assert mark == kind, one


def test_random_keys_have_no_mark(ready: Connection) -> None:
    """Of 32 bytes, as they are and in hexadecimal."""
    marked = """
        select count(*) from (select sha256(g::text::bytea) as key from generate_series(1, 40000) g) k
        where rekey._legacy_mark(k.key) is not null
          or rekey._legacy_mark(rekey._marked_inside(encode(k.key, 'hex')::bytea)) is not null"""
    assert value(ready, marked) == 0


def test_every_mark_has_a_sample(ready: Connection) -> None:
    source = value(
        ready,
        "select string_agg(prosrc, ' ') from pg_proc where proname in ('_text_mark', '_byte_mark')",
    )
    names = {
        name
        for block in re.findall(r"'\{([a-z0-9_,\s]+)\}'", source)
        for name in re.split(r",\s*", block.strip())
    }
    assert names == set(MARKED)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_values_are_at_most_asked(ready: Connection, kind: str) -> None:
    raw = stored([PLAIN[kind]() for _ in range(40 if "pem" in kind or "der" in kind else 200)])
    assert {mark for (mark,) in ready.execute(MARK, [raw])} == {None}
    doubt = value(ready, "select rekey._shape_doubt(%s::bytea[])", raw)
    assert doubt is None or doubt.startswith("asked: ")


# Without a mark: only the values together tell.
SHAPES: dict[str, tuple[str, list[str | bytes]]] = {
    "blocks in base64": ("blocks", [b64(16 * (1 + n % 4)) for n in range(30)]),
    "blocks in hexadecimal": ("blocks", [os.urandom(16 * (2 + n % 3)).hex() for n in range(30)]),
    "blocks in bytes": ("blocks", [os.urandom(16 * (1 + n % 4)) for n in range(30)]),
    "iv and blocks": ("blocks", [f"{b64(16)}:{b64(16 * (1 + n % 4))}" for n in range(30)]),
    "iv, blocks and mac": ("blocks", [b64(16 + 16 * (1 + n % 4) + 20) for n in range(30)]),
    "a header": ("header", [b"\x01\x19\x38\x0e\xe2" + os.urandom(28 + n) for n in range(30)]),
    "a header in base64": (
        "header",
        [base64.b64encode(b"\x07\x19\x38\x0e\xe2" + os.urandom(28 + n)).decode() for n in range(30)],
    ),
    # As n8n-core 2.41.1 writes it where n8n has keys of its own: the id of one; version, salt, tag, text.
    "a key's id before it": (
        "header",
        [f"aB3dE6gH9jK2mN5p:{base64.b64encode(bytes([1]) + os.urandom(60 + n)).decode()}" for n in range(30)],
    ),
    "texts under a stream cipher": ("differ", [b64(28 + n) for n in range(30)]),
    "texts of one length": ("one length", [b64(44) for _ in range(30)]),
    "one value": ("one length", [b64(16)]),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_the_shape_of_a_column_stops_an_adoption(cli_ready: Cli, ready: Connection, kind: str) -> None:
    words, values = SHAPES[kind]
    table(ready, values)
    asked = words in ("differ", "one length")
    # Among random bytes there are words, too.
    counted = rf"looks encrypted: \d+ of {len(values)} values"
    for arguments in (("--dry-run",), ()):
        cli_ready("columns", "adopt", "t", "v", "--from", "plaintext", *arguments, code=5)
        assert re.search(counted, cli_ready.out + cli_ready.err)
        assert words in cli_ready.out + cli_ready.err
    assert ("--values-are-tokens" in cli_ready.err) == asked
    with pytest.raises(psycopg.Error, match=counted) as caught:
        ready.execute("select rekey.adopt_column('t', 'v')")
    assert caught.value.sqlstate == "RK005"
    assert value(ready, "select count(*) from rekey.rotations") == 0
    [row] = cli_ready.json("columns", "adopt", "t", "v", "--from", "plaintext", "--dry-run", code=5)
    assert re.search(counted, row["doubt"])
    past = "--values-are-tokens" if asked else "--force"
    if not asked:
        cli_ready("columns", "adopt", "t", "v", "--from", "plaintext", "--values-are-tokens", code=5)
    cli_ready("columns", "adopt", "t", "v", "--from", "plaintext", past, "--dry-run")
    cli_ready("columns", "adopt", "t", "v", "--from", "plaintext", past)
    sealed = "select id, rekey.decrypt(v, array['public.t.v', id::text]) from t order by id"
    assert [one for _, one in ready.execute(sealed)] == stored(values)


def test_marked_values_stop_an_adoption(cli_ready: Cli, ready: Connection) -> None:
    table(ready, ["vault:v1:" + b64(40 + n) for n in range(30)])
    for arguments in (("--dry-run",), ()):
        cli_ready("columns", "adopt", "t", "v", "--from", "plaintext", *arguments, code=5)
        assert "transit" in cli_ready.out + cli_ready.err
    assert "30 of 30" in cli_ready.err
    ready.execute("select rekey.adopt_column('t', 'v', force => true)")
    run(ready)
    assert value(ready, "select count(*) from t where v like 'rk1:%%'") == 30


def test_a_marked_value_among_plain_ones_is_quarantined(cli_ready: Cli, ready: Connection) -> None:
    """So is one that comes after the sample was looked at: the sweep looks at each."""
    every = [one for values in MARKED.values() for one in values if isinstance(one, str)]
    plain: list[str | bytes] = [f"password no. {n}" for n in range(20 * len(every))]
    table(ready, [*plain, *every])
    ready.execute("select rekey.adopt_column('t', 'v')")
    ready.execute("insert into t values (-1, %s)", ["ENC[AES256_GCM,data:abcd]"])
    run(ready)
    left = ready.execute("select v from t where v not like 'rk1:UksB%%' order by id").fetchall()
    assert [one for (one,) in left] == ["ENC[AES256_GCM,data:abcd]", *every]
    failures = value(ready, "select array_agg(reason) from rekey.failure_status")
    assert sum("looks like sops" in one for one in failures) == 3
    assert len(failures) == len(left)
