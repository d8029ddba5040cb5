"""Run the suite on every supported PostgreSQL and Python that can be had here, and say which those are."""

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import container
import servers
from pg_rekey import local

POSTGRES = ("15", "16", "17", "18")
PYTHON = ("3.11", "3.12", "3.13", "3.14")
# What depends most on the version of the server: what .ci/run has run beside the whole suite on one version.
SHORT = (
    "test_roads.py",
    "test_postgresql18.py",
    "test_secrets.py",
    "test_columns_write.py",
)
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


@contextlib.contextmanager
def server(version: str) -> Iterator[tuple[str, str] | str]:
    """The TARGET of this version and a search path that leads to it, or why there is none."""
    with contextlib.ExitStack() as stack:
        yield find_server(version, stack)


def find_server(version: str, stack: contextlib.ExitStack) -> tuple[str, str] | str:
    """Find the server of a major version: what is installed, what comes as a package, what Docker builds.

    A minor release is a package, and nothing else.
    """
    for one in local.installations():
        if str(one.major) == version:
            return "local", servers.search_path(one)
    package = version if "." in version else servers.packaged(version)
    try:
        if package:
            return "local", servers.search_path(stack.enter_context(servers.unpacked(package)))
        why = "not installed"
    except servers.Unavailable as error:
        why = f"not installed, and {error}"
    if "." in version or not container.answers():
        return f"{why}, and Docker does not answer"
    try:
        container.build(version)
    except click.ClickException as error:
        return f"{why}, and no image: {error.message.splitlines()[0]}"
    return f"docker:{version}", os.environ["PATH"]


def run(target: str, path: str, venv: str, interpreter: str, arguments: list[str]) -> tuple[bool, str]:
    """Run the suite; return whether it passed, and pytest's last line."""
    command = ["make", "test", f"TARGET={target}", f"VENV={venv}", f"PYTHON={interpreter}"]
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


def rows(
    postgres: Sequence[str], environments: dict[str, tuple[str, str | None]], arguments: list[str]
) -> Iterator[tuple[str, str, str, str, bool]]:
    """Run one combination after the other; yield the cells of its row, and whether it failed."""
    for major in postgres:
        with server(major) as found:
            if isinstance(found, str):
                yield major, "any", "", found, False
                continue
            for version, (venv, interpreter) in environments.items():
                if not interpreter:
                    yield major, version, found[0], "no Python of this version", False
                    continue
                print(f"PostgreSQL {major} ({found[0]}), Python {version}", flush=True)
                begun = time.monotonic()
                passed, last = run(*found, venv, interpreter, arguments)
                took = f"{time.monotonic() - begun:.0f} s"
                yield major, version, found[0], f"{'ok' if passed else 'FAILED'}, {took}: {last}", not passed


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--postgres", multiple=True, default=POSTGRES, help="A major version, or a release such as 15.14."
)
@click.option("--short", is_flag=True, help="The short suite, with the Python that this is, nothing missing.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(postgres: tuple[str, ...], short: bool, arguments: tuple[str, ...]) -> None:
    """Run all, then print what ran and what could not. ARGUMENTS are pytest's."""
    if short:
        environments: dict[str, tuple[str, str | None]] = {
            platform.python_version(): (sys.prefix, sys.executable)
        }
        arguments = (*(f"tests/{name}" for name in SHORT), *arguments)
    else:
        environments = {version: (f".venv-{version}", python(version)) for version in PYTHON}
    table = Table("PostgreSQL", "Python", "target", "result", box=None)
    failed = False
    for *cells, bad in rows(postgres, environments, list(arguments)):
        table.add_row(*cells)
        failed |= bad or (short and not cells[2])
    Console().print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
