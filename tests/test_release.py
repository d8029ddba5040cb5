"""The assembler: what it makes of the sources, and that what is committed is fresh."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from pglast import ast, parse_sql

import generate
from conftest import Hosted
from helpers import Connection, connect, install, value
from pg_rekey import local, release


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that a test may change."""
    shutil.copytree(release.SOURCES, tmp_path / "sql")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "SOURCES", tmp_path / "sql")
    monkeypatch.setattr(release, "DIST", tmp_path / "sql" / "dist")
    monkeypatch.setattr(release, "MIGRATION", tmp_path / "supabase" / "migration.sql")
    release.write()
    return tmp_path


def test_committed_files_are_fresh() -> None:
    assert release.stale() == []


@pytest.mark.parametrize("road", ["plain", "supabase"])
def test_script_is_plain_sql_without_transaction_control(road: release.Road) -> None:
    statements = parse_sql(release.assemble(road))
    assert not [raw for raw in statements if isinstance(raw.stmt, ast.TransactionStmt)]


def test_extension_script_refuses_psql() -> None:
    script = release.assemble("extension")
    assert script.startswith("\\echo Use")
    assert "pg_extension_config_dump" in script
    assert "pg_extension_config_dump" not in release.assemble("plain")


def test_version_is_written_once(conn: Connection) -> None:
    assert "__VERSION__" not in release.assemble("extension")
    assert value(conn, "select rekey.version()") == release.version()


def test_control_without_version(checkout: Path) -> None:
    (checkout / "sql" / "pg_rekey.control").write_text("comment = 'x'\n")
    with pytest.raises(ValueError, match="default_version"):
        release.version()


def test_code_can_be_loaded_again(conn: Connection) -> None:
    snapshot = (
        "select md5(string_agg(pg_get_functiondef(oid), '' order by oid)) from pg_proc where prokind <> 'a'"
    )
    before = value(conn, snapshot + " and pronamespace = 'rekey'::regnamespace")
    with conn.transaction():
        conn.execute(release.assemble_code().encode())
    conn.execute("reset search_path")
    assert value(conn, snapshot + " and pronamespace = 'rekey'::regnamespace") == before


def test_check_names_stale_files_and_write_mends_them(checkout: Path) -> None:
    dist = checkout / "sql" / "dist"
    assert CliRunner().invoke(release.main, ["--check"]).exit_code == 0
    (dist / "pg_rekey-plain.sql").write_text("select 1;\n")
    (dist / "pg_rekey--0.0.1.sql").touch()
    result = CliRunner().invoke(release.main, ["--check"])
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "sql/dist/pg_rekey-plain.sql is stale: run `make sql`",
        "sql/dist/pg_rekey--0.0.1.sql is stale: run `make sql`",
    ]
    assert CliRunner().invoke(release.main, []).exit_code == 0
    assert release.stale() == []


def test_installed_package_reads_assembled_scripts(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roads: tuple[release.Road, ...] = ("extension", "plain", "supabase")
    expected = {road: release.assemble(road) for road in roads}
    packaged = checkout / "packaged"
    shutil.copytree(checkout / "sql" / "dist", packaged)
    shutil.copy(checkout / "sql" / "pg_rekey.control", packaged)
    shutil.rmtree(checkout / "sql")
    monkeypatch.setattr(release, "PACKAGED", packaged)
    assert {road: release.sql_script(road) for road in roads} == expected


def test_wheel_holds_the_sql(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(release.ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        script = archive.read("pg_rekey/sql/pg_rekey-plain.sql").decode()
    assert {"pg_rekey/sql/pg_rekey.control", f"pg_rekey/sql/pg_rekey--{release.version()}.sql"} <= names
    assert script == release.assemble("plain")


def test_reference_is_fresh(conn: Connection) -> None:
    conn.execute("set search_path = pg_catalog")
    assert generate.reference(conn) == generate.REFERENCE.read_text()


def test_schema_is_fresh(db: str) -> None:
    with connect(db) as connection:
        major = connection.info.server_version // 10000
    if major != generate.SCHEMA_MAJOR:
        pytest.skip(f"docs/schema.sql is made on PostgreSQL {generate.SCHEMA_MAJOR}")
    assert generate.schema(local.ensure().bindir, db) == generate.SCHEMA.read_text()


def test_extension_road_ends_in_the_same_catalog(
    extension_files: None, conn: Connection, make_database: Callable[..., str]
) -> None:
    with connect(make_database()) as extended:
        extended.execute("create extension pg_rekey cascade")
        assert catalog(extended) == catalog(conn)


def test_every_table_is_dumped_with_the_extension(
    extension_files: None, make_database: Callable[..., str]
) -> None:
    unnamed = """
        select c.relname from pg_class c, pg_extension e
        where c.relnamespace = 'rekey'::regnamespace and c.relkind in ('r', 'p', 'S')
          and e.extname = 'pg_rekey' and c.oid <> all (e.extconfig)"""
    with connect(make_database()) as extended:
        extended.execute("create extension pg_rekey cascade")
        assert extended.execute(unnamed).fetchall() == []


def test_hosted_road_ends_in_the_same_catalog(hosted: Hosted, conn: Connection) -> None:
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(dsn) as connection:
        assert value(connection, "select current_user") == "postgres"
        if connection.info.server_version // 10000 != conn.info.server_version // 10000:
            pytest.skip("the hosted server is of another version, which prints views in another way")
        assert catalog(connection) == catalog(conn)


# The installer's name is left out, and the search path is that of the scripts: what differs still, differs.
CATALOG = """
with ours as (select oid from pg_namespace where nspname in ('rekey', 'rekey_targets')),
objects as (
  select 'function' as kind, p.oid, 'pg_proc'::regclass as class, p.oid::regprocedure::text as name,
    p.proowner as owner,
    coalesce(p.proacl, acldefault('f', p.proowner)) as acl, pg_get_functiondef(p.oid) as definition
  from pg_proc p where p.pronamespace in (select oid from ours)
    or p.pronamespace = 'public'::regnamespace
       and not exists (select from pg_depend d where d.objid = p.oid and d.deptype = 'e' and d.refobjid in (
         select oid from pg_extension where extname <> 'pg_rekey'))
  union all
  select 'relation ' || c.relkind::text, c.oid, 'pg_class', c.oid::regclass::text, c.relowner,
    coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's'::"char" else 'r' end, c.relowner)),
    concat_ws(' ', c.reloptions::text, c.relrowsecurity, c.relforcerowsecurity,
      case c.relkind when 'v' then pg_get_viewdef(c.oid) when 'i' then pg_get_indexdef(c.oid) end)
  from pg_class c where c.relnamespace in (select oid from ours)
  union all
  select 'schema', n.oid, 'pg_namespace', n.nspname, n.nspowner,
    coalesce(n.nspacl, acldefault('n', n.nspowner)), null
  from pg_namespace n where n.oid in (select oid from ours)
  union all
  select 'constraint', c.oid, 'pg_constraint', c.conrelid::regclass || '.' || c.conname, null, null,
    pg_get_constraintdef(c.oid)
  from pg_constraint c where c.connamespace in (select oid from ours)
  union all
  select 'policy', p.oid, 'pg_policy', p.polrelid::regclass || '.' || p.polname, null, null,
    concat_ws(' | ', p.polcmd, p.polpermissive, p.polroles::regrole[]::text,
      pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
  from pg_policy p
  union all
  select 'trigger', t.oid, 'pg_trigger', t.tgrelid::regclass || '.' || t.tgname, null, null,
    t.tgenabled::text || ' ' || pg_get_triggerdef(t.oid)
  from pg_trigger t join pg_class c on c.oid = t.tgrelid
  where c.relnamespace in (select oid from ours) and not t.tgisinternal
)
select kind, name,
  case pg_get_userbyid(owner) when current_user then 'installer' else pg_get_userbyid(owner) end,
  definition, obj_description(oid, class::name), null
from objects
union all
select 'privilege', kind || ' ' || name, coalesce(nullif(a.grantee, 0)::regrole::text, 'public'),
  a.privilege_type, a.is_grantable::text, null
from objects, aclexplode(acl) a where a.grantee <> owner
union all
select 'column', c.oid::regclass::text, a.attname, format_type(a.atttypid, a.atttypmod),
  concat_ws(' ', a.attnotnull, a.attgenerated, a.attidentity, a.attacl::text,
    pg_get_expr(d.adbin, d.adrelid)),
  col_description(c.oid, a.attnum)
from pg_class c
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
where c.relnamespace in (select oid from ours) and c.relkind in ('r', 'p', 'v')
"""


def catalog(connection: Connection) -> set[tuple[str | None, ...]]:
    """Return everything that pg_rekey installed: definitions, owners, privileges, comments."""
    connection.execute("""
        select set_config('search_path', 'pg_catalog, ' || quote_ident(n.nspname), false)
        from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'pgcrypto'""")
    return set(connection.execute(CATALOG))
