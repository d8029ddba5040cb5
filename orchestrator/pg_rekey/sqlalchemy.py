"""A column type for SQLAlchemy: values of protected columns, opened by the statement that reads them."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql import operators
from sqlalchemy.types import TypeDecorator

from pg_rekey import client

_PREPARER = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]


class Sealed(TypeDecorator[Any]):
    """A text column that `pg-rekey columns protect --encrypt-on-write` protects; `binary`: a bytea one.

    What is written goes as it is: the trigger of the column seals it for its row, in the same statement. What
    is read is opened by the server, any number of rows in one statement. A value cannot be compared, only
    asked whether it is null: the same value is sealed otherwise each time.

    context: names of the columns that tell rows apart, as given to `protect --context`; by default the
    primary key. label: that of `pg-rekey columns list`, where table or column were renamed since.
    """

    impl = sa.Text
    cache_ok = True

    class Comparator(TypeDecorator.Comparator[Any]):
        """Compares with NULL only."""

        def operate(self, op: Any, *other: Any, **options: Any) -> Any:
            """Refuse what would compare envelopes."""
            if op not in (operators.is_, operators.is_not):
                raise TypeError("a sealed column can be asked for NULL only, and not compared")
            return super().operate(op, *other, **options)

    comparator_factory = Comparator

    def __init__(self, *context: str, label: str | None = None, binary: bool = False) -> None:
        super().__init__()
        self.context = context
        self.label = label
        self.binary = binary

    def load_dialect_impl(self, dialect: sa.Dialect) -> Any:
        """Return the type of the column in the database."""
        return dialect.type_descriptor(sa.LargeBinary() if self.binary else sa.Text())

    def column_expression(self, column: Any) -> Any:
        """Return what stands in a SELECT in place of the column."""
        table = column.table
        names = self.context or [key.name for key in table.primary_key]
        parts = [sa.cast(table.c[name], sa.Text) for name in names]
        label = sa.literal(self.label or _label(column))
        # Made once for the statement: each row is opened with it.
        read = sa.select(sa.func.rekey.reading_pass(label, type_=sa.LargeBinary())).scalar_subquery()
        opened = sa.func.rekey.decrypt if self.binary else sa.func.rekey.decrypt_text
        kind = sa.LargeBinary() if self.binary else sa.Text()
        return opened(column, postgresql.array([label, *parts]), read, type_=kind)


def _label(column: Any) -> str:
    """Return the label of a column whose table has the name that it had when it was protected."""
    table = getattr(column.table, "element", column.table)
    return ".".join(map(_PREPARER.quote, (table.schema or "public", table.name, column.name)))


def unlock(engine: sa.Engine, kek: bytes | str | None = None) -> None:
    """Give each transaction of an engine the KEK.

    kek: as pg_rekey.connect() takes it; by default that of the environment. Not
    needed where the server finds the KEK by itself (provider vault or file). For the dialect psycopg.
    """

    @event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        client.unlock(connection.connection.driver_connection, kek)  # type: ignore[arg-type]
