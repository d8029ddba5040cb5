"""Run the suite on every supported PostgreSQL and Python that can be had here, and say which those are."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import container
from pg_rekey import local

POSTGRES = ("15", "16", "17", "18")
PYTHON = ("3.11", "3.12", "3.13", "3.14")
PYENV = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()


def python(version: str) -> str | None:
    """Return a Python of this version that can make virtual environments."""
    check = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    on_path = shutil.which(f"python{version}")
    for place in ([on_path] if on_path else []) + sorted(
        map(str, PYENV.glob(f"versions/{version}.*/bin/python"))
    ):
        if (
            subprocess.run([place, "-c", check], capture_output=True, text=True, check=False).stdout
            == f"{version}\n"
        ):
            return place
    return None


def server(version: str) -> tuple[str, str] | str:
    """Return the TARGET of this version and a search path that leads to it, or why there is none."""
    for one in local.installations():
        if one.major == int(version):
            return "local", f"{one.bindir}{os.pathsep}{os.environ['PATH']}"
    if not container.answers():
        return "not installed, and Docker does not answer"
    try:
        container.build(version)
    except click.ClickException as error:
        return f"not installed, and no image: {error.message.splitlines()[0]}"
    return f"docker:{version}", os.environ["PATH"]


def run(target: str, path: str, version: str, interpreter: str, arguments: list[str]) -> tuple[bool, str]:
    """Run the suite; return whether it passed, and pytest's last line."""
    command = ["make", "test", f"TARGET={target}", f"VENV=.venv-{version}", f"PYTHON={interpreter}"]
    last = "nothing ran"
    environment = {name: text for name, text in os.environ.items() if name != container.DSN} | {"PATH": path}
    with subprocess.Popen(
        [*command, f"ARGS={shlex.join(arguments)}"], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if found := re.search(r"(\d+ (?:passed|failed|skipped|error).*) in [\d.]+s", line):
                last = found[1]
    return process.returncode == 0, last


def rows(arguments: list[str]) -> Iterator[tuple[str, str, str, str, bool]]:
    """Run one combination after the other; yield the cells of its row, and whether it failed."""
    interpreters = {version: python(version) for version in PYTHON}
    for postgres in POSTGRES:
        found = server(postgres)
        if isinstance(found, str):
            yield postgres, "any", "", found, False
            continue
        for version, interpreter in interpreters.items():
            if not interpreter:
                yield postgres, version, found[0], "no Python of this version", False
            else:
                print(f"PostgreSQL {postgres} ({found[0]}), Python {version}", flush=True)
                begun = time.monotonic()
                passed, last = run(*found, version, interpreter, arguments)
                took = f"{time.monotonic() - begun:.0f} s"
                yield (
                    postgres,
                    version,
                    found[0],
                    f"{'ok' if passed else 'FAILED'}, {took}: {last}",
                    not passed,
                )


def main() -> None:
    """Run all, then print what ran and what could not."""
    table = Table("PostgreSQL", "Python", "target", "result", box=None)
    failed = False
    for *cells, bad in rows(sys.argv[1:]):
        table.add_row(*cells)
        failed |= bad
    Console().print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
