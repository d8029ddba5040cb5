"""The connection ends between COMMIT and its answer: repeated, a command does what is left, and no more."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, LiteralString

import pytest

from cli_fixtures import Cli, eventually, process
from driving import check, fill, on_versions, rotation, run, states
from helpers import Connection, connect, unlock, value
from lossy import Lossy
from pg_rekey.errors import LOCKED

pytest_plugins = ["cli_fixtures"]

NEXT = bytes(range(32))
Lose = Callable[..., Lossy]
committed = pytest.mark.parametrize("answer", [True, False], ids=["answer lost", "COMMIT lost"])


@pytest.fixture
def lose(cli_ready: Cli, db: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lose]:
    """Let the command line go through a proxy that loses the nth COMMIT, or the answer to it."""
    proxies: list[Lossy] = []

    def begin(**options: Any) -> Lossy:
        proxies.append(Lossy(db, **options).__enter__())
        monkeypatch.setenv("PG_REKEY_DSN", proxies[-1].dsn)
        return proxies[-1]

    yield begin
    for proxy in proxies:
        proxy.__exit__(None, None, None)


def fails(cli: Cli, proxy: Lossy, *arguments: str | Path) -> None:
    """Run a command that loses its connection: it says so, and that the outcome is open."""
    cli(*arguments, code=9)
    assert proxy.lost.is_set()
    assert "server closed the connection" in cli.err
    assert "may have been committed" in cli.err
    assert "Traceback" not in cli.err


@committed
def test_rotate(cli_ready: Cli, ready: Connection, lose: Lose, answer: bool) -> None:
    model = fill(ready, 20)
    fails(cli_ready, lose(answer=answer), "rotate")
    assert value(ready, "select count(*) from rekey.rotations") == int(answer)
    if answer:
        cli_ready("rotate", code=7)
        assert "under way in rotation 1" in cli_ready.err
        assert "[RK004]" in cli_ready.err
    else:
        cli_ready("rotate")
    assert states(ready) == {1: "decrypt_only", 2: "active"}
    cli_ready("work")
    [row] = cli_ready.json("rotations", "list")
    assert (row["state"], row["rows_done"]) == ("completed", 20)
    check(ready, model)


@committed
@pytest.mark.parametrize("nth", [2, 3, 4, 6], ids=lambda nth: f"the {nth}. COMMIT")
def test_rotate_and_wait(cli_ready: Cli, ready: Connection, lose: Lose, nth: int, answer: bool) -> None:
    model = fill(ready, 20)
    fails(cli_ready, lose(nth=nth, answer=answer), "rotate", "--wait")
    begun = value(ready, "select count(*) from rekey.rotations")
    assert begun == int(nth > 2 or answer)
    cli_ready("work")
    assert value(ready, "select count(*) from rekey.rotations") == begun
    if begun:
        assert rotation(ready, 1, "state", "rows_done") == ("completed", 20)
        assert on_versions(ready) == {2: 20}
    check(ready, model)


@committed
@pytest.mark.parametrize("nth", [3, 5, 8], ids=lambda nth: f"the {nth}. COMMIT")
def test_work_forever(cli_ready: Cli, ready: Connection, lose: Lose, nth: int, answer: bool) -> None:
    model = fill(ready, 20)
    cli_ready("rotate")
    proxy = lose(nth=nth, answer=answer)
    with process("work", "--forever") as running:
        eventually(lambda: rotation(ready, 1, "state") == "completed")
        running.terminate()
        out, err = running.communicate(timeout=60)
    assert proxy.lost.is_set()
    assert (running.returncode, err) == (0, "")
    assert '"event": "error"' in out
    assert rotation(ready, 1, "rows_done", "attempts", "last_error") == (20, 0, None)
    check(ready, model)


@committed
def test_kek_rotate(
    cli_ready: Cli, ready: Connection, lose: Lose, monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    model = fill(ready, 3)
    monkeypatch.setenv("PG_REKEY_NEW_KEK", NEXT.hex())
    fails(cli_ready, lose(answer=answer), "kek", "rotate")
    if answer:
        cli_ready("kek", "rotate", code=LOCKED)
        assert "number 2 is active already" in cli_ready.err
    else:
        cli_ready("kek", "rotate")
    monkeypatch.delenv("PG_REKEY_NEW_KEK")
    monkeypatch.setenv("PG_REKEY_KEK", NEXT.hex())
    assert cli_ready.json("kek", "check")["state"] == "active"
    assert [row["state"] for row in cli_ready.json("kek", "list")] == ["retired", "active"]
    unlock(ready, NEXT)
    check(ready, model)


@committed
def test_secrets_import(cli_ready: Cli, ready: Connection, lose: Lose, tmp_path: Path, answer: bool) -> None:
    file = tmp_path / ".env"
    model = {f"NAME{n}": f"value {n}" for n in range(20)}
    file.write_text("".join(f'{name}="{it}"\n' for name, it in model.items()))
    fails(cli_ready, lose(answer=answer), "secrets", "import", file)
    assert value(ready, "select count(*) from rekey.secrets") == (20 if answer else 0)
    cli_ready("secrets", "import", file)
    check(ready, model)


OPENED: LiteralString = """
    select count(*) from t where rekey.decrypt_text(v, array['public.t.v', id::text]) = 'plain ' || id"""


@committed
@pytest.mark.parametrize("nth", [2, 3, 4, 5], ids=lambda nth: f"the {nth}. COMMIT")
def test_columns_adopt(cli_ready: Cli, ready: Connection, lose: Lose, nth: int, answer: bool) -> None:
    ready.execute("create table t (id integer primary key, v text)")
    ready.execute("insert into t select n, 'plain ' || n from generate_series(1, 200) n")
    cli_ready("columns", "protect", "t", "v")
    adopt = ("columns", "adopt", "t", "v", "--from", "plaintext")
    fails(cli_ready, lose(nth=nth, answer=answer), *adopt)
    if rotations := cli_ready.json("rotations", "list"):
        assert [row["id"] for row in rotations] == [1]
    cli_ready(*adopt)
    assert value(ready, OPENED) == 200
    assert value(ready, "select sum(rows_done) from rekey.rotations") == 200
    run(ready)
    check(ready, {})


@committed
def test_init(cli: Cli, empty: str, kek: bytes, monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    with Lossy(empty, answer=answer) as proxy, connect(empty) as connection:
        monkeypatch.setenv("PG_REKEY_DSN", proxy.dsn)
        fails(cli, proxy, "init")
        assert (value(connection, "select to_regnamespace('rekey')") is not None) == answer
        cli("init")
        assert value(connection, "select count(*) from rekey.keyrings") == 1
