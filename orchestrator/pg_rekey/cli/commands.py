"""What commands and groups have in common: help that is whole, with an example, as wide as the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import click

from pg_rekey.cli import parameters

# What the root group knows of the command that failed.
COMMAND, TYPED = "pg_rekey.command", "pg_rekey.typed"
_WHOLE = 10_000


class Whole(click.Command):
    """Has descriptions that are never cut: on help pages, and where a shell completes."""

    def get_short_help_str(self, limit: int = _WHOLE) -> str:
        """Return the first sentence."""
        return super().get_short_help_str(limit)


class Command(Whole):
    """A command, with an example on its help page."""

    def __init__(self, *args: Any, example: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.example = example

    def invoke(self, ctx: click.Context) -> Any:
        """Run it, and let the root group know what was typed, for hints."""
        ctx.meta[COMMAND] = ctx.command_path.partition(" ")[2]
        ctx.meta[TYPED] = parameters.typed(ctx)
        return super().invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        with formatter.section("Example"):
            for line in self.example.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Group(Whole, click.Group):
    """A group of commands."""

    command_class = Command
    # Titles, and the commands under each; what is in none comes last.
    sections: ClassVar[Mapping[str, Sequence[str]]] = {}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, in sections where there are some."""
        listed = {name for names in self.sections.values() for name in names}
        rest = [name for name in self.list_commands(ctx) if name not in listed]
        for title, names in {**self.sections, "Commands": rest}.items():
            self._write(title, names, formatter)

    def _write(self, title: str, names: Iterable[str], formatter: click.HelpFormatter) -> None:
        rows = [(name, self.commands[name].get_short_help_str()) for name in names]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)
