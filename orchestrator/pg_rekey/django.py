"""A model field for Django: values of protected columns, opened by the statement that reads them."""

from collections.abc import Sequence
from typing import Any

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from pg_rekey import client


class SealedTextField(models.TextField):  # type: ignore[type-arg]
    """A text column that `pg-rekey columns protect --encrypt-on-write` protects.

    What is written goes as it is: the trigger of the column seals it for its row, in the same statement. What
    is read is opened by the server, any number of rows in one statement. Rows cannot be looked up by a value,
    only by `isnull`: the same value is sealed otherwise each time.

    context: database columns that tell rows apart, as given to `protect --context`; by default the primary
    key. label: that of `pg-rekey columns list`, where schema, table or column are not what they were then.
    """

    def __init__(
        self, *args: Any, context: Sequence[str] = (), label: str | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.context = tuple(context)
        self.label = label

    def deconstruct(self) -> Any:
        """Return what a migration makes the field anew from."""
        name, path, args, options = super().deconstruct()
        if self.context:
            options["context"] = self.context
        if self.label:
            options["label"] = self.label
        return name, path, args, options

    def get_lookup(self, lookup_name: str) -> Any:
        """Refuse what would compare envelopes."""
        if lookup_name != "isnull":
            raise TypeError(f"{self.name} is sealed: rows can be looked up by its being NULL only")
        return super().get_lookup(lookup_name)

    def select_format(self, compiler: Any, sql: str, params: Any) -> Any:
        """Return what stands in a SELECT in place of the column."""
        quote = compiler.connection.ops.quote_name
        table = sql.rpartition(".")[0]
        names = self.context or [self.model._meta.pk.column]
        parts = ", ".join(f"{table}.{quote(name)}::text" for name in names)
        label = self.label or _label(self.model._meta.db_table, str(self.column))
        # Made once for the statement: each row is opened with it.
        read = "(SELECT rekey.reading_pass(%s))"
        return f"rekey.decrypt_text({sql}, ARRAY[%s, {parts}], {read})", [*params, label, label]


def _label(table: str, column: str) -> str:
    """Return the label of a column of a table in schema public, as format('%I') writes it."""
    return ".".join(
        name if name.isidentifier() and name.islower() else f'"{name}"' for name in ("public", table, column)
    )


def unlock(kek: bytes | str | None = None) -> None:
    """Give each connection that Django makes from now on the KEK, for its session.

    kek: as pg_rekey.connect() takes it; by default that of the environment.

    To be called in AppConfig.ready(). Not needed where the server finds the KEK by itself (provider vault or
    file), and not for a transaction pooler, whose sessions serve others too.
    """

    def created(connection: BaseDatabaseWrapper, **_: Any) -> None:
        if connection.vendor == "postgresql":
            client.unlock(connection.connection, kek, "session")

    connection_created.connect(created, weak=False, dispatch_uid="pg_rekey")
