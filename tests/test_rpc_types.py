"""supabase/pg_rekey.ts: what the RPC answers is of these types, says the TypeScript compiler."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import rpc_types
from helpers import Connection, value

pytestmark = pytest.mark.npm

PACKAGE = {"private": True, "devDependencies": {"typescript": "^5.9.0"}}


def test_it_is_fresh() -> None:
    assert rpc_types.TYPES.read_text() == rpc_types.typescript(), "run `make sql`"


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the TypeScript compiler is, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("typescript")
    (folder / "package.json").write_text(json.dumps(PACKAGE))
    install = [npm, "install", "--no-package-lock", "--no-audit", "--no-fund"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def check(folder: Path, answers: dict[str, list[Any]]) -> str:
    """Return what the compiler says of answers of these types; '' is right."""
    shutil.copy(rpc_types.TYPES, folder)
    lines = [f'import type {{ {", ".join(answers)} }} from "./pg_rekey";']
    for name, given in answers.items():
        lines += [f"export const {name}_{n}: {name} = {json.dumps(one)};" for n, one in enumerate(given)]
    (folder / "answers.ts").write_text("\n".join(lines))
    tsc = [str(folder / "node_modules" / ".bin" / "tsc"), "--noEmit", "--strict", "answers.ts"]
    done = subprocess.run(tsc, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_answers_are_of_these_types(compiler: Path, ready: Connection) -> None:
    """In every state that is made here: an object in a literal may have no field that its type has not."""
    status: list[Any] = [value(ready, "select public.key_rotation_status()")]
    ready.execute("select rekey.create_keyring('empty'), rekey.set_secret('a', 'b')")
    rotated = [value(ready, "select public.rotate_keys()"), value(ready, "select public.rotate_keys()")]
    status.append(value(ready, "select public.key_rotation_status()"))
    ready.execute("select rekey.set_schedule('default', '90 days')")
    ready.execute("call rekey.tick()")
    status.append(value(ready, "select public.key_rotation_status()"))
    assert sorted(rotated[1]["passed_by"]) == ["default", "empty"]
    assert check(compiler, {"KeyRotationStatus": status, "RotateKeys": rotated}) == ""


def test_the_compiler_sees_what_is_wrong(compiler: Path, ready: Connection) -> None:
    status: Any = value(ready, "select public.key_rotation_status()")
    more = {**status, "unknown": 1}
    less = {name: status[name] for name in status if name != "worker"}
    said = check(compiler, {"KeyRotationStatus": [status, more, less]})
    assert "does not exist in type 'KeyRotationStatus'" in said
    assert "Property 'worker' is missing" in said
    assert "KeyRotationStatus_0" not in said
