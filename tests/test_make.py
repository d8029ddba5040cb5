"""What make says of what it was given."""

import os
import subprocess

from pg_rekey import release


def refused(*arguments: str) -> str:
    """Return what `make test` says that should fail."""
    ours = ("MAKE", "MFLAGS", "PYTEST", "PG_REKEY_TEST")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        ["make", "test", *arguments],
        cwd=release.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr


def test_arguments_that_select_no_test() -> None:
    said = refused("ARGS=--collect-only -q tests/test_make.py -k no_such_test")
    assert "ARGS selects no test: --collect-only -q tests/test_make.py -k no_such_test" in said


def test_arguments_without_quotes() -> None:
    assert 'several words are quoted: make test ARGS="-k nothing"' in refused("ARGS=-k", "nothing")
