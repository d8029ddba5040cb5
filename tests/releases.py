"""A copy of the sources with three made-up releases. (PYTEST_DONT_REWRITE)"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pg_rekey import local, release

# No version of ours, and another one in each process: their extension files are in one folder.
FIRST, SECOND, THIRD = (f"{os.getpid()}.{minor}.0" for minor in (1, 2, 3))

# In the second release, secrets get an owner: the example of CONTRIBUTING.md.
COLUMN = """
alter table rekey.secrets add column owner text;
comment on column rekey.secrets.owner is 'Who answers for the secret, not encrypted.';
"""
OLD_SIGNATURE = (
    "drop function rekey.set_secret(text, text, uuid, text, text);\n"
    "drop function rekey.set_secrets(text[], text[], uuid, text, text[]);\n"
)
# In the third, there is a new table with its sequence.
TABLE = """
create table rekey.notes (
  id bigint generated always as identity constraint notes_pkey primary key,
  note text not null
);
comment on table rekey.notes is 'Notes.';
comment on column rekey.notes.id is 'Number.';
comment on column rekey.notes.note is 'Text.';
grant select on rekey.notes to rekey_auditor;
"""
FUNCTION = """
create or replace function rekey.note(note text) returns bigint
language sql volatile security definer
set search_path = pg_catalog, pg_temp
begin atomic
  insert into rekey.notes (note) values (note.note) returning id;
end;
comment on function rekey.note is 'Takes a note.';
grant execute on function rekey.note to rekey_admin;
"""


def use(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Let pg_rekey.release work on another checkout."""
    patch.setattr(release, "ROOT", root)
    patch.setattr(release, "SOURCES", root / "sql")
    patch.setattr(release, "DIST", root / "sql" / "dist")
    patch.setattr(release, "MIGRATIONS", root / "supabase" / "migrations")


def copy(root: Path, version: str) -> None:
    """Copy the sources, as they would be if nothing had been released yet."""
    shutil.copytree(Path(release.__file__).parent, root / "orchestrator" / "pg_rekey")
    shutil.copytree(release.SOURCES, root / "sql")
    for name in ("dist", "updates"):
        shutil.rmtree(root / "sql" / name, ignore_errors=True)
        (root / "sql" / name).mkdir()
    (root / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n")
    begin(root, version)


def begin(root: Path, version: str, updates: str = "") -> None:
    """Raise the version; from the second on, with what it changes in the state."""
    control = root / "sql" / "pg_rekey.control"
    [before] = re.findall(r"default_version = '(.*)'", control.read_text())
    edit(control, f"'{before}'", f"'{version}'")
    if updates:
        (root / "sql" / "updates" / f"{before}--{version}.sql").write_text(updates)


def edit(path: Path, old: str, new: str) -> None:
    """Replace something that is in a file."""
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


def invoke(*options: str, code: int = 0) -> list[str]:
    """Run `python -m pg_rekey.release`, and return what it says."""
    result = CliRunner().invoke(release.main, options, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output.splitlines()


def finish(root: Path, version: str) -> None:
    """Release what is there."""
    edit(root / "CHANGELOG.md", "## Unreleased\n", f"## Unreleased\n\n## [{version}] - 2026-12-01\n")
    invoke()
    invoke("--freeze")
    invoke("--check")


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with two releases and a third that is about to be one."""
    root = tmp_path_factory.mktemp("history")
    copy(root, FIRST)
    secrets, code = root / "sql" / "schema" / "40_secrets.sql", root / "sql" / "code"
    with pytest.MonkeyPatch.context() as patch:
        use(root, patch)
        finish(root, FIRST)

        begin(root, SECOND, COLUMN + OLD_SIGNATURE)
        edit(secrets, "  constraint secrets_pkey", "  owner text,\n  constraint secrets_pkey")
        secrets.write_text(secrets.read_text() + COLUMN.split("\n", 2)[2])
        code_of_secrets = code / "42_secrets.sql"
        for old, new in (
            ("descriptions text[] = null\n", "descriptions text[] = null, owners text[] = null\n"),
            ("description = coalesce(", "owner = owners[v_place], description = coalesce("),
            ("ciphertext, description)", "ciphertext, owner, description)"),
            ("n.envelope, n.description", "n.envelope, n.owner, n.description"),
            (
                "v_envelopes, descriptions) as n(id, name, envelope, description)",
                "v_envelopes, descriptions, owners) as n(id, name, envelope, description, owner)",
            ),
            ("description text = null\n", "description text = null, owner text = null\n"),
            ("array[description])", "array[description], array[owner])"),
        ):
            edit(code_of_secrets, old, new)
        # And a function of every protected column has another body, as has the trigger that encrypts.
        columns, protection = code / "51_columns.sql", code / "52_protect.sql"
        edit(columns, "  written := 0;\n", "  written := /* rows */ 0;\n")
        edit(protection, "  v_length := octet_length(", "  v_length := /* bytes */ octet_length(")
        finish(root, SECOND)

        begin(root, THIRD, TABLE)
        (root / "sql" / "schema" / "75_notes.sql").write_text(TABLE)
        (code / "75_notes.sql").write_text(FUNCTION)
        # One takes other arguments.
        edit(columns, "relation regclass, template text", "relation regclass, pattern text")
        edit(columns, "return format(template,", "return format(pattern,")
        edit(columns, "elsif template is null", "elsif pattern is null")
        invoke()
        invoke("--check")
    return root


@pytest.fixture
def made_up(history: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That checkout, in place of this one."""
    use(history, monkeypatch)
    return history


@pytest.fixture
def made_up_files(made_up: Path, extension_files: None) -> Iterator[None]:
    """The files of its extension are where CREATE EXTENSION looks for them."""
    files = sorted(release.DIST.glob("pg_rekey--*.sql"))
    if command := os.environ.get("PG_REKEY_TEST_PUT_EXTENSION"):
        subprocess.run([*shlex.split(command), *files], check=True, capture_output=True)
        yield
        return
    folder = local.ensure().extensions
    for path in files:
        shutil.copy(path, folder)
    yield
    for path in files:
        (folder / path.name).unlink()


def script(*versions: str) -> str:
    """Return one of its scripts for the plain road: an installation, or a step."""
    text = (release.DIST / f"pg_rekey--{'--'.join(versions)}.sql").read_text()
    return text.removeprefix(release.EXTENSION_GUARD)
