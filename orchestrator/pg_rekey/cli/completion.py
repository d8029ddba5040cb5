"""`pg-rekey completion`: what makes a shell complete commands, options and names."""

import click
from click.shell_completion import FishComplete, add_completion_class, get_completion_class

from pg_rekey.cli.commands import Command
from pg_rekey.errors import Problem

VARIABLE = "_PG_REKEY_COMPLETE"


@add_completion_class
class Fish(FishComplete):
    """Completion for fish: click's own takes a comma in a name or a description for its end."""

    source_template = FishComplete.source_template.replace(
        'string split "," $completion', 'string split --max 1 "," $completion'
    )


@click.command(cls=Command, example="pg-rekey completion bash >> ~/.bash_completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that makes a shell complete commands, options, and names in the database.

    For zsh, put it at the end of ~/.zshrc; for fish, into ~/.config/fish/completions/pg-rekey.fish.
    """
    found = get_completion_class(shell)
    if found is None:
        raise Problem(f"there is no completion for {shell}")
    click.echo(found(ctx.find_root().command, {}, "pg-rekey", VARIABLE).source())
