"""A Supabase project from nothing to a rotation by pg_cron, by the statements of docs/supabase.md."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, LiteralString

import pytest
from psycopg.conninfo import make_conninfo

from cli_fixtures import Cli
from helpers import Connection, connect, install, value
from hosted import PROJECT, Hosted
from pg_rekey import release
from postgrest import PostgREST

pytest_plugins = ["cli_fixtures"]

PAGE = (release.ROOT / "docs" / "supabase.md").read_text()
CLI_PACKAGE = release.ROOT / "tests" / "supabase_cli" / "package.json"
OWN_TABLE = "create table {0} (id int);\nalter table {0} enable row level security;\n"
SCHEMAS = "rekey,rekey_targets,public"
ANNE = {
    "sub": "7d0f1e54-0000-4000-8000-000000000001",
    "app_metadata": {"tenant_id": "aaaaaaaa-0000-4000-8000-000000000000"},
}
BERT = {
    "sub": "7d0f1e54-0000-4000-8000-000000000002",
    "app_metadata": {"tenant_id": "bbbbbbbb-0000-4000-8000-000000000000"},
}

Supabase = Callable[..., subprocess.CompletedProcess[str]]


def statements(heading: str, language: str = "sql") -> list[str]:
    """Return the blocks of one language under a heading of the page."""
    [section] = re.findall(rf"(?ms)^## {heading}\n(.*?)(?=^## |\Z)", PAGE)
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", section)


def run(connection: Connection, blocks: list[str]) -> None:
    for block in blocks:
        connection.execute(block.encode())


@pytest.fixture
def folder(tmp_path: Path, cli: Cli) -> Path:
    """A project with a migration of its own, and pg_rekey's after it."""
    migrations = tmp_path / "supabase" / "migrations"
    migrations.mkdir(parents=True)
    shutil.copy(release.ROOT / "supabase" / "config.toml", tmp_path / "supabase")
    (migrations / "20250101000000_first.sql").write_text(OWN_TABLE.format("notes"))
    cli("sql", "--road", "supabase", "--project", tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def cli_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the Supabase CLI is, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    directory = tmp_path_factory.mktemp("supabase")
    shutil.copy(CLI_PACKAGE, directory)
    subprocess.run(
        [npm, "install", "--no-package-lock", "--no-audit", "--no-fund"],
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=300,
    )
    return directory / "node_modules" / ".bin"


@pytest.fixture
def supabase(cli_directory: Path, folder: Path) -> Supabase:
    """The Supabase CLI, run in the project."""

    def supabase(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [cli_directory / "supabase", *arguments],
            cwd=folder,
            env=os.environ | {"DO_NOT_TRACK": "1", "SUPABASE_TELEMETRY_DISABLED": "1"} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return supabase


def in_project(hosted: Hosted, name: str) -> str:
    """Make a database, with the extensions that supautils lets `postgres` create on hosted Supabase."""
    dsn = hosted.make_database(name)
    with connect(hosted.admin(dsn)) as admin:
        if hosted.server.installation.has("plpgsql_check"):
            admin.execute("create extension plpgsql_check schema extensions")
    return dsn


@pytest.mark.supabase_cli
def test_the_cli_pushes_the_migration_and_finds_nothing(
    hosted: Hosted, supabase: Supabase, folder: Path, kek: bytes
) -> None:
    name = "pushed"
    dsn = in_project(hosted, name)
    remote = f"--remote={hosted.url(name)}"
    pushed = supabase("db", "push", "--yes", remote)
    assert pushed.returncode == 0, pushed.stderr
    assert "pg_rekey.sql" in pushed.stdout + pushed.stderr
    again = supabase("db", "push", "--yes", remote)
    assert "up to date" in again.stdout + again.stderr
    with connect(dsn) as connection:
        assert value(connection, "select rekey.version()") == release.version()
        assert value(connection, "select count(*) from rekey.settings") == 0

    # A migration that comes after finds the search path as it was, and [db.vault] fills the Vault.
    after = max(path.name for path in (folder / "supabase" / "migrations").iterdir())
    later = f"{int(after.partition('_')[0]) + 1}_later.sql"
    (folder / "supabase" / "migrations" / later).write_text(OWN_TABLE.format("later"))
    [toml] = statements("Ways to bring the KEK", "toml")
    with (folder / "supabase" / "config.toml").open("a") as config:
        config.write(toml)
    pushed = supabase("db", "push", "--yes", remote, PG_REKEY_KEK=kek.hex())
    assert pushed.returncode == 0, pushed.stderr
    with connect(dsn) as connection:
        assert value(connection, "select to_regclass('public.later') is not null")
        assert value(connection, "select decrypted_secret from vault.decrypted_secrets") == kek.hex()
        run(connection, statements("From an empty project to the first scheduled rotation")[1:2])
        run(connection, statements("Secrets for an application"))

    findings = advisors(supabase("db", "advisors", "--output-format", "json", "--level", "warn", remote))
    with connect(dsn) as connection:
        early_bound = f"""
            select format('%s.%s', n.nspname, p.proname) from pg_proc p
            join pg_namespace n on n.oid = p.pronamespace
            where n.nspname = any ('{{{SCHEMAS}}}')
              and (p.prosqlbody is not null or p.prokind = 'p') and p.proconfig is null"""
        unavoidable = {name for (name,) in connection.execute(early_bound.encode())}
    assert {kind for kind, _ in findings} <= {"function_search_path_mutable"}
    assert {name for _, name in findings} == unavoidable

    if not hosted.server.installation.has("plpgsql_check"):
        pytest.skip("plpgsql_check is not installed")
    lint = supabase("db", "lint", "--level", "warning", "--fail-on", "warning", "-s", SCHEMAS, remote)
    assert lint.returncode == 0, lint.stdout + lint.stderr
    assert "No schema errors found" in lint.stdout + lint.stderr


def advisors(done: subprocess.CompletedProcess[str]) -> list[tuple[str, str]]:
    """Return what the advisors found in our schemas: kind and object."""
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    return [
        (one["name"], f"{one['metadata']['schema']}.{one['metadata']['name']}")
        for one in results
        if one["metadata"].get("schema") in SCHEMAS.split(",")
    ]


def test_from_an_empty_project_to_a_rotation_by_pg_cron(hosted: Hosted) -> None:
    """From SQL alone, without the orchestrator."""
    if not hosted.server.installation.has("pg_cron"):
        pytest.skip("pg_cron is not installed")
    dsn = hosted.make_database(PROJECT)
    install(dsn, release.assemble("supabase"))
    api = PostgREST(dsn)
    with connect(dsn) as connection:
        *steps, by_hand = statements("From an empty project to the first scheduled rotation")
        run(connection, steps)
        run(connection, statements("Secrets for an application"))

        secret = {"name": "stripe", "tenant_id": ANNE["app_metadata"]["tenant_id"]}  # type: ignore[index]
        stored = api.rpc("set_tenant_secret", secret | {"value": "sk_1"}, role="authenticated", claims=ANNE)
        assert stored.status == 200
        read = api.rpc("get_tenant_secret", secret, role="authenticated", claims=ANNE)
        assert (read.status, read.body) == (200, "sk_1")
        for role, claims, status in (
            ("authenticated", BERT, 403),
            ("authenticated", {}, 403),
            ("anon", {}, 401),
        ):
            refused = api.rpc("get_tenant_secret", secret, role=role, claims=claims)
            assert (refused.status, refused.body["code"]) == (status, "42501")
            assert "sk_1" not in json.dumps(refused.body)
        assert api.rpc("get_secret", secret, role="service_role").body == "sk_1"
        assert api.rpc("get_secret", secret, role="authenticated", claims=ANNE).status == 403

        rotated = api.rpc("rotate_keys", {"keyring": "default"}, role="service_role")
        assert (rotated.status, rotated.body["rotations"][0]["to_version"]) == (200, 2)
        assert api.rpc("rotate_keys", {"keyring": "default"}, role="service_role").status == 409
        assert api.rpc("rotate_keys", role="authenticated", claims=ANNE).status == 403
        denied = "select count(*) from rekey.audit_log where event = 'access.denied' and jwt_subject = %s"
        assert value(connection, denied, ANNE["sub"]) == 1

        deadline = time.monotonic() + 150
        while state(api) != "completed":
            assert time.monotonic() < deadline, state(api)
            time.sleep(0.5)
        assert value(connection, "select distinct username from cron.job") == "postgres"
        assert value(connection, "select key_version from rekey.secrets") == 2
        assert api.rpc("get_tenant_secret", secret, role="authenticated", claims=ANNE).body == "sk_1"
        run(connection, [by_hand])
        run(connection, statements("Rotating from an application"))
        connection.execute("select rekey.unschedule_worker()")


def state(api: PostgREST) -> str:
    status = api.rpc("key_rotation_status", role="service_role", method="GET").body
    return str(status["keyrings"][0]["rotation"]["state"])


def test_the_kek_goes_to_the_vault_by_the_orchestrator(
    hosted: Hosted, cli: Cli, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    monkeypatch.setenv("PG_REKEY_DSN", dsn)
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    assert "as pg_rekey_kek." in cli("kek", "store", "--provider", "vault")
    monkeypatch.delenv("PG_REKEY_KEK")
    with connect(dsn) as connection:
        run(connection, statements("From an empty project to the first scheduled rotation")[1:2])
        assert value(connection, "select fingerprint from rekey.keks") == value(
            connection, "select rekey._fingerprint(%s)", kek
        )


def test_the_kek_rotates_as_the_page_says(hosted: Hosted) -> None:
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    blocks = statements("From an empty project to the first scheduled rotation")
    with connect(dsn) as connection:
        run(connection, blocks[:2])
        connection.execute("select rekey.set_secret('a', 'b')")
        connection.execute(blocks[0].replace("'pg_rekey_kek'", "'pg_rekey_kek_new'").encode())
        assert value(connection, "select rekey.rotate_kek()") == 2
        rename = "select vault.update_secret(id, new_name => %s) from vault.secrets where name = %s"
        connection.execute(rename, ["kek_2026", "pg_rekey_kek"])
        assert value(connection, "select rekey.get_secret('a')") == "b"
        connection.execute(rename, ["pg_rekey_kek", "pg_rekey_kek_new"])
        assert value(connection, "select rekey.get_secret('a')") == "b"


def test_destruction_looks_at_everything_that_postgres_can_read(hosted: Hosted) -> None:
    """With row security on every table; `postgres` is no superuser, but row security does not apply to it."""
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(hosted.admin(dsn)) as admin:
        admin.execute("alter table auth.users enable row level security")
        admin.execute("create role runner login")
        admin.execute("grant usage on schema public, auth, vault to runner")
        admin.execute("grant select on auth.users, vault.secrets to runner")
    with connect(dsn) as connection:
        run(connection, statements("From an empty project to the first scheduled rotation")[:2])
        connection.execute("create table public.notes (id int, body text)")
        connection.execute("alter table public.notes enable row level security")
        connection.execute("alter table public.notes force row level security")
        connection.execute("insert into public.notes values (1, 'nothing')")
        connection.execute(
            "insert into auth.users (id, raw_user_meta_data)"
            " select gen_random_uuid(), jsonb_build_object('a', rekey.encrypt_text('x', 'default', '{t}'))"
        )
        connection.execute("grant select on public.notes to runner")
        connection.execute("grant rekey_operator to runner")
        connection.execute("select rekey.rotate_keys('default')")
        connection.execute("call rekey.tick()")
        connection.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
        connection.execute("call rekey.tick()")
        finding = "select relation, column_name, rows from rekey.search_findings"
        assert connection.execute(finding.encode()).fetchall() == [("auth.users", "raw_user_meta_data", 1)]
        error: LiteralString = "select last_error from rekey.worker_status"
        assert "auth.users.raw_user_meta_data" in value(connection, error)
        connection.execute("delete from auth.users")
        due: LiteralString = "update rekey.encryption_keys set destroy_after = now() where version = 1"
        with connect(make_conninfo(dsn, user="runner")) as runner:
            with connect(hosted.admin(dsn)) as admin:
                admin.execute(due)
            runner.execute("call rekey.tick()")
            assert "ALTER ROLE runner BYPASSRLS" in value(connection, error)
        with connect(hosted.admin(dsn)) as admin:
            admin.execute(due)
        connection.execute("call rekey.tick()")
        state: LiteralString = "select state from rekey.key_status where version = 1"
        assert value(connection, state) == "destroyed"
    with connect(hosted.admin(dsn)) as admin:
        admin.execute("drop owned by runner")
        admin.execute("drop role runner")


def test_the_seed_can_be_repeated(hosted: Hosted) -> None:
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(dsn) as connection:
        for _ in range(2):
            connection.execute((release.ROOT / "supabase" / "seed.sql").read_bytes())
        assert value(connection, "select name from rekey.keyrings") == "default"


def test_the_next_migration_comes_after_all_others(tmp_path: Path, cli: Cli) -> None:
    cli("sql", "--road", "supabase", "--project", tmp_path, code=2)
    assert "no Supabase project" in cli.err
    migrations = tmp_path / "supabase" / "migrations"
    migrations.mkdir(parents=True)
    (migrations / "20991231235959_far.sql").touch()
    (migrations / "20259999999999_odd.sql").touch()
    written = cli.json("sql", "--road", "supabase", "--project", tmp_path)
    path = migrations / "21000101000000_pg_rekey.sql"
    assert written["paths"] == [str(path)]
    assert path.read_text() == release.assemble("supabase")
    cli("sql", "--road", "supabase", "--project", tmp_path, code=1)
    assert "has it already" in cli.err
    path.unlink()
    (migrations / "20991231235959_far.sql").unlink()
    cli("sql", "--road", "supabase", "--project", tmp_path)
    [path] = migrations.glob("*_pg_rekey.sql")
    now = time.strftime("%Y%m%d%H%M%S", time.gmtime())
    assert int(now) - 100 < int(path.name.partition("_")[0]) <= int(now)
    cli("sql", "--project", tmp_path, code=2)
    assert "--road supabase" in cli.err


@pytest.mark.supabase_cli
def test_the_cli_forgets_the_migration_after_an_uninstallation(
    hosted: Hosted, supabase: Supabase, folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = in_project(hosted, "taken_out")
    remote = f"--remote={hosted.url('taken_out')}"
    assert supabase("db", "push", "--yes", remote).returncode == 0
    monkeypatch.setenv("PG_REKEY_DSN", dsn)
    printed = cli("uninstall", "--yes")
    [version] = re.findall(r"(?m)supabase migration repair --status reverted (\d+)$", printed)
    [path] = (folder / "supabase" / "migrations").glob(f"{version}_*.sql")
    path.unlink()
    pushed = supabase("db", "push", "--yes", remote)
    assert version in pushed.stdout + pushed.stderr  # it asks for just that repair
    assert pushed.returncode != 0
    repaired = supabase("migration", "repair", "--status", "reverted", version, "--yes", remote)
    assert repaired.returncode == 0, repaired.stderr
    pushed = supabase("db", "push", "--yes", remote)
    assert "up to date" in pushed.stdout + pushed.stderr
