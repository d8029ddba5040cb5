"""docs/deploying.md and its examples: what they show is so, and nothing has more rights than it needs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from psycopg.conninfo import make_conninfo

from cli_fixtures import Cli
from helpers import Connection
from pg_rekey import release
from pg_rekey.errors import FINDINGS, USAGE
from test_docs import blocks

pytest_plugins = ["cli_fixtures"]

PAGE = release.ROOT / "docs" / "deploying.md"
EXAMPLES = release.ROOT / "examples"
UNIT = EXAMPLES / "systemd" / "pg-rekey.service"
MANIFESTS: list[dict[str, Any]] = [
    document
    for path in sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
BIN = "/opt/pg-rekey/bin"


def test_the_worker_needs_no_more_than_its_role(
    cli_ready: Cli, ready: Connection, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [statement] = blocks(PAGE, "sql")
    cli_ready("secrets", "set", "a", stdin="value")
    cli_ready("rotate")
    ready.execute("drop role if exists keys_worker")
    ready.execute(statement.encode())
    try:
        monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(db, user="keys_worker"))
        assert '"completed": [1]' in cli_ready("work")
        cli_ready("status", "--check", code=FINDINGS)  # there is no schedule
    finally:
        ready.execute("drop role keys_worker")


def test_refusals_are_printed_as_shown(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    [shown] = blocks(PAGE, "text")
    cases = re.findall(r"(?m)^\$ PG_REKEY_DSN='(.*)' pg-rekey status\n(Error: .*\nHint: .*\n)", shown)
    assert len(cases) == shown.count("$")
    for dsn, printed in cases:
        monkeypatch.setenv("PG_REKEY_DSN", dsn)
        cli("status", code=USAGE)
        assert cli.err == printed


def pods() -> list[Any]:
    """Return the templates of the pods that the manifests make."""
    specs = [one["spec"].get("jobTemplate", one)["spec"] for one in MANIFESTS if one["kind"] != "Service"]
    return [spec["template"] for spec in specs]


@pytest.mark.parametrize("template", pods(), ids=lambda one: one["spec"]["containers"][0]["name"])
def test_pods_have_no_rights(template: dict[str, Any], cli: Cli) -> None:
    """The Pod Security Standard `restricted`, a read-only file system, no token; and commands that exist."""
    spec = template["spec"]
    assert spec["automountServiceAccountToken"] is False
    shared = spec["securityContext"]
    assert shared["runAsNonRoot"] is True
    assert shared["seccompProfile"] == {"type": "RuntimeDefault"}
    # The image's user, who gets at the secrets by his group.
    assert {shared[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {10001}
    [container] = spec["containers"]
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    [volume] = spec["volumes"]
    assert volume["projected"]["defaultMode"] == 0o400
    [mount] = container["volumeMounts"]
    for variable in container["env"]:
        assert not variable["value"].startswith("/") or variable["value"].startswith(mount["mountPath"] + "/")
    scripts = [" ".join(["pg-rekey", *container.get("args", [])]), *container.get("command", [])]
    for script in scripts:
        for command in re.findall(r"pg-rekey ([\w .-]+)", script):
            assert "Usage:" in cli(*command.split(), "--help")


def test_selectors_find_their_pods() -> None:
    labels = [template["metadata"]["labels"] for template in pods()]
    selectors = [one["spec"]["selector"] for one in MANIFESTS if "selector" in one["spec"]]
    assert len(selectors) == 3
    assert all(one.get("matchLabels", one) in labels for one in selectors)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with the command of this environment in it: systemd-analyze looks whether it is there."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace(BIN, str(Path(sys.executable).parent)))
    return path


def analyze(*arguments: str | Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_units_are_valid_to_systemd(unit: Path, tmp_path: Path) -> None:
    once = tmp_path / f"{UNIT.name}.d" / "once.conf"
    analyze("verify", unit, UNIT.with_suffix(".timer"))
    once.parent.mkdir()
    once.write_text(UNIT.with_name(once.name).read_text().replace(BIN, str(Path(sys.executable).parent)))
    analyze("verify", unit)


def test_unit_is_a_sandbox(unit: Path) -> None:
    analyze("security", "--offline=true", "--threshold=15", unit)


def test_unit_gives_what_the_page_says() -> None:
    [_, credentials, _] = blocks(PAGE, "ini")
    assert set(credentials.splitlines()) <= set(UNIT.read_text().splitlines())


def test_workflow_finds_what_was_forgotten(cli_ready: Cli, ready: Connection) -> None:
    [job] = yaml.safe_load((EXAMPLES / "github-actions" / "keys.yml").read_text())["jobs"].values()
    assert not any("uses" in step for step in job["steps"])
    install, *commands = [step["run"] for step in job["steps"]]
    assert install == f"pipx install pg-rekey=={release.version()}"
    assert commands == ["pg-rekey columns find", "pg-rekey work", "pg-rekey doctor"]
    for command in commands[:2]:
        cli_ready(*command.split()[1:])
    ready.execute("create table t (id integer primary key, v text)")
    ready.execute("select rekey.protect_column('t', 'v', encrypt_on_write => false)")
    ready.execute("insert into t values (1, 'plain')")
    cli_ready(*commands[0].split()[1:], code=FINDINGS)
    cli_ready(*commands[2].split()[1:], code=FINDINGS)
