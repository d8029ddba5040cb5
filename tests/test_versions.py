"""Versions of PostgreSQL and Python are the same everywhere, and looked at in one place (docs/design.md)."""

import re
import tomllib

import matrix
from pg_rekey import local, release

PYPROJECT = tomllib.loads((release.ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = (release.ROOT / ".github/workflows/ci.yml").read_text()


def numbers(text: str) -> set[str]:
    return set(re.findall(r'"([\d.]+)"', text))


def test_supported_postgres_is_the_same_everywhere() -> None:
    header = (release.SOURCES / "header.sql").read_text()
    assert f"::int < {local.OLDEST}0000 then" in header
    assert matrix.POSTGRES[0] == str(local.OLDEST)
    assert numbers(" ".join(re.findall(r"postgres: (.*)", WORKFLOW))) >= set(matrix.POSTGRES)


def test_supported_python_is_the_same_everywhere() -> None:
    assert PYPROJECT["requires-python"] == f">={matrix.PYTHON[0]}"
    named = [f"Programming Language :: Python :: {version}" for version in matrix.PYTHON]
    assert named == [one for one in PYPROJECT["classifiers"] if re.search(r"Python :: 3\.", one)]
    assert numbers(" ".join(re.findall(r"python: (.*)", WORKFLOW))) >= set(matrix.PYTHON)


def test_only_the_header_looks_at_the_version_of_the_server() -> None:
    """And doctor, which knows minor versions with flaws."""
    files = [*release.SOURCES.glob("*/*.sql"), *release.SOURCES.glob("*.sql")]
    files += (release.ROOT / "orchestrator").rglob("*.*")
    looking = {
        path.name
        for path in files
        if path.suffix in (".sql", ".py") and path.parent != release.DIST
        if re.search(r"server_version|version\(\)\s*~|info\.server", path.read_text())
    }
    assert looking == {"header.sql", "queries.sql"}


def test_the_workflow_installs_what_the_tests_want() -> None:
    wanted = [f'"postgresql-$POSTGRES-{package}"' for package in local.COMPANIONS.values()]
    for package in (*wanted, *local.TEST_TOOLS.values()):
        assert re.search(rf" {re.escape(package)}[ \n]", WORKFLOW), package


def test_actions_are_pinned() -> None:
    uses = re.findall(r"uses: (.*)", WORKFLOW)
    assert uses
    assert [one for one in uses if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", one)] == []
