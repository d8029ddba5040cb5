"""The documentation: what it shows was run, what it names is there."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import Connection, value
from pg_rekey import local, release

DOCS = release.ROOT / "docs"
README = release.ROOT / "README.md"
OPERATIONS = DOCS / "operations.md"
API = DOCS / "api.md"
DEPLOYING = DOCS / "deploying.md"
ALERTS = DOCS / "monitoring" / "alerts.yml"
DASHBOARD = DOCS / "monitoring" / "dashboard.json"
PAGES = sorted([*release.ROOT.glob("*.md"), *DOCS.glob("*.md"), *release.ROOT.glob("examples/*/*.md")])
# What differs from run to run.
CHANGING = (
    (r"\b[0-9a-f]{32}\b", "FINGERPRINT"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ", "TIME"),
    (r"(?m)^database .*$", "DATABASE"),
    (r"(?m) +$", ""),
)


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text())


def normalised(text: str) -> str:
    for pattern, replacement in CHANGING:
        text = re.sub(pattern, replacement, text)
    return text


@pytest.fixture
def shell(make_database: Callable[..., str], tmp_path: Path) -> Callable[[str], str]:
    """Return a function that runs a script on an empty database and returns all that it prints."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PG_REKEY_")}
    psql = shutil.which("psql")
    folders = [str(Path(sys.executable).parent), str(Path(psql).parent) if psql else "", os.environ["PATH"]]
    if not psql and (installation := local.find()):
        folders[1] = str(installation.bindir)
    environment |= {
        "PG_REKEY_DSN": make_database(),
        "PATH": os.pathsep.join(filter(None, folders)),
        "PYTHONWARNINGS": "error",
    }

    def run(script: str) -> str:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def test_readme_script_prints_what_the_readme_shows(shell: Callable[[str], str]) -> None:
    [script] = blocks(README, "bash")
    [shown] = blocks(README, "text")
    assert normalised(shell(script)) == normalised(shown)


def test_the_first_column_is_protected_rotated_and_verified(shell: Callable[[str], str]) -> None:
    if not shutil.which("psql") and not local.find():
        pytest.skip("the script needs psql")
    [script] = blocks(DOCS / "first-column.md", "bash")
    printed = shell(script)
    assert "\nrk1:\n" in printed
    assert "public.accounts  default        2  1,000       0\n" in printed
    assert "view public.accounts_decrypted made" in printed


def test_python_page_prints_what_it_says(shell: Callable[[str], str]) -> None:
    program, *_ = blocks(DOCS / "python.md", "python")
    [said] = re.findall(r"It prints (.*)\.\n", (DOCS / "python.md").read_text())
    prepared = (
        "pg-rekey kek generate --out kek >/dev/null; export PG_REKEY_KEK_FILE=kek; pg-rekey init >/dev/null"
    )
    printed = shell(f"{prepared}\n{shlex.quote(sys.executable)} - <<'END'\n{program}END\n")
    assert printed.splitlines() == re.findall(r"`([^`]*)`", said)


def test_operations_checklist_does_what_it_says(shell: Callable[[str], str]) -> None:
    if not shutil.which("psql") and not local.find():
        pytest.skip("the checklist needs psql")
    [script] = blocks(OPERATIONS, "bash")
    printed = shell(script)
    for expected in (
        "1 row opened",
        '"completed": [1]',
        "rotation 2 of keyring default is paused",
        "rotation 2 of keyring default is rolled_back",
        "exit code 5\n",
        "completed_with_failures",
        "exit code 4\n",
        "does not open: damaged",
        "version 2 of keyring default is compromised",
        "destroyed",
        "wrong KEK [RK002]",
        "exit code 3\n",
        "KEK 1, retired",
        "the audit log is whole and holds the anchor",
        "pg_rekey_locked 0.0",
    ):
        assert expected in printed
    assert printed.count("hunter2") == 2
    assert len(re.findall(r"(?m)^state +completed\b", printed)) == 2


def test_after_a_leak_of_the_kek_every_keyring_gets_a_key_that_it_does_not_open(
    shell: Callable[[str], str],
) -> None:
    section = OPERATIONS.read_text().split("### The KEK leaked\n")[1].split("\n## ")[0]
    [script] = re.findall(r"(?ms)^```sh\n(.*?)^```$", section)
    prepared = """
        set -eu
        pg-rekey kek generate --out kek
        export PG_REKEY_KEK_FILE=kek
        pg-rekey init
        printf hunter2 | pg-rekey secrets set a
        pg-rekey keyrings create busy
        pg-rekey rotate --keyring busy
        echo begun
    """
    printed = shell(
        f"{prepared}{script}\npg-rekey keys list --json > keys\npg-rekey secrets get a; echo; cat keys"
    )
    assert "hunter2\n[" in printed
    versions = json.loads(printed[printed.rindex("hunter2\n[") + len("hunter2\n") :])
    found = {(key["keyring"], key["version"]): (key["state"], key["kek_id"]) for key in versions}
    assert found == {
        ("busy", 1): ("decrypt_only", 2),
        ("busy", 2): ("decrypt_only", 2),
        ("busy", 3): ("active", 2),
        ("default", 1): ("compromised", 2),
        ("default", 2): ("active", 2),
    }


def test_api_examples_answer_what_they_say(shell: Callable[[str], str]) -> None:
    if not shutil.which("curl"):
        pytest.skip("the examples need curl")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    [script] = blocks(API, "bash")
    script = script.replace(":8080", f":{port}").replace(
        "pg-rekey serve >", f"pg-rekey serve --port {port} >"
    )
    # Nothing may go on running where an example fails.
    printed = shell("trap 'kill $! 2>/dev/null || true' EXIT\n" + script)
    for expected in (
        '{"status":"ok"}',
        '"state":"queued","trigger":"manual"',
        '"code":"RK004"',
        '"state":"completed","trigger":"manual"',
        '"version":2,"state":"active"',
        "pg_rekey_keyrings 1.0",
        '"code":"forbidden"',
        '"code":"unauthorized"',
        '"event": "stopped"',
    ):
        assert expected in printed
    assert printed.count('"event":"access.denied"') == 2


def test_deploying_shows_a_command_that_prints_the_kek(shell: Callable[[str], str]) -> None:
    [script] = blocks(DEPLOYING, "bash")
    assert "KEK 1, active\n" in shell("set -eu\n" + script)


def test_sql_of_the_readme_runs(ready: Connection) -> None:
    ready.execute("select rekey.set_secret('a', 'b')")
    [statements] = blocks(README, "sql")
    for statement in re.sub(r"--.*", "", statements).split(";"):
        if statement.strip():
            ready.execute(statement.encode())
    assert value(ready, "select state from rekey.rotation_status") == "completed"


def test_format_program_opens_its_vectors() -> None:
    [program] = blocks(DOCS / "format.md", "python")
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_sql_opens_the_vectors_of_the_format(conn: Connection) -> None:
    page = (DOCS / "format.md").read_text()
    assert value(conn, "select rekey._fingerprint(%s)", bytes(range(32))) in page
    wrapped, envelope = (
        bytes.fromhex("".join(re.findall(r'"([0-9a-f]+)"', text)))
        for text in re.findall(r"(?s)(?:wrapped_key|envelope) = bytes\.fromhex\((.*?)\n\)", page)
    )
    unwrap = "select rekey._unwrap(rekey._wrapping_key(%s), %s, rekey._wrap_aad(1, 1193046, 2))"
    dek = value(conn, unwrap, bytes(range(32)), wrapped)
    assert dek == bytes(range(64))
    [secret_id] = set(re.findall(r"6f9619ff-[0-9a-f-]+", page))
    opening = """
        select rekey._aead_decrypt(%s, substr(e, 12, 16), substr(e, 28),
          substr(e, 1, 11) || rekey._secret_context('00000000-0000-0000-0000-000000000000', %s))
        from (select %s::bytea) as t (e)"""
    assert value(conn, opening, dek, secret_id, envelope) == b"hunter2"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_assurance_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (DOCS / "assurance.md").read_text())
    assert len(named) > 80
    root = DOCS.parent
    missing = [name for path, name in named if f"def {name}(" not in (root / path).read_text()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?ms)^```.*?^```$", "", page.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("target", ["demo", "test", "lint", "prove"])
def test_readme_names_what_make_does(target: str) -> None:
    assert f"make {target}" in README.read_text()


def metric_names(connection: Connection) -> set[str]:
    """Return the names that rekey.metrics() can return."""
    definition = value(connection, "select pg_get_functiondef('rekey.metrics'::regproc)")
    return set(re.findall(r"'(pg_rekey_\w+)'", definition))


def test_metrics_are_described_all_of_them(conn: Connection) -> None:
    described = re.findall(r"(?m)^\| `(pg_rekey_\w+)` \|", OPERATIONS.read_text())
    assert sorted(described) == sorted(metric_names(conn) - {"pg_rekey_kek"})


def test_alerts_and_dashboard_use_metrics_that_exist(conn: Connection) -> None:
    rules = "\n".join(re.findall(r"(?m)^ +expr: (.*)$", ALERTS.read_text()))
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    names = metric_names(conn)
    for text in (rules, *queries):
        used = set(re.findall(r"pg_rekey_\w+", text))
        assert used
        assert used <= names


def test_alerts_are_described_and_complete() -> None:
    rules = re.split(r"(?m)^ +- alert: ", ALERTS.read_text())[1:]
    names = [rule.split("\n", 1)[0] for rule in rules]
    described = re.findall(r"(?m)^\| (PgRekey\w+) \|", OPERATIONS.read_text())
    assert names == described
    for rule in rules:
        assert re.search(r"(?m)^        expr: \S", rule)
        assert re.search(r"(?m)^          severity: (critical|warning|info)$", rule)
        assert re.search(r"(?m)^          summary: \S", rule)


def test_alert_rules_are_valid_to_prometheus() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    subprocess.run([promtool, "check", "rules", str(ALERTS)], check=True, capture_output=True)


def test_dashboard_panels_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_settings_are_described_all_of_them(ready: Connection) -> None:
    rows = ready.execute("select name, value from rekey.setting_status").fetchall()
    section = OPERATIONS.read_text().split("## Settings")[1].split("\n## ")[0]
    described = re.findall(r"(?m)^\| `(\w+)` \|", section)
    assert sorted(described) == sorted(name for name, _ in rows)


def test_exceptions_to_private_functions_are_those_in_the_design(conn: Connection) -> None:
    granted = conn.execute("""
        select p.proname
        from pg_proc p, aclexplode(p.proacl) a
        where p.pronamespace = 'rekey'::regnamespace and left(p.proname, 1) = '_' and a.grantee <> p.proowner
        """)
    section = (DOCS / "design.md").read_text().split("## Differences from the rules")[1]
    listed = set(re.findall(r"`(_\w+)`", section.split("\n- ")[1]))
    assert listed == {name for (name,) in granted}
