"""Driving rotations from a test, and what must hold after every one of them."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import pytest

from helpers import Connection, value

NIL = "00000000-0000-0000-0000-000000000000"

# Seals a whole set at once, as the owner of the keys could; set_secret would take a second for each 5,000.
FILL: LiteralString = """
    with key as materialized (
      select k.id, d.key, rekey._header(k.id, d.version) as header
      from rekey.keyrings k
      join rekey.encryption_keys e on e.keyring_id = k.id and e.state = 'active'
      cross join lateral rekey._deks(array[k.id], array[e.version]) d
      where k.name = %(keyring)s
    ), made as materialized (
      select gen_random_uuid() as id, %(prefix)s || n as name, gen_random_bytes(16) as iv
      from generate_series(1, %(count)s) n
    )
    insert into rekey.secrets (tenant_id, id, name, keyring_id, ciphertext)
    select %(tenant)s, m.id, m.name, k.id,
      k.header || m.iv || rekey._aead_encrypt(
        k.key, m.iv, convert_to(m.name || repeat('.', %(size)s), 'UTF8'),
        k.header || rekey._secret_context(%(tenant)s, m.id))
    from made m, key k
"""

# Flips a bit of s1; a second time, flips it back.
FLIP: LiteralString = """
    update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)
    where name = 's1'
"""


def fill(
    connection: Connection,
    count: int,
    *,
    keyring: str = "default",
    prefix: str = "s",
    tenant: str = NIL,
    size: int = 0,
) -> dict[str, str]:
    """Store secrets s1, s2 ... whose values are their names and `size` dots; return them."""
    connection.execute(
        FILL, {"keyring": keyring, "prefix": prefix, "count": count, "tenant": tenant, "size": size}
    )
    return {f"{prefix}{n}": f"{prefix}{n}" + "." * size for n in range(1, count + 1)}


def read(connection: Connection, tenant: str = NIL) -> dict[str, str]:
    """Return every secret of a tenant."""
    return dict(connection.execute("select * from rekey.read_secrets(tenant_id => %s)", (tenant,)))


def rotate(
    connection: Connection, keyring: str = "default", reason: str | None = None, *, supersede: bool = False
) -> int:
    """Begin a rotation and return its number."""
    return int(value(connection, "select id from rekey.rotate_keys(%s, %s, %s)", keyring, reason, supersede))


def step(connection: Connection) -> tuple[str, int, int, dict[str, Any]]:
    """Take one step: event, keyrings, rows, detail."""
    row = connection.execute(
        "select event, keyring_count, rows, coalesce(detail, '{}') from rekey.rotation_step()"
    ).fetchone()
    assert row is not None
    return row[0], row[1], row[2], row[3]


def step_until(connection: Connection, *events: str, seconds: float = 60) -> list[str]:
    """Step until one of these events; return all of them."""
    seen: list[str] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        seen.append(step(connection)[0])
        if seen[-1] in events:
            return seen
        if seen[-1] in ("waiting", "blocked"):
            time.sleep(0.02)
    raise AssertionError(f"none of {events} within {seconds} s: ... {seen[-20:]}")


def waits(connection: Connection, pid: int, seconds: float = 60) -> None:
    """Wait until that session waits for a lock."""
    waiting: LiteralString = "select count(*) from pg_locks where pid = %s and not granted"
    until = time.monotonic() + seconds
    while value(connection, waiting, pid) == 0:
        assert time.monotonic() < until, "it does not wait"
        time.sleep(0.01)


def run(connection: Connection, max_duration: str = "20 s") -> None:
    """Work on rotations until none is left; leave no chunk behind."""
    connection.execute("call rekey.run_rotations(%s)", (max_duration,))


def rotation(connection: Connection, number: int, *columns: str) -> Any:
    """Return columns of a rotation's status; a bare value where it is one column."""
    with connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        found = cursor.execute("select * from rekey.rotation_status where id = %s", (number,)).fetchone()
    assert found is not None
    return found[columns[0]] if len(columns) == 1 else tuple(found[column] for column in columns)


def states(connection: Connection, keyring: str = "default") -> dict[int, str]:
    """Return the state of each version of a keyring."""
    query: LiteralString = "select version, state from rekey.key_status where keyring = %s order by version"
    return dict(connection.execute(query, (keyring,)))


def on_versions(connection: Connection, keyring: str = "default") -> dict[int, int]:
    """Return how many secrets stand on each version of a keyring."""
    query: LiteralString = """
        select key_version, count(*) from rekey.secrets s join rekey.keyrings k on k.id = s.keyring_id
        where k.name = %s group by 1 order by 1"""
    return dict(connection.execute(query, (keyring,)))


def events(connection: Connection, number: int | None = None) -> list[str]:
    """Return the events of the audit log, of one rotation or all, in order."""
    query: LiteralString = (
        "select event from rekey.audit_log where %(n)s::bigint is null or rotation_id = %(n)s order by id"
    )
    return [event for (event,) in connection.execute(query, {"n": number})]


@contextmanager
def refused(code: str, match: str | None = None) -> Iterator[pytest.ExceptionInfo[psycopg.Error]]:
    """Expect an error with this SQLSTATE, and such words."""
    with pytest.raises(psycopg.Error, match=match) as caught:
        yield caught
    assert caught.value.diag.sqlstate == code, caught.value


def opened(connection: Connection, table: str) -> dict[str, str]:
    """Return what the protected column v of a table holds, opened, by its key id; table with its schema."""
    query = (
        f"select id::text, convert_from(rekey.decrypt(v, array['{table}.v', id::text]), 'UTF8') from {table}"
    )
    return dict(connection.execute(query.encode()).fetchall())


def check(
    connection: Connection,
    *models: dict[str, str],
    tenants: tuple[str, ...] = (NIL,),
    columns: Mapping[str, dict[str, str]] | None = None,
) -> None:
    """Assert the invariants: values, versions, IVs, leftovers, the audit chain and what is in it once.

    columns: what the column v of protected tables holds, as opened() returns it.
    """
    for tenant, model in zip(tenants, models, strict=True):
        assert read(connection, tenant) == model
    for table, model in (columns or {}).items():
        assert opened(connection, table) == model
    dead: LiteralString = """
        select count(*) from rekey.secrets s
        left join rekey.encryption_keys k on k.keyring_id = s.keyring_id and k.version = s.key_version
        where coalesce(k.state, 'destroyed') = 'destroyed'"""
    assert value(connection, dead) == 0
    active: LiteralString = """
        select count(*) from rekey.keyrings k where k.retired_at is null and 1 <>
          (select count(*) from rekey.encryption_keys e where e.keyring_id = k.id and e.is_active)"""
    assert value(connection, active) == 0
    in_use: LiteralString = (
        "select count(*) from rekey.key_usage() where rows > 0 and state in ('destroyed', 'unknown')"
    )
    assert value(connection, in_use) == 0
    sealed = "select ciphertext from rekey.secrets" + "".join(
        f" union all select case when pg_typeof(v) = 'bytea'::regtype then v::text::bytea"
        f" else decode(substr(v::text, 5), 'base64') end from {table}"
        for table in columns or {}
    )
    reused = f"select count(*) - count(distinct substr(s.ciphertext, 4, 24)) from ({sealed}) s"
    assert connection.execute(reused.encode()).fetchone() == (0,)
    unfinished: LiteralString = "select count(*) from rekey.rotations where rekey._is_under_way(state)"
    if value(connection, unfinished) == 0:
        assert value(connection, "select count(*) from rekey._chunks") == 0
    twice: LiteralString = """
        select event, keyring, version, rotation_id from rekey.audit_log
        where event in (
          'key.created', 'key.destroyed', 'keyring.created', 'rotation.requested', 'rotation.started')
        group by 1, 2, 3, 4 having count(*) > 1"""
    assert connection.execute(twice).fetchall() == []
    assert connection.execute("select valid, reason from rekey.verify_audit_log()").fetchone() == (True, None)


@contextmanager
def in_background(*tasks: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run these meanwhile, until they see the event; an error of theirs is an error of the test."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(task, stop) for task in tasks]
        try:
            yield
        finally:
            stop.set()
        for future in futures:
            future.result(30)


def sealed_ivs(connection: Connection, rows: int, rotations: int) -> tuple[int, int]:
    """Seal values one by one, and `rows` in each rotation; return how many IVs there were, and differ."""
    connection.execute("create temporary table ivs (iv bytea)")
    connection.execute(
        "insert into ivs select substr(rekey.encrypt('x'::text), 12, 16) from generate_series(1, 2000)"
    )
    fill(connection, rows)
    for _ in range(rotations):
        rotate(connection)
        run(connection, "1 hour")
        connection.execute("insert into ivs select substr(ciphertext, 12, 16) from rekey.secrets")
    [(total, distinct)] = connection.execute("select count(*), count(distinct iv) from ivs").fetchall()
    return total, distinct
