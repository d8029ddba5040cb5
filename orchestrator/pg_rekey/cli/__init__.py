"""The command line: `pg-rekey`."""

import click

from pg_rekey import release
from pg_rekey.cli import (
    audit,
    columns,
    completion,
    demo,
    doctor,
    init,
    kek,
    keyrings,
    keys,
    metrics,
    notify,
    rotate,
    rotations,
    schedule,
    secrets,
    serve,
    settings,
    sql,
    status,
    uninstall,
    upgrade,
    verify,
    work,
)
from pg_rekey.cli.root import Root


@click.group(
    cls=Root,
    # As wide as the terminal.
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 10_000},
)
@click.version_option(release.version(), prog_name="pg-rekey")
def main() -> None:
    """Rotate encryption keys in PostgreSQL, online, and prove that every row opens.

    The database is the one that PG_REKEY_DSN names, else DATABASE_URL, else libpq's own variables (PGHOST and
    so on). There is no option for it, since arguments are visible to everybody on the machine.

    The key-encryption key (KEK) comes from PG_REKEY_KEK, PG_REKEY_KEK_FILE or PG_REKEY_KEK_COMMAND; the next
    one, while it is being replaced, from the same three with NEW_KEK. NO_COLOR takes the colours away.

    Exit codes: 0 fine, 1 failed, 2 wrong usage, 3 KEK missing or wrong, 4 a rotation failed or has failures,
    5 findings, 6 no such thing (RK007), 7 a rotation is under way (RK004), 8 in use or blocked (RK005),
    9 no connection to the database, 127 a command that cannot be run (secrets run), 130 interrupted.

    Documentation: README.md and docs/ of the source, docs/operations.md first.
    """


for command in (
    init.init,
    upgrade.upgrade,
    uninstall.uninstall,
    status.status,
    doctor.doctor,
    demo.demo,
    rotate.rotate,
    work.work,
    verify.verify,
    kek.kek,
    keyrings.keyrings,
    keys.keys,
    rotations.rotations,
    schedule.schedule,
    settings.settings,
    secrets.secrets,
    columns.columns,
    audit.audit,
    notify.notify,
    metrics.metrics,
    serve.serve,
    completion.completion,
    sql.sql,
):
    main.add_command(command)
