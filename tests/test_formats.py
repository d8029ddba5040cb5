"""Values as real libraries wrote them: adopted, equal, rotated, equal.

tests/ciphertexts has what makes them, with the versions, and what that printed once. Where the libraries can
be had, they make fresh ones.
"""

import json
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from cli_fixtures import Cli
from driving import rotate, run
from helpers import Connection, value
from pg_rekey import formats, release
from pg_rekey.formats import wrappers

pytest_plugins = ["cli_fixtures"]

CIPHERTEXTS = release.ROOT / "tests" / "ciphertexts"
UV = Path(__file__).parent.parent / ".venv" / "bin" / "uv"
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
    patch.setenv(formats.variable(name), "\n".join(dict.fromkeys(entry["key"] for entry in entries)))
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
        patch.setenv(formats.variable(entry["format"]), entry["key"])
        one = stored(entry)
        raw = one if isinstance(one, bytes) else one.encode()
        if entry["format"] == "openssl":  # base64 is the database's to take off
            raw = formats.base.unbase64(raw)
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
