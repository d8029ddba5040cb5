"""Wrapped keys and ciphertexts that were damaged, cut, extended or swapped: refused, never changed."""

from typing import LiteralString

import pytest

from driving import check, fill, refused, rotate, rotation, run
from helpers import Connection, value

WRAPPED: LiteralString = "select wrapped_key from rekey.encryption_keys where state = 'active'"
SECOND: LiteralString = """
    (select e.wrapped_key from rekey.encryption_keys e join rekey.keyrings k on k.id = e.keyring_id
     where k.name = 'other')"""


def damage(connection: Connection, change: LiteralString) -> None:
    """Change the wrapped key of version 1 of the keyring default."""
    connection.execute(
        "update rekey.encryption_keys e set wrapped_key = " + change + " from rekey.keyrings k"
        " where k.id = e.keyring_id and k.name = 'default' and e.version = 1"
    )


def refuses(connection: Connection) -> None:
    """Assert that nothing opens or seals with the damaged key."""
    with refused("RK006"), connection.transaction():
        connection.execute("select rekey.get_secret('s1')")
    with refused("RK006"), connection.transaction():
        connection.execute("select rekey.set_secret('s1', 'x')")


def test_a_wrapped_key_with_any_byte_flipped(ready: Connection) -> None:
    fill(ready, 1)
    for place in range(len(value(ready, WRAPPED))):
        with ready.transaction(force_rollback=True):
            damage(ready, f"set_byte(e.wrapped_key, {place}, get_byte(e.wrapped_key, {place}) # 1)")
            refuses(ready)
    assert value(ready, "select rekey.get_secret('s1')") == "s1"


@pytest.mark.parametrize(
    "change",
    [
        "''",
        "substr(e.wrapped_key, 1, 1)",
        "substr(e.wrapped_key, 1, octet_length(e.wrapped_key) - 1)",
        "substr(e.wrapped_key, 1, octet_length(e.wrapped_key) - 16)",
        "substr(e.wrapped_key, 2)",
        r"e.wrapped_key || '\x00'",
        "e.wrapped_key || e.wrapped_key",
        SECOND,
    ],
)
def test_a_rotation_away_from_a_damaged_key(ready: Connection, change: LiteralString) -> None:
    """Its rows are quarantined as they are; what was written since, and the other keyring, go on."""
    model = fill(ready, 5)
    ready.execute("select rekey.create_keyring('other')")
    fill(ready, 5, keyring="other", prefix="o")
    kept = value(ready, WRAPPED_1)
    before = ready.execute(ROWS).fetchall()
    damage(ready, change)
    refuses(ready)
    numbers = rotate(ready), rotate(ready, "other")
    ready.execute("select rekey.set_secret('new', 'x')")
    run(ready)
    assert rotation(ready, numbers[0], "state", "rows_done", "rows_failed") == (
        "completed_with_failures",
        0,
        5,
    )
    assert rotation(ready, numbers[1], "state", "rows_done") == ("completed", 5)
    assert ready.execute(ROWS).fetchall() == before
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1)")
    # The key from a backup makes all of them open again.
    ready.execute(
        "update rekey.encryption_keys set wrapped_key = %s where version = 1 and keyring_id ="
        " (select id from rekey.keyrings where name = 'default')",
        (kept,),
    )
    ready.execute("select rekey.retry_rotation(%s)", (numbers[0],))
    run(ready)
    assert rotation(ready, numbers[0], "state", "rows_done", "rows_failed") == ("completed", 5, 0)
    check(ready, model | {f"o{n}": f"o{n}" for n in range(1, 6)} | {"new": "x"})


WRAPPED_1: LiteralString = """
    select e.wrapped_key from rekey.encryption_keys e join rekey.keyrings k on k.id = e.keyring_id
    where k.name = 'default' and e.version = 1"""
ROWS: LiteralString = "select name, ciphertext from rekey.secrets where name like 's%%' order by name"
