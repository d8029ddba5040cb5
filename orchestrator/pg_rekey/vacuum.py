"""Vacuums between the batches of a sweep, so that its next rows fill what its last ones left behind.

A table without free space would else be twice as large after a rotation: autovacuum looks only once a minute.
"""

from dataclasses import dataclass

import psycopg
from psycopg import sql

from pg_rekey import db


@dataclass
class _Table:
    fifth: int  # of its rows
    swept: int = 0


class Vacuum:
    """Vacuums a table each time that a fifth of its rows was swept, where that pays and the session may.

    beside: that of another worker, with whom its rows are counted together.
    """

    def __init__(self, connection: db.Connection, beside: "Vacuum | None" = None) -> None:
        self._connection = connection
        self._tables: dict[int, _Table | None] = beside._tables if beside else {}

    def swept(self, relation: int, rows: int) -> None:
        """Note how many rows of a relation, given by its oid, were swept; no transaction may be open."""
        if relation not in self._tables:
            found = self._connection.execute(db.query("vacuum pays"), [relation]).fetchone()
            self._tables[relation] = _Table(**found) if found else None
        if (table := self._tables.get(relation)) is None:
            return
        table.swept += rows
        if table.swept >= table.fifth:
            table.swept = 0
            # What it is called now: tables are renamed and moved in the middle of a sweep.
            found = self._connection.execute(db.query("relation name"), [relation]).fetchone()
            if found is None:
                self._tables[relation] = None
                return
            name = sql.Identifier(found["schema"], found["name"])
            try:
                self._connection.execute(sql.SQL("vacuum (skip_locked, truncate false) {}").format(name))
            except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
                pass  # renamed or dropped since
            except psycopg.errors.QueryCanceled:
                # statement_timeout, or somebody who minds: the sweep goes on without.
                self._tables[relation] = None
