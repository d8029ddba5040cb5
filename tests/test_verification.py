"""Verification by chunks: every row is opened, whoever writes, rewrites, pauses or dies in between."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import pytest

from column_fixtures import protect
from driving import (
    FLIP,
    check,
    events,
    fill,
    on_versions,
    opened,
    read,
    rotate,
    rotation,
    run,
    step,
    step_until,
)
from helpers import Connection, value

pytest_plugins = ["column_fixtures"]

# So many that their table is verified by several chunks of 4 MB.
ROWS = 12_000
SIZE = 300
CHUNKS: LiteralString = "select kind, count(*) from rekey._chunks group by kind order by kind"
DAMAGE: LiteralString = """
    update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)
    where name = %s"""


def chunks(connection: Connection) -> dict[str, int]:
    return dict(connection.execute(CHUNKS).fetchall())


def verifying(connection: Connection) -> int:
    """Rotate until the chunks of the verification are there; return the rotation."""
    number = rotate(connection)
    step_until(connection, "swept")
    step_until(connection, "swept")  # the barrier
    assert step(connection)[0] == "planned"
    return number


def check_chunks(connection: Connection) -> int:
    """Take steps as long as chunks are left to check; return how many rows they had."""
    rows = 0
    while chunks(connection).get("verify"):
        event, _, checked, _ = step(connection)
        assert event == "checked"
        rows += checked
    return rows


def end(connection: Connection, number: int) -> tuple[str, int]:
    """Take the last step of a verification; return the rotation's state, and the rows in quarantine."""
    assert step(connection)[0] in ("completed", "verified")
    state, failed = rotation(connection, number, "state", "rows_failed")
    return state, failed


def failures(connection: Connection) -> list[str]:
    """Return the names of the secrets in quarantine."""
    found = connection.execute("""
        select s.name
        from rekey.failure_status f join rekey.secrets s on f.row_key = s.tenant_id || '/' || s.id
        where f.resolved_at is null order by 1""")
    return [name for (name,) in found]


@pytest.fixture
def model(ready: Connection) -> dict[str, str]:
    return fill(ready, ROWS, size=SIZE)


def test_every_row_is_checked_once(ready: Connection, model: dict[str, str]) -> None:
    number = verifying(ready)
    assert chunks(ready)["verify"] > 1
    assert check_chunks(ready) == ROWS
    event, _, rows, _ = step(ready)
    assert (event, rows) == ("completed", ROWS)
    assert rotation(ready, number, "state", "rows_done") == ("completed", ROWS)
    assert value(ready, "select count(*) from rekey._verified") == 0
    check(ready, model)


def test_values_that_are_stored_out_of_line(ready: Connection) -> None:
    """What matters is what they take, not how many rows there are."""
    model = fill(ready, 60, size=500_000)
    number = verifying(ready)
    assert chunks(ready)["verify"] > 1
    assert check_chunks(ready) == 60
    assert end(ready, number) == ("completed", 0)
    check(ready, model)


def test_workers_share_it(
    ready: Connection, session: Callable[[], Connection], model: dict[str, str]
) -> None:
    number = verifying(ready)
    workers = [session() for _ in range(3)]

    def work(worker: Connection) -> list[tuple[str, int]]:
        done = []
        while (row := step(worker))[0] != "idle":
            done.append((row[0], row[2]))
        return done

    with ThreadPoolExecutor(3) as pool:
        steps = [one for done in pool.map(work, workers) for one in done]
    assert sum(rows for event, rows in steps if event == "checked") == ROWS
    assert [event for event, _ in steps].count("completed") == 1
    assert rotation(ready, number, "state") == "completed"
    check(ready, model)


def test_a_row_that_was_damaged_before(ready: Connection, model: dict[str, str]) -> None:
    """Its range is opened again at the end, and nothing else is."""
    step_until_swept = rotate(ready)
    step_until(ready, "swept")
    ready.execute(DAMAGE, ("s7000",))
    step_until(ready, "swept")
    assert step(ready)[0] == "planned"
    check_chunks(ready)
    assert chunks(ready) == {"doubtful": 1}
    assert end(ready, step_until_swept) == ("completed_with_failures", 1)
    assert failures(ready) == ["s7000"]
    assert chunks(ready) == {}
    assert events(ready).count("rotation.row_failed") == 1


def test_a_row_that_heals(ready: Connection, model: dict[str, str]) -> None:
    number = rotate(ready)
    step_until(ready, "swept")
    ready.execute(FLIP)
    step_until(ready, "swept")
    step(ready)
    check_chunks(ready)
    ready.execute(FLIP)
    assert end(ready, number) == ("completed", 0)
    check(ready, model)


def test_a_row_that_is_damaged_after_its_chunk_was_checked(ready: Connection, model: dict[str, str]) -> None:
    number = verifying(ready)
    check_chunks(ready)
    ready.execute(DAMAGE, ("s1",))
    ready.execute(DAMAGE, (f"s{ROWS}",))
    assert end(ready, number) == ("completed_with_failures", 2)
    assert failures(ready) == ["s1", f"s{ROWS}"]


def test_a_transaction_that_began_before(
    ready: Connection, session: Callable[[], Connection], model: dict[str, str]
) -> None:
    """Its number is older than the verification, what it writes is not."""
    number = rotate(ready)
    step_until(ready, "swept")
    with session().transaction() as begun:
        begun.connection.execute("create temporary table numbered ()")
        with ready.transaction():
            ready.execute("create temporary table later ()")
        step_until(ready, "swept")
        assert step(ready)[0] == "planned"
        check_chunks(ready)
        begun.connection.execute(DAMAGE, ("s5",))
        with begun.connection.transaction():  # a subtransaction has a number of its own
            begun.connection.execute(DAMAGE, ("s6",))
    assert end(ready, number) == ("completed_with_failures", 2)
    assert failures(ready) == ["s5", "s6"]


def test_a_transaction_that_is_rolled_back(
    ready: Connection, session: Callable[[], Connection], model: dict[str, str]
) -> None:
    number = verifying(ready)
    other = session()
    other.execute("begin")
    other.execute(DAMAGE, ("s5",))
    assert check_chunks(ready) == ROWS
    other.execute("rollback")
    assert end(ready, number) == ("completed", 0)
    check(ready, model)


def test_rows_that_are_behind(ready: Connection, model: dict[str, str]) -> None:
    """What was checked before does not have to be checked again once they were swept."""
    ready.execute("create table held as select * from rekey.secrets where name in ('s1', 's9000')")
    number = verifying(ready)
    check_chunks(ready)
    ready.execute("""
        update rekey.secrets s set ciphertext = h.ciphertext from public.held h where h.id = s.id""")
    assert end(ready, number) == ("running", 0)
    assert on_versions(ready) == {1: 2, 2: ROWS - 2}
    ready.execute(DAMAGE, ("s2",))
    seen = step_until(ready, "idle")
    assert "checked" not in seen
    assert rotation(ready, number, "state", "rows_failed") == ("completed_with_failures", 1)
    assert on_versions(ready) == {2: ROWS}
    assert failures(ready) == ["s2"]
    ready.execute("select rekey.retry_rotation(%s)", (number,))
    assert step_until(ready, "idle").count("checked") > 1


def test_a_row_that_moves_to_where_was_looked_already(ready: Connection, model: dict[str, str]) -> None:
    """It keeps its transaction, and is not where a chunk would find it: the table has a new file."""
    ready.execute("create index by_length on rekey.secrets (length(name), name)")
    number = rotate(ready)
    step_until(ready, "swept")
    # At the end of the table, and by that index at its beginning.
    ready.execute("update rekey.secrets set name = '0' where ctid = (select max(ctid) from rekey.secrets)")
    ready.execute(DAMAGE, ("0",))
    block: LiteralString = "select rekey._block(ctid) from rekey.secrets where name = '0'"
    assert value(ready, block) > 1024
    step_until(ready, "swept")
    assert step(ready)[0] == "planned"
    left = chunks(ready)["verify"]
    while chunks(ready)["verify"] == left:
        assert step(ready)[0] == "checked"
    ready.execute("cluster rekey.secrets using by_length")
    assert value(ready, block) == 0
    check_chunks(ready)
    assert chunks(ready) == {"doubtful": left - 1}
    assert end(ready, number) == ("completed_with_failures", 1)
    assert failures(ready) == ["0"]


def test_a_step_that_is_broken_off(ready: Connection, model: dict[str, str]) -> None:
    number = verifying(ready)
    before = chunks(ready)
    for _ in range(3):
        with ready.transaction(force_rollback=True):
            assert step(ready)[0] == "checked"
    assert chunks(ready) == before
    assert check_chunks(ready) == ROWS
    assert end(ready, number) == ("completed", 0)


def test_it_keeps_to_the_throttle(ready: Connection, model: dict[str, str]) -> None:
    """To check four rows counts as much as to re-encrypt one."""
    number = verifying(ready)
    ready.execute("select rekey.set_setting('max_rows_per_second', '5000')")
    begun = time.monotonic()
    sizes = []
    while chunks(ready).get("verify"):
        event, _, rows, _ = step(ready)
        assert event in ("checked", "waiting")
        sizes.append(rows)
    assert sum(sizes) == ROWS
    assert max(sizes) == 1000
    # The last one owes nothing any more.
    assert time.monotonic() - begun > (ROWS - 1000) / 20_000
    assert end(ready, number) == ("completed", 0)


def test_paused_and_resumed(ready: Connection, model: dict[str, str]) -> None:
    """It leaves the verification, in which a chunk was checked without it, and begins a new one."""
    ready.execute("select rekey.create_keyring('other')")
    fill(ready, ROWS // 2, keyring="other", prefix="o", size=SIZE)
    ready.execute("select rekey.rotate_keys()")
    numbers = dict(ready.execute("select keyring, id from rekey.rotation_status").fetchall())
    step_until(ready, "swept")
    step_until(ready, "swept")
    assert step(ready)[0] == "planned"
    ready.execute("select rekey.pause_rotation(%s)", (numbers["other"],))
    assert check_chunks(ready) == ROWS
    ready.execute(DAMAGE, ("o7",))
    ready.execute("select rekey.resume_rotation(%s)", (numbers["other"],))
    seen = step_until(ready, "idle")
    assert "checked" in seen
    assert rotation(ready, numbers["default"], "state") == "completed"
    assert rotation(ready, numbers["other"], "state", "rows_failed") == ("completed_with_failures", 1)
    assert failures(ready) == ["o7"]
    assert value(ready, "select count(*) from rekey._verified") == 0


def test_superseded(ready: Connection, model: dict[str, str]) -> None:
    first = verifying(ready)
    assert step(ready)[0] == "checked"
    second = rotate(ready, supersede=True)
    run(ready)
    assert [rotation(ready, one, "state") for one in (first, second)] == ["superseded", "completed"]
    assert on_versions(ready) == {3: ROWS}
    check(ready, model)


def test_a_compromised_key_does_not_wait_for_it(ready: Connection, model: dict[str, str]) -> None:
    ready.execute("select rekey.create_keyring('other')")
    fill(ready, 100, keyring="other", prefix="o")
    number = verifying(ready)
    ready.execute("select rekey.mark_key_compromised('other', 1)")
    assert step(ready)[0] == "planned"
    assert step(ready)[0] == "batch"
    assert on_versions(ready, "other") == {2: 100}
    assert chunks(ready)["verify"] > 1
    run(ready)
    assert rotation(ready, number, "state") == "completed"


def test_an_error_in_a_chunk(
    ready: Connection, session: Callable[[], Connection], model: dict[str, str]
) -> None:
    number = verifying(ready)
    assert step(ready)[0] == "checked"
    left = chunks(ready)
    holder, worker = session(), session()
    worker.execute("set lock_timeout = '50 ms'")
    with holder.transaction():
        holder.execute("lock table rekey.secrets")
        assert step(worker)[0] == "error"
    assert rotation(ready, number, "state", "attempts") == ("verifying", 0)
    assert chunks(ready) == left
    assert value(ready, "select max(attempts) from rekey._chunks") == 1
    ready.execute("update rekey._chunks set next_attempt_at = null")
    assert step(ready)[0] == "checked"
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    check(ready, model)


TABLES: LiteralString = """
    create table parts (id int primary key, v text) partition by range (id);
    create table parts_1 partition of parts for values from (0) to (6000);
    create table parts_2 partition of parts for values from (6000) to (20000);
"""


@pytest.fixture
def parts(app: Connection) -> dict[str, str]:
    """A protected table of two partitions, each large; returns what it holds."""
    app.execute(TABLES)
    protect(app, "parts", encrypt_on_write=True)
    app.execute(
        "insert into parts select g, 'x' || g || repeat('.', %s) from generate_series(1, %s) g",
        (SIZE, ROWS),
    )
    return {str(n): f"x{n}" + "." * SIZE for n in range(1, ROWS + 1)}


def test_columns(ready: Connection, app: Connection, parts: dict[str, str]) -> None:
    number = verifying(ready)
    assert value(ready, "select count(*) from rekey._verified") == 2
    assert check_chunks(ready) == ROWS
    app.execute("alter table parts disable trigger all")
    app.execute("update parts set v = overlay(v placing 'AAAA' from 100) where id in (1, 7000)")
    app.execute("alter table parts enable trigger all")
    assert end(ready, number) == ("completed_with_failures", 2)
    found = ready.execute("select target, row_key from rekey.failure_status order by row_key").fetchall()
    assert found == [("app.parts.v", "1"), ("app.parts.v", "7000")]


def test_a_partition_that_comes_in_the_middle(
    ready: Connection, app: Connection, parts: dict[str, str]
) -> None:
    """It was not there when the verification began: all of it is opened."""
    app.execute("create table later (like parts_2 including all); insert into later select * from parts_2")
    app.execute("drop table parts_2")
    app.execute("update later set v = overlay(v placing 'AAAA' from 100) where id = 7000")
    number = verifying(ready)
    check_chunks(ready)
    app.execute("alter table parts attach partition later for values from (6000) to (20000)")
    state, failed = end(ready, number)
    assert (state, failed) == ("running", 1)  # its other rows are behind
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed_with_failures", 1)


def test_rows_that_are_hidden_for_a_while(ready: Connection, app: Connection, parts: dict[str, str]) -> None:
    """A chunk that was met while its table could not be read whole is opened at the end."""
    number = rotate(ready)
    step_until(ready, "swept")
    app.execute("alter table parts disable trigger all")
    app.execute("update parts set v = overlay(v placing 'AAAA' from 100) where id in (1, 7000)")
    app.execute("alter table parts enable trigger all")
    step_until(ready, "swept")
    assert step(ready)[0] == "planned"
    app.execute("alter table parts_1 force row level security")
    app.execute("alter table parts_1 enable row level security")
    check_chunks(ready)
    assert step(ready)[0] == "blocked"
    assert rotation(ready, number, "state") == "verifying"
    app.execute("alter table parts_1 no force row level security")
    app.execute("alter table parts_1 disable row level security")
    ready.execute("update rekey.rotations set next_attempt_at = null where id = %s", (number,))
    assert end(ready, number) == ("completed_with_failures", 2)


def test_functions_that_were_made_anew(ready: Connection, app: Connection, parts: dict[str, str]) -> None:
    """Nothing that was checked with the old ones counts."""
    number = verifying(ready)
    check_chunks(ready)
    since: LiteralString = (
        "select count(rekey._checked_since(v.verification_id, t))"
        " from rekey._verified v cross join lateral rekey._targets(v.target, v.relation) t"
    )
    assert value(ready, since) == 2
    app.execute("select rekey.protect_column('parts', 'v', encrypt_on_write => false)")
    assert value(ready, since) == 0
    assert end(ready, number) == ("completed", 0)
    assert opened(ready, "app.parts") == parts


def test_another_server(ready: Connection, model: dict[str, str]) -> None:
    """What a dump brings along says nothing of the server that it comes to."""
    number = verifying(ready)
    check_chunks(ready)
    since: LiteralString = (
        "select count(rekey._checked_since(v.verification_id, t))"
        " from rekey._verified v cross join lateral rekey._targets(v.target, v.relation) t"
    )
    assert value(ready, since) == 1
    for change in ("system_identifier = 1", "filenode = 1", "functions = ''"):
        with ready.transaction(force_rollback=True):
            ready.execute(f"update rekey._verified set {change}".encode())
            assert value(ready, since) == 0
    assert end(ready, number) == ("completed", 0)
    assert read(ready) == model


def test_a_host_that_hides_which_cluster_it_is(ready: Connection, model: dict[str, str]) -> None:
    ready.execute("revoke execute on function pg_control_system() from public")
    number = verifying(ready)
    assert check_chunks(ready) == ROWS
    assert chunks(ready) == {}
    assert end(ready, number) == ("completed", 0)


def test_what_the_caller_sees(ready: Connection, model: dict[str, str]) -> None:
    verifying(ready)
    event, keyrings, rows, detail = step(ready)
    assert (event, keyrings) == ("checked", 1)
    assert 0 < rows <= ROWS
    shown: dict[str, Any] = {name: type(it) for name, it in detail.items()}
    assert shown == {"verification": int, "target": str, "rotations": list, "seconds": float}


def test_the_last_step_keeps_the_pace_that_was_set(
    ready: Connection, session: Callable[[], Connection]
) -> None:
    model = fill(ready, 500)
    number = rotate(ready)
    step_until(ready, "swept")
    step_until(ready, "swept")  # nobody writes with an older version
    ready.execute("select rekey.set_setting('max_rows_per_second', '5')")
    worker = session()
    pid = worker.info.backend_pid
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(step, worker)
        until = time.monotonic() + 20
        asleep: LiteralString = "select wait_event from pg_stat_activity where pid = %s"
        while value(ready, asleep, pid) != "PgSleep":
            assert not last.done(), "it has not slept"
            assert time.monotonic() < until, "it does not sleep"
            time.sleep(0.01)
        assert value(ready, "select pg_cancel_backend(%s)", pid)
        assert last.result(20)[0] == "canceled"
    ready.execute("select rekey.set_setting('max_rows_per_second', null)")
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    check(ready, model)
