"""What goes wrong, as a person wants to read it: message, hint, exit code."""

from typing import IO, Any

import click
import psycopg

FAILED, USAGE, LOCKED, UNFINISHED, FINDINGS, INTERRUPTED = 1, 2, 3, 4, 5, 130

_EXIT_CODES = {"RK001": LOCKED, "RK002": LOCKED}
_HINTS = {
    "25006": "This server is a standby or read-only: use the primary.",
    "3F000": "pg_rekey is not installed in this database: run `pg-rekey init`.",
    "42501": "Connect as a member of the role that may do it: rekey_admin, rekey_operator, rekey_auditor, "
    "rekey_app.",
    "55P03": "Another session holds a lock on it: try again later.",
    "57014": "The statement was cancelled, or took longer than the statement_timeout of this role.",
}


class Problem(click.ClickException):
    """An error for a person: what is wrong, what to do about it, and the exit code of the command."""

    def __init__(self, message: str, hint: str | None = None, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.hint = hint
        self.exit_code = exit_code  # type: ignore[misc]  # a class variable to click

    def show(self, file: IO[Any] | None = None) -> None:
        """Print message and hint to standard error."""
        click.echo(f"Error: {self.message}", err=True, file=file)
        if self.hint:
            click.echo(f"Hint: {self.hint}", err=True, file=file)


def from_database(error: psycopg.Error) -> Problem:
    """Translate what the database or the connection to it says, without details: they may quote rows."""
    state = error.sqlstate or ""
    message = error.diag.message_primary or " ".join(str(error).split()) or type(error).__name__
    hint = error.diag.message_hint or _HINTS.get(state)
    if state in ("42883", "42P01") and "rekey." in message:
        hint = "pg_rekey is not installed in this database, or in another version: run `pg-rekey init`."
    return Problem(message + (f" [{state}]" if state else ""), hint, _EXIT_CODES.get(state, FAILED))
