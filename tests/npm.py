"""Running npm, for tests that need packages of it."""

import shutil
import subprocess
from pathlib import Path

import pytest


def npm(folder: Path, *arguments: str) -> str:
    """Run npm in a folder, and return what it prints; skip the test where there is none."""
    program = shutil.which("npm")
    if program is None:
        pytest.skip("npm is not installed")
    done = subprocess.run(
        [program, *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(folder: Path, *packages: str | Path) -> None:
    """Install what a folder's package.json names, and these packages."""
    npm(folder, "install", "--no-package-lock", "--no-audit", "--no-fund", *map(str, packages))
