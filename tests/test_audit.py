"""The audit log: what it says, that it cannot be changed, and that a change past its triggers is found."""

import itertools
import json
from typing import Any, LiteralString

import pytest
from psycopg import IsolationLevel

from driving import check, events, refused, rotate, run
from helpers import Connection, connect, unlock, value

VERIFY: LiteralString = "select valid, first_bad, reason from rekey.verify_audit_log(%s)"


def verify(connection: Connection, anchor: object = None) -> tuple[bool, int | None, str | None]:
    """Return what verify_audit_log says: valid, first_bad, reason."""
    text = None if anchor is None else json.dumps(anchor)
    row = connection.execute(VERIFY, (text,)).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


@pytest.fixture
def log(ready: Connection) -> Connection:
    """`ready` with ten entries or more in its log."""
    rotate(ready)
    run(ready)
    ready.execute("select rekey.set_setting('max_attempts', '5')")
    return ready


def test_the_chain_holds(log: Connection) -> None:
    before = value(log, "select count(*) from rekey.audit_log")
    assert before >= 10
    assert verify(log) == (True, None, None)
    assert value(log, "select entries from rekey.verify_audit_log()") == before
    anchor = value(log, "select rekey.audit_checkpoint()")
    assert (anchor["id"], anchor["entries"], anchor["database"]) == (before, before, log.info.dbname)
    assert verify(log, anchor) == (True, None, None)
    rotate(log)
    assert verify(log, anchor) == (True, None, None)
    assert [id for (id,) in log.execute("select id from rekey.audit_log order by id")] == list(
        range(1, len(events(log)) + 1)
    )


def test_an_empty_log(conn: Connection) -> None:
    anchor = value(conn, "select rekey.audit_checkpoint()")
    assert (anchor["id"], anchor["entries"]) == (0, 0)
    assert verify(conn, anchor) == (True, None, None)


# What a superuser may do past the triggers, and what verification says: without an anchor, and with one.
NOTHING = (True, None, None)
CHANGED = (False, 5, "it was changed")
UNANCHORED = (False, 10, "the log is not the one that was anchored")
REWRITE = """
    do $$
    declare v_entry rekey.audit_log; v_hash bytea := sha256('pg_rekey/v1/audit'); v_id bigint := 0;
    begin
      for v_entry in select * from rekey.audit_log order by id loop
        v_id := v_id + 1;
        delete from rekey.audit_log where id = v_entry.id;
        v_entry.id := v_id;
        v_entry.prev_hash := v_hash;
        v_entry.hash := rekey._audit_hash(v_entry);
        v_hash := v_entry.hash;
        insert into rekey.audit_log select v_entry.*;
      end loop;
      update rekey._audit_head set id = v_id, hash = v_hash;
    end $$"""
INSERT = """insert into rekey.audit_log (id, at, actor, role, event, prev_hash, hash)
    select {}, now(), 'me', 'none', 'key.created', h.hash, sha256('x') from rekey._audit_head h"""
TAMPERING: dict[str, tuple[str, Any, Any]] = {
    **{
        f"{column} changed": (f"update rekey.audit_log set {column} = {new} where id = 5", CHANGED, CHANGED)
        for column, new in {
            "at": "at + interval '1 microsecond'",
            "actor": "'somebody'",
            "role": "'rekey_admin'",
            "jwt_subject": "''",
            "event": "'key.destroyed'",
            "keyring": "coalesce(keyring, '') || 'x'",
            "version": "coalesce(version, 0) + 1",
            "rotation_id": "coalesce(rotation_id, 0) + 1",
            "details": """'{"reason": "x"}'""",
        }.items()
    },
    "hash changed": ("update rekey.audit_log set hash = sha256('x') where id = 5", CHANGED, CHANGED),
    "prev_hash changed": (
        "update rekey.audit_log set prev_hash = sha256('x') where id = 5",
        (False, 5, "it does not follow from the entry before it"),
        (False, 5, "it does not follow from the entry before it"),
    ),
    "one deleted": (
        "delete from rekey.audit_log where id = 5",
        (False, 6, "an entry is missing before it"),
        (False, 6, "an entry is missing before it"),
    ),
    "the first deleted": (
        "delete from rekey.audit_log where id = 1",
        (False, 2, "an entry is missing before it"),
        (False, 2, "an entry is missing before it"),
    ),
    "cut": (
        "delete from rekey.audit_log where id >= 8",
        (False, 8, "entries are missing at the end"),
        (False, 8, "entries are missing at the end"),
    ),
    "emptied": (
        "delete from rekey.audit_log",
        (False, 1, "entries are missing at the end"),
        (False, 1, "entries are missing at the end"),
    ),
    "one inserted at the end": (
        INSERT.format("(select max(id) + 1 from rekey.audit_log)"),
        (False, 11, "it was changed"),
        (False, 11, "it was changed"),
    ),
    "one inserted before the first": (
        INSERT.format("0"),
        (False, 0, "an entry is missing before it"),
        (False, 0, "an entry is missing before it"),
    ),
    "two exchanged": (
        "update rekey.audit_log a set details = b.details, event = b.event,"
        " keyring = b.keyring, version = b.version"
        " from rekey.audit_log b where (a.id, b.id) in ((5, 6), (6, 5))",
        CHANGED,
        CHANGED,
    ),
    "cut, and the head with it": (
        "delete from rekey.audit_log where id >= 8;"
        "update rekey._audit_head h set id = 7, hash = a.hash from rekey.audit_log a where a.id = 7",
        NOTHING,
        (False, 8, "the log ends before the anchor"),
    ),
    "emptied, and the head with it": (
        "delete from rekey.audit_log; delete from rekey._audit_head",
        NOTHING,
        (False, 1, "the log ends before the anchor"),
    ),
    "changed and computed anew": (
        "update rekey.audit_log set actor = 'somebody' where id = 5;" + REWRITE,
        NOTHING,
        UNANCHORED,
    ),
    "one deleted, and computed anew": (
        "delete from rekey.audit_log where id = 5;" + REWRITE,
        NOTHING,
        (False, 10, "the log ends before the anchor"),
    ),
}


def test_tampering(ready: Connection) -> None:
    rotate(ready)
    while (count := len(events(ready))) < 10:
        ready.execute("select rekey.set_setting('max_attempts', %s)", (str(100 + count),))
    assert count == 10
    anchor = value(ready, "select rekey.audit_checkpoint()")
    for name, (statements, without, anchored) in TAMPERING.items():
        with ready.transaction(force_rollback=True):
            ready.execute("set local session_replication_role = replica")
            ready.execute(statements.encode())
            assert verify(ready) == without, name
            assert verify(ready, anchor) == anchored, name
    assert verify(ready, anchor) == NOTHING


def test_nothing_is_taken_out(log: Connection) -> None:
    before = log.execute("select * from rekey.audit_log order by id").fetchall()
    roles: list[LiteralString] = ["none", "rekey_owner", "rekey_admin", "rekey_auditor"]
    statements: list[LiteralString] = [
        "update rekey.audit_log set actor = actor",
        "update rekey.audit_log set actor = actor where false",
        "delete from rekey.audit_log",
        "delete from rekey.audit_log where id = 1",
        "truncate rekey.audit_log",
    ]
    for role, statement in itertools.product(roles, statements):
        log.execute("set role " + role)
        with refused("42501"):
            log.execute(statement)
    log.execute("reset role")
    assert log.execute("select * from rekey.audit_log order by id").fetchall() == before


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
def test_an_old_snapshot_does_not_fork_the_chain(
    ready: Connection, db: str, kek: bytes, level: IsolationLevel
) -> None:
    with connect(db) as other:
        unlock(other, kek)
        other.isolation_level = level
        with refused("40001"), other.transaction():
            other.execute("select 1 from rekey.settings")
            ready.execute("select rekey.create_keyring('a')")
            other.execute("select rekey.create_keyring('b')")
        with other.transaction():
            other.execute("select rekey.create_keyring('b')")
    check(ready, {})


def test_entries_say_who(ready: Connection) -> None:
    query: LiteralString = "select actor, role, jwt_subject from rekey.audit_log order by id desc limit 1"
    ready.execute("select rekey.create_keyring('a')")
    assert ready.execute(query).fetchone() == ("postgres", "none", None)
    ready.execute("set role rekey_admin")
    ready.execute("select rekey.create_keyring('b')")
    assert ready.execute(query).fetchone() == ("postgres", "rekey_admin", None)
    for claims, subject in [
        ('{"sub": "4711", "role": "service_role"}', "4711"),
        ('{"role": "anon"}', None),
        ('["sub"]', None),
        ("no json", None),
        ("", None),
    ]:
        ready.execute("select set_config('request.jwt.claims', %s, false)", (claims,))
        ready.execute("select rekey.set_schedule('a', '1 day')")
        assert ready.execute(query).fetchone() == ("postgres", "rekey_admin", subject)
    ready.execute("reset role")
    check(ready, {})


def test_time_zone_and_format_do_not_matter(log: Connection) -> None:
    settings: list[LiteralString] = [
        "set timezone = 'Asia/Kathmandu'",
        "set datestyle = 'German'",
        "set bytea_output = 'escape'",
        "set intervalstyle = 'iso_8601'",
        "set extra_float_digits = -5",
        "set lc_messages = 'C'",
    ]
    for setting in settings:
        log.execute(setting)
        assert verify(log) == NOTHING
    log.execute("select rekey.create_keyring('a')")
    log.execute("reset all")
    assert verify(log) == NOTHING


def test_what_is_no_anchor(conn: Connection) -> None:
    anchors: list[object] = [
        {},
        [],
        "x",
        1,
        {"id": 1},
        {"id": -1, "hash": "0" * 64},
        {"id": "1e3", "hash": "0" * 64},
        {"id": 10**18, "hash": "0" * 64},
        {"id": None, "hash": "0" * 64},
        {"id": 1, "hash": "0" * 63},
        {"id": 1, "hash": "0" * 65},
        {"id": 1, "hash": "G" * 64},
        {"id": 1, "hash": "A" * 64},
        {"id": 1, "hash": None},
    ]
    for anchor in anchors:
        with refused("22023"):
            verify(conn, anchor)


def test_who_may_verify(log: Connection) -> None:
    for role, may in {
        "rekey_auditor": True,
        "rekey_operator": True,
        "rekey_admin": True,
        "rekey_app": False,
    }.items():
        log.execute(f"set role {role}".encode())
        if may:
            assert verify(log) == NOTHING
            assert value(log, "select rekey.audit_checkpoint() ->> 'id'") > "0"
        else:
            with refused("42501"):
                verify(log)
            with refused("42501"):
                log.execute("select rekey.audit_checkpoint()")
            with refused("42501"):
                log.execute("select * from rekey.audit_log")
        log.execute("reset role")


def test_entries_are_bounded(ready: Connection) -> None:
    """Nobody fills the log with a few entries, whatever he may write into them."""
    ready.execute(
        "select set_config('request.jwt.claims', jsonb_build_object('sub', repeat('é', 100000))::text, false)"
    )
    rotate(ready, reason="x" * 1_000_000)
    ready.execute(
        "select rekey._note_denied(jsonb_build_object('client', repeat('€', 99999), 'more', %s::jsonb))",
        (json.dumps([{"a": "b" * 50}] * 999),),
    )
    # A second one is still taken for the same caller, though only a part of him is kept.
    ready.execute("select rekey._note_denied(jsonb_build_object('client', repeat('€', 99999)))")
    ready.execute(
        "select rekey._note_denied((select jsonb_object_agg('k' || n, n) from generate_series(1, 9999) n))"
    )
    sizes = """
        select max(octet_length(details::text)) as details, max(octet_length(jwt_subject)) as subject,
          count(*) filter (where event = 'access.denied') as denied
        from rekey.audit_log where event in ('access.denied', 'rotation.requested')"""
    [(details, subject, denied)] = ready.execute(sizes).fetchall()
    assert details < 16 * 1024
    assert subject <= 255
    assert denied == 2
    assert value(
        ready, "select details ->> 'reason' from rekey.audit_log where event = 'rotation.requested'"
    ) == ("x" * 1021 + "...")
    assert verify(ready) == NOTHING


@pytest.mark.parametrize("text", ["", "a", "a" * 100, "é" * 50, "é" * 51, "a" + "€" * 40, "𐍈" * 26])
def test_what_is_cut_has_at_most_so_many_bytes(conn: Connection, text: str) -> None:
    cut = value(conn, "select rekey._cut(%s, 100)", text)
    assert len(cut.encode()) <= 100
    assert cut == text or (text.startswith(cut.removesuffix("...")) and cut.endswith("..."))
    assert (cut == text) == (len(text.encode()) <= 100)
    assert value(conn, "select rekey._cut(null, 100)") is None
