"""Who may do what: the catalog against one table, and hostile tries for real."""

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString, NamedTuple

import psycopg
import pytest
from psycopg import errors, sql

from helpers import RPC, Connection, connect, install, unlock, value
from hosted import Hosted
from pg_rekey import release

TABLE = tomllib.loads((Path(__file__).parent / "privileges.toml").read_text())
OURS = "in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)"
NIL = "00000000-0000-0000-0000-000000000000"
OTHER_TENANT = "11111111-1111-1111-1111-111111111111"


ROLES = tuple(TABLE["roles"])
SUPABASE = ("anon", "authenticated", "service_role")


def grants(connection: Connection, query: str) -> dict[str, list[str]]:
    return dict(connection.execute(query.encode()).fetchall())


def reach(role: str) -> set[str]:
    """Return a role and all that it is a member of."""
    return {role, "PUBLIC"}.union(*(reach(other) for other in TABLE["roles"].get(role, [])))


def executors(supabase: bool) -> dict[str, set[str]]:
    """Return every function, and the roles that it is granted to."""
    names = TABLE["execute"] | {name: [] for name in TABLE["private"]["functions"]}
    more = TABLE["supabase"] if supabase else {}
    return {name: {*roles, *more.get(name, ())} for name, roles in names.items()}


def owner_of(signature: str) -> str | None:
    """Return which of our roles owns a function, None where it is the installer."""
    if signature in TABLE["definer"]["rekey_sweeper"]:
        return "rekey_sweeper"
    return "rekey_owner" if signature.startswith("rekey") else None


class Installed(NamedTuple):
    """A database with pg_rekey, and a connection of the real superuser."""

    connection: Connection
    installer: str
    supabase: bool

    @property
    def roles(self) -> tuple[str, ...]:
        """Whom the table speaks of here."""
        mine = tuple(role for role in ROLES if role != "rekey_worker" or not self.supabase)
        return (*mine, *(SUPABASE if self.supabase else ()))


@pytest.fixture(params=["plain", "supabase"])
def installed(request: pytest.FixtureRequest) -> Iterator[Installed]:
    """As a superuser installs it, and as the owner of a Supabase project does, whose defaults grant much."""
    if request.param == "plain":
        connection: Connection = request.getfixturevalue("conn")
        yield Installed(connection, connection.info.user, supabase=False)
        return
    hosted: Hosted = request.getfixturevalue("hosted")
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(hosted.admin(dsn)) as admin:
        yield Installed(admin, "postgres", supabase=True)


def test_functions_are_executed_by_whom_the_table_says(installed: Installed) -> None:
    found = grants(
        installed.connection,
        f"""
        select p.oid::regprocedure::text,
          array(select coalesce(g.rolname, 'PUBLIC')::text
                  || case when a.is_grantable then ' with grant option' else '' end
                from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                left join pg_roles g on g.oid = a.grantee where a.grantee <> p.proowner)
        from pg_proc p where p.pronamespace {OURS} or p.proname {RPC}""",
    )
    assert {name: set(roles) for name, roles in found.items()} == executors(installed.supabase)


def test_relations_are_read_by_whom_the_table_says(installed: Installed) -> None:
    found = grants(
        installed.connection,
        f"""
        select c.oid::regclass::text,
          array(select coalesce(g.rolname, 'PUBLIC') || ' ' || a.privilege_type
                from aclexplode(coalesce(c.relacl, acldefault(
                  case c.relkind when 'S' then 's'::"char" else 'r' end, c.relowner))) a
                left join pg_roles g on g.oid = a.grantee where a.grantee <> c.relowner order by 1)
        from pg_class c where c.relnamespace {OURS} and c.relkind not in ('i', 'c', 't')""",
    )
    assert found == TABLE["relations"]
    columns = (
        "select count(*) from pg_attribute a join pg_class c on c.oid = a.attrelid where a.attacl is not null"
    )
    assert value(installed.connection, f"{columns} and c.relnamespace {OURS}") == 0


def test_what_roles_may_in_effect(installed: Installed) -> None:
    """By memberships too, and by what PUBLIC may: as PostgreSQL itself answers."""
    login = f"tenant_{os.getpid()}"
    installed.connection.execute(f"create role {login} login in role rekey_app".encode())
    try:
        roles = {role: reach(role) for role in installed.roles} | {
            login: {login, "rekey_app", "PUBLIC"},
            "public": {"PUBLIC"},
        }
        for role, groups in roles.items():
            query = f"""
                select p.oid::regprocedure::text from pg_proc p
                where (p.pronamespace {OURS} or p.proname {RPC})
                  and has_function_privilege('{role}', p.oid, 'execute')"""
            assert {name for (name,) in installed.connection.execute(query.encode())} == {
                signature
                for signature, granted in executors(installed.supabase).items()
                if groups & granted or owner_of(signature) in groups
            }, role
            if role == "rekey_owner":
                continue  # owns all of what follows
            query = f"""
                select c.oid::regclass::text from pg_class c
                where c.relnamespace {OURS} and case
                  when c.relkind = 'S' then has_sequence_privilege('{role}', c.oid, 'select')
                  when c.relkind in ('r', 'v') then has_any_column_privilege('{role}', c.oid, 'select') end"""
            assert {name for (name,) in installed.connection.execute(query.encode())} == {
                relation
                for relation, granted in TABLE["relations"].items()
                if any(f"{group} SELECT" in granted for group in groups)
            }, role
            query = f"""
                select c.oid::regclass from pg_class c where c.relnamespace {OURS} and case
                  when c.relkind = 'S' then has_sequence_privilege('{role}', c.oid, 'usage, update')
                  when c.relkind in ('r', 'v') then
                    has_table_privilege('{role}', c.oid, 'delete, truncate, trigger')
                    or has_any_column_privilege('{role}', c.oid, 'insert, update, references') end"""
            assert installed.connection.execute(query.encode()).fetchall() == [], role
            for schema, allowed in TABLE["schemas"].items():
                may = value(
                    installed.connection, f"select has_schema_privilege('{role}', '{schema}', 'usage')"
                )
                assert may == any(f"{group} USAGE" in allowed for group in groups), (role, schema)
                assert not value(
                    installed.connection, f"select has_schema_privilege('{role}', '{schema}', 'create')"
                ), (role, schema)
    finally:
        installed.connection.execute(f"drop role {login}".encode())


def test_what_the_installer_keeps(installed: Installed) -> None:
    """A superuser needs nothing; who is none is a member of both owners. Neither owns more than the RPC."""
    owned = f"""
        select p.oid::regprocedure::text from pg_proc p
        where p.proowner = '{installed.installer}'::regrole
          and (p.pronamespace {OURS} or p.proname {RPC})
        union select c.oid::regclass::text from pg_class c
        where c.relowner = '{installed.installer}'::regrole and c.relnamespace {OURS}
        union select n.nspname from pg_namespace n
        where n.nspowner = '{installed.installer}'::regrole and n.oid {OURS}"""
    assert {name for (name,) in installed.connection.execute(owned.encode())} == {
        "rotate_keys(text,text,boolean)",
        "key_rotation_status()",
        "mark_key_compromised(text,integer,text)",
        "pause_rotation(bigint)",
        "retry_rotation(bigint)",
        "rollback_rotation(bigint,text)",
    }
    for owner in ("rekey_owner", "rekey_sweeper"):
        member = f"""
            select exists (select from pg_auth_members m
              where m.roleid = '{owner}'::regrole and m.member = '{installed.installer}'::regrole)"""
        assert value(installed.connection, member) == installed.supabase


def test_nothing_is_installed_outside_the_table(installed: Installed) -> None:
    """No object of another kind, no default privilege, and nothing in another schema."""
    kinds = {
        "pg_operator": "oprnamespace",
        "pg_opclass": "opcnamespace",
        "pg_opfamily": "opfnamespace",
        "pg_collation": "collnamespace",
        "pg_conversion": "connamespace",
        "pg_ts_config": "cfgnamespace",
        "pg_ts_dict": "dictnamespace",
        "pg_ts_parser": "prsnamespace",
        "pg_ts_template": "tmplnamespace",
        "pg_statistic_ext": "stxnamespace",
        "pg_default_acl": "defaclnamespace",
    }
    for catalog, column in kinds.items():
        assert value(installed.connection, f"select count(*) from {catalog} where {column} {OURS}") == 0, (
            catalog
        )
    found = f"""
        select t.oid::regtype::text, array[t.typacl::text]
        from pg_type t left join pg_class c on c.oid = t.typrelid
        where t.typnamespace {OURS} and t.typelem = 0 and coalesce(c.relkind, 'c') = 'c'"""
    assert grants(installed.connection, found) == {name: [None] for name in TABLE["types"]["names"]}
    ours = "refobjid in ('rekey_owner'::regrole, 'rekey_sweeper'::regrole)"
    elsewhere = f"""
        select pg_describe_object(d.classid, d.objid, 0)
        from pg_shdepend d
        cross join lateral pg_identify_object(d.classid, d.objid, 0) o
        where {ours} and d.refclassid = 'pg_authid'::regclass and d.deptype = 'o'
          and d.dbid = (select oid from pg_database where datname = current_database())
          and coalesce(o.schema, o.identity) not in ('rekey', 'rekey_targets')"""
    assert installed.connection.execute(elsewhere.encode()).fetchall() == []
    shared = f"""select count(*) from pg_shdepend d
        where {ours} and d.refclassid = 'pg_authid'::regclass and d.dbid = 0 and d.deptype = 'o'"""
    assert value(installed.connection, shared) == 0


ATTRIBUTES = """
    select r.rolname, array_remove(array[
        case when r.rolsuper then 'SUPERUSER' end, case when r.rolcanlogin then 'LOGIN' end,
        case when r.rolbypassrls then 'BYPASSRLS' end, case when r.rolcreaterole then 'CREATEROLE' end,
        case when r.rolcreatedb then 'CREATEDB' end, case when r.rolreplication then 'REPLICATION' end], null)
    from pg_roles r where r.rolname ~ '^rekey_(owner|sweeper|admin|operator|auditor|app|worker)$'"""


def test_roles_and_memberships(installed: Installed) -> None:
    assert grants(installed.connection, ATTRIBUTES) == {
        role: ["LOGIN"] if role == "rekey_worker" else [] for role in ROLES if role in installed.roles
    }
    members = grants(
        installed.connection,
        """
        select r.rolname,
          array(select m.roleid::regrole::text from pg_auth_members m where m.member = r.oid order by 1)
        from pg_roles r where r.rolname ~ '^rekey_(owner|sweeper|admin|operator|auditor|app|worker)$'""",
    )
    assert members == {role: others for role, others in TABLE["roles"].items() if role in installed.roles}
    usage = grants(
        installed.connection,
        f"""
        select n.nspname,
          array_agg(coalesce(g.rolname, 'PUBLIC') || ' ' || a.privilege_type order by g.rolname)
        from pg_namespace n cross join aclexplode(n.nspacl) a left join pg_roles g on g.oid = a.grantee
        where n.oid {OURS} and a.grantee <> n.nspowner group by 1""",
    )
    assert usage == TABLE["schemas"]


def refusal(connection: Connection, statement: str) -> bool:
    """Whether a statement is refused for want of a right, and not for another reason; undo it."""
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(statement.encode())
    except errors.InsufficientPrivilege as error:
        return error.diag.context is None  # else it is what is in the function that is refused
    except psycopg.Error:
        pass
    return False


def test_everything_is_tried_by_everybody(installed: Installed) -> None:
    """Every function with NULL for its arguments, every relation: refused, or not, as the table says."""
    connection = installed.connection
    calls = grants(
        connection,
        f"""
        select p.oid::regprocedure::text, array[format('%s %s.%s(%s)',
            case p.prokind when 'p' then 'call' else 'select' end,
            p.pronamespace::regnamespace, p.proname, (
          -- Not a constant: a strict function would not even be looked at.
          select string_agg(case p.prokind when 'p' then format('null::%s', t.type::regtype)
            else format('(select null::%s)', t.type::regtype) end, ', ' order by t.place)
          from unnest(p.proargtypes::oid[]) with ordinality t(type, place)))]
        from pg_proc p where p.pronamespace {OURS} or p.proname {RPC}""",
    )
    logins = {
        role: f"try_{role}_{os.getpid()}" for role in installed.roles if not role.startswith("rekey_owner")
    }
    for role, login in logins.items():
        connection.execute(f"create role {login} login; grant {role} to {login}".encode())
    try:
        for role, login in logins.items():
            groups = reach(role)
            inside = {
                schema
                for schema, allowed in TABLE["schemas"].items()
                if any(f"{group} USAGE" in allowed for group in groups)
            } | {"public"}
            with connect(connection.info.dsn, user=login) as session:
                session.execute("set statement_timeout = '30 s'")
                for signature, granted in executors(installed.supabase).items():
                    [call] = calls[signature]
                    schema = call.split()[1].split(".")[0]
                    may = bool(groups & granted or owner_of(signature) in groups) and schema in inside
                    if may and signature == "rekey.run_rotations(interval)":
                        continue  # waits
                    assert refusal(session, call) == (not may), (role, call)
                for relation, allowed in TABLE["relations"].items():
                    may = any(f"{group} SELECT" in allowed for group in groups) and "rekey" in inside
                    assert refusal(session, f"select from {relation} limit 0") == (not may), (role, relation)
    finally:
        for login in logins.values():
            connection.execute(f"drop role {login}".encode())


def test_definer_functions_and_their_owners(conn: Connection) -> None:
    found = grants(
        conn,
        f"""
        select p.proowner::regrole::text,
          array_agg(p.oid::regprocedure::text order by p.oid::regprocedure::text)
        from pg_proc p where p.pronamespace {OURS} and p.prosecdef group by 1""",
    )
    assert found == {owner: sorted(names) for owner, names in TABLE["definer"].items()}


def test_every_plpgsql_function_pins_its_search_path(conn: Connection) -> None:
    """All but the two procedures that commit: with a SET clause they could not."""
    without = conn.execute(
        f"""
        select p.oid::regprocedure::text from pg_proc p join pg_language l on l.oid = p.prolang
        where p.pronamespace {OURS} and (l.lanname = 'plpgsql' or p.prosecdef)
          and not 'search_path=pg_catalog, pg_temp' = any (coalesce(p.proconfig, array[]::text[]))
        order by 1""".encode()
    )
    assert [name for (name,) in without] == ["rekey.run_rotations(interval)", "rekey.tick()"]
    late_bound = f"""
        select count(*) from pg_proc p join pg_language l on l.oid = p.prolang
        where p.pronamespace {OURS} and l.lanname = 'sql' and p.prosqlbody is null"""
    assert conn.execute(late_bound.encode()).fetchall() == [(0,)]


def test_everything_public_has_a_comment(conn: Connection) -> None:
    bare = conn.execute(
        f"""
        select 'routine ' || p.oid::regprocedure from pg_proc p
        where p.pronamespace {OURS} and obj_description(p.oid, 'pg_proc') is null
        union all select 'relation ' || c.oid::regclass from pg_class c
        where c.relnamespace {OURS} and c.relkind in ('r', 'v') and obj_description(c.oid, 'pg_class') is null
        union all select 'type ' || c.oid::regclass from pg_class c
        where c.relnamespace {OURS} and c.relkind = 'c' and obj_description(c.reltype, 'pg_type') is null
        union all select format('column %s.%s', c.oid::regclass, a.attname)
        from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        where c.relnamespace {OURS} and c.relkind = 'r' and c.relname not like '\\_%'
          and col_description(c.oid, a.attnum) is null
        union all select 'policy ' || p.polname from pg_policy p join pg_class c on c.oid = p.polrelid
        where c.relnamespace {OURS} and obj_description(p.oid, 'pg_policy') is null
        union all select 'schema ' || n.nspname from pg_namespace n
        where n.oid {OURS} and obj_description(n.oid, 'pg_namespace') is null""".encode()
    )
    assert [name for (name,) in bare] == []


def test_row_level_security_is_on_and_not_forced(conn: Connection) -> None:
    flags = "select relrowsecurity, relforcerowsecurity from pg_class where oid = 'rekey.secrets'::regclass"
    assert conn.execute(flags).fetchall() == [(True, False)]


@pytest.mark.parametrize("path", sorted(release.SOURCES.glob("**/*.sql")), ids=lambda path: str(path.name))
def test_every_error_has_a_code(path: Path) -> None:
    """Except where an error is raised again, or by the name of its condition."""
    raised = re.findall(r"\braise\s+exception\b.*?;", re.sub(r"--.*", "", path.read_text()), re.DOTALL)
    assert [statement for statement in raised if "errcode" not in statement] == []


@pytest.fixture
def login(server: str) -> Iterator[dict[str, str]]:
    """Login roles by the role that they are a member of."""
    names = {role: f"{role}_{os.getpid()}" for role in ("rekey_app", "rekey_admin", "rekey_operator")}
    with connect(server) as connection:
        for role, name in names.items():
            statement = sql.SQL("create role {} login in role {}")
            connection.execute(statement.format(sql.Identifier(name), sql.Identifier(role)))
    yield names
    with connect(server) as connection:
        for name in names.values():
            connection.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.fixture
def app(ready: Connection, db: str, kek: bytes, login: dict[str, str]) -> Iterator[Connection]:
    """An unlocked session of an application, its secret and another tenant's, and a schema for its tricks."""
    ready.execute("select rekey.set_secret('mine', 'value')")
    ready.execute("select rekey.set_secret('theirs', 'other', %s)", [OTHER_TENANT])
    ready.execute("create schema evil; grant all on schema evil to public")
    with connect(db, user=login["rekey_app"]) as connection:
        unlock(connection, kek)
        yield connection
    with connect(db) as connection:
        connection.execute("drop schema evil cascade")
        connection.execute(sql.SQL("drop owned by {}").format(sql.Identifier(login["rekey_app"])))


def test_an_application_reads_no_key_material(app: Connection) -> None:
    for relation, allowed in TABLE["relations"].items():
        name = sql.SQL(relation)
        if {"rekey_app SELECT", "PUBLIC SELECT"} & set(allowed):
            app.execute(sql.SQL("select * from {} where false").format(name))
            continue
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute(sql.SQL("select * from {}").format(name))
    for statement in (
        "update rekey.secrets set name = 'x'",
        "delete from rekey.secrets",
        "insert into rekey.secrets (name, keyring_id, ciphertext) values ('x', 1, '')",
        "create table rekey.mine ()",
        "create function rekey_targets.secrets_read() returns void return null",
        "set role rekey_owner",
        "set role rekey_admin",
        "set session authorization rekey_owner",
        "alter role current_user superuser",
        "grant rekey_admin to current_user",
    ):
        with pytest.raises((errors.InsufficientPrivilege, errors.InvalidSchemaName)):
            app.execute(statement.encode())


def test_an_application_calls_only_its_own_functions(
    app: Connection, ready: Connection, login: dict[str, str]
) -> None:
    for signature, allowed in TABLE["execute"].items():
        asked = value(
            ready, "select has_function_privilege(%s, %s, 'execute')", login["rekey_app"], signature
        )
        assert asked == bool({"rekey_app", "PUBLIC"} & set(allowed)), signature
    calls: tuple[LiteralString, ...] = (
        "select * from rekey._kek()",
        "select * from rekey._keks()",
        "select rekey._session_keks()",
        "select * from rekey._deks('{1}', '{1}')",
        "select rekey._open('', '')",
        "select rekey._reencrypt('{}', '{}', '', '{}')",
        "select rekey._check('{}', '', '{}')",
        "select rekey._call_read('secrets', 'rekey.secrets', '(0,0)', '(9,0)', '{}', '{}', 1, 1)",
        "select rekey._call_write('secrets', 'rekey.secrets', '{}', '{}', '{}', null)",
        "select rekey._adopt('{}', '{}', null, '{plaintext}', false)",
        "select rekey._aead_decrypt('', '', '', '')",
        "select rekey._wrapping_key('')",
        "select rekey._store_setting('kek_provider', 'file')",
        "select rekey.rotate_keys()",
        "call rekey.tick()",
        "call rekey.run_rotations()",
        "select rekey_targets.secrets_count('rekey.secrets', null)",
    )
    for call in calls:
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute(call)


def test_a_view_in_place_of_the_copied_kek_runs_as_its_caller(app: Connection, kek: bytes) -> None:
    app.execute(
        "create function evil.who() returns bytea language sql return convert_to(current_user, 'UTF8')"
    )
    app.execute("create temporary view pg_rekey_kek as select evil.who() as kek, '(0,1)'::tid as ctid")
    with pytest.raises(psycopg.Error) as raised:
        app.execute("select rekey.unlock_copied()")
    assert raised.value.sqlstate == "22023"  # a name is no KEK, whoever's it is
    app.execute("create table evil.seen (name text)")
    app.execute("""
        create or replace function evil.who() returns bytea language plpgsql as $$
        begin insert into evil.seen values (current_user); return decode(repeat('00', 32), 'hex'); end $$""")
    with pytest.raises(psycopg.Error) as raised:
        app.execute("select rekey.unlock_copied()")
    assert raised.value.sqlstate == "RK002"
    app.execute(
        "create or replace temporary view pg_rekey_kek as select null::bytea as kek, null::tid as ctid"
    )
    app.execute("""
        create or replace function evil.who() returns bytea language plpgsql as $$
        begin raise exception 'as %', current_user using errcode = 'RKWHO'; end $$""")
    app.execute(
        "create or replace temporary view pg_rekey_kek as select evil.who() as kek, '(0,1)'::tid as ctid"
    )
    with pytest.raises(psycopg.Error, match=f"as {app.info.user}"):
        app.execute("select rekey.unlock_copied()")


def shadow(connection: Connection) -> None:
    """Put tables, functions and operators of pg_catalog's and our names in front of everything."""
    connection.execute("""
        create temporary table secrets (tenant_id uuid, id uuid, name text, ciphertext bytea);
        create temporary table encryption_keys (keyring_id integer, version integer, wrapped_key bytea);
        create temporary table pg_roles (rolname name, rolsuper boolean);
        create function pg_temp.pg_has_role(name, text, text) returns boolean return true;
    """)
    bodies: dict[str, str] = {
        "octet_length(bytea)": "integer",
        "substr(bytea, integer, integer)": "bytea",
        "sha256(bytea)": "bytea",
        "now()": "timestamptz",
        "clock_timestamp()": "timestamptz",
        "pg_has_role(name, text, text)": "boolean",
        "hmac(bytea, bytea, text)": "bytea",
        "decrypt_iv(bytea, bytea, bytea, text)": "bytea",
        "same(text, text)": "boolean",
        "same(name, name)": "boolean",
        "same(uuid, uuid)": "boolean",
        "same(bytea, bytea)": "boolean",
        "later(timestamptz, timestamptz)": "boolean",
        "plus(timestamptz, interval)": "timestamptz",
        "both(bytea, bytea)": "bytea",
    }
    for signature, result in bodies.items():
        connection.execute(
            f"create function evil.{signature} returns {result} language plpgsql as"
            " $$ begin raise exception 'hijacked as %', current_user; end $$".encode()
        )
    connection.execute("""
        create operator evil.= (leftarg = text, rightarg = text, function = evil.same);
        create operator evil.= (leftarg = name, rightarg = name, function = evil.same);
        create operator evil.= (leftarg = uuid, rightarg = uuid, function = evil.same);
        create operator evil.= (leftarg = bytea, rightarg = bytea, function = evil.same);
        create operator evil.<> (leftarg = bytea, rightarg = bytea, function = evil.same);
        create operator evil.>= (leftarg = timestamptz, rightarg = timestamptz, function = evil.later);
        create operator evil.+ (leftarg = timestamptz, rightarg = interval, function = evil.plus);
        create operator evil.|| (leftarg = bytea, rightarg = bytea, function = evil.both);
        grant execute on all functions in schema evil to public;
        set search_path = evil, pg_temp, pg_catalog;
    """)


def test_shadows_of_an_application_are_not_seen(app: Connection) -> None:
    shadow(app)
    with pytest.raises(errors.RaiseException, match="hijacked"):
        app.execute("select 'a'::text = 'a'::text")
    assert value(app, "select rekey.get_secret('mine')") == "value"
    app.execute("select rekey.set_secret('mine', 'changed')")
    assert app.execute("select * from rekey.read_secrets()").fetchall() == [("mine", "changed")]
    assert value(app, "select value from rekey.decrypted_secrets") == "changed"
    envelope = value(app, "select rekey.encrypt('text'::text, context => '{a}')")
    assert value(app, "select rekey.decrypt_text(%s::bytea, '{a}')", envelope) == "text"
    assert value(app, "select rekey.decrypt_text(rekey.encrypt_text('text'))") == "text"
    assert not value(app, "select rekey.can_access_tenant(%s)", OTHER_TENANT)
    with pytest.raises(errors.InsufficientPrivilege):
        app.execute("select rekey.get_secret('theirs', %s)", [OTHER_TENANT])


def test_shadows_of_an_operator_are_not_seen(
    app: Connection, ready: Connection, db: str, kek: bytes, login: dict[str, str]
) -> None:
    """The two procedures that commit have no search path of their own."""
    shadow(app)
    ready.execute("select rekey.rotate_keys()")
    with connect(db, user=login["rekey_operator"]) as operator:
        unlock(operator, kek)
        operator.execute("set search_path = evil, pg_catalog")
        operator.execute("call rekey.run_rotations('10 s')")
        operator.execute("call rekey.tick()")
    assert value(ready, "select state from rekey.rotation_status") == "completed"
    assert value(ready, "select last_error from rekey.worker_status") is None


def test_rows_of_another_tenant_reach_no_function_of_the_caller(app: Connection) -> None:
    """A cheap function in a WHERE clause sees a row only after the policy does."""
    app.execute("create table evil.seen (name text)")
    app.execute("""
        create function evil.look(name text) returns boolean language plpgsql cost 0.0001 as $$
        begin insert into evil.seen values (name); return true; end $$""")
    names = app.execute("select name from rekey.secrets where evil.look(name)").fetchall()
    assert names == [("mine",)]
    assert app.execute("select name from evil.seen").fetchall() == [("mine",)]
    assert app.execute("select name from rekey.decrypted_secrets").fetchall() == [("mine",)]


def test_what_a_session_carries_is_of_no_use_elsewhere(
    app: Connection, db: str, login: dict[str, str]
) -> None:
    carried = value(app, "select current_setting('rekey.unlocked')")
    with connect(db, user=login["rekey_app"]) as other:
        other.execute("select set_config('rekey.unlocked', %s, false)", [carried])
        with pytest.raises(psycopg.Error) as raised:
            other.execute("select rekey.get_secret('mine')")
        assert raised.value.sqlstate == "RK001"


DISPATCHERS: dict[str, LiteralString] = {
    "rekey._call_count(name[], regclass[], integer[], boolean, boolean)": "select rekey.key_usage()",
    "rekey._call_scan(name, regclass, tid, tid, integer[], xid, integer, bigint)": (
        "select rekey.verify_ciphertexts()"
    ),
    "rekey._call_read(name, regclass, tid, tid, integer[], integer[], integer, bigint, tid)": "",
    "rekey._call_write(name, regclass, tid[], bytea[], bytea[], text[], bytea[])": "",
}


def test_nothing_is_left_of_a_tenant_check_but_its_answer(
    app: Connection, ready: Connection, db: str, login: dict[str, str]
) -> None:
    """It runs as rekey_sweeper, the dispatcher's owner, and could make that SECURITY INVOKER: rekey_owner.

    A deferred trigger that it queued would run at COMMIT with the rights of its victim.
    """
    with connect(db, user=login["rekey_admin"]) as admin:
        admin.execute("create table evil.ran_as (name text); grant all on evil.ran_as to public")
        admin.execute("""
            create function evil.note() returns trigger language plpgsql as $$
            begin raise exception 'ran as %', current_user; end $$;
            create constraint trigger note after insert on evil.ran_as deferrable initially deferred
              for each row execute function evil.note();
            create function evil.tenant(uuid) returns boolean language plpgsql as $$
            begin
              insert into evil.ran_as values (current_user);
              perform set_config('search_path', 'evil, pg_catalog', false);
              alter function rekey._call_tenant_check(text, uuid) security invoker;
              alter function rekey._call_tenant_check(text, uuid) set search_path = evil;
              return true;
            end $$""")
        admin.execute("select rekey.set_setting('tenant_check', 'evil.tenant')")
    asked: LiteralString = "select rekey.can_access_tenant(gen_random_uuid())"
    shadow(app)
    path = value(app, "select pg_catalog.current_setting('search_path')")
    for _ in range(2):
        with app.transaction():
            assert value(app, asked.replace("gen_random", "pg_catalog.gen_random"))
    assert value(app, "select pg_catalog.current_setting('search_path')") == path
    assert value(ready, "select count(*) from evil.ran_as") == 0
    assert value(ready, "select prosecdef from pg_proc where proname = '_call_tenant_check'")


@pytest.mark.parametrize("dispatcher", list(DISPATCHERS))
def test_an_altered_dispatcher_refuses(ready: Connection, dispatcher: str) -> None:
    ready.execute("select rekey.set_secret('name', 'value')")
    ready.execute("select rekey.rotate_keys()")
    ready.execute("select rekey.rotation_step()")  # plans
    ready.execute(f"alter function {dispatcher} security invoker".encode())
    if not DISPATCHERS[dispatcher]:
        assert ready.execute("select event, detail ->> 'sqlstate' from rekey.rotation_step()").fetchall() == [
            ("error", "RK005")
        ]
    else:
        with pytest.raises(psycopg.Error, match="does not run as rekey_sweeper"):
            ready.execute(DISPATCHERS[dispatcher])


def test_the_sweeper_has_no_other_right(conn: Connection) -> None:
    """Beyond its dispatchers it may execute the functions of targets, and read nothing."""
    for relation, allowed in TABLE["relations"].items():
        assert value(
            conn,
            "select has_table_privilege('rekey_sweeper', %s, 'select, insert, update, delete')",
            relation,
        ) == ("PUBLIC SELECT" in allowed)
    may = "select has_function_privilege('rekey_sweeper', %s, 'execute')"
    for signature, allowed in TABLE["execute"].items():
        owned = signature in TABLE["definer"]["rekey_sweeper"]
        assert value(conn, may, signature) == (bool({"rekey_sweeper", "PUBLIC"} & set(allowed)) or owned), (
            signature
        )
    assert not any(value(conn, may, signature) for signature in TABLE["private"]["functions"])
