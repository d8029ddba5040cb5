"""The command line: `pg-rekey`."""

import click

from pg_rekey import release
from pg_rekey.cli import (
    audit,
    columns,
    demo,
    doctor,
    init,
    kek,
    keyrings,
    keys,
    metrics,
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
from pg_rekey.cli.base import Root


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(release.version(), prog_name="pg-rekey")
def main() -> None:
    """Rotate encryption keys in PostgreSQL, online, and prove that every row opens.

    The database is the one that PG_REKEY_DSN names, else DATABASE_URL, else libpq's own variables (PGHOST and
    so on). There is no option for it, since arguments are visible to everybody on the machine.

    The key-encryption key (KEK) comes from PG_REKEY_KEK, PG_REKEY_KEK_FILE or PG_REKEY_KEK_COMMAND; the next
    one, while it is being replaced, from the same three with NEW_KEK.

    Exit codes: 0 fine, 1 failed, 2 wrong usage, 3 KEK missing or wrong, 4 a rotation failed or has failures,
    5 findings.
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
    metrics.metrics,
    serve.serve,
    sql.sql,
):
    main.add_command(command)
