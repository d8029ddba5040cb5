"""KEKs: where they come from, what is refused, and that no error shows one."""

import base64
import hmac
import os
import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_fixtures import Cli
from helpers import Connection, belong, value
from pg_rekey import kek as keks
from pg_rekey.errors import LOCKED, USAGE, Problem

pytest_plugins = ["cli_fixtures"]
pytestmark = pytest.mark.usefixtures("environment")

OTHER = bytes(range(32))


@given(st.binary(min_size=32, max_size=32), st.sampled_from(["", " ", "\n", "\r\n"]))
def test_both_spellings_give_the_same_kek(kek: bytes, end: str) -> None:
    assert keks.parse(kek.hex() + end) == kek
    assert keks.parse(kek.hex().upper() + end) == kek
    assert keks.parse(base64.b64encode(kek).decode() + end) == kek


@given(st.binary(max_size=200).filter(lambda kek: len(kek) != 32))
def test_other_lengths_are_refused(kek: bytes) -> None:
    for text in (kek.hex(), base64.b64encode(kek).decode()):
        if len(text) != 64 or len(kek) == 32:
            with pytest.raises(Problem):
                keks.parse(text)


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=65, max_size=80))
def test_no_error_shows_the_value(text: str) -> None:
    with pytest.raises(Problem) as caught:
        keks.parse(text)
    assert text not in f"{caught.value.message} {caught.value.hint}"


def test_fingerprint_is_that_of_the_database(ready: Connection, kek: bytes) -> None:
    assert keks.fingerprint(kek) == value(ready, "select fingerprint from rekey.keks")
    assert keks.fingerprint(kek) == hmac.digest(kek, b"pg_rekey/v1/fingerprint", "sha256").hex()[:32]


@pytest.mark.parametrize("kind", ["", "_FILE", "_COMMAND"])
def test_sources(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kek"
    path.write_text(OTHER.hex() + "\n")
    given = {"": OTHER.hex(), "_FILE": str(path), "_COMMAND": f"cat '{path}'"}[kind]
    monkeypatch.setenv("PG_REKEY_NEW_KEK" + kind, given)
    assert keks.read(keks.NEXT) == OTHER
    assert keks.read() is None


def test_two_sources_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", OTHER.hex())
    monkeypatch.setenv("PG_REKEY_KEK_FILE", "/nowhere")
    with pytest.raises(Problem, match="PG_REKEY_KEK and PG_REKEY_KEK_FILE") as caught:
        keks.read()
    assert caught.value.exit_code == LOCKED


def test_none_is_said_with_what_to_set() -> None:
    with pytest.raises(Problem, match="PG_REKEY_KEK_COMMAND"):
        keks.require()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"canary-of-a-key", OTHER.hex().encode()[:-1]])
def test_files_without_a_kek(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kek"
    path.write_bytes(content)
    monkeypatch.setenv("PG_REKEY_KEK_FILE", str(path))
    with pytest.raises(Problem, match="PG_REKEY_KEK_FILE is neither") as caught:
        keks.read()
    assert "canary" not in caught.value.message


def test_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_KEK_FILE", "/nowhere/kek")
    with pytest.raises(Problem, match="cannot be read: No such file"):
        keks.read()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/nowhere/command", "cannot be run: No such file or directory"),
        ("'unclosed", "cannot be run"),
        (" ", "cannot be run"),
        ("sh -c 'echo canary; echo canary >&2; exit 7'", "ended with exit code 7"),
        ("echo canary", "what PG_REKEY_KEK_COMMAND prints is neither"),
        ("echo $HOME", "what PG_REKEY_KEK_COMMAND prints is neither"),
    ],
)
def test_commands_that_fail(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PG_REKEY_KEK_COMMAND", command)
    with pytest.raises(Problem, match=message) as caught:
        keks.read()
    captured = capfd.readouterr()
    assert "canary" not in caught.value.message + captured.out + captured.err


def test_command_runs_again_until_it_prints_a_kek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kek"
    path.write_text("None\n")
    monkeypatch.setenv("PG_REKEY_KEK_COMMAND", f"cat '{path}'")
    with pytest.raises(Problem):
        keks.read()
    path.write_text(OTHER.hex())
    assert keks.read() == OTHER


def test_command_is_told_none_of_our_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it needs to reach a key service it keeps."""
    for name in (
        "DATABASE_URL",
        "PGDATABASE",
        "PGPASSFILE",
        "PGPASSWORD",
        "PGRST_JWT_SECRET",
        "PGSERVICEFILE",
        "PG_REKEY_ADOPT_FERNET",
        "PG_REKEY_API_TOKENS",
        "PG_REKEY_DSN",
        "PG_REKEY_METRICS_TOKENS",
        "PG_REKEY_NEW_KEK",
    ):
        monkeypatch.setenv(name, "canary")
    needed = {name: name.lower() for name in ("AWS_PROFILE", "HOME", "HTTPS_PROXY", "VAULT_TOKEN", "XPG")}
    for name, text in needed.items():
        monkeypatch.setenv(name, text)
    seen = tmp_path / "seen"
    monkeypatch.setenv("PG_REKEY_KEK_COMMAND", f"sh -c 'env > {seen}; echo {OTHER.hex()}'")
    assert keks.read() == OTHER
    lines = seen.read_text().splitlines()
    assert {f"{name}={text}" for name, text in needed.items()} <= set(lines)
    assert f"PATH={os.environ['PATH']}" in lines
    assert [line for line in lines if "canary" in line or line.startswith("PG")] == []


def test_command_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keks, "COMMAND_TIMEOUT", 0.2)
    # The shell's child keeps the pipe open: it has to go as well.
    monkeypatch.setenv("PG_REKEY_KEK_COMMAND", "sh -c 'sleep 60; true'")
    with pytest.raises(Problem, match=r"longer than 0\.2 s"):
        keks.read()


def test_command_is_ended_when_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.Popen.communicate", interrupt)
    monkeypatch.setenv("PG_REKEY_KEK_COMMAND", f"{sys.executable} -c 'import time; time.sleep(60)'")
    with pytest.raises(KeyboardInterrupt):
        keks.read()


def test_generate(cli: Cli, tmp_path: Path) -> None:
    printed = cli("kek", "generate")
    assert len(keks.parse(printed)) == 32
    assert cli("kek", "generate") != printed
    document = cli.json("kek", "generate")
    assert keks.fingerprint(keks.parse(document["kek"])) == document["fingerprint"]

    path = tmp_path / "kek"
    said = cli("kek", "generate", "--out", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().strip() not in said
    kept = path.read_text()
    cli("kek", "generate", "--out", path, code=1)
    assert path.read_text() == kept
    assert "exists already" in cli.err
    cli("kek", "generate", "--out", tmp_path / "no" / "such" / "folder", code=1)
    assert "No such file" in cli.err


def test_check_tells_the_number_of_a_copy(
    cli_ready: Cli, kek: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli_ready("kek", "check") == "KEK 1, active\n"
    copy = tmp_path / "copy"
    copy.write_text(OTHER.hex())
    cli_ready("kek", "check", "--file", copy, code=LOCKED)
    assert keks.fingerprint(OTHER) in cli_ready.err
    assert OTHER.hex() not in cli_ready.err
    assert [one["state"] for one in cli_ready.json("kek", "list")] == ["active"]


def test_rotation_of_the_kek_and_its_distribution(
    cli_ready: Cli, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli_ready("secrets", "set", "a", stdin="value")
    cli_ready("kek", "rotate", code=LOCKED)
    assert "there is no next KEK" in cli_ready.err
    monkeypatch.setenv("PG_REKEY_NEW_KEK", OTHER.hex())
    assert cli_ready("secrets", "get", "a") == "value"
    assert cli_ready.json("kek", "rotate") == {"kek": 2}
    # Whoever has both is served before and after; whoever has the old one only is not.
    assert cli_ready("secrets", "get", "a") == "value"
    monkeypatch.delenv("PG_REKEY_NEW_KEK")
    cli_ready("secrets", "get", "a", code=LOCKED)
    assert "wrong KEK [RK002]" in cli_ready.err
    assert cli_ready("kek", "check") == "KEK 1, retired\n"
    # Whoever has the new one as the next one only, too.
    monkeypatch.delenv("PG_REKEY_KEK")
    monkeypatch.setenv("PG_REKEY_NEW_KEK", OTHER.hex())
    assert cli_ready("secrets", "get", "a") == "value"


def test_rotation_without_a_kek(cli_ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_REKEY_KEK")
    cli_ready("kek", "rotate", code=LOCKED)
    assert "RK001" in cli_ready.err


def test_lost_kek(cli_ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli_ready("secrets", "set", "a", stdin="value")
    monkeypatch.setenv("PG_REKEY_KEK", OTHER.hex())
    cli_ready("kek", "replace", code=USAGE)
    cli_ready("kek", "replace", "--lost", code=1, stdin="n\n")
    assert "nothing was changed" in cli_ready.err
    cli_ready("kek", "replace", "--lost", code=1)
    assert "nobody answers" in cli_ready.err
    assert "database rekey_test_" in cli_ready.err
    cli_ready("kek", "replace", "--lost", stdin="y\n")
    states = [one["state"] for one in cli_ready.json("kek", "list")]
    assert states == ["lost", "active"]
    cli_ready("secrets", "get", "a", code=1)
    cli_ready("secrets", "set", "b", stdin="new")
    assert cli_ready("secrets", "get", "b") == "new"


def test_lost_kek_replaced_by_the_next_one(cli_ready: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_NEW_KEK", OTHER.hex())
    assert cli_ready.json("kek", "replace", "--lost", "--yes") == {"kek": 2}


def test_store_in_a_file(cli_ready: Cli, kek: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli_ready("kek", "store", "--provider", "file", code=USAGE)
    path = tmp_path / "for-the-server"
    said = cli_ready("kek", "store", "--provider", "file", "--out", path)
    assert "as pg_rekey.kek," in said
    assert kek.hex() not in said
    assert keks.read_file(path) == kek
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv("PG_REKEY_NEW_KEK", OTHER.hex())
    following = tmp_path / "next"
    stored = cli_ready.json("kek", "store", "--provider", "file", "--out", following, "--next")
    assert stored["target"] == "pg_rekey.kek_new"
    assert keks.read_file(following) == OTHER


VAULT = """
create schema vault;
create table vault.secrets (id uuid primary key default gen_random_uuid(), name text unique, secret text);
create view vault.decrypted_secrets as select id, name, secret as decrypted_secret from vault.secrets;
create function vault.create_secret(
  new_secret text, new_name text, new_description text, new_key_id uuid) returns uuid
language sql begin atomic
  insert into vault.secrets (name, secret) values (new_name, new_secret) returning id;
end;
create function vault.update_secret(
  secret_id uuid, new_secret text, new_name text, new_description text, new_key_id uuid) returns void
  language sql begin atomic update vault.secrets set secret = new_secret where id = secret_id; end;
"""


def test_store_in_the_vault_comes_before_everything(
    cli_db: Cli, conn: Connection, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute(VAULT)
    belong(conn, "supabase_vault", "vault")
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    cli_db("kek", "store", "--provider", "vault")
    assert value(conn, "select name from vault.secrets") == "pg_rekey_kek"


def test_store_in_the_vault(
    cli_ready: Cli, ready: Connection, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli_ready("kek", "store", "--provider", "vault", code=1)
    assert "no Supabase Vault" in cli_ready.err
    ready.execute(VAULT)
    belong(ready, "supabase_vault", "vault")
    for _ in range(2):
        assert "as pg_rekey_kek" in cli_ready("kek", "store", "--provider", "vault")
    assert value(ready, "select decrypted_secret from vault.decrypted_secrets") == kek.hex()
    cli_ready("settings", "set", "kek_provider", "vault")
    monkeypatch.delenv("PG_REKEY_KEK")
    cli_ready("secrets", "set", "a", stdin="opened by the server alone")
    assert cli_ready("secrets", "get", "a") == "opened by the server alone"
