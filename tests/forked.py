"""pg-rekey in a process that was forked for one command, which saves the time to load it."""

import os
import sys
from pathlib import Path

from pg_rekey.cli import main


def call(
    arguments: tuple[str, ...], environment: dict[str, str], stdin: Path, out: Path, err: Path
) -> None:  # pragma: no cover: in another process
    """Be pg-rekey, in a process that was forked for it."""
    os.environ.clear()
    os.environ.update(environment)
    for number, (path, flags) in enumerate(
        ((stdin, os.O_RDONLY), (out, os.O_WRONLY | os.O_CREAT), (err, os.O_WRONLY | os.O_CREAT))
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    main.main(args=list(arguments), prog_name="pg-rekey")
