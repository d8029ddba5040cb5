"""The root group: the one place where errors become messages, hints and exit codes."""

import re
from typing import Any, ClassVar

import click
import psycopg

from pg_rekey import db, names
from pg_rekey.cli import roles
from pg_rekey.cli.commands import COMMAND, TYPED, Group
from pg_rekey.errors import INTERRUPTED, LABEL, Problem, from_database, wrapped

AS_JSON = "pg_rekey.json"


class Root(Group):
    """The root group."""

    sections: ClassVar = {
        "To begin with": ("init", "rotate", "status", "work", "doctor"),
        "What is encrypted": ("secrets", "columns", "verify"),
        "Keys": ("keyrings", "keys", "rotations", "schedule", "kek"),
        "Audit and monitoring": ("audit", "notify", "metrics", "serve"),
        "Installation": ("settings", "upgrade", "uninstall", "sql", "demo", "completion"),
    }

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note whether errors are to be JSON, before anything can be wrong."""
        ctx.meta[AS_JSON] = "--json" in args[: args.index("--") if "--" in args else None]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a person sees neither a traceback nor what a secret could hide in."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, KeyboardInterrupt, psycopg.Error, UnicodeError) as error:
            problem = _problem(error)
        except BrokenPipeError:
            raise
        except OSError as error:
            problem = Problem(": ".join(str(part) for part in (error.filename, error.strerror) if part))
        if isinstance(problem, click.UsageError) and ctx.meta[AS_JSON]:
            problem = Problem(problem.format_message(), None, problem.exit_code)
        if isinstance(problem, Problem):
            problem.as_json = ctx.meta[AS_JSON]
            _advise(problem, ctx.meta.get(COMMAND, ""), ctx.meta.get(TYPED, {}))
        elif isinstance(problem, click.UsageError):
            said = wrapped(LABEL, problem.format_message()).removeprefix(LABEL)
            raise click.UsageError(said, problem.ctx)
        raise problem


def _problem(error: BaseException) -> click.ClickException:
    match error:
        case click.UsageError():
            return _pointed_to_keyring(error)
        case click.ClickException():
            return error
        case click.Abort():
            click.echo(err=True)  # what stands there is a question
        case psycopg.Error():
            return from_database(error)
        case UnicodeEncodeError():
            return Problem(
                f"this cannot be shown: the encoding of this terminal is {error.encoding}",
                "Set LANG=C.UTF-8, or another locale with UTF-8.",
            )
        case UnicodeError():
            return Problem("this is not UTF-8 text")
    return Problem("interrupted", None, INTERRUPTED)


def _pointed_to_keyring(error: click.UsageError) -> click.UsageError:
    """Return the error, with how a keyring is named where a command was given one as an argument."""
    given = re.fullmatch(r"Got unexpected extra argument \((.*)\)", error.message)
    if given and error.ctx and any("--keyring" in one.opts for one in error.ctx.command.params):
        return click.UsageError(f"{error.message}. A keyring is named by --keyring {given[1]}.", error.ctx)
    return error


def _advise(problem: Problem, command: str, typed: dict[str, str]) -> None:
    """Add to the hint what only another look at the database tells: the name that was meant, a role."""
    kind = names.kind(problem.action, problem.code)
    given = typed.get(kind or "")
    if problem.code != "42501" and given is None:
        return
    try:
        with db.connect(quiet=True) as connection:
            if problem.code == "42501":
                if not problem.action:
                    problem.hint = roles.advice(connection, command) or problem.hint
            elif kind and given and (question := names.meant(given, names.known(connection, kind, **typed))):
                problem.hint = " ".join(filter(None, (question, problem.hint)))
    except (psycopg.Error, Problem):
        return
