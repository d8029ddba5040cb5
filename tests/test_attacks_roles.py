"""What each role gets at: plaintext, keys, ciphertexts, the log and the settings."""

import os
from collections.abc import Iterator
from typing import LiteralString

import pytest

from driving import refused
from helpers import Connection, connect, unlock, value

TRIES: dict[str, tuple[LiteralString, ...]] = {
    "secrets": (
        "select rekey.get_secret('name')",
        "select * from rekey.read_secrets()",
        "select rekey.set_secret('name', 'x')",
        "select rekey.delete_secret('name')",
        "select rekey.decrypt(''::bytea)",
        "select rekey.encrypt('x'::text)",
        "select value from rekey.decrypted_secrets",
    ),
    "keys": (
        "select wrapped_key from rekey.encryption_keys",
        "select key from rekey._session_key",
        "select * from rekey._kek()",
        "select rekey._session_keks()",
        "select rekey._provided_keks()",
        "select * from rekey._deks('{1}', '{1}')",
        "select rekey._sealing(1)",
        "select rekey._passphrases()",
    ),
    "ciphertexts": (
        "select ciphertext from rekey.secrets",
        "select * from rekey_targets.secrets_scan('rekey.secrets', '(0,0)', '(9,0)', null, null, 9, 9999)",
        "select * from rekey._call_scan('secrets', 'rekey.secrets', '(0,0)', '(9,0)', null, null, 9, 9999)",
        "select rekey._call_write('secrets', 'rekey.secrets', '{}', '{}', '{}', null)",
        "select rekey_targets.secrets_write('rekey.secrets', '{}', '{}', '{}', '{}')",
    ),
    "log": ("select * from rekey.audit_log",),
    "verification": ("select * from rekey.verify_audit_log()", "select rekey.audit_checkpoint()"),
    "the log's end": (
        "update rekey._audit_head set id = 0",
        "insert into rekey.audit_log select * from rekey.audit_log",
        "select rekey._audit('key.destroyed')",
        "select rekey._audit_all('[]')",
    ),
    "status": ("select * from rekey.rotation_status", "select * from rekey.key_status"),
    "metrics": ("select * from rekey.metrics()",),
    "settings": ("select * from rekey.setting_status",),
    "changes": (
        "select rekey.set_setting('max_attempts', '5')",
        "select rekey.set_schedule('default', '1 day')",
    ),
    "work": ("select * from rekey.rotation_step()", "select * from rekey.verify_ciphertexts()"),
}
# As docs/security.md says: who reads what.
MAY: dict[str, set[str]] = {
    "rekey_app": {"secrets"},
    "rekey_operator": {"verification", "status", "metrics", "settings", "work"},
    "rekey_auditor": {"log", "verification", "status", "metrics", "settings"},
    "rekey_admin": {"log", "verification", "status", "metrics", "settings", "changes", "work"},
}


@pytest.fixture
def logins(ready: Connection) -> Iterator[dict[str, str]]:
    """A login role for each of ours."""
    names = {role: f"{role}_{os.getpid()}" for role in MAY}
    for role, name in names.items():
        ready.execute(f"create role {name} login in role {role}".encode())
    yield names
    for name in names.values():
        ready.execute(f"drop role {name}".encode())


@pytest.mark.parametrize("role", MAY)
def test_who_gets_at_what(role: str, logins: dict[str, str], ready: Connection, db: str, kek: bytes) -> None:
    """With the KEK in hand: it is not what keeps them out. An application sees ciphertexts of its tenants."""
    ready.execute("select rekey.set_secret('name', 'value')")
    with connect(db, user=logins[role]) as session:
        if role != "rekey_auditor":
            unlock(session, kek)
        for what, statements in TRIES.items():
            for statement in statements:
                print(statement)
                with session.transaction(force_rollback=True):
                    if what not in MAY[role] and not (role == "rekey_app" and "ciphertext from" in statement):
                        with refused("42501"):
                            session.execute(statement)
                    elif "decrypt(" in statement:
                        with refused("RK003"):
                            session.execute(statement)
                    else:
                        session.execute(statement)


def test_an_administrator_reads_no_secret_by_what_he_may_set(
    logins: dict[str, str], ready: Connection, db: str, kek: bytes
) -> None:
    """He names the KEK's file and the function that decides about tenants: neither shows him anything."""
    ready.execute("select rekey.set_secret('name', 'value')")
    with connect(db, user=logins["rekey_admin"]) as admin:
        unlock(admin, kek)
        for file in ("/etc/passwd", "../x", "a/../../b", "C:x"):
            with refused("22023"):
                admin.execute("select rekey.set_setting('kek_file', %s)", [file])
        with refused("22023"):
            admin.execute("select rekey.set_setting('tenant_check', 'rekey._kek')")
        with refused("22023"):
            admin.execute("select rekey.set_setting('tenant_check', 'pg_catalog.now() is null or x.y')")
        with refused("42501"):  # the grant that reading the file takes is not his to give
            admin.execute("select rekey.set_setting('kek_provider', 'file')")
        with refused("42501"):
            admin.execute("select rekey.protect_column('rekey.secrets', 'name')")
        with refused("42501"):
            admin.execute("grant rekey_app to current_user")
    assert value(ready, "select kek_provider from rekey.settings") == "session"
