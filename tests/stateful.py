"""A random walk against a live server, beside a model that knows what every call must answer.

`prove()` walks for minutes; test_stateful.py walks a little. A walk is replayed from its seed.
"""

import base64
import contextlib
import copy
import functools
import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, LiteralString, Self

import psycopg
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import helpers
from driving import NIL, refused
from helpers import Connection, connect, create_database, drop_database, install, unlock, value
from pg_rekey import local, release

A, B = "0000000a-0000-0000-0000-00000000000a", "0000000b-0000-0000-0000-00000000000b"
UNDER_WAY = {"queued", "running", "paused", "verifying", "failed"}
CLOSED = {"disabled", "destroy_scheduled", "destroyed"}  # opens nothing for callers
DEAD = {"disabled", "destroyed"}  # nor for the sweep
MAX_ATTEMPTS = 3
EXAMPLES, STEPS = 10, 50  # of one seed

# Where the work of one step can bring a rotation. (Of an adoption in line, state is queued or paused.)
IN_LINE, PAUSED_IN_LINE = "in line", "paused in line"
EDGES = {
    IN_LINE: {"queued", "running", "failed"},
    "queued": {"running", "failed"},
    "running": {"verifying", "failed"},
    "verifying": {"running", "completed", "completed_with_failures", "failed"},
}

REACHED = {state for states in EDGES.values() for state in states}
ENDED = {"completed", "completed_with_failures"}

# What a JWT says, and whom it lets an application reach.
CLAIMS: dict[str, tuple[str, set[str]]] = {
    "none": ("", {NIL}),
    "a": (json.dumps({"app_metadata": {"tenant_id": A}}), {A}),
    "both": (json.dumps({"app_metadata": {"tenant_ids": [A, B]}}), {A, B}),
    "nobody": (json.dumps({"sub": A}), set()),
    "garbage": ("no json", set()),
}

SETUP: LiteralString = """
    create role stateful_owner login in role rekey_admin, rekey_app;
    create role stateful_app login in role rekey_app;
    grant set on parameter session_replication_role to stateful_owner;
    create schema app authorization stateful_owner;
    set role stateful_owner;
    grant usage on schema app to stateful_app;
    create table app.notes (id integer primary key, v bytea);      -- the application encrypts
    create table app.letters (id integer primary key, v text);     -- a trigger does
    grant select on app.notes to stateful_app;
    create table app.parts (id integer primary key, v bytea) partition by list (id);
    create table app.parts_1 partition of app.parts for values in (1);
    create table app.parts_2 partition of app.parts for values in (2);
    create table app.parts_3 partition of app.parts for values in (3);
    grant select on app.parts to stateful_app;
    create function app.put_part(id integer, v bytea) returns void language plpgsql as $$
    begin
      execute format('insert into app.parts_%s values ($1, $2)
        on conflict (id) do update set v = excluded.v', id) using id, v;
    end $$;
    select rekey.protect_column('app.notes', 'v');
    select rekey.protect_column('app.parts', 'v');
    select rekey.protect_column('app.letters', 'v', encrypt_on_write => true);
    create table app.names (id integer primary key, v text);  -- searched for
    select rekey.protect_column('app.names', 'v', encrypt_on_write => true);
    select rekey.make_searchable('app.names', 'v');
    create unique index on app.names (v_bidx);
    create table app.copies (t text, b bytea, j jsonb);  -- nobody told pg_rekey of it
    create table app.ran (who text);  -- by whom the owner's code was run
    create function app.run() returns trigger language plpgsql as $$
    begin
      insert into app.ran values (current_user);
      return null;
    end $$;
    create table app.broken (code text);
    create function app.break_down() returns trigger language plpgsql as $$
    begin
      if exists (select from app.broken) and current_setting('rekey.sweeping', true) = 'on' then
        raise exception 'out of order' using errcode = (select code from app.broken);
      end if;
      return new;
    end $$;
    create trigger break_down before update on app.notes for each row execute function app.break_down();
    create table app.fired (kind text);  -- by sweeps
    create function app.fire() returns trigger language plpgsql as $$
    begin
      if current_setting('rekey.sweeping', true) = 'on' then
        insert into app.fired values (tg_argv[0]);
      end if;
      return null;
    end $$;
    create trigger fire after update on app.parts for each row execute function app.fire('parts');
    create trigger fire after update on app.letters for each row execute function app.fire('letters');
    reset role;
    -- It is empty: nothing is left to be filled.
    update rekey._blind_indexes set filled = true, refill = false;
    delete from rekey.rotations;
"""

SILENCE: LiteralString = """
    select rekey.protect_column('app.parts', 'v', fire_triggers => false);
    select rekey.protect_column('app.letters', 'v', encrypt_on_write => true, fire_triggers => false);
"""

ROWS: LiteralString = """
    select 'secret', tenant_id::text, name, tenant_id || '/' || id, ciphertext from rekey.secrets
    union all select 'notes', '', id::text, id::text, v from app.notes
    union all select 'parts', '', id::text, id::text, v from (
      table app.parts_1 union all table app.parts_2 union all table app.parts_3) p
    union all select 'letters', '', id::text, id::text, convert_to(v, 'UTF8') from app.letters
    union all select 'names', '', id::text, id::text, convert_to(v, 'UTF8') from app.names"""
KEYS: LiteralString = """
    select k.name, k.id, k.tenant_id::text, k.retired_at is not null, e.version, e.state,
      e.kek_id || ':' || encode(substr(e.wrapped_key, 12, 16), 'hex')
    from rekey.keyrings k join rekey.encryption_keys e on e.keyring_id = k.id order by 1, 5"""
ROTATIONS: LiteralString = """
    select r.id, k.name,
      case when r.in_line then replace(r.state || ' in line', 'queued ', '') else r.state end,
      r.trigger, r.from_versions, r.to_version, r.previous_version,
      r.rows_total, r.rows_done, r.rows_failed, r.attempts, r.passes
    from rekey.rotations r join rekey.keyrings k on k.id = r.keyring_id order by r.id"""
FAILURES: LiteralString = """
    select f.id, k.name, f.target, f.row_key, f.version, f.rotation_id, f.resolution
    from rekey.rotation_failures f join rekey.keyrings k on k.id = f.keyring_id"""
AUDIT: LiteralString = """
    select event, keyring, version, rotation_id, id,
      case event when 'rotation.row_failed' then (details ->> 'rows')::integer else 1 end
    from rekey.audit_log where id > %s order by id"""
TARGETS = {
    "rekey.secrets": "secret",
    "app.notes.v": "notes",
    "app.letters.v": "letters",
    "app.names.v": "names",
    "app.parts.v": "parts",
}

# What has the names of pg_cron, which is not here.
PLANT: LiteralString = """
    create schema cron;
    create table cron.job (jobid bigint, command text, database text);
    create table cron.job_run_details (command text, end_time timestamptz);
    create trigger run after delete on cron.job_run_details for each statement execute function app.run();
    grant usage on schema cron to public;
    grant all on all tables in schema cron to public"""

# What people do to tables, without a word to pg_rekey.
REBUILD: LiteralString = """
    create table app.notes_new (like app.notes including all);
    grant select on app.notes_new to stateful_app;
    insert into app.notes_new select * from app.notes;"""
SWAP: LiteralString = f"""{REBUILD}
    alter table app.notes rename to notes_old;
    alter table app.notes_new rename to notes;"""
ASTRAY: dict[str, LiteralString] = {
    "swapped": SWAP,
    "emptied": f"{SWAP} truncate app.notes_old",
    "recreated": f"{REBUILD} drop table app.notes cascade; alter table app.notes_new rename to notes",
    "forced": "alter table app.notes force row level security",
    "detached": "alter table app.parts detach partition app.parts_2",
}
BREAK_DOWN: LiteralString = (
    "create trigger break_down before update on app.notes for each row execute function app.break_down()"
)
REBIND: LiteralString = f"select rekey.rebind_column('app.notes', 'v'); {BREAK_DOWN}"
MENDED: dict[str, LiteralString] = {
    "swapped": """
        truncate app.notes_old;
        insert into app.notes_old select * from app.notes;
        drop table app.notes;
        alter table app.notes_old rename to notes""",
    "emptied": f"{REBIND}; drop table app.notes_old",
    "recreated": REBIND,
    "forced": "alter table app.notes no force row level security",
    "detached": "alter table app.parts attach partition app.parts_2 for values in (2)",
}
REBOUND = {"emptied", "recreated"}

Place = tuple[str, str, str]  # kind, tenant, name


def kek(number: int) -> bytes:
    return hashlib.sha256(b"stateful %d" % number).digest()


@dataclass
class Key:
    """A key version. due: how far its destruction is away: 'now', 'day', 'later'; scheduled: which step."""

    state: str = "active"
    scheduled_from: str = ""
    scheduled: int = 0
    due: str = ""
    touched: int = 0


@dataclass
class Ring:
    """A keyring. due: whether its schedule is; None: it has none."""

    name: str
    tenant: str
    number: int = 0
    keys: dict[int, Key] = field(default_factory=lambda: {1: Key()})
    retired: bool = False
    due: bool | None = None

    @property
    def active(self) -> int:
        return next((version for version, key in self.keys.items() if key.state == "active"), 0)


@dataclass
class Rotation:
    """A rotation; its number is not known before the server was looked at."""

    ring: str
    trigger: str
    sources: list[int]
    target: int
    previous: int | None
    state: str = "queued"
    number: int = 0
    done: int = 0
    attempts: int = 0
    passes: int = 0
    adopts: str = ""

    @property
    def under_way(self) -> bool:
        return self.state in UNDER_WAY

    @property
    def in_line(self) -> bool:
        return self.state in (IN_LINE, PAUSED_IN_LINE)

    def again(self) -> None:
        self.state, self.attempts = IN_LINE if self.adopts else "queued", 0


@dataclass(frozen=True)
class Envelope:
    """What stands in a row, and how the quarantine calls the row."""

    raw: bytes
    row_key: str

    @property
    def ring(self) -> int:
        return int.from_bytes(self.raw[3:7])

    @property
    def version(self) -> int:
        return int.from_bytes(self.raw[7:11])

    @property
    def iv(self) -> bytes:
        return self.raw[11:27]


@dataclass(frozen=True)
class Held:
    """A ciphertext that a client keeps."""

    envelope: Envelope
    ring: str
    context: tuple[str, ...]
    value: str


@dataclass
class World:
    """What is committed."""

    rings: dict[str, Ring] = field(default_factory=dict)
    values: dict[Place, str] = field(default_factory=dict)
    rows: dict[Place, Envelope] = field(default_factory=dict)
    corrupt: set[Place] = field(default_factory=set)
    plain: dict[Place, str] = field(default_factory=dict)  # what is no envelope yet
    kek: int = 1
    step: int = 0

    def ring_of(self, envelope: Envelope) -> Ring:
        return next(ring for ring in self.rings.values() if ring.number == envelope.ring)

    def state_of(self, envelope: Envelope) -> str:
        return self.ring_of(envelope).keys[envelope.version].state

    def on(self, ring: Ring) -> dict[Place, Envelope]:
        return {place: row for place, row in self.rows.items() if row.ring == ring.number}

    def sweepable(self, place: Place) -> bool:
        return place not in self.corrupt and self.state_of(self.rows[place]) not in DEAD

    def opens(self, place: Place) -> bool:
        return place not in self.corrupt and self.state_of(self.rows[place]) not in CLOSED


@dataclass
class Session:
    """A connection, and what it has: KEKs by number, and the tenants that it reaches (None: all)."""

    connection: Connection
    keks: set[int] = field(default_factory=set)
    reaches: set[str] | None = None

    def may(self, tenant: str) -> bool:
        return self.reaches is None or tenant in self.reaches

    def unlock(self, *numbers: int) -> None:
        unlock(self.connection, *map(kek, numbers))
        self.keks = set(numbers)


@dataclass
class Writer(Session):
    """A session with an open transaction: what it wrote, which versions it keeps in use, what it sees."""

    open: bool = False
    past: World | None = None
    wrote: dict[Place, str | None] = field(default_factory=dict)
    fresh: set[Place] = field(default_factory=set)
    locks: set[tuple[str, int]] = field(default_factory=set)


class Lab:
    """A server that may be killed, with a template of the databases that are walked on."""

    def __init__(self) -> None:
        self.server = local.Server(settings={"autovacuum": "off"})
        self.count = 0
        self.template = "template_stateful"
        template = create_database(self.server.dsn(), self.template)
        install(template, release.assemble("plain"))
        with connect(template) as connection:
            helpers.initialize(connection, kek(1))
            connection.execute(SETUP)
            connection.execute("select rekey.create_keyring('a', %s)", (A,))
            connection.execute("select rekey.set_setting('max_attempts', %s)", (str(MAX_ATTEMPTS),))
            connection.execute("update rekey._worker set last_tick_at = now()")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def clone(self, template: str | None = None) -> str:
        """Return the name of a new copy of a database to which nobody is connected."""
        self.count += 1
        create_database(self.server.dsn(), f"walk_{self.count}", template or self.template)
        with connect(self.server.dsn()) as connection:
            # Else PostgreSQL takes the sequences of the copy for logged ahead, and a crash turns them back.
            connection.execute("checkpoint")
            connection.execute(f"grant create on database walk_{self.count} to stateful_owner".encode())
        return f"walk_{self.count}"

    def break_product(self, flaw: str) -> None:
        """Let all walks be on a product that some SQL broke, to see whether that is found."""
        self.template = self.clone()
        with self.connect(self.template) as connection:
            connection.execute(flaw.encode())

    def connect(self, database: str, user: str | None = None) -> Connection:
        """Connect; a lock that another session of the walk holds is not waited for."""
        return connect(self.server.dsn(database, user), options="-c lock_timeout=50ms")


def move(when: Callable[[Any], bool] | None = None, **drawn: Any) -> Callable[..., Any]:
    """Make a rule of a method, and count it."""

    def decorate(method: Callable[..., None]) -> Any:
        @functools.wraps(method)
        def counted(self: "Walk", **arguments: Any) -> None:
            self.tally[method.__name__] += 1
            self.now.step += 1
            method(self, **arguments)

        make: Any = rule(**drawn)
        made = make(counted)
        return precondition(when)(made) if when else made

    return decorate


ringnames = st.sampled_from(["default", "default", "default", "a", "b", "nowhere"])
tenants = st.sampled_from([NIL, NIL, A, B])
names = st.sampled_from(["s1", "s2", "s3", "s4"])
versions = st.sampled_from([1, 1, 2, 2, 3, 4])
ids = st.sampled_from(["1", "2", "3"])
sides = st.sampled_from(["admin", "admin", "app"])
nth = st.integers(0, 3)


class Walk(RuleBasedStateMachine):
    """The rules, and what must hold after each of them."""

    lab: ClassVar[Lab]
    tally: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.tally["(walks)"] += 1
        self.database = self.lab.clone()
        self.now = World(rings={"default": Ring("default", NIL), "a": Ring("a", A)})
        self.kek_ids = {1: 1}
        self.rotations: list[Rotation] = []
        self.failures: dict[int, tuple[Any, ...]] = {}
        self.held: list[Held] = []
        self.ivs: dict[tuple[int, int, bytes], bytes] = {}
        self.wraps: dict[str, tuple[str, int]] = {}
        self.edges: dict[str, set[str]] = {}  # what this rule may have moved
        self.written: set[Place] = set()  # and written
        self.adopting: set[str] = set()  # and adopted
        self.silent = False  # whether sweeps fire no triggers
        self.expected: list[tuple[str, str | None, int | None, Rotation | None]] = []
        self.broken = self.was_broken = self.noted = False
        self.astray = ""  # what became of a table
        self.strays: set[Place] = set()  # what was stored in it since
        self.copies: list[Envelope] = []  # in app.copies
        self.may_be: list[tuple[str, str | None, int | None, int | None]] = []  # as expected
        self.claims = "none"
        self.open_sessions()
        self.audited = value(self.eye, "select max(id) from rekey.audit_log")
        for name, number in self.eye.execute("select name, id from rekey.keyrings"):
            self.now.rings[name].number = number

    @initialize(silent=st.booleans())
    def let_triggers_fire(self, silent: bool) -> None:
        self.silent = silent
        if silent:
            with self.lab.connect(self.database, "stateful_owner") as owner:
                owner.execute(SILENCE)
            self.audited = value(self.eye, "select max(id) from rekey.audit_log")

    def open_sessions(self) -> None:
        """Connect; whatever was open before is lost."""
        with contextlib.ExitStack() as opened:  # the server may go away in between
            eye, admin, app, *writers = (
                opened.enter_context(self.lab.connect(self.database, user))
                for user in (None, None, "stateful_app", None, None)
            )
            self.eye, self.admin, self.app = eye, Session(admin), Session(app)
            self.writers = [Writer(connection) for connection in writers]
            unlock(self.eye, kek(self.now.kek))
            self.admin.unlock(self.now.kek)
            self.carry_claims(self.claims)
            opened.pop_all()

    def close_sessions(self) -> None:
        for connection in (self.eye, *(s.connection for s in (self.admin, self.app, *self.writers))):
            connection.close()

    def teardown(self) -> None:
        self.close_sessions()
        drop_database(self.lab.server.dsn(), self.database)

    # What the model knows

    def call(self, session: Session, code: str | None, query: LiteralString, *parameters: Any) -> Any:
        """Execute a statement that must end with this SQLSTATE, or succeed; return its rows."""
        answer, problem = None, None
        try:
            cursor = session.connection.execute(query, parameters)
            answer = cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            problem = error
        assert (problem and problem.sqlstate) == code, f"{query}: {problem} instead of {code}"
        return answer

    def expect(self, event: str, ring: str | None, version: int | None, it: Rotation | None = None) -> None:
        self.expected.append((event, ring, version, it))

    def without_kek(self, session: Session) -> str | None:
        return "RK001" if not session.keks else None if self.now.kek in session.keks else "RK002"

    def holder(self, place: Place, me: Session | None = None) -> str:
        """How another session holds a row: it wrote one that is there ('row'), or a new one ('new')."""
        for writer in self.writers:
            if writer is not me and place in writer.wrote:
                return "new" if place in writer.fresh else "row"
        return ""

    def current(self, ring: str) -> Rotation | None:
        """The rotation of a keyring that is under way."""
        return next((it for it in self.rotations if it.ring == ring and it.under_way), None)

    def pick(self, place: int) -> Rotation | None:
        """One of the last rotations; None: one that there is not."""
        return self.rotations[-1 - place] if place < len(self.rotations) else None

    def waits(self, it: Rotation) -> bool:
        """Whether a step finds something to do for a rotation."""
        return it.state in EDGES and not (it.state == IN_LINE and self.current(it.ring))

    def store(self, place: Place, text: str) -> None:
        self.now.values[place] = text
        self.now.plain.pop(place, None)
        self.now.corrupt.discard(place)
        self.written.add(place)
        # Of a table that went astray, what other keyrings put into it afterwards is not known of.
        if self.is_guarded(place):
            self.strays.discard(place)
        else:
            self.strays.add(place)

    def remove(self, place: Place) -> None:
        self.now.values.pop(place, None)
        self.now.plain.pop(place, None)
        self.now.corrupt.discard(place)
        self.now.rows.pop(place, None)

    def begin(self, ring: Ring, trigger: str) -> Rotation:
        """What rotate_keys does to a keyring."""
        if under_way := self.current(ring.name):
            under_way.state = "superseded"
        previous = ring.active
        self.become(ring, previous, "decrypt_only")
        ring.keys[target := max(ring.keys) + 1] = Key(touched=self.now.step)
        it = self.queue(ring, trigger, previous)
        self.expect("rotation.requested", ring.name, target, it)
        self.expect("key.created", ring.name, target, it)
        self.expect("key.deactivated", ring.name, previous, it)
        self.expect("key.activated", ring.name, target, it)
        return it

    def is_adopted(self, kind: str) -> bool:
        return any(it.adopts == kind and (it.under_way or it.in_line) for it in self.rotations)

    def queue(self, ring: Ring, trigger: str, previous: int | None = None) -> Rotation:
        target = ring.active
        sources = [v for v, key in sorted(ring.keys.items()) if v != target and key.state != "destroyed"]
        self.rotations.append(it := Rotation(ring.name, trigger, sources, target, previous))
        return it

    def become(self, ring: Ring, version: int, state: str) -> None:
        ring.keys[version].state = state
        ring.keys[version].touched = self.now.step

    def in_use(self, ring: Ring, version: int) -> bool:
        """Whether a rotation, an open transaction, a row or the quarantine needs a version."""
        it = self.current(ring.name)
        return bool(
            self.astray
            or (it and version in (*it.sources, it.target))
            or any((ring.name, version) in writer.locks for writer in self.writers)
            or any(row.version == version for row in self.now.on(ring).values())
            or any(f[:1] == (ring.name,) and f[3] == version and f[5] is None for f in self.failures.values())
        )

    # Values

    @move(side=sides, tenant=tenants, name=st.one_of(names, st.just("")), ring=ringnames)
    def set_secret(self, side: str, tenant: str, name: str, ring: str) -> None:
        session, it = self.side(side), self.now.rings.get(ring)
        place, text = ("secret", tenant, name), self.text()
        code = (
            "42501"
            if not session.may(tenant)
            else "RK007"
            if it is None
            else "42501"
            if it.tenant not in (tenant, NIL)
            else "22023"
            if not name
            else "55P03"
            if self.holder(place) == "row"
            else "RK006"
            if it.retired
            else self.without_kek(session) or ("55P03" if self.holder(place) else None)
        )
        self.call(session, code, "select rekey.set_secret(%s, %s, %s, %s)", name, text, tenant, ring)
        if code is None:
            self.store(place, text)

    @move(side=sides, tenant=tenants, name=names)
    def get_secret(self, side: str, tenant: str, name: str) -> None:
        session, place = self.side(side), ("secret", tenant, name)
        code = (
            "42501"
            if not session.may(tenant)
            else "RK007"
            if place not in self.now.values
            else self.opening(session, self.now, place)
        )
        found = self.call(session, code, "select rekey.get_secret(%s, %s)", name, tenant)
        assert code or found == [(self.now.values[place],)], found

    @move(side=sides, tenant=tenants)
    def read_secrets(self, side: str, tenant: str) -> None:
        session = self.side(side)
        there = {place: text for place, text in self.now.values.items() if place[1] == tenant}
        if session.may(tenant) and not there:
            return  # whether the KEK is asked for is up to the planner
        code = "42501" if not session.may(tenant) else self.without_kek(session)
        code = code or (None if all(map(self.now.opens, there)) else "RK003")
        found = self.call(session, code, "select * from rekey.read_secrets(null, %s)", tenant)
        assert code or dict(found) == {place[2]: text for place, text in there.items()}, found

    @move(side=sides, tenant=tenants, name=names)
    def delete_secret(self, side: str, tenant: str, name: str) -> None:
        session, place = self.side(side), ("secret", tenant, name)
        code = (
            "42501"
            if not session.may(tenant)
            else "55P03"
            if place in self.now.values and self.holder(place)
            else None
        )
        found = self.call(session, code, "select rekey.delete_secret(%s, %s)", name, tenant)
        if code is None:
            assert found == [(place in self.now.values,)]
            self.remove(place)

    @move(side=sides, ring=ringnames, label=st.sampled_from([*TARGETS, "free", "secret"]), number=ids)
    def encrypt(self, side: str, ring: str, label: str, number: str) -> None:
        session, it, text = self.side(side), self.now.rings.get(ring), self.text()
        code = (
            "RK007"
            if it is None
            else "42501"
            if label == "secret"
            or not session.may(it.tenant)
            or (label == "app.letters.v" and session is self.app)
            else "RK006"
            if it.retired
            else self.without_kek(session)
        )
        context = (label, number)
        found = self.call(session, code, "select rekey.encrypt(%s, %s, %s)", text, ring, list(context))
        if code is None:
            envelope = Envelope(found[0][0], "")
            self.new_envelope(envelope)
            self.held = [*self.held[-7:], Held(envelope, ring, context, text)]

    @move(lambda self: self.held, side=sides, place=nth, wrong=st.sampled_from([False, False, True]))
    def decrypt_what_was_held(self, side: str, place: int, wrong: bool) -> None:
        session, held = self.side(side), self.held[place % len(self.held)]
        code = (
            "42501"
            if not session.may(self.now.rings[held.ring].tenant)
            or (held.context[0] == "app.letters.v" and session is self.app)
            else self.without_kek(session)
            or ("RK006" if self.now.state_of(held.envelope) in CLOSED else "RK003" if wrong else None)
        )
        context = [*held.context, *(["more"] if wrong else [])]
        found = self.call(session, code, "select rekey.decrypt_text(%s, %s)", held.envelope.raw, context)
        assert code or found == [(held.value,)]

    @move(lambda self: self.held, place=nth, number=ids)
    def store_what_was_held(self, place: int, number: str) -> None:
        """As a client does that encrypted before a rotation, and stores after it."""
        held = self.held[place % len(self.held)]
        kind = TARGETS.get(held.context[0])
        if kind in ("notes", "parts"):
            target = (kind, "", held.context[1])
            doomed = self.now.state_of(held.envelope) == "destroy_scheduled"
            code = "RK006" if doomed and self.is_guarded(target) else None
            self.call(self.admin, code, PUT[kind], held.context[1], held.envelope.raw)
        else:
            target = ("letters", "", number)
            code = self.letter_refuses(self.admin, held, number) or ("55P03" if self.holder(target) else None)
            self.call(self.admin, code, PUT_LETTER, number, as_text(held.envelope))
        if code is None:
            self.store(target, held.value)

    @move(lambda self: self.now.rows, place=st.integers(0, 20), form=st.sampled_from(["t", "b", "j"]))
    def copy_somewhere(self, place: int, form: str) -> None:
        """Into a table that no registry knows; it keeps its version from destruction, and nothing else."""
        row = sorted(self.now.rows.items())[place % len(self.now.rows)][1]
        value: object = row.raw
        if form != "b":
            value = as_text(row) if form == "t" else json.dumps({"kept": ["see", as_text(row)]})
        self.call(self.admin, None, COPY[form], value)
        self.copies.append(row)

    @move(lambda self: self.copies)
    def drop_copies(self) -> None:
        self.call(self.admin, None, "truncate app.copies")
        self.copies = []

    def is_copied(self, ring: Ring, version: int) -> bool:
        return any((row.ring, row.version) == (ring.number, version) for row in self.copies)

    @move(
        lambda self: not self.has_writer() and not self.astray and not self.broken and not self.is_searched(),
        number=ids,
    )
    def a_snapshot_meets_a_destruction(self, number: str) -> None:
        """It shows envelopes that are gone, copies them, and then they are found.

        Where rows are searched for, the rotation would wait for it.
        """
        ring = self.now.rings["default"]
        self.write_row(number=number, kind="letters")
        self.holds()
        place: Place = ("letters", "", number)
        self.a_writer_begins(level="repeatable read")
        writer, seen, before = self.writer(False), self.now.rows.get(place), ring.active
        self.rotate(ring="default", supersede=False)
        self.run()
        self.schedule_destruction(ring="default", version=before, wait="0 s")
        self.tick(days=True, jumped=False)
        self.holds()
        self.eye.execute(
            "update rekey.encryption_keys set destroy_after = now() where state = 'destroy_scheduled'"
        )
        if seen:
            writer.connection.execute(
                "insert into app.copies (t) select v from app.letters where id = %s", (number,)
            )
            self.copies.append(seen)
        self.a_writer_ends(which=False, commits=True)
        self.tick(days=True, jumped=False)

    @move(lambda self: not self.has_writer() and not self.astray and not self.broken, number=ids)
    def a_client_meets_a_scheduled_destruction(self, number: str) -> None:
        """It encrypted before the rotation, and stores when nothing may stand on the version any more."""
        before = self.now.rings["default"].active
        self.encrypt(side="admin", ring="default", label="app.notes.v", number=number)
        self.holds()
        self.rotate(ring="default", supersede=False)
        self.run()
        self.holds()
        self.schedule_destruction(ring="default", version=before, wait="45 days")
        if self.held:
            self.store_what_was_held(place=len(self.held) - 1, number=number)

    def is_guarded(self, place: Place) -> bool:
        """Whether the triggers of its column are on the table of a row."""
        kind, _, number = place
        without = {"swapped": "notes", "emptied": "notes", "recreated": "notes"}
        return without.get(self.astray) != kind and (self.astray, number) != ("detached", "2")

    @move(number=ids, kind=st.sampled_from(["notes", "letters", "letters", "names", "names", "parts"]))
    def write_row(self, number: str, kind: str) -> None:
        place: Place = (kind, "", number)
        text = self.text()
        code = "RK006" if self.now.rings["default"].retired else self.without_kek(self.admin)
        code = code or ("55P03" if self.holder(place) else None)
        if kind == "letters":
            self.call(self.admin, code, PUT_LETTER, number, text)
        elif kind == "names":
            code = code or ("RK006" if self.is_closed_to_searches() else None)
            self.call(self.admin, code, PUT_NAME, number, text)
        elif kind == "notes":
            self.call(self.admin, code, ENCRYPT_NOTE, number, text, number)
        else:
            self.call(self.admin, code, ENCRYPT_PART, number, text, number)
        if code is None:
            self.store(place, text)

    @move(place=nth, number=ids, plain=st.booleans(), locked=st.booleans())
    def a_subscription_applies(self, place: int, number: str, plain: bool, locked: bool) -> None:
        """In the replica role an envelope is taken as it comes, without KEK, and plaintext never."""
        letters = [held for held in self.held if held.context[0] == "app.letters.v"]
        text = said = self.text()
        if not plain:
            if not letters:
                return
            held = letters[place % len(letters)]
            number, text, said = held.context[1], held.value, as_text(held.envelope)
        if locked:
            self.call(self.admin, None, "select rekey.lock()")
            self.admin.keks = set()
        target: Place = ("letters", "", number)
        if not plain and self.now.state_of(held.envelope) != "destroyed":
            code = "RK006" if self.now.state_of(held.envelope) == "destroy_scheduled" else None
        elif plain:
            code = "RK006" if self.now.rings["default"].retired else self.without_kek(self.admin)
        else:
            code = self.letter_refuses(self.admin, held, number)
        code = code or ("55P03" if self.holder(target) else None)
        self.call(self.admin, None, "set session_replication_role = replica")
        self.call(self.admin, code, PUT_LETTER, number, said)
        self.call(self.admin, None, "reset session_replication_role")
        if code is None:
            self.store(target, text)
        self.admin.unlock(self.now.kek)

    @move(number=ids, kind=st.sampled_from(["notes", "letters", "names"]))
    def delete_row(self, number: str, kind: str) -> None:
        place: Place = (kind, "", number)
        code = "55P03" if place in self.now.values and self.holder(place) else None
        query: LiteralString = "delete from app.notes where id = %s"
        if kind == "letters":
            query = "delete from app.letters where id = %s"
        elif kind == "names":
            query = "delete from app.names where id = %s"
        self.call(self.admin, code, query, number)
        if code is None:
            self.remove(place)

    def is_searched(self) -> bool:
        return any(place[0] == "names" for place in self.now.values)

    def is_closed_to_searches(self) -> bool:
        """Whether rows of app.names may stand on a version that opens nothing."""
        keys = self.now.rings["default"].keys
        [versions] = self.eye.execute("select versions from rekey._blind_indexes").fetchall()[0]
        return any(keys[version].state in CLOSED for version in versions)

    def letter_refuses(self, session: Session, held: Held, number: str) -> str | None:
        """What the trigger of app.letters says of a ciphertext."""
        if code := self.without_kek(session):
            return code
        if self.now.state_of(held.envelope) in CLOSED:
            return "RK006"
        return None if held.context == ("app.letters.v", number) else "RK003"

    def opening(self, session: Session, world: World, place: Place) -> str | None:
        """What opening a row says."""
        code = "RK001" if not session.keks else None if world.kek in session.keks else "RK002"
        if code or world.opens(place):
            return code
        return "RK006" if world.state_of(world.rows[place]) in CLOSED else "RK003"

    def text(self) -> str:
        return f"valué {self.now.step}" + "." * (self.now.step % 40)

    def side(self, side: str) -> Session:
        return self.admin if side == "admin" else self.app

    # Who asks

    @move(claims=st.sampled_from(sorted(CLAIMS)))
    def switch_tenant(self, claims: str) -> None:
        self.carry_claims(claims)

    def carry_claims(self, claims: str) -> None:
        self.claims = claims
        said, self.app.reaches = CLAIMS[claims]
        value(self.app.connection, "select set_config('request.jwt.claims', %s, false)", said)

    @move()
    def the_application_unlocks(self) -> None:
        self.app.unlock(self.now.kek)

    @move()
    def the_application_locks(self) -> None:
        self.call(self.app, None, "select rekey.lock()")
        self.app.keks = set()

    @move(place=nth)
    def the_application_tries_more(self, place: int) -> None:
        for query in FORBIDDEN[place::4]:
            self.call(self.app, "42501", query)

    @move(what=st.sampled_from(["set", "get", "rotate", "create", "step", "tick", "kek"]))
    def without_the_kek(self, what: str) -> None:
        """Any of these while the session is locked."""
        self.call(self.admin, None, "select rekey.lock()")
        self.admin.keks = set()
        match what:
            case "set":
                self.set_secret(side="admin", tenant=NIL, name="s1", ring="default")
            case "get":
                self.get_secret(side="admin", tenant=NIL, name="s1")
            case "rotate":
                self.rotate(ring="default", supersede=False)
            case "create":
                self.create_keyring(ring="b", tenant=B)
            case "step":
                self.step(times=1)
            case "tick" if not any(writer.open for writer in self.writers) and not self.broken:
                self.tick(days=False, jumped=False)
            case "kek":
                self.rotate_kek(mode="none")
        self.admin.unlock(self.now.kek)

    # Keys

    @move(ring=st.sampled_from(["b", "b", "default"]), tenant=st.sampled_from([NIL, B]))
    def create_keyring(self, ring: str, tenant: str) -> None:
        code = "23505" if ring in self.now.rings else self.without_kek(self.admin)
        found = self.call(self.admin, code, "select id from rekey.create_keyring(%s, %s)", ring, tenant)
        if code is None:
            self.now.rings[ring] = Ring(ring, tenant, number=found[0][0])
            self.now.rings[ring].keys[1].touched = self.now.step
            for event, version in (("keyring.created", None), ("key.created", 1), ("key.activated", 1)):
                self.expect(event, ring, version)

    @move(ring=ringnames)
    def retire_keyring(self, ring: str) -> None:
        it = self.now.rings.get(ring)
        code = (
            "RK007"
            if it is None
            else "RK006"
            if it.retired
            else "RK004"
            if any(other.ring == ring and (other.under_way or other.in_line) for other in self.rotations)
            else "RK005"
            if self.astray
            or any((ring, it.active) in writer.locks for writer in self.writers)
            or self.now.on(it)
            else None
        )
        if code is None and ring == "default" and self.now.step % 3:
            return  # much ends with it
        self.call(self.admin, code, "select rekey.retire_keyring(%s)", ring)
        if it and code is None:
            self.expect("keyring.retired", ring, None)
            self.expect("key.deactivated", ring, it.active)
            self.become(it, it.active, "decrypt_only")
            it.retired, it.due = True, None

    @move(ring=ringnames, version=versions)
    def disable_key(self, ring: str, version: int) -> None:
        code = self.key_refuses(ring, version, {"decrypt_only"})
        it = self.current(ring)
        if code is None and it and version in (*it.sources, it.target):
            code = "RK005"
        self.call(self.admin, code, "select rekey.disable_key(%s, %s)", ring, version)
        if code is None:
            self.change(ring, version, "disabled", "key.disabled")

    @move(ring=ringnames, version=versions)
    def enable_key(self, ring: str, version: int) -> None:
        code = self.key_refuses(ring, version, {"disabled"})
        self.call(self.admin, code, "select rekey.enable_key(%s, %s)", ring, version)
        if code is None:
            self.change(ring, version, "decrypt_only", "key.enabled")

    @move(ring=ringnames, version=versions)
    def mark_key_compromised(self, ring: str, version: int) -> None:
        code = self.key_refuses(ring, version, {"active", "decrypt_only"})
        it = self.now.rings.get(ring)
        self.call(self.admin, code, "select rekey.mark_key_compromised(%s, %s)", ring, version)
        if it is None or code:
            return
        if (adoption := self.current(ring)) and adoption.adopts:
            adoption.state = "superseded"
        if it.keys[version].state == "active":
            self.begin(it, "compromise")
        elif rotation := self.current(ring):
            rotation.trigger, rotation.attempts = "compromise", 0
            rotation.state = "queued" if rotation.state in ("paused", "failed") else rotation.state
            self.expect("rotation.resumed", ring, it.active, rotation)
        elif not it.retired:
            self.expect("rotation.requested", ring, it.active, self.queue(it, "compromise"))
        self.change(ring, version, "compromised", "key.compromised")

    @move(ring=ringnames, version=versions, wait=st.sampled_from(["0 s", "0 s", "1 hour", "45 days", "-1 s"]))
    def schedule_destruction(self, ring: str, version: int, wait: str) -> None:
        code = self.key_refuses(ring, version, {"decrypt_only", "disabled", "compromised"})
        code = "22023" if wait == "-1 s" else code
        it = self.now.rings.get(ring)
        # Whoever writes into a protected table may store what was held back.
        writing = any(kind != "secret" for writer in self.writers for kind, *_ in writer.wrote)
        if code is None and it and (writing or self.in_use(it, version)):
            code = "RK005"
        self.call(self.admin, code, SCHEDULE, ring, version, wait)
        if it and code is None:
            key = it.keys[version]
            key.scheduled_from, key.scheduled = key.state, self.now.step
            key.due = {"0 s": "now", "1 hour": "day", "45 days": "later"}[wait]
            self.change(ring, version, "destroy_scheduled", "key.destroy_scheduled")

    @move(ring=ringnames, version=versions)
    def cancel_destruction(self, ring: str, version: int) -> None:
        code = self.key_refuses(ring, version, {"destroy_scheduled"})
        self.call(self.admin, code, "select rekey.cancel_key_destruction(%s, %s)", ring, version)
        if code is None:
            came_from = self.now.rings[ring].keys[version].scheduled_from
            self.change(ring, version, came_from, "key.destroy_cancelled")

    def key_refuses(self, ring: str, version: int, of: set[str]) -> str | None:
        it = self.now.rings.get(ring)
        if it is None or version not in it.keys:
            return "RK007"
        return None if it.keys[version].state in of else "RK006"

    def change(self, ring: str, version: int, state: str, event: str) -> None:
        self.become(self.now.rings[ring], version, state)
        self.expect(event, ring, version)

    @move(mode=st.sampled_from(["both", "both", "wrong", "next", "none"]))
    def rotate_kek(self, mode: str) -> None:
        next_kek = self.now.kek + 1
        if mode in ("wrong", "next"):
            with refused("RK002"):
                self.admin.unlock(next_kek if mode == "next" else 0)
            return
        if mode == "both":
            self.admin.unlock(self.now.kek, next_kek)
        found = self.call(self.admin, "RK001" if mode == "none" else None, "select rekey.rotate_kek()")
        if mode == "both":
            self.now.kek = next_kek
            self.expect("kek.rotated", None, found[0][0])
            for ring in self.now.rings.values():
                for version, key in ring.keys.items():
                    self.become(ring, version, key.state)
            unlock(self.eye, kek(next_kek))

    # Rotations

    @move(ring=ringnames, supersede=st.sampled_from([False, False, True]))
    def rotate(self, ring: str, supersede: bool) -> None:
        it = self.now.rings.get(ring)
        code = (
            "RK007"
            if it is None
            else "RK006"
            if it.retired
            else "RK004"
            if self.current(ring) and not supersede
            else self.without_kek(self.admin)
        )
        self.call(self.admin, code, ROTATE, ring, supersede)
        if it and code is None:
            self.begin(it, "manual")

    @move()
    def rotate_all(self) -> None:
        """Those under way come back as they are, noted as passed by: repeated, it changes nothing."""
        for it in self.rotations:
            if it.under_way:
                self.expect("rotation.passed_by", it.ring, it.target, it)
        due = [r for r in self.now.rings.values() if not r.retired and not self.current(r.name)]
        for ring in sorted(due, key=lambda ring: ring.number):
            self.begin(ring, "manual")
        for _ in range(2):
            found = self.call(self.admin, None, "select keyring from rekey.rotate_keys()")
            assert Counter(found) == Counter((it.ring,) for it in self.rotations if it.under_way)
        for it in self.rotations:
            if it.under_way:
                self.expect("rotation.passed_by", it.ring, it.target, it)

    @move(place=nth)
    def pause(self, place: int) -> None:
        it = self.pick(place)
        code = self.rotation_refuses(it, {"queued", "running", "verifying", IN_LINE})
        self.call(self.admin, code, "select rekey.pause_rotation(%s)", it.number if it else 0)
        if it and code is None:
            it.state = PAUSED_IN_LINE if it.in_line else "paused"
            self.expect("rotation.paused", it.ring, it.target, it)

    @move(place=nth)
    def resume(self, place: int) -> None:
        it = self.pick(place)
        code = self.rotation_refuses(it, {"paused", PAUSED_IN_LINE})
        self.call(self.admin, code, "select rekey.resume_rotation(%s)", it.number if it else 0)
        if it and code is None:
            it.state = IN_LINE if it.in_line else "queued"
            self.expect("rotation.resumed", it.ring, it.target, it)

    @move(place=nth)
    def retry(self, place: int) -> None:
        it = self.pick(place)
        code = self.rotation_refuses(it, {"failed", "completed_with_failures"})
        code = "RK006" if code is None and it and self.is_over(it) else code
        self.call(self.admin, code, "select rekey.retry_rotation(%s)", it.number if it else 0)
        if it and code is None:
            it.again()
            for number, failure in self.failures.items():
                if failure[4] == it.number and failure[5] is None:
                    self.failures[number] = (*failure[:5], "retry")
            self.expect("rotation.retried", it.ring, it.target, it)

    @move(place=nth)
    def roll_back(self, place: int) -> None:
        it = self.pick(place)
        ring = self.now.rings[it.ring] if it else None
        code = (
            "RK007"
            if it is None or ring is None
            else "RK006"
            if self.is_over(it)
            or it.previous is None
            or it.trigger == "compromise"
            or it.state in ("rolled_back", "superseded")
            or ring.keys[it.previous].state != "decrypt_only"
            else None
        )
        self.call(self.admin, code, "select * from rekey.rollback_rotation(%s)", it.number if it else 0)
        if it and ring and it.previous and code is None:
            self.become(ring, it.target, "decrypt_only")
            self.become(ring, it.previous, "active")
            it.state = "rolled_back"
            back = self.queue(ring, "rollback")
            self.expect("rotation.rolled_back", it.ring, it.target, it)
            self.expect("key.deactivated", it.ring, it.target, back)
            self.expect("key.activated", it.ring, it.previous, back)
            self.expect("rotation.requested", it.ring, it.previous, back)

    @move(place=nth, action=st.sampled_from(["retry", "retry", "discard", "ignore"]))
    def resolve(self, place: int, action: str) -> None:
        number = sorted(self.failures)[-1 - place] if place < len(self.failures) else 0
        failure = self.failures.get(number)
        it = next((it for it in self.rotations if failure and it.number == failure[4]), None)
        code = "22023" if action == "ignore" else "RK007" if failure is None else None
        again = failure and action == "retry" and not self.current(failure[0])
        if failure and code is None:
            code = "RK006" if failure[5] or (it and again and self.is_over(it)) else None
        self.call(self.admin, code, "select rekey.resolve_failure(%s, %s)", number, action)
        if failure and code is None:
            self.failures[number] = (*failure[:5], action)
            if it and again:
                it.again()
            self.expect("rotation.failure_resolved", failure[0], failure[3], it)

    def rotation_refuses(self, it: Rotation | None, of: set[str]) -> str | None:
        return "RK007" if it is None else None if it.state in of else "RK006"

    def is_over(self, it: Rotation) -> bool:
        others = [other for other in self.rotations if other.ring == it.ring and other is not it]
        later = any(not other.in_line and (other.under_way or other.number > it.number) for other in others)
        return (later and not it.adopts) or self.now.rings[it.ring].retired

    # Adoptions

    @move(number=ids, kind=st.sampled_from(["notes", "parts"]))
    def write_plain(self, number: str, kind: str) -> None:
        """As whoever does not know yet that the column is protected."""
        place: Place = (kind, "", number)
        text = self.text()
        self.call(self.admin, None, PUT[kind], number, text.encode())
        self.remove(place)
        self.now.plain[place] = text

    @move(lambda self: not self.astray, kind=st.sampled_from(["notes", "parts"]))
    def adopt(self, kind: str) -> None:
        """Behind whatever the keyring has under way, or in line."""
        ring = self.now.rings["default"]
        code = "RK004" if self.is_adopted(kind) else "RK006" if ring.retired else None
        self.call(self.admin, code, ADOPT, f"app.{kind}")
        if code is None:
            waits = any(it.ring == ring.name and (it.under_way or it.in_line) for it in self.rotations)
            it = Rotation(
                ring.name, "adoption", [], ring.active, None, IN_LINE if waits else "queued", adopts=kind
            )
            self.rotations.append(it)
            self.expect("rotation.requested", ring.name, ring.active, it)

    @move(
        lambda self: not self.astray,
        number=ids,
        rotates=st.sampled_from(["", "before", "after"]),
        times=st.integers(0, 6),
        late=ids,
    )
    def adoptions_wait_in_line(self, number: str, rotates: str, times: int, late: str) -> None:
        """Begin one after the other, with what is active then; what comes meanwhile is adopted too."""
        for kind in ("notes", "parts"):
            self.write_plain(number=number, kind=kind)
        if rotates == "before":
            self.rotate(ring="default", supersede=False)
            self.holds()
        for kind in ("notes", "parts"):
            self.adopt(kind=kind)
            self.holds()
        if rotates == "after":
            self.rotate(ring="default", supersede=True)
            self.holds()
        for _ in range(times):
            self.one_step()
            self.holds()
        self.write_plain(number=late, kind="notes")
        self.run()

    @move(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for time_ in range(times):
            if time_:
                self.holds()
            self.one_step()

    def one_step(self) -> str:
        """Take a step; pauses are over."""
        self.eye.execute(
            "update rekey.rotations set next_attempt_at = null where next_attempt_at is not null;"
            "update rekey._chunks set next_attempt_at = null where next_attempt_at is not null"
        )
        [(event, detail, role)] = self.call(self.admin, None, STEP)
        assert role == "origin", "a sweep left triggers off"
        waiting = any(map(self.waits, self.rotations))
        assert event != "error" or self.broken, detail
        assert (event == "idle") is not waiting, event
        assert (event == "locked") is (waiting and not self.admin.keks), (event, detail)
        self.edges = EDGES
        return str(event)

    @move()
    def run(self) -> None:
        """To the end, which only an open transaction keeps from coming."""
        for _ in range(100):
            event = self.one_step()
            self.holds()
            if event == "idle" or (event in ("blocked", "waiting", "verified") and self.disturbed()):
                return
        raise AssertionError(f"the rotation does not end: {self.rotations}")

    def disturbed(self) -> bool:
        # A snapshot that is older than a rotation keeps it from what is searched for. A session in a
        # transaction has one, at any level, as long as the server keeps the portal of its last SELECT.
        searched = self.is_searched() and any(writer.open for writer in self.writers)
        return bool(self.astray or searched) or any(writer.locks or writer.wrote for writer in self.writers)

    @move(
        lambda self: not self.broken and not any(writer.open for writer in self.writers),
        days=st.booleans(),
        jumped=st.sampled_from([False, False, True]),
    )
    def tick(self, days: bool, jumped: bool) -> None:
        """The unattended work, once all that was scheduled is due, or the clock jumped, or neither."""
        if days:
            self.eye.execute(
                "update rekey.encryption_keys set destroy_after = destroy_after - interval '100 days'"
                " where state = 'destroy_scheduled'"
            )
            for ring in self.now.rings.values():
                for key in ring.keys.values():
                    key.due = "now"
        last: LiteralString = (
            "update rekey._worker set last_census_at = null, last_tick_at = now() - %s::interval"
        )
        self.eye.execute(last, ("2 days" if jumped else "1 minute",))
        locked = not self.admin.keks
        refused = False
        due = [
            ring
            for ring in sorted(self.now.rings.values(), key=lambda ring: ring.number)
            if ring.due and not self.current(ring.name)
        ]
        if locked:
            refused = bool(due) or any(map(self.waits, self.rotations))
        else:
            for ring in due:
                self.begin(ring, "schedule")
                ring.due = False
        snapshots = [writer.past for writer in self.writers if writer.past]
        rings = list(self.now.rings.values())
        unsure = [(ring, version) for ring in rings for version in self.destroy(ring, jumped, snapshots)]
        refused |= self.census(locked)
        if refused and not self.noted:
            self.expect("rotation.error", None, None)
            self.noted = True
        self.eye.execute(
            "update rekey.rotations set next_attempt_at = null where next_attempt_at is not null;"
            "update rekey._chunks set next_attempt_at = null where next_attempt_at is not null"
        )
        if self.astray:  # a whole tick waits for it to be mended
            self.may_be.append(("rotation.error", None, None, None))
            for duty in ("schedules", "destructions", "census", "end"):
                [(more,)] = self.call(self.admin, None, DUTY, duty)
                while more:
                    [(more,)] = self.call(self.admin, None, *(SEARCH if more == "search" else (DUTY, duty)))
            self.call(self.admin, None, "call rekey.run_rotations('0 s')")
        else:
            self.call(self.admin, None, "call rekey.tick()")
        for ring, version in unsure:
            if self.eye.execute(IS_DESTROYED, (ring.name, version)).fetchone():
                self.change(ring.name, version, "destroyed", "key.destroyed")
        self.edges = dict.fromkeys(EDGES, REACHED)
        if not locked:
            for it in self.rotations:  # what could be done is done
                first = self.current(it.ring) or it
                if it.state in EDGES and first.state in EDGES and not self.astray:
                    self.edges[it.state] = ENDED

    def destroy(self, ring: Ring, jumped: bool, snapshots: list[World]) -> list[int]:
        """What a tick does to the versions that are to be destroyed, and those that it may destroy or not.

        A search waits for every snapshot that is older than the scheduling. One that is done is good
        for younger snapshots, too, which hold no row of the version.
        """
        unsure = []
        for version, key in ring.keys.items():
            if key.state == "destroy_scheduled" and (key.due == "now" or (jumped and key.due == "day")):
                used = self.in_use(ring, version) or self.is_copied(ring, version)
                if snapshots and not jumped:
                    self.may_be.append(("key.destroy_scheduled", ring.name, version, None))
                    if not used and all(key.scheduled < past.step for past in snapshots):
                        unsure.append(version)
                elif jumped or used:
                    key.due = "day"
                    self.become(ring, version, key.state)
                    self.expect("key.destroy_scheduled", ring.name, version)
                else:
                    self.change(ring.name, version, "destroyed", "key.destroyed")
        return unsure

    def census(self, locked: bool) -> bool:
        """What a tick does about rows that came to stand on an older version; whether it lacks the KEK."""
        idle = [ring for ring in self.now.rings.values() if not self.current(ring.name)]
        if locked:
            found = any(f[4] is None and f[5] is None for f in self.failures.values())
            return found or any(
                row.version != ring.active for ring in idle for row in self.now.on(ring).values()
            )
        for ring in sorted(idle, key=lambda ring: ring.number):
            stale = [p for p, row in self.now.on(ring).items() if row.version != ring.active]
            if ring.active and any(self.now.sweepable(p) and not self.is_in_quarantine(p) for p in stale):
                self.expect("rotation.requested", ring.name, ring.active, self.queue(ring, "schedule"))
        return False

    @move(ring=ringnames, what=st.sampled_from(["due", "later", "clear"]))
    def schedule(self, ring: str, what: str) -> None:
        it = self.now.rings.get(ring)
        code = "RK007" if it is None else "RK006" if it.retired and what != "clear" else None
        if what == "clear":
            self.call(self.admin, code, "select rekey.clear_schedule(%s)", ring)
        else:
            first: LiteralString = "select rekey.set_schedule(%s, '30 days', now() + %s::interval)"
            self.call(self.admin, code, first, ring, "-1 s" if what == "due" else "1 day")
        if it and code is None and (what != "clear" or it.due is not None):
            it.due = {"due": True, "later": False, "clear": None}[what]
            self.expect("schedule.changed", ring, None)

    # Faults

    @move(place=nth, kind=st.sampled_from(["secret", "secret", "notes", "parts", "letters"]))
    def corrupt_or_repair(self, place: int, kind: str) -> None:
        """Flip a bit in a row; the second time, flip it back."""
        there = sorted(p for p in self.now.rows if p[0] == kind and not self.holder(p))
        if not there:
            return
        it = there[place % len(there)]
        raw = bytearray(self.now.rows[it].raw)
        raw[40] ^= 1
        self.now.rows[it] = Envelope(bytes(raw), self.now.rows[it].row_key)
        with self.eye.transaction():
            self.eye.execute("set local session_replication_role = replica")
            if kind == "secret":
                store: LiteralString = (
                    "update rekey.secrets set ciphertext = %s where tenant_id = %s and name = %s"
                )
                self.eye.execute(store, (bytes(raw), it[1], it[2]))
            elif kind in PUT:
                self.eye.execute(PUT[kind], (it[2], bytes(raw)))
            else:
                text = as_text(self.now.rows[it])
                self.eye.execute("update app.letters set v = %s where id = %s", (text, it[2]))
        self.now.corrupt ^= {it}
        self.written.add(it)

    @move(code=st.sampled_from(["", "40001", "P0001"]))
    def break_or_mend_a_trigger(self, code: str) -> None:
        """A trigger of app.notes fails the sweep with an error that passes, or refuses each row."""
        self.broken = bool(code)
        self.was_broken |= code == "P0001"
        self.eye.execute("delete from app.broken where true")
        if code:
            self.eye.execute("insert into app.broken values (%s)", (code,))

    @move(planted=st.booleans())
    def a_schema_is_planted(self, planted: bool) -> None:
        """Nobody's code runs with the rights of whoever does the unattended work."""
        with self.eye.transaction():
            self.eye.execute("set local role stateful_owner")
            self.eye.execute("drop schema if exists cron cascade")
            if planted:
                self.eye.execute(PLANT)

    @move(lambda self: not self.astray, how=st.sampled_from(sorted(ASTRAY)))
    def a_table_goes_astray(self, how: str) -> None:
        """Until it is mended, no rotation completes that it may hold rows of, and no key is destroyed."""
        with self.eye.transaction():
            self.eye.execute("set local role stateful_owner")
            self.eye.execute(ASTRAY[how])
        self.astray = how

    @move(
        lambda self: not self.astray,
        how=st.sampled_from(sorted(ASTRAY)),
        number=ids,
        destroys=st.booleans(),
        mended=st.booleans(),
    )
    def a_rotation_meets_what_went_astray(self, how: str, number: str, destroys: bool, mended: bool) -> None:
        """Values stand in a table that is not there for the rotation, nor for the destruction after it."""
        ring = self.now.rings["default"]
        self.write_row(
            number="2" if how == "detached" else number, kind="parts" if how == "detached" else "notes"
        )
        self.holds()
        self.a_table_goes_astray(how=how)
        before = ring.active
        self.rotate(ring="default", supersede=False)
        self.holds()
        self.run()
        if destroys and not any(writer.open for writer in self.writers) and not self.broken:
            self.schedule_destruction(ring="default", version=before, wait="0 s")
            self.holds()
            self.tick(days=True, jumped=False)
            self.holds()
        if mended:
            self.it_is_mended()

    @move(lambda self: self.astray)
    def it_is_mended(self) -> None:
        """As its owner does; a column is bound anew only where every value opens under its label."""
        notes = {place: row for place, row in self.now.rows.items() if place[0] == "notes"}
        code = None
        if self.astray in REBOUND and not all(map(self.now.sweepable, notes)):
            code = "RK003"
        elif self.astray == "swapped" and any(
            self.now.state_of(row) == "destroy_scheduled" for row in notes.values()
        ):
            code = "RK006"
        with self.lab.connect(self.database, "stateful_owner") as owner:
            unlock(owner, kek(self.now.kek))
            self.call(Session(owner), code, MENDED[self.astray])
        if code is None:
            if self.astray in REBOUND:
                self.expect("column.rebound", "default", None)
            self.astray = ""

    @move(lambda self: not any(writer.open for writer in self.writers), rotates=st.booleans())
    def our_own_rows_are_hidden(self, rotates: bool) -> None:
        """Rows of pg_rekey that a policy hides from it are not absent: no rotation ends, no key goes."""
        if rotates:
            self.rotate(ring="default", supersede=False)
            self.holds()
        self.eye.execute("alter table rekey.secrets force row level security")
        self.call(self.admin, "RK005", "select rekey.rotate_keys('default', supersede => true)")
        self.call(self.admin, "RK005", "call rekey.tick()")
        self.call(self.admin, "42501", "select rekey.delete_secret('s1')")
        for _ in range(20):
            [(event,)] = self.call(self.admin, None, "select event from rekey.rotation_step()")
            if event in ("idle", "blocked", "locked", "error"):
                break
        self.may_be.append(("rotation.error", None, None, None))
        self.edges = dict.fromkeys(EDGES, REACHED - ENDED)
        self.eye.execute("alter table rekey.secrets no force row level security")

    @move(how=st.sampled_from(["terminate"] * 5 + ["kill"]))
    def a_worker_dies_mid_step(self, how: str) -> None:
        """What its transaction did is lost. A SIGKILL ends all other sessions too."""
        worker = self.lab.connect(self.database)
        unlock(worker, kek(self.now.kek))
        worker.execute("begin")
        worker.execute("select * from rekey.rotation_step()")
        if how == "terminate":
            assert value(self.eye, "select pg_terminate_backend(%s, 10000)", worker.info.backend_pid)
        else:
            os.kill(worker.info.backend_pid, signal.SIGKILL)
            self.lose_sessions()
        worker.close()

    @move(lambda self: self.now.step % 25 == 24)
    def the_server_dies(self) -> None:
        self.lab.server.kill()
        self.lab.server.restart()
        self.lose_sessions()

    @move(lambda self: self.now.step % 20 == 19)
    def restore(self) -> None:
        """Go on in a copy of the database; what was not committed is not in it."""
        self.close_sessions()
        before, self.database = self.database, self.lab.clone(self.database)
        drop_database(self.lab.server.dsn(), before)
        self.open_sessions()

    def lose_sessions(self) -> None:
        """Wait for the server to come back."""
        self.close_sessions()
        until = time.monotonic() + 60
        while True:
            try:
                self.open_sessions()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < until, "the server does not come back"
                time.sleep(0.02)

    # Open transactions

    @move(
        lambda self: not all(writer.open for writer in self.writers),
        level=st.sampled_from(["read committed", "read committed", "repeatable read"]),
    )
    def a_writer_begins(self, level: str) -> None:
        writer = next(writer for writer in self.writers if not writer.open)
        writer.unlock(self.now.kek)
        writer.connection.execute(f"begin isolation level {level}".encode())
        writer.connection.execute("select from rekey.settings")
        writer.open = True
        writer.past = copy.deepcopy(self.now) if level != "read committed" else None

    @move(lambda self: self.has_writer(), which=st.booleans(), name=names, ring=ringnames)
    def a_writer_sets(self, which: bool, name: str, ring: str) -> None:
        writer, place, text = self.writer(which), ("secret", NIL, name), self.text()
        past = writer.past or self.now
        it = past.rings.get(ring)
        code = (
            "RK007"
            if it is None
            else "42501"
            if it.tenant != NIL
            else self.row_conflict(writer, place)
            or self.sealing(writer, it)
            or self.new_conflict(writer, place)
        )
        found = self.writes(writer, code, "select rekey.set_secret(%s, %s, keyring => %s)", name, text, ring)
        if it and found:
            self.wrote(writer, place, text, (ring, it.active))

    @move(lambda self: self.has_writer(), which=st.booleans(), number=ids)
    def a_writer_writes_a_letter(self, which: bool, number: str) -> None:
        writer, place, text = self.writer(which), ("letters", "", number), self.text()
        it = (writer.past or self.now).rings["default"]
        code = self.sealing(writer, it) or self.upsert_conflict(writer, place)
        if self.writes(writer, code, PUT_LETTER, number, text) is not None:
            self.wrote(writer, place, text, ("default", it.active))

    @move(lambda self: self.has_writer() and self.held, which=st.booleans(), place=nth)
    def a_writer_stores_what_was_held(self, which: bool, place: int) -> None:
        writer, held = self.writer(which), self.held[place % len(self.held)]
        if held.context[0] != "app.letters.v" or writer.past:
            return  # where no trigger encrypts, nothing keeps the version while the row is not committed
        target: Place = ("letters", "", held.context[1])
        code = self.letter_refuses(writer, held, held.context[1])
        code = code or self.upsert_conflict(writer, target)
        if self.writes(writer, code, PUT_LETTER, held.context[1], as_text(held.envelope)) is not None:
            self.wrote(writer, target, held.value, (held.ring, held.envelope.version))

    @move(lambda self: self.has_writer(), which=st.booleans(), name=names)
    def a_writer_deletes(self, which: bool, name: str) -> None:
        writer, place = self.writer(which), ("secret", NIL, name)
        seen = self.sees(writer, place) is not None
        code = self.row_conflict(writer, place)
        found = self.writes(writer, code, "select rekey.delete_secret(%s)", name)
        assert found is None or found == [(seen,)]
        if found and seen:
            self.wrote(writer, place, None)

    @move(lambda self: self.has_writer(), which=st.booleans(), name=names)
    def a_writer_reads(self, which: bool, name: str) -> None:
        writer, place = self.writer(which), ("secret", NIL, name)
        past, seen = writer.past or self.now, self.sees(writer, place)
        if seen is None:
            code: str | None = "RK007"
        elif place in writer.wrote:
            code = None if past.kek in writer.keks else "RK002"
        else:
            code = self.opening(writer, past, place)
        found = self.writes(writer, code, "select rekey.get_secret(%s)", name)
        assert found is None or found == [(seen,)]

    @move(lambda self: self.has_writer(), which=st.booleans(), commits=st.sampled_from([True, True, False]))
    def a_writer_ends(self, which: bool, commits: bool) -> None:
        writer = self.writer(which)
        writer.connection.execute("commit" if commits else "rollback")
        wrote = writer.wrote if commits else {}
        self.forget(writer)
        for place, text in wrote.items():
            if text is None:
                self.remove(place)
            else:
                self.store(place, text)

    @move(lambda self: not self.has_writer(), name=names, commits=st.booleans())
    def a_rotation_meets_a_writer(self, name: str, commits: bool) -> None:
        """It waits, whatever the writer does in the end."""
        self.a_writer_begins(level="read committed")
        self.a_writer_sets(which=False, name=name, ring="default")
        self.rotate(ring="default", supersede=False)
        self.holds()
        self.run()
        if self.has_writer():
            self.a_writer_ends(which=False, commits=commits)

    def has_writer(self) -> bool:
        return any(writer.open for writer in self.writers)

    def writer(self, which: bool) -> Writer:
        there = [writer for writer in self.writers if writer.open]
        return there[which % len(there)]

    def sees(self, writer: Writer, place: Place) -> str | None:
        return writer.wrote[place] if place in writer.wrote else (writer.past or self.now).values.get(place)

    def writes(self, writer: Writer, code: str | None, query: LiteralString, *parameters: Any) -> Any:
        """As `call`; an error ends the transaction."""
        found = self.call(writer, code, query, *parameters)
        if code:
            writer.connection.execute("rollback")
            self.forget(writer)
        return found

    def wrote(self, writer: Writer, place: Place, text: str | None, *locks: tuple[str, int]) -> None:
        if place not in self.now.values and place not in writer.wrote:
            writer.fresh.add(place)
        writer.wrote[place] = text
        writer.locks |= set(locks)

    def forget(self, writer: Writer) -> None:
        writer.open, writer.past, writer.wrote, writer.fresh, writer.locks = False, None, {}, set(), set()

    def row_conflict(self, writer: Writer, place: Place) -> str | None:
        """What locking a row says that the transaction sees."""
        if place in writer.wrote or place not in (writer.past or self.now).values:
            return None
        if writer.past and writer.past.rows[place].raw != self.raw(place):
            return "40001"
        return "55P03" if self.holder(place, writer) else None

    def new_conflict(self, writer: Writer, place: Place) -> str | None:
        """What inserting a row says that the transaction does not see."""
        if place in writer.wrote or place in (writer.past or self.now).values:
            return None
        if self.holder(place, writer):
            return "55P03"
        return "40001" if place in self.now.values else None

    def upsert_conflict(self, writer: Writer, place: Place) -> str | None:
        """What ON CONFLICT DO UPDATE says: it meets the row as it is now, seen or not."""
        if place in writer.wrote:
            return None
        if self.holder(place, writer):
            return "55P03"
        seen = (
            writer.past is None
            or place not in self.now.values
            or (place in writer.past.rows and writer.past.rows[place].raw == self.raw(place))
        )
        return None if seen else "40001"

    def raw(self, place: Place) -> bytes:
        return self.now.rows[place].raw if place in self.now.rows else b""

    def sealing(self, writer: Writer, it: Ring) -> str | None:
        """What encrypting says, to a transaction that may not see a rotation."""
        if not it.active:
            return "RK006"
        if writer.past and self.now.rings[it.name].keys[it.active].touched > writer.past.step:
            return "40001"
        return self.without_kek(writer)

    # What must hold

    @invariant()
    def holds(self) -> None:
        """Look at the server: all is as the model says, and what work has moved was moved rightly."""
        self.look_at_keys()
        finished = self.look_at_rotations()
        self.look_at_rows()
        self.look_at_failures(finished)
        self.look_at_audit()
        self.look_at_values()
        self.edges, self.written, self.adopting, self.expected, self.may_be = {}, set(), set(), [], []

    def look_at_keys(self) -> None:
        assert not any(self.now.state_of(row) == "destroyed" for row in self.copies), "a copy was lost"
        assert self.eye.execute("select distinct who from app.ran").fetchall() == [], "foreign code was run"
        found: dict[str, Ring] = {}
        for name, number, tenant, retired, version, state, wrap in self.eye.execute(KEYS):
            ring = found.setdefault(name, Ring(name, tenant, number, {}, retired))
            ring.keys[version] = Key(state)
            if wrap:
                assert self.wraps.setdefault(wrap, (name, version)) == (name, version), "an IV used twice"
        said = {name: describe(ring) for name, ring in found.items()}
        assert said == {name: describe(ring) for name, ring in self.now.rings.items()}

    def look_at_rotations(self) -> list[tuple[Rotation, Any]]:
        """Return those that completed."""
        finished = []
        born = [it for it in self.rotations if not it.number]
        known = {it.number: it for it in self.rotations if it.number}
        for row in self.eye.execute(ROTATIONS).fetchall():
            number, ring, state, trigger, sources, target, previous, total, done, failed, attempts, passes = (
                row
            )
            it = known.pop(number, None) or next(b for b in born if b.ring == ring and not b.number)
            it.number = number
            if it.adopts and it.state in EDGES and state != IN_LINE:
                self.adopting.add(it.adopts)
                it.target = self.now.rings[ring].active if it.in_line else it.target
            assert (trigger, sources, target, previous) == (it.trigger, it.sources, it.target, it.previous)
            if state != it.state:
                assert state in self.edges.get(it.state, set()), f"{it} became {state}"
                if state.startswith("completed"):
                    self.expect("rotation.completed", ring, target, it)
                    finished.append((it, (state, total, done, failed)))
                elif state == "failed":
                    self.expect("rotation.failed", ring, target, it)
            else:
                assert self.edges.get(state) != ENDED, f"{it} stays"
            if passes and not it.passes:
                self.expect("rotation.started", ring, target, it)
            if attempts > it.attempts:
                assert attempts == it.attempts + 1
                self.expect("rotation.error", ring, target, it)
            assert attempts < MAX_ATTEMPTS or state not in EDGES
            assert done >= it.done
            assert self.edges or (done, passes, attempts) == (it.done, it.passes, it.attempts)
            it.state, it.done, it.attempts, it.passes = state, done, attempts, passes
        assert not known, "a rotation is gone"
        assert all(it.number for it in born), "a rotation was not begun"
        self.rotations.sort(key=lambda it: it.number)
        assert not [it for it in self.rotations if it.under_way and self.current(it.ring) is not it], (
            "two at once"
        )
        return finished

    def look_at_rows(self) -> None:
        found: dict[Place, Envelope] = {}
        plain: dict[Place, str] = {}
        for kind, tenant, name, row_key, raw in self.eye.execute(ROWS):
            if kind in PUT and not raw.startswith(b"RK\x01"):
                plain[kind, tenant, name] = raw.decode()
            else:
                text = kind in ("letters", "names")
                found[kind, tenant, name] = Envelope(from_text(raw) if text else raw, row_key)
        for place in self.now.plain.keys() & found.keys():
            assert place[0] in self.adopting, f"{place} was adopted by nobody"
            assert found[place].version == self.now.ring_of(found[place]).active
            self.store(place, self.now.plain[place])
        assert plain == self.now.plain, "plain values were changed"
        assert set(found) == set(self.now.values), "rows were lost or found"
        fired = {kind for (kind,) in self.eye.execute("select distinct kind from app.fired")}
        assert not (self.silent and fired), f"a sweep fired triggers of {fired}"
        for place, row in found.items():
            before = self.now.rows.get(place)
            if place in self.written or before is None:
                assert place in self.written, f"{place} appeared"
            elif before.raw != row.raw:
                ring = self.now.ring_of(row)
                assert self.edges, f"{place} changed"
                assert self.now.sweepable(place), f"{place} was in quarantine, and changed"
                assert (before.ring, row.version) == (row.ring, ring.active), (
                    f"{place} moved to {row.version}"
                )
                assert before.version != row.version, f"{place} was swept for nothing"
                assert self.silent or place[0] in fired | {"secret", "notes", "names"}, (
                    "a sweep fired no trigger"
                )
            if place not in self.now.corrupt and (before is None or before.raw != row.raw):
                self.new_envelope(row)
        self.now.rows = found
        for row in found.values():
            assert row.version in self.now.ring_of(row).keys

    def new_envelope(self, envelope: Envelope) -> None:
        """No IV twice under one key; a ciphertext may come back."""
        seen = self.ivs.setdefault((envelope.ring, envelope.version, envelope.iv), envelope.raw)
        assert seen == envelope.raw, "an IV was used twice under one key"

    def look_at_failures(self, finished: Sequence[tuple[Rotation, Any]]) -> None:
        found = {row[0]: row[1:] for row in self.eye.execute(FAILURES)}
        if not self.edges:
            assert found == self.failures
        for number in found.keys() - self.failures.keys():
            ring, _, _, version, rotation, _ = found[number]
            self.expect("rotation.row_failed", ring, version, self.numbered(rotation) if rotation else None)
        assert self.failures.keys() <= found.keys()
        self.failures = found
        for it, (state, total, done, failed) in finished:
            strays = {p for p in self.strays if it.ring != "default" and not self.is_guarded(p)}
            rows = {p: row for p, row in self.now.on(self.now.rings[it.ring]).items() if p not in strays}
            sources = {(it.ring, version) for version in it.sources}
            assert not any(sources & writer.locks for writer in self.writers), f"{it} did not wait"
            left = {p for p in self.now.plain if p[0] == it.adopts}
            lost = {p for p in left if not (self.was_broken and self.is_in_quarantine(p))}
            assert not lost, f"{it} completed without {lost}"
            # What an adoption left is a matter of adoptions: no other rotation takes it along.
            mine = [f for f in found.values() if f[3] is not None or f[4] == it.number]
            open_ = [f for f in mine if f[0] == it.ring and f[5] is None]
            behind = {p for p, row in rows.items() if self.now.sweepable(p) and row.version != it.target}
            refused = {p for p in behind if self.was_broken and self.is_in_quarantine(p)}
            # An adoption is of plain values: what was held and stored later waits for the next rotation.
            assert it.adopts or behind == refused, f"{it} completed without {behind - refused}"
            dead = [(p[0], rows[p].row_key) for p in rows if not self.now.sweepable(p) or p in refused]
            dead = sorted([*dead, *((p[0], p[2]) for p in left)])
            assert sorted((TARGETS[f[1]], f[2]) for f in open_) == dead
            assert (state, failed) == ("completed_with_failures" if dead else "completed", len(dead))
            assert total == done + failed

    def is_in_quarantine(self, place: Place) -> bool:
        key = self.now.rows[place].row_key if place in self.now.rows else place[2]
        return any(
            (TARGETS[target], row_key, resolution) == (place[0], key, None)
            for _, target, row_key, _, _, resolution in self.failures.values()
        )

    def numbered(self, number: int) -> Rotation:
        return next(it for it in self.rotations if it.number == number)

    def look_at_audit(self) -> None:
        """Each transition has one entry, and the chain holds."""
        found = self.eye.execute(AUDIT, (self.audited,)).fetchall()
        self.audited = found[-1][4] if found else self.audited
        said = Counter((e, ring, v, it.number if it else None) for e, ring, v, it in self.expected)
        there: Counter[tuple[Any, ...]] = Counter()
        for row in found:
            there[row[:4]] += row[5]
        for entry in [("census.found", None, None, None), *self.may_be]:
            said[entry] = there[entry]
        assert there == said, f"audited but not done: {there - said}, done but not audited: {said - there}"
        assert self.eye.execute("select valid, reason from rekey.verify_audit_log()").fetchone() == (
            True,
            None,
        )

    def look_at_values(self) -> None:
        """Every value opens that may, nobody sees another tenant's."""
        opens = {place: text for place, text in self.now.values.items() if self.now.opens(place)}
        for tenant in (NIL, A, B):
            there = {place[2]: text for place, text in opens.items() if place[1] == tenant}
            read: LiteralString = "select * from rekey.read_secrets(%s, %s)"
            assert not there or dict(self.eye.execute(read, (list(there), tenant))) == there
        reads = (
            ("notes", READ_NOTES),
            ("parts", READ_PARTS),
            ("letters", READ_LETTERS),
            ("names", READ_NAMES),
        )
        for kind, query in reads:
            there = {place[2]: text for place, text in opens.items() if place[0] == kind}
            assert not there or dict(self.eye.execute(query, (list(there),))) == there
        if not self.is_closed_to_searches():
            for place, text in self.now.values.items():
                if place[0] == "names":
                    assert self.eye.execute(FIND_NAME, (text,)).fetchall() == [(place[2],)], (
                        f"{text} is not found"
                    )
        reached = {place[1] for place in self.now.values if place[0] == "secret"} & (
            self.app.reaches or set()
        )
        seen = self.app.connection.execute("select distinct tenant_id::text from rekey.secrets").fetchall()
        assert {tenant for (tenant,) in seen} == reached


def describe(ring: Ring) -> tuple[Any, ...]:
    states = {version: key.state for version, key in ring.keys.items()}
    return ring.number, ring.tenant, ring.retired, states


def as_text(envelope: Envelope) -> str:
    return "rk1:" + base64.b64encode(envelope.raw).decode()


def from_text(raw: bytes) -> bytes:
    assert raw.startswith(b"rk1:"), "a plain value where a trigger encrypts"
    return base64.b64decode(raw[4:], validate=True)


ADOPT: LiteralString = "select id from rekey.adopt_column(%s, 'v')"
STEP: LiteralString = """
    select event, detail, current_setting('session_replication_role') from rekey.rotation_step()"""
ROTATE: LiteralString = "select id from rekey.rotate_keys(%s, supersede => %s)"
DUTY: LiteralString = "select rekey._tick_duty(%s, now())"
IS_DESTROYED: LiteralString = """
    select true from rekey.key_status where keyring = %s and version = %s and state = 'destroyed'"""
SEARCH: tuple[LiteralString] = ("select rekey._search_on(now())",)
SCHEDULE: LiteralString = "select rekey.schedule_key_destruction(%s, %s, %s::interval)"
PUT_NOTE: LiteralString = (
    "insert into app.notes values (%s, %s) on conflict (id) do update set v = excluded.v"
)
PUT_LETTER: LiteralString = (
    "insert into app.letters values (%s, %s) on conflict (id) do update set v = excluded.v"
)
PUT_NAME: LiteralString = (
    "insert into app.names (id, v) values (%s, %s) on conflict (id) do update set v = excluded.v"
)
FIND_NAME: LiteralString = (
    "select id::text from app.names where v_bidx = any (rekey.search('app.names.v', %s))"
)
READ_NAMES: LiteralString = """
    select id::text, rekey.decrypt_text(v, array['app.names.v', id::text]) from app.names
    where id::text = any (%s)"""
ENCRYPT_NOTE: LiteralString = """
    insert into app.notes values (%s, rekey.encrypt(%s::text, 'default', array['app.notes.v', %s]))
    on conflict (id) do update set v = excluded.v"""
PUT: dict[str, LiteralString] = {"notes": PUT_NOTE, "parts": "select app.put_part(%s, %s)"}
COPY: dict[str, LiteralString] = {
    form: f"insert into app.copies ({form}) values (%s)" for form in ("t", "b", "j")
}
ENCRYPT_PART: LiteralString = (
    "select app.put_part(%s, rekey.encrypt(%s::text, 'default', array['app.parts.v', %s]))"
)
READ_NOTES: LiteralString = """
    select id::text, rekey.decrypt_text(v, array['app.notes.v', id::text]) from app.notes
    where id::text = any (%s)"""
READ_PARTS: LiteralString = """
    select id::text, rekey.decrypt_text(v, array['app.parts.v', id::text])
    from (table app.parts_1 union all table app.parts_2 union all table app.parts_3) p
    where id::text = any (%s)"""
READ_LETTERS: LiteralString = """
    select id::text, rekey.decrypt_text(v, array['app.letters.v', id::text]) from app.letters
    where id::text = any (%s)"""
FORBIDDEN: list[LiteralString] = [
    "select rekey.rotate_keys()",
    "select rekey.pause_rotation(1)",
    "select rekey.rotate_kek()",
    "select rekey.create_keyring('mine')",
    "select rekey.schedule_key_destruction('default', 1, '0 s')",
    "select rekey.mark_key_compromised('default', 1)",
    "select rekey.rotation_step()",
    "select rekey.set_setting('destroy_wait', '0 s')",
    "select * from rekey.encryption_keys",
    "select * from rekey._session_key",
    "select * from rekey.audit_log",
    "update rekey.secrets set name = name where true",
    "delete from rekey.secrets where true",
    "select * from app.letters",
]


@dataclass
class Figures:
    """What a run did. seeds: those that it walked, in order."""

    seeds: list[int]
    walks: int
    steps: int
    rules: dict[str, int]
    seconds: float


def walk(lab: Lab, number: int, tally: Counter[str], examples: int = EXAMPLES, steps: int = STEPS) -> None:
    """Walk as a seed says. Nothing but the seed decides what is done."""
    machine = type("Walk", (Walk,), {"lab": lab, "tally": tally})
    run_state_machine_as_test(
        seed(number)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def prove(minutes: float, number: int | None = None, say: Callable[[str], None] = print) -> Figures:
    """Walk for so many minutes, one seed after another; the first can be given, and is always walked.

    What is found is raised, with the steps that lead there; its seed is said, and replays it.
    """
    first = random.SystemRandom().randrange(10**9) if number is None else number
    begun = time.monotonic()
    tally: Counter[str] = Counter()
    seeds: list[int] = []
    with Lab() as lab:
        while not seeds or time.monotonic() < begun + minutes * 60:
            seeds.append(first + len(seeds))
            say(f"seed {seeds[-1]}")
            try:
                walk(lab, seeds[-1], tally)
            except BaseException as error:
                error.add_note(f"replay: make prove KILLS=0 MINUTES=0.01 ARGS='--seed {seeds[-1]}'")
                raise
    walks = tally.pop("(walks)")
    rules = dict(tally.most_common())
    return Figures(seeds, walks, sum(rules.values()), rules, time.monotonic() - begun)
