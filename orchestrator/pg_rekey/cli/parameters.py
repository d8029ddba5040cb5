"""Names as parameters of commands: completed by the shell, and asked back where they are almost right."""

from typing import Any

import click
from click.shell_completion import CompletionItem

from pg_rekey import db, names

# Seconds that a person who pressed the tabulator waits for a server that is not there.
PATIENCE = 2


class Name(click.ParamType[Any]):
    """The name of something in the database."""

    def __init__(self, kind: str, number: bool = False) -> None:
        self.name = self.kind = kind
        self._number = number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name as it is; whether there is one of it the database says."""
        return click.INT.convert(value, param, ctx) if self._number else value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the names that begin so; none where the database does not tell."""
        try:
            with db.connect(patience=PATIENCE, quiet=True) as connection:
                found = names.known(connection, self.kind, **ctx.params)
        except Exception:  # whatever is wrong: a message would end up in the line that is typed
            return []
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]


FAILURE = Name("failure", number=True)
KEYRING = Name("keyring")
ROTATION = Name("rotation", number=True)
SECRET = Name("secret")
SETTING = Name("setting")
ENDPOINT = Name("endpoint")
TABLE = Name("table")
COLUMN = Name("column")
VERSION = Name("version", number=True)


def typed(context: click.Context) -> dict[str, str]:
    """Return what was typed on the command line for each kind of name."""
    return {
        parameter.type.kind: str(context.params[str(parameter.name)])
        for parameter in context.command.params
        if isinstance(parameter.type, Name) and context.params.get(str(parameter.name)) is not None
    }
