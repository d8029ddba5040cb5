"""`pg-rekey audit`: the log, and checkpoints that its owner cannot forge."""

import json
import stat
from pathlib import Path

import pytest

from cli_fixtures import Cli
from helpers import Connection
from pg_rekey.errors import FINDINGS, USAGE

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def signer(cli_ready: Cli, tmp_path: Path) -> Path:
    """A private key; its public key lies beside it."""
    cli_ready("audit", "keygen", tmp_path / "signer")
    return tmp_path / "signer"


def test_keygen(cli: Cli, tmp_path: Path) -> None:
    document = cli.json("audit", "keygen", tmp_path / "key")
    assert stat.S_IMODE(Path(document["private"]).stat().st_mode) == 0o600
    assert "PUBLIC KEY" in Path(document["public"]).read_text()
    cli("audit", "keygen", tmp_path / "key", code=1)


def test_list(cli_ready: Cli) -> None:
    events = [entry["event"] for entry in cli_ready.json("audit", "list", "--keyring", "default")]
    assert events[-1] == "keyring.created"
    assert len(cli_ready("audit", "list", "--limit", "1").splitlines()) == 2


def test_whole(cli_ready: Cli) -> None:
    assert cli_ready("audit", "verify").startswith("the audit log is whole: ")


def test_anchor_holds(cli_ready: Cli, signer: Path, tmp_path: Path) -> None:
    anchor, public = tmp_path / "anchor", signer.with_name("signer.pub")
    cli_ready("audit", "checkpoint", "--key", signer, "--out", anchor)
    cli_ready("rotate")
    verified = cli_ready("audit", "verify", "--anchor", anchor, "--public-key", public)
    assert "whole and holds the anchor" in verified
    printed = cli_ready("audit", "checkpoint", "--key", signer)
    assert json.loads(printed)["algorithm"] == "Ed25519"
    cli_ready("audit", "verify", "--anchor", anchor, code=USAGE)


def test_a_changed_entry_is_found(cli_ready: Cli, ready: Connection) -> None:
    with ready.transaction():
        ready.execute("set local session_replication_role = replica")
        ready.execute("update rekey.audit_log set actor = 'nobody' where id = 2")
    document = cli_ready.json("audit", "verify", code=FINDINGS)
    assert document["first_bad"] == 2


def test_a_log_that_was_cut_is_found_by_the_anchor(
    cli_ready: Cli, ready: Connection, signer: Path, tmp_path: Path
) -> None:
    anchor, public = tmp_path / "anchor", signer.with_name("signer.pub")
    cli_ready("rotate")
    cli_ready("audit", "checkpoint", "--key", signer, "--out", anchor)
    with ready.transaction():
        ready.execute("set local session_replication_role = replica")
        ready.execute("delete from rekey.audit_log where id > 2")
        ready.execute(
            "update rekey._audit_head set (id, hash) = (select id, hash from rekey.audit_log where id = 2)"
        )
    assert "whole" in cli_ready("audit", "verify")
    said = cli_ready("audit", "verify", "--anchor", anchor, "--public-key", public, code=FINDINGS)
    assert "NOT whole" in said


def test_forged_checkpoints(cli_ready: Cli, signer: Path, tmp_path: Path) -> None:
    anchor, public = tmp_path / "anchor", signer.with_name("signer.pub")
    cli_ready("audit", "checkpoint", "--key", signer, "--out", anchor)
    signed = json.loads(anchor.read_text())
    forged = tmp_path / "forged"
    signed["checkpoint"]["entries"] += 1
    forged.write_text(json.dumps(signed))
    cli_ready("audit", "verify", "--anchor", forged, "--public-key", public, code=FINDINGS)
    assert "signature" in cli_ready.err
    for text in ("", "{}", "[]", '{"checkpoint": {}, "signature": "!"}'):
        forged.write_text(text)
        cli_ready("audit", "verify", "--anchor", forged, "--public-key", public, code=1)
    cli_ready("audit", "verify", "--anchor", anchor, "--public-key", anchor, code=1)
    cli_ready("audit", "checkpoint", "--key", public, code=1)
