"""What goes wrong, as a person wants to read it: message, hint, exit code."""

import json
import re
import shutil
import sys
from typing import IO, Any

import click
import psycopg
from click.formatting import wrap_text

from pg_rekey import hints
from pg_rekey.hints import Road

FAILED, USAGE, LOCKED, UNFINISHED, FINDINGS = 1, 2, 3, 4, 5
NOT_FOUND, UNDER_WAY, IN_USE, UNREACHABLE, INTERRUPTED = 6, 7, 8, 9, 130

LABEL = "Error: "
# The server ends sessions: its administrator's wish, a crash.
ENDED = ("57P01", "57P02")
_EXIT_CODES = {
    "RK001": LOCKED,
    "RK002": LOCKED,
    "RK004": UNDER_WAY,
    "RK005": IN_USE,
    "RK007": NOT_FOUND,
}
# Refusals that are findings about the data, by their action.
_FINDINGS = ("looks_encrypted", "values_are_tokens")


class Problem(click.ClickException):
    """An error for a person: what is wrong, what to do about it, and the exit code of the command.

    code: the SQLSTATE, where there is one. action: what its hint is about, a key of hints.ACTIONS.
    """

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        exit_code: int = FAILED,
        code: str | None = None,
        action: str | None = None,
    ) -> None:
        super().__init__(message)
        self.hint = hint
        self.exit_code = exit_code  # type: ignore[misc]  # a class variable to click
        self.code = code
        self.action = action
        self.as_json = False

    def show(self, file: IO[Any] | None = None) -> None:
        """Print message and hint to standard error: as JSON, or for a person as wide as the terminal."""
        if self.as_json:
            document = {
                "code": self.code,
                "message": self.message,
                "hint": self.hint,
                "exit_code": self.exit_code,
            }
            click.echo(json.dumps(document, ensure_ascii=False), err=True, file=file)
            return
        code = f" [{self.code}]" if self.code else ""
        click.echo(wrapped(LABEL, f"{self.message}{code}"), err=True, file=file)
        if self.hint:
            click.echo(wrapped("Hint: ", self.hint), err=True, file=file)


def wrapped(label: str, text: str) -> str:
    """Return a text that a terminal does not break within a word; elsewhere one line."""
    if not sys.stderr.isatty():
        return label + text
    return wrap_text(label + text, shutil.get_terminal_size().columns, subsequent_indent=" " * len(label))


def missing(action: str, message: str) -> Problem:
    """Return the error that there is no such thing, where the database returned no row."""
    return Problem(message, hints.ACTIONS[action].command, NOT_FOUND, "RK007", action)


# What the HTTP API answers for an SQLSTATE, or for all of its class.
HTTP_STATUS = {
    "RK001": 503,
    "RK002": 500,
    "RK003": 422,
    "RK004": 409,
    "RK005": 409,
    "RK006": 409,
    "RK007": 404,
    "22007": 400,
    "22008": 400,
    "22015": 400,
    "22023": 400,
    "23505": 409,
    "42501": 403,
    "25006": 503,
    "3F000": 503,
    "55P03": 503,
    "08": 503,
    "40": 503,
    "53": 503,
    "57": 503,
    "58": 503,
}


def from_database(error: psycopg.Error) -> Problem:
    """Translate what the database or the connection to it says, without details: they may quote rows."""
    state = error.sqlstate
    message, hint = explain(error)
    action = error.diag.constraint_name
    if action in _FINDINGS:
        code = FINDINGS
    elif isinstance(error, psycopg.OperationalError) and state is None:
        code = UNREACHABLE
    else:
        code = _EXIT_CODES.get(state or "", FAILED)
    return Problem(message, hint, code, state, action)


def explain(error: psycopg.Error, road: Road = Road.COMMAND) -> tuple[str, str | None]:
    """Return message and hint of a database error, the hint in the words of a road."""
    message = error.diag.message_primary or _one_line(str(error)) or type(error).__name__
    if _is_lost(error):
        return message, hints.LOST.on(road)
    if is_missing(error):
        return message, hints.MISSING.on(road)
    if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:
        return message, hints.unreachable(error).on(road)
    return message, hints.hint(error.diag, road) or hints.of_state(error.sqlstate, road)


def _one_line(message: str) -> str:
    """Return what libpq says as one line, with the full stops that its line breaks stand for."""
    return " ".join(re.sub(r"(?<=\w)\s*\n\s*(?=[A-Z])", ". ", message.strip()).split())


def http_status(error: psycopg.Error) -> int | None:
    """Return the HTTP status of a database error, or None for one that nobody foresaw."""
    if error.sqlstate is None:
        return 503 if isinstance(error, psycopg.OperationalError) else None
    if is_missing(error):
        return 503
    return HTTP_STATUS.get(error.sqlstate) or HTTP_STATUS.get(error.sqlstate[:2])


def _is_lost(error: psycopg.Error) -> bool:
    """Tell whether a connection ended while something was under way; libpq has no code for it."""
    if error.sqlstate is None:
        return str(error).startswith("consuming input failed")
    return error.sqlstate in ENDED


def is_missing(error: psycopg.Error) -> bool:
    """Tell whether pg_rekey is not there, or a function or relation of it."""
    if error.sqlstate == "3F000":
        return "rekey" in (error.diag.message_primary or "")
    return error.sqlstate in ("42883", "42P01") and "rekey." in (error.diag.message_primary or "")
