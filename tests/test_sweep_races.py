"""What others do to the rows of a batch after it has read them, and before it locks them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import pytest

from column_fixtures import protect
from driving import check, rotate, rotation, run, step_until, waits
from helpers import Connection, value

# Every way in which the server may look rows up by their pointers.
PLANS: dict[str, tuple[str, ...]] = {
    "as it likes": (),
    "by pointer": ("enable_hashjoin", "enable_mergejoin", "enable_seqscan"),
    "hashed": ("enable_nestloop", "enable_mergejoin", "enable_tidscan"),
    "merged": ("enable_nestloop", "enable_hashjoin", "enable_tidscan"),
}
ROWS = 40
TABLES: dict[str, LiteralString] = {
    "bytea": "create table public.t (id int primary key, v bytea, n int default 0)",
    "text": "create table public.t (id int primary key, v text, n int default 0)",
    "partitioned": "create table public.t (id int primary key, v text, n int default 0)"
    " partition by range (id);"
    "create table public.t1 partition of public.t for values from (0) to (100);"
    "create table public.t2 partition of public.t for values from (100) to (200)",
}
SEAL: LiteralString = "rekey.encrypt%s(%%s, context => array['public.t.v', %%s])"


@pytest.fixture(params=TABLES)
def table(ready: Connection, request: pytest.FixtureRequest) -> str:
    """The type of a protected column with values, which are called as their rows are."""
    kind: str = request.param
    ready.execute(TABLES[kind])
    protect(ready, "public.t")
    for n in range(1, ROWS + 1):
        put(ready, kind, str(n), f"value {n}")
    ready.execute("vacuum public.t" if kind != "partitioned" else "vacuum public.t1")
    return kind


def put(connection: Connection, kind: str, key: str, new: str) -> None:
    """Store a value that is sealed with the version of now."""
    seal = SEAL % ("" if kind == "bytea" else "_text")
    connection.execute(
        f"insert into public.t values (%s, {seal}) on conflict (id) do update set v = excluded.v".encode(),
        (int(key), new, key),
    )


@contextmanager
def between(worker: Connection, other: Connection, seconds: str = "20 s") -> Iterator[None]:
    """Have a worker sweep in the background: meanwhile it has read its rows, and locked none."""
    keyring, version = one_row(
        other,
        "select k.id, e.version from rekey.keyrings k join rekey.encryption_keys e on e.keyring_id = k.id"
        " where k.name = 'default' and e.state = 'active'",
    )
    with ThreadPoolExecutor(1) as pool:
        # What the sweep asks for before it seals; without it, it would be somebody who destroys the version.
        other.execute("select pg_advisory_lock(%s, %s)", (keyring, version))
        try:
            swept = pool.submit(run, worker, seconds)
            waits(other, worker.info.backend_pid)
            yield
        finally:
            other.execute("select pg_advisory_unlock(%s, %s)", (keyring, version))
        swept.result(60)


def one_row(connection: Connection, query: LiteralString) -> tuple[Any, ...]:
    (row,) = connection.execute(query).fetchall()
    return tuple(row)


Deed = Callable[[Connection, str, dict[str, str]], None]


def write(connection: Connection, kind: str, model: dict[str, str]) -> None:
    """New values for some rows, whose old versions are pruned as soon as may be."""
    for key in ("1", "7", "40"):
        put(connection, kind, key, f"newer {key}")
        model[key] = f"newer {key}"
    clean(connection, kind)


def touch(connection: Connection, kind: str, _: dict[str, str]) -> None:
    """Another column of all rows, more than once, so that their pages are pruned and moved about."""
    for _time in range(3):
        connection.execute("update public.t set n = n + 1")
        clean(connection, kind)


def replace(connection: Connection, kind: str, model: dict[str, str]) -> None:
    """Rows that go, and others in their places."""
    connection.execute("delete from public.t where id <= 20")
    clean(connection, kind)
    for n in range(1, 21):
        del model[str(n)]
        put(connection, kind, str(n + 50), f"another {n}")
        model[str(n + 50)] = f"another {n}"
    clean(connection, kind)


def exchange(connection: Connection, kind: str, model: dict[str, str]) -> None:
    """Two rows that change their places, each with the value of its new key."""
    connection.execute("delete from public.t where id in (3, 4)")
    for key in ("4", "3"):
        put(connection, kind, key, f"exchanged {key}")
        model[key] = f"exchanged {key}"
    clean(connection, kind)


def take_back(connection: Connection, kind: str, _: dict[str, str]) -> None:
    """New values that are never committed."""
    with connection.transaction(force_rollback=True):
        for key in ("1", "2", "40"):
            put(connection, kind, key, "never")
    clean(connection, kind)


def move(connection: Connection, kind: str, model: dict[str, str]) -> None:
    """A row that goes to another partition, or under another key, with a value for it."""
    with connection.transaction():
        connection.execute("update public.t set id = 150 where id = 5")
        put(connection, kind, "150", "moved")
    model["150"] = "moved"
    del model["5"]
    clean(connection, kind)


def clean(connection: Connection, kind: str) -> None:
    connection.execute("vacuum public.t" if kind != "partitioned" else "vacuum public.t1, public.t2")


@pytest.mark.parametrize("deed", [write, touch, replace, exchange, take_back, move])
@pytest.mark.parametrize(
    ("table", "plan"),
    [*(("text", plan) for plan in PLANS), *((kind, "by pointer") for kind in TABLES if kind != "text")],
    indirect=["table"],
)
def test_what_came_in_between_is_kept(
    ready: Connection, session: Callable[[], Connection], table: str, deed: Deed, plan: str
) -> None:
    model = {str(n): f"value {n}" for n in range(1, ROWS + 1)}
    worker, other = session(), session()
    for setting in PLANS[plan]:
        worker.execute("select set_config(%s, 'off', false)", [setting])
    number = rotate(ready)
    with between(worker, other):
        deed(other, table, model)
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed", 0)
    check(ready, {}, columns={"public.t": model})


@pytest.mark.parametrize("plan", PLANS)
def test_secrets_that_came_in_between_are_kept(
    ready: Connection, session: Callable[[], Connection], plan: str
) -> None:
    model = {f"s{n}": f"value {n}" for n in range(ROWS)}
    for name, it in model.items():
        ready.execute("select rekey.set_secret(%s, %s)", (name, it))
    worker, other = session(), session()
    for setting in PLANS[plan]:
        worker.execute("select set_config(%s, 'off', false)", [setting])
    number = rotate(ready)
    with between(worker, other):
        for name in ("s0", "s5", "s39"):
            other.execute("select rekey.set_secret(%s, %s)", (name, "newer"))
            model[name] = "newer"
        other.execute("update rekey.secrets set description = 'touched' where name in ('s7', 's8')")
        other.execute("select rekey.delete_secret('s9')")
        del model["s9"]
        other.execute("vacuum rekey.secrets")
        other.execute("select rekey.set_secret('s99', 'in the place of s9')")
        model["s99"] = "in the place of s9"
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed", 0)
    check(ready, model)


def test_who_has_a_row_is_not_waited_for(
    ready: Connection, session: Callable[[], Connection], table: str
) -> None:
    worker, other, writer = session(), session(), session()
    number = rotate(ready)
    step_until(ready, "planned")
    with writer.transaction():
        writer.execute("update public.t set n = 1 where id = 1")
        with between(worker, other, "0.1 s"):
            writer.execute("update public.t set n = 1 where id = 3")
        # All but these two are done.
        assert rotation(ready, number, "rows_done") == ROWS - 2
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    model = {str(n): f"value {n}" for n in range(1, ROWS + 1)}
    check(ready, {}, columns={"public.t": model})


def test_a_writer_waits_for_no_cipher(
    ready: Connection, session: Callable[[], Connection], table: str
) -> None:
    """While a batch enciphers, its rows can be written."""
    worker, other = session(), session()
    rotate(ready)
    with between(worker, other):
        ready.execute("set lock_timeout = '1 s'")
        ready.execute("update public.t set n = 1")
        with pytest.raises(psycopg.errors.LockNotAvailable):  # but the table stays what it is
            ready.execute("alter table public.t add column m int")
    assert value(ready, "select count(*) from public.t") == ROWS


@pytest.mark.parametrize("plan", PLANS)
def test_a_batch_reads_no_values_but_its_own(ready: Connection, plan: str) -> None:
    """Values that are stored out of line are many blocks: those of other rows are left alone."""
    blocks: dict[int, int] = {}
    for number, rows in enumerate((600, 3000)):
        name = f"public.t{number}"
        ready.execute(f"create table {name} (id int primary key, v bytea)".encode())
        ready.execute(f"alter table {name} alter v set storage external".encode())
        protect(ready, name)
        ready.execute(
            f"insert into {name} select g, rekey.encrypt(repeat(md5(g::text), 100), context =>"
            f" array['{name}.v', g::text]) from generate_series(1, {rows}) g".encode()
        )
        ready.execute(f"vacuum analyze {name}".encode())
        rotate(ready)
        step_until(ready, "planned")
        for setting in PLANS[plan]:
            ready.execute("select set_config(%s, 'off', false)", [setting])
        row = ready.execute(
            "explain (analyze, buffers, format json) select event from rekey.rotation_step()"
        ).fetchone()
        assert row
        blocks[rows] = row[0][0]["Plan"]["Shared Hit Blocks"]
        for setting in PLANS[plan]:
            ready.execute("select set_config(%s, 'on', false)", [setting])
        run(ready)
    assert blocks[3000] < 1.5 * blocks[600], blocks


def test_a_batch_follows_its_pointers(ready: Connection) -> None:
    """A table of some thousand blocks is not read once more for each batch, to lock and to write its rows."""
    rows = 20_000
    ready.execute("create table public.t (id int primary key, v bytea)")
    protect(ready, "public.t")
    ready.execute(
        "insert into public.t select g, rekey.encrypt(repeat('x', 256), context =>"
        " array['public.t.v', g::text])"
        " from generate_series(1, %s) g",
        [rows],
    )
    ready.execute("vacuum analyze public.t")
    rotate(ready)
    step_until(ready, "planned")
    read: LiteralString = (
        "select coalesce(sum(seq_tup_read), 0) from pg_stat_xact_user_tables where relname = 't'"
    )
    with ready.transaction():
        before = value(ready, read)  # what was not reported yet
        assert value(ready, "select event from rekey.rotation_step()") == "batch"
        assert 0 < value(ready, read) - before <= rows
    run(ready)
