"""`pg-rekey uninstall`: everything decrypted, everything kept, everything of ours gone."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import psycopg

from pg_rekey import db, worker
from pg_rekey import uninstall as steps
from pg_rekey.archive import Document
from pg_rekey.cli import words
from pg_rekey.cli.base import FilePath, Output, confirm, output, to_json, write_new, yes_option
from pg_rekey.cli.columns import release
from pg_rekey.cli.commands import Command
from pg_rekey.errors import FINDINGS, INTERRUPTED, Problem, explain
from pg_rekey.uninstall import Column, Plan

Report = dict[str, Any]


@click.command(cls=Command, example="pg-rekey uninstall --dry-run")
@click.option("--export", type=FilePath, metavar="FILE", help="Write all secrets, plain, to this new file.")
@click.option("--audit-log", type=FilePath, metavar="FILE", help="Write the audit log to this new file.")
@click.option(
    "--dry-run", is_flag=True, help="Look at everything, change nothing. Exit code 5: it cannot be."
)
@yes_option
@output
def uninstall(out: Output, export: Path | None, audit_log: Path | None, dry_run: bool, yes: bool) -> None:
    """Decrypt every protected column, write secrets and audit log to files, and drop pg_rekey.

    For a superuser, or the role that installed it. Nothing is lost: it refuses while an envelope remains
    anywhere, a row does not open, or something of yours needs pg_rekey, and says which. Stop what writes
    encrypted values first. Interrupted, the same command goes on where it stopped.
    """
    with db.connect(autocommit=True, any_version=True) as connection:
        here = steps.look(connection)
        report: Report = {"database": db.where(connection), "installed": here["installed"]}
        out.say(db.where(connection), style="bold")
        if here["installed"] and not here["permitted"]:
            raise Problem(
                f"{connection.info.user} may not uninstall pg_rekey: nothing was changed",
                f"A superuser may; and {here['installer'] or 'the role'} that installed it, as a member of "
                "rekey_owner, rekey_sweeper, rekey_admin and rekey_app.",
            )
        goes_on = here["installed"] or _look_for_remains(connection, out, here, dry_run, yes)
    if here["installed"]:
        goes_on = _remove(out, report, here, (export, audit_log), dry_run, yes)
    if goes_on:
        with db.connect(
            autocommit=True, any_version=True
        ) as connection:  # the first one may have been idle for too long
            _clean_up(connection, out, report, here)
    if out.json:
        out.document(report)
    if report.get("obstacles"):
        raise click.exceptions.Exit(FINDINGS)


def _remove(
    out: Output,
    report: Report,
    here: steps.Row,
    paths: tuple[Path | None, Path | None],
    dry_run: bool,
    yes: bool,
) -> bool:
    """Decrypt, export and drop; tell whether that was done."""
    files: list[Path] = []
    with worker.connect() as connection:
        plan = steps.plan(connection, *paths)
        report |= asdict(plan)
        _describe(connection, out, here, plan, paths)
        if dry_run:
            out.say("nothing was changed")
            return False
        if plan.obstacles:
            raise Problem(
                f"nothing was changed: {plan.obstacles[0].what}",
                f"{plan.obstacles[0].advice} (--dry-run lists all that is in the way.)",
            )
        confirm(connection, "Do all of that?", yes)
        try:
            for column in plan.columns:
                _decrypt(connection, column)
            steps.drop(connection, here, lambda *documents: _save(documents, paths, files))
        except KeyboardInterrupt:
            raise _interrupted(files) from None
    report["files"] = files
    for path in files:
        out.say(f"  {path} written")
    out.say("  pg_rekey dropped")
    return True


def _describe(
    connection: db.Connection,
    out: Output,
    here: steps.Row,
    plan: Plan,
    paths: tuple[Path | None, Path | None],
) -> None:
    """Say what would be done, and what is in the way."""
    export, audit_log = paths
    for column in plan.columns:
        out.say(f"  {column.label}: {words.count(column.rows, 'row')} to decrypt")
    out.say(f"  secrets: {plan.secrets} of {plan.tenants} tenants, to {export or 'no file'}")
    entries = words.count(plan.audit_entries, "entry", "entries")
    out.say(f"  audit log: {entries}, to {audit_log or 'no file'}")
    for job in steps.jobs(connection, here):
        out.say(f"  pg_cron's job {job['jobid']} ends")
    what = "the extension pg_rekey" if here["extension"] else "schemas rekey and rekey_targets, and the RPC"
    out.say(f"  to drop: {what}")
    if databases := steps.other_databases(connection):
        out.say(f"  roles: stay, since {', '.join(databases)} has pg_rekey too")
    else:
        out.say("  to drop: its roles, where nothing else uses them")
    for obstacle in plan.obstacles:
        out.say(f"in the way: {obstacle.what}", style="bold")
        out.say(f"  {obstacle.advice}")


def _decrypt(connection: db.Connection, column: Column) -> None:
    done = 0
    try:
        for count in release(connection, column.table, column.column, column.rows > 0):
            done += count
            click.echo(f"{column.label}: {done:,} of {words.count(column.rows, 'row')} decrypted", err=True)
    except psycopg.Error as error:
        message, hint = explain(error)
        raise Problem(f"{column.label}: {message} [{error.sqlstate}]", hint) from None


def _save(documents: tuple[Document, ...], paths: tuple[Path | None, Path | None], files: list[Path]) -> None:
    """Write the secrets and the audit log: both or none."""
    try:
        for document, path in zip(documents, paths, strict=True):
            if path is not None:
                write_new(path, to_json(document) + "\n")
                files.append(path)
            elif document.get("secrets") or document.get("entries"):
                raise Problem(
                    "there is more to export than there was: nothing was dropped", "Repeat the command."
                )
    except OSError as error:
        _take_back(files)
        raise Problem(f"{error.filename or 'the export'}: {error.strerror}: nothing was dropped") from None
    except BaseException:
        _take_back(files)
        raise


def _take_back(files: list[Path]) -> None:
    while files:
        files.pop().unlink()


def _interrupted(files: list[Path]) -> Problem:
    if not files:
        return Problem("interrupted", "The same command goes on where it stopped.", INTERRUPTED)
    return Problem(
        f"interrupted at the end: {' and '.join(map(str, files))} complete, pg_rekey dropped or not",
        "The same command, with other file names, ends it.",
        INTERRUPTED,
    )


def _look_for_remains(
    connection: db.Connection, out: Output, here: steps.Row, dry_run: bool, yes: bool
) -> bool:
    """Say what is left where pg_rekey is not installed; tell whether to clean up."""
    databases = steps.other_databases(connection)
    roles = [row["name"] for row in steps.roles(connection)]
    jobs = [str(job["jobid"]) for job in steps.jobs(connection, here)]
    out.say("pg_rekey is not installed in this database")
    if jobs:
        out.say(f"  pg_cron's jobs {', '.join(jobs)} are left")
    if databases:
        out.say(f"  roles: stay, since {', '.join(databases)} has pg_rekey")
    elif roles:
        out.say(f"  roles {', '.join(roles)} are left")
    if dry_run or not (jobs or (roles and not databases)):
        return False
    confirm(connection, "Drop what nothing else uses?", yes)
    return True


def _clean_up(connection: db.Connection, out: Output, report: Report, here: steps.Row) -> None:
    """End jobs and drop roles, as far as that can be, and say what is for somebody else to do."""
    ended, left = steps.unschedule(connection, here)
    done = steps.drop_roles(connection)
    migrations = steps.migrations(connection)
    report |= {"jobs_ended": ended, "jobs_left": left, "roles": asdict(done), "migrations": migrations}
    for number in ended:
        out.say(f"  pg_cron's job {number} ended")
    for number in left:
        out.say(
            f"  pg_cron's job {number} is left. In {here['cron_database']}: select cron.unschedule({number})"
        )
    for role in done.dropped:
        members = f", which had the members {', '.join(role['members'])}" if role["members"] else ""
        out.say(f"  role {role['name']} dropped{members}")
    for role in done.kept:
        out.say(f"  role {role['name']} stays: {role['why']}")
    for version in migrations:
        out.say(
            f"  the Supabase CLI takes migration {version} for applied. Delete it from the project, then:\n"
            f"    supabase migration repair --status reverted {version}"
        )
    out.say("done. Keep the KEK as long as backups: what is in them opens with nothing else.")
