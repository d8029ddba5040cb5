"""Wrapped keys and ciphertexts that were damaged, cut, extended or swapped: refused, never changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString

import psycopg
import pytest

from column_fixtures import protect
from driving import NIL, check, fill, refused, rotate, rotation, run
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


@pytest.fixture
def tables(ready: Connection) -> Connection:
    """Two tenants' secrets, and a table with two protected columns, on versions 1 and 2."""
    ready.execute("create table t (id integer primary key, v text, w text)")
    for column in ("v", "w"):
        protect(ready, "t", column, encrypt_on_write=True)
    for tenant in (NIL, OTHER_TENANT):
        fill(ready, 12, tenant=tenant, size=40)
    ready.execute("insert into t select n, 'v ' || n, 'w ' || n from generate_series(1, 12) n")
    ready.execute("create table kept as table rekey.secrets; create table kept_t as table t")
    return ready


@contextmanager
def without_triggers(connection: Connection) -> Iterator[None]:
    """Write into t what its triggers would refuse."""
    connection.execute("alter table t disable trigger user")
    yield
    connection.execute("alter table t enable trigger user")


OTHER_TENANT = "11111111-1111-1111-1111-111111111111"
# Each damages another secret of the nil tenant, or another row of the table.
DAMAGES: list[LiteralString] = [
    "update rekey.secrets s set ciphertext = k.ciphertext from kept k where s.name = 's1' and k.name = 's2'"
    " and s.tenant_id = k.tenant_id and s.tenant_id = uuid_nil()",
    "update rekey.secrets s set ciphertext = k.ciphertext from kept k where s.name = 's2' and k.name = 's2'"
    " and s.tenant_id = uuid_nil() and k.tenant_id <> s.tenant_id",
    "update rekey.secrets set ciphertext = substr(ciphertext, 1, octet_length(ciphertext) - 16)"
    " where name = 's3' and tenant_id = uuid_nil()",
    r"update rekey.secrets set ciphertext = ciphertext || decode(repeat('00', 16), 'hex')"
    " where name = 's4' and tenant_id = uuid_nil()",
    "update rekey.secrets set ciphertext = set_byte(ciphertext, 30, get_byte(ciphertext, 30) # 128)"
    " where name = 's5' and tenant_id = uuid_nil()",
    "update t set v = k.v from kept_t k where t.id = 1 and k.id = 2",
    "update t set v = w where id = 2",
    "update t set v = left(v, -24) where id = 3",
    "update t set v = 'rk1:' || translate(encode(set_byte(c, 10, 1), 'base64'), E'\n', '')"
    " from (select decode(substr(v, 5), 'base64') as c from t where id = 4) as o where id = 4",
]


def test_damaged_ciphertexts_are_left_as_they_are_and_the_others_go_on(tables: Connection) -> None:
    tables.execute(
        "create function uuid_nil() returns uuid return '00000000-0000-0000-0000-000000000000'::uuid"
    )
    rotated = rotate(tables)
    run(tables)
    tables.execute("drop table kept, kept_t")
    tables.execute("create table kept as table rekey.secrets; create table kept_t as table t")
    with without_triggers(tables):
        for damage in DAMAGES:
            tables.execute(damage)
    bad = ROWS_OF + " where s.name = any ('{s1,s2,s3,s4,s5}') and s.tenant_id = uuid_nil()"
    before = (
        tables.execute(bad).fetchall(),
        tables.execute("select v from t where id < 5 order by id").fetchall(),
    )
    for name in ("s1", "s2", "s3", "s4", "s5"):
        with refused("RK003"):
            tables.execute("select rekey.get_secret(%s)", (name,))
    for number in (1, 2, 3, 4):
        with pytest.raises(psycopg.Error) as caught:
            tables.execute(
                "select rekey.decrypt_text(v, array['public.t.v', id::text]) from t where id = %s", (number,)
            )
        assert caught.value.sqlstate in ("RK003", "RK006")
    assert rotation(tables, rotated, "state") == "completed"
    number = rotate(tables)
    run(tables)
    assert rotation(tables, number, "state", "rows_failed") == ("completed_with_failures", 9)
    assert rotation(tables, number, "rows_done") == 24 - 5 + 24 - 4
    after = (
        tables.execute(bad).fetchall(),
        tables.execute("select v from t where id < 5 order by id").fetchall(),
    )
    assert after == before
    with refused("RK005"):
        tables.execute("select rekey.schedule_key_destruction('default', 2)")
    # Mended, each is tried again.
    tables.execute(
        "update rekey.secrets s set ciphertext = k.ciphertext from kept k"
        " where (s.tenant_id, s.id) = (k.tenant_id, k.id) and s.tenant_id = uuid_nil()"
        " and s.name = any ('{s1,s2,s3,s4,s5}')"
    )
    with without_triggers(tables):
        tables.execute("update t set v = k.v from kept_t k where k.id = t.id and t.id < 5")
    tables.execute("select rekey.retry_rotation(%s)", (number,))
    run(tables)
    assert rotation(tables, number, "state", "rows_failed") == ("completed", 0)
    model = {f"s{n}": f"s{n}" + "." * 40 for n in range(1, 13)}
    check(tables, model, model, tenants=(NIL, OTHER_TENANT))


ROWS_OF: LiteralString = "select s.id, s.ciphertext from rekey.secrets s"
