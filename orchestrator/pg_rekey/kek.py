"""Key-encryption keys from the environment: read, checked, and never shown."""

import base64
import binascii
import functools
import hashlib
import hmac
import os
import re
import secrets
import shlex
import signal
import subprocess
from pathlib import Path

from pg_rekey.errors import LOCKED, Problem

CURRENT = "PG_REKEY_KEK"
NEXT = "PG_REKEY_NEW_KEK"
COMMAND_TIMEOUT = 30.0
_LABEL = b"pg_rekey/v1/fingerprint"
# What a command that fetches a KEK need not know: variables of ours, of libpq and of PostgREST, with DSNs,
# passwords, tokens and other KEKs in them. PATH, HOME, proxies and credentials of a key service stay.
_OURS = re.compile("PG|DATABASE_URL$")


def generate() -> str:
    """Make a new KEK, as 64 hexadecimal characters."""
    return secrets.token_hex(32)


def fingerprint(kek: bytes) -> str:
    """Return what the database knows a KEK by; the KEK does not follow from it."""
    return hmac.digest(kek, _LABEL, hashlib.sha256)[:16].hex()


def parse(text: str, source: str = "the KEK") -> bytes:
    """Return the 32 bytes of a KEK written as hexadecimal or base64; the error does not show the value."""
    trimmed = text.strip()
    if re.fullmatch(r"[0-9A-Fa-f]{64}", trimmed):
        return bytes.fromhex(trimmed)
    try:
        kek = base64.b64decode(trimmed, validate=True)
    except (binascii.Error, ValueError):
        kek = b""
    if len(kek) == 32:
        return kek
    raise Problem(
        f"{source} is neither 64 hexadecimal characters nor base64 of 32 bytes",
        "`pg-rekey kek generate` makes a KEK.",
        LOCKED,
    )


def read(name: str = CURRENT) -> bytes | None:
    """Return the KEK that NAME, NAME_FILE or NAME_COMMAND gives, or None where none of them is set."""
    found = _given(name)
    if found is None:
        return None
    try:
        return parse(_text(*found), _source(found[0]))
    except Problem:
        forget()
        raise


def read_text(name: str) -> str | None:
    """Return the text that NAME, NAME_FILE or NAME_COMMAND gives, or None where none of them is set."""
    found = _given(name)
    return _text(*found) if found else None


def _given(name: str) -> tuple[str, str] | None:
    """Return which of the three variables is set, and to what."""
    given = {
        variable: value
        for variable in (name, f"{name}_FILE", f"{name}_COMMAND")
        if (value := os.environ.get(variable))
    }
    if len(given) > 1:
        raise Problem(f"{' and '.join(given)} are set together", "Set only one of them.", LOCKED)
    return next(iter(given.items()), None)


def _text(variable: str, value: str) -> str:
    if variable.endswith("_FILE"):
        return _file_text(value, variable)
    return _run(value, variable) if variable.endswith("_COMMAND") else value


def _source(variable: str) -> str:
    return f"what {variable} prints" if variable.endswith("_COMMAND") else variable


def require(name: str = CURRENT) -> bytes:
    """Return the KEK from the environment, or say what to set."""
    kek = read(name)
    if kek is None:
        raise Problem(
            f"no KEK: none of {name}, {name}_FILE and {name}_COMMAND is set",
            "`pg-rekey kek generate` makes one. Keep it where the database's backups are not.",
            LOCKED,
        )
    return kek


def read_file(path: str | Path, source: str = "the file") -> bytes:
    """Return the KEK that a file holds."""
    return parse(_file_text(path, source), source)


def _file_text(path: str | Path, source: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise Problem(f"{source} cannot be read: {error.strerror}", None, LOCKED) from None


def forget() -> None:
    """Let commands run again that have run."""
    _run.cache_clear()


# A worker behind a pooler unlocks each transaction, as applications do: too often to ask a key service.
@functools.cache
def _run(command: str, source: str) -> str:
    """Return what a command prints or printed.

    No shell, a time limit, an environment without our own secrets, and its output is never shown.
    """
    try:
        process = subprocess.Popen(
            shlex.split(command),
            env={name: text for name, text in os.environ.items() if not _OURS.match(name)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError, IndexError) as error:
        reason = f": {error.strerror}" if isinstance(error, OSError) else ""
        raise Problem(f"{source} cannot be run{reason}", _NO_SHELL, LOCKED) from None
    with process:
        try:
            output, _ = process.communicate(timeout=COMMAND_TIMEOUT)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise Problem(f"{source} took longer than {COMMAND_TIMEOUT:g} s", None, LOCKED) from None
    if process.returncode != 0:
        message = f"{source} ended with exit code {process.returncode}"
        raise Problem(message, f"Its output is not shown: run it by hand. {_NO_SHELL}", LOCKED)
    return output.decode("utf-8", "replace")


_NO_SHELL = "There is no shell: a pipe, a variable or `&&` needs a script."
