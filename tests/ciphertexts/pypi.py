# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "django==5.2.19", "django-fernet-encrypted-fields==0.4.0", "joserfc==1.8.0",
#   "sqlalchemy-utils==0.43.0", "tink==1.16.1",
# ]
# ///
"""Values as libraries from PyPI and the command `openssl` write them: uv run --no-project pypi.py"""

import json
import os
import subprocess

import django
import tink
from django.conf import settings
from joserfc import jwe
from joserfc.jwk import OctKey
from sqlalchemy_utils.types.encrypted.encrypted_type import AesEngine, AesGcmEngine, FernetEngine
from tink import aead, json_proto_keyset_format, secret_key_access

TEXTS = ("s3cret", "", "grüße, 世界", "x" * 200, "y" * 16)
made: list[dict[str, str]] = []


def put(name: str, key: str, plaintext: str, value: str | bytes) -> None:
    stored = {"hex": value.hex()} if isinstance(value, bytes) else {"value": value}
    made.append({"format": name, "key": key, "plaintext": plaintext, **stored})


def sqlalchemy_utils() -> None:
    for name, kind, paddings in (
        ("sqlalchemy_aes", AesEngine, ("naive", "pkcs5")),
        ("sqlalchemy_aes_gcm", AesGcmEngine, (None,)),
        ("sqlalchemy_fernet", FernetEngine, (None,)),
    ):
        for padding in paddings:
            engine = kind()
            engine._update_key("a secret key")
            if padding:
                engine._set_padding_mechanism(padding)
            for text in TEXTS:
                put(name, "a secret key", text, engine.encrypt(text))


def django_fernet() -> None:
    secret, salts = "django-insecure-abc#$ %", ["salt-one", "salt-two"]
    settings.configure(SECRET_KEY=secret, SALT_KEY=salts)
    django.setup()
    from encrypted_fields.fields import EncryptedCharField

    for text in filter(None, TEXTS):  # it stores '' as NULL
        put(
            "django_fernet",
            f"salt-one {secret}",
            text,
            EncryptedCharField(max_length=400).get_prep_value(text),
        )


def tinks() -> None:
    aead.register()
    templates = aead.aead_key_templates
    for template in (templates.AES256_GCM, templates.AES128_GCM, templates.AES256_GCM_RAW):
        handle = tink.new_keyset_handle(template)
        keyset = json.dumps(json.loads(json_proto_keyset_format.serialize(handle, secret_key_access.TOKEN)))
        for text in TEXTS:
            put("tink", keyset, text, handle.primitive(aead.Aead).encrypt(text.encode(), b""))


def joserfc() -> None:
    for enc, size in (("A256CBC-HS512", 64), ("A192GCM", 24)):
        key = os.urandom(size)
        for text in TEXTS:
            for header in ({"alg": "dir", "enc": enc}, {"alg": "dir", "enc": enc, "zip": "DEF"}):
                put("jwe", key.hex(), text, jwe.encrypt_compact(header, text, OctKey.import_key(key)))


def openssl() -> None:
    command = ["openssl", "enc", "-aes-256-cbc", "-salt", "-a", "-A", "-pass", "pass:correct horse"]
    for options in (["-pbkdf2"], ["-md", "sha256"], ["-md", "md5"]):
        for text in TEXTS:
            done = subprocess.run([*command, *options], input=text.encode(), capture_output=True, check=True)
            put("openssl", "correct horse", text, done.stdout.decode().strip())


for make in (sqlalchemy_utils, django_fernet, tinks, joserfc, openssl):
    make()
print(json.dumps(made, indent=1, ensure_ascii=False))
