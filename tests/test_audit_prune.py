"""Old entries of the audit log leave it for a file, and nothing else does; both together verify."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import IsolationLevel

from cli_fixtures import Cli
from driving import events, refused, rotate, run, waits
from helpers import Connection, connect, value
from pg_rekey import audit
from pg_rekey.errors import FINDINGS, USAGE
from test_audit import verify
from test_audit_attacks import RECOMPUTE as FROM_THE_FIRST
from test_audit_attacks import grow

pytest_plugins = ["cli_fixtures"]

PRUNE: LiteralString = "select rekey.prune_audit_log(%s, %s, %s, %s, %s)"
# From where entries were removed, too.
RECOMPUTE = FROM_THE_FIRST.replace("sha256('pg_rekey/v1/audit')", "(rekey._audit_start()).hash")
KEPT = ("key.", "kek.", "audit.pruned")


def age(connection: Connection, first: int, last: int, years: int = 4) -> None:
    """Let entries be as old as if they had been written then, and the chain computed with it."""
    with connection.transaction():
        connection.execute("set local session_replication_role = replica")
        connection.execute(
            "update rekey.audit_log set at = at - make_interval(years => %s) where id between %s and %s",
            (years, first, last),
        )
        connection.execute(RECOMPUTE.encode())
        connection.execute("select pg_temp.recompute(%s)", (first,))
        connection.execute("drop function pg_temp.recompute")
    assert verify(connection) == (True, None, None)


class Log:
    """A log whose entries 1 to `last` are old; a key that signs; what prune is given."""

    def __init__(self, connection: Connection, cli: Cli, folder: Path) -> None:
        self.connection, self.cli, self.folder = connection, cli, folder
        self.last = len(events(connection))
        age(connection, 1, self.last)
        grow(connection, self.last + 5)
        cli("audit", "keygen", folder / "signer")
        self.key, self.public = folder / "signer", folder / "signer.pub"

    def export(self, name: str = "first") -> Path:
        self.cli("audit", "export", self.folder / name, "--key", self.key)
        return self.folder / name

    def entry(self, number: int) -> dict[str, Any]:
        """Return an entry as a checkpoint has it."""
        return {"id": number, "hash": hash_of(self.connection, number)}

    def anchor(self, checkpoint: dict[str, Any]) -> Path:
        """Sign a checkpoint."""
        path = self.folder / f"anchor-{checkpoint['id']}"
        path.write_text(json.dumps(audit.sign(checkpoint, self.key.read_text())))
        return path

    def prune(self, file: Path, **options: Any) -> str:
        return self.cli("audit", "prune", file, "--public-key", self.public, "--yes", **options)

    def verify(self, *files: Path, anchor: Path | None = None, code: int = 0) -> str:
        arguments = [one for file in files for one in ("--archive", file)]
        if anchor:
            arguments += ["--anchor", anchor, "--public-key", self.public]
        return self.cli("audit", "verify", *arguments, code=code)

    def arguments(self, last: int | None = None) -> list[Any]:
        """Return arguments that are right for the function."""
        last = last or self.last
        checkpoint = value(self.connection, "select rekey.audit_checkpoint()")
        signed = audit.sign(checkpoint, self.key.read_text())
        return [1, last, hash_of(self.connection, last), "0" * 64, json.dumps(signed)]

    def second(self) -> Path:
        """Let time go by after a removal, and export again."""
        rotate(self.connection)
        run(self.connection)
        age(self.connection, self.last + 1, max(self.ids()))
        grow(self.connection, len(self.ids()) + 2)
        return self.export("second")

    def ids(self) -> list[int]:
        return [id for (id,) in self.connection.execute("select id from rekey.audit_log order by id")]


def hash_of(connection: Connection, entry: int) -> str:
    return str(value(connection, "select encode(hash, 'hex') from rekey.audit_log where id = %s", entry))


def tamper(connection: Connection, statement: str) -> None:
    with connection.transaction():
        connection.execute("set local session_replication_role = replica")
        connection.execute(statement.encode())


@pytest.fixture
def log(ready: Connection, cli_ready: Cli, tmp_path: Path) -> Log:
    rotate(ready)
    run(ready)
    return Log(ready, cli_ready, tmp_path)


def test_what_goes_and_what_stays(log: Log) -> None:
    before = dict(log.connection.execute("select id, event from rekey.audit_log"))
    file = log.export()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "entries removed" in log.prune(file)
    assert log.connection.info.dbname in log.cli.err
    after = dict(log.connection.execute("select id, event from rekey.audit_log"))
    new = max(after)
    assert after.pop(new) == "audit.pruned"
    gone = before.keys() - after.keys()
    assert gone == {id for id, event in before.items() if id <= log.last and not event.startswith(KEPT)}
    assert gone
    assert len(after) + len(gone) == len(before)
    details = value(log.connection, "select details from rekey.audit_log where id = %s", new)
    assert (details["first"], details["last"], details["removed"]) == (1, log.last, len(gone))
    assert details["checkpoint"]["algorithm"] == "Ed25519"
    assert verify(log.connection) == (True, None, None)
    assert "--archive" in log.verify()
    assert "in files" in log.verify(file)
    rotate(log.connection)
    assert "whole" in log.verify(file)
    assert value(log.connection, "select max(id) from rekey.audit_log") > new


def test_a_second_removal(log: Log) -> None:
    first = log.export()
    oldest = log.anchor(log.entry(3))
    log.prune(first)
    second = log.second()
    middle = log.anchor(log.entry(log.last + 3))
    log.prune(second)
    assert events(log.connection).count("audit.pruned") == 2
    assert verify(log.connection) == (True, None, None)
    for anchor in (oldest, middle):
        assert "holds the anchor" in log.verify(second, first, anchor=anchor)
    assert "is not given" in log.verify(second, code=FINDINGS)
    assert "is not given" in log.verify(first, code=FINDINGS)
    # The first removal cannot be denied: its entry stays, and the second one tells of it.
    tamper(
        log.connection,
        "delete from rekey.audit_log"
        " where id = (select min(id) from rekey.audit_log where event = 'audit.pruned')",
    )
    valid, _, reason = verify(log.connection)
    assert not valid
    assert reason
    assert "those that stayed" in reason


def test_an_older_anchor_asks_for_the_file(log: Log) -> None:
    old, cut = log.entry(3), log.entry(log.last)
    signed = log.anchor(old)
    file = log.export()
    log.prune(file)
    assert verify(log.connection, cut) == (True, None, None)
    valid, _, reason = verify(log.connection, old)
    assert not valid
    assert reason
    assert "file" in reason
    assert "file" in log.verify(anchor=signed, code=FINDINGS)
    assert "holds the anchor" in log.verify(file, anchor=signed)
    for entry in (old, cut):
        valid, _, reason = verify(log.connection, entry | {"hash": "0" * 64})
        assert not valid
    signed = log.anchor(old | {"hash": "0" * 64})
    assert "anchored" in log.verify(file, anchor=signed, code=FINDINGS)


FIRST = "id = (select min(id) from rekey.audit_log)"
LAST = "id = (select max(id) from rekey.audit_log)"
TAMPERED = {
    "a kept entry changed": f"update rekey.audit_log set actor = 'me' where {FIRST}",
    "a kept entry changed, and its hash computed anew": f"""
        update rekey.audit_log set actor = 'me' where {FIRST};
        update rekey.audit_log a set hash = rekey._audit_hash(a) where {FIRST}""",
    "a kept entry removed": f"delete from rekey.audit_log where {FIRST}",
    "an entry that was removed is back": f"""
        insert into rekey.audit_log
        select (jsonb_populate_record(a, '{{"id": 2, "event": "rotation.failed"}}')).*
        from rekey.audit_log a where {LAST};
        update rekey.audit_log a set hash = rekey._audit_hash(a) where id = 2""",
    "an entry removed after them": "delete from rekey.audit_log where event = 'setting.changed'",
    "the removal denied": "delete from rekey.audit_log where event = 'audit.pruned'",
    "the removal changed": f"""
        update rekey.audit_log set details = details || '{{"last": 3}}' where {LAST}""",
    "the removal spoilt": f"""
        update rekey.audit_log set details = details || '{{"last": "x"}}' where {LAST}""",
    "another removal": f"""
        insert into rekey.audit_log
        select (jsonb_populate_record(a, jsonb_build_object('id', a.id + 1))).*
        from rekey.audit_log a where {LAST}""",
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_is_changed_afterwards_is_found(log: Log, name: str) -> None:
    file = log.export()
    log.prune(file)
    tamper(log.connection, TAMPERED[name])
    assert verify(log.connection)[0] is False
    log.verify(file, code=FINDINGS)


def test_a_file_that_was_changed_is_found(log: Log) -> None:
    file = log.export()
    log.prune(file)
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    for changed in (
        text.replace('"actor":"postgres"', '"actor":"nobody"', 1),
        "".join(lines[:-1]),
        "".join([lines[0], *lines[2:]]),
        "".join([lines[0].replace('"exported_by":"', '"exported_by":"x'), *lines[1:]]),
        text[:-20],
        "",
        "[]",
        '{"format":"pg_rekey audit archive, format 1"}',
        "\xff",
    ):
        other = log.folder / "changed"
        other.write_text(changed, encoding="latin-1" if changed == "\xff" else "utf-8")
        log.verify(other, code=FINDINGS)
    log.verify(file, file)
    log.verify(log.folder / "none", code=USAGE)


def test_prune_refuses_what_is_no_right_file(log: Log, ready: Connection) -> None:
    before = events(ready)
    unsigned = log.folder / "unsigned"
    log.cli("audit", "export", unsigned)
    log.prune(unsigned, code=1)
    assert "no signed checkpoint" in log.cli.err
    file = log.export()
    log.cli("audit", "keygen", log.folder / "other")
    log.cli("audit", "prune", file, "--public-key", log.folder / "other.pub", "--yes", code=FINDINGS)
    log.cli("audit", "prune", file, "--public-key", log.public, code=1, stdin="n\n")
    changed = log.folder / "changed"
    changed.write_text(file.read_text().replace('"actor":"postgres"', '"actor":"nobody"', 1))
    log.prune(changed, code=FINDINGS)
    newer = log.folder / "newer"
    log.cli("audit", "export", newer, "--key", log.key, "--until", "9999-12-31")
    log.prune(newer, code=1)
    assert "audit_keep" in log.cli.err
    assert events(ready) == before
    log.prune(file)
    log.prune(file, code=1)
    assert "removed already" in log.cli.err
    log.cli("audit", "export", log.folder / "nothing", "--key", log.key, code=1)
    assert not (log.folder / "nothing").exists()


def test_the_function_refuses(log: Log, ready: Connection) -> None:
    right = log.arguments()
    wrong: list[tuple[str, dict[int, Any]]] = [
        ("RK006", {0: 2}),
        ("RK006", {0: 2, 1: 3, 2: hash_of(ready, 3)}),
        ("RK006", {1: log.last + 1, 2: hash_of(ready, log.last + 1)}),
        ("22023", {2: "0" * 64}),
        ("22023", {2: "x"}),
        ("22023", {2: None}),
        ("22023", {3: "x"}),
        ("22023", {3: None}),
        ("22023", {1: 10**6}),
        ("22023", {1: 0}),
        ("22023", {0: None}),
        ("22023", {4: None}),
        ("22023", {4: "{}"}),
        ("22023", {4: json.dumps(json.loads(right[4]) | {"signature": ""})}),
        ("22023", {4: json.dumps({"checkpoint": {"id": 3, "hash": "0" * 64}, "signature": "x"})}),
        ("RK006", {4: json.dumps({"checkpoint": {"id": log.last, "hash": "0" * 64}, "signature": "x"})}),
        # Measured from the checkpoint, whose entry is as old as the others.
        ("RK006", {4: json.dumps({"checkpoint": {"id": log.last, "hash": right[2]}, "signature": "x"})}),
        ("22023", {4: json.dumps(json.loads(right[4]) | {"more": "x" * 1000})}),
    ]  # fmt: skip
    before = events(ready)
    for code, changes in wrong:
        with refused(code):
            ready.execute(PRUNE, [changes.get(place, one) for place, one in enumerate(right)])
    tamper(ready, "update rekey.audit_log set actor = 'me' where id = 2")
    with refused("RK006"):
        ready.execute(PRUNE, right)
    tamper(ready, "update rekey.audit_log set actor = 'postgres' where id = 2")
    assert events(ready) == before
    assert value(ready, PRUNE, *right) > 0


def test_nothing_is_removed_where_all_of_it_stays(log: Log, ready: Connection) -> None:
    first = value(ready, "select event from rekey.audit_log where id = 1")
    assert first.startswith("kek.")
    with refused("RK006"):
        ready.execute(PRUNE, log.arguments(1))


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
def test_an_old_snapshot_removes_nothing(log: Log, db: str, level: IsolationLevel) -> None:
    with connect(db) as other:
        other.isolation_level = level
        with refused("25001"), other.transaction():
            other.execute(PRUNE, log.arguments())


def test_who_may(log: Log, ready: Connection, db: str) -> None:
    """A right of its own: no role of pg_rekey has it, and none can grant it."""
    right = log.arguments()
    grant: LiteralString = "grant execute on function rekey.prune_audit_log to rekey_operator"
    for role in ("rekey_admin", "rekey_auditor", "rekey_operator", "rekey_app"):
        ready.execute(f"set role {role}".encode())
        with refused("42501"):
            ready.execute(PRUNE, right)
        with refused("42501"):
            ready.execute("update rekey._audit_head set pruning = pg_current_xact_id()")
        with refused("42501"):
            ready.execute(grant)
        ready.execute("reset role")
    ready.execute("create role rekey_archivist_test login in role rekey_auditor")
    try:
        ready.execute("grant execute on function rekey.prune_audit_log to rekey_archivist_test")
        with connect(db, user="rekey_archivist_test") as archivist:
            with refused("42501"):
                archivist.execute("delete from rekey.audit_log where id = 2")
            assert value(archivist, PRUNE, *right) > 0
            assert value(ready, "select actor from rekey.audit_log order by id desc limit 1") == (
                "rekey_archivist_test"
            )
    finally:
        ready.execute("drop owned by rekey_archivist_test; drop role rekey_archivist_test")


def test_the_permission_to_delete_ends_with_the_removal(log: Log, ready: Connection) -> None:
    """Nothing else can be removed in its transaction, nor by a setting that anybody can set."""
    delete: LiteralString = "delete from rekey.audit_log where id = (select max(id) from rekey.audit_log)"
    with ready.transaction(force_rollback=True):
        ready.execute(PRUNE, log.arguments())
        with refused("42501"), ready.transaction():
            ready.execute(delete)
    ready.execute(PRUNE, log.arguments())
    for name in ("rekey.pruning", "rekey.sweeping"):
        ready.execute("select set_config(%s, 'on', false)", (name,))
    with refused("42501"):
        ready.execute(delete)
    assert value(ready, "select pruning from rekey._audit_head") is None


def test_killed_while_it_removes(log: Log, ready: Connection, db: str) -> None:
    before, file = log.ids(), log.export()
    arguments = log.arguments()
    with connect(db) as holder, connect(db) as pruner, ThreadPoolExecutor() as pool:
        with holder.transaction():
            holder.execute(
                "select from rekey.audit_log where id <= %s and not rekey._is_kept(event)"
                " order by id desc limit 1 for update",
                (log.last,),
            )
            killed = value(pruner, "select pg_backend_pid()")
            removal = pool.submit(pruner.execute, PRUNE, arguments)
            waits(ready, killed)
            ready.execute("select pg_terminate_backend(%s, 60000)", (killed,))
        with pytest.raises(psycopg.OperationalError):
            removal.result()
    assert log.ids() == before
    assert value(ready, "select pruning from rekey._audit_head") is None
    log.prune(file)
    assert "whole" in log.verify(file)


def test_two_at_once_remove_once(log: Log, ready: Connection, db: str) -> None:
    right = log.arguments()
    with connect(db) as other:
        with other.transaction():
            assert value(other, PRUNE, *right) > 0
            ready.execute("set lock_timeout = '100ms'")
            with refused("55P03"):
                ready.execute(PRUNE, right)
        ready.execute("reset lock_timeout")
        with refused("RK006"):
            ready.execute(PRUNE, right)
    assert events(ready).count("audit.pruned") == 1


def test_export_until_a_day(log: Log) -> None:
    file = log.folder / "until"
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    document = log.cli.json("audit", "export", file, "--until", day)
    assert (document["first"], document["last"]) == (1, log.last)
    header, *entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert header["checkpoint"] is None
    assert [entry["id"] for entry in entries] == list(range(1, log.last + 1))
    log.cli("audit", "export", file, "--until", day, code=1)
    log.cli("audit", "export", log.folder / "x", "--until", "2000-01-01", code=1)


def test_entries_are_kept_for_a_year_at_least(log: Log, ready: Connection) -> None:
    for keep in ("360 days", "1 day", "-3 years", "200 years", "11 months", "364 days 23:59:59"):
        with refused("22023"):
            ready.execute("select rekey.set_setting('audit_keep', %s)", (keep,))
    for keep in ("1 year", "365 days", "100 years"):
        ready.execute("select rekey.set_setting('audit_keep', %s)", (keep,))
    with refused("RK006"):
        ready.execute(PRUNE, log.arguments())
