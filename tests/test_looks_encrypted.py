"""What looks encrypted is not taken for plaintext, and what people bring as plaintext is not stopped."""

import base64
import json
import os
import random
import secrets
import string
import uuid
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from cli_fixtures import Cli
from driving import run
from helpers import Connection, value
from test_cli_columns import opened

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
        f"{os.urandom(12).hex()}:{os.urandom(16).hex()}:{os.urandom(23).hex()}",
        f"{os.urandom(16).hex()}:{os.urandom(41).hex()}:{os.urandom(16).hex()}",
        f"{b64(12)}:{b64(16)}:{b64(31)}",
        f"{b64(12)}:{b64(31)}:{b64(16)}",
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
    "nextcloud": [f"{os.urandom(32).hex()}|{os.urandom(16).hex()}|{os.urandom(64).hex()}|3"],
    "nss": [
        base64.b64encode(bytes.fromhex("303a0410f8000000000000000000000000000001") + os.urandom(40)).decode()
    ],
    "openpgp": [
        b"\x8c\x4d\x05\x09" + os.urandom(70),
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
    "rails_message": [f"{b64(50)}--{b64(12)}--{b64(16)}"],
    "adonis": [f"app.v1:{url(40)}.{url(24)}.{url(16)}"],
    "safe_storage": [b"v10\x9c" + os.urandom(40)],
    "saltpack": ["BEGIN KEYBASE SALTPACK ENCRYPTED MESSAGE. kcJn5brvybfNjz6 " + b64(60)],
    "sealed_object": [bytes.fromhex("aced000573720019") + b"javax.crypto.SealedObject" + os.urandom(90)],
    "simple_encryptor": [os.urandom(48).hex() + b64(16)],
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


def table(connection: Connection, values: list[str | bytes]) -> None:
    type_ = "bytea" if isinstance(values[0], bytes) else "text"
    connection.execute(f"drop table if exists t; create table t (id int primary key, v {type_})".encode())
    with connection.cursor() as cursor:
        cursor.executemany("insert into t values (%s, %s)", list(enumerate(values)))


@pytest.mark.parametrize("kind", MARKED)
def test_marked_values_are_refused_by_name(ready: Connection, kind: str) -> None:
    """Each alone in a column; and among plain values, where the sweep leaves it."""
    for one in MARKED[kind]:
        raw = one if isinstance(one, bytes) else one.encode()
        mark = value(
            ready,
            "select coalesce(rekey._legacy_mark(v), rekey._legacy_mark(rekey._marked_inside(v))) from (select %s::bytea as v) s",
            raw,
        )
        assert mark == kind, one


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_values_are_not_stopped(ready: Connection, kind: str) -> None:
    values = [PLAIN[kind]() for _ in range(40 if "pem" in kind or "der" in kind else 200)]
    raw = [one if isinstance(one, bytes) else one.encode() for one in values]
    marks = ready.execute(
        "select coalesce(rekey._legacy_mark(v), rekey._legacy_mark(rekey._marked_inside(v))) from unnest(%s::bytea[]) v",
        [raw],
    ).fetchall()
    assert {mark for (mark,) in marks} == {None}
    doubt = value(ready, "select rekey._shape_doubt(%s::bytea[])", raw)
    print(doubt)
    assert doubt is None or doubt.startswith("asked: ")
