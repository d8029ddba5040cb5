"""`pg-rekey sql`: the installation script."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from pg_rekey import release
from pg_rekey.cli.base import Output, output, write_new
from pg_rekey.cli.commands import Command
from pg_rekey.errors import USAGE, Problem


@click.command(cls=Command, example="pg-rekey sql --road supabase --project .")
@click.option(
    "--road",
    type=click.Choice(["plain", "extension", "supabase", "pgtle"]),
    default="plain",
    help="plain: one transaction anywhere; extension: for CREATE EXTENSION; supabase: a migration; pgtle: for"
    " CREATE EXTENSION by pg_tle, where no files can be placed.",
)
@click.option("--since", metavar="VERSION", help="With pgtle: the way from that version to this one.")
@click.option(
    "--project",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With supabase: write what the project in this folder lacks as its next migrations.",
)
@output
def sql(out: Output, road: release.Road, since: str | None, project: Path | None) -> None:
    """Print the installation script, to read it or to run it by other means.

    With --project or --since, an older version gets the steps to this one.
    """
    if since is not None and road != "pgtle":
        raise click.UsageError("--since goes with --road pgtle, and only with it")
    if project is None:
        script = release.sql_script(road) if since is None else _update(since)
        if out.json:
            out.document({"road": road, "version": release.version(), "script": script})
        else:
            click.echo(script, nl=False)
        return
    if road != "supabase":
        raise click.UsageError("--project goes with --road supabase, and only with it")
    folder = _migrations(project)
    written = []
    for script in _pending(folder):
        path = folder / f"{_next_stamp(folder):{release.STAMP}}_pg_rekey.sql"
        write_new(path, script, 0o644)
        written.append(path)
    out.done(
        "\n".join([*(f"{path} written" for path in written), "`supabase db push` applies it"]),
        paths=[str(path) for path in written],
        version=release.version(),
    )


def _update(since: str) -> str:
    try:
        return release.pgtle_update(since)
    except KeyError:
        raise Problem(
            f"from version {since} there is no way to {release.version()}",
            "`select rekey.version();` says which one a database has.",
        ) from None


def _migrations(project: Path) -> Path:
    if not (project / "supabase").is_dir():
        raise Problem(f"{project} is no Supabase project", "`supabase init` makes it one.", USAGE)
    folder = project / "supabase" / "migrations"
    folder.mkdir(exist_ok=True)
    return folder


def _pending(folder: Path) -> list[str]:
    """Return the scripts that the project does not have yet: the installation, or steps to this version."""
    found = sorted(folder.glob("*_pg_rekey.sql"))
    if not found:
        return [release.sql_script("supabase")]
    since = release.script_version(found[-1].read_text()) or "unknown"
    try:
        steps = release.steps(since)
    except KeyError:
        raise Problem(
            f"{found[-1]} leads to version {since}, which this pg-rekey {release.version()} does not know",
            "Use the pg-rekey of that version or a newer one.",
        ) from None
    if not steps:
        raise Problem(f"the project has it already: {found[-1]}", "A database takes it once.")
    return [release.step_script("supabase", step) for step in steps]


def _next_stamp(folder: Path) -> datetime:
    """Return the time of a migration that comes after all that the project has."""
    stamps = [datetime.now(UTC)]
    # The Supabase CLI refuses a migration that is older than the last one applied.
    for path in folder.glob("[0-9]*_*.sql"):
        try:
            last = datetime.strptime(path.name.partition("_")[0], release.STAMP).replace(tzinfo=UTC)
        except ValueError:
            continue
        stamps.append(last + timedelta(seconds=1))
    return max(stamps)
