"""Every road of installation ends in the same catalog, whoever installs."""

import re
from collections.abc import Callable
from typing import LiteralString

import psycopg
import pytest
from psycopg import errors

from helpers import RPC, Connection, connect, initialize, install, unlock, value
from hosted import Hosted
from pg_rekey import release
from pg_rekey.release import Road

OWNERS = ("rekey_owner", "rekey_sweeper")
DISPATCHERS = ["_call_count", "_call_read", "_call_scan", "_call_tenant_check", "_call_write"]
IN_SCHEMAS = "in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)"
NEW_KEK = bytes(range(32))

# Each query gives the whole of one kind, without object ids. ACLs are compared entry by entry, in any order.
ACL = """
  array(select format('%s %s by %s%s', coalesce(g.rolname, 'PUBLIC'), a.privilege_type, a.grantor::regrole,
                      case when a.is_grantable then ' *' end)
        from aclexplode(coalesce({acl}, acldefault({kind}, {owner}))) a
        left join pg_roles g on g.oid = a.grantee order by 1)"""


def acl(column: str, kind: str, owner: str) -> str:
    return ACL.format(acl=column, kind=kind, owner=owner)


RELATION_KIND = """case c.relkind when 'S' then 's'::"char" else 'r' end"""
CATALOG = {
    "schemas": f"""
        select n.nspname, n.nspowner::regrole::text, {acl("n.nspacl", "'n'", "n.nspowner")},
          obj_description(n.oid, 'pg_namespace')
        from pg_namespace n where n.oid {IN_SCHEMAS}""",
    "routines": f"""
        select p.oid::regprocedure::text, p.proowner::regrole::text, pg_get_functiondef(p.oid),
          {acl("p.proacl", "'f'", "p.proowner")}, obj_description(p.oid, 'pg_proc')
        from pg_proc p where p.pronamespace {IN_SCHEMAS}""",
    "RPC": f"""
        select p.proname, p.proowner = '{{installer}}'::regrole, pg_get_functiondef(p.oid),
          array(select replace(x, '{{installer}}', 'INSTALLER')
                from unnest({acl("p.proacl", "'f'", "p.proowner")}) x order by 1),
          obj_description(p.oid, 'pg_proc')
        from pg_proc p where p.proname {RPC}
          and p.pronamespace = 'public'::regnamespace""",
    "relations": f"""
        select c.oid::regclass::text, c.relkind::text, c.relowner::regrole::text, c.reloptions,
          c.relrowsecurity, c.relforcerowsecurity, c.relpersistence::text,
          {acl("c.relacl", RELATION_KIND, "c.relowner")}, obj_description(c.oid, 'pg_class'),
          case c.relkind when 'v' then pg_get_viewdef(c.oid) when 'i' then pg_get_indexdef(c.oid) end
        from pg_class c where c.relnamespace {IN_SCHEMAS}""",
    "columns": f"""
        select c.oid::regclass::text, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
          pg_get_expr(d.adbin, d.adrelid), a.attidentity::text, a.attgenerated::text, a.attstorage::text,
          a.attacl::text, col_description(c.oid, a.attnum)
        from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
        where c.relnamespace {IN_SCHEMAS}""",
    "constraints": f"""
        select c.conrelid::regclass::text, c.conname, pg_get_constraintdef(c.oid)
        from pg_constraint c where c.connamespace {IN_SCHEMAS}""",
    "triggers": f"""
        select pg_get_triggerdef(t.oid), t.tgenabled::text
        from pg_trigger t join pg_class c on c.oid = t.tgrelid
        where c.relnamespace {IN_SCHEMAS} and not t.tgisinternal""",
    "policies": f"""
        select c.oid::regclass::text, p.polname, p.polcmd::text, p.polpermissive, p.polroles::regrole[]::text,
          pg_get_expr(p.polqual, c.oid), pg_get_expr(p.polwithcheck, c.oid),
          obj_description(p.oid, 'pg_policy')
        from pg_policy p join pg_class c on c.oid = p.polrelid where c.relnamespace {IN_SCHEMAS}""",
    "sequences": f"""
        select s.seqrelid::regclass::text, s.seqtypid::regtype::text, s.seqstart, s.seqincrement, s.seqcycle
        from pg_sequence s join pg_class c on c.oid = s.seqrelid where c.relnamespace {IN_SCHEMAS}""",
    "types": f"""
        select t.oid::regtype::text, t.typtype::text, t.typowner::regrole::text,
          {acl("t.typacl", "'T'", "t.typowner")}, obj_description(t.oid, 'pg_type')
        from pg_type t where t.typnamespace {IN_SCHEMAS}""",
}


def catalog(connection: Connection) -> set[str]:
    """Return everything in our schemas as text, wherever pgcrypto is."""
    found: set[str] = set()
    with connection.transaction():
        connection.execute("set local search_path = pg_catalog")
        for kind, query in CATALOG.items():
            query = query.replace("{installer}", str(value(connection, "select current_user")))
            rows = [repr(row) for row in connection.execute(query.encode())]
            assert rows, kind
            found |= {f"{kind}: {row.replace('extensions.', 'public.')}" for row in rows}
    return found


@pytest.fixture
def plain(conn: Connection) -> set[str]:
    """The catalog that a superuser gets on the plain road."""
    return catalog(conn)


def install_extension(dsn: str) -> None:
    with connect(dsn) as connection:
        connection.execute("create extension pg_rekey cascade")


@pytest.mark.usefixtures("extension_files")
def test_extension_ends_in_the_same_catalog(make_database: Callable[..., str], plain: set[str]) -> None:
    assert release.stale() == [], "run `make sql`"
    dsn = make_database()
    install_extension(dsn)
    with connect(dsn) as connection:
        assert catalog(connection) == plain
        assert value(connection, "select count(*) from rekey.settings") == 0


def test_supabase_migration_ends_in_the_same_catalog(
    make_database: Callable[..., str], plain: set[str]
) -> None:
    dsn = make_database()
    install(dsn, release.assemble("supabase"))
    with connect(dsn) as connection:
        assert catalog(connection) == plain


@pytest.fixture
def hosted_plain(hosted: Hosted) -> set[str]:
    """The catalog that the owner of a Supabase project gets on the plain road."""
    dsn = hosted.make_database()
    install(dsn, release.assemble("plain"))
    with connect(dsn) as connection:
        assert value(connection, "select to_regrole('rekey_worker') is null")
        assert members(connection) == [("rekey_owner", "postgres"), ("rekey_sweeper", "postgres")]
        return catalog(connection)


def test_hosted_migration_ends_in_the_same_catalog(hosted: Hosted, hosted_plain: set[str]) -> None:
    dsn = hosted.make_database()
    with connect(dsn) as connection:
        connection.execute("""
            alter default privileges grant execute on functions to anon, authenticated, service_role;
            alter default privileges grant all on tables to anon, authenticated, service_role;
            alter default privileges grant all on sequences to anon, authenticated, service_role;
        """)
    install(dsn, release.assemble("supabase"))
    with connect(dsn) as connection:
        assert catalog(connection) == hosted_plain
    with psycopg.connect(hosted.admin(dsn)) as admin:
        admin.execute("drop schema rekey, rekey_targets cascade")
        with pytest.raises(errors.InvalidRoleSpecification, match="has the member postgres"):
            admin.execute(release.assemble("supabase").encode())


@pytest.mark.usefixtures("extension_files")
def test_hosted_extension_ends_in_the_same_catalog(hosted_plain: set[str]) -> None:
    """On a server of its own: what postgres installed, a superuser does not touch."""
    with Hosted.start() as fresh:
        if not fresh.server.installation.has("pg_rekey"):
            pytest.skip("the extension's files are on another server")
        admin = fresh.admin(fresh.make_database())
        install_extension(admin)
        with connect(admin) as connection:
            assert catalog(connection) == hosted_plain


def test_reloading_the_code_changes_nothing(conn: Connection, plain: set[str]) -> None:
    with conn.transaction():
        conn.execute(release.assemble_code().encode())
    assert catalog(conn) == plain


def test_hosted_reloading_the_code_changes_nothing(hosted: Hosted) -> None:
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(dsn) as connection:
        before = catalog(connection)
        with connection.transaction():
            connection.execute(release.assemble_code().encode())
        assert catalog(connection) == before


def members(connection: Connection) -> list[tuple[str, str]]:
    """Return the memberships of the roles that own; those that a creator of roles has by nature only once."""
    return connection.execute("""
        select distinct m.roleid::regrole::text, m.member::regrole::text from pg_auth_members m
        where m.roleid in ('rekey_owner'::regrole, 'rekey_sweeper'::regrole)
           or m.member in ('rekey_owner'::regrole, 'rekey_sweeper'::regrole)
        order by 1""").fetchall()


def test_owners(conn: Connection) -> None:
    """rekey_sweeper owns its dispatchers and nothing else, neither owner has rights beyond its objects."""
    owned = conn.execute("""
        select c.relowner::regrole::text, c.oid::regclass::text from pg_class c
        where c.relnamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)
        union all select p.proowner::regrole::text, p.oid::regproc::text from pg_proc p
        where p.pronamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)
        union all select t.typowner::regrole::text, t.oid::regtype::text from pg_type t
        where t.typnamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)
        union all select n.nspowner::regrole::text, n.nspname from pg_namespace n
        where n.nspname in ('rekey', 'rekey_targets')""").fetchall()
    assert {owner for owner, _ in owned} == set(OWNERS)
    assert sorted(name for owner, name in owned if owner == "rekey_sweeper") == [
        f"rekey.{name}" for name in DISPATCHERS
    ]
    assert members(conn) == []
    for role in OWNERS:
        assert not value(conn, "select has_schema_privilege('rekey_sweeper', 'rekey', 'create')")
        flags = (
            "select rolsuper or rolcanlogin or rolbypassrls or rolcreaterole from pg_roles where rolname = %s"
        )
        assert not value(conn, flags, role)


def test_hosted_installer_can_do_everything(hosted: Hosted, kek: bytes) -> None:
    """With the KEK in the Vault, whose view the installer may pass on."""
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(dsn) as connection:
        connection.execute("select vault.create_secret(%s, 'pg_rekey_kek')", [kek.hex()])
        connection.execute("select rekey.set_setting('kek_provider', 'vault')")
        assert value(connection, "select rekey.register_kek()") == 1
        connection.execute("select rekey.create_keyring('default', rotate_every => '90 days')")
        connection.execute("select rekey.set_secret('name', 'value')")
        connection.execute("select rekey.rotate_keys()")
        connection.execute("call rekey.run_rotations('10 s')")
        assert value(connection, "select state from rekey.rotation_status") == "completed"
        connection.execute("update rekey.keyrings set next_rotation_at = now()")
        connection.execute("call rekey.tick()")
        states = "select array_agg(state || ' ' || trigger order by id) from rekey.rotation_status"
        assert value(connection, states) == ["completed manual", "completed schedule"]
        assert value(connection, "select last_error from rekey.worker_status") is None
        assert value(connection, "select rekey.get_secret('name')") == "value"
        assert value(connection, "select value from rekey.decrypted_secrets where name = 'name'") == "value"
        connection.execute("select vault.create_secret(%s, 'pg_rekey_kek_new')", [NEW_KEK.hex()])
        assert value(connection, "select rekey.rotate_kek()") == 2
        assert value(connection, "select rekey.get_secret('name')") == "value"
        assert value(connection, "select (rekey.verify_audit_log()).valid")


def test_hosted_clients_have_no_rights_by_themselves(hosted: Hosted) -> None:
    """Only the RPC, which decides by itself (test_rpc.py)."""
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(dsn, user="authenticator") as connection:
        for role in ("anon", "authenticated", "service_role"):
            connection.execute(f"set role {role}".encode())
            with pytest.raises(errors.InsufficientPrivilege):
                connection.execute("select rekey.version()")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("alter role rekey_owner login", "rekey_owner exists and is not"),
        ("alter role rekey_sweeper superuser", "rekey_sweeper exists and is not"),
        ("alter role rekey_admin bypassrls", "rekey_admin exists and is not"),
        ("alter role rekey_app createrole", "rekey_app exists and is not"),
        ("alter role rekey_worker nologin", "rekey_worker exists and is not"),
        ("create role rekey_stranger; grant rekey_owner to rekey_stranger", "has the member rekey_stranger"),
        ("create role rekey_stranger; grant rekey_stranger to rekey_sweeper", "is a member of other roles"),
    ],
)
def test_unfit_roles_are_refused(
    make_database: Callable[..., str], spoil: LiteralString, message: str
) -> None:
    """All in one transaction that is rolled back: roles are those of the whole server."""
    dsn = make_database()
    with psycopg.connect(dsn) as connection:
        connection.execute("create extension pgcrypto")
        connection.execute(spoil)
        with pytest.raises(errors.InvalidRoleSpecification, match=message) as raised:
            connection.execute(release.assemble("plain").encode())
        assert raised.value.diag.message_hint
        connection.rollback()


@pytest.mark.usefixtures("ready")
def test_a_second_database_has_its_own_keys(make_database: Callable[..., str], conn: Connection) -> None:
    dsn = make_database()
    install(dsn, release.assemble("plain"))
    with connect(dsn) as second:
        initialize(second, NEW_KEK)
        second.execute("select rekey.set_secret('name', 'second')")
        conn.execute("select rekey.set_secret('name', 'first')")
        fingerprint = "select fingerprint from rekey.keks"
        assert value(second, fingerprint) != value(conn, fingerprint)
        assert value(second, "select rekey.get_secret('name')") == "second"
        assert value(conn, "select rekey.get_secret('name')") == "first"


def test_a_second_installation_is_refused(ready: Connection) -> None:
    ready.execute("select rekey.set_secret('name', 'value')")
    before = catalog(ready)
    with pytest.raises(errors.DuplicateSchema), ready.transaction():
        ready.execute(release.assemble("plain").encode())
    assert catalog(ready) == before
    assert value(ready, "select rekey.get_secret('name')") == "value"


@pytest.mark.usefixtures("extension_files")
@pytest.mark.parametrize("schema", ["rekey", "rekey_targets"])
def test_the_extension_adopts_nothing(make_database: Callable[..., str], schema: str) -> None:
    with connect(make_database()) as connection:
        connection.execute(f"create schema {schema}".encode())
        connection.execute(f"create table {schema}.keyrings (id integer)".encode())
        with pytest.raises(errors.DuplicateSchema):
            connection.execute("create extension pg_rekey cascade")
        assert value(connection, "select count(*) from pg_extension where extname = 'pg_rekey'") == 0
        assert value(connection, "select count(*) from pg_class where relname = 'keyrings'") == 1


def test_pgcrypto_comes_first(make_database: Callable[..., str]) -> None:
    with (
        psycopg.connect(make_database()) as connection,
        pytest.raises(errors.UndefinedObject, match="pgcrypto") as raised,
    ):
        connection.execute(release.assemble("plain").encode())
    assert "CREATE EXTENSION pgcrypto" in (raised.value.diag.message_hint or "")


def test_the_installation_rolls_back_whole(make_database: Callable[..., str]) -> None:
    with psycopg.connect(make_database()) as connection:
        connection.execute("create extension pgcrypto")
        connection.execute(release.assemble("plain").encode())
        connection.rollback()
        assert value(connection, "select to_regnamespace('rekey') is null")
        assert value(connection, "show search_path") == '"$user", public'


def test_a_hostile_search_path_does_not_reach_the_installer(make_database: Callable[..., str]) -> None:
    """Operators that stand before pg_catalog's are not called by the script."""
    with psycopg.connect(make_database()) as connection:
        connection.execute("create extension pgcrypto")
        connection.execute("""
            create schema evil;
            create function evil.hijack(name, text) returns boolean language plpgsql
              as $$ begin raise exception 'hijacked'; end $$;
            create function evil.hijack(oid, oid) returns boolean language plpgsql
              as $$ begin raise exception 'hijacked'; end $$;
            create operator evil.= (leftarg = name, rightarg = text, function = evil.hijack);
            create operator evil.= (leftarg = oid, rightarg = oid, function = evil.hijack);
            set search_path = evil, pg_catalog, public;
        """)
        connection.execute(release.assemble("plain").encode())


@pytest.mark.parametrize("road", ["plain", "supabase", "extension"])
def test_the_script_is_plain_sql(road: Road) -> None:
    script = release.assemble(road).removeprefix(release.EXTENSION_GUARD)
    assert not re.search(r"^\s*\\", script, re.MULTILINE)
    assert not re.search(r"^(begin|commit|start transaction|rollback);", script, re.MULTILINE | re.IGNORECASE)
    assert not re.search(r"^create\b.*\bif not exists", script, re.MULTILINE | re.IGNORECASE)
    assert "__VERSION__" not in script


@pytest.mark.usefixtures("extension_files")
def test_the_extension_works(make_database: Callable[..., str], kek: bytes) -> None:
    dsn = make_database()
    install_extension(dsn)
    with connect(dsn) as connection:
        initialize(connection, kek)
        connection.execute("select rekey.set_secret('name', 'value')")
        connection.execute("select rekey.rotate_keys()")
        connection.execute("call rekey.run_rotations('10 s')")
        assert value(connection, "select state from rekey.rotation_status") == "completed"
        assert value(connection, "select rekey.get_secret('name')") == "value"
        assert unlock(connection, kek) == value(connection, "select fingerprint from rekey.keks")
        connection.execute("drop extension pg_rekey")
        assert value(connection, "select to_regnamespace('rekey') is null")
