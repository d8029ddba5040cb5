"""`pg-rekey demo`: see it work."""

import contextlib
import io
import shlex
import signal
import sys
from typing import Any

import click

from pg_rekey.cli.base import Output, output
from pg_rekey.cli.commands import Command
from pg_rekey.demo import Demo, Sizes
from pg_rekey.errors import Problem


@click.command(cls=Command, example="pg-rekey demo")
@click.option("--secrets", type=click.IntRange(1), default=50_000, show_default=True)
@click.option("--tenants", type=click.IntRange(1), default=3, show_default=True)
@click.option("--readers", type=click.IntRange(0), default=2, show_default=True, help="Processes that read.")
@click.option("--writers", type=click.IntRange(0), default=2, show_default=True, help="Processes that write.")
@click.option("--seconds", default=5.0, show_default=True, help="Time to measure before and after, each.")
@click.option("--console", is_flag=True, help="Serve the console at the end, until Ctrl-C.")
@output
def demo(
    out: Output, secrets: int, tenants: int, readers: int, writers: int, seconds: float, console: bool
) -> None:
    """Rotate the keys of real secrets in a real server, live, while readers and writers go on.

    The server is a throwaway one, or, with PG_REKEY_DSN, that one: there it makes a database of its own and
    drops it at the end. Every figure is measured in this run.
    """
    root = click.get_current_context().find_root().command
    # So that a SIGTERM, too, ends everything that was started.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def shell(*arguments: str) -> int:
        """Run a command of pg-rekey in this process, as if it was typed."""
        out.say(f"$ pg-rekey {shlex.join(arguments)}", style="bold cyan")
        with contextlib.redirect_stdout(io.StringIO()) if out.json else contextlib.nullcontext():
            return int(root.main(list(arguments), prog_name="pg-rekey", standalone_mode=False) or 0)

    def tell(result: dict[str, Any]) -> None:
        if out.json:
            out.document(result)
            return
        out.say("\n== What was measured")
        out.table(result["phases"])
        calls = f"{result['reads']:,} reads and {result['writes']:,} writes"
        out.say(f"\n{calls} went on meanwhile, {result['failed']} failed.")
        compared = f"All {result['secrets']:,} secrets compared with what was last stored"
        out.say(f"{compared}: {len(result['wrong'])} differ.")
        out.say(f"{result['seconds']:.0f} s in all.")

    sizes = Sizes(max(secrets, tenants, writers), tenants, readers, writers, seconds)
    try:
        result = Demo(sizes, shell, out.say).run(tell, console=console)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not out.json:
        out.say("Nothing is left running.")
    if result["wrong"] or result["failed"]:
        raise Problem("the demo found errors", "; ".join([*result["errors"], *result["wrong"][:5]]))
