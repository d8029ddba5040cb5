"""`pg-rekey serve`: the HTTP API and the console."""

import click

from pg_rekey.api import tokens
from pg_rekey.cli.base import Output, output
from pg_rekey.cli.commands import Command
from pg_rekey.errors import Problem


@click.command(cls=Command, example="pg-rekey serve --port 8080")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one."
)
@click.option(
    "--new-token", metavar="NAME", help="Make a token of this name, print it and its entry, and end."
)
@click.option(
    "--role",
    type=click.Choice(["read", "operate", "admin"]),
    default="admin",
    show_default=True,
    help="What the new token may: look; also work, pause, resume, retry, count and verify; everything.",
)
@output
def serve(out: Output, host: str, port: int, new_token: str | None, role: tokens.Role) -> None:
    """Serve the console at / and the HTTP API: control, progress, audit log, metrics. OpenAPI at /docs.

    Tokens are configured by their SHA-256: PG_REKEY_API_TOKENS holds NAME:HASH of each administrator and
    NAME:HASH:ROLE of others, separated by commas or white space, or PG_REKEY_API_TOKENS_FILE names a file
    with one a line, which is read again when it changes. PG_REKEY_METRICS_TOKENS and
    PG_REKEY_METRICS_TOKENS_FILE have those that may only read /metrics.

    PG_REKEY_DSN is the login of an administrator; PG_REKEY_OPERATE_DSN and PG_REKEY_READ_DSN are those for
    tokens that may less, which else share it.

    It speaks plain HTTP: put TLS in front of it. SIGTERM and Ctrl-C end it after the requests in hand. It
    prints JSON log lines, with or without --json.
    """
    if new_token is not None:
        token, entry = tokens.make(new_token, role)
        click.echo("The token, which is not shown again, and its entry for the configuration:", err=True)
        out.done(f"{token}\n{entry}", token=token, entry=entry)
        return
    try:
        from pg_rekey.api import server
    except ModuleNotFoundError as error:
        raise Problem(f"{error.name} is not installed", "Install pg-rekey[api].") from None
    server.run(host, port)
