"""What an owner or a superuser can do to the audit log, and who finds out: as docs/security.md says."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, LiteralString, NamedTuple

import pytest

from cli_fixtures import Cli
from driving import events, refused
from helpers import Connection, connect, value
from pg_rekey import audit, release
from pg_rekey.errors import FINDINGS

pytest_plugins = ["cli_fixtures"]

OLD, ANCHORED, NEWER, END = 6, 8, 10, 12  # entries at a copy, at the anchor, at another copy, and at last
RECOMPUTE: LiteralString = """
    create function pg_temp.recompute(first bigint) returns void language plpgsql as $$
    declare
      v_entry rekey.audit_log;
      v_hash bytea := coalesce(
        (select a.hash from rekey.audit_log a where a.id = first - 1), sha256('pg_rekey/v1/audit'));
      v_id bigint := first - 1;
    begin
      for v_entry in select * from rekey.audit_log a where a.id >= first order by a.id loop
        v_id := v_id + 1;
        delete from rekey.audit_log a where a.id = v_entry.id;
        v_entry.id := v_id;
        v_entry.prev_hash := v_hash;
        v_entry.hash := rekey._audit_hash(v_entry);
        v_hash := v_entry.hash;
        insert into rekey.audit_log select v_entry.*;
      end loop;
      update rekey._audit_head set id = v_id, hash = v_hash;
    end $$;"""
EDIT = "update rekey.audit_log set actor = 'nobody' where id = {}"
CUT = "delete from rekey.audit_log where id > {}"
HEAD = "update rekey._audit_head h set id = a.id, hash = a.hash from rekey.audit_log a where a.id = {}"
RESTORE = """
    truncate rekey.audit_log; insert into rekey.audit_log select * from public.log_{0};
    update rekey._audit_head h set id = c.id, hash = c.hash from public.head_{0} c"""
TRUNCATE = "truncate rekey.audit_log"
DIFFERENT = "the log is not the one that was anchored"
SHORT = "the log ends before the anchor"
MISSING = "entries are missing at the end"
SIGNATURE = "the signature of the checkpoint is not right"


class Attack(NamedTuple):
    """Statements, then what verification says: without an anchor, with one, and with a signed one."""

    statements: str
    without: str | None
    anchored: str | None
    signed: str | None
    anchor: str = "right"


# By what docs/security.md calls it. None: nothing is found.
ATTACKS: dict[str, Attack] = {
    "nothing, or only the triggers were off": Attack("", None, None, None),
    "an entry was changed": Attack(EDIT.format(3), *["it was changed"] * 3),
    "an entry was removed in the middle": Attack(
        "delete from rekey.audit_log where id = 3", *["an entry is missing before it"] * 3
    ),
    "an entry was added, without the hashes after it": Attack(
        f"""insert into rekey.audit_log (id, at, actor, role, event, prev_hash, hash)
            select {END + 1}, now(), 'me', 'none', 'key.created', h.hash, sha256('x')
            from rekey._audit_head h""",
        *["it was changed"] * 3,
    ),
    "entries were removed at the end": Attack(CUT.format(OLD), *[MISSING] * 3),
    "all entries were removed": Attack(TRUNCATE, *[MISSING] * 3),
    "all entries were removed, and `rekey._audit_head` with them": Attack(
        f"{TRUNCATE}; delete from rekey._audit_head", None, SHORT, SHORT
    ),
    "the end was removed from before the anchor on, and `rekey._audit_head` changed to match": Attack(
        f"{CUT.format(OLD)}; {HEAD.format(OLD)}", None, SHORT, SHORT
    ),
    "only entries after the anchor were removed, and `rekey._audit_head` changed to match": Attack(
        f"{CUT.format(NEWER)}; {HEAD.format(NEWER)}", None, None, None
    ),
    "an entry before the anchor was changed, and all from there on computed anew": Attack(
        f"{EDIT.format(3)}; {RECOMPUTE} select pg_temp.recompute(3)", None, DIFFERENT, DIFFERENT
    ),
    "an entry after the anchor was changed, and all from there on computed anew": Attack(
        f"{EDIT.format(NEWER)}; {RECOMPUTE} select pg_temp.recompute({NEWER})", None, None, None
    ),
    "an older copy of the database was restored, from before the anchor": Attack(
        RESTORE.format(OLD), None, SHORT, SHORT
    ),
    "an older copy of the database was restored, from after the anchor": Attack(
        RESTORE.format(NEWER), None, None, None
    ),
    "everything was computed anew, and the anchor was changed to match": Attack(
        f"{EDIT.format(3)}; {RECOMPUTE} select pg_temp.recompute(3)", None, None, SIGNATURE, "changed"
    ),
    "everything was computed anew, and the anchor was signed anew with another key": Attack(
        f"{EDIT.format(3)}; {RECOMPUTE} select pg_temp.recompute(3)", None, None, SIGNATURE, "signed anew"
    ),
    "the anchor is that of another database": Attack("", None, DIFFERENT, DIFFERENT, "of another database"),
}
# How each gets past the triggers.
ACTORS: dict[str, LiteralString] = {
    "rekey_owner": (
        "set session authorization rekey_owner;"
        " alter table rekey.audit_log disable trigger audit_log_append_only"
    ),
    "superuser": "set session_replication_role = replica",
}


def grow(connection: Connection, entries: int) -> None:
    """Have something noted until the log is so long."""
    while (count := len(events(connection))) < entries:
        connection.execute("select rekey.set_setting('max_attempts', %s)", (str(100 + count),))


@pytest.fixture
def log(ready: Connection) -> dict[str, Any]:
    """A log with an anchor in its middle, which is returned, and two copies of it."""
    anchor: dict[str, Any] = {}
    for entries in (OLD, ANCHORED, NEWER, END):
        grow(ready, entries)
        if entries == ANCHORED:
            anchor = value(ready, "select rekey.audit_checkpoint()")
        ready.execute(
            f"create table public.log_{entries} as table rekey.audit_log;"
            f"create table public.head_{entries} as table rekey._audit_head".encode()
        )
    ready.execute("grant select on all tables in schema public to rekey_owner")
    return anchor


def seen(cli: Cli, *arguments: str | Path) -> str | None:
    """Return what `pg-rekey audit verify` finds, None where it finds nothing."""
    try:
        cli("audit", "verify", *arguments)
    except AssertionError:
        cli("audit", "verify", *arguments, code=FINDINGS)
        return (cli.out + cli.err).strip()
    return None


@pytest.mark.parametrize("actor", ACTORS)
@pytest.mark.parametrize("name", ATTACKS)
def test_who_finds_out(
    name: str,
    actor: str,
    log: dict[str, Any],
    ready: Connection,
    cli_ready: Cli,
    db: str,
    make_database: Callable[..., str],
    tmp_path: Path,
) -> None:
    attack = ATTACKS[name]
    with connect(db) as session:
        session.execute(ACTORS[actor])
        session.execute(attack.statements.encode())
        if actor == "rekey_owner":
            session.execute("alter table rekey.audit_log enable trigger audit_log_append_only")

    private, public = audit.generate()
    anchor, signed = dict(log), audit.sign(log, private)
    if attack.anchor == "of another database":
        with connect(make_database(os.environ["PG_REKEY_TEST_TEMPLATE"])) as other:
            other.execute("insert into rekey.settings default values")
            grow(other, ANCHORED)
            anchor = value(other, "select rekey.audit_checkpoint()")
        signed = audit.sign(anchor, private)
    elif attack.anchor != "right":
        anchor["hash"] = value(
            ready, "select encode(hash, 'hex') from rekey.audit_log where id = %s", log["id"]
        )
        assert anchor != log
        signed["checkpoint"] = anchor
        if attack.anchor == "signed anew":
            signed = audit.sign(anchor, audit.generate()[0])

    found: LiteralString = "select reason from rekey.verify_audit_log(%s)"
    assert value(ready, found, None) == attack.without
    assert value(ready, found, json.dumps(anchor)) == attack.anchored
    (tmp_path / "anchor").write_text(json.dumps(signed))
    key = tmp_path / "key.pub"
    key.write_text(public)
    checks: list[tuple[str | None, list[str | Path]]] = [
        (attack.without, []),
        (attack.signed, ["--anchor", tmp_path / "anchor", "--public-key", key]),
    ]
    for expected, arguments in checks:
        said = seen(cli_ready, *arguments)
        assert (said is None) == (expected is None)
        assert (expected or "") in (said or "")


def test_the_documentation_says_the_same() -> None:
    page = (release.ROOT / "docs" / "security.md").read_text()
    [table] = re.findall(r"(?m)^\| what happened \|[^\n]*\n\|[-|]*\n((?:\|[^\n]*\n)+)", page)
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    say = {True: "yes", False: "no"}
    assert cells == [
        [name, *(say[outcome is not None] for outcome in (attack.without, attack.anchored, attack.signed))]
        for name, attack in ATTACKS.items()
    ]


FORGED = [
    "forged entry 7: key destroyed by admin",
    "",
    "Census",
    None,
]


@pytest.mark.parametrize("duty", FORGED)
def test_an_operator_writes_nothing_of_his_own(ready: Connection, duty: str | None) -> None:
    before = events(ready)
    ready.execute("set role rekey_operator")
    with refused("22023"):
        ready.execute("select rekey._tick_duty(%s, now())", (duty,))
    ready.execute("reset role")
    assert events(ready) == before


@pytest.mark.parametrize("begun", ["infinity", "-infinity", "tomorrow", None])
def test_no_tick_began_in_the_future(ready: Connection, begun: str | None) -> None:
    ready.execute("set role rekey_operator")
    with refused("22023"):
        ready.execute("select rekey._tick_duty('end', %s)", (begun,))


def test_a_duty_that_fails_again_and_again_is_noted_once_a_minute(ready: Connection, db: str) -> None:
    """Also where its error is cleared in between, as an operator can."""
    ready.execute("select rekey.create_keyring('due')")
    ready.execute("select rekey.set_schedule('due', '1 day', now() - interval '1 s')")
    with connect(db) as holder, holder.transaction():
        holder.execute("select from rekey.keyrings for update")
        ready.execute("set role rekey_operator")
        ready.execute("set lock_timeout = '1ms'")
        for _ in range(5):
            ready.execute("select rekey._tick_duty('schedules', now())")
            ready.execute("select rekey._tick_duty('end', clock_timestamp())")
        ready.execute("reset role")
    assert events(ready).count("rotation.error") == 1


def test_a_login_with_sql_neither_writes_nor_holds_the_log(ready: Connection, db: str) -> None:
    """He may set the role authenticated, and with it everything that tells of a request."""
    ready.execute("select rekey.set_setting('jwt_admin_claim', 'key_admin')")
    before = events(ready)
    with connect(db) as session, session.transaction(force_rollback=True):
        session.execute("grant execute on function public.rotate_keys, rekey._rpc_change to rekey_app")
        session.execute("set local role rekey_app")
        session.execute("set local request.method = 'POST'")
        for n in range(3):
            claims = {"sub": str(n), "app_metadata": {"key_admin": True}}
            session.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps(claims),))
            assert value(session, "select public.rotate_keys() ->> 'code'") == "42501"
        ready.execute("set lock_timeout = '2s'")
        ready.execute("select rekey.set_setting('max_attempts', '7')")
    assert events(ready) == [*before, "setting.changed"]


def test_a_refusal_does_not_wait_for_who_holds_the_log(ready: Connection, db: str) -> None:
    with connect(db) as holder, holder.transaction():
        holder.execute("select from rekey._audit_head for update")
        ready.execute("select rekey._note_denied('{}')")
    assert "access.denied" not in events(ready)
    ready.execute("select rekey._note_denied('{}')")
    assert "access.denied" in events(ready)


def test_refusals_of_all_callers_are_limited_too(ready: Connection) -> None:
    for n in range(70):
        ready.execute("select rekey._note_denied(jsonb_build_object('client', %s::text))", (str(n),))
    assert events(ready).count("access.denied") == 60
