"""Checkpoints of the audit log, signed with Ed25519, to be kept where the database's owner cannot reach."""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from pg_rekey.errors import FINDINGS, Problem


def generate() -> tuple[str, str]:
    """Make a key pair: the private key and the public key, in PEM."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


def sign(checkpoint: Mapping[str, Any], private_key: str) -> dict[str, Any]:
    """Return a checkpoint with its signature."""
    try:
        key = load_pem_private_key(private_key.encode(), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise Problem("that is no Ed25519 private key", "`pg-rekey audit keygen` makes one.")
    signature = base64.b64encode(key.sign(_canonical(checkpoint))).decode()
    return {"checkpoint": dict(checkpoint), "algorithm": "Ed25519", "signature": signature}


def check(signed: str, public_key: str) -> dict[str, Any]:
    """Return the checkpoint of a signed one; a signature that does not fit is a finding."""
    try:
        key = load_pem_public_key(public_key.encode())
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise Problem("that is no Ed25519 public key", "`pg-rekey audit keygen` makes one.")
    try:
        document = json.loads(signed)
        checkpoint = dict(document["checkpoint"])
        signature = base64.b64decode(document["signature"], validate=True)
    except (ValueError, TypeError, KeyError, binascii.Error):
        raise Problem("that is no signed checkpoint", "`pg-rekey audit checkpoint` makes one.") from None
    try:
        key.verify(signature, _canonical(checkpoint))
    except InvalidSignature:
        raise Problem("the signature of the checkpoint is not right", None, FINDINGS) from None
    return checkpoint


def _canonical(checkpoint: Mapping[str, Any]) -> bytes:
    return json.dumps(checkpoint, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
